"""Attention in which all completions of a group use their prompt's keys, computed once. Registered with transformers.

A prompt row attends causally to its own prompt; a completion row attends to its prompt and causally to its own
completion; nothing attends across groups. Two paths compute this:

- CPU, float32, and any GPU without variable-length attention: scaled-dot-product attention, per group first the prompt,
  then its completions as padded blocks of similar length.
- GPU: one variable-length call per layer over the whole row; a completion's keys are gathered as [prompt, own].

``fastrl_kernels.varlen`` chooses the path of a call and gives the reason. Prompts may also go through the
layers in a pass of their own, which keeps their keys (``fastrl_keep``), and their answers in a later one that reads
them (``fastrl_answers``); both compute what the whole row does.

Calls without segments (a model's own forward, recomputed by checkpointing) use transformers' attention. A vision tower
for images of varying size makes one call per layer over the lengths of all images or windows; transformers makes that
single call only if the function's name contains "flash". A tower for images of equal size attends within each image.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrl.models.attention.switch import register, set_attention
from fastrl.segments import AnswerRows, CompletionBlock, Segments, VarlenTables
from fastrl_kernels import varlen
from fastrl_kernels.varlen import VarlenCall

if TYPE_CHECKING:
    from fastrl.models.families import Family

LANGUAGE = "fastrl_prefix"
VISION = "fastrl_flash_vision"


def use_prefix_attention(family: Family, core: Any) -> None:
    """Switch a model's language and vision attention to the two functions of this file."""
    register(**{LANGUAGE: language_attention, VISION: vision_attention})
    set_attention(family, core, language=LANGUAGE, vision=VISION)


def language_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' attention function: query [1, Hq, L, D], key and value [1, Hkv, L, D] → [1, L, Hq, D]."""
    segments: Segments | None = kwargs.pop("fastrl_segments", None)
    answers: Answers | None = kwargs.pop("fastrl_answers", None)
    keep: Keep | None = kwargs.pop("fastrl_keep", None)
    if segments is None and answers is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    scale = kwargs.get("scaling")
    if kwargs.get("dropout") or kwargs.get("sliding_window") is not None:
        raise NotImplementedError("prefix-shared attention supports neither dropout nor a sliding window")
    call = varlen.choose(query.device, query.dtype, query.shape[-1]).call
    if answers is not None:
        return answer_attention(query, key, value, answers, module.layer_idx, call, scale=scale), None
    assert segments is not None
    if keep is not None:
        keep.put(module.layer_idx, key, value)
    if call is None:
        return dense_prefix_attention(query, key, value, segments, scale=scale), None
    return varlen_prefix_attention(query, key, value, segments.varlen, call, scale=scale), None


def vision_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' attention function, not causal: query, key and value [1, H, L, D] with segments ``cu_seq_lens_q``,
    or, for images of equal size, [B, H, L, D] with an optional mask → [B, L, H, D]."""
    cu, scale = kwargs.get("cu_seq_lens_q"), kwargs.get("scaling")
    if cu is None:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scale)
        return out.transpose(1, 2), None
    call = varlen.choose(query.device, query.dtype, query.shape[-1]).call
    if call is None:
        return segment_attention(query, key, value, tuple((cu[1:] - cu[:-1]).tolist()), scale=scale), None
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    longest = kwargs["max_length_q"]
    return call(q, k, v, cu, cu, longest, longest, scale=scale, causal=False)[None], None


# Prompts in a pass of their own


class Keep(Protocol):
    """Takes the keys and values [1, Hkv, P, D] of a prompt's pass, with their graph (``fastrl_keep``)."""

    def put(self, layer: int, key: Tensor, value: Tensor) -> None: ...


class Answers(Protocol):
    """Answers whose prompts went through the layers before them (``fastrl_answers``)."""

    rows: AnswerRows

    def prompts(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        """Each group's keys and values, [1, Hkv, P, D]."""
        ...


def answer_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    answers: Answers,
    layer: int,
    call: VarlenCall | None,
    *,
    scale: float | None = None,
) -> Tensor:
    """Prefix-shared attention of the answers' rows alone.

    Args:
        query: [1, Hq, L, D]; key, value: [1, Hkv, L, D] of ``answers.rows.length`` rows.
        answers: has the prompts' keys and values.
        layer: of them.
        call: the variable-length call; None: scaled-dot-product attention.
        scale: of the scores; default 1/sqrt(D).

    Returns:
        [1, L, Hq, D], the rows that ``dense_prefix_attention`` of whole groups gives for the answers.
    """
    rows, prompts = answers.rows, answers.prompts(layer)
    _check_rows(query, rows.length)
    if call is not None:
        k, v = (
            torch.cat([x.squeeze(0).transpose(0, 1) for x in (*shared, own)])
            for shared, own in zip(zip(*prompts, strict=True), (key, value), strict=True)
        )
        return _gathered_call(query, k, v, rows.varlen, call, scale)
    groups, order = rows.dense
    parts = [
        _completion_block(query[0], key[0], value[0], (prompt[0][0], prompt[1][0]), block, scale)
        for prompt, blocks in zip(prompts, groups, strict=True)
        for block in blocks
    ]
    out = torch.cat(parts)
    return (out if order is None else out[order])[None]


# Scaled-dot-product path


def dense_prefix_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, *, scale: float | None = None
) -> Tensor:
    """Prefix-shared attention of one packed row.

    Args:
        query: [1, Hq, L, D]; key, value: [1, Hkv, L, D] with Hkv dividing Hq.
        segments: the row's groups; their lengths sum to L.
        scale: of the scores; default 1/sqrt(D).

    Returns:
        [1, L, Hq, D].
    """
    _check_rows(query, segments.length)
    parts: list[Tensor] = []
    for group in segments.dense.groups:
        span = group.span
        rows = slice(span.start, span.start + span.prompt)
        keys, values = key[:, :, rows], value[:, :, rows]
        prompt = F.scaled_dot_product_attention(
            query[:, :, rows], keys, values, is_causal=True, scale=scale, enable_gqa=True
        )
        parts.append(prompt[0].transpose(0, 1))
        shared = keys[0], values[0]
        parts += [_completion_block(query[0], key[0], value[0], shared, block, scale) for block in group.blocks]
    out = torch.cat(parts)
    order = segments.dense.order
    return (out if order is None else out[order])[None]


def _completion_block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt: tuple[Tensor, Tensor],
    block: CompletionBlock,
    scale: float | None,
) -> Tensor:
    """Attention of one block's real rows, [rows, Hq, D]. ``prompt``: its keys and values, [Hkv, P, D].

    Query heads of one key head are stacked along the query axis, so that the mask is repeated instead of the keys.
    """
    hq, _, d = query.shape
    hkv, ratio = len(key), len(query) // len(key)
    b, t = block.rows.shape
    rows = block.rows.flatten()

    def with_prompt(shared: Tensor, x: Tensor) -> Tensor:  # [Hkv, P, D], [Hkv, L, D] → [B, Hkv, P + T, D]
        own = x[:, rows].view(hkv, b, t, d).transpose(0, 1)
        return torch.cat([shared.expand(b, -1, -1, -1), own], dim=2)

    stacked = query[:, rows].view(hkv, ratio, b, t, d).permute(2, 0, 1, 3, 4).reshape(b, hkv, ratio * t, d)
    mask = block.mask.repeat(ratio, 1)
    keys, values = (with_prompt(shared, x) for shared, x in zip(prompt, (key, value), strict=True))
    out = F.scaled_dot_product_attention(stacked, keys, values, attn_mask=mask, scale=scale)
    out = out.view(b, hkv, ratio, t, d).permute(0, 3, 1, 2, 4).reshape(b * t, hq, d)
    return out if len(block.valid) == b * t else out[block.valid]


def segment_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], *, scale: float | None = None
) -> Tensor:
    """Full attention inside consecutive segments: [1, H, L, D] → [1, L, H, D], one call for each distinct length."""
    by_length, order = _equal_lengths(lengths)
    out = []
    for rows in by_length:  # [segments, length]
        q, k, v = (x[0][:, rows].transpose(0, 1) for x in (query, key, value))
        attended = F.scaled_dot_product_attention(q, k, v, scale=scale)  # [segments, H, length, D]
        out.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(out)[order.to(query.device)][None]


@lru_cache(maxsize=64)
def _equal_lengths(lengths: tuple[int, ...]) -> tuple[list[Tensor], Tensor]:
    """Rows [segments, length] of the segments of each distinct length, and the order that undoes the regrouping."""
    starts = list(accumulate(lengths, initial=0))
    by_length = [
        torch.tensor([s for s, n in zip(starts, lengths, strict=False) if n == length])[:, None] + torch.arange(length)
        for length in sorted(set(lengths) - {0})
    ]
    return by_length, torch.argsort(torch.cat([rows.flatten() for rows in by_length]))


# Variable-length path


def varlen_prefix_attention(
    query: Tensor, key: Tensor, value: Tensor, tables: VarlenTables, call: VarlenCall, *, scale: float | None
) -> Tensor:
    """``dense_prefix_attention`` as one variable-length call."""
    _check_rows(query, tables.rows)
    k, v = (x.squeeze(0).transpose(0, 1) for x in (key, value))
    return _gathered_call(query, k, v, tables, call, scale)


def _gathered_call(
    query: Tensor, key: Tensor, value: Tensor, tables: VarlenTables, call: VarlenCall, scale: float | None
) -> Tensor:
    """Query [1, Hq, L, D] with the keys and values that the tables gather of [rows, Hkv, D] → [1, L, Hq, D]."""
    k, v = (gather_rows(x, tables.key_rows, tables.copies) for x in (key, value))
    q = query.squeeze(0).transpose(0, 1)
    return call(q, k, v, tables.cu_q, tables.cu_k, tables.max_q, tables.max_k, scale=scale, causal=True)[None]


def gather_rows(rows: Tensor, index: Tensor, copies: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Rows [L, …] → ``rows[index]``. The backward sums a row's copies in float32 or wider in a fixed order.

    ``copies``: pairs (rows, places): ``rows`` are at ``places`` of ``index``, and none occurs twice within a pair.
    """
    gathered: Any = _GatherRows.apply(rows, index, copies)
    return gathered


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, copies: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        ctx.copies, ctx.length = copies, len(rows)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = torch.zeros(ctx.length, *grad.shape[1:], dtype=wide, device=grad.device)
        for rows, places in ctx.copies:  # no row occurs twice in one call, so the order of atomic sums is fixed
            total.index_add_(0, rows, grad.index_select(0, places).to(wide))
        return total.to(grad.dtype), None, None


def _check_rows(query: Tensor, length: int) -> None:
    if query.shape[0] != 1 or query.shape[2] != length:
        raise ValueError(f"query: expected one row of {length} tokens, got {list(query.shape)}")
