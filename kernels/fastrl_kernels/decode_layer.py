"""The operations between the matrix products of a decoder layer, for decoding: one token per row, no gradient.

- ``add_rms_norm``: the residual sum and the RMSNorm that follows it:  h += x;  out = w * h / sqrt(mean h^2 + eps).
- ``rope_append``: the rotary embedding of queries and keys, and the write of new keys and values into the cache.

The gate of the MLP is ``fastrl_kernels.gated``'s, which also trains.

A decode step of 64 rows reads megabytes of weights per layer and moves only kilobytes in all other operations, but in
eager torch these are about 30 launches per layer, each of which costs a launch regardless of its size. Here each of the
above is one launch (per layer two norms and one rotary embedding), and all intermediates stay in registers.
Sums and rotations are computed in float32 and rounded once; values that the layer's own code rounds in between (the
residual, the normalised input before its weight) are rounded here too.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from fastrl_kernels import _native_pointwise
from fastrl_kernels._common import (
    FLOATS,
    check,
    check_dtype,
    check_same_device,
    check_shape,
    launch,
    readable,
    use_triton,
)
from fastrl_kernels._native import reads
from fastrl_kernels._triton import tl, triton
from fastrl_kernels.rms_norm import norm_block, norm_warps, power_of_two, rms_norm_kernel, rms_norm_reference


@triton.jit
def _rope_append_kernel(
    q, k, v,  # [R, Hq, D], [R, Hkv, D] twice, contiguous
    cos, sin,  # [R, D/2], contiguous
    at,  # [1] int64: the slot of the new keys
    q_out,  # like q
    keys, values,  # [R, Hkv, T, D], of equal strides, the last one 1
    query_heads, key_heads, cache_row, cache_head, cache_slot,
    HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One query head of one row, or one of its key heads with the value."""
    heads = query_heads + key_heads
    row = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < HALF
    c = tl.load(cos + row * HALF + i, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + row * HALF + i, mask=inside, other=0.0).to(tl.float32)
    if head < query_heads:
        source = q + (row * query_heads + head) * 2 * HALF + i
        target = q_out + (row * query_heads + head) * 2 * HALF + i
    else:
        head -= query_heads
        source = k + (row * key_heads + head) * 2 * HALF + i
        slot = row * cache_row + head * cache_head + tl.load(at) * cache_slot + i
        target = keys + slot
        value = v + (row * key_heads + head) * 2 * HALF + i
        tl.store(values + slot, tl.load(value, mask=inside), mask=inside)
        tl.store(values + slot + HALF, tl.load(value + HALF, mask=inside), mask=inside)
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(target, (first * c - second * s).to(q.dtype.element_ty), mask=inside)
    tl.store(target + HALF, (second * c + first * s).to(q.dtype.element_ty), mask=inside)


@torch.library.custom_op("fastrl::add_rms_norm", mutates_args=("residual",))
def _add_rms_norm_op(
    residual: Tensor,
    x: Optional[Tensor],  # noqa: UP045 (the schema parser of older torch wants typing.Optional)
    weight: Tensor,
    eps: float,
) -> Tensor:
    out = torch.empty_like(residual)
    rows, hidden = residual.shape
    if rows:
        block = norm_block(hidden)
        x = x if x is None else x.contiguous()
        launch(rms_norm_kernel, rows)(
            residual, x, weight.contiguous(), residual, out, hidden, eps, BLOCK=block, num_warps=norm_warps(hidden)
        )
    return out


@_add_rms_norm_op.register_fake
def _(residual: Tensor, x: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(residual)


def add_rms_norm(residual: Tensor, x: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """Add ``x`` to the residual stream in place and return its RMSNorm. No gradient.

    Args:
        residual: [R, H], contiguous; afterwards the sum, rounded to its dtype.
        x: [R, H] of the same dtype, or None (nothing is added).
        weight: [H] of the same dtype.
        eps: added to the mean of squares.

    Returns:
        [R, H] in the residual's dtype.

    Raises:
        ValueError: shapes do not match, the residual is not contiguous, or tensors are on different devices.
        TypeError: dtypes differ or are not floating.
    """
    if reads("fastrl_norm", residual, x, weight) and _adds(residual, x, weight):
        return _native_pointwise.add_rms_norm(residual, x, weight, float(eps))
    check_shape("residual", residual, (None, None))
    check(residual.is_contiguous(), "residual: changed in place, so it must be contiguous")
    check_dtype("residual", residual, FLOATS)
    check_shape("weight", weight, (residual.shape[1],))
    check_dtype("weight", weight, (residual.dtype,))
    if x is not None:
        check_shape("x", x, tuple(residual.shape))
        check_dtype("x", x, (residual.dtype,))
    check_same_device(residual=residual, x=x, weight=weight)
    if not use_triton(residual) or residual.dtype == torch.float64:
        return add_rms_norm_reference(residual, x, weight, eps)
    return _add_rms_norm_op(residual, x, weight, float(eps))


@torch.no_grad()
def add_rms_norm_reference(residual: Tensor, x: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """Eager twin of :func:`add_rms_norm` (same arguments, nothing checked)."""
    if x is not None:
        residual.add_(x)
    return rms_norm_reference(residual, weight, eps)


def _adds(residual: Tensor, x: Tensor | None, weight: Tensor) -> bool:
    """Whether shapes and strides fit; where not, what does not is said elsewhere."""
    if residual.dim() != 2 or not residual.is_contiguous() or weight.shape != residual.shape[1:]:
        return False
    return x is None or x.shape == residual.shape


def _appends(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, at: Tensor
) -> bool:
    """Whether shapes, strides and the slot fit; where not, what does not is said elsewhere."""
    if q.dim() != 3 or k.dim() != 3 or keys.dim() != 4 or at.shape != (1,) or at.dtype != torch.int64:
        return False
    (rows, _, dim), (_, heads, slots, _) = q.shape, keys.shape
    if dim % 2 or k.shape != (rows, heads, dim) or v.shape != k.shape or keys.shape != (rows, heads, slots, dim):
        return False
    if cos.shape != (rows, dim // 2) or sin.shape != cos.shape or values.shape != keys.shape:
        return False
    unit = keys.stride() == values.stride() and (keys.stride(-1) == 1 or dim == 1)
    return unit and (rows == 0 or 0 <= int(at) < slots)


@torch.library.custom_op("fastrl::rope_append", mutates_args=("keys", "values"))
def _rope_append_op(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, at: Tensor
) -> Tensor:
    (rows, query_heads, dim), key_heads = q.shape, k.shape[1]
    q_out = torch.empty((rows, query_heads, dim), dtype=q.dtype, device=q.device)
    if rows:
        launch(_rope_append_kernel, rows * (query_heads + key_heads))(
            q.contiguous(), k.contiguous(), v.contiguous(), cos.contiguous(), sin.contiguous(), at, q_out, keys, values,
            query_heads, key_heads, *keys.stride()[:3], HALF=dim // 2, BLOCK=power_of_two(dim // 2), num_warps=1,
        )  # fmt: skip
    return q_out


@_rope_append_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, at: Tensor) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def rope_append(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, at: Tensor
) -> Tensor:
    """Rotate a token's queries and keys, and put its keys and values into slot ``at`` of the cache. No gradient.

    The rotation pairs element i of a head with element i + D/2, the layout of Llama's and Qwen's weights.

    Args:
        q: [R, Hq, D], D even; k, v: [R, Hkv, D], of one dtype.
        cos, sin: [R, D/2], any floating dtype, for each row's position.
        keys, values: caches [R, Hkv, T, D] in q's dtype, of equal strides, the last one 1; changed in place.
        at: [1] int64, 0 to T - 1 (not checked on a GPU, which would have to synchronise).

    Returns:
        The rotated queries [R, Hq, D].

    Raises:
        ValueError: shapes or strides do not match, tensors are on different devices, or (on the CPU) the slot is out of
            range.
        TypeError: wrong dtypes.
    """
    native = reads("fastrl_rope_append", q, k, v, cos, sin, keys, values) and readable(at)
    if native and _appends(q, k, v, cos, sin, keys, values, at):
        return _native_pointwise.rope_append(q, k, v, cos, sin, keys, values, int(at) if len(q) else 0)
    check_shape("q", q, (None, None, None))
    rows, _, dim = q.shape
    check(dim % 2 == 0, f"q: heads of {dim} numbers do not split into halves")
    check_dtype("q", q, FLOATS)
    check_shape("k", k, (rows, None, dim))
    check_shape("v", v, tuple(k.shape))
    check_shape("keys", keys, (rows, k.shape[1], None, dim))
    check_shape("values", values, tuple(keys.shape))
    for name, x in (("k", k), ("v", v), ("keys", keys), ("values", values)):
        check_dtype(name, x, (q.dtype,))
    for name, x in (("cos", cos), ("sin", sin)):
        check_shape(name, x, (rows, dim // 2))
        check_dtype(name, x, FLOATS)
    check(
        keys.stride() == values.stride() and (keys.stride(-1) == 1 or dim == 1),
        f"keys, values: expected equal strides, the last one 1, got {keys.stride()} and {values.stride()}",
    )
    check_shape("at", at, (1,))
    check_dtype("at", at, (torch.int64,))
    check_same_device(q=q, k=k, v=v, cos=cos, sin=sin, keys=keys, values=values, at=at)
    if rows and readable(at):
        check(0 <= int(at) < keys.shape[2], f"at: slot {int(at)} is outside a cache of {keys.shape[2]}")
    if not use_triton(q) or q.dtype == torch.float64:
        return rope_append_reference(q, k, v, cos, sin, keys, values, at)
    return _rope_append_op(q, k, v, cos, sin, keys, values, at)


@torch.no_grad()
def rope_append_reference(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, at: Tensor
) -> Tensor:
    """Eager twin of :func:`rope_append` (same arguments, shapes and dtypes not checked)."""
    wide = torch.promote_types(torch.promote_types(q.dtype, cos.dtype), torch.float32)
    c, s = cos.to(wide)[:, None], sin.to(wide)[:, None]
    own, crossed = torch.cat((c, c), -1), torch.cat((-s, s), -1)

    both = torch.cat((q, k), 1).to(wide)
    rotated = (both * own).addcmul_(both.roll(both.shape[-1] // 2, -1), crossed).to(q.dtype)
    keys.index_copy_(2, at, rotated[:, q.shape[1] :, None])
    values.index_copy_(2, at, v[:, :, None])
    return rotated[:, : q.shape[1]]
