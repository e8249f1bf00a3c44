"""The chunked loop of ``linear_policy_loss``: logits of a chunk of rows, its loss, its gradients, while in scratch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastrl_kernels._linear_logprob_driver import (
    EAGER_ROWS,
    Head,
    Plan,
    Route,
    matmul_into,
    ranges,
    route_of,
    take_rows,
    tile_dtype,
)
from fastrl_kernels._linear_logprob_tiles import (
    RowTerms,
    Upstream,
    differentiate_row_bytes,
    differentiate_tile,
    eager_row_bytes,
    fold_row_bytes,
    fold_tile,
    folds_natively,
    triton_path,
)
from fastrl_kernels._policy_options import PolicyOptions, PolicyTensors
from fastrl_kernels._policy_rows import PARTIALS, policy_row_terms


class Policy(NamedTuple):
    """What the row function needs of the live rows."""

    tensors: PolicyTensors
    options: PolicyOptions
    numbers: Tensor | None

    def select(self, index: Tensor) -> Policy:
        return self._replace(tensors=self.tensors.rows(lambda t: t.index_select(0, index)))

    def terms(self, logp: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """(d loss / d logp, partial sums) of these rows."""
        rows = policy_row_terms(logp, self.tensors.rows(lambda t: t[part]), self.options, self.numbers)
        return rows.dlogp, rows.partials


class Gradients(NamedTuple):
    """Buffers in which gradients are summed; empty if not needed. Those of hidden and bias begin at 0."""

    hidden: Tensor  # [N, H] of hidden's dtype
    weight: Tensor  # [V, H] in the accumulator dtype
    bias: Tensor  # [V] in the accumulator dtype
    adds: bool = False  # the weight's is added to what the buffer holds; else it is overwritten


def _plan(head: Head, n: int, route: Route) -> tuple[Plan, int, int]:
    """(tile of whole rows, columns of a slab of the weight where it must be cast, bytes of its copy)."""
    (vocabulary, size), item = head.weight.shape, route.dtype.itemsize
    slab, slab_bytes = vocabulary, 0
    if head.slab_copy(route.dtype).kept:
        slab = max(64, min(vocabulary, head.scratch_bytes // 8 // max(1, size * item)))
        slab_bytes = slab * size * item
    row_bytes = 2 * size * item + (0 if route.triton else eager_row_bytes(item, head.softcap is not None))
    whole = -(-vocabulary // 64) * 64
    budget = head.scratch_bytes - slab_bytes
    least = slab_bytes + row_bytes + whole * item
    if least > head.scratch_bytes:
        raise ValueError(
            f"scratch_bytes: {head.scratch_bytes} is too small for a row of {vocabulary} logits: expected at least "
            f"{least} (linear_logprob works with less)"
        )
    rows = min(n, budget // (row_bytes + whole * item), n if route.triton else EAGER_ROWS)
    return Plan(-(-n // -(-n // max(1, rows))), vocabulary, whole), slab, slab_bytes


def rows_at_once(head: Head, n: int, route: Route) -> int:
    """Rows of a chunk of ``n`` rows. ``ValueError`` if scratch does not hold one."""
    return _plan(head, n, route)[0].rows


def held_bytes(hidden: Tensor, head: Head, n: int, route: Route, *, need_hidden: bool, plain: bool) -> int:
    """What ``run`` over ``n`` rows holds at once beside its arguments, the gradients and vectors."""
    if n == 0:
        return 0
    plan, _, slab_bytes = _plan(head, n, route)
    (vocabulary, size), item = head.weight.shape, route.dtype.itemsize
    rows = head.rows_copy(hidden, route.dtype, taken=not route.triton, masked=route.triton)
    turning = 0
    if not route.triton:
        native = folds_natively(route.dtype, changed=head.options.changed, more=False)
        folding = 0 if native else fold_row_bytes(item, vocabulary, entropy=False, plain=plain)
        softcap = differentiate_row_bytes(item, vocabulary, entropy=False, softcap=head.softcap is not None)
        turning = max(folding, softcap)
    slab = -(-slab_bytes // plan.rows)
    gradient = need_hidden * size * item
    return plan.bytes(item, (rows.making, 0), (rows.kept + turning, 0), (rows.kept + gradient + slab, 0))


def run(
    hidden: Tensor,
    head: Head,
    rows: RowTerms,
    policy: Policy,
    index: Tensor | None,
    gradients: Gradients,
    grad_scale: float,
) -> Tensor:
    """Fill the gradients; returns the partial sums of the loss [P, PARTIALS]."""
    count, dtype = rows.target.shape[0], tile_dtype(hidden)
    if count == 0:
        return rows.logp.new_zeros((0, PARTIALS))
    plan, slab, _ = _plan(head, count, route_of(hidden))
    buffer = plan.tile_buffer(hidden, dtype)
    vocabulary = head.weight.shape[0]
    state = rows.new_state(plan.rows)
    partials = []
    for start, end in ranges(count, plan.rows):
        part = slice(start, end)
        x = take_rows(hidden, index, start, end).to(dtype)
        if triton_path(hidden):  # the contents of a row of weight 0 (such as NaN) must not reach the weight's gradient
            x = x.masked_fill((policy.tensors.weight[part] == 0)[:, None], 0)
        tile = plan.view(buffer, end - start, vocabulary)
        for first, last in ranges(vocabulary, slab):
            torch.mm(x, head.slab(first, last, dtype).T, out=tile[:, first:last])
        chunk = rows.part(start, end)
        fold_tile(tile, 0, head.options, chunk, state[:, : end - start])
        dlogp, sums = policy.terms(chunk.logp, part)
        partials.append(sums)
        differentiate_tile(tile, tile, 0, head.options, chunk, Upstream(dlogp * grad_scale))
        _add_gradients(x, tile, head, index, gradients, start, end, slab)
    return torch.cat(partials)


def _add_gradients(
    x: Tensor, tile: Tensor, head: Head, index: Tensor | None, gradients: Gradients, start: int, end: int, slab: int
) -> None:
    if gradients.hidden.numel():
        d_x = torch.empty_like(x)
        for first, last in ranges(tile.shape[1], slab):
            matmul_into(d_x, tile[:, first:last], head.slab(first, last, tile.dtype), add=first > 0)
        if index is None:
            gradients.hidden[start:end].copy_(d_x)
        else:
            gradients.hidden.index_copy_(0, index[start:end], d_x.to(gradients.hidden.dtype))
    if gradients.weight.numel():
        matmul_into(gradients.weight, tile.T, x, add=gradients.adds or start > 0)
    if gradients.bias.numel():
        gradients.bias.add_(tile.sum(0, dtype=gradients.bias.dtype))
