"""Prefix-shared attention of a model's layers, registered with transformers; the attention itself is
``fastrl_kernels.prefix_attention``.

Prompts may also go through the layers in a pass of their own, which keeps their keys (``fastrl_keep``), and their
answers in a later one that reads them (``fastrl_answers``); both compute what the whole row does.

Calls without segments (a model's own forward, recomputed by checkpointing) use transformers' attention. A vision tower
for images of varying size makes one call per layer over the lengths of all images or windows; transformers makes that
single call only if the function's name contains "flash". A tower for images of equal size attends within each image.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrl.models.attention.switch import register, set_attention
from fastrl.segments import AnswerRows, Segments
from fastrl_kernels import varlen
from fastrl_kernels.prefix_attention import attend_row, block_attention, call_for, gathered_attention
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
    if answers is not None:
        call = call_for(query)
        return answer_attention(query, key, value, answers, module.layer_idx, call, scale=scale), None
    assert segments is not None
    if keep is not None:
        keep.put(module.layer_idx, key, value)
    return attend_row(*packed_row(query, key, value, segments.length), segments, scale=scale)[None], None


def packed_row(query: Tensor, key: Tensor, value: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """[1, H, L, D] of one row of ``length`` tokens → [L, H, D]."""
    if query.shape[0] != 1 or query.shape[2] != length:
        raise ValueError(f"query: expected one row of {length} tokens, got {list(query.shape)}")
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    return q, k, v


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
        [1, L, Hq, D], the rows that attention of whole groups gives for the answers.
    """
    rows, prompts = answers.rows, answers.prompts(layer)
    q, k, v = packed_row(query, key, value, rows.length)
    if call is not None:
        keys, values = (
            torch.cat([*(x.squeeze(0).transpose(0, 1) for x in shared), own])
            for shared, own in zip(zip(*prompts, strict=True), (k, v), strict=True)
        )
        return gathered_attention(q, keys, values, rows.varlen, call, scale=scale)[None]
    groups, order = rows.dense
    parts = [
        block_attention(query[0], key[0], value[0], (prompt[0][0], prompt[1][0]), block, scale=scale)
        for prompt, blocks in zip(prompts, groups, strict=True)
        for block in blocks
    ]
    out = torch.cat(parts)
    return (out if order is None else out[order])[None]


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
    of_length: dict[int, list[int]] = {}
    for start, length in zip(starts, lengths, strict=False):
        of_length.setdefault(length, []).append(start)
    of_length.pop(0, None)
    by_length = [torch.tensor(of_length[n])[:, None] + torch.arange(n) for n in sorted(of_length)]
    return by_length, torch.argsort(torch.cat([rows.flatten() for rows in by_length]))
