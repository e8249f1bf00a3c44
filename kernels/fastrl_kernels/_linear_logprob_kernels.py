"""Triton kernels of the head: fold a slab of logits into row statistics, turn a slab into its gradient in place.

The formulas are in ``_linear_logprob_tiles``. Forward: one program per row reads the slab once. The elements of one
128-bit word form a group with a running (max, sum, weighted sum), rescaled once per word; groups are combined once at
the end, so the loop has no barrier, and the next block is loaded while one is folded. A sum that includes the row's
maximum would round small terms away, so the group that contains it is summed again without it, at the cost of one block
per row. Backward: elementwise given the row's log-sum-exp; read once, written once, rounded once. Loops start at the
row's first whole word and run unmasked over whole blocks, so all but a row's ends is accessed in 128-bit words for any
stride and size. Grids are 1-D and row offsets 64-bit.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastrl_kernels._common import launch
from fastrl_kernels._numerics import expm1_tail, log1p_unit
from fastrl_kernels._triton import tl, triton


@triton.jit
def _tanh(x):
    """tanh without libdevice, relative error ~2e-7: its series near 0, (1 - e) / (1 + e), e = exp(-2|x|), elsewhere."""
    a = tl.abs(x)
    q = x * x
    series = -1382.0 / 155925.0
    series = series * q + 62.0 / 2835.0
    series = series * q - 17.0 / 315.0
    series = series * q + 2.0 / 15.0
    series = series * q - 1.0 / 3.0
    e = tl.exp(-2.0 * a)
    far = (1.0 - e) / (1.0 + e)
    return tl.where(a < 0.25, x + x * q * series, tl.where(x < 0, -far, far))


@triton.jit
def _load_logits(row_pointer, bias, columns, mask, MASKED: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Raw logits of these columns as fp32, plus their bias."""
    if MASKED:
        s = tl.load(row_pointer + columns, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            s += tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)
    else:
        s = tl.load(row_pointer + columns).to(tl.float32)
        if HAS_BIAS:
            s += tl.load(bias + columns).to(tl.float32)
    return s


@triton.jit
def _aligned_start(offset, PACK: tl.constexpr):
    """The first multiple of PACK from ``offset`` on, from which a row of odd stride can be read in whole words."""
    return (offset + (PACK - 1)) // PACK * PACK


@triton.jit
def _fold_block(
    m, r, w, x, bias, columns, mask, softcap, scale,
    MASKED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr,
):  # fmt: skip
    """Raw logits [GROUPS, PACK] into each group's running (max, sum, weighted sum), in units of log 2."""
    x = _tempered(x, bias, columns, mask, softcap, MASKED, HAS_BIAS, HAS_SOFTCAP)
    new = tl.maximum(m, tl.max(x, 1) * scale)
    d = x * scale - new[:, None]
    e = tl.exp2(d)  # 0 for a forbidden token (-inf); NaN stays NaN
    decay = tl.exp2(m - new)
    if HAS_ENTROPY:
        w = decay * (w + (m - new) * r) + tl.sum(e * tl.maximum(d, -1.0e30), 1)
    r = decay * r + tl.sum(e, 1)
    return new, r, w


@triton.jit
def _tempered(x, bias, columns, mask, softcap, MASKED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """Logits as fp32 with bias and softcap; -inf where masked."""
    x = x.to(tl.float32)
    if HAS_BIAS:
        if MASKED:
            x += tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)
        else:
            x += tl.load(bias + columns).to(tl.float32)
    if HAS_SOFTCAP:
        x = softcap * _tanh(x / softcap)
    if MASKED:
        x = tl.where(mask, x, float("-inf"))
    return x


@triton.jit
def _owner_rest(
    row_pointer, bias, head, blocks, width, group, top, softcap, scale,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, GROUPS: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """Sum and weighted sum of one group, computed again without one element that is its maximum ``top``."""
    step = tl.arange(0, GROUPS)
    lane = group * PACK + tl.arange(0, PACK)
    rest = tl.zeros([GROUPS], tl.float32)
    weighted = tl.zeros([GROUPS], tl.float32)
    found = 0
    for start in range(0, blocks + 2, GROUPS):  # the group's part of the row's head, whole blocks and tail
        i = start + step
        columns = tl.where(i == 0, 0, head + (i - 1) * (GROUPS * PACK))[:, None] + lane[None, :]
        mask = (i < blocks + 2)[:, None] & (columns < tl.where(i == 0, head, width)[:, None])
        x = tl.load(row_pointer + columns, mask=mask, other=0.0)
        z = _tempered(x, bias, columns, mask, softcap, True, HAS_BIAS, HAS_SOFTCAP) * scale  # pyright: ignore[reportOperatorIssue]
        place = step[:, None] * PACK + tl.arange(0, PACK)[None, :]
        first = tl.min(tl.where(z == top, place, GROUPS * PACK))
        own = (place == first) & (found == 0)
        found = tl.where(first < GROUPS * PACK, 1, found)
        d = tl.maximum(z - top, -1.0e30)
        e = tl.where(own, 0.0, tl.exp2(z - top))
        rest += tl.sum(e, 1)
        weighted += tl.sum(e * d, 1)
    return tl.sum(rest, 0), tl.sum(weighted, 0)


@triton.jit
def linear_logprob_fold_kernel(
    tile, target, inverse_temperature, bias, state, logp, lse, entropy,
    tile_stride, state_stride, width, first_column, n_columns, ignore_index, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr, PACK: tl.constexpr,  # PACK: elements of a 128-bit word
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    wanted = tl.load(target + row)
    ignored = wanted == ignore_index
    width = tl.where(ignored, 0, width)
    inv_t = tl.load(inverse_temperature + row)
    softcap = tl.cast(softcap, tl.float32)
    scale = inv_t * 1.4426950408889634
    offset = row * tile_stride
    row_pointer = tile + offset
    bias += first_column
    GROUPS: tl.constexpr = BLOCK // PACK
    group = tl.arange(0, GROUPS)
    lanes = group[:, None] * PACK + tl.arange(0, PACK)[None, :]
    m = tl.full([GROUPS], -1.0e30, tl.float32)
    r = tl.zeros([GROUPS], tl.float32)
    w = tl.zeros([GROUPS], tl.float32)
    aligned = _aligned_start(offset, PACK)
    head = tl.minimum((aligned - offset).to(tl.int32), width)
    blocks = (width - head) // BLOCK
    if head > 0:
        mask = lanes < head
        x = tl.load(row_pointer + lanes, mask=mask, other=0.0)
        m, r, w = _fold_block(m, r, w, x, bias, lanes, mask, softcap, scale, True, HAS_BIAS, HAS_SOFTCAP, HAS_ENTROPY)
    if blocks > 0:
        body = tile + aligned + lanes
        x = tl.load(body)
        for start in range(blocks):  # the next block is loaded while this one is folded
            ahead = tl.load(body + tl.minimum(start + 1, blocks - 1) * BLOCK)
            m, r, w = _fold_block(
                m, r, w, x, bias, head + start * BLOCK + lanes, lanes < BLOCK, softcap, scale,
                False, HAS_BIAS, HAS_SOFTCAP, HAS_ENTROPY,
            )  # fmt: skip
            x = ahead
    if head + blocks * BLOCK < width:
        columns = head + blocks * BLOCK + lanes
        mask = columns < width
        x = tl.load(row_pointer + columns, mask=mask, other=0.0)
        m, r, w = _fold_block(m, r, w, x, bias, columns, mask, softcap, scale, True, HAS_BIAS, HAS_SOFTCAP, HAS_ENTROPY)

    # groups, then the slabs before this one
    seen = first_column > 0
    state += row
    m0 = tl.load(state, mask=seen, other=-1.0e30)
    r0 = tl.load(state + state_stride, mask=seen, other=0.0)
    here_top = tl.max(m, 0)
    top = tl.maximum(here_top, m0)
    a = tl.exp2(m - top)
    a0 = tl.exp2(m0 - top)
    a_here = tl.exp2(here_top - top)
    # The group with the maximum is summed again without it: small terms added to a 1 would be rounded away.
    owner = tl.min(tl.where(m == here_top, group, GROUPS), 0)
    rest, weighted = _owner_rest(  # pyright: ignore[reportGeneralTypeIssues]
        row_pointer, bias, head, blocks, width, owner, here_top, softcap, scale, HAS_BIAS, HAS_SOFTCAP, GROUPS, PACK
    )
    weighted = a_here * (weighted + (here_top - top) * (rest + 1.0))
    # loaded here, as a barrier precedes its store
    z0 = tl.load(state + 3 * state_stride, mask=seen, other=float("nan"))
    rest = a_here * rest + tl.sum(tl.where(group == owner, 0.0, r * a), 0)
    rest += tl.where(here_top >= m0, (r0 + 1.0) * a0, r0 + a_here)
    rest = tl.where(ignored, 0.0, rest)
    column = wanted - first_column
    here = (column >= 0) & (column < width)
    z = tl.load(row_pointer + column, mask=here, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias + column, mask=here, other=0.0).to(tl.float32)
    if HAS_SOFTCAP:
        z = softcap * _tanh(z / softcap)
    z_target = tl.where(here, z * scale, z0)
    if HAS_ENTROPY:
        w0 = tl.load(state + 2 * state_stride, mask=seen, other=0.0)
        weighted += tl.sum(tl.where(group == owner, 0.0, a * (w + (m - top) * r)), 0)
        weighted += a0 * (w0 + (m0 - top) * (r0 + 1.0))

    if first_column + width < n_columns:
        tl.store(state, top)
        tl.store(state + state_stride, rest)
        tl.store(state + 2 * state_stride, weighted)
        tl.store(state + 3 * state_stride, z_target)
    if ignored | (first_column + width == n_columns):
        small = tl.minimum(rest, 1.0)  # log(1 + rest), accurate even if one token has all the mass
        log_total = tl.where(rest < 1.0, log1p_unit(small) * 1.4426950408889634, tl.log2(1.0 + rest))
        tl.store(logp + row, tl.where(ignored, 0.0, (z_target - top - log_total) * 0.6931471805599453))
        tl.store(lse + row, tl.where(ignored, 0.0, (top + log_total) * 0.6931471805599453))
        if HAS_ENTROPY:
            tl.store(entropy + row, tl.where(ignored, 0.0, (log_total - weighted / (1.0 + rest)) * 0.6931471805599453))


@triton.jit
def _differentiate_block(
    row_pointer, out_pointer, bias, columns, end, column, at_target, log_total, entropy, g, h, softcap, inv_t,
    MASKED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr,
):  # fmt: skip
    mask = columns < end
    z = _load_logits(row_pointer, bias, columns, mask, MASKED, HAS_BIAS)
    t = z
    if HAS_SOFTCAP:
        t = _tanh(z / softcap)
        z = softcap * t
    log_p = z * inv_t - log_total
    log_p = tl.where(log_p < -1.0e10, -1.0e10, log_p)  # a forbidden token (-inf): p = 0, and 0 * log 0 = 0
    p = tl.exp(log_p)
    if HAS_ENTROPY:
        d = -p * (g + h * (log_p + entropy))
    else:
        d = -p * g
    d = tl.where(columns == column, at_target, d) * inv_t
    if HAS_SOFTCAP:
        d = d * (1.0 - t * t)
    if MASKED:
        tl.store(out_pointer + columns, d.to(out_pointer.dtype.element_ty), mask=mask)
    else:
        tl.store(out_pointer + columns, d.to(out_pointer.dtype.element_ty))


@triton.jit
def linear_logprob_gradient_kernel(
    tile, out, target, inverse_temperature, bias, logp, lse, entropy, grad_logp, grad_entropy,
    tile_stride, out_stride, width, first_column, ignore_index, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr, PACK: tl.constexpr,  # PACK: elements of a 128-bit word
    SAME_STRIDE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    wanted = tl.load(target + row)
    g = tl.load(grad_logp + row)
    h = 0.0
    big_h = 0.0
    if HAS_ENTROPY:
        h = tl.load(grad_entropy + row)
        big_h = tl.load(entropy + row)
    nothing = (wanted == ignore_index) | ((g == 0.0) & (h == 0.0))
    lanes = tl.arange(0, BLOCK)
    offset = row * out_stride
    out_pointer = out + offset
    aligned = _aligned_start(offset, PACK)
    head = tl.minimum((aligned - offset).to(tl.int32), width)
    blocks = (width - head) // BLOCK
    out_body = out + aligned
    if nothing:
        zero = tl.zeros([BLOCK], tl.float32).to(out.dtype.element_ty)
        if head > 0:
            tl.store(out_pointer + lanes, zero, mask=lanes < head)
        for i in range(blocks):
            tl.store(out_body + i * BLOCK + lanes, zero)
        after = head + blocks * BLOCK + lanes
        tl.store(out_pointer + after, zero, mask=after < width)
    else:
        row_pointer = tile + row * tile_stride
        if SAME_STRIDE:
            body = tile + aligned
        else:
            body = row_pointer + head
        bias += first_column
        inv_t = tl.load(inverse_temperature + row)
        softcap = tl.cast(softcap, tl.float32)
        log_total = tl.load(lse + row)
        log_p = tl.load(logp + row)
        column = (wanted - first_column).to(tl.int32)
        near = tl.maximum(log_p, -0.5)
        rest = tl.where(log_p < -0.5, 1.0 - tl.exp(log_p), -(near + expm1_tail(near)))  # 1 - p of the target
        at_target = g * rest
        if HAS_ENTROPY:
            at_target -= h * (1.0 - rest) * (log_p + big_h)
        if head > 0:
            _differentiate_block(
                row_pointer, out_pointer, bias, lanes, head, column, at_target, log_total, big_h, g, h,
                softcap, inv_t, True, HAS_BIAS, HAS_SOFTCAP, HAS_ENTROPY,
            )  # fmt: skip
        for i in range(blocks):
            _differentiate_block(
                body, out_body, bias + head, i * BLOCK + lanes, width, column - head, at_target, log_total, big_h,
                g, h, softcap, inv_t, False, HAS_BIAS, HAS_SOFTCAP, HAS_ENTROPY,
            )  # fmt: skip
        if head + blocks * BLOCK < width:
            _differentiate_block(
                row_pointer, out_pointer, bias, head + blocks * BLOCK + lanes, width, column, at_target, log_total,
                big_h, g, h, softcap, inv_t, True, HAS_BIAS, HAS_SOFTCAP, HAS_ENTROPY,
            )  # fmt: skip


def launch_config(width: int) -> tuple[int, int]:
    """(BLOCK, warps) for tiles of this many columns, for both kernels."""
    if width > 2048:
        return 4096, 8
    if width > 256:
        return 1024, 4
    return 256, 2


def _fold_registers(width: int, plain: bool) -> int:
    """Most registers of a thread of the fold. Left to itself, ptxas spills a few bytes to fit a program more.

    64 let four programs of 8 warps share a multiprocessor, 80 three.
    """
    return 64 if plain or width <= 2048 else 80


def launch_fold(tile: Tensor, first_column: int, options: Any, rows: Any, state: Tensor) -> None:
    """Launch the forward kernel; arguments as ``fold_tile``."""
    n, width = tile.shape
    block, warps = launch_config(width)
    has_entropy = rows.entropy is not None
    plain = options.bias is None and options.softcap is None and not has_entropy and tile.element_size() == 2
    launch(linear_logprob_fold_kernel, n)(
        tile, rows.target, rows.inverse_temperature, tile if options.bias is None else options.bias, state,
        rows.logp, rows.lse, rows.entropy if has_entropy else rows.logp,
        tile.stride(0), state.stride(0), width, first_column, options.n_columns, options.ignore_index,
        options.softcap or 1.0,
        HAS_BIAS=options.bias is not None, HAS_SOFTCAP=options.softcap is not None, HAS_ENTROPY=has_entropy,
        BLOCK=block, PACK=16 // tile.element_size(), num_warps=warps, maxnreg=_fold_registers(width, plain),
    )  # fmt: skip


def launch_gradient(
    tile: Tensor,
    out: Tensor,
    first_column: int,
    options: Any,
    rows: Any,
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
) -> None:
    """Launch the backward kernel; arguments as ``differentiate_tile``."""
    n, width = tile.shape
    block, warps = launch_config(width)
    has_entropy = grad_entropy is not None
    launch(linear_logprob_gradient_kernel, n)(
        tile, out, rows.target, rows.inverse_temperature, tile if options.bias is None else options.bias,
        rows.logp, rows.lse, rows.entropy if has_entropy else rows.logp,
        grad_logp, grad_entropy if has_entropy else grad_logp,
        tile.stride(0), out.stride(0), width, first_column, options.ignore_index, options.softcap or 1.0,
        HAS_BIAS=options.bias is not None, HAS_SOFTCAP=options.softcap is not None, HAS_ENTROPY=has_entropy,
        BLOCK=block, PACK=16 // tile.element_size(), SAME_STRIDE=tile.stride(0) == out.stride(0), num_warps=warps,
    )  # fmt: skip
