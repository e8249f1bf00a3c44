"""``linear_policy_loss`` on a CPU whose scratch holds few rows: the two operators one after the other, four matmuls.

The fused loop reads the head and rewrites its gradient for every chunk of rows; the composition reads the head once in
each direction and completes its gradient slab by slab. A fourth matmul costs a row ``2 V H`` FLOPs, a chunk's extra
traffic is ``12 V H`` bytes: on two cores, where a byte takes the time of about twenty FLOPs, they meet at 120 rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl_kernels._common import readable
from fastrl_kernels._linear_logprob_driver import Head, route_of
from fastrl_kernels._linear_logprob_tiles import triton_path
from fastrl_kernels._linear_policy_loop import rows_at_once
from fastrl_kernels._policy_options import PolicyOptions, PolicyTensors
from fastrl_kernels.linear_logprob import HeadOptions, check_rows, head_terms
from fastrl_kernels.policy_loss import PolicyLoss, policy_loss
from fastrl_kernels.token_logprob import check_values, row_temperature

FEW_ROWS = 128  # at once, below which the composition is faster on a CPU


def live_rows(tensors: PolicyTensors, target: Tensor, ignore_index: int | None) -> Tensor:
    """[N] bool: rows with a weight, a target and a completion. The rest is padding."""
    live = (tensors.weight != 0) & (tensors.completion >= 0) & (tensors.completion < tensors.advantage.shape[0])
    return live if ignore_index is None else live & (target != ignore_index)


def rows_to_compose(
    hidden: Tensor, head_weight: Tensor, target: Tensor, tensors: PolicyTensors, head: HeadOptions
) -> Tensor | None:
    """[N] bool, the rows that count, if they are better composed: on a CPU, where scratch holds fewer than ``FEW_ROWS``
    of them and not all. None otherwise, and while tracing: compiled code and counts on the meta device are the fused
    loop's.

    Raises:
        ValueError: scratch does not hold a row of logits.
    """
    if not readable(hidden, head_weight, target, *tensors) or triton_path(hidden):
        return None
    live = live_rows(tensors, target, head.ignore_index)
    if head.rows is not None:
        check_rows(head.rows, target)
        live &= torch.zeros_like(live).index_fill_(0, head.rows, True)
    n = int(live.sum())
    budget = Head(head_weight, None, None, None, 1.0, head.softcap, None, head.scratch_bytes)
    return live if n and rows_at_once(budget, n, route_of(hidden)) < min(n, FEW_ROWS) else None


def composed(
    hidden: Tensor,
    head_weight: Tensor,
    target: Tensor,
    tensors: PolicyTensors,
    policy: PolicyOptions,
    head: HeadOptions,
    live: Tensor,
) -> tuple[PolicyLoss, Tensor]:
    """(loss and metrics, log-probs [N]: infinite where not evaluated) of checked arguments and ``rows_to_compose``."""
    per_row, _ = row_temperature(head.temperature, target)
    check_values(target, head_weight.shape[0], head.ignore_index, per_row)
    skipped = -1  # no token: rows that do not count are left out of every matmul
    rows = None if bool(live.all()) else live.nonzero()[:, 0]
    chosen = head._replace(ignore_index=skipped, rows=rows)
    logp = head_terms(hidden, head_weight, target.masked_fill(~live, skipped), chosen)[0]
    tensors = tensors._replace(weight=tensors.weight.detach().to(logp.dtype).masked_fill(~live, 0))
    result = policy_loss(logp, **tensors._asdict(), **policy._asdict())
    return result, logp.detach().masked_fill(~live, torch.inf)
