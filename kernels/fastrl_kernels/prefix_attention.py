"""Attention in which all completions of a group read their prompt's keys, computed once.

A packed row is ``[prompt | completion | completion | … | prompt | …]``. With q, k, v of its rows and s the scale, row i
attends to the rows V(i): its own prompt, and its own segment up to itself.

    out_i = sum over j in V(i) of p_ij v_j,    p_ij = exp(s q_i·k_j) / sum over j' in V(i) of exp(s q_i·k_j')

Padded rows, one for each completion, compute a prompt's projections, scores and gradients once per completion; here
they are computed once per group. Two paths give the same:

- A GPU: one variable-length call of the best library found (``fastrl_kernels.varlen``). Keys are gathered as
  ``[prompt | prompt, completion | …]`` in one launch, and one in the backward sums the gradients of a key's copies.
- Elsewhere (a CPU, float32, odd head sizes): scaled-dot-product attention, per group first the prompt, then its
  completions in padded blocks of similar length. On a CPU a large block copies no prompt's keys: scores with the
  prompt's keys and with its own are computed apart, and joined by their log-sum-exp l,

      out = w out_prompt + (1 - w) out_own,    w = sigmoid(l_prompt - l_own),    l = log(e^l_prompt + e^l_own)

  The gradients of each part are those of attention over its keys alone whose output and log-sum-exp are out and l:
  p_ij = exp(s q_i·k_j - l_i) holds for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd.function import once_differentiable

from fastrl_kernels import varlen
from fastrl_kernels._common import (
    FLOATS,
    INTEGERS,
    check,
    check_dtype,
    check_same_device,
    check_shape,
    refuse_forward_mode,
    use_triton,
)
from fastrl_kernels._gather_rows import gather_pair
from fastrl_kernels._prefix_layout import (
    CompletionBlock,
    DenseTables,
    PrefixLayout,
    Span,
    VarlenTables,
    dense_tables,
    length_of,
    row_tables,
)
from fastrl_kernels.varlen import VarlenCall

Lengths = Sequence[int] | Tensor

# Bytes of a prompt's keys and values in front of a block's own from which on they are not copied: merging takes more
# operators, each of which costs more than a small copy. Thread time of one layer's attention on an AMD EPYC in float32:
# below 0.5 MiB copies are faster in all 31 shapes, from 2 MiB on slower; forward and backward break even at 1 MiB, the
# forward alone at 2 (benchmarks/NOTES.md).
_LEAST_SAVED = 1 << 20


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    prompt_lengths: Lengths,
    completion_lengths: Lengths,
    group_of_completion: Lengths,
    scale: float | None = None,
) -> Tensor:
    """Prefix-shared attention of one packed row; formula and gradients at the top of this file.

    The row is, group after group, a prompt and then its completions. Positions (rotary embeddings) are applied to ``q``
    and ``k`` before, those of a completion continuing its prompt's. Index tables are kept for the latest layouts, so
    that the layers of a model share them.

    Args:
        q: [L, Hq, D], of one dtype among float32, bfloat16, float16, float64. No stride is required.
        k, v: [L, Hk, D] of the same dtype, Hk dividing Hq.
        prompt_lengths: [G], each at least 1. This and the next two are on the host: numbers, or tensors on the CPU.
        completion_lengths: [C], in row order. A completion of length 0 takes no rows.
        group_of_completion: [C] ascending, the group of each completion, 0 … G - 1; a group may have none.
        scale: of the scores; default 1/sqrt(D).

    Returns:
        [L, Hq, D]. Differentiable once; the same inputs give the same gradients' bits, on the variable-length path if
        the library's backward does (flash-attn's under ``torch.use_deterministic_algorithms``).

    Raises:
        ValueError: shapes, lengths or devices do not match, or lengths are on a GPU.
        TypeError: dtypes differ or are not floating.
    """
    _check(q, k, v)
    refuse_forward_mode("prefix_attention", q, k, v)
    numbers = (
        _numbers("prompt_lengths", prompt_lengths),
        _numbers("completion_lengths", completion_lengths),
        _numbers("group_of_completion", group_of_completion),
    )
    passing = torch.compiler.is_compiling() or isinstance(q, FakeTensor)  # tables are then made in the graph, not kept
    layout = None if passing else _layout(*numbers, q.device)
    spans = _spans(*numbers) if layout is None else layout.spans
    check_shape("q", q, (length_of(spans), None, None))
    if not spans:
        return q.clone()
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if layout is not None:
        return attend_row(q, k, v, layout, scale=scale)
    call = call_for(q)
    if call is None:
        return dense_attention(q, k, v, dense_tables(spans, q.device), scale=scale)
    return gathered_attention(q, k, v, row_tables(spans, q.device), call, scale=scale)


def attend_row(q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, *, scale: float | None = None) -> Tensor:
    """:func:`prefix_attention` for a layout that is kept by the caller; nothing is checked."""
    call = call_for(q)
    if call is None:
        return dense_attention(q, k, v, layout.dense, scale=scale)
    return gathered_attention(q, k, v, layout.varlen, call, scale=scale)


def call_for(q: Tensor) -> VarlenCall | None:
    """The variable-length call that tensors like ``q`` take; None: scaled-dot-product attention. Where kernels are
    interpreted or compiled without a GPU, eager attention stands in for the library's."""
    call = varlen.choose(q.device, q.dtype, q.shape[-1]).call
    if call is None and not q.is_cuda and not q.is_meta and use_triton():
        return varlen.eager_call
    return call


def gathered_attention(
    q: Tensor, k: Tensor, v: Tensor, tables: VarlenTables, call: VarlenCall, *, scale: float | None = None
) -> Tensor:
    """One variable-length call: q [L, Hq, D] with the keys that the tables gather of k, v [rows, Hk, D]."""
    keys, values = gather_pair(k, v, tables.keys)
    return call(q, keys, values, tables.cu_q, tables.cu_k, tables.max_q, tables.max_k, scale=scale, causal=True)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, tables: DenseTables, *, scale: float | None = None) -> Tensor:
    """Scaled-dot-product attention, per group first the prompt, then blocks of its completions."""
    query, key, value = (x.transpose(0, 1) for x in (q, k, v))
    parts: list[Tensor] = []
    for group in tables.groups:
        rows = slice(group.span.start, group.span.start + group.span.prompt)
        shared = key[:, rows], value[:, rows]
        prompt = F.scaled_dot_product_attention(
            query[None, :, rows], shared[0][None], shared[1][None], is_causal=True, scale=scale, enable_gqa=True
        )
        parts.append(prompt[0].transpose(0, 1))
        parts += [block_attention(query, key, value, shared, block, scale=scale) for block in group.blocks]
    out = torch.cat(parts)
    return out if tables.order is None else out[tables.order]


def block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt: tuple[Tensor, Tensor],
    block: CompletionBlock,
    *,
    scale: float | None = None,
) -> Tensor:
    """Attention of the real rows of one block, [rows, Hq, D].

    Args:
        query: [Hq, L, D]; key, value: [Hk, L, D], of the rows that the block names.
        prompt: the prompt's keys and values, [Hk, P, D].

    Query heads of one key head are stacked along the query axis, so that masks are repeated instead of keys.
    """
    hq, _, d = query.shape
    hk, ratio = len(key), len(query) // len(key)
    b, t = block.rows.shape
    rows = block.rows.flatten()
    stacked = query[:, rows].view(hk, ratio, b, t, d)
    own = tuple(x[:, rows].view(hk, b, t, d).transpose(0, 1) for x in (key, value))
    if _merges(prompt, b, ratio * t):
        stacked = stacked.permute(0, 2, 1, 3, 4).reshape(hk, b, ratio * t, d)
        mask = block.mask[:, prompt[0].shape[1] :].repeat(ratio, 1)
        merged: Any = _MergedParts.apply(stacked, *prompt, *own, mask, scale)
        out = merged.view(hk, b, ratio, t, d).permute(1, 3, 0, 2, 4)
    else:
        stacked = stacked.permute(2, 0, 1, 3, 4).reshape(b, hk, ratio * t, d)
        keys, values = (
            torch.cat([shared.expand(b, -1, -1, -1), x], dim=2) for shared, x in zip(prompt, own, strict=True)
        )
        copied = F.scaled_dot_product_attention(
            stacked, keys, values, attn_mask=block.mask.repeat(ratio, 1), scale=scale
        )
        out = copied.view(b, hk, ratio, t, d).permute(0, 3, 1, 2, 4)
    out = out.reshape(b * t, hq, d)
    return out if len(block.valid) == b * t else out[block.valid]


def _merges(prompt: tuple[Tensor, Tensor], completions: int, queries: int) -> bool:
    """Whether a block of ``completions`` of ``queries`` stacked rows each computes its two parts apart: on a CPU, where
    torch's attention returns the log-sum-exp, unless the prompt is so short that outputs are more than copies of its
    keys, or the copies are small."""
    key = prompt[0]
    saved = 2 * completions * key.numel() * key.element_size()
    return key.device.type in ("cpu", "meta") and 2 * key.shape[1] >= 3 * queries and saved >= _LEAST_SAVED


class _MergedParts(torch.autograd.Function):
    """Attention of queries [Hk, B, N, D] to shared keys [Hk, P, D] and to their own [B, Hk, T, D] under a mask [N, T]
    (True: attended) → [Hk, B, N, D]."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, shared_key: Tensor, shared_value: Tensor, key: Tensor, value: Tensor, mask: Tensor,
        scale: float | None,
    ) -> Tensor:  # fmt: skip
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        flat, split = query.flatten(1, 2)[None], query.transpose(0, 1)
        hidden = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
        far, far_sum = attend(flat, shared_key[None], shared_value[None], scale=scale)
        near, near_sum = attend(split, key, value, attn_mask=hidden, scale=scale)
        far, far_sum = far.view_as(flat)[0].unflatten(1, query.shape[1:3]), far_sum[0].unflatten(1, query.shape[1:3])
        near, near_sum = near.transpose(0, 1), near_sum.transpose(0, 1)
        weight = (far_sum - near_sum).sigmoid_()[..., None]
        wide = weight.dtype
        out = torch.lerp(near.to(wide), far.to(wide), weight).to(query.dtype).contiguous()
        ctx.scale = scale
        ctx.save_for_backward(
            query, shared_key, shared_value, key, value, hidden, out, torch.logaddexp(far_sum, near_sum)
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        query, shared_key, shared_value, key, value, hidden, out, total = ctx.saved_tensors
        differentiate = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grad = grad.contiguous()
        flat = [x.flatten(1, 2)[None] for x in (grad, query, out, total)]
        split = [x.transpose(0, 1) for x in (grad, query, out, total)]
        far, *shared = differentiate(
            *flat[:2], shared_key[None], shared_value[None], *flat[2:], 0.0, False, scale=ctx.scale
        )
        near, *own = differentiate(*split[:2], key, value, *split[2:], 0.0, False, attn_mask=hidden, scale=ctx.scale)
        grad_query = far[0].unflatten(1, query.shape[1:3]) + near.transpose(0, 1)
        return grad_query, *(x[0] for x in shared), *own, None, None


def prefix_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    prompt_lengths: Lengths,
    completion_lengths: Lengths,
    group_of_completion: Lengths,
    scale: float | None = None,
) -> Tensor:
    """Eager twin of :func:`prefix_attention` (same arguments, nothing checked): every segment by itself."""
    spans = _spans(*(tuple(int(n) for n in x) for x in (prompt_lengths, completion_lengths, group_of_completion)))
    parts = [q[:0]]
    for span in spans:
        prompt = slice(span.start, span.start + span.prompt)
        parts.append(varlen.segment(q[prompt], k[prompt], v[prompt], scale, causal=True))
        for start, length in zip(accumulate(span.completions, initial=prompt.stop), span.completions, strict=False):
            own = slice(start, start + length)
            keys, values = (torch.cat([x[prompt], x[own]]) for x in (k, v))
            parts.append(varlen.segment(q[own], keys, values, scale, causal=True))
    return torch.cat(parts)


@lru_cache(maxsize=16)
def _layout(
    prompts: tuple[int, ...], completions: tuple[int, ...], groups: tuple[int, ...], device: torch.device
) -> PrefixLayout:
    return PrefixLayout(_spans(prompts, completions, groups), device)


def _spans(prompts: tuple[int, ...], completions: tuple[int, ...], groups: tuple[int, ...]) -> tuple[Span, ...]:
    check(min(prompts, default=1) > 0, f"prompt_lengths: expected numbers > 0, got {list(prompts)}")
    check(min(completions, default=0) >= 0, f"completion_lengths: expected numbers >= 0, got {list(completions)}")
    ordered = list(groups) == sorted(groups) and all(0 <= group < len(prompts) for group in groups)
    check(
        len(groups) == len(completions) and ordered,
        f"group_of_completion: expected {len(completions)} ascending numbers below {len(prompts)}, got {list(groups)}",
    )
    own: list[list[int]] = [[] for _ in prompts]
    for group, length in zip(groups, completions, strict=True):
        own[group].append(length)
    starts = accumulate([p + sum(lengths) for p, lengths in zip(prompts, own, strict=True)], initial=0)
    return tuple(Span(s, p, tuple(lengths)) for s, p, lengths in zip(starts, prompts, own, strict=False))


def _numbers(name: str, given: Lengths) -> tuple[int, ...]:
    if isinstance(given, Tensor):
        check(given.device.type == "cpu", f"{name}: expected on the CPU (a GPU would have to be waited for)")
        check_shape(name, given, (None,))
        check_dtype(name, given, INTEGERS)
        return tuple(given.tolist())
    return tuple(given)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    check_dtype("q", q, FLOATS)
    check_shape("q", q, (None, None, None))
    check_shape("k", k, (q.shape[0], None, q.shape[2]))
    check_shape("v", v, tuple(k.shape))
    heads, shared = q.shape[1], k.shape[1]
    check(shared > 0 and heads % shared == 0, f"k: expected a number of heads that divides {heads}, got {shared}")
    for name, x in (("k", k), ("v", v)):
        check_dtype(name, x, (q.dtype,))
    check_same_device(q=q, k=k, v=v)
