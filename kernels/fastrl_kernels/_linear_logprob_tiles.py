"""The two passes over a tile of logits that all head operators use: fold it into statistics, turn it into its gradient.

A tile holds raw logits ``s`` of some rows and a slab of vocabulary columns. The row's distribution is the softmax of

    z = softcap * tanh((s + bias) / softcap) / temperature            (softcap and bias where given)

``fold_tile`` reads a tile once and keeps, per row, the running maximum ``m``, the sum ``r`` of ``exp(z - m)`` over all
tokens but the maximal one, ``w = sum exp(z - m) (z - m)`` and the target's logit (or those of several targets). After
the last slab ``logp = (z_target - m) - log(1 + r)``, ``lse = m + log(1 + r)`` and ``entropy = log(1 + r) - w / (1 +
r)``: nothing cancels if one token has all the mass (``r`` is the odds against it) or if logits are large. Where asked
for, ``sum c (z - m)`` gives ``mean_logp = sum_j c_j log p_j / V``, with class weights ``c`` or 1.

``differentiate_tile`` is elementwise once ``lse`` is known, so it may overwrite the tile. With upstream gradients
``g_k`` (of the logp of target k), ``h`` (of entropy ``H``), ``q`` (of lse) and ``V u`` (of mean_logp), ``p = exp(z -
lse)``:

    dL/dz_j = sum_k g_k 1[j = target_k] + u c_j - p_j (mass + h (log p_j + H)),    mass = sum_k g_k + u sum(c) - q,
    dL/ds = dL/dz / temperature * (1 - tanh^2)

A target's column uses ``1 - p = -expm1(logp)`` in fp32 and is rounded once, so a confident target keeps its gradient.
Rows whose target is ``ignore_index`` give exact zeros, even if the tile holds NaN. A target outside the vocabulary
gives NaN (on a CPU, callers raise before). CUDA tiles use Triton; the torch path computes in the tile's own precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl_kernels import _native
from fastrl_kernels._common import use_triton
from fastrl_kernels._linear_logprob_launch import launch_fold, launch_gradient

NO_IGNORE = -(2**31)  # passed to kernels as ignore_index if no target is ignored
_LOWEST = -1.0e30  # replaces -inf of a forbidden token: its probability is 0 and its multiples stay finite
_EAGER_BLOCK = 1024  # columns per step of the torch path, which bounds its temporaries


class TileOptions(NamedTuple):
    """The parameters that turn raw logits into the distribution, the same for every tile."""

    n_columns: int  # size of the whole vocabulary; its last slab writes the results
    bias: Tensor | None  # [n_columns]
    softcap: float | None
    ignore_index: int
    class_weight: Tensor | None = None  # [n_columns], only read for mean_logp

    @property
    def changed(self) -> bool:
        """Whether more than a temperature changes raw logits before the softmax."""
        return self.bias is not None or self.softcap is not None


class RowTerms(NamedTuple):
    """Per-row vectors of the rows a tile holds. fp32, or float64 on float64 tiles."""

    target: Tensor  # [n] i64, or [n, K]
    inverse_temperature: Tensor  # [n]
    logp: Tensor  # like target
    lse: Tensor  # [n]
    entropy: Tensor | None  # [n]
    mean_logp: Tensor | None = None  # [n]

    @property
    def targets(self) -> Tensor:
        """[n, K]"""
        return self.target if self.target.dim() > 1 else self.target[:, None]

    def ignored(self, ignore_index: int) -> Tensor:
        """[n]: rows none of whose targets counts."""
        return (self.targets == ignore_index).all(1)

    def new_state(self, n: int) -> Tensor:
        """What ``fold_tile`` keeps of ``n`` rows between slabs, not initialised."""
        lines = 3 + self.targets.shape[1] + 2 * (self.mean_logp is not None)
        return self.lse.new_empty((lines, n))

    def part(self, start: int, end: int) -> RowTerms:
        """The terms of rows ``start:end``, as views."""
        return self._map(lambda vector: vector[start:end])

    def select(self, index: Tensor) -> RowTerms:
        """The terms of the rows ``index`` [R], as copies."""
        return self._map(lambda vector: vector.index_select(0, index))

    def _map(self, change: Callable[[Tensor], Tensor]) -> RowTerms:
        return RowTerms(*(None if vector is None else change(vector) for vector in self))  # type: ignore[arg-type]


class Upstream(NamedTuple):
    """Gradients of the loss with respect to a tile's row terms; the letters are those above."""

    logp: Tensor  # g, like target
    entropy: Tensor | None = None  # h [n]
    mass: Tensor | None = None  # [n]; None: one target, and neither q nor u
    spread: Tensor | None = None  # u [n]

    @staticmethod
    def of(
        rows: RowTerms,
        options: TileOptions,
        logp: Tensor | None,
        entropy: Tensor | None = None,
        lse: Tensor | None = None,
        mean_logp: Tensor | None = None,
    ) -> Upstream:
        """From the gradients of these outputs, where there is one."""

        def plain(grad: Tensor) -> Tensor:
            return grad.to(rows.logp.dtype).contiguous()

        g = torch.zeros_like(rows.logp) if logp is None else plain(logp)
        h = None if entropy is None else plain(entropy)
        if rows.target.dim() == 1 and lse is None and mean_logp is None:
            return Upstream(g, h)
        mass = torch.where(rows.targets == options.ignore_index, 0, g.view(rows.targets.shape)).sum(1)
        spread = None
        if mean_logp is not None:
            spread = plain(mean_logp) / options.n_columns
            weights = options.class_weight
            mass = mass + spread * (options.n_columns if weights is None else weights.to(mass.dtype).sum())
        if lse is not None:
            mass = mass - plain(lse)
        return Upstream(g, h, mass, spread)

    def part(self, start: int, end: int) -> Upstream:
        """Those of rows ``start:end``, as views."""
        return Upstream(*(None if vector is None else vector[start:end] for vector in self))  # type: ignore[arg-type]

    def select(self, index: Tensor) -> Upstream:
        """Those of the rows ``index`` [R], as copies."""
        return Upstream(*(None if vector is None else vector.index_select(0, index) for vector in self))  # type: ignore[arg-type]

    def silent(self, rows: RowTerms, ignore_index: int) -> Tensor:
        """[n]: rows without a gradient, as they are ignored or everything upstream of them is 0."""
        quiet = (self.logp.view(rows.targets.shape) == 0).all(1)
        for vector in self[1:]:
            if vector is not None:
                quiet &= vector == 0
        return quiet | rows.ignored(ignore_index)


def triton_path(tensor: Tensor) -> bool:
    """True if tiles of this tensor's dtype and device use Triton."""
    return use_triton(tensor) and tensor.dtype != torch.float64


def fold_tile(tile: Tensor, first_column: int, options: TileOptions, rows: RowTerms, state: Tensor) -> None:
    """Fold a slab ``tile`` [n, width] of raw logits into the rows' statistics; slabs must come in ascending order.

    ``state`` (``rows.new_state``) holds the statistics between slabs. The last slab of the vocabulary writes
    ``rows.logp``, ``.lse`` and, if given, ``.entropy`` and ``.mean_logp``. The tile is not modified.
    """
    if tile.shape[0] == 0:
        return
    if triton_path(tile):
        launch_fold(tile, first_column, options, rows, state)
    elif _takes_native(tile, options, rows):
        _fold_native(tile, first_column, options, rows, state)
    else:
        _fold_eager(tile, first_column, options, rows, state)


def differentiate_tile(
    tile: Tensor,
    out: Tensor,
    first_column: int,
    options: TileOptions,
    rows: RowTerms,
    upstream: Upstream,
) -> None:
    """Write the gradient with respect to raw logits into ``out`` [n, width], which may be the tile itself.

    ``upstream.entropy`` needs ``rows.entropy``. The torch path overwrites the tile (C++ does not: see
    ``differentiates_apart``).
    """
    if tile.numel() == 0:
        return
    if triton_path(tile):
        launch_gradient(tile, out, first_column, options, rows, upstream)
    elif differentiates_apart(tile, out, options, rows, upstream):
        silent = upstream.silent(rows, options.ignore_index)
        column = _columns(rows.target, first_column, options)
        mass = upstream.logp if upstream.mass is None else upstream.mass
        at_target = _at_targets(options, rows, upstream)[:, 0]
        _native.differentiate_tile(tile, out, rows.inverse_temperature, rows.lse, mass, column, at_target, silent)
    else:
        _differentiate_eager(tile, out, first_column, options, rows, upstream)


def _takes_native(tile: Tensor, options: TileOptions, rows: RowTerms) -> bool:
    """Whether C++ folds this tile: on a CPU, of unit column stride, see ``folds_natively``."""
    more = rows.target.dim() > 1 or rows.entropy is not None or rows.mean_logp is not None
    unit = tile.stride(1) == 1 or tile.shape[1] == 1
    return tile.is_cpu and unit and folds_natively(tile.dtype, changed=options.changed, more=more)


def folds_natively(dtype: torch.dtype, *, changed: bool, more: bool) -> bool:
    """Whether C++ folds tiles on a CPU: raw logits in fp32, and no ``more`` than one target's log-prob a row."""
    return dtype == torch.float32 and not changed and not more and _native.lacks("fastrl_fold_tile") is None


def differentiates_apart(tile: Tensor, out: Tensor, options: TileOptions, rows: RowTerms, upstream: Upstream) -> bool:
    """Whether C++ differentiates this tile, and leaves it as it is unless ``out`` is the same."""
    more = upstream.entropy is not None or upstream.spread is not None or out.dtype != torch.float32
    unit = out.stride(1) == 1 or out.shape[1] == 1
    return not more and unit and _takes_native(tile, options, rows._replace(entropy=None))


def _columns(target: Tensor, first_column: int, options: TileOptions) -> Tensor:
    """[n]: the target's column in a slab that begins at this one, -1 in ignored rows."""
    return (target - first_column).masked_fill_(target == options.ignore_index, -1)


def _fold_native(tile: Tensor, first_column: int, options: TileOptions, rows: RowTerms, state: Tensor) -> None:
    top, rest, z_target = state[0], state[1], state[3]
    if first_column == 0:
        top.fill_(_LOWEST)
        rest.zero_()
        z_target.fill_(math.nan)
    column = _columns(rows.target, first_column, options)
    _native.fold_tile(tile, rows.inverse_temperature, column, top, rest, z_target)
    if first_column + tile.shape[1] == options.n_columns:
        _finish(rows, options, rest.log1p(), state)


def _finish(rows: RowTerms, options: TileOptions, log_total: Tensor, state: Tensor) -> None:
    """Log-probs and log-sum-exps, once every slab is folded."""
    targets, top = rows.targets, state[0]
    z_target = state[3 : 3 + targets.shape[1]].T
    logp = (z_target - top[:, None] - log_total[:, None]).masked_fill_(targets == options.ignore_index, 0)
    rows.logp.copy_(logp.view(rows.logp.shape))
    rows.lse.copy_((top + log_total).masked_fill_(rows.ignored(options.ignore_index), 0))


def eager_row_bytes(itemsize: int, softcap: bool) -> int:
    """Upper bound of the torch path's temporaries in bytes per row, without the tile."""
    return (2 + softcap) * _EAGER_BLOCK * itemsize


def fold_row_bytes(itemsize: int, vocabulary: int, *, entropy: bool, plain: bool) -> int:
    """Of those, what ``fold_tile`` makes: shifted logits, and a copy or exponentials beside them where they stay.

    C++ makes none (``folds_natively``).
    """
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
    targets = rows.targets
    top, rest, weighted = state[:3]
    z_target, sums = state[3 : 3 + targets.shape[1]].T, state[3 + targets.shape[1] :]
    if first_column == 0:
        top.fill_(_LOWEST)
        rest.zero_()
        weighted.zero_()
        z_target.fill_(math.nan)
        sums.zero_()
    plain = _is_plain(options, rows)
    for start in range(0, tile.shape[1], _EAGER_BLOCK):
        z = tile[:, start : start + _EAGER_BLOCK]
        if not plain:
            z = z.clone()
            _temper(z, first_column + start, options, rows.inverse_temperature)
        column = targets - (first_column + start)
        here = (column >= 0) & (column < z.shape[1])
        found = z.gather(1, column.clamp(0, z.shape[1] - 1))
        z_target.copy_(torch.where(here, found, z_target))
        block_top, owner = z.max(1)
        block_top.clamp_(min=_LOWEST)  # NaN stays NaN
        new_top = torch.maximum(top, block_top)
        z = z - block_top[:, None]
        if rows.mean_logp is not None:
            weights = _class_weights(options, first_column + start, z)
            sums[0] += (top - new_top) * sums[1] + (block_top - new_top) * weights.sum() + z.mv(weights)
            sums[1] += weights.sum()
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
        ignored = rows.ignored(options.ignore_index)
        log_total = rest.log1p()
        _finish(rows, options, log_total, state)
        if rows.entropy is not None:
            rows.entropy.copy_((log_total - weighted / (1 + rest)).masked_fill_(ignored, 0))
        if rows.mean_logp is not None:
            mean = (sums[0] - sums[1] * log_total) / options.n_columns
            rows.mean_logp.copy_(mean.masked_fill_(ignored, 0))


def _class_weights(options: TileOptions, first: int, like: Tensor) -> Tensor:
    """[width] of the columns of a block ``like`` [n, width] that begins at this one."""
    if options.class_weight is None:
        return like.new_ones(like.shape[1])
    return options.class_weight[first : first + like.shape[1]].to(like.dtype)


def _differentiate_eager(
    tile: Tensor,
    out: Tensor,
    first_column: int,
    options: TileOptions,
    rows: RowTerms,
    upstream: Upstream,
) -> None:
    nothing, targets = upstream.silent(rows, options.ignore_index), rows.targets
    mass = upstream.logp if upstream.mass is None else upstream.mass
    at_target = _at_targets(options, rows, upstream)
    plain, some_nothing = _is_plain(options, rows), bool(nothing.any())
    for start in range(0, tile.shape[1], _EAGER_BLOCK):
        s = tile[:, start : start + _EAGER_BLOCK]
        tanh = None if plain else _temper(s, first_column + start, options, rows.inverse_temperature)
        s.sub_(rows.lse[:, None])
        if upstream.entropy is not None and rows.entropy is not None:
            p = s.clamp_(min=_LOWEST / 1e20).exp()
            s.add_(rows.entropy[:, None]).mul_(upstream.entropy[:, None]).add_(mass[:, None]).mul_(p).neg_()
            del p  # or it would live on beside the next block's
        else:
            s.exp_().mul_(-mass[:, None])
        if upstream.spread is not None:
            s.addr_(upstream.spread, _class_weights(options, first_column + start, s))
        column = targets - (first_column + start)
        here = (column >= 0) & (column < s.shape[1]) & (targets != options.ignore_index)
        s[here.nonzero()[:, 0], column[here]] = at_target[here]
        if not plain:
            s.mul_(rows.inverse_temperature[:, None])
        if tanh is not None:
            s.mul_(tanh.square_().neg_().add_(1))
            del tanh
        if some_nothing:  # masked_fill and not a product, as these rows may hold NaN
            s.masked_fill_(nothing[:, None], 0)
        if out is not tile:
            out[:, start : start + _EAGER_BLOCK].copy_(s)


def _at_targets(options: TileOptions, rows: RowTerms, upstream: Upstream) -> Tensor:
    """[n, K]: dL/dz of each target's column. Equal targets of a row get equal values."""
    targets, shape = rows.targets, rows.targets.shape
    logp, g = rows.logp.view(shape), upstream.logp.view(shape)
    if shape[1] > 1:
        g = torch.where(targets == options.ignore_index, 0, g)
        total = torch.zeros_like(g)
        for other in range(shape[1]):
            total += torch.where(targets == targets[:, other, None], g[:, other, None], 0)
        g = total
    p = logp.exp()
    value = -g * logp.expm1()
    if upstream.mass is not None:
        value += (g - upstream.mass[:, None]) * p
    if upstream.entropy is not None and rows.entropy is not None:
        value -= upstream.entropy[:, None] * p * (logp + rows.entropy[:, None])
    if upstream.spread is not None:
        column = targets.clamp(0, options.n_columns - 1)
        weights = 1 if options.class_weight is None else options.class_weight.to(value.dtype)[column]
        value += upstream.spread[:, None] * weights
    return value
