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
    differentiate_tile,
    fold_tile,
    triton_path,
)

__all__ = ["LogProb", "token_logprob", "token_logprob_reference"]

_EAGER_BYTES = 16 << 20  # the torch path works on copies of a few rows at a time


class LogProb(NamedTuple):
    """Per-token results, fp32 (fp64 for fp64 inputs); 0 in ignored rows."""

    logp: Tensor  # [N] log-probability of the target, nats
    entropy: Tensor | None  # [N] entropy of the tempered distribution, nats; None: not requested


@torch.library.custom_op("fastrl::token_logprob", mutates_args=())
def _forward_op(
    logits: Tensor,
    target: Tensor,
    temperature: Tensor | None,
    temperature_value: float,
    ignore_index: int | None,
    return_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_values(target, logits.shape[1], ignore_index, temperature)
    kind = accumulator_dtype(logits.dtype)
    outputs = [logits.new_zeros(logits.shape[0], dtype=kind) for _ in range(3 if return_entropy else 2)]
    scale = inverse_temperature(target, kind, temperature, temperature_value)
    entropy = outputs[2] if return_entropy else None
    rows = RowTerms(target.contiguous(), scale, outputs[0], outputs[1], entropy)
    options = _options(logits, ignore_index)
    state = logits.new_empty((4, logits.shape[0]), dtype=kind)
    if triton_path(logits):
        fold_tile(_unit_columns(logits), 0, options, rows, state)
    else:
        for start, end in ranges(logits.shape[0], _eager_rows(logits)):
            tile = logits[start:end].to(kind)  # only read
            fold_tile(tile, 0, options, rows.part(start, end), state[:, start:end])
    return rows.logp, rows.logp.new_zeros(0) if entropy is None else entropy, rows.lse


@_forward_op.register_fake
def _(
    logits: Tensor,
    target: Tensor,
    temperature: Tensor | None,
    temperature_value: float,
    ignore_index: int | None,
    return_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    logp = logits.new_empty(logits.shape[0], dtype=accumulator_dtype(logits.dtype))
    return logp, torch.empty_like(logp) if return_entropy else logp.new_empty(0), torch.empty_like(logp)


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
) -> None:
    scale = inverse_temperature(target, logp.dtype, temperature, temperature_value)
    upstream = torch.zeros_like(logp) if grad_logp is None else grad_logp.to(logp.dtype).contiguous()
    upstream_entropy = None if grad_entropy is None else grad_entropy.to(logp.dtype).contiguous()
    rows = RowTerms(target.contiguous(), scale, logp, lse, None if grad_entropy is None else entropy)
    options = _options(logits, ignore_index)
    if triton_path(logits):
        source, sink = _unit_columns(logits), _unit_columns(out)
        differentiate_tile(source, sink, 0, options, rows, upstream, upstream_entropy)
        if sink is not out:
            out.copy_(sink)
        return
    for start, end in ranges(logits.shape[0], _eager_rows(logits)):
        part = slice(start, end)
        here = out[part]
        if out.dtype != logp.dtype:
            tile = logits[part].to(logp.dtype)
        else:  # the output buffer may be the logits themselves
            tile = here if out is logits else here.copy_(logits[part])
        some = None if upstream_entropy is None else upstream_entropy[part]
        differentiate_tile(tile, tile, 0, options, rows.part(start, end), upstream[part], some)
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
) -> Tensor:
    out = logits.new_empty(logits.shape)
    _gradient(
        logits, out, target, temperature, temperature_value, ignore_index, logp, entropy, lse, grad_logp, grad_entropy
    )
    return out


@_backward_op.register_fake
def _(logits: Tensor, *rest: Any) -> Tensor:
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
) -> None:
    _gradient(
        logits, logits, target, temperature, temperature_value, ignore_index, logp, entropy, lse, grad_logp,
        grad_entropy,
    )  # fmt: skip


@_backward_inplace_op.register_fake
def _(logits: Tensor, *rest: Any) -> None:
    return None


@torch.library.custom_op("fastrl::token_logprob_consuming", mutates_args=())
def _consuming_op(
    logits: Tensor,
    target: Tensor,
    temperature: Tensor | None,
    temperature_value: float,
    ignore_index: int | None,
    return_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same forward; its backward writes the gradient over the logits."""
    return _forward_op(logits, target, temperature, temperature_value, ignore_index, return_entropy)


@_consuming_op.register_fake
def _(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _forward_op(logits, *rest)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, target, temperature, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, target, temperature, *output)


def _arguments(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> tuple[Any, ...] | None:
    logits, target, temperature, logp, entropy, lse = ctx.saved_tensors
    temperature_value, ignore_index, return_entropy = ctx.options
    if not return_entropy:
        grad_entropy = None
    if grad_logp is None and grad_entropy is None:
        return None
    return (
        logits, target, temperature, temperature_value, ignore_index, logp, entropy if return_entropy else None, lse,
        grad_logp, grad_entropy,
    )  # fmt: skip


def _backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    arguments = _arguments(ctx, grad_logp, grad_entropy)
    gradient = None if arguments is None else torch.ops.fastrl.token_logprob_backward(*arguments)
    return gradient, None, None, None, None, None


def _backward_consuming(
    ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None, _: Tensor | None
) -> tuple[Any, ...]:
    arguments = _arguments(ctx, grad_logp, grad_entropy)
    if arguments is None:
        return (None,) * 6
    torch.ops.fastrl.token_logprob_backward_(*arguments)
    return arguments[0].detach(), None, None, None, None, None


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
        target: [N] int64 or int32. A target outside [0, V) that is not ``ignore_index`` raises on a CPU and gives NaN
            on a GPU.
        temperature: > 0, or [N] of them; divides the logits. No gradient. ignore_index: rows with this target get logp
        0, entropy 0 and no gradient, even if they hold NaN. ``None``: none. return_entropy: also return the
        (differentiable) entropy of each row's tempered distribution, in nats. inplace_backward: the backward overwrites
        the logits with the gradient and allocates nothing of their size. Autograd raises if another backward needs the
            logits afterwards. The ``grad`` of a leaf uses that memory too.

    Returns:
        ``LogProb(logp [N], entropy [N] | None)``, fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError, TypeError: wrong shape, device, dtype or value; ``inplace_backward`` on logits that share memory
        between elements.
    """
    shape = target.shape
    logits, target, temperature = flat_rows("logits", logits, target, temperature)
    check_shape("logits", logits, (None, None))
    check(logits.shape[1] > 0, "logits: expected at least one column (vocabulary entry), got 0")
    check_dtype("logits", logits, FLOATS)
    check_shape("target", target, (logits.shape[0],))
    check_dtype("target", target, (torch.int64,))
    check_same_device(logits=logits, target=target)
    refuse_forward_mode("token_logprob", logits)
    per_row, value = row_temperature(temperature, target)
    op = _forward_op
    if inplace_backward and logits.requires_grad:
        spread = all(stride > 0 or size == 1 for stride, size in zip(logits.stride(), logits.shape, strict=True))
        check(spread, "inplace_backward: logits are an expanded view, their elements share memory")
        op = _consuming_op
    logp, entropy, _ = op(logits, target, per_row, value, ignore_index, return_entropy)
    if len(shape) > 1:
        logp, entropy = logp.view(shape), entropy.view(shape) if return_entropy else entropy
    return LogProb(logp, entropy if return_entropy else None)


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
    shape = target.shape
    logits, target, temperature = flat_rows("logits", logits, target, temperature)
    rowwise = isinstance(temperature, Tensor) and temperature.dim() > 0
    divisor = temperature[:, None] if rowwise else temperature  # type: ignore[index]
    z = logits.to(accumulator_dtype(logits.dtype))
    ignored = torch.zeros_like(target, dtype=torch.bool) if ignore_index is None else target == ignore_index
    log_p = torch.log_softmax((z / divisor).masked_fill(ignored[:, None], 0), 1)
    logp = log_p.gather(1, target.masked_fill(ignored, 0)[:, None])[:, 0].masked_fill(ignored, 0)
    if not return_entropy:
        return LogProb(logp.view(shape), None)
    terms = torch.where(log_p == -torch.inf, 0, log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min))
    return LogProb(logp.view(shape), -terms.sum(1).masked_fill(ignored, 0).view(shape))


def flat_rows(
    name: str, x: Tensor, target: Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor, float | Tensor]:
    """[B, T, ..] rows with [B, T] targets as [B T] of them; int32 targets as int64."""
    if x.dim() == 3:
        check_shape("target", target, tuple(x.shape[:2]))
        if isinstance(temperature, Tensor) and temperature.dim() == 2:
            check_shape("temperature", temperature, tuple(x.shape[:2]))
            temperature = temperature.reshape(-1)
        x, target = x.reshape(-1, x.shape[2]), target.reshape(-1)
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
        row = int(outside.nonzero()[0])
        allowed = f"0..{vocabulary - 1}" + ("" if ignore_index is None else f" or ignore_index {ignore_index}")
        raise ValueError(f"target: row {row} is {int(target[row])}, expected {allowed}")
    if temperature is not None:
        check(bool((temperature > 0).all()), f"temperature: expected > 0, got {float(temperature.min())}")


def _options(logits: Tensor, ignore_index: int | None) -> TileOptions:
    return TileOptions(logits.shape[1], None, None, NO_IGNORE if ignore_index is None else ignore_index)


def _unit_columns(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def _eager_rows(logits: Tensor) -> int:
    size = accumulator_dtype(logits.dtype).itemsize
    return max(1, _EAGER_BYTES // (max(1, logits.shape[1]) * size))
