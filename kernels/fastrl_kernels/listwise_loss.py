"""Listwise preference losses over K scored answers per prompt: PerPO's margin-weighted pairs, and ListMLE.

``s`` are scores (in PerPO ``log pi(y|x) - log pi_ref(y|x)``, summed over tokens), ``R`` rewards, of unmasked items.

    perpo    L = sum_{R_i > R_j} w_ij log(1 + exp(-beta (s_i - s_j))),  w_ij = |R_i - R_j|^gamma / sum of the same
             (PerPO, arXiv 2502.04371 eq. 6; gamma -> 0: LiPO's mean over pairs. Pairs of equal reward weigh 0.)
             dL/ds_i = -beta sum_j sign(R_i - R_j) w_ij sigmoid(-beta |..|),  |..| = sign(R_i - R_j) (s_i - s_j)
    listmle  L = sum_i [ logsumexp over {j at or after i} of beta s_j  -  beta s_i ]   (Xia et al. 2008)
             where j is at or after i if R_j < R_i, or R_j = R_i and j >= i (ties keep the input order)
             dL/ds_k = beta (sum over {i : k at or after i} of exp(beta s_k - lse_i)  -  1)

The sign of a pair comes from the rewards, so perpo does not depend on the order of the items. Gaps are divided by the
largest one before the power, so rewards of any scale are safe; softplus and logsumexp are computed in their stable
forms, so scores of any scale are too. A list with fewer than two items, or with all rewards equal under perpo, gives
loss 0 and gradient 0. A reward that is not finite is an error on a CPU and makes its list NaN on a GPU; a score that is
not finite makes its list NaN on both.

Why it is fast: one program per list holds its K items in registers, iterates over the K x K pairs a few rows at a time,
and writes value and gradient in that one launch: no sort, no scan, no ``[B, K, K]`` tensor, no atomics, bitwise
reproducible (except for float64, which is eager). The backward is one multiplication.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from fastrl_kernels import _native
from fastrl_kernels._common import (
    FLOATS,
    Once,
    check,
    check_dtype,
    check_number,
    check_same_device,
    check_shape,
    floating_pair,
    launch,
    readable,
    refuse_forward_mode,
    use_triton,
)
from fastrl_kernels._numerics import sigmoid, softplus
from fastrl_kernels._triton import tl, triton

KINDS = ("perpo", "listmle")
MAX_ITEMS = 1024
_SMALLEST_GAP = 1e-30  # relative to the largest; keeps the logarithm finite


class LaunchConfig(NamedTuple):
    """Items padded to a power of two, pair rows per step, warps."""

    items: int
    rows: int
    warps: int


def launch_config(k: int) -> LaunchConfig:
    """The smallest of four sizes that holds k items; one warp, so no barrier, up to 64."""
    for config in (LaunchConfig(32, 16, 1), LaunchConfig(64, 8, 1), LaunchConfig(256, 8, 4), LaunchConfig(1024, 8, 16)):
        if k <= config.items:
            return config
    raise ValueError(f"score: at most {MAX_ITEMS} items per list, got {k}")


@triton.jit
def listwise_kernel(
    score_ptr,  # [b, k]
    reward_ptr,  # [b, k]
    mask_ptr,  # [b, k] int8 or None
    loss_ptr,  # [b] fp32 out
    grad_ptr,  # [b, k] fp32 out
    k,
    beta,
    gamma,
    LISTMLE: tl.constexpr,
    ITEMS: tl.constexpr,
    ROWS: tl.constexpr,
):
    beta, gamma = tl.cast(beta, tl.float32), tl.cast(gamma, tl.float32)
    first = tl.program_id(0).to(tl.int64) * k
    j = tl.arange(0, ITEMS)
    live_j = j < k
    if mask_ptr is not None:
        live_j = live_j & (tl.load(mask_ptr + first + j, mask=live_j, other=0) != 0)
    s_j = beta * tl.load(score_ptr + first + j, mask=live_j, other=0.0).to(tl.float32)
    r_j = tl.load(reward_ptr + first + j, mask=live_j, other=0.0).to(tl.float32)
    top = tl.max(tl.where(live_j, r_j, float("-inf")))
    bottom = tl.min(tl.where(live_j, r_j, float("inf")))
    widest = tl.where(top > bottom, 0.5 * top - 0.5 * bottom, 1.0)  # halved, as the difference itself may overflow
    loss = tl.zeros([ITEMS], tl.float32)
    grad = tl.zeros([ITEMS], tl.float32)
    total = tl.zeros([ITEMS], tl.float32)
    for start in range(0, k, ROWS):
        i = start + tl.arange(0, ROWS)
        live_i = i < k
        if mask_ptr is not None:
            live_i = live_i & (tl.load(mask_ptr + first + i, mask=live_i, other=0) != 0)
        s_i = beta * tl.load(score_ptr + first + i, mask=live_i, other=0.0).to(tl.float32)
        r_i = tl.load(reward_ptr + first + i, mask=live_i, other=0.0).to(tl.float32)
        pair = live_i[:, None] & live_j[None, :]
        if LISTMLE:
            after = (r_j[None, :] < r_i[:, None]) | ((r_j[None, :] == r_i[:, None]) & (j[None, :] >= i[:, None]))
            after = after & pair
            scores = tl.where(after, s_j[None, :], float("-inf"))
            largest = tl.where(live_i, tl.max(scores, 1), 0.0)
            # exponents of items outside the set are replaced, not computed from an infinity
            raised = tl.where(after, tl.exp(tl.where(after, s_j[None, :] - largest[:, None], 0.0)), 0.0)
            sums = tl.where(live_i, tl.sum(raised, 1), 1.0)
            grad += tl.sum(raised / sums[:, None], 0)
            # on the tile's diagonal: a [ROWS] accumulator would cost a layout change through shared memory
            own = tl.where(pair & (i[:, None] == j[None, :]), (largest - s_i + tl.log(sums))[:, None], 0.0)
            loss += tl.sum(own, 0)
        else:
            gap = r_j[None, :] - r_i[:, None]
            apart = pair & (r_j[None, :] != r_i[:, None])
            relative_gap = tl.abs(0.5 * r_j[None, :] - 0.5 * r_i[:, None]) / widest
            weight = tl.where(apart, tl.exp2(gamma * tl.log2(tl.maximum(relative_gap, 1e-30))), 0.0)
            sign = tl.where(gap > 0, 1.0, -1.0)
            lead = sign * (s_j[None, :] - s_i[:, None])  # score of the better item minus that of the worse
            total += tl.sum(weight, 0)
            loss += tl.sum(weight * softplus(-lead), 0)
            grad += tl.sum(-sign * weight * sigmoid(-lead), 0)
    # NaN where a live number is not finite, else 0
    poison = tl.sum(tl.where(live_j, (s_j - s_j) + (r_j - r_j), 0.0))
    if LISTMLE:
        value = tl.sum(loss)
        slope = grad - 1.0
    else:
        pairs = tl.sum(total)  # counts every pair twice, as the loss does
        scale = tl.where(pairs > 0, 1.0 / tl.where(pairs > 0, pairs, 1.0), 0.0)
        value = tl.sum(loss) * scale
        slope = grad * (2.0 * scale)
    tl.store(loss_ptr + tl.program_id(0), value + poison)
    tl.store(grad_ptr + first + j, tl.where(live_j, beta * slope + poison, 0.0), mask=j < k)


@torch.library.custom_op("fastrl::listwise_loss", mutates_args=())
def _listwise_op(
    score: Tensor,
    reward: Tensor,
    mask: Optional[Tensor],  # noqa: UP045 (the schema parser of older torch wants typing.Optional)
    listmle: bool,
    beta: float,
    gamma: float,
) -> tuple[Tensor, Tensor]:
    b, k = score.shape
    if not use_triton(score) or score.dtype == torch.float64 or b * k == 0:
        if _native.computes("fastrl_listwise_loss", score, reward):
            return _native.listwise_loss(score, reward, mask, listmle, beta, gamma)
        return _eager(score, reward, mask, listmle, beta, gamma)
    loss = torch.empty(b, dtype=torch.float32, device=score.device)
    grad = torch.empty(b, k, dtype=torch.float32, device=score.device)
    config = launch_config(k)
    launch(listwise_kernel, b)(
        score.contiguous(), reward.contiguous(), None if mask is None else mask.contiguous().view(torch.int8),
        loss, grad, k, beta, gamma, LISTMLE=listmle, ITEMS=config.items, ROWS=config.rows, num_warps=config.warps,
    )  # fmt: skip
    return loss, grad


@_listwise_op.register_fake
def _(score: Tensor, reward: Tensor, mask: Tensor | None, listmle: bool, beta: float, gamma: float) -> Any:
    dtype = torch.float64 if score.dtype == torch.float64 else torch.float32
    return score.new_empty(score.shape[0], dtype=dtype), score.new_empty(score.shape, dtype=dtype)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], inputs[0])


def _backward(ctx: Any, grad_loss: Tensor, grad_grad: Any) -> Any:
    grad, score = ctx.saved_tensors
    made = (grad * grad_loss.unsqueeze(1)).to(score.dtype)
    return Once.apply(made, score, "listwise_loss") if torch.is_grad_enabled() else made, None, None, None, None, None


_listwise_op.register_autograd(_backward, setup_context=_setup)


def listwise_loss(
    score: Tensor,
    reward: Tensor,
    *,
    mask: Tensor | None = None,
    kind: str = "perpo",
    beta: float = 0.1,
    gamma: float = 0.5,
) -> Tensor:
    """Loss of each list of scored answers; formulas and gradients at the top of this file.

    Args:
        score: ``[B, K]``, K <= 1024 (fp32, bf16, fp16; float64 runs eagerly). A second derivative raises.
        reward: ``[B, K]``, finite constants, floats or integers; only their order matters to ``"listmle"``.
        mask: ``[B, K]`` bool, False items are ignored (and may hold NaN).
        kind: ``"perpo"`` or ``"listmle"``.
        beta: scale of the scores, >= 0.
        gamma: power of the reward gaps, >= 0; 0 gives all pairs of different reward the same weight.

    Returns:
        ``[B]`` losses, fp32 (float64 in, float64 out). Take their mean for a batch loss.

    Raises:
        ValueError, TypeError: wrong shape, dtype, device or option, before any launch; on a CPU rewards that are not
        finite.
    """
    reward, _ = floating_pair(reward, score)
    _check_arguments(score, reward, mask, kind, beta, gamma)
    refuse_forward_mode("listwise_loss", score)
    return _listwise_op(score, reward, mask, kind == "listmle", float(beta), float(gamma))[0]


def listwise_loss_reference(
    score: Tensor,
    reward: Tensor,
    *,
    mask: Tensor | None = None,
    kind: str = "perpo",
    beta: float = 0.1,
    gamma: float = 0.5,
) -> Tensor:
    """``listwise_loss`` in plain torch on any device: float64 inside, float64 out for float64 in. Same arguments."""
    reward, _ = floating_pair(reward, score)
    _check_arguments(score, reward, mask, kind, beta, gamma)
    fixed = score.detach()
    loss, grad = _eager(fixed, reward, mask, kind == "listmle", beta, gamma)
    return loss + (grad * torch.where(grad != 0, score - fixed, 0.0)).sum(1)


def _eager(
    score: Tensor, reward: Tensor, mask: Tensor | None, listmle: bool, beta: float, gamma: float
) -> tuple[Tensor, Tensor]:
    out = torch.float64 if score.dtype == torch.float64 else torch.float32
    live = torch.ones_like(score, dtype=torch.bool) if mask is None else mask
    s = torch.where(live, beta * score.double(), 0.0)
    r = torch.where(live, reward.double(), 0.0)
    if s.numel() == 0:
        return s.sum(1).to(out), s.to(out)
    chunk = max(1, (1 << 21) // s.shape[1] ** 2)  # lists at a time: bounds the tensors over pairs to 8 MiB each
    parts = zip(s.split(chunk), r.split(chunk), live.split(chunk), strict=True)
    done = [_listmle_eager(*part) if listmle else _perpo_eager(*part, gamma) for part in parts]
    spoilt = ~(s.isfinite() & r.isfinite()).all(1)
    loss = torch.cat([part[0] for part in done]).masked_fill_(spoilt, torch.nan)
    grad = beta * torch.cat([part[1] for part in done]).masked_fill_(spoilt[:, None] & live, torch.nan)
    return loss.to(out), grad.to(out)


def _listmle_eager(s: Tensor, r: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """Loss ``[B]`` and its gradient ``[B, K]`` in the scaled scores: suffixes of the sorted list, in the log domain."""
    order = r.argsort(dim=1, descending=True, stable=True)
    order = order.gather(
        1, live.gather(1, order).int().argsort(dim=1, descending=True, stable=True)
    )  # masked ones last
    live = live.gather(1, order)
    s = s.gather(1, order)
    lse = torch.where(live, s, -torch.inf).flip(1).logcumsumexp(1).flip(1)  # over an item and all that come after it
    inside = (s + (-lse).logcumsumexp(1)).exp()  # sum of an item's probabilities in its own suffix and those before it
    grad = torch.where(live, inside - 1, 0.0)
    return torch.where(live, lse - s, 0.0).sum(1), torch.empty_like(s).scatter_(1, order, grad)


def _perpo_eager(s: Tensor, r: Tensor, live: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Loss ``[B]`` and its gradient ``[B, K]`` in the scaled scores: sorted by reward, so that each pair is computed
    once."""
    order = r.argsort(dim=1, descending=True)
    r = 0.5 * r  # a difference may overflow
    s, r, live = (x.gather(1, order).T.contiguous() for x in (s, r, live))  # [K, B]: a pair reads two contiguous rows
    i, j = torch.triu_indices(len(s), len(s), offset=1, device=s.device)
    gap = torch.where(live[i] & live[j], r[i] - r[j], 0.0)
    better = gap > 0
    widest = gap.amax(0) if len(i) else gap.sum(0)
    relative_gap = (gap / torch.where(widest > 0, widest, 1.0)).clamp_(min=_SMALLEST_GAP)
    weight = torch.where(better, relative_gap.pow_(gamma), 0.0)
    total = weight.sum(0)
    weight /= torch.where(total > 0, total, 1.0)
    lead = torch.where(better, s[i] - s[j], 0.0)
    decay = lead.abs().neg_().exp_()
    loss = (torch.log1p(decay).sub_(lead.clamp(max=0)).mul_(weight)).sum(0)
    pull = torch.where(lead >= 0, decay, 1.0).mul_(weight).div_(decay.add_(1))
    grad = torch.zeros_like(s).index_add_(0, j, pull).index_add_(0, i, pull, alpha=-1)  # float64 on a GPU: atomics
    return loss, torch.empty_like(order, dtype=s.dtype).scatter_(1, order, grad.T)


def _check_arguments(score: Tensor, reward: Tensor, mask: Tensor | None, kind: str, beta: float, gamma: float) -> None:
    check_shape("score", score, (None, None))
    check_shape("reward", reward, tuple(score.shape))
    check(score.shape[1] <= MAX_ITEMS, f"score: at most {MAX_ITEMS} items per list, got {score.shape[1]}")
    check_dtype("score", score, FLOATS)
    check_dtype("reward", reward, FLOATS)
    if mask is not None:
        check_shape("mask", mask, tuple(score.shape))
        check_dtype("mask", mask, (torch.bool,))
    check_same_device(score=score, reward=reward, mask=mask)
    check(kind in KINDS, f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    check_number("beta", beta, 0 <= beta < math.inf, "a finite number >= 0")
    check_number("gamma", gamma, 0 <= gamma < math.inf, "a finite number >= 0")
    if readable(reward, mask):
        bad = ~reward.isfinite() if mask is None else mask & ~reward.isfinite()
        if bool(bad.any()):
            place = bad.nonzero()[0].tolist()
            raise ValueError(f"reward: expected finite numbers, got {float(reward[tuple(place)])} at {place}")
