"""Gated delta nets (Qwen3.5's ``linear_attention`` layers) in packed rows and rollouts: each prompt once.

Such a layer reads a text from left to right and carries a state (``DeltaState``): its convolution's latest inputs and
the delta rule's memory. In a packed row, every completion starts in its prompt's final state, and gradients flow back
into it. In a rollout the state lies in the cache, next to the keys and values of the attention layers.

The projections before and after the recurrence are computed for all rows together. A call without ``fastrl_segments``
or ``fastrl_cache`` is the layer's own: the whole model's ``generate``, padded rows of other trainers, and attention
maps, whose row is one text.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrl.models.attention.delta_rule import DeltaState, convolve, delta_rule, delta_step, next_window
from fastrl.segments import Scan, Segments
from fastrl_kernels._gather_rows import gather_rows

# The modules and parameters of a layer that these functions compute. Layers with others are not supported.
MODULES = {"conv1d", "norm", "out_proj", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"}
PARAMETERS = {"dt_bias", "A_log"}


class Inputs(NamedTuple):
    """What the recurrence of a layer reads of its tokens."""

    mixed: Tensor  # [B, T, C]: queries, keys and values before the convolution
    log_decay: Tensor  # [B, T, H] float32 or wider
    rate: Tensor  # [B, T, H]


def share_states(language: nn.Module) -> int:
    """Switch a text model's delta nets to the forward of this file; returns their number."""
    layers = [module for module in language.modules() if is_delta_net(module)]
    for layer in layers:
        layer.forward = MethodType(_forward, layer)
    return len(layers)


def is_delta_net(module: nn.Module) -> bool:
    """Whether a module consists of the known parts of a gated delta net only. The convolution's weight is read without
    a call of its module, so nothing may be around it."""
    children, own = dict(module.named_children()), {name for name, _ in module.named_parameters(recurse=False)}
    return set(children) == MODULES and own == PARAMETERS and type(children["conv1d"]) is nn.Conv1d


def scan(
    net: Any, x: Inputs, state: DeltaState | None, *, length: Tensor | None = None, real: Tensor | None = None,
    final: bool = True,
) -> tuple[Tensor, DeltaState]:  # fmt: skip
    """Read T tokens of B texts.

    Args:
        net: the layer.
        x: of the tokens, right-padded.
        state: before the first token; None: nothing was read yet.
        length, real: [B] and [B, T] bool if some texts are padded.
        final: compute the memory after the last token.

    Returns:
        [B, T, H, Dv] and the state after each text's last token.
    """
    log_decay, rate = x.log_decay, x.rate
    if real is not None:  # padding changes no memory
        log_decay, rate = (part.masked_fill(~real[..., None], 0) for part in (log_decay, rate))
    window, memory = state or empty_state(net, x)
    query, key, value = _convolved(net, x.mixed, window)
    out, memory = delta_rule(query, key, value, log_decay, rate, memory, final=final)
    return out.to(x.mixed.dtype), DeltaState(next_window(x.mixed, window, length), memory)


def step(net: Any, x: Inputs, state: DeltaState) -> Tensor:
    """Read one token of B texts and change ``state`` in place → [B, 1, H, Dv]. Without gradients."""
    query, key, value = (part[:, 0] for part in _convolved(net, x.mixed, state.window))
    state.window.copy_(next_window(x.mixed, state.window, None))
    out = delta_step(query, key, value, x.log_decay[:, 0], x.rate[:, 0], state.memory)
    return out[:, None].to(x.mixed.dtype)


def empty_state(net: Any, x: Inputs) -> DeltaState:
    """The state of texts of which nothing was read yet."""
    rows, _, channels = x.mixed.shape
    window = x.mixed.new_zeros(rows, net.conv_kernel_size - 1, channels)
    return DeltaState(window, x.log_decay.new_zeros(rows, x.rate.shape[-1], net.head_k_dim, net.head_v_dim))


def scan_row(net: Any, x: Inputs, segments: Segments) -> Tensor:
    """The recurrence over one packed row: ``x`` [1, L, …] → [1, L, H, Dv]."""
    if x.mixed.shape[:2] != (1, segments.length):
        raise ValueError(f"hidden: expected one row of {segments.length} tokens, got {list(x.mixed.shape[:2])}")
    tables = segments.scans
    read = [scan(net, _at(x, one), None, length=one.length, real=one.real) for one in tables.prompts]
    ends = DeltaState(*(torch.cat(parts) for parts in zip(*(state for _, state in read), strict=True)))
    outs = [out for out, _ in read]
    for one in tables.completions:
        state = DeltaState(*(gather_rows(part, one.source) for part in ends))
        outs.append(scan(net, _at(x, one), state, length=one.length, real=one.real, final=False)[0])
    places = [one.valid for one in (*tables.prompts, *tables.completions)]
    out = torch.cat([o.flatten(0, 1).index_select(0, valid) for o, valid in zip(outs, places, strict=True)])
    return (out if tables.order is None else out.index_select(0, tables.order))[None]


def _at(x: Inputs, one: Scan) -> Inputs:
    """The inputs of a scan's segments, [B, T, …]."""
    rows = one.rows.flatten()
    return Inputs(*(part[0].index_select(0, rows).unflatten(0, one.rows.shape) for part in x))


def _convolved(net: Any, mixed: Tensor, window: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys [B, T, H, Dk] (repeated for the value heads that share them) and values [B, T, H, Dv]."""
    mixed = F.silu(convolve(mixed, net.conv1d.weight[:, 0], net.conv1d.bias, window))
    *shared, value = mixed.split([net.key_dim, net.key_dim, net.value_dim], -1)
    heads = net.num_v_heads // net.num_k_heads
    query, key = (part.unflatten(-1, (-1, net.head_k_dim)).repeat_interleave(heads, 2) for part in shared)
    return query, key, value.unflatten(-1, (-1, net.head_v_dim))


def _forward(
    self: Any, hidden_states: Tensor, cache_params: Any = None, attention_mask: Tensor | None = None, **kwargs: Any
) -> Tensor:
    """The layer's forward, for ``hidden_states`` [B, L, hidden]."""
    segments, cache = kwargs.pop("fastrl_segments", None), kwargs.pop("fastrl_cache", None)
    kwargs.pop("fastrl_probe", None)
    if unknown := [name for name in kwargs if name.startswith("fastrl_")]:
        raise NotImplementedError(f"gated delta nets cannot take their prompts' states from {', '.join(unknown)}")
    if segments is None and cache is None:
        return type(self).forward(self, hidden_states, cache_params, attention_mask, **kwargs)
    wide = torch.promote_types(hidden_states.dtype, torch.float32)
    step_size = F.softplus(self.in_proj_a(hidden_states).to(wide) + self.dt_bias)
    log_decay = -self.A_log.to(wide).exp() * step_size
    x = Inputs(self.in_proj_qkv(hidden_states), log_decay, self.in_proj_b(hidden_states).sigmoid())
    out = scan_row(self, x, segments) if segments is not None else cache.recur(self.layer_idx, self, x)
    gate = self.in_proj_z(hidden_states).view(-1, self.head_v_dim)
    normed = self.norm(out.reshape(-1, self.head_v_dim), gate)
    return self.out_proj(normed.view(*hidden_states.shape[:-1], -1))
