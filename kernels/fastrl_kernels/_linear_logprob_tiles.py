"""The two passes over a tile of logits that all head operators use: fold it into statistics, turn it into its gradient.

A tile holds raw logits ``s`` of some rows and a slab of vocabulary columns. The row's distribution is the softmax of

    z = softcap * tanh((s + bias) / softcap) / temperature            (softcap and bias where given)

``fold_tile`` reads a tile once and keeps, per row, the running maximum ``m``, the sum ``r`` of ``exp(z - m)`` over all
tokens but the maximal one, ``w = sum exp(z - m) (z - m)`` and the target's logit. After the last slab
``logp = (z_target - m) - log(1 + r)``, ``lse = m + log(1 + r)`` and ``entropy = log(1 + r) - w / (1 + r)``: nothing
cancels if one token has all the mass (``r`` is the odds against it) or if logits are large.

``differentiate_tile`` is elementwise once ``lse`` is known, so it may overwrite the tile. With upstream gradients
``g`` (of logp) and ``h`` (of entropy ``H``), ``p = exp(z - lse)``:

    dL/dz_j = g (1[j = target] - p_j) - h p_j (log p_j + H),        dL/ds = dL/dz / temperature * (1 - tanh^2)

The target's column uses ``1 - p = -expm1(logp)`` in fp32 and is rounded once, so a confident target keeps its gradient.
Rows whose target is ``ignore_index`` give exact zeros, even if the tile holds NaN. A target outside the vocabulary
gives NaN (on a CPU, callers raise before). CUDA tiles use Triton; the torch path computes in the tile's own precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl_kernels._common import use_triton
from fastrl_kernels._linear_logprob_kernels import launch_fold, launch_gradient

NO_IGNORE = -(2**31)  # passed to kernels as ignore_index if no target is ignored
_LOWEST = -1.0e30  # replaces -inf of a forbidden token: its probability is 0 and its multiples stay finite
_EAGER_BLOCK = 1024  # columns per step of the torch path, which bounds its temporaries


class TileOptions(NamedTuple):
    """The parameters that turn raw logits into the distribution, the same for every tile."""

    n_columns: int  # size of the whole vocabulary; its last slab writes the results
    bias: Tensor | None  # [n_columns]
    softcap: float | None
    ignore_index: int


class RowTerms(NamedTuple):
    """Per-row vectors of the rows a tile holds. fp32, or float64 on float64 tiles."""

    target: Tensor  # [n] i64
    inverse_temperature: Tensor  # [n]
    logp: Tensor  # [n]
    lse: Tensor  # [n]
    entropy: Tensor | None  # [n]

    def part(self, start: int, end: int) -> RowTerms:
        """The terms of rows ``start:end``, as views."""
        return self._map(lambda vector: vector[start:end])

    def select(self, index: Tensor) -> RowTerms:
        """The terms of the rows ``index`` [R], as copies."""
        return self._map(lambda vector: vector.index_select(0, index))

    def _map(self, change: Callable[[Tensor], Tensor]) -> RowTerms:
        entropy = None if self.entropy is None else change(self.entropy)
        return RowTerms(
            change(self.target), change(self.inverse_temperature), change(self.logp), change(self.lse), entropy
        )


def triton_path(tensor: Tensor) -> bool:
    """True if tiles of this tensor's dtype and device use Triton."""
    return use_triton(tensor) and tensor.dtype != torch.float64


def fold_tile(tile: Tensor, first_column: int, options: TileOptions, rows: RowTerms, state: Tensor) -> None:
    """Fold a slab ``tile`` [n, width] of raw logits into the rows' statistics; slabs must come in ascending order.

    ``state`` [4, n] holds the statistics between slabs (not initialised by the caller). The last slab of the vocabulary
    writes ``rows.logp``, ``.lse`` and, if given, ``.entropy``. The tile is not modified.
    """
    if tile.shape[0] == 0:
        return
    if triton_path(tile):
        launch_fold(tile, first_column, options, rows, state)
    else:
        _fold_eager(tile, first_column, options, rows, state)


def differentiate_tile(
    tile: Tensor,
    out: Tensor,
    first_column: int,
    options: TileOptions,
    rows: RowTerms,
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
) -> None:
    """Write the gradient with respect to raw logits into ``out`` [n, width], which may be the tile itself.

    ``grad_logp`` and ``grad_entropy`` [n]; ``grad_entropy`` needs ``rows.entropy``. The torch path overwrites the tile.
    """
    if tile.numel() == 0:
        return
    if triton_path(tile):
        launch_gradient(tile, out, first_column, options, rows, grad_logp, grad_entropy)
    else:
        _differentiate_eager(tile, out, first_column, options, rows, grad_logp, grad_entropy)


def eager_row_bytes(itemsize: int, softcap: bool) -> int:
    """Upper bound of the torch path's temporaries in bytes per row, without the tile."""
    return (2 + softcap) * _EAGER_BLOCK * itemsize


def fold_row_bytes(itemsize: int, vocabulary: int, *, entropy: bool, plain: bool) -> int:
    """Of those, what ``fold_tile`` makes: shifted logits, and a copy or exponentials beside them where they stay."""
    return (1 + (entropy or not plain)) * min(vocabulary, _EAGER_BLOCK) * itemsize


def differentiate_row_bytes(itemsize: int, vocabulary: int, *, entropy: bool, softcap: bool) -> int:
    """Of those, what ``differentiate_tile`` makes beside the tile it writes over: probabilities, tangents."""
    return (entropy + softcap) * min(vocabulary, _EAGER_BLOCK) * itemsize


def _is_plain(options: TileOptions, rows: RowTerms) -> bool:
    """Whether the distribution is the softmax of the raw logits, so that passes over the tile can be skipped."""
    return options.bias is None and options.softcap is None and bool((rows.inverse_temperature == 1).all())


def _temper(s: Tensor, first: int, options: TileOptions, inverse_temperature: Tensor) -> Tensor | None:
    """Raw logits -> tempered logits, in place; returns the tanh if there is a softcap."""
    tanh = None
    if options.bias is not None:
        s.add_(options.bias[first : first + s.shape[1]])
    if options.softcap is not None:
        tanh = s.div_(options.softcap).tanh_().clone()
        s.mul_(options.softcap)
    s.mul_(inverse_temperature[:, None])
    return tanh


def _fold_eager(tile: Tensor, first_column: int, options: TileOptions, rows: RowTerms, state: Tensor) -> None:
    top, rest, weighted, z_target = state
    if first_column == 0:
        top.fill_(_LOWEST)
        rest.zero_()
        weighted.zero_()
        z_target.fill_(math.nan)
    plain = _is_plain(options, rows)
    for start in range(0, tile.shape[1], _EAGER_BLOCK):
        z = tile[:, start : start + _EAGER_BLOCK]
        if not plain:
            z = z.clone()
            _temper(z, first_column + start, options, rows.inverse_temperature)
        column = rows.target - (first_column + start)
        here = (column >= 0) & (column < z.shape[1])
        found = z.gather(1, column.clamp(0, z.shape[1] - 1)[:, None])[:, 0]
        z_target.copy_(torch.where(here, found, z_target))
        block_top, owner = z.max(1)
        block_top.clamp_(min=_LOWEST)  # NaN stays NaN
        new_top = torch.maximum(top, block_top)
        z = z - block_top[:, None]
        e = (z.exp_() if rows.entropy is None else z.exp()).scatter_(1, owner[:, None], 0)
        block_rest = e.sum(1)
        old_scale, block_scale = (top - new_top).exp(), (block_top - new_top).exp()
        if rows.entropy is not None:
            old = old_scale * (weighted + (top - new_top) * (rest + 1))
            block = block_scale * (z.clamp_(min=_LOWEST).mul_(e).sum(1) + (block_top - new_top) * (block_rest + 1))
            weighted.copy_(old + block)
        ahead = torch.where(block_top >= top, block_rest, rest)  # from the side that holds the maximum
        behind = torch.where(block_top >= top, (rest + 1) * old_scale, (block_rest + 1) * block_scale)
        rest.copy_(ahead + behind)
        top.copy_(new_top)
        del z, e  # freed before the next block allocates its own
    if first_column + tile.shape[1] == options.n_columns:
        ignored = rows.target == options.ignore_index
        log_total = rest.log1p()
        rows.logp.copy_((z_target - top - log_total).masked_fill_(ignored, 0))
        rows.lse.copy_((top + log_total).masked_fill_(ignored, 0))
        if rows.entropy is not None:
            rows.entropy.copy_((log_total - weighted / (1 + rest)).masked_fill_(ignored, 0))


def _differentiate_eager(
    tile: Tensor,
    out: Tensor,
    first_column: int,
    options: TileOptions,
    rows: RowTerms,
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
) -> None:
    nothing = (rows.target == options.ignore_index) | (grad_logp == 0)
    at_target = -grad_logp * rows.logp.expm1()
    if grad_entropy is not None and rows.entropy is not None:
        nothing = (rows.target == options.ignore_index) | ((grad_logp == 0) & (grad_entropy == 0))
        at_target -= grad_entropy * rows.logp.exp() * (rows.logp + rows.entropy)
    plain, some_nothing = _is_plain(options, rows), bool(nothing.any())
    for start in range(0, tile.shape[1], _EAGER_BLOCK):
        s = tile[:, start : start + _EAGER_BLOCK]
        tanh = None if plain else _temper(s, first_column + start, options, rows.inverse_temperature)
        s.sub_(rows.lse[:, None])
        if grad_entropy is not None and rows.entropy is not None:
            p = s.clamp_(min=_LOWEST / 1e20).exp()
            s.add_(rows.entropy[:, None]).mul_(grad_entropy[:, None]).add_(grad_logp[:, None]).mul_(p).neg_()
            del p  # or it would live on beside the next block's
        else:
            s.exp_().mul_(-grad_logp[:, None])
        column = rows.target - (first_column + start)
        here = ((column >= 0) & (column < s.shape[1])).nonzero()[:, 0]
        s[here, column[here]] = at_target[here]
        if not plain:
            s.mul_(rows.inverse_temperature[:, None])
        if tanh is not None:
            s.mul_(tanh.square_().neg_().add_(1))
            del tanh
        if some_nothing:  # masked_fill and not a product, as these rows may hold NaN
            s.masked_fill_(nothing[:, None], 0)
        if out is not tile:
            out[:, start : start + _EAGER_BLOCK].copy_(s)
