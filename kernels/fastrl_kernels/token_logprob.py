"""Per-token log-probabilities (and entropy) of given logits.

    logp_i = log softmax(logits_i / temperature_i)[target_i],      H_i = -sum_j p_ij log p_ij

It is memory-bound, so the forward reads every logit once and writes three numbers per row; the backward reads each once
and writes its gradient once, into the logits' own storage if the caller allows it. A row is one tile of the head's
kernels (``_linear_logprob_kernels``), so both operators use the same code; sizes are runtime values, so a new
vocabulary size does not recompile. Gradient, with upstream g (of logp) and h (of H), p the tempered softmax:

    dL/dlogits_j = (g (1[j = target] - p_j) - h p_j (log p_j + H)) / temperature
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl_kernels._common import (
    FLOATS,
    check,
    check_dtype,
    check_number,
    check_same_device,
    check_shape,
    refuse_forward_mode,
)
from fastrl_kernels._linear_logprob_driver import accumulator_dtype, ranges
from fastrl_kernels._linear_logprob_tiles import (
    NO_IGNORE,
    RowTerms,
    TileOptions,
    Upstream,
    differentiate_tile,
    differentiates_apart,
    fold_tile,
    triton_path,
)

__all__ = ["LogProb", "token_logprob", "token_logprob_reference"]

MAX_TARGETS = 1024  # ids a row, which a program of the kernels holds at once
_EAGER_BYTES = 16 << 20  # the torch path works on copies of a few rows at a time


class LogProb(NamedTuple):
    """Per-token results, fp32 (fp64 for fp64 inputs); 0 in ignored rows."""

    logp: Tensor  # [N] log-probability of the target, nats; [N, K] of several targets a row
    entropy: Tensor | None  # [N] entropy of the tempered distribution, nats; None: not requested


@torch.library.custom_op("fastrl::token_logprob", mutates_args=())
def _forward_op(
    logits: Tensor,
    target: Tensor,
    temperature: Tensor | None,
    temperature_value: float,
    ignore_index: int | None,
    return_entropy: bool,
    class_weight: Tensor | None = None,
    return_mean: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp like target, entropy [N] (empty: not asked for), log-sum-exp [N], mean log-prob [N] (empty)."""
    check_values(target, logits.shape[1], ignore_index, temperature)
    kind = accumulator_dtype(logits.dtype)

    def zeros(wanted: bool = True) -> Tensor | None:
        return logits.new_zeros(logits.shape[0], dtype=kind) if wanted else None

    scale = inverse_temperature(target, kind, temperature, temperature_value)
    logp = logits.new_zeros(target.shape, dtype=kind)
    rows = RowTerms(target.contiguous(), scale, logp, zeros(), zeros(return_entropy), zeros(return_mean))  # type: ignore[arg-type]
    options = _options(logits, ignore_index, class_weight)
    state = rows.new_state(logits.shape[0])
    if triton_path(logits):
        fold_tile(_unit_columns(logits), 0, options, rows, state)
    else:
        for start, end in ranges(logits.shape[0], _eager_rows(logits)):
            tile = logits[start:end].to(kind)  # only read
            fold_tile(tile, 0, options, rows.part(start, end), state[:, start:end])
    entropy, mean = (rows.lse.new_zeros(0) if x is None else x for x in (rows.entropy, rows.mean_logp))
    return rows.logp, entropy, rows.lse, mean


@_forward_op.register_fake
def _(
    logits: Tensor,
    target: Tensor,
    temperature: Tensor | None,
    temperature_value: float,
    ignore_index: int | None,
    return_entropy: bool,
    class_weight: Tensor | None = None,
    return_mean: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logp = logits.new_empty(target.shape, dtype=accumulator_dtype(logits.dtype))
    lse, entropy, mean = (logp.new_empty(logits.shape[0] if x else 0) for x in (True, return_entropy, return_mean))
    return logp, entropy, lse, mean


def _gradient(
    logits: Tensor,
    out: Tensor,
    target: Tensor,
    temperature: Tensor | None,
    temperature_value: float,
    ignore_index: int | None,
    logp: Tensor,
    entropy: Tensor | None,
    lse: Tensor,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
    grad_mean: Tensor | None,
    class_weight: Tensor | None,
) -> None:
    scale = inverse_temperature(target, logp.dtype, temperature, temperature_value)
    rows = RowTerms(target.contiguous(), scale, logp, lse, None if grad_entropy is None else entropy)
    options = _options(logits, ignore_index, class_weight)
    upstream = Upstream.of(rows, options, grad_logp, grad_entropy, grad_lse, grad_mean)
    if triton_path(logits):
        source, sink = _unit_columns(logits), _unit_columns(out)
        differentiate_tile(source, sink, 0, options, rows, upstream)
        if sink is not out:
            out.copy_(sink)
        return
    for start, end in ranges(logits.shape[0], _eager_rows(logits)):
        part = slice(start, end)
        here, mine = out[part], rows.part(start, end)
        if differentiates_apart(logits[part], here, options, mine, upstream.part(start, end)):
            differentiate_tile(logits[part], here, 0, options, mine, upstream.part(start, end))
            continue
        if out.dtype != logp.dtype:
            tile = logits[part].to(logp.dtype)
        else:  # the output buffer may be the logits themselves
            tile = here if out is logits else here.copy_(logits[part])
        differentiate_tile(tile, tile, 0, options, mine, upstream.part(start, end))
        if tile is not here:
            here.copy_(tile)


@torch.library.custom_op("fastrl::token_logprob_backward", mutates_args=())
def _backward_op(
    logits: Tensor,
    target: Tensor,
    temperature: Tensor | None,
    temperature_value: float,
    ignore_index: int | None,
    logp: Tensor,
    entropy: Tensor | None,
    lse: Tensor,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None = None,
    grad_mean: Tensor | None = None,
    class_weight: Tensor | None = None,
) -> Tensor:
    out = logits.new_empty(logits.shape)
    _gradient(
        logits, out, target, temperature, temperature_value, ignore_index, logp, entropy, lse, grad_logp, grad_entropy,
        grad_lse, grad_mean, class_weight,
    )  # fmt: skip
    return out


@_backward_op.register_fake
def _(logits: Tensor, *rest: Any, **_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


@torch.library.custom_op("fastrl::token_logprob_backward_", mutates_args=("logits",))
def _backward_inplace_op(
    logits: Tensor,
    target: Tensor,
    temperature: Tensor | None,
    temperature_value: float,
    ignore_index: int | None,
    logp: Tensor,
    entropy: Tensor | None,
    lse: Tensor,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None = None,
    grad_mean: Tensor | None = None,
    class_weight: Tensor | None = None,
) -> None:
    _gradient(
        logits, logits, target, temperature, temperature_value, ignore_index, logp, entropy, lse, grad_logp,
        grad_entropy, grad_lse, grad_mean, class_weight,
    )  # fmt: skip


@_backward_inplace_op.register_fake
def _(logits: Tensor, *rest: Any, **_: Any) -> None:
    return None


@torch.library.custom_op("fastrl::token_logprob_consuming", mutates_args=())
def _consuming_op(
    logits: Tensor,
    target: Tensor,
    temperature: Tensor | None,
    temperature_value: float,
    ignore_index: int | None,
    return_entropy: bool,
    class_weight: Tensor | None = None,
    return_mean: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same forward; its backward writes the gradient over the logits."""
    return _forward_op(
        logits, target, temperature, temperature_value, ignore_index, return_entropy, class_weight, return_mean
    )


@_consuming_op.register_fake
def _(logits: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _forward_op(logits, *rest, **named)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    logits, target, temperature, *ctx.options, class_weight, ctx.return_mean = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, target, temperature, class_weight, *output[:3])


def _arguments(
    ctx: Any,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
    grad_mean: Tensor | None,
) -> tuple[Any, ...] | None:
    logits, target, temperature, class_weight, logp, entropy, lse = ctx.saved_tensors
    temperature_value, ignore_index, return_entropy = ctx.options
    if not return_entropy:
        grad_entropy = None
    if not ctx.return_mean:
        grad_mean = None
    if all(grad is None for grad in (grad_logp, grad_entropy, grad_lse, grad_mean)):
        return None
    return (
        logits, target, temperature, temperature_value, ignore_index, logp, entropy if return_entropy else None, lse,
        grad_logp, grad_entropy, grad_lse, grad_mean, class_weight,
    )  # fmt: skip


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    arguments = _arguments(ctx, *grads)
    gradient = None if arguments is None else torch.ops.fastrl.token_logprob_backward(*arguments)
    return gradient, *[None] * (len(ctx.needs_input_grad) - 1)


def _backward_consuming(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    arguments = _arguments(ctx, *grads)
    others = [None] * (len(ctx.needs_input_grad) - 1)
    if arguments is None:
        return None, *others
    torch.ops.fastrl.token_logprob_backward_(*arguments)
    return arguments[0].detach(), *others


_forward_op.register_autograd(_backward, setup_context=_setup_context)
_consuming_op.register_autograd(_backward_consuming, setup_context=_setup_context)


def token_logprob(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int | None = -100,
    return_entropy: bool = False,
    inplace_backward: bool = False,
) -> LogProb:
    """Log-probability of each row's target, from logits.

    Args:
        logits: [N, V], or [B, T, V] with ``target`` [B, T] (results are then [B, T]): bf16, fp16, fp32 (or fp64); any
            strides, fastest with unit column stride.
        target: [N] int64 or int32, or [N, K] (``[B, T, K]``), several ids a row; ``logp`` has its shape. A target
            outside [0, V) that is not ``ignore_index`` raises on a CPU and gives NaN on a GPU.
        temperature: > 0, or [N] of them; divides the logits. No gradient.
        ignore_index: rows with this target get logp 0, entropy 0 and no gradient, even if they hold NaN (of several
            targets: those that are it, and the row if all are). ``None``: none.
        return_entropy: also return the (differentiable) entropy of each row's tempered distribution, in nats.
        inplace_backward: the backward overwrites the logits with the gradient and allocates nothing of their size.
            Autograd raises if another backward needs the logits afterwards. The ``grad`` of a leaf uses that memory
            too.

    Returns:
        ``LogProb(logp like target, entropy [N] | None)``, fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError, TypeError: wrong shape, device, dtype or value; ``inplace_backward`` on logits that share memory
        between elements.
    """
    shape, batch = target.shape, logits.shape[:-1]
    terms = logit_terms(
        logits, target, temperature=temperature, ignore_index=ignore_index, return_entropy=return_entropy,
        inplace_backward=inplace_backward,
    )  # fmt: skip
    return LogProb(terms[0].view(shape), terms[1].view(batch) if return_entropy else None)


def logit_terms(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int | None = -100,
    return_entropy: bool = False,
    inplace_backward: bool = False,
    class_weight: Tensor | None = None,
    return_mean: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, entropies, log-sum-exps and mean log-probs of the flat rows; arguments as ``token_logprob``.

    Mean log-probs are ``sum_j class_weight_j log p_j / V``; what is not asked for is empty.
    """
    logits, target, temperature = flat_rows("logits", logits, target, temperature)
    check_shape("logits", logits, (None, None))
    check(logits.shape[1] > 0, "logits: expected at least one column (vocabulary entry), got 0")
    check_dtype("logits", logits, FLOATS)
    check_targets(target, logits.shape[0])
    check_same_device(logits=logits, target=target, class_weight=class_weight)
    refuse_forward_mode("token_logprob", logits)
    per_row, value = row_temperature(temperature, target)
    op = _forward_op
    if inplace_backward and logits.requires_grad:
        spread = all(stride > 0 or size == 1 for stride, size in zip(logits.stride(), logits.shape, strict=True))
        check(spread, "inplace_backward: logits are an expanded view, their elements share memory")
        op = _consuming_op
    return op(logits, target, per_row, value, ignore_index, return_entropy, class_weight, return_mean)


def token_logprob_reference(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int | None = -100,
    return_entropy: bool = False,
    inplace_backward: bool = False,
) -> LogProb:
    """The same function in plain torch, the reference in tests. Keeps float64."""
    shape, batch = target.shape, logits.shape[:-1]
    logits, target, temperature = flat_rows("logits", logits, target, temperature)
    targets = target if target.dim() > 1 else target[:, None]
    rowwise = isinstance(temperature, Tensor) and temperature.dim() > 0
    divisor = temperature[:, None] if rowwise else temperature  # type: ignore[index]
    z = logits.to(accumulator_dtype(logits.dtype))
    skipped = torch.zeros_like(targets, dtype=torch.bool) if ignore_index is None else targets == ignore_index
    ignored = skipped.all(1)
    log_p = torch.log_softmax((z / divisor).masked_fill(ignored[:, None], 0), 1)
    logp = log_p.gather(1, targets.masked_fill(skipped, 0)).masked_fill(skipped, 0)
    if not return_entropy:
        return LogProb(logp.view(shape), None)
    terms = torch.where(log_p == -torch.inf, 0, log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min))
    return LogProb(logp.view(shape), -terms.sum(1).masked_fill(ignored, 0).view(batch))


def flat_rows(
    name: str, x: Tensor, target: Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor, float | Tensor]:
    """[B, T, ..] rows with [B, T] or [B, T, K] targets as [B T] of them; int32 targets as int64."""
    if x.dim() == 3:
        several = target.dim() == 3
        check_shape("target", target, (*x.shape[:2], *[None] * several))
        if isinstance(temperature, Tensor) and temperature.dim() == 2:
            check_shape("temperature", temperature, tuple(x.shape[:2]))
            temperature = temperature.reshape(-1)
        x, target = x.reshape(-1, x.shape[2]), target.reshape(x.shape[0] * x.shape[1], *target.shape[2:])
    else:
        check_shape(name, x, (None, None))
    return x, target.long() if target.dtype == torch.int32 else target, temperature


def row_temperature(temperature: float | Tensor, target: Tensor) -> tuple[Tensor | None, float]:
    """Split a temperature argument into ([N] tensor or None, number), checked."""
    if isinstance(temperature, Tensor) and temperature.ndim:
        check_shape("temperature", temperature, (target.shape[0],))
        check_dtype("temperature", temperature, FLOATS)
        check_same_device(target=target, temperature=temperature)
        return temperature.detach(), 1.0
    if isinstance(temperature, Tensor):
        check_same_device(target=target, temperature=temperature)
        return temperature.detach().expand(target.shape[0]), 1.0
    good = 1e-30 <= temperature < math.inf  # the reciprocal must be finite in float32
    check_number("temperature", temperature, good, "a finite number > 0 (from 1e-30)")
    return None, float(temperature)


def inverse_temperature(target: Tensor, kind: torch.dtype, temperature: Tensor | None, value: float) -> Tensor:
    """1 / temperature as [N]."""
    if temperature is None:
        return torch.full((target.shape[0],), 1.0 / value, dtype=kind, device=target.device)
    return temperature.to(kind).reciprocal()


def check_values(target: Tensor, vocabulary: int, ignore_index: int | None, temperature: Tensor | None) -> None:
    """Checks made on a CPU only, as a GPU would have to synchronise: targets in range, temperatures above 0."""
    if target.device.type != "cpu" or target.numel() == 0:
        return
    outside = (target < 0) | (target >= vocabulary)
    if ignore_index is not None:
        outside &= target != ignore_index
    if bool(outside.any()):
        row = int(outside.nonzero()[0, 0])
        allowed = f"0..{vocabulary - 1}" + ("" if ignore_index is None else f" or ignore_index {ignore_index}")
        raise ValueError(f"target: row {row} is {int(target[outside][0])}, expected {allowed}")
    if temperature is not None:
        check(bool((temperature > 0).all()), f"temperature: expected > 0, got {float(temperature.min())}")


def check_targets(target: Tensor, rows: int) -> None:
    """Raise unless ``target`` is [rows] or [rows, K] int64."""
    several = target.dim() == 2
    check_shape("target", target, (rows, *[None] * several))
    check_dtype("target", target, (torch.int64,))
    if several:
        check_number("target", target.shape[1], 1 <= target.shape[1] <= MAX_TARGETS, f"1 to {MAX_TARGETS} ids a row")


def _options(logits: Tensor, ignore_index: int | None, class_weight: Tensor | None) -> TileOptions:
    ignore = NO_IGNORE if ignore_index is None else ignore_index
    return TileOptions(logits.shape[1], None, None, ignore, class_weight)


def _unit_columns(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def _eager_rows(logits: Tensor) -> int:
    size = accumulator_dtype(logits.dtype).itemsize
    return max(1, _EAGER_BYTES // (max(1, logits.shape[1]) * size))
