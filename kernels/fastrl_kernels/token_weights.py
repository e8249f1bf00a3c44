"""Per-token loss weights; all losses are normalised here.

A loss over tokens is ``sum(weight * row_loss)``; what papers call "mean over tokens" or "mean of sequence means" is
only a choice of ``weight``. It takes a few integer counts over ``[N]`` ids, so this is plain torch: it runs on any
device, compiles into the surrounding graph, reads nothing back to the host, and is bitwise reproducible (counts are
integers, so the order of additions does not matter).

Gradient: none. Weights are constants of the optimizer step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl_kernels import _native
from fastrl_kernels._common import INTEGERS, check, check_dtype, check_number, check_same_device, check_shape, readable

AGGREGATES = ("sequence", "token", "constant")
MASKS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def token_weights(
    completion: Tensor,
    *,
    aggregate: str = "sequence",
    mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    n_completions: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Weights ``w`` such that ``sum(w * row_loss)`` is the aggregated loss.

    ``aggregate``, with ``m`` the number of unmasked tokens of a row's own completion:

    - ``"sequence"``: ``1 / (m * S)``, ``S`` = completions that have an unmasked token. Mean over a completion's tokens,
      then over completions (GRPO; verl ``seq-mean-token-mean``).
    - ``"token"``: ``1 / M``, ``M`` = all unmasked tokens (DAPO, BNPO; verl ``token-mean``).
    - ``"constant"``: ``1 / normalizer`` (Dr. GRPO: completions x maximal length).

    ``normalizer`` replaces the last denominator (``S``, ``M``), so that weights of one micro-batch add up over the
    whole optimizer step: pass the step's number of completions or tokens. Equally, compute the weights of all groups of
    the step in one call and slice them with the rows. ``"sequence"`` must not split a completion between calls.

    Args:
        completion: ``[N]`` (or padded, ``[B, T]``, as ``mask`` and the result then) int64 or int32, the completion of
            each row, in any order. Negative: padding, weight 0.
        mask: ``[N]`` bool or integer, non-zero = counts. Default: every row that is not padding.
        normalizer: positive number, or a 0-d tensor on the same device (0 there gives weights 0).
        n_completions: exclusive upper bound of the ids. Saves a sort; ids beyond: an error on CPU, padding on GPU.
        dtype: of the result.

    Returns:
        ``[N]`` weights, 0 where masked. Nothing unmasked: all 0.

    Raises:
        ValueError, TypeError: wrong shape, dtype, device or ``aggregate``, non-positive or missing ``normalizer``.
    """
    _check_arguments(completion, aggregate, mask, normalizer, n_completions)
    if completion.dim() > 1:
        return token_weights(
            completion.reshape(-1), aggregate=aggregate, mask=None if mask is None else mask.reshape(-1),
            normalizer=normalizer, n_completions=n_completions, dtype=dtype,
        ).view(completion.shape)  # fmt: skip
    if n_completions is not None and dtype == torch.float32 and _takes_native(completion, mask, normalizer):
        kept = mask if mask is None or mask.dtype == torch.bool else mask != 0
        return _native.token_weights(completion, kept, n_completions, aggregate == "sequence", float(normalizer or 0))
    keep = completion >= 0
    if n_completions is not None:
        keep = keep & (completion < n_completions)
    if mask is not None:
        keep = keep & (mask != 0)
    count = keep.to(torch.int64)
    wide = torch.promote_types(dtype, torch.float32)  # 16-bit floats cannot represent counts of long answers
    if aggregate == "constant":
        per_row, last = keep.to(wide), None
    elif aggregate == "token":
        per_row, last = keep.to(wide), count.sum()
    else:
        row_count, sequences = _sequence_counts(completion, count, n_completions)
        per_row, last = keep.to(wide) / row_count.clamp(min=1).to(wide), sequences
    denominator = last if normalizer is None else normalizer
    assert denominator is not None  # "constant" without a normalizer was refused
    if not isinstance(denominator, Tensor):
        return (per_row / denominator).to(dtype)
    positive = denominator > 0
    return torch.where(positive, per_row / torch.where(positive, denominator, 1).to(wide), 0.0).to(dtype)


def _takes_native(completion: Tensor, mask: Tensor | None, normalizer: float | Tensor | None) -> bool:
    """Whether C++ computes this call. (A normalizer that is a tensor may be 0.)"""
    given = not isinstance(normalizer, Tensor) and readable(completion, mask)
    return given and _native.lacks("fastrl_token_weights") is None


def _sequence_counts(completion: Tensor, count: Tensor, n_completions: int | None) -> tuple[Tensor, Tensor]:
    """Per row: unmasked tokens of its completion ``[N]``; and how many completions have any, 0-d. No host read."""
    n = completion.shape[0]
    if n_completions is None:
        # Ids of any size: number the runs of the sorted ids 0, 1, ... (at most N of them).
        ordered, order = torch.sort(completion, stable=True)
        first = torch.ones_like(ordered)
        first[1:] = (ordered[1:] != ordered[:-1]).to(first.dtype)
        segment = torch.empty_like(order).scatter_(0, order, torch.cumsum(first, 0).to(torch.int64) - 1)
        buckets = n
    else:
        segment, buckets = completion.to(torch.int64).clamp(0, max(n_completions - 1, 0)), n_completions
    totals = torch.zeros(max(buckets, 1), dtype=torch.int64, device=completion.device).scatter_add_(0, segment, count)
    return totals[segment], (totals > 0).sum()


def _check_arguments(
    completion: Tensor,
    aggregate: str,
    mask: Tensor | None,
    normalizer: float | Tensor | None,
    n_completions: int | None,
) -> None:
    check(aggregate in AGGREGATES, f"aggregate: expected one of {', '.join(AGGREGATES)}, got {aggregate!r}")
    check_shape("completion", completion, (None, None) if completion.dim() == 2 else (None,))
    check_dtype("completion", completion, INTEGERS)
    if mask is not None:
        check_shape("mask", mask, tuple(completion.shape))
        check_dtype("mask", mask, MASKS)
    if aggregate == "constant":
        check(normalizer is not None, "normalizer: aggregate='constant' needs one (the loss is sum / normalizer)")
    if isinstance(normalizer, Tensor):
        check_shape("normalizer", normalizer, ())
    elif normalizer is not None:
        check_number("normalizer", normalizer, normalizer > 0, "a positive number")
    check_same_device(
        completion=completion, mask=mask, normalizer=normalizer if isinstance(normalizer, Tensor) else None
    )
    if n_completions is not None:
        check_number("n_completions", n_completions, n_completions >= 0, "a count")
        check_ids("completion", completion, n_completions)


def check_ids(name: str, ids: Tensor, bound: int) -> None:
    """Raise if an id is ``bound`` or more. Only on CPU (a GPU would need a host read), and not while tracing."""
    if not readable(ids) or ids.numel() == 0:
        return
    largest = int(ids.max())
    check(largest < bound, f"{name}: id {largest} is out of range, there are {bound} (ids are 0 to {bound - 1})")
