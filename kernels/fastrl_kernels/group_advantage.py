"""Group-relative advantages of rewards: GRPO, Dr. GRPO, RLOO, in one launch over ragged groups.

With ``r_i = sum_k weight_k reward_ik`` and ``n``, ``mean``, ``std`` over the members of row i's group:

    baseline "mean"           c_i = r_i - mean                       (GRPO, arXiv 2402.03300 section 4.1.2)
    baseline "leave_one_out"  c_i = r_i - mean of the others = n / (n - 1) (r_i - mean)     (RLOO, arXiv 2402.14740)
    scale "std"               advantage_i = c_i / (std + eps);   "none": advantage_i = c_i  (Dr. GRPO, arXiv 2503.20783)

``std`` divides by ``n - 1`` (``unbiased``) or ``n`` and is computed about the mean in a second pass. Groups whose
rewards are all equal, including groups of one, are detected by comparison, not by a small std: their advantage is
exactly 0.

Why it is fast: one program per group finds its own members (contiguous for equal sizes, by id otherwise) and makes
three passes over at most a few kilobytes that stay in cache. No sort, no atomics, no host read, bitwise reproducible.
With ids the work is groups x rows, small up to 10^7.

Differentiable in rewards and weights (a policy loss still takes advantages as constants). With ``A_i = F c_i``, where
``c_i = r_i - mean`` and ``F`` is the factor of ``baseline`` and ``scale``, ``d`` the divisor of the std ``s``, and
upstream gradients ``a_i`` of the advantage, ``m`` of the mean and ``t`` of the std:

    dL/dr_j = F (a_j - mean(a)) + (t - F sum_i a_i c_i / (s + eps)) c_j / (d s) + m / n

(no ``sum`` term without scale, and only ``m / n`` in constant groups). Both sums are group means of this operator.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    launch,
    readable,
    refuse_forward_mode,
    use_triton,
)
from fastrl_kernels._triton import tl, triton
from fastrl_kernels.token_weights import check_ids

_BLOCK = 256


class GroupAdvantage(NamedTuple):
    """Result of ``group_advantage``; fp32 (float64 for float64 rewards)."""

    advantage: Tensor  # [R]
    reward: Tensor  # [R], the weighted sum of the components
    mean: Tensor  # [G]; 0 for a group without members
    std: Tensor  # [G]; 0 for constant groups, single members and empty groups
    constant: Tensor  # [G] bool: no two members differ, so the group carries no signal


@triton.jit
def _reward_of(rewards_ptr, weights_ptr, rows, live, k):
    """The weighted sum of the k components of these rows."""
    total = tl.zeros(rows.shape, tl.float32)
    for column in range(k):
        value = tl.load(rewards_ptr + rows * k + column, mask=live, other=0.0).to(tl.float32)
        if weights_ptr is not None:
            value = value * tl.load(weights_ptr + column).to(tl.float32)
        total += value
    return total


@triton.jit
def group_advantage_kernel(
    rewards_ptr,  # [r, k]
    weights_ptr,  # [k] or None: ones
    group_ptr,  # [r] ids, or None: groups of `size` consecutive rows
    advantage_ptr,  # [r] fp32 out
    reward_ptr,  # [r] fp32 out
    mean_ptr,  # [groups] fp32 out
    std_ptr,  # [groups] fp32 out
    constant_ptr,  # [groups] int8 out
    r,
    k,
    size,
    eps,
    LEAVE_ONE_OUT: tl.constexpr,
    SCALE: tl.constexpr,
    UNBIASED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0)
    first = group.to(tl.int64) * size if group_ptr is None else tl.cast(0, tl.int64)
    last = first + size if group_ptr is None else tl.cast(r, tl.int64)
    count = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    smallest = tl.full([BLOCK], float("inf"), tl.float32)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(first, last, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        live = rows < last
        if group_ptr is not None:
            live = live & (tl.load(group_ptr + rows, mask=live, other=-1) == group)
        value = _reward_of(rewards_ptr, weights_ptr, rows, live, k)
        tl.store(reward_ptr + rows, value, mask=live)
        count += live.to(tl.float32)
        total += tl.where(live, value, 0.0)
        smallest = tl.minimum(smallest, tl.where(live, value, float("inf")))
        largest = tl.maximum(largest, tl.where(live, value, float("-inf")))
    n = tl.sum(count)
    low = tl.min(smallest)
    high = tl.max(largest)
    plain = tl.sum(total) / tl.maximum(n, 1.0)
    constant = (low >= high) & (plain == plain)  # NaN rewards: not constant, the group becomes NaN
    mean = tl.where(constant, tl.where(n > 0, low, 0.0), plain)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(first, last, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        live = rows < last
        if group_ptr is not None:
            live = live & (tl.load(group_ptr + rows, mask=live, other=-1) == group)
        centred = tl.where(live, _reward_of(rewards_ptr, weights_ptr, rows, live, k) - mean, 0.0)
        squares += centred * centred
    freedom = tl.maximum(n - 1.0, 1.0) if UNBIASED else tl.maximum(n, 1.0)
    std = tl.where(constant, 0.0, tl.sqrt(tl.sum(squares) / freedom))
    factor = n / tl.maximum(n - 1.0, 1.0) if LEAVE_ONE_OUT else tl.cast(1.0, tl.float32)
    if SCALE:
        factor = factor / (std + tl.cast(eps, tl.float32))
    for start in range(first, last, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        live = rows < last
        if group_ptr is not None:
            live = live & (tl.load(group_ptr + rows, mask=live, other=-1) == group)
        centred = _reward_of(rewards_ptr, weights_ptr, rows, live, k) - mean
        tl.store(advantage_ptr + rows, tl.where(constant, 0.0, centred * factor), mask=live)
    tl.store(mean_ptr + group, mean)
    tl.store(std_ptr + group, std)
    tl.store(constant_ptr + group, constant.to(tl.int8))


def _group_advantage(
    rewards: Tensor,
    group: Optional[Tensor],  # noqa: UP045 (the schema parser of older torch wants typing.Optional)
    weights: Optional[Tensor],  # noqa: UP045
    size: int,
    n_groups: int,
    leave_one_out: bool,
    scale: bool,
    unbiased: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = (size, n_groups, leave_one_out, scale, unbiased, eps)
    if not use_triton(rewards) or rewards.dtype == torch.float64:
        if _native.computes("fastrl_group_advantage", rewards, weights):
            return _native.group_advantage(rewards, group, weights, *options)
        return _eager(rewards, group, weights, *options)
    r, k = rewards.shape
    rewards = rewards.contiguous()
    advantage, reward = (torch.zeros(r, dtype=torch.float32, device=rewards.device) for _ in range(2))
    mean, std = (torch.empty(n_groups, dtype=torch.float32, device=rewards.device) for _ in range(2))
    constant = torch.empty(n_groups, dtype=torch.bool, device=rewards.device)
    if n_groups:
        launch(group_advantage_kernel, n_groups)(
            rewards, None if weights is None else weights.contiguous(), None if group is None else group.contiguous(),
            advantage, reward, mean, std, constant.view(torch.int8), r, k, size, eps,
            LEAVE_ONE_OUT=leave_one_out, SCALE=scale, UNBIASED=unbiased, BLOCK=_BLOCK, num_warps=1,
        )  # fmt: skip
    return advantage, reward, mean, std, constant


_group_advantage_op = torch.library.custom_op("fastrl::group_advantage", _group_advantage, mutates_args=())


@_group_advantage_op.register_fake
def _(rewards: Tensor, group: Tensor | None, weights: Tensor | None, size: int, n_groups: int, *_: Any) -> Any:
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    row = [rewards.new_empty(rewards.shape[0], dtype=dtype) for _ in range(2)]
    each = [rewards.new_empty(n_groups, dtype=dtype) for _ in range(2)]
    return (*row, *each, rewards.new_empty(n_groups, dtype=torch.bool))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    rewards, group, weights, *ctx.options = inputs
    _, reward, mean, std, constant = output
    ctx.mark_non_differentiable(constant)
    ctx.save_for_backward(rewards, group, weights, reward, mean, std, constant)


def _backward(
    ctx: Any, of_advantage: Tensor, of_reward: Tensor, of_mean: Tensor, of_std: Tensor, _: Any
) -> tuple[Any, ...]:
    rewards, group, weights, reward, mean, std, constant = ctx.saved_tensors
    size, n_groups, leave_one_out, scale, unbiased, eps = ctx.options
    r, kind = rewards.shape[0], reward.dtype
    index = torch.arange(r, device=rewards.device) // max(size, 1) if group is None else group.long()
    member = (index >= 0) & (index < n_groups)
    index = index.masked_fill(~member, 0)
    if n_groups == 0 or r == 0:
        return torch.zeros_like(rewards), None, None if weights is None else torch.zeros_like(weights), *[None] * 6
    n = torch.zeros(n_groups, dtype=torch.int64, device=rewards.device).scatter_add_(0, index, member.long()).to(kind)

    def group_mean(values: Tensor) -> Tensor:
        column = values.to(kind).unsqueeze(1)
        return _group_advantage_op(column, group, None, size, n_groups, False, False, unbiased, 0.0)[2]

    centred = torch.where(member, reward - mean[index], 0.0)
    factor = n / (n - 1).clamp(min=1) if leave_one_out else torch.ones_like(n)
    of_spread = of_std.to(kind)
    if scale:
        factor = factor / (std + eps)
        of_spread = of_spread - factor * n * group_mean(of_advantage * centred) / (std + eps)
    divisor = (n - 1 if unbiased else n).clamp(min=1)
    slope = torch.where(constant, 0.0, of_spread / torch.where(constant, 1.0, divisor * std))
    factor = torch.where(constant, 0.0, factor)
    rest = of_mean.to(kind) / n.clamp(min=1) - factor * group_mean(of_advantage)
    made = of_reward + factor[index] * of_advantage + slope[index] * centred + rest[index]
    made = torch.where(member, made, 0.0)
    d_rewards = (made.unsqueeze(1) if weights is None else made.unsqueeze(1) * weights.to(kind)).expand(rewards.shape)
    d_weights = None if weights is None else (made @ rewards.to(kind)).to(weights.dtype)
    grads = [d_rewards.to(rewards.dtype).contiguous(), d_weights]
    if torch.is_grad_enabled():
        grads = [None if x is None else Once.apply(x, rewards, "group_advantage") for x in grads]
    return grads[0], None, grads[1], *[None] * 6


_group_advantage_op.register_autograd(_backward, setup_context=_setup_context)


def group_advantage(
    rewards: Tensor | Sequence[float] | Sequence[Sequence[float]],
    group: int | Tensor | Sequence[int],
    *,
    n_groups: int | None = None,
    weights: Tensor | None = None,
    baseline: str = "mean",
    scale: str = "std",
    unbiased: bool = True,
    eps: float = 1e-4,
) -> GroupAdvantage:
    """Advantages of ``R`` completions relative to their group; formulas at the top of this file.

    Args:
        rewards: ``[R]``, or ``[R, K]`` for K components (fp32, bf16, fp16; float64 runs eagerly). Integers and booleans
            become float32, as do lists.
        group: members per group (rows of a group follow each other), or the group id of each row, ``[R]`` int64 or
            int32, in any order. A negative id belongs to no group: advantage and reward 0.
        n_groups: number of groups. Needed for ids on a GPU (finding it would be a host read) and under
            ``torch.compile``; on CPU it defaults to the largest id plus one. Larger ids: an error on CPU, no group on
            GPU.
        weights: ``[K]``, default ones.
        baseline: ``"mean"`` or ``"leave_one_out"``; ``scale``: ``"std"`` or ``"none"``.
        unbiased: std divides by n - 1, as ``torch.std``. ``eps`` is added to the std, outside the root.

    A group of one has advantage 0, std 0 and ``constant`` True for every baseline. (verl returns the raw reward in that
    case.) Non-finite rewards: a ``ValueError`` on CPU; on GPU only their own group becomes NaN.

    Raises:
        ValueError, TypeError: wrong shape, dtype, device or option, before any launch.
    """
    rewards, group = _as_tensors(rewards, group)
    _check_arguments(rewards, weights, baseline, scale, eps)
    ids = None if isinstance(group, int) else group
    size = group if isinstance(group, int) else 0
    count = _group_count(rewards, ids, size, n_groups)
    _check_finite(rewards)
    matrix = rewards if rewards.dim() == 2 else rewards.unsqueeze(1)
    refuse_forward_mode("group_advantage", matrix, weights)
    learned = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (matrix, weights))
    run = _group_advantage if readable(matrix, ids, weights) and not learned else _group_advantage_op
    out = run(matrix, ids, weights, size, count, baseline == "leave_one_out", scale == "std", unbiased, float(eps))
    return GroupAdvantage(*out)


def group_advantage_reference(
    rewards: Tensor | Sequence[float] | Sequence[Sequence[float]],
    group: int | Tensor | Sequence[int],
    *,
    n_groups: int | None = None,
    weights: Tensor | None = None,
    baseline: str = "mean",
    scale: str = "std",
    unbiased: bool = True,
    eps: float = 1e-4,
) -> GroupAdvantage:
    """``group_advantage`` in plain torch on any device: float64 inside, float64 out for float64 in. Same arguments."""
    rewards, group = _as_tensors(rewards, group)
    _check_arguments(rewards, weights, baseline, scale, eps)
    ids = None if isinstance(group, int) else group
    size = group if isinstance(group, int) else 0
    count = _group_count(rewards, ids, size, n_groups)
    matrix = rewards if rewards.dim() == 2 else rewards.unsqueeze(1)
    out = _eager(matrix, ids, weights, size, count, baseline == "leave_one_out", scale == "std", unbiased, eps)
    return GroupAdvantage(*out)


def _as_tensors(rewards: Any, group: Any) -> tuple[Tensor, int | Tensor]:
    """Lists as tensors, whole numbers as float32; ids on the device of the rewards."""
    if not isinstance(rewards, Tensor):
        rewards = torch.tensor(rewards, dtype=torch.float32)
    if not rewards.is_floating_point() and not rewards.is_complex():
        rewards = rewards.float()
    if not isinstance(group, int | Tensor):
        group = torch.tensor(group, dtype=torch.int64, device=rewards.device)
    return rewards, group


def _eager(
    rewards: Tensor,
    group: Tensor | None,
    weights: Tensor | None,
    size: int,
    n_groups: int,
    leave_one_out: bool,
    scale: bool,
    unbiased: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    out = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    r, device = rewards.shape[0], rewards.device
    values = rewards.double() if weights is None else rewards.double() * weights.double()
    reward = values.sum(1)
    if group is None:
        group = torch.arange(r, device=device) // max(size, 1)
    member = (group >= 0) & (group < n_groups)
    # Rows that belong to no group go to an extra one, which is dropped at the end.
    index = torch.where(member, group, n_groups).long()
    zeros = torch.zeros(n_groups + 1, dtype=torch.float64, device=device)
    n = zeros.index_add(0, index, torch.ones_like(reward))
    low = zeros.scatter_reduce(0, index, reward, "amin", include_self=False)
    high = zeros.scatter_reduce(0, index, reward, "amax", include_self=False)
    constant = low >= high
    mean = torch.where(constant, low, zeros.index_add(0, index, reward) / n.clamp(min=1))
    centred = reward - mean[index]
    freedom = (n - 1 if unbiased else n).clamp(min=1)
    squares = torch.where(constant, 1.0, zeros.index_add(0, index, centred * centred))  # a root of 0 has no slope
    std = torch.where(constant, 0.0, (squares / freedom).sqrt())
    factor = n / (n - 1).clamp(min=1) if leave_one_out else torch.ones_like(n)
    if scale:
        factor = factor / (std + eps)
    advantage = torch.where(member & ~constant[index], centred * factor[index], 0.0)
    each = (mean[:n_groups].to(out), std[:n_groups].to(out), constant[:n_groups].clone())
    return advantage.to(out), torch.where(member, reward, 0.0).to(out), *each


def _group_count(rewards: Tensor, ids: Tensor | None, size: int, n_groups: int | None) -> int:
    """The number of groups, from the size, from ``n_groups``, or (CPU only) from the ids."""
    r = rewards.shape[0]
    if ids is None:
        check_number("group", size, size > 0, "a positive group size")
        if r % size:
            raise ValueError(f"group: {r} rewards cannot be split into groups of {size}")
        if n_groups is not None and n_groups * size != r:
            raise ValueError(f"n_groups: {r} rewards make {r // size} groups, got {n_groups}")
        return r // size
    check_shape("group", ids, (r,))
    check_dtype("group", ids, (torch.int64, torch.int32))
    check_same_device(rewards=rewards, group=ids)
    if n_groups is None:
        check(ids.device.type == "cpu", "n_groups: needed with group ids on a GPU (finding it would be a host read)")
        return max(int(ids.max()) + 1, 0) if r else 0
    check_number("n_groups", n_groups, n_groups >= 0, "a count")
    check_ids("group", ids, n_groups)
    return n_groups


def _check_arguments(rewards: Tensor, weights: Tensor | None, baseline: str, scale: str, eps: float) -> None:
    check(rewards.dim() in (1, 2), f"rewards: expected shape [R] or [R, K], got {list(rewards.shape)}")
    check_dtype("rewards", rewards, FLOATS)
    if weights is not None:
        check_shape("weights", weights, (rewards.shape[1] if rewards.dim() == 2 else 1,))
        check_dtype("weights", weights, FLOATS)
        check_same_device(rewards=rewards, weights=weights)
    check(baseline in ("mean", "leave_one_out"), f"baseline: expected mean or leave_one_out, got {baseline!r}")
    check(scale in ("std", "none"), f"scale: expected std or none, got {scale!r}")
    check_number("eps", eps, eps >= 0, ">= 0")


def _check_finite(rewards: Tensor) -> None:
    if not readable(rewards):
        return
    bad = (~torch.isfinite(rewards)).nonzero()
    check(bad.numel() == 0, f"rewards: not finite at {bad[:4].tolist()} (of {bad.shape[0]} places)")
