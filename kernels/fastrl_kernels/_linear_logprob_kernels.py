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
    m, r, w, u, c, x, bias, class_weight, columns, mask, softcap, scale,
    MASKED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    HAS_MEAN: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Raw logits [GROUPS, PACK] into each group's running (max, sum, weighted sum), in units of log 2.

    With HAS_MEAN, also the sum of class weight x (logit - max) and of class weights.
    """
    x = _tempered(x, bias, columns, mask, softcap, MASKED, HAS_BIAS, HAS_SOFTCAP)
    new = tl.maximum(m, tl.max(x, 1) * scale)
    d = x * scale - new[:, None]
    e = tl.exp2(d)  # 0 for a forbidden token (-inf); NaN stays NaN
    decay = tl.exp2(m - new)
    if HAS_ENTROPY:
        w = decay * (w + (m - new) * r) + tl.sum(e * tl.maximum(d, -1.0e30), 1)
    r = decay * r + tl.sum(e, 1)
    if HAS_MEAN:
        u += (m - new) * c
        if WEIGHTED:
            if MASKED:
                weight = tl.load(class_weight + columns, mask=mask, other=0.0).to(tl.float32)
            else:
                weight = tl.load(class_weight + columns).to(tl.float32)
            d = d * weight
            c += tl.sum(weight, 1)
        elif MASKED:
            c += tl.sum(mask.to(tl.float32), 1)
        else:
            c += x.shape[1]
        if MASKED:
            d = tl.where(mask, d, 0.0)
        u += tl.sum(d, 1)
    return new, r, w, u, c


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
    tile, target, inverse_temperature, bias, class_weight, state, logp, lse, entropy, mean_logp,
    tile_stride, state_stride, width, first_column, n_columns, ignore_index, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    HAS_MEAN: tl.constexpr, WEIGHTED: tl.constexpr,
    TARGETS: tl.constexpr, TARGET_LANES: tl.constexpr,  # TARGET_LANES: the next power of two
    BLOCK: tl.constexpr, PACK: tl.constexpr,  # PACK: elements of a 128-bit word
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if TARGETS == 1:
        wanted = tl.load(target + row)
        ignored = wanted == ignore_index
    else:
        place = tl.arange(0, TARGET_LANES)
        wanted = tl.load(target + row * TARGETS + place, mask=place < TARGETS, other=ignore_index)
        ignored = tl.max((wanted != ignore_index).to(tl.int32), 0) == 0
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
    u = tl.zeros([GROUPS], tl.float32)
    c = tl.zeros([GROUPS], tl.float32)
    class_weight += first_column
    aligned = _aligned_start(offset, PACK)
    head = tl.minimum((aligned - offset).to(tl.int32), width)
    blocks = (width - head) // BLOCK
    if head > 0:
        mask = lanes < head
        x = tl.load(row_pointer + lanes, mask=mask, other=0.0)
        m, r, w, u, c = _fold_block(
            m, r, w, u, c, x, bias, class_weight, lanes, mask, softcap, scale,
            True, HAS_BIAS, HAS_SOFTCAP, HAS_ENTROPY, HAS_MEAN, WEIGHTED,
        )  # fmt: skip
    if blocks > 0:
        body = tile + aligned + lanes
        x = tl.load(body)
        for start in range(blocks):  # the next block is loaded while this one is folded
            ahead = tl.load(body + tl.minimum(start + 1, blocks - 1) * BLOCK)
            m, r, w, u, c = _fold_block(
                m, r, w, u, c, x, bias, class_weight, head + start * BLOCK + lanes, lanes < BLOCK, softcap, scale,
                False, HAS_BIAS, HAS_SOFTCAP, HAS_ENTROPY, HAS_MEAN, WEIGHTED,
            )  # fmt: skip
            x = ahead
    if head + blocks * BLOCK < width:
        columns = head + blocks * BLOCK + lanes
        mask = columns < width
        x = tl.load(row_pointer + columns, mask=mask, other=0.0)
        m, r, w, u, c = _fold_block(
            m, r, w, u, c, x, bias, class_weight, columns, mask, softcap, scale,
            True, HAS_BIAS, HAS_SOFTCAP, HAS_ENTROPY, HAS_MEAN, WEIGHTED,
        )  # fmt: skip

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
    if TARGETS == 1:
        z0 = tl.load(state + 3 * state_stride, mask=seen, other=float("nan"))
    else:
        targets = state + (3 + place) * state_stride
        z0 = tl.load(targets, mask=seen & (place < TARGETS), other=float("nan"))
    if HAS_MEAN:
        sums = state + (3 + TARGETS) * state_stride
        u0 = tl.load(sums, mask=seen, other=0.0)
        c0 = tl.load(sums + state_stride, mask=seen, other=0.0)
        u0 += (m0 - top) * c0 + tl.sum(u + (m - top) * c, 0)
        c0 += tl.sum(c, 0)
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
        if TARGETS == 1:
            tl.store(state + 3 * state_stride, z_target)
        else:
            tl.store(targets, z_target, mask=place < TARGETS)
        if HAS_MEAN:
            tl.store(sums, u0)
            tl.store(sums + state_stride, c0)
    if ignored | (first_column + width == n_columns):
        small = tl.minimum(rest, 1.0)  # log(1 + rest), accurate even if one token has all the mass
        log_total = tl.where(rest < 1.0, log1p_unit(small) * 1.4426950408889634, tl.log2(1.0 + rest))
        log_p = tl.where(wanted == ignore_index, 0.0, (z_target - top - log_total) * 0.6931471805599453)
        if TARGETS == 1:
            tl.store(logp + row, log_p)
        else:
            tl.store(logp + row * TARGETS + place, log_p, mask=place < TARGETS)
        tl.store(lse + row, tl.where(ignored, 0.0, (top + log_total) * 0.6931471805599453))
        if HAS_ENTROPY:
            tl.store(entropy + row, tl.where(ignored, 0.0, (log_total - weighted / (1.0 + rest)) * 0.6931471805599453))
        if HAS_MEAN:
            mean = (u0 - c0 * log_total) * (0.6931471805599453 / n_columns)
            tl.store(mean_logp + row, tl.where(ignored, 0.0, mean))


@triton.jit
def _differentiate_block(
    row_pointer, out_pointer, bias, class_weight, columns, end, column, at_target, log_total, entropy, mass, h, spread,
    softcap, inv_t, MASKED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    HAS_MEAN: tl.constexpr, WEIGHTED: tl.constexpr, TARGETS: tl.constexpr,
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
        d = -p * (mass + h * (log_p + entropy))
    else:
        d = -p * mass
    if HAS_MEAN:
        if WEIGHTED:
            if MASKED:
                d += spread * tl.load(class_weight + columns, mask=mask, other=0.0).to(tl.float32)
            else:
                d += spread * tl.load(class_weight + columns).to(tl.float32)
        else:
            d += spread
    if TARGETS == 1:
        d = tl.where(columns == column, at_target, d)
    d = d * inv_t
    if HAS_SOFTCAP:
        d = d * (1.0 - t * t)
    if MASKED:
        tl.store(out_pointer + columns, d.to(out_pointer.dtype.element_ty), mask=mask)
    else:
        tl.store(out_pointer + columns, d.to(out_pointer.dtype.element_ty))


@triton.jit
def linear_logprob_gradient_kernel(
    tile, out, target, inverse_temperature, bias, class_weight, logp, lse, entropy,
    grad_logp, grad_entropy, mass_ptr, spread_ptr,
    tile_stride, out_stride, width, first_column, ignore_index, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    HAS_MASS: tl.constexpr, HAS_MEAN: tl.constexpr, WEIGHTED: tl.constexpr,
    TARGETS: tl.constexpr, TARGET_LANES: tl.constexpr,  # TARGET_LANES: the next power of two
    BLOCK: tl.constexpr, PACK: tl.constexpr,  # PACK: elements of a 128-bit word
    SAME_STRIDE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    h = 0.0
    big_h = 0.0
    spread = 0.0
    if HAS_ENTROPY:
        h = tl.load(grad_entropy + row)
        big_h = tl.load(entropy + row)
    if HAS_MEAN:
        spread = tl.load(spread_ptr + row)
    place = tl.arange(0, TARGET_LANES)
    if TARGETS == 1:
        wanted = tl.load(target + row)
        g = tl.load(grad_logp + row)
        ignored = wanted == ignore_index
        still = (g == 0.0) & (h == 0.0)
    else:
        wanted = tl.load(target + row * TARGETS + place, mask=place < TARGETS, other=ignore_index)
        g = tl.load(grad_logp + row * TARGETS + place, mask=place < TARGETS, other=0.0)
        ignored = tl.max((wanted != ignore_index).to(tl.int32), 0) == 0
        still = (tl.max(((wanted != ignore_index) & (g != 0.0)).to(tl.int32), 0) == 0) & (h == 0.0)
    mass = g
    if HAS_MASS:
        mass = tl.load(mass_ptr + row)
        still = still & (mass == 0.0)
    if HAS_MEAN:
        still = still & (spread == 0.0)
    nothing = ignored | still
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
        class_weight += first_column
        inv_t = tl.load(inverse_temperature + row)
        softcap = tl.cast(softcap, tl.float32)
        log_total = tl.load(lse + row)
        column = (wanted - first_column).to(tl.int32)
        if TARGETS == 1:
            log_p = tl.load(logp + row)
            mine = (column >= 0) & (column < width)
        else:
            log_p = tl.load(logp + row * TARGETS + place, mask=place < TARGETS, other=0.0)
            mine = (wanted != ignore_index) & (wanted >= first_column) & (wanted - first_column < width)
            g = tl.zeros([TARGET_LANES], tl.float32)
            for other in range(TARGETS):  # equal ids share one element, which the first of them writes
                same = wanted == tl.load(target + row * TARGETS + other)
                g += tl.where(same, tl.load(grad_logp + row * TARGETS + other), 0.0)
                mine = mine & ((place <= other) | (same == 0))
        near = tl.maximum(log_p, -0.5)
        rest = tl.where(log_p < -0.5, 1.0 - tl.exp(log_p), -(near + expm1_tail(near)))  # 1 - p of the target
        at_target = g * rest
        if HAS_MASS:
            at_target += (g - mass) * tl.exp(log_p)
        if HAS_ENTROPY:
            at_target -= h * (1.0 - rest) * (log_p + big_h)
        if WEIGHTED:
            at_target += spread * tl.load(class_weight + column, mask=mine, other=0.0).to(tl.float32)
        elif HAS_MEAN:
            at_target += spread
        if TARGETS > 1:
            at_target = at_target * inv_t
            if HAS_SOFTCAP:
                z = tl.load(row_pointer + column, mask=mine, other=0.0).to(tl.float32)
                if HAS_BIAS:
                    z += tl.load(bias + column, mask=mine, other=0.0).to(tl.float32)
                t = _tanh(z / softcap)
                at_target = at_target * (1.0 - t * t)
                tl.debug_barrier()  # read before another warp writes over it
        if head > 0:
            _differentiate_block(
                row_pointer, out_pointer, bias, class_weight, lanes, head, column, at_target, log_total, big_h,
                mass, h, spread, softcap, inv_t, True, HAS_BIAS, HAS_SOFTCAP, HAS_ENTROPY, HAS_MEAN, WEIGHTED, TARGETS,
            )  # fmt: skip
        for i in range(blocks):
            _differentiate_block(
                body, out_body, bias + head, class_weight + head, i * BLOCK + lanes, width, column - head, at_target,
                log_total, big_h, mass, h, spread, softcap, inv_t, False, HAS_BIAS, HAS_SOFTCAP, HAS_ENTROPY,
                HAS_MEAN, WEIGHTED, TARGETS,
            )  # fmt: skip
        if head + blocks * BLOCK < width:
            _differentiate_block(
                row_pointer, out_pointer, bias, class_weight, head + blocks * BLOCK + lanes, width, column, at_target,
                log_total, big_h, mass, h, spread, softcap, inv_t, True, HAS_BIAS, HAS_SOFTCAP, HAS_ENTROPY,
                HAS_MEAN, WEIGHTED, TARGETS,
            )  # fmt: skip
        if TARGETS > 1:
            tl.debug_barrier()  # over what other warps wrote
            tl.store(out_pointer + column, at_target.to(out.dtype.element_ty), mask=mine)
