"""Launches of the head's two kernels: block sizes, register limits and constants from a tile and its options."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastrl_kernels._common import launch
from fastrl_kernels._linear_logprob_kernels import linear_logprob_fold_kernel, linear_logprob_gradient_kernel


def launch_config(width: int) -> tuple[int, int]:
    """(BLOCK, warps) for tiles of this many columns, for both kernels."""
    if width > 2048:
        return 4096, 8
    if width > 256:
        return 1024, 4
    return 256, 2


def _fold_registers(width: int, plain: bool, more: bool) -> int:
    """Most registers of a thread of the fold. Left to itself, ptxas spills a few bytes to fit a program more.

    64 let four programs of 8 warps share a multiprocessor, 80 three, 128 two.
    """
    if more:
        return 128
    return 64 if plain or width <= 2048 else 80


def _targets(target: Tensor) -> dict[str, int]:
    """Constants for the ids of a row."""
    count = 1 if target.dim() == 1 else target.shape[1]
    return {"TARGETS": count, "TARGET_LANES": 1 << (count - 1).bit_length()}


def launch_fold(tile: Tensor, first_column: int, options: Any, rows: Any, state: Tensor) -> None:
    """Launch the forward kernel; arguments as ``fold_tile``."""
    n, width = tile.shape
    block, warps = launch_config(width)
    has_entropy, has_mean = rows.entropy is not None, rows.mean_logp is not None
    plain = options.bias is None and options.softcap is None and not has_entropy and tile.element_size() == 2
    more = has_mean or rows.target.dim() > 1
    launch(linear_logprob_fold_kernel, n)(
        tile, rows.target, rows.inverse_temperature, tile if options.bias is None else options.bias,
        tile if options.class_weight is None else options.class_weight, state,
        rows.logp, rows.lse, rows.entropy if has_entropy else rows.lse, rows.mean_logp if has_mean else rows.lse,
        tile.stride(0), state.stride(0), width, first_column, options.n_columns, options.ignore_index,
        options.softcap or 1.0,
        HAS_BIAS=options.bias is not None, HAS_SOFTCAP=options.softcap is not None, HAS_ENTROPY=has_entropy,
        HAS_MEAN=has_mean, WEIGHTED=has_mean and options.class_weight is not None, **_targets(rows.target),
        BLOCK=block, PACK=16 // tile.element_size(), num_warps=warps, maxnreg=_fold_registers(width, plain, more),
    )  # fmt: skip


def launch_gradient(tile: Tensor, out: Tensor, first_column: int, options: Any, rows: Any, upstream: Any) -> None:
    """Launch the backward kernel; arguments as ``differentiate_tile``."""
    n, width = tile.shape
    block, warps = launch_config(width)
    has_entropy, has_mass = upstream.entropy is not None, upstream.mass is not None
    has_mean = upstream.spread is not None
    launch(linear_logprob_gradient_kernel, n)(
        tile, out, rows.target, rows.inverse_temperature, tile if options.bias is None else options.bias,
        tile if options.class_weight is None else options.class_weight,
        rows.logp, rows.lse, rows.entropy if has_entropy else rows.lse,
        upstream.logp, upstream.entropy if has_entropy else rows.lse, upstream.mass if has_mass else rows.lse,
        upstream.spread if has_mean else rows.lse,
        tile.stride(0), out.stride(0), width, first_column, options.ignore_index, options.softcap or 1.0,
        HAS_BIAS=options.bias is not None, HAS_SOFTCAP=options.softcap is not None, HAS_ENTROPY=has_entropy,
        HAS_MASS=has_mass, HAS_MEAN=has_mean, WEIGHTED=has_mean and options.class_weight is not None,
        **_targets(rows.target), BLOCK=block, PACK=16 // tile.element_size(),
        SAME_STRIDE=tile.stride(0) == out.stride(0), num_warps=warps,
        maxnreg=80 if rows.target.dim() > 1 else None,  # as in _fold_registers
    )  # fmt: skip
