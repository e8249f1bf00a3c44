"""Counting the floating-point operations of a step: torch's counter, with formulas for operators it does not know.

torch's counter ignores CPU attention, and before torch 2.12 it refuses fewer key heads than query heads; both get
formulas here. fastrl's operators register their own. All follow torch's convention: a multiply-add is two operations,
softmax and masks cost nothing, and causal attention counts in full.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

Shape = torch.Size


def flop_counter() -> FlopCounterMode:
    """A context manager that counts everything a policy does; read ``get_total_flops()`` or ``get_flop_counts()``."""
    import fastrl_kernels.decode_attention
    import fastrl_kernels.linear_logprob  # noqa: F401  registers the operators and their formulas

    aten = torch.ops.aten
    kinds = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
    forward = {getattr(aten, f"_scaled_dot_product_{kind}"): _attention for kind in kinds}
    backward = {getattr(aten, f"_scaled_dot_product_{kind}_backward"): _attention_backward for kind in kinds}
    grouped = {aten._grouped_mm: _grouped} if hasattr(aten, "_grouped_mm") else {}
    solve = {aten.linalg_solve_triangular: _solve}
    return FlopCounterMode(display=False, custom_mapping=forward | backward | grouped | solve)


def segment_attention_flops(lengths: Iterable[tuple[int, int]], heads: int, dim: int) -> int:
    """Both products of attention over segments of (queries, keys) each, causal or not, with ``heads`` query heads."""
    return sum(_products(2, heads, queries, keys, dim) for queries, keys in lengths)


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    batch, heads, queries, dim = query
    return _products(2, batch * heads, queries, key[2], dim)


def _attention_backward(grad: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Recomputed scores, and the gradients of weights, values, queries and keys."""
    batch, heads, queries, dim = query
    return _products(5, batch * heads, queries, key[2], dim)


def _grouped(a: Shape, b: Shape, *_: Any, **__: Any) -> int:
    """Matrix products of experts: each row [K] with the matrix [K, N] of its group."""
    groups = a[0] if len(a) == len(b) == 3 else 1
    return groups * 2 * a[-2] * a[-1] * b[-1]


def _solve(a: Shape, b: Shape, *_: Any, **__: Any) -> int:
    """Triangular systems [..., n, n] for [..., n, k]: half a product's multiply-adds."""
    *batch, n, k = b
    return math.prod(batch) * n * n * k


def _products(count: int, heads: int, queries: int, keys: int, dim: int) -> int:
    """``count`` products of the size [queries, dim] x [dim, keys] for each query head."""
    return count * 2 * heads * queries * keys * dim
