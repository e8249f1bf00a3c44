"""Overlap of two boxes and its gradient as Triton functions, for ``pairwise_iou`` and ``detection_reward``.

The formulas and their derivatives are written out in ``pairwise_iou``'s docstring. All in fp32; ``KIND`` is 0 for IoU,
1 for GIoU, 2 for DIoU, 3 for CIoU. No libdevice, so the interpreter runs them too.

Coordinates of 2^40 (1e12) or more are treated as not finite, unions and hulls up to 2^-80 (1e-24) as empty. Between
these bounds no fp32 intermediate of a value or a gradient overflows, so finite inputs never give NaN.
"""

from __future__ import annotations

from fastrl_kernels._triton import tl, triton

FARTHEST = 2.0**40
EMPTY = 2.0**-80
_FARTHEST = tl.constexpr(FARTHEST)
_EMPTY = tl.constexpr(EMPTY)


@triton.jit
def _angle(w, h):
    """atan2(w, h) for w, h >= 0 (0 for two zeros), fp32 accurate: two reductions to |z| <= tan(pi / 8), then Taylor."""
    big = tl.maximum(w, h)
    t = tl.minimum(w, h) / tl.where(big > 0, big, 1.0)
    upper = t > 0.41421356
    z = tl.where(upper, (t - 1.0) / (t + 1.0), t)
    q = z * z
    p = 1.0 / 17.0
    p = 1.0 / 15.0 - q * p
    p = 1.0 / 13.0 - q * p
    p = 1.0 / 11.0 - q * p
    p = 1.0 / 9.0 - q * p
    p = 1.0 / 7.0 - q * p
    p = 1.0 / 5.0 - q * p
    p = 1.0 / 3.0 - q * p
    theta = z * (1.0 - q * p) + tl.where(upper, 0.78539816, 0.0)
    return tl.where(w > h, 1.57079633 - theta, theta)


@triton.jit
def _largest(x1, y1, x2, y2):
    """Largest magnitude of the four, +inf if one is NaN."""
    size = tl.maximum(tl.maximum(tl.abs(x1), tl.abs(y1)), tl.maximum(tl.abs(x2), tl.abs(y2)))
    number = x1 + y1 + x2 + y2  # NaN if one is, or if infinities cancel
    return tl.where(number == number, size, float("inf"))


@triton.jit
def _positive(x):
    return tl.where(x > 0, x, 0.0)


@triton.jit
def pair_value(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2, KIND: tl.constexpr):
    """Overlap of broadcast fp32 boxes; 0 where it is not finite or a coordinate is not. KIND indexes KINDS."""
    wa, ha = _positive(ax2 - ax1), _positive(ay2 - ay1)
    wb, hb = _positive(bx2 - bx1), _positive(by2 - by1)
    inter = _positive(tl.minimum(ax2, bx2) - tl.maximum(ax1, bx1))
    inter = inter * _positive(tl.minimum(ay2, by2) - tl.maximum(ay1, by1))
    union = wa * ha + wb * hb - inter
    iou = tl.where(union > _EMPTY, inter / tl.where(union > _EMPTY, union, 1.0), 0.0)
    value = iou
    if KIND > 0:
        cw = _positive(tl.maximum(ax2, bx2) - tl.minimum(ax1, bx1))
        ch = _positive(tl.maximum(ay2, by2) - tl.minimum(ay1, by1))
        if KIND == 1:
            hull = cw * ch
            value = tl.where(hull > _EMPTY, iou - (hull - union) / tl.where(hull > _EMPTY, hull, 1.0), iou)
        else:
            dx = 0.5 * ((ax1 + ax2) - (bx1 + bx2))
            dy = 0.5 * ((ay1 + ay2) - (by1 + by2))
            value = iou - (dx * dx + dy * dy) / (cw * cw + ch * ch + 1e-7)
        if KIND == 3:
            turn = _angle(wa, ha) - _angle(wb, hb)
            v = 0.40528473 * turn * turn
            value -= v * v / (1.0 - iou + v + 1e-7)
    good = tl.maximum(_largest(ax1, ay1, ax2, ay2), _largest(bx1, by1, bx2, by2)) < _FARTHEST
    return tl.where(good, value, 0.0)


@triton.jit
def _follows(a, b):
    """d min(a, b) / d a: 1 where a is the smaller, one half at a tie."""
    return tl.where(a < b, 1.0, tl.where(a == b, 0.5, 0.0))


@triton.jit
def pair_gradient(g, ax1, ay1, ax2, ay2, bx1, by1, bx2, by2, KIND: tl.constexpr):
    """g times the derivative of the pair's value with respect to (ax1, ay1, ax2, ay2)."""
    wa, ha = _positive(ax2 - ax1), _positive(ay2 - ay1)
    wb, hb = _positive(bx2 - bx1), _positive(by2 - by1)
    iw = _positive(tl.minimum(ax2, bx2) - tl.maximum(ax1, bx1))
    ih = _positive(tl.minimum(ay2, by2) - tl.maximum(ay1, by1))
    inter = iw * ih
    union = wa * ha + wb * hb - inter
    some = union > _EMPTY
    per_union = tl.where(some, 1.0 / tl.where(some, union, 1.0), 0.0)
    iou = inter * per_union
    # Coefficients of dI, dA, dcw, dch, dwa, dha and of the centres: value = f(I, A, cw, ch, ...).
    of_inter, of_area = (1.0 + iou) * per_union, -iou * per_union
    of_cw, of_ch, of_wa, of_ha, of_cx, of_cy = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    value = iou
    if KIND > 0:
        cw = _positive(tl.maximum(ax2, bx2) - tl.minimum(ax1, bx1))
        ch = _positive(tl.maximum(ay2, by2) - tl.minimum(ay1, by1))
        if KIND == 1:
            hull = cw * ch
            per_hull = tl.where(hull > _EMPTY, 1.0 / tl.where(hull > _EMPTY, hull, 1.0), 0.0)
            value = iou - (hull - union) * per_hull
            of_inter -= per_hull
            of_area += per_hull
            of_hull = -union * per_hull * per_hull
            of_cw, of_ch = of_hull * ch, of_hull * cw
        else:
            dx = 0.5 * ((ax1 + ax2) - (bx1 + bx2))
            dy = 0.5 * ((ay1 + ay2) - (by1 + by2))
            per_diagonal = 1.0 / (cw * cw + ch * ch + 1e-7)
            ratio = (dx * dx + dy * dy) * per_diagonal
            value = iou - ratio
            if KIND == 3:
                turn = _angle(wa, ha) - _angle(wb, hb)
                v = 0.40528473 * turn * turn
                alpha = v / (1.0 - iou + v + 1e-7)
                value -= alpha * v
                of_inter *= 1.0 - alpha * alpha
                of_area *= 1.0 - alpha * alpha
                real = (wa > 0) & (ha > 0)
                per_side = tl.where(real, 1.0 / tl.where(real, wa * wa + ha * ha, 1.0), 0.0)
                of_angle = -(2.0 - alpha) * alpha * 0.81056947 * turn
                of_wa, of_ha = of_angle * ha * per_side, -of_angle * wa * per_side
            of_cw, of_ch = 2.0 * cw * ratio * per_diagonal, 2.0 * ch * ratio * per_diagonal
            of_cx, of_cy = -dx * per_diagonal, -dy * per_diagonal
    good = tl.maximum(_largest(ax1, ay1, ax2, ay2), _largest(bx1, by1, bx2, by2)) < _FARTHEST
    of_wa = tl.where(wa > 0, of_wa + of_area * ha, 0.0)
    of_ha = tl.where(ha > 0, of_ha + of_area * wa, 0.0)
    of_iw, of_ih = tl.where(iw > 0, of_inter * ih, 0.0), tl.where(ih > 0, of_inter * iw, 0.0)
    good = good & (g != 0)
    gx1 = -of_iw * _follows(bx1, ax1) - of_wa - of_cw * _follows(ax1, bx1) + of_cx
    gy1 = -of_ih * _follows(by1, ay1) - of_ha - of_ch * _follows(ay1, by1) + of_cy
    gx2 = of_iw * _follows(ax2, bx2) + of_wa + of_cw * _follows(bx2, ax2) + of_cx
    gy2 = of_ih * _follows(ay2, by2) + of_ha + of_ch * _follows(by2, ay2) + of_cy
    zero = 0.0  # not g * gradient: 0 times an overflow is NaN
    return (
        tl.where(good, g * gx1, zero),
        tl.where(good, g * gy1, zero),
        tl.where(good, g * gx2, zero),
        tl.where(good, g * gy2, zero),
    )


@triton.jit
def load_boxes(boxes, index, mask):
    """Corners of boxes[index] ([.., 4], contiguous) as four fp32 tensors, 0 where masked.

    The corners are loaded as an axis of their own, which makes one access of 128 bits (in fp32) per box, then split.
    """
    at = boxes + tl.expand_dims(index, -1) * 4 + tl.arange(0, 4)
    box = tl.load(at, mask=tl.expand_dims(mask, -1), other=0.0).to(tl.float32)
    x, y = tl.split(tl.reshape(box, index.shape + [2, 2]))  # noqa: RUF005 (Triton unpacks no list)
    x1, x2 = tl.split(x)
    y1, y2 = tl.split(y)
    return x1, y1, x2, y2


@triton.jit
def load_box(boxes, index):
    """Corners of one box as four fp32 numbers."""
    box = tl.load(boxes + index * 4 + tl.arange(0, 4)).to(tl.float32)
    x, y = tl.split(tl.reshape(box, [2, 2]))
    x1, x2 = tl.split(x)
    y1, y2 = tl.split(y)
    return x1, y1, x2, y2
