"""Plans the head's tiles within a byte budget that depends on neither rows nor vocabulary, and runs the forward loop.

The forward is token-outer: for a chunk of rows, each slab of the vocabulary takes one matmul into the same scratch tile
and one pass that folds it. A LoRA on the head is treated as a wider head, ``[hidden, hidden (s A)^T]`` times ``[W,
B]``, so both products are rounded together.

Triton tiles have the inputs' dtype (the matmul accumulates in fp32 and rounds once, as an ordinary head does). The
torch path computes in fp32 (float64 for float64); its tiles and the slabs it casts stay within the same budget.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl_kernels._linear_logprob_tiles import (
    NO_IGNORE,
    RowTerms,
    TileOptions,
    eager_row_bytes,
    fold_row_bytes,
    fold_tile,
    folds_natively,
    triton_path,
)

_HAS_OUT_DTYPE = hasattr(torch.ops.aten.addmm, "dtype_out")  # fp32 result of a bf16/fp16 matmul; CUDA only
_FORWARD_ROWS = 4096  # tokens per tile on a GPU: the weight is read once per tile
EAGER_ROWS = 1024  # tokens per tile on a CPU
EAGER_TILE = 16 << 20  # bytes of a tile on a CPU that its cache still holds from the product to the pass over it
_SLAB_COLUMNS = 4096  # narrower slabs make the matmuls slow, so the number of rows is reduced first


class Copy(NamedTuple):
    """Bytes for each row of what is copied: the most while the copy is made, and what is kept."""

    making: int
    kept: int


class Head(NamedTuple):
    """The projection from hidden states to logits, and its memory budget."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    lora_a: Tensor | None  # [r, H]
    lora_b: Tensor | None  # [V, r]
    lora_scale: float
    softcap: float | None
    ignore_index: int | None
    scratch_bytes: int
    class_weight: Tensor | None = None  # [V], of mean log-probs

    @property
    def options(self) -> TileOptions:
        ignore = NO_IGNORE if self.ignore_index is None else self.ignore_index
        return TileOptions(self.weight.shape[0], self.bias, self.softcap, ignore, self.class_weight)

    @property
    def rank(self) -> int:
        return 0 if self.lora_a is None else self.lora_a.shape[0]

    @property
    def width(self) -> int:
        """Columns of the (LoRA-widened) hidden states."""
        return self.weight.shape[1] + self.rank

    def slab(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Rows ``first:last`` of ``[W, B]`` [last - first, width]; a view unless it must be cast or joined."""
        slab = self.weight[first:last].to(dtype)
        return slab if self.lora_b is None else torch.cat([slab, self.lora_b[first:last].to(dtype)], 1)

    def slab_copy(self, dtype: torch.dtype) -> Copy:
        """What ``slab`` makes for each of its rows."""
        cast = self.weight.shape[1] * dtype.itemsize if dtype != self.weight.dtype else 0
        if self.lora_b is None:
            return Copy(cast, cast)
        cast += self.rank * dtype.itemsize if dtype != self.lora_b.dtype else 0
        return Copy(cast + self.width * dtype.itemsize, self.width * dtype.itemsize)

    def widen(self, hidden: Tensor) -> Tensor:
        """``[hidden, hidden (s A)^T]`` [n, width]."""
        if self.lora_a is None:
            return hidden
        scaled = (self.lora_a.to(accumulator_dtype(hidden.dtype)) * self.lora_scale).to(hidden.dtype)
        return torch.cat([hidden, hidden @ scaled.T], 1)

    def rows_copy(self, hidden: Tensor, dtype: torch.dtype, *, taken: bool = False, masked: bool = False) -> Copy:
        """What each row of ``hidden`` costs that is taken by an index, cast, masked and widened, as far as need be."""
        size, making, kept = self.weight.shape[1], 0, 0
        for made, item in ((taken, hidden.dtype), (dtype != hidden.dtype, dtype), (masked, dtype)):
            if made:
                making, kept = max(making, kept + size * item.itemsize), size * item.itemsize
        if not self.rank:
            return Copy(making, kept)
        return Copy(max(making, kept + (self.rank + self.width) * dtype.itemsize), self.width * dtype.itemsize)


class Plan(NamedTuple):
    """Tile shape: ``rows`` x ``columns``, stored with a row stride that keeps every row aligned."""

    rows: int
    columns: int
    stride: int

    def tile_buffer(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.empty(self.rows * self.stride, dtype=dtype, device=like.device)

    def view(self, buffer: Tensor, rows: int, columns: int) -> Tensor:
        return buffer.as_strided((rows, columns), (self.stride, 1))

    def bytes(self, per_element: int, *moments: tuple[int, int]) -> int:
        """Of the tile, and the most that is held beside it: at some moments, for each of its rows and columns."""
        tile = self.rows * self.stride * per_element
        return tile + max(self.rows * row + self.columns * column for row, column in moments)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Route(NamedTuple):
    """How tiles are computed: through Triton or torch, and in which dtype."""

    triton: bool
    dtype: torch.dtype


def route_of(hidden: Tensor, *, triton: bool | None = None) -> Route:
    """The inputs' own dtype through Triton, the accumulator's in torch. ``triton`` None: as a call on ``hidden`` goes,
    else as one on a device goes whose tiles pass through Triton, or not."""
    through = triton_path(hidden) if triton is None else triton and hidden.dtype != torch.float64
    return Route(through, hidden.dtype if through else accumulator_dtype(hidden.dtype))


def tile_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype in which tiles are computed."""
    return route_of(hidden).dtype


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def plan_tiles(
    n: int,
    v: int,
    budget: int,
    *,
    per_element: int,
    per_row: int,
    per_column: int,
    row_limit: int,
    tile_limit: int | None = None,
) -> Plan:
    """The largest tile of at most ``row_limit`` rows that fits ``budget`` bytes, cut evenly over n rows and v columns.

    Rows are halved only if the slab would otherwise be narrow. ``tile_limit``: bytes above which slabs get no wider
    than they must be. ``ValueError`` if not even one row of 64 columns fits.
    """
    whole = _round_up(v, 64)
    rows = max(1, min(n, row_limit))
    while True:
        columns = (budget - rows * per_row) // (rows * per_element + per_column) // 64 * 64
        if columns >= min(whole, _SLAB_COLUMNS if rows > 64 else 64):
            break
        if rows == 1:
            least = per_row + 64 * (per_element + per_column)
            raise ValueError(
                f"scratch_bytes: {budget} is too small for one tile of this head; expected at least {least}"
            )
        rows = (rows + 1) // 2
    columns = min(columns, whole)
    if tile_limit is not None:
        columns = min(columns, max(_SLAB_COLUMNS, tile_limit // (rows * per_element)))
    columns = _round_up(-(-v // -(-v // columns)), 64)
    rows = -(-n // -(-n // rows)) if n else 1
    return Plan(rows, columns, columns)


def ranges(total: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, total, step):
        yield start, min(start + step, total)


def _forward_plan(hidden: Tensor, head: Head, n: int, route: Route, *, gathered: bool) -> Plan:
    size = route.dtype.itemsize
    copied_rows = head.rows_copy(hidden, route.dtype, taken=gathered).kept > 0
    copied_slab = head.slab_copy(route.dtype).kept > 0
    return plan_tiles(
        n,
        head.weight.shape[0],
        head.scratch_bytes,
        per_element=size,
        per_row=copied_rows * (head.width + head.weight.shape[1]) * size
        + (0 if route.triton else eager_row_bytes(size, head.softcap is not None)),
        per_column=copied_slab * (head.width + bool(head.rank) * head.weight.shape[1]) * size,
        row_limit=_FORWARD_ROWS if route.triton else EAGER_ROWS,
        tile_limit=None if route.triton else EAGER_TILE,
    )


def forward_bytes(hidden: Tensor, head: Head, route: Route, *, entropy: bool, more: bool, plain: bool) -> int:
    """What ``forward`` holds at once beside its arguments and vectors, no row ignored.

    ``more``: than one target's log-prob (and the entropy) is computed for each row. ``plain``: logits are not changed
    before the softmax.
    """
    n, vocabulary = hidden.shape[0], head.weight.shape[0]
    if n == 0:
        return 0
    plan, size = _forward_plan(hidden, head, n, route, gathered=False), route.dtype.itemsize
    rows, slab = head.rows_copy(hidden, route.dtype), head.slab_copy(route.dtype)
    native = folds_natively(route.dtype, changed=head.options.changed, more=more or entropy)
    folding = 0 if route.triton or native else fold_row_bytes(size, vocabulary, entropy=entropy, plain=plain)
    return plan.bytes(
        size,
        (rows.making, slab.kept),
        (rows.kept, slab.making),
        (rows.kept + folding, slab.kept),
    )


def matmul_into(out: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:
    """``out (+)= a @ b``. ``out`` has the operands' dtype, or is fp32, in which case nothing is rounded to bf16."""
    if a.dtype == out.dtype:
        if add:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
    elif _HAS_OUT_DTYPE and out.is_cuda:
        if add:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        matmul_into(out, a.to(out.dtype), b.to(out.dtype), add=add)


def forward(
    hidden: Tensor,
    head: Head,
    target: Tensor,
    inverse_temperature: Tensor,
    *,
    return_entropy: bool = False,
    return_mean: bool = False,
) -> RowTerms:
    """The row terms in the accumulator dtype; those of ignored rows are 0."""
    n, vocabulary = hidden.shape[0], head.weight.shape[0]
    kind = accumulator_dtype(hidden.dtype)

    def zeros(wanted: bool = True) -> Tensor | None:
        return torch.zeros(n, dtype=kind, device=hidden.device) if wanted else None

    logp = torch.zeros(target.shape, dtype=kind, device=hidden.device)
    made = RowTerms(target, inverse_temperature, logp, zeros(), zeros(return_entropy), zeros(return_mean))  # type: ignore[arg-type]
    index = None
    if head.ignore_index is not None and hidden.device.type == "cpu" and not triton_path(hidden):
        kept = (~made.ignored(head.ignore_index)).nonzero()[:, 0]
        index = kept if kept.numel() < n else None
    rows = made if index is None else made.select(index)
    count = rows.target.shape[0]
    if count:
        plan = _forward_plan(hidden, head, count, route_of(hidden), gathered=index is not None)
        _forward_tiles(hidden, head, rows, index, plan, vocabulary)
    if index is not None:
        for whole, some in zip(made[2:], rows[2:], strict=True):
            if whole is not None and some is not None:
                whole[index] = some
    return made


def _forward_tiles(
    hidden: Tensor, head: Head, rows: RowTerms, index: Tensor | None, plan: Plan, vocabulary: int
) -> None:
    dtype, count = tile_dtype(hidden), rows.target.shape[0]
    state = rows.new_state(count)
    buffer = plan.tile_buffer(hidden, dtype)
    chunks, slabs = list(ranges(count, plan.rows)), list(ranges(vocabulary, plan.columns))
    tiles = [(chunk, slab) for chunk in chunks for slab in slabs]
    if head.slab_copy(dtype).kept:  # slabs are copies: make each only once
        tiles = [(chunk, slab) for slab in slabs for chunk in chunks]
    x = w = hidden  # replaced before use
    at_chunk = at_slab = -1
    for (start, end), (first, last) in tiles:
        if at_chunk != start:
            x, at_chunk = hidden, start  # the old copy is freed before its successor is made
            x = head.widen(take_rows(hidden, index, start, end).to(dtype))
        if at_slab != first:
            w, at_slab = hidden, first
            w = head.slab(first, last, dtype)
        tile = plan.view(buffer, end - start, last - first)
        torch.mm(x, w.T, out=tile)
        fold_tile(tile, first, head.options, rows.part(start, end), state[:, start:end])


def take_rows(hidden: Tensor, index: Tensor | None, start: int, end: int) -> Tensor:
    return hidden[start:end] if index is None else hidden.index_select(0, index[start:end])
