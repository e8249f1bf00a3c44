"""A rollout's keys, values and recurrent states, and the attention that writes and reads them.

A prompt's keys and values are stored once for all its rows; those of generated tokens are stored per row. The state of
a recurrent layer has a fixed size and changes with every token, so each row starts with a copy of its prompt's.

Prompts are prefilled by the model's own forward. For the duration of a call its attention is switched to a function
that passes the layer's keys and values to the object given as ``fastrl_cache`` (``attend``); recurrent layers pass it
their inputs (``recur``). Positions are always explicit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastrl.models.attention.delta_net import Inputs, empty_state, scan, step
from fastrl.models.attention.delta_rule import DeltaState
from fastrl.models.attention.switch import attention, register
from fastrl.models.families import Family, family_of
from fastrl_kernels.decode_attention import decode_attention

ATTENTION = "fastrl_rollout"
OWN_BLOCK = 256  # tokens by which the rows' own keys grow
# cuDNN's backend is left out: it makes a plan for every new shape, and nearly every call has new prompt lengths.
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class PromptCache:
    """Keys and values of B texts that grow together, right-padded: per layer [B, Hkv, capacity, D].

    ``length`` [B] (on the host) counts the valid keys of each text. Padding holds finite numbers. ``states``: of
    recurrent layers, after each text's last token.
    """

    def __init__(self, size: int) -> None:
        self.length = [0] * size
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.states: dict[int, DeltaState] = {}
        self.capacity = 0

    @property
    def token_bytes(self) -> int:
        """Of one token's keys and values in all layers; a row's own (``RowCache``) are as large. 0 before a call."""
        buffers = [*self.keys.values(), *self.values.values()]
        return sum(held.shape[1] * held.shape[3] * held.element_size() for held in buffers)

    @property
    def state_bytes(self) -> int:
        """Of one text's states in all recurrent layers; a row's own are as large. 0 before a call."""
        return sum(state.row_bytes for state in self.states.values())

    @property
    def bytes(self) -> int:
        """Of all keys, values (padding included) and states."""
        return len(self.length) * (self.capacity * self.token_bytes + self.state_bytes)

    def append(self, rows: list[int], lengths: list[int]) -> _Append:
        """Begin a call that appends ``lengths`` new tokens to ``rows``, right-padded to the longest."""
        return _Append(self, rows, lengths)

    def reserve(self, capacity: int) -> None:
        """Make room for texts of this length."""
        if capacity <= self.capacity:
            return
        self.capacity = capacity
        for buffers in (self.keys, self.values):
            for layer, old in buffers.items():
                buffers[layer] = F.pad(old, (0, 0, 0, capacity - old.shape[2]))

    def restart(self) -> None:
        """Empty all texts; buffers keep their addresses, and what is in them is overwritten or not read."""
        self.length = [0] * len(self.length)

    @torch.no_grad()
    def fill(self, row: int, keys: Mapping[int, Tensor], values: Mapping[int, Tensor]) -> None:
        """Store an empty text whose keys and values [1, Hkv, P, D] by layer were computed elsewhere."""
        for layer, key in keys.items():
            length = key.shape[2]
            self.reserve(length)
            self.length[row] = length
            for buffer, new in zip(self.buffers(layer, key), (key, values[layer]), strict=True):
                buffer[row, :, :length] = new[0]

    def buffers(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        if layer not in self.keys:
            shape = (len(self.length), like.shape[1], self.capacity, like.shape[3])
            self.keys[layer], self.values[layer] = like.new_zeros(shape), like.new_zeros(shape)
        return self.keys[layer], self.values[layer]

    def state(self, layer: int, net: Any, x: Inputs) -> DeltaState:
        """A recurrent layer's states of all texts."""
        if layer not in self.states:
            one = empty_state(net, Inputs(*(part[:1] for part in x)))
            self.states[layer] = DeltaState(*(part.repeat_interleave(len(self.length), 0) for part in one))
        return self.states[layer]


class _Append:
    """New tokens of some texts: writes their keys after the old ones and attends causally to both; reads them into the
    states of recurrent layers."""

    def __init__(self, cache: PromptCache, rows: list[int], lengths: list[int]) -> None:
        self.cache, self.rows, self.lengths = cache, rows, lengths
        self.starts = [cache.length[row] for row in rows]
        self.fresh = not any(self.starts)
        self.width = max(lengths)
        cache.reserve(max(self.starts) + self.width)
        self._tables: tuple[Tensor, Tensor, Tensor] | None = None
        self._padding: tuple[Tensor, Tensor | None, Tensor | None] | None = None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Query [X, Hq, L, D], key and value [X, Hkv, L, D] of the call's tokens → [X, L, Hq, D]."""
        rows, columns, mask = self._tables or self._make_tables(query.device)
        keys, values = self.cache.buffers(layer, key)
        keys[rows, :, columns] = key.transpose(1, 2)
        values[rows, :, columns] = value.transpose(1, 2)
        with sdpa_kernel(BACKENDS):
            if self.fresh:  # padding is on the right, so the causal mask already excludes it
                out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
            else:
                k, v = (x[rows[:, 0], :, : mask.shape[-1]] for x in (keys, values))
                out = F.scaled_dot_product_attention(query, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
        return out.transpose(1, 2)

    def recur(self, layer: int, net: Any, x: Inputs) -> Tensor:
        """Inputs [X, L, …] of the call's tokens → [X, L, H, Dv]."""
        states = self.cache.state(layer, net, x)
        rows, length, real = self._padding or self._make_padding(x.mixed.device)
        before = None if self.fresh else DeltaState(*(part.index_select(0, rows) for part in states))
        out, after = scan(net, x, before, length=length, real=real)
        for buffer, new in zip(states, after, strict=True):
            buffer.index_copy_(0, rows, new)
        return out

    def commit(self) -> None:
        """Count the new tokens as part of the texts."""
        for row, length in zip(self.rows, self.lengths, strict=True):
            self.cache.length[row] += length

    def _make_tables(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Row [b, 1] and column [b, L] of each new key, and the mask [b, 1, L, keys] (True: attended)."""
        starts = torch.tensor(self.starts, device=device)
        columns = starts[:, None] + torch.arange(self.width, device=device)
        reach = torch.arange(max(self.starts) + self.width, device=device)
        mask = (reach <= columns[:, :, None])[:, None]
        self._tables = torch.tensor(self.rows, device=device)[:, None], columns, mask
        return self._tables

    def _make_padding(self, device: torch.device) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Rows [b] of the texts; numbers [b] of new tokens and which are real [b, L], None if nothing is padded."""
        rows = torch.tensor(self.rows, device=device)
        self._padding = rows, None, None
        if min(self.lengths) < self.width:
            length = torch.tensor(self.lengths, device=device)
            self._padding = rows, length, torch.arange(self.width, device=device) < length[:, None]
        return self._padding


class RowCache:
    """Keys and values of R decoding rows, [R, Hkv, T, D] per layer, next to those of the prompts, which rows share, and
    the rows' own states of recurrent layers.

    Rows of one prompt are adjacent: ``offsets[g] : offsets[g + 1]`` are the rows of prompt ``g``, and rows from
    ``offsets[-1]`` on have no prompt (they fill a bucket). ``step`` counts the row keys written so far. With ``static``
    no shape changes from step to step, no buffer moves, and a step reads nothing from the host, as a CUDA graph
    requires; otherwise attention gets only the keys written so far. The rows' own buffers begin with ``OWN_BLOCK``
    tokens and grow by as many up to ``limit`` (``reserve``), between steps: answers mostly end before they need to.
    """

    def __init__(self, prompts: PromptCache, n: int, limit: int, *, static: bool) -> None:
        size = len(prompts.length)
        self.prompt_keys, self.prompt_values = dict(prompts.keys), dict(prompts.values)
        like = next(iter(prompts.keys.values()))  # [B, Hkv, P, D]
        capacity = min(limit, OWN_BLOCK)
        device, shape = like.device, (size * n, like.shape[1], capacity, like.shape[3])
        # Allocated here and not in the first step: under a graph that step runs on another stream, and memory that
        # the allocator gave to one stream is not reused by another.
        self.keys = {layer: key.new_zeros(shape) for layer, key in prompts.keys.items()}
        self.values = {layer: value.new_zeros(shape) for layer, value in prompts.values.items()}
        self.states = {
            layer: DeltaState(*(part.repeat_interleave(n, 0) for part in state))
            for layer, state in prompts.states.items()
        }
        self.prompt_length = torch.tensor(prompts.length, dtype=torch.int32, device=device)
        self.ragged = min(prompts.length) < prompts.capacity
        self.offsets = torch.arange(size + 1, dtype=torch.int32, device=device) * n
        self.equal_groups = True  # until a row is dropped: rows are B x n in order
        self.n, self.limit, self.capacity, self.static = n, limit, capacity, static
        self.step = 0
        self.at = torch.zeros(1, dtype=torch.int64, device=device)  # step, on the device
        self.own_length = torch.ones(size * n, dtype=torch.int32, device=device)  # keys to read: step + 1
        self.offsets_of = {size * n: self.offsets}  # static: by batch size, at fixed addresses
        self._whole = self.own_length, dict(self.keys), dict(self.values), dict(self.states)

    def restart(self, prompts: PromptCache) -> None:
        """Begin again without own keys, for other prompts in the same buffers. Only if no buffer has moved."""
        self.own_length, *buffers = self._whole
        self.keys, self.values, self.states = (dict(held) for held in buffers)
        for layer, state in prompts.states.items():
            for part, shared in zip(self.states[layer], state, strict=True):
                part.copy_(shared.repeat_interleave(self.n, 0))
        self.prompt_length.copy_(torch.tensor(prompts.length, dtype=torch.int32))
        self.ragged = min(prompts.length) < prompts.capacity
        self.offsets, self.equal_groups, self.step = self.offsets_of[len(self.own_length)], True, 0
        self.at.zero_()
        self.own_length.fill_(1)

    @property
    def moved(self) -> bool:
        """Whether buffers have moved since the beginning."""
        return self.capacity > min(self.limit, OWN_BLOCK)

    def own(self, layer: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values of the rows, [R, Hkv, T, D]; those of the new token go into slot ``at``."""
        return self.keys[layer], self.values[layer]

    def reserve(self, count: int) -> bool:
        """Make room for ``count`` own keys per row, in whole blocks. Returns whether buffers moved."""
        if count <= self.capacity:
            return False
        self.capacity = min(-(-count // OWN_BLOCK) * OWN_BLOCK, self.limit)
        self._whole = self.own_length, {}, {}, {}  # not to hold the old buffers
        for buffers in (self.keys, self.values):
            for layer, old in buffers.items():  # one at a time: both copies of all would be twice the memory
                new = old.new_empty((*old.shape[:2], self.capacity, old.shape[3]))
                new[:, :, : self.step] = old[:, :, : self.step]
                new[:, :, self.step :] = 0
                buffers[layer] = new
        return True

    def attend(self, layer: int, query: Tensor, scale: float) -> Tensor:
        """Query [R, Hq, D] of the new tokens → [R, Hq, D], over prompt keys and row keys, the new ones included."""
        read = self.capacity if self.static else self.step + 1
        return decode_attention(
            query,
            self.prompt_keys[layer],
            self.prompt_values[layer],
            self.keys[layer][:, :, :read],
            self.values[layer][:, :, :read],
            row_offsets=self.offsets if self.static or not self.equal_groups else None,
            prefix_len=self.prompt_length if self.static or self.ragged else None,
            own_len=self.own_length if self.static else None,
            max_rows=self.n,
            scale=scale,
        )

    def advance(self, steps: int = 1) -> None:
        """Count that many more own keys per row, on the device. The host's ``step`` is counted by the caller."""
        self.at += steps
        self.own_length += steps

    def keep(self, rows: Tensor, size: int) -> None:
        """Keep these rows (ascending indices), in a batch of ``size``, and drop the others.

        Static buffers are compacted in place. Otherwise the rows are copied into new buffers, and on the CPU prompts
        without remaining rows are dropped too.
        """
        group = torch.searchsorted(self.offsets[1:].contiguous(), rows, right=True)
        counts = torch.bincount(group, minlength=len(self.offsets) - 1)
        if not self.static and not rows.is_cuda:  # the kernel skips prompts without rows; batched matmuls do not
            live = counts.nonzero()[:, 0]
            if len(live) <= 0.8 * len(counts):
                self._keep_prompts(live)
                counts = counts[live]
        self.equal_groups = False
        offsets = F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        self.offsets = placed(self.offsets_of, size, offsets) if self.static else offsets
        self.own_length = self.own_length[:size]  # equal for all rows
        for buffers in (self.keys, self.values):
            for layer, old in buffers.items():
                kept = old[rows, :, : self.step]
                new = old[:size] if self.static else old.new_zeros((size, *old.shape[1:]))
                new[: len(rows), :, : self.step] = kept
                buffers[layer] = new
        for layer, state in self.states.items():
            self.states[layer] = DeltaState(*(_kept(part, rows, size, self.static) for part in state))

    def _keep_prompts(self, live: Tensor) -> None:
        self.prompt_length = self.prompt_length[live]
        for buffers in (self.prompt_keys, self.prompt_values):
            for layer, old in buffers.items():
                buffers[layer] = old[live]


def placed(held: dict[int, Tensor], size: int, new: Tensor) -> Tensor:
    """``new`` at the address that ``held`` has for this batch size; its own if there is none yet."""
    if size not in held:
        held[size] = new
    elif held[size] is not new:
        held[size].copy_(new)
    return held[size]


def _kept(old: Tensor, rows: Tensor, size: int, static: bool) -> Tensor:
    """``old[rows]`` in a buffer of ``size`` rows: the old one's first if ``static``, whose address stays."""
    kept = old[rows]
    if not static and len(rows) == size:
        return kept
    new = old[:size] if static else old.new_zeros((size, *old.shape[1:]))
    new[: len(rows)] = kept
    return new


class RowStep:
    """The ``fastrl_cache`` of a decode step of all rows through the model's own layers."""

    def __init__(self, cache: RowCache) -> None:
        self.cache = cache

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Query [R, Hq, 1, D], key and value [R, Hkv, 1, D] of the new tokens → [R, 1, Hq, D]."""
        for buffer, new in zip(self.cache.own(layer), (key, value), strict=True):
            buffer.index_copy_(2, self.cache.at, new)
        return self.cache.attend(layer, query[:, :, 0], scale)[:, None]

    def recur(self, layer: int, net: Any, x: Inputs) -> Tensor:
        """Inputs [R, 1, …] of the new tokens → [R, 1, H, Dv]."""
        return step(net, x, self.cache.states[layer])


class ModelLayers:
    """A decode step through ``Family.hidden``: for layers that ``DecodeLayers`` does not know."""

    def __init__(self, family: Family, core: Any) -> None:
        self.family, self.core, self.embed = family, core, core.get_input_embeddings()

    def __call__(self, token: Tensor, position: Tensor, cache: RowCache) -> Tensor:
        """Hidden states [R, H] for ``token`` [R] at ``position`` [R], whose keys and values go into ``cache``."""
        positions = position[None, :, None].expand(self.family.position_axes, -1, 1)
        embeds = self.embed(token)[:, None]
        return self.family.hidden(self.core, embeds, positions, fastrl_cache=RowStep(cache))[:, 0]


@contextmanager
def rollout_mode(core: Any) -> Iterator[None]:
    """Run a block without gradients, dropout or checkpointing and with attention through ``fastrl_cache``."""
    register(**{ATTENTION: _attention})
    training = [module for module in core.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with attention(family_of(core.config), core, language=ATTENTION), torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    return kwargs["fastrl_cache"].attend(module.layer_idx, query, key, value, kwargs["scaling"]), None
