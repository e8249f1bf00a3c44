"""Cross-entropy of heads and of logits: class weights, label smoothing and z-loss, as ``F.cross_entropy`` has them.

With ``z`` the (tempered, capped) logits of row i, ``p = softmax(z)``, target ``t``, class weights ``c`` (or 1),
smoothing ``e`` and ``V`` classes:

    loss_i = -(1 - e) c_t log p_t  -  e / V sum_j c_j log p_j  +  z_loss (log sum_j exp z_j)^2

(label smoothing: Szegedy et al., arXiv 1512.00567 sec. 7; z-loss: PaLM, arXiv 2204.02311 sec. 5.) ``"mean"`` divides
the first two terms by the sum of ``c_t`` and the last by the number of rows, over rows that are not ignored.

Why it is fast: all three sums come from the one pass over the vocabulary that also gives ``linear_logprob`` its
log-probs, and their gradient from its one backward pass:

    dL/dz_j = g 1[j = t] + u c_j - p_j (g + u sum(c) - q)

with upstream ``g`` (of log p_t), ``V u`` (of ``mean_logp = sum_j c_j log p_j / V``) and ``q`` (of the log-sum-exp).
There is no kernel here; see ``_linear_logprob_tiles``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastrl_kernels._common import FLOATS, check, check_dtype, check_number, check_shape, refuse_forward_mode
from fastrl_kernels._linear_logprob_driver import accumulator_dtype
from fastrl_kernels.linear_logprob import HeadOptions, head_terms, reference_logits
from fastrl_kernels.token_logprob import flat_rows, logit_terms

__all__ = ["cross_entropy", "cross_entropy_reference", "linear_cross_entropy", "linear_cross_entropy_reference"]

REDUCTIONS = ("mean", "sum", "none")


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    temperature: float | Tensor = 1.0,
    inplace_backward: bool = False,
) -> Tensor:
    """``F.cross_entropy`` of class ids in one read of the logits, with z-loss; formula at the top of this file.

    Args:
        logits: [N, V], or [B, T, V] with ``target`` [B, T] (classes last, unlike ``F.cross_entropy``): bf16, fp16, fp32
            (or fp64). Differentiable, once.
        target: [N] int64 or int32. One outside [0, V) that is not ``ignore_index`` raises on a CPU and gives NaN on a
            GPU.
        weight: [V] class weights. Constant.
        ignore_index: rows with this target have loss 0 and no gradient, even if they hold NaN.
        reduction: ``"mean"`` (NaN if every row is ignored, as torch's), ``"sum"`` or ``"none"``.
        label_smoothing: in [0, 1].
        z_loss: weight of the squared log-sum-exp, >= 0. The temperature comes before it.
        temperature, inplace_backward: as ``token_logprob``.

    Returns:
        0-d, or like ``target`` with ``"none"``; fp32 (fp64 for fp64 logits).

    Raises:
        ValueError, TypeError: wrong shape, device, dtype or value.
    """
    refuse_forward_mode("cross_entropy", logits)
    vocabulary = logits.shape[-1] if logits.dim() else 0
    weight = _check_options(weight, vocabulary, target, reduction, label_smoothing, z_loss)
    terms = logit_terms(
        logits, target, temperature=temperature, ignore_index=ignore_index, inplace_backward=inplace_backward,
        class_weight=weight if label_smoothing else None, return_mean=bool(label_smoothing),
    )  # fmt: skip
    return _combine(terms, target, weight, ignore_index, reduction, label_smoothing, z_loss)


def linear_cross_entropy(
    hidden: Tensor,
    head_weight: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    **head: Any,
) -> Tensor:
    """``cross_entropy(hidden @ head_weight.T, target, weight)`` without the logits; formula at the top of this file.

    Args:
        hidden: [N, H], or [B, T, H] with ``target`` [B, T]. Differentiable once, as are the head's matrices.
        head_weight: [V, H].
        target, weight, ignore_index, reduction, label_smoothing, z_loss: as ``cross_entropy``.
        head: ``bias``, ``temperature``, ``softcap``, ``rows``, ``lora``, ``skip_zero_rows`` and ``scratch_bytes`` of
            ``linear_logprob``.

    Returns:
        0-d, or like ``target`` with ``"none"``; fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError, TypeError: wrong shape, device, dtype or value; a budget too small for the smallest tile.
    """
    options = HeadOptions(ignore_index=ignore_index, **head)
    refuse_forward_mode("linear_cross_entropy", hidden, head_weight, options.bias, *options.adapter[:2])
    vocabulary = head_weight.shape[0] if head_weight.dim() else 0
    weight = _check_options(weight, vocabulary, target, reduction, label_smoothing, z_loss)
    terms = head_terms(
        hidden, head_weight, target, options,
        class_weight=weight if label_smoothing else None, return_mean=bool(label_smoothing),
    )  # fmt: skip
    return _combine(terms, target, weight, ignore_index, reduction, label_smoothing, z_loss)


def _check_options(
    weight: Tensor | None, vocabulary: int, target: Tensor, reduction: str, label_smoothing: float, z_loss: float
) -> Tensor | None:
    """Raise on a wrong argument; returns the weights as constants."""
    check(reduction in REDUCTIONS, f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    check_number("label_smoothing", label_smoothing, 0 <= label_smoothing <= 1, "a number in [0, 1]")
    check_number("z_loss", z_loss, 0 <= z_loss < math.inf, "a finite number >= 0")
    check(not target.is_floating_point(), "target: expected class ids, got probabilities (a floating-point tensor)")
    if weight is None:
        return None
    check_shape("weight", weight, (vocabulary,))
    check_dtype("weight", weight, FLOATS)
    check(weight.device == target.device, f"weight: on {weight.device}, but target on {target.device}")
    return weight.detach().contiguous()


def _combine(
    terms: tuple[Tensor, Tensor, Tensor, Tensor],
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """The row terms as the loss: a few vectors of [N]."""
    logp, _, lse, mean = terms
    check(logp.dim() == 1, f"target: expected one id a row, got shape {list(target.shape)}")
    flat = target.reshape(-1)
    counted = flat != ignore_index
    own = counted.to(logp.dtype)
    if weight is not None:
        own = own * weight.to(logp.dtype)[torch.where(counted, flat, 0).clamp(0, weight.shape[0] - 1)]
    loss = -own * logp
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * mean
    square = z_loss * lse.square() if z_loss else None
    if reduction == "none":
        return (loss if square is None else loss + square).view(target.shape)
    total = loss.sum()
    if reduction == "sum":
        return total if square is None else total + square.sum()
    total = total / own.sum()
    return total if square is None else total + square.sum() / counted.sum()


def cross_entropy_reference(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    temperature: float | Tensor = 1.0,
    inplace_backward: bool = False,
) -> Tensor:
    """The same function by torch's own ``F.cross_entropy``, the reference in tests. Keeps float64."""
    shape = target.shape
    logits, target, temperature = flat_rows("logits", logits, target, temperature)
    counted = target != ignore_index
    z = logits.to(accumulator_dtype(logits.dtype)).masked_fill(~counted[:, None], 0)
    rowwise = isinstance(temperature, Tensor) and temperature.dim() > 0
    z = z / (temperature[:, None] if rowwise else temperature)  # type: ignore[index]
    loss = torch.nn.functional.cross_entropy(
        z, target, None if weight is None else weight.to(z.dtype), ignore_index=ignore_index, reduction=reduction,
        label_smoothing=label_smoothing,
    )  # fmt: skip
    square = z_loss * torch.where(counted, z.logsumexp(1), 0).square()
    if reduction == "none":
        return (loss + square).view(shape)
    return loss + (square.sum() / counted.sum() if reduction == "mean" else square.sum())


def linear_cross_entropy_reference(
    hidden: Tensor,
    head_weight: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    rows: Tensor | None = None,
    scratch_bytes: int = 1 << 30,
    skip_zero_rows: bool = False,
    **options: Any,
) -> Tensor:
    """``cross_entropy_reference`` of the whole logits; the truth in tests. Keeps float64."""
    shape, temperature = target.shape, options.pop("temperature", 1.0)
    hidden, target, temperature = flat_rows("hidden", hidden, target, temperature)
    ignored = options.get("ignore_index", -100)
    logits = reference_logits(hidden, head_weight, target, bias, softcap, ignored, rows, lora)
    loss = cross_entropy_reference(logits, target, weight, temperature=temperature, **options)
    return loss.view(shape) if loss.dim() else loss
