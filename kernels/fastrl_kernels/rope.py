"""Rotary position embedding of queries and keys for training, text and vision, forward and backward in one launch each.

A head's element i is paired with element i + R/2 of its first R elements, the layout of Llama's and Qwen's weights (Su
et al., arXiv 2104.09864, eq. 34, with halves in place of neighbours):

    y_i = x_i c_i - x_(i+R/2) s_i,    y_(i+R/2) = x_(i+R/2) c_(i+R/2) + x_i s_(i+R/2)

Elements after R pass unchanged. The map is linear, so its gradient is its transpose, the same kernel with the sines of
the two halves exchanged and negated. With ``sections`` the angles of column i come from the axis (time, height, width)
that owns the column, the multimodal embedding of Qwen2-VL (arXiv 2409.12191, section 2.1).

Why it is fast: one program per token reads its angles once and rotates all heads of queries and keys in registers: each
number is read once and written once, where the layers' own code writes two products, a negation, a concatenation and a
sum, in float32 for vision. ``qkv_rope`` takes the joint projection of a vision tower apart and, in the backward, writes
the three gradients straight into the projection's. Rotations are computed in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

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
    refuse_forward_mode,
    use_operator,
)
from fastrl_kernels._native import reads
from fastrl_kernels._triton import tl, triton
from fastrl_kernels.rms_norm import power_of_two

_TILE = 1024  # numbers of one half of a tile of heads


@triton.jit
def _rotate_heads(
    source, target, c1, s1, c2, s2, i, heads, source_head, target_head,
    HALF: tl.constexpr, REST: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    """All heads of one token, ``HEADS`` at a time; ``source`` and ``target`` point to the token."""
    for first in range(0, heads, HEADS):
        head = first + tl.arange(0, HEADS)
        live = (head < heads)[:, None] & (i < HALF)[None, :]
        read = source + head.to(tl.int64)[:, None] * source_head
        write = target + head.to(tl.int64)[:, None] * target_head
        a = tl.load(read + i[None, :], mask=live, other=0.0).to(tl.float32)
        b = tl.load(read + i[None, :] + HALF, mask=live, other=0.0).to(tl.float32)
        tl.store(write + i[None, :], (a * c1[None, :] - b * s1[None, :]).to(target.dtype.element_ty), mask=live)
        tl.store(write + i[None, :] + HALF, (b * c2[None, :] + a * s2[None, :]).to(target.dtype.element_ty), mask=live)
        if REST > 0:
            j = tl.arange(0, REST_BLOCK)[None, :]
            left = (head < heads)[:, None] & (j < REST)
            kept = tl.load(read + 2 * HALF + j, mask=left)
            tl.store(write + 2 * HALF + j, kept, mask=left)


@triton.jit
def _copy_heads(
    source, target, heads, source_head, target_head, D: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr
):
    i = tl.arange(0, BLOCK)[None, :]
    for first in range(0, heads, HEADS):
        head = (first + tl.arange(0, HEADS))[:, None]
        live = (head < heads) & (i < D)
        value = tl.load(source + head.to(tl.int64) * source_head + i, mask=live)
        tl.store(target + head.to(tl.int64) * target_head + i, value, mask=live)


@triton.jit
def rope_kernel(
    q, k,  # [B, L, Hq, D] and [B, L, Hk, D], last stride 1
    v,  # [B, L, Hk, D] to be copied, or None
    cos, sin,  # [axes, B, L, R] of equal strides, the last one 1
    q_out, k_out, v_out,  # like q, k and v
    length, q_heads, k_heads, section_1, section_2,
    q_stride_b, q_stride_l, q_stride_h, k_stride_b, k_stride_l, k_stride_h, v_stride_b, v_stride_l, v_stride_h,
    a_stride_axis, a_stride_b, a_stride_l, out_stride_b, out_stride_l, out_stride_h, kout_stride_b, kout_stride_l,
    kout_stride_h,
    HALF: tl.constexpr, REST: tl.constexpr, AXES: tl.constexpr, INVERSE: tl.constexpr, Q_TILE: tl.constexpr,
    K_TILE: tl.constexpr, BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr, WHOLE_BLOCK: tl.constexpr,
):  # fmt: skip
    """One token."""
    b = (tl.program_id(0) // length).to(tl.int64)
    t = (tl.program_id(0) % length).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < HALF
    angle = b * a_stride_b + t * a_stride_l + i
    if AXES == 3:  # column i belongs to an axis
        axis = (i >= section_1).to(tl.int64) + (i >= section_2).to(tl.int64)
        angle += axis * a_stride_axis
    c1 = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    c2 = tl.load(cos + angle + HALF, mask=inside, other=0.0).to(tl.float32)
    s1 = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
    s2 = tl.load(sin + angle + HALF, mask=inside, other=0.0).to(tl.float32)
    if INVERSE:
        s1, s2 = -s2, -s1
    q_token, q_target = q + b * q_stride_b + t * q_stride_l, q_out + b * out_stride_b + t * out_stride_l
    k_token, k_target = k + b * k_stride_b + t * k_stride_l, k_out + b * kout_stride_b + t * kout_stride_l
    _rotate_heads(
        q_token, q_target, c1, s1, c2, s2, i, q_heads, q_stride_h, out_stride_h, HALF, REST, Q_TILE, BLOCK, REST_BLOCK
    )
    _rotate_heads(
        k_token, k_target, c1, s1, c2, s2, i, k_heads, k_stride_h, kout_stride_h, HALF, REST, K_TILE, BLOCK, REST_BLOCK
    )
    if v is not None:
        v_token, v_target = v + b * v_stride_b + t * v_stride_l, v_out + b * kout_stride_b + t * kout_stride_l
        _copy_heads(v_token, v_target, k_heads, v_stride_h, kout_stride_h, 2 * HALF + REST, K_TILE, WHOLE_BLOCK)


def _launch(
    q: Tensor, k: Tensor, v: Tensor | None, cos: Tensor, sin: Tensor, sections: Sequence[int], inverse: bool,
    outs: tuple[Tensor, Tensor, Tensor | None],
) -> None:  # fmt: skip
    """Everything token-major: q [B, L, Hq, D]; cos and sin [axes, B or 1, L, R]."""
    (batch, length, q_heads, dim), k_heads = q.shape, k.shape[2]
    if not q.numel() + k.numel():
        return
    q, k, v = _unit(q), _unit(k), None if v is None else _unit(v)
    cos, sin = cos.contiguous(), sin.contiguous()
    half, axes, of_batch = cos.shape[-1] // 2, len(cos), cos.stride(1) if cos.shape[1] > 1 else 0
    block = power_of_two(half)
    tile = max(_TILE // block, 1)
    rest = dim - 2 * half
    q_out, k_out, v_out = outs
    ends = (sections[0], sections[0] + sections[1]) if sections else (0, 0)
    launch(rope_kernel, batch * length)(
        q, k, v, cos, sin, q_out, k_out, v_out, length, q_heads, k_heads, *ends,
        *q.stride()[:3], *k.stride()[:3], *((0, 0, 0) if v is None else v.stride()[:3]),
        cos.stride(0) if axes > 1 else 0, of_batch, cos.stride(2), *q_out.stride()[:3], *k_out.stride()[:3],
        HALF=half, REST=rest, AXES=axes, INVERSE=inverse, Q_TILE=min(tile, power_of_two(q_heads)),
        K_TILE=min(tile, power_of_two(k_heads)), BLOCK=block, REST_BLOCK=power_of_two(max(rest, 1)),
        WHOLE_BLOCK=power_of_two(dim), num_warps=4 if q_heads * half >= 512 else 2,
    )  # fmt: skip


def _unit(x: Tensor) -> Tensor:
    """``x`` with a last stride of 1."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@torch.library.custom_op("fastrl::rope", mutates_args=())
def _rope_op(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sections: list[int], inverse: bool
) -> tuple[Tensor, Tensor]:
    """q [B, L, Hq, D], k [B, L, Hk, D], cos and sin [axes, B or 1, L, R] → rotated, contiguous."""
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    _launch(q, k, None, cos, sin, sections, inverse, (q_out, k_out, None))
    return q_out, k_out


@_rope_op.register_fake
def _(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sections: list[int], inverse: bool) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    _, _, cos, sin, ctx.sections, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> Any:
    cos, sin = ctx.saved_tensors
    return *_rope_op(grad_q, grad_k, cos, sin, ctx.sections, not ctx.inverse), None, None, None, None


_rope_op.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("fastrl::qkv_rope_backward", mutates_args=())
def _join_op(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Gradients [N, H, D] of the three → of qkv, [N, 3, H, D]."""
    n, heads, dim = grad_q.shape
    joint = grad_q.new_empty((n, 3, heads, dim))
    q, k, v = (x[None] for x in joint.unbind(1))
    _launch(grad_q[None], grad_k[None], grad_v[None], cos[None, None], sin[None, None], (), True, (q, k, v))
    return joint


@_join_op.register_fake
def _(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    n, heads, dim = grad_q.shape
    return grad_q.new_empty((n, 3, heads, dim))


class _Split(torch.autograd.Function):
    """Queries and keys are new; the values stay where they are."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        q, k, v = qkv.unbind(1)
        q, k = _rope_op(q[None], k[None], cos[None, None], sin[None, None], [], False)
        return q[0], k[0], v

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> Any:  # type: ignore[override]
        return _join_op(grad_q, grad_k, grad_v, *ctx.saved_tensors), None, None


class Rotated(NamedTuple):
    """Queries and keys, each shaped as given."""

    q: Tensor
    k: Tensor


class RotatedSplit(NamedTuple):
    """Rotated queries and keys and the values, [N, H, D] each."""

    q: Tensor
    k: Tensor
    v: Tensor


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, sections: Sequence[int] | None = None) -> Rotated:
    """Rotate queries and keys; the formula is at the top of this file.

    Args:
        q: [B, Hq, L, D]; k: [B, Hk, L, D], of one dtype: float32, bfloat16 or float16 (float64 runs in plain torch).
            Any strides: heads split from a projection, ``view(B, L, H, D).transpose(1, 2)``, are read in place.
        cos, sin: [B or 1, L, R], R even and at most D, any floating dtype; no gradient. Transformers repeats the angles
            of the first half in the second; here the halves may differ. With ``sections``: [3, B or 1, L, R].
        sections: columns of a half that belong to time, height and width; their sum is R/2.

    Returns:
        Rotated queries and keys, stored token by token ([B, L, H, D]), which attention kernels read as they are.
        Differentiable in ``q`` and ``k``, to any order.

    Raises:
        ValueError: shapes do not match, or tensors are on different devices.
        TypeError: dtypes differ or are not floating.
    """
    if reads("fastrl_rope", q, k, cos, sin) and _turns(q, k, cos, sin, sections):
        twin = partial(rope_reference, cos=cos, sin=sin, sections=sections)
        return Rotated(*_native_pointwise.rope(q, k, cos, sin, sections, twin))
    _check_rope(q, k, cos, sin, sections)
    refuse_forward_mode("rope", q, k, cos, sin)
    if not use_operator(q):
        return rope_reference(q, k, cos, sin, sections=sections)
    angles = (cos, sin) if sections else (cos[None], sin[None])
    out = _rope_op(q.transpose(1, 2), k.transpose(1, 2), *angles, list(sections or ()), False)
    return Rotated(*(x.transpose(1, 2) for x in out))


def qkv_rope(qkv: Tensor, cos: Tensor, sin: Tensor) -> RotatedSplit:
    """Take the joint projection of a vision tower apart and rotate its queries and keys.

    Args:
        qkv: [N, 3, H, D], the dtypes of :func:`rope`.
        cos, sin: [N, R], R even and at most D, any floating dtype; no gradient.

    Returns:
        Queries, keys and values. The values are a view of ``qkv``, so neither may be changed in place. Differentiable
        once in ``qkv``.

    Raises:
        ValueError, TypeError: as for :func:`rope`.
    """
    if reads("fastrl_rope", qkv, cos, sin) and _splits(qkv, cos, sin):
        twin = partial(qkv_rope_reference, cos=cos, sin=sin)
        return RotatedSplit(*_native_pointwise.qkv_rope(qkv, cos, sin, twin))
    check_shape("qkv", qkv, (None, 3, None, None))
    check_dtype("qkv", qkv, FLOATS)
    _check_angles(cos, sin, (len(qkv), None), qkv.shape[-1])
    check_same_device(qkv=qkv, cos=cos, sin=sin)
    refuse_forward_mode("qkv_rope", qkv, cos, sin)
    if not use_operator(qkv) or torch.compiler.is_compiling():  # which follows no output that is a view of an input
        return _split_plainly(qkv, cos, sin)
    split: Any = _Split.apply(qkv, cos, sin)
    return RotatedSplit(*split)


def _split_plainly(qkv: Tensor, cos: Tensor, sin: Tensor) -> RotatedSplit:
    q, k, v = (x.transpose(0, 1)[None] for x in qkv.unbind(1))
    out = rope(q, k, cos[None], sin[None])
    return RotatedSplit(*(x[0].transpose(0, 1) for x in (*out, v)))


def rope_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, sections: Sequence[int] | None = None) -> Rotated:
    """Eager twin of :func:`rope` (same arguments, nothing checked)."""
    if sections:
        cos, sin = (_merged(x, sections) for x in (cos, sin))
    wide = torch.promote_types(torch.promote_types(q.dtype, cos.dtype), torch.float32)
    c, s = cos.to(wide)[:, None], sin.to(wide)[:, None]

    def rotated(x: Tensor) -> Tensor:
        turned, rest = x[..., : c.shape[-1]].to(wide), x[..., c.shape[-1] :]
        first, second = turned.chunk(2, -1)
        turned = turned * c + torch.cat((-second, first), -1) * s
        return torch.cat((turned.to(x.dtype), rest), -1)

    return Rotated(rotated(q), rotated(k))


def qkv_rope_reference(qkv: Tensor, cos: Tensor, sin: Tensor) -> RotatedSplit:
    """Eager twin of :func:`qkv_rope` (same arguments, nothing checked)."""
    q, k, v = (x.transpose(0, 1)[None] for x in qkv.unbind(1))
    out = rope_reference(q, k, cos[None], sin[None])
    return RotatedSplit(*(x[0].transpose(0, 1) for x in (*out, v)))


def _merged(angles: Tensor, sections: Sequence[int]) -> Tensor:
    """[3, B, L, R] → [B, L, R], each column from its axis."""
    columns = angles.split(list(sections) * 2, dim=-1)
    return torch.cat([column[i % 3] for i, column in enumerate(columns)], -1)


def _turns(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sections: Sequence[int] | None) -> bool:
    """Whether shapes and sections fit, and the angles take no gradient; where not, what does not is said elsewhere."""
    if q.dim() != 4 or k.dim() != 4 or cos.dim() != 3 + (sections is not None) or cos.shape != sin.shape:
        return False
    (batch, _, length, dim), (own, tokens, width) = q.shape, cos.shape[-3:]
    fits = k.shape == (batch, k.shape[1], length, dim) and tokens == length and own in (1, batch)
    if not fits or width % 2 or width > dim or cos.requires_grad or sin.requires_grad:
        return False
    good = sections is None or (len(sections) == len(cos) == 3 and sum(sections) == width // 2 and min(sections) >= 0)
    return good


def _splits(qkv: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether shapes fit, and the angles take no gradient."""
    if qkv.dim() != 4 or qkv.shape[1] != 3 or cos.dim() != 2 or cos.shape != sin.shape or len(cos) != len(qkv):
        return False
    width = cos.shape[1]
    return width % 2 == 0 and width <= qkv.shape[3] and not (cos.requires_grad or sin.requires_grad)


def _check_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sections: Sequence[int] | None) -> None:
    check_shape("q", q, (None, None, None, None))
    batch, _, length, dim = q.shape
    check_dtype("q", q, FLOATS)
    check_shape("k", k, (batch, None, length, dim))
    check_dtype("k", k, (q.dtype,))
    axes = () if sections is None else (3,)
    _check_angles(cos, sin, (*axes, None, length, None), dim)
    check(cos.shape[-3] in (1, batch), f"cos: expected a batch of 1 or {batch}, got {list(cos.shape)}")
    if sections is not None:
        half = cos.shape[-1] // 2
        good = len(sections) == 3 and sum(sections) == half and min(sections) >= 0
        check(good, f"sections: expected three numbers of sum {half}, got {list(sections)}")
    check_same_device(q=q, k=k, cos=cos, sin=sin)


def _check_angles(cos: Tensor, sin: Tensor, shape: tuple[int | None, ...], dim: int) -> None:
    check_shape("cos", cos, shape)
    check_shape("sin", sin, tuple(cos.shape))
    for name, x in (("cos", cos), ("sin", sin)):
        check_dtype(name, x, FLOATS)
    width = cos.shape[-1]
    check(width % 2 == 0 and width <= dim, f"cos: expected an even number of at most {dim} angles, got {width}")
