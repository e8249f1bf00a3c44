"""The backward loop of the head: vocabulary-outer, recomputes logits slab by slab and overwrites them with gradients.

Each slab of the weight is multiplied with all rows (or chunks of rows, if the budget is small); its logits are
recomputed into the scratch tile and replaced in place by their gradient. The slab's weight gradient is complete after
its last chunk: it is accumulated in fp32 inside the matmul and written once, so there is no fp32 ``[V, H]`` buffer. The
gradient of the hidden states is summed over slabs in fp32. Rows known to have no gradient are left out of every matmul.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastrl_kernels._counting import Scratch
from fastrl_kernels._linear_logprob_driver import (
    EAGER_ROWS,
    EAGER_TILE,
    Head,
    Plan,
    Route,
    accumulator_dtype,
    matmul_into,
    plan_tiles,
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
    triton_path,
)


class Needs(NamedTuple):
    """Which gradients are needed."""

    hidden: bool
    weight: bool
    bias: bool
    lora_a: bool
    lora_b: bool


def _backward_plan(hidden: Tensor, head: Head, n: int, needs: Needs, route: Route) -> Plan:
    dtype, size = route.dtype, route.dtype.itemsize
    per_row = (head.width + bool(head.rank) * head.weight.shape[1]) * size
    copied_slab = head.slab_copy(dtype).kept > 0
    per_column = copied_slab * (head.width + bool(head.rank) * head.weight.shape[1]) * size

    def plan(extra_per_column: int) -> Plan:
        return plan_tiles(
            n,
            head.weight.shape[0],
            head.scratch_bytes,
            per_element=size,
            per_row=per_row + (0 if route.triton else eager_row_bytes(size, head.softcap is not None)),
            per_column=per_column + extra_per_column,
            row_limit=n if route.triton else EAGER_ROWS,
            tile_limit=None if route.triton else EAGER_TILE,
        )

    accumulated = head.width * accumulator_dtype(dtype).itemsize
    if dtype != head.weight.dtype and needs.weight:  # cast slabs always pass through an fp32 slab gradient
        return plan(accumulated)
    whole = plan(0)
    if whole.rows >= n or dtype == accumulator_dtype(dtype):
        return whole
    return plan(accumulated)


def backward_bytes(
    hidden: Tensor, head: Head, index: Tensor | None, needs: Needs, route: Route, *, entropy: bool
) -> Scratch:
    """What ``backward`` holds at once beside its arguments, results and vectors, no gradient of a row being zero."""
    n = (hidden if index is None else index).shape[0]
    if n == 0:
        return Scratch()
    plan, size = _backward_plan(hidden, head, n, needs, route), route.dtype.itemsize
    kind, whole = accumulator_dtype(hidden.dtype), plan.rows >= n
    rows = head.rows_copy(hidden, route.dtype, taken=index is not None, masked=route.triton)
    slab = head.slab_copy(route.dtype)
    sums = 0
    for needed, gradient in ((needs.weight, head.weight), (needs.lora_b, head.lora_b)):
        if needed and gradient is not None and not _summed_in_place(gradient, kind, route.dtype, whole=whole):
            sums += gradient.shape[1] * kind.itemsize
    softcap = head.softcap is not None
    turning = differentiate_row_bytes(size, head.weight.shape[0], entropy=entropy, softcap=softcap)
    tiles = plan.bytes(
        size,
        (rows.making, 0 if whole else slab.kept + sums),
        (rows.kept, slab.making),
        (rows.kept + (0 if route.triton else turning), slab.kept + sums),
    )
    summed = n * _input_columns(head, needs) * kind.itemsize  # lies where the result will, as far as that reaches
    result = hidden.numel() * hidden.dtype.itemsize if needs.hidden else 0
    return Scratch(tiles, max(0, summed - result))


def _input_columns(head: Head, needs: Needs) -> int:
    """Columns of the widened input that need a gradient: its last ones."""
    return head.width if needs.hidden else head.rank if needs.lora_a else 0


def _summed_in_place(gradient: Tensor, kind: torch.dtype, dtype: torch.dtype, *, whole: bool) -> bool:
    """Whether a slab's gradient is summed where it is returned: in the accumulator's dtype, or rounded once."""
    return gradient.dtype == kind or (whole and gradient.dtype == dtype)


def backward(
    hidden: Tensor,
    head: Head,
    rows: RowTerms,
    upstream: Upstream,
    index: Tensor | None,
    skip_zero_rows: bool,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight, bias, lora_a and lora_b; empty where not needed.

    Only the rows ``index`` contribute. On a CPU, or with ``skip_zero_rows``, rows whose upstream gradient is exactly 0
    are dropped as well (the number of rows left is read from the device).
    """
    if skip_zero_rows or not triton_path(hidden):
        live = ~upstream.silent(rows, head.options.ignore_index)
        kept = live.nonzero()[:, 0] if index is None else index[live[index]]
        index = None if index is None and kept.numel() == live.numel() else kept
    if index is not None:
        rows, upstream = rows.select(index), upstream.select(index)
    work = _Backward(hidden, head, rows, upstream, index, needs)
    work.run()
    return work.gradients()


class _Backward:
    """One backward pass: the loop over slabs and the gradients it fills."""

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        rows: RowTerms,  # of the rows that contribute, R of them
        upstream: Upstream,  # of those R rows
        index: Tensor | None,  # [R] their row indices in hidden; None: all
        needs: Needs,
    ) -> None:
        self.hidden, self.head, self.rows, self.index, self.needs = hidden, head, rows, index, needs
        self.upstream = upstream
        self.count, self.dtype, self.kind = rows.target.shape[0], tile_dtype(hidden), accumulator_dtype(hidden.dtype)
        self.silent = upstream.silent(rows, head.options.ignore_index)
        (vocabulary, size), rank = head.weight.shape, head.rank
        x_width = _input_columns(head, needs)
        self.x_from = 0 if needs.hidden else size
        self.d_x = hidden.new_zeros((self.count, x_width), dtype=self.kind)

        def zeros(wanted: bool, like: Tensor | None, *shape: int) -> Tensor:
            made = hidden if like is None else like
            return made.new_zeros(shape if wanted else (0,), dtype=made.dtype)

        self.d_weight = zeros(needs.weight, head.weight, vocabulary, size)
        self.d_bias = zeros(needs.bias, head.bias, vocabulary)
        self.d_a = zeros(needs.lora_a, head.lora_a, rank, size)
        self.d_b = zeros(needs.lora_b, head.lora_b, vocabulary, rank)

    def _features(self, start: int, end: int) -> Tensor:
        """Widened rows; rows without a gradient are zeroed, so that their contents (such as NaN) reach no weight."""
        x = take_rows(self.hidden, self.index, start, end).to(self.dtype)
        if triton_path(self.hidden):  # the torch path has already dropped them
            x = x.masked_fill(self.silent[start:end, None], 0)
        return self.head.widen(x)

    def run(self) -> None:
        if self.count == 0:
            return
        plan = _backward_plan(self.hidden, self.head, self.count, self.needs, route_of(self.hidden))
        buffer = plan.tile_buffer(self.hidden, self.dtype)
        chunks = list(ranges(self.count, plan.rows))
        x = self._features(*chunks[0]) if len(chunks) == 1 else None
        for first, last in ranges(self.head.weight.shape[0], plan.columns):
            w = self.head.slab(first, last, self.dtype)
            slab = _SlabGradients(self, first, last, whole=len(chunks) == 1)
            for start, end in chunks:
                rows_x = self._features(start, end) if x is None else x
                tile = plan.view(buffer, end - start, last - first)
                torch.mm(rows_x, w.T, out=tile)
                rows, upstream = self.rows.part(start, end), self.upstream.part(start, end)
                differentiate_tile(tile, tile, first, self.head.options, rows, upstream)
                if self.d_x.shape[1]:
                    matmul_into(self.d_x[start:end], tile, w[:, self.x_from :], add=True)
                slab.add(tile, rows_x, add=start > 0)
                del rows_x
            slab.write()
            del w, slab  # before those of the next slab are made

    def gradients(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        head, size = self.head, self.head.weight.shape[1]
        if head.lora_a is not None and self.d_x.shape[1]:
            d_u = self.d_x[:, size - self.x_from :]
            if self.needs.lora_a:
                total = torch.zeros(head.rank, size, dtype=self.kind, device=self.hidden.device)
                for start, end in ranges(self.count, EAGER_ROWS):
                    x = take_rows(self.hidden, self.index, start, end).to(self.kind)
                    total.addmm_(d_u[start:end].T, x.masked_fill(self.silent[start:end, None], 0))
                self.d_a.copy_(total.mul_(head.lora_scale))
            if self.needs.hidden:
                self.d_x[:, :size].addmm_(d_u, head.lora_a.to(self.kind), alpha=head.lora_scale)
        return self._hidden_gradient(size), self.d_weight, self.d_bias, self.d_a, self.d_b

    def _hidden_gradient(self, size: int) -> Tensor:
        if not self.needs.hidden:
            return self.hidden.new_zeros(0)
        d_hidden = self.d_x[:, :size].to(self.hidden.dtype).contiguous()
        if self.index is None:
            return d_hidden
        return self.hidden.new_zeros(self.hidden.shape).index_copy_(0, self.index, d_hidden)


class _SlabGradients:
    """Gradients of one slab of the weight, the bias and LoRA's B, summed over chunks of rows and written once."""

    def __init__(self, work: _Backward, first: int, last: int, *, whole: bool) -> None:
        self.work, size = work, work.head.weight.shape[1]
        wanted = (
            (work.needs.weight, work.d_weight, slice(0, size)),
            (work.needs.lora_b, work.d_b, slice(size, None)),
        )
        self.targets: list[tuple[Tensor, Tensor, slice]] = []  # (gradient, its accumulator, columns of the input)
        for needed, gradient, columns in wanted:
            if needed:
                part = gradient[first:last]
                direct = _summed_in_place(part, work.kind, work.dtype, whole=whole)
                self.targets.append((part, part if direct else torch.empty_like(part, dtype=work.kind), columns))
        self.bias = work.d_bias[first:last] if work.needs.bias else None
        self.bias_sum = torch.zeros(last - first, dtype=work.kind, device=work.hidden.device)

    def add(self, tile: Tensor, x: Tensor, *, add: bool) -> None:
        for _, total, columns in self.targets:
            matmul_into(total, tile.T, x[:, columns], add=add)
        if self.bias is not None:
            self.bias_sum += tile.sum(0, dtype=self.bias_sum.dtype)

    def write(self) -> None:
        for gradient, total, _ in self.targets:
            if total is not gradient:
                gradient.copy_(total)
        if self.bias is not None:
            self.bias.copy_(self.bias_sum)
