"""Attention of a group over its shared prompt, forward and backward, against a row for each completion.

The peer is what padded trainers compute: torch's causal attention over rows ``[prompt | completion]``, the prompt
repeated. Its repetition is part of its time, as the packed row's gather is part of ours; the gradients of a prompt's
copies are summed on the way back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.case import Case, Inputs, dtype_for, leaf, with_gradients
from fastrl_kernels.prefix_attention import prefix_attention

# Prompt, completions, tokens of each, query heads, key heads, head size; on a GPU those of Qwen2.5-VL-3B
SIZES = {"tiny": (9, 2, 3, 2, 1, 8), "cpu": (300, 8, 24, 8, 2, 64), "gpu": (1000, 8, 64, 16, 2, 128)}


def cases(size: str) -> list[Case]:
    """All cases of this file at one of ``SIZES``."""
    prompt, answers, tokens, hq, hk, d = SIZES[size]
    length, dtype = prompt + answers * tokens, dtype_for(size)
    layout: dict[str, Any] = {
        "prompt_lengths": [prompt],
        "completion_lengths": [tokens] * answers,
        "group_of_completion": [0] * answers,
    }

    def make(device: torch.device) -> Inputs:
        shapes = {"q": hq, "k": hk, "v": hk}
        x: Inputs = {key: leaf(torch.randn(length, h, d, device=device).to(dtype)) for key, h in shapes.items()}
        return x | {"upstream": torch.randn(length, hq, d, device=device).to(dtype)}

    def ours(x: Inputs) -> tuple[Tensor, ...]:
        leaves = [x["q"], x["k"], x["v"]]
        return with_gradients(prefix_attention(*leaves, **layout), leaves, x["upstream"])

    def repeated(x: Inputs) -> tuple[Tensor, ...]:
        leaves = [x["q"], x["k"], x["v"]]
        out = F.scaled_dot_product_attention(*map(_rows, leaves), is_causal=True, enable_gqa=True).transpose(1, 2)
        return with_gradients(torch.cat([out[0, :prompt], out[:, prompt:].flatten(0, 1)]), leaves, x["upstream"])

    def _rows(packed: Tensor) -> Tensor:
        """[L, H, D] → [completions, H, prompt + tokens, D]."""
        shared = packed[:prompt].expand(answers, -1, -1, -1)
        return torch.cat([shared, packed[prompt:].unflatten(0, (answers, tokens))], 1).transpose(1, 2)

    pairs = prompt * prompt + answers * tokens * (prompt + tokens)
    numbers = length * d * (2 * hq + 2 * hk)
    return [
        Case(
            name="prefix_attention/group", op="prefix_attention",
            shape={"prompt": prompt, "completions": answers, "tokens": tokens, "heads": hq, "kv_heads": hk, "dim": d},
            make=make, ours=ours, peers={"repeated": repeated}, flops=7.0 * 2 * hq * d * pairs,
            bytes=float(3 * numbers * dtype.itemsize), dtype=dtype,
        )
    ]  # fmt: skip
