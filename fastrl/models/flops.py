"""Counting the floating-point operations of a step: torch's counter with formulas for what it does not know.

torch's counter does not see CPU attention; formulas of our own operators stand beside them. All follow its convention:
a multiply-add is two operations, softmax and masks cost nothing, and causal attention counts in full.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

Shape = torch.Size


def flop_counter() -> FlopCounterMode:
    """A context manager that counts everything a policy does; read ``get_total_flops()`` or ``get_flop_counts()``."""
    import fastrl_kernels.decode_attention
    import fastrl_kernels.linear_logprob  # noqa: F401  registers the operators and their formulas

    aten = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: _attention,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        },
    )


def segment_attention_flops(lengths: Iterable[tuple[int, int]], heads: int, dim: int) -> int:
    """Both products of attention over segments of (queries, keys) each, causal or not, with ``heads`` query heads."""
    return sum(
        sdpa_flop_count((1, heads, queries, dim), (1, heads, keys, dim), (1, heads, keys, dim))
        for queries, keys in lengths
    )


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)
