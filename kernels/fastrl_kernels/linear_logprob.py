"""Per-token log-probabilities (and entropy) from hidden states, without materialising the ``[N, V]`` logits.

    logp_i = log softmax(softcap(hidden_i W^T + bias) / temperature_i)[target_i],      H_i = -sum_j p_ij log p_ij

Why it is fast: the matmuls are cuBLAS tiles in a bounded scratch, each read once by one kernel (forward) or rewritten
in place by one kernel (backward); four matmuls in all, of which the three of the backward skip every row whose gradient
is known to be zero, and the weight's is skipped when the head is frozen. Accumulation is fp32 throughout and every
gradient is rounded once.

Gradient, with z the tempered logits, p = softmax(z), upstream g (of logp) and h (of H):

    dL/dz_j = g (1[j = target] - p_j) - h p_j (log p_j + H)
    dL/dW = (dL/ds)^T hidden, dL/dhidden = (dL/ds) W,  where ds/dz = temperature and the softcap's slope

Loops: ``_linear_logprob_driver`` (forward, token-outer) and ``_linear_logprob_backward`` (vocabulary-outer); tile
mathematics: ``_linear_logprob_tiles``; kernels: ``_linear_logprob_kernels``.
"""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl_kernels import _linear_logprob_backward, _linear_logprob_driver
from fastrl_kernels._common import (
    FLOATS,
    check,
    check_dtype,
    check_number,
    check_same_device,
    check_shape,
    refuse_forward_mode,
    shaped,
)
from fastrl_kernels._counting import Scratch, flops_of, scratch_of
from fastrl_kernels._dtensor import is_dtensor
from fastrl_kernels._linear_logprob_backward import Needs
from fastrl_kernels._linear_logprob_driver import Head, accumulator_dtype, route_of
from fastrl_kernels._linear_logprob_tiles import RowTerms, Upstream
from fastrl_kernels.token_logprob import (
    LogProb,
    check_targets,
    check_values,
    flat_rows,
    inverse_temperature,
    row_temperature,
    token_logprob_reference,
)

__all__ = ["LogProb", "linear_logprob", "linear_logprob_reference"]


@torch.library.custom_op("fastrl::linear_logprob", mutates_args=())
def _forward_op(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    rows: Tensor | None,
    temperature_value: float,
    lora_scale: float,
    softcap: float | None,
    ignore_index: int | None,
    return_entropy: bool,
    skip_zero_rows: bool,
    scratch_bytes: int,
    class_weight: Tensor | None = None,
    return_mean: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp like target, entropy [N] (empty: not asked for), log-sum-exp [N], mean log-prob [N] (empty)."""
    head = Head(weight, bias, lora_a, lora_b, lora_scale, softcap, ignore_index, scratch_bytes, class_weight)
    check_values(target, weight.shape[0], ignore_index, temperature)
    if rows is not None:
        check_rows(rows, target)
    scale = inverse_temperature(target, accumulator_dtype(hidden.dtype), temperature, temperature_value)
    with torch.autocast(hidden.device.type, enabled=False):
        out = _linear_logprob_driver.forward(
            hidden, head, target.contiguous(), scale, return_entropy=return_entropy, return_mean=return_mean
        )
    entropy, mean = (out.lse.new_zeros(0) if x is None else x for x in (out.entropy, out.mean_logp))
    return out.logp, entropy, out.lse, mean


@_forward_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, target: Tensor, *rest: Any, class_weight: Any = None, return_mean: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return_entropy, return_mean = rest[9], rest[13] if len(rest) > 13 else return_mean
    logp = hidden.new_empty(target.shape, dtype=accumulator_dtype(hidden.dtype))
    lse, entropy, mean = (logp.new_empty(target.shape[0] if x else 0) for x in (True, return_entropy, return_mean))
    return logp, entropy, lse, mean


@torch.library.custom_op("fastrl::linear_logprob_backward", mutates_args=())
def _backward_op(
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    rows: Tensor | None,
    logp: Tensor,
    entropy: Tensor | None,
    lse: Tensor,
    temperature_value: float,
    lora_scale: float,
    softcap: float | None,
    ignore_index: int | None,
    skip_zero_rows: bool,
    scratch_bytes: int,
    needs: list[bool],
    grad_lse: Tensor | None = None,
    grad_mean: Tensor | None = None,
    class_weight: Tensor | None = None,
) -> list[Tensor]:
    """Gradients of hidden, weight, bias, lora_a and lora_b, as far as they are needed."""
    head = Head(weight, bias, lora_a, lora_b, lora_scale, softcap, ignore_index, scratch_bytes, class_weight)
    scale = inverse_temperature(target, logp.dtype, temperature, temperature_value)
    if grad_entropy is None:
        entropy = None
    terms = RowTerms(target.contiguous(), scale, logp, lse, entropy)
    upstream = Upstream.of(terms, head.options, grad_logp, grad_entropy, grad_lse, grad_mean)
    with torch.autocast(hidden.device.type, enabled=False):
        made = _linear_logprob_backward.backward(hidden, head, terms, upstream, rows, skip_zero_rows, Needs(*needs))
    return [grad for grad, needed in zip(made, needs, strict=True) if needed]


@_backward_op.register_fake
def _(
    grad_logp: Tensor | None, grad_entropy: Tensor | None, hidden: Tensor, weight: Tensor, target: Tensor, *rest: Any,
    **_: Any,
) -> list[Tensor]:  # fmt: skip
    sources, needs = (hidden, weight, rest[0], rest[2], rest[3]), rest[14]
    return [source.new_empty(source.shape) for source, needed in zip(sources, needs, strict=True) if needed]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    tensors, ctx.options, class_weight, ctx.return_mean = inputs[:8], inputs[8:15], inputs[15], inputs[16]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, class_weight, *output[:3])


def _backward(
    ctx: Any,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
    grad_mean: Tensor | None,
) -> tuple[Any, ...]:
    *tensors, class_weight, logp, entropy, lse = ctx.saved_tensors
    hidden, weight, target, bias, temperature, lora_a, lora_b, rows = tensors
    temperature_value, lora_scale, softcap, ignore_index, return_entropy, skip_zero_rows, scratch_bytes = ctx.options
    needed = ctx.needs_input_grad
    needs = [needed[0], needed[1], needed[3], needed[5], needed[6]]
    if not return_entropy:
        grad_entropy = entropy = None
    if not ctx.return_mean:
        grad_mean = None
    if all(grad is None for grad in (grad_logp, grad_entropy, grad_lse, grad_mean)):
        return (None,) * len(needed)
    grads = torch.ops.fastrl.linear_logprob_backward(
        grad_logp, grad_entropy, hidden, weight, target, bias, temperature, lora_a, lora_b, rows, logp, entropy, lse,
        temperature_value, lora_scale, softcap, ignore_index, skip_zero_rows, scratch_bytes, needs,
        grad_lse, grad_mean, class_weight,
    )  # fmt: skip
    made = iter(grads)
    d_hidden, d_weight, d_bias, d_a, d_b = (next(made) if wanted else None for wanted in needs)
    return d_hidden, d_weight, None, d_bias, None, d_a, d_b, *[None] * (len(needed) - 7)


_forward_op.register_autograd(_backward, setup_context=_setup_context)


@flops_of(torch.ops.fastrl.linear_logprob)
def _(*, hidden: Any, weight: Any, lora_a: Any, **_: Any) -> int:
    return 2 * hidden[0] * weight[0] * (hidden[1] + (0 if lora_a is None else lora_a[0]))


@scratch_of(torch.ops.fastrl.linear_logprob)
def _(
    *, hidden: Tensor, target: Tensor, temperature: Any, temperature_value: float, return_entropy: bool,
    return_mean: bool, triton: bool, **named: Any,
) -> Scratch:  # fmt: skip
    head, more = _head(**named), target.dim() > 1 or return_mean
    plain = head.bias is None and head.softcap is None and temperature is None and temperature_value == 1.0
    route = route_of(hidden, triton=triton)
    held = _linear_logprob_driver.forward_bytes(hidden, head, route, entropy=return_entropy, more=more, plain=plain)
    return Scratch(held)


@flops_of(torch.ops.fastrl.linear_logprob_backward)
def _(*, hidden: Any, weight: Any, lora_a: Any, rows: Any, needs: Any, **_: Any) -> int:
    """Recomputed logits and one product per needed gradient, over the named rows; zeros found later are unknown."""
    needs = Needs(*needs)
    count, rank = hidden[0] if rows is None else rows[0], 0 if lora_a is None else lora_a[0]
    columns = hidden[1] + rank + needs.weight * hidden[1] + needs.lora_b * rank
    columns += hidden[1] + rank if needs.hidden else needs.lora_a * rank
    return 2 * count * weight[0] * columns


@scratch_of(torch.ops.fastrl.linear_logprob_backward)
def _(*, hidden: Tensor, rows: Any, grad_entropy: Any, needs: list[bool], triton: bool, **named: Any) -> Scratch:
    route, entropy = route_of(hidden, triton=triton), grad_entropy is not None
    return _linear_logprob_backward.backward_bytes(hidden, _head(**named), rows, Needs(*needs), route, entropy=entropy)


def _head(
    *, weight: Tensor, bias: Any, lora_a: Any, lora_b: Any, lora_scale: float, softcap: Any, ignore_index: Any,
    scratch_bytes: int, **_: Any,
) -> Head:  # fmt: skip
    return Head(weight, bias, lora_a, lora_b, lora_scale, softcap, ignore_index, scratch_bytes)


class HeadOptions(NamedTuple):
    """The options of ``linear_logprob``; see its docstring."""

    bias: Tensor | None = None
    temperature: float | Tensor = 1.0
    softcap: float | None = None
    ignore_index: int | None = -100
    return_entropy: bool = False
    rows: Tensor | None = None
    lora: tuple[Tensor, Tensor, float] | None = None
    skip_zero_rows: bool = False
    scratch_bytes: int = 1 << 30

    @property
    def adapter(self) -> tuple[Tensor | None, Tensor | None, float]:
        """LoRA's A, B and scale, if there is one."""
        return (None, None, 1.0) if self.lora is None else self.lora


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = -100,
    return_entropy: bool = False,
    rows: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    skip_zero_rows: bool = False,
    scratch_bytes: int = 1 << 30,
) -> LogProb:
    """Log-probability of each row's target under a linear head, without the logits.

    DTensors are taken: see ``fastrl_kernels.sharding``.

    Differentiable in ``hidden``, ``weight``, ``bias`` and the LoRA matrices; only the gradients that are needed are
    computed. Deterministic. Never synchronises a GPU, except in float64, or in the backward with ``skip_zero_rows``.

    Args:
        hidden: [N, H], or [B, T, H] with ``target`` [B, T], as all results then (``rows`` counts b T + t): bf16, fp16,
            fp32 (or fp64), any strides.
        weight: [V, H] of ``hidden``'s dtype. Under autocast both are cast as ``F.linear`` would.
        target: [N] int64 or int32, or [N, K] (``[B, T, K]``), several ids a row whose log-probs are gathered in the
            same pass; ``logp`` has its shape. A target outside [0, V) that is not ``ignore_index`` raises on a CPU and
            gives NaN on a GPU.
        bias: [V], added to the logits in fp32.
        temperature: > 0, or [N] of them; divides the logits after the softcap. No gradient.
        softcap: > 0: logits become ``softcap * tanh(logits / softcap)``.
        ignore_index: rows with this target get logp 0, entropy 0 and no gradient, whatever they hold (of several
            targets: those that are it, and the row if all are). ``None``: no row is ignored.
        return_entropy: also return the (differentiable) entropy of each row's tempered distribution, in nats.
        rows: [R] int64, distinct: the rows whose gradient may be non-zero. All others are skipped by every matmul of
            the backward; their gradient is exactly 0, whatever the upstream gradient says. The forward covers all rows.
        lora: ``(A [r, H], B [V, r], scale)``: the head is ``weight + scale B A``. Without dropout. A and B may be fp32.
        skip_zero_rows: drop the rows whose upstream gradient turns out to be exactly 0 from the backward. Costs one
            device synchronisation on a GPU; CPU tensors always do it.
        scratch_bytes: bound of all temporaries whose size would depend on V, or on N times H.

    Returns:
        ``LogProb(logp like target, entropy [N] | None)``, fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError, TypeError: wrong shape, device, dtype or value; a budget too small for the smallest tile.
    """
    options = HeadOptions(
        bias, temperature, softcap, ignore_index, return_entropy, rows, lora, skip_zero_rows, scratch_bytes
    )
    if is_dtensor(hidden) or is_dtensor(weight):
        from fastrl_kernels.sharding import sharded_linear_logprob

        return sharded_linear_logprob(hidden, weight, target, **options._asdict())
    shape, batch = target.shape, hidden.shape[:-1]
    terms = head_terms(hidden, weight, target, options)
    return LogProb(shaped(terms[0], shape), shaped(terms[1], batch) if return_entropy else None)


def head_terms(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    options: HeadOptions,
    *,
    class_weight: Tensor | None = None,
    return_mean: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, entropies, log-sum-exps and mean log-probs of the flat rows; arguments as ``linear_logprob``.

    Mean log-probs are ``sum_j class_weight_j log p_j / V``; what is not asked for is empty.
    """
    o = options
    hidden, target, temperature = flat_rows("hidden", hidden, target, o.temperature)
    hidden, weight = autocast_pair(hidden, weight)
    _check_arguments(hidden, weight, target, o)
    lora_a, lora_b, lora_scale = o.adapter
    refuse_forward_mode("linear_logprob", hidden, weight, o.bias, lora_a, lora_b)
    per_row, value = row_temperature(temperature, target)
    return _forward_op(
        hidden, weight, target, o.bias, per_row, lora_a, lora_b, o.rows, value, float(lora_scale),
        None if o.softcap is None else float(o.softcap), o.ignore_index, o.return_entropy, o.skip_zero_rows,
        o.scratch_bytes, class_weight, return_mean,
    )  # fmt: skip


def autocast_pair(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both as ``F.linear`` would take them under autocast, which leaves float64 alone."""
    kind = hidden.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # is_autocast_enabled does not accept meta
        return hidden, weight
    dtype = torch.get_autocast_dtype(kind)
    hidden, weight = (x if x.dtype == torch.float64 else x.to(dtype) for x in (hidden, weight))
    return hidden, weight


def linear_logprob_reference(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = -100,
    return_entropy: bool = False,
    rows: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    skip_zero_rows: bool = False,
    scratch_bytes: int = 1 << 30,
) -> LogProb:
    """The same function in plain torch with the whole ``[N, V]`` logits; the truth in tests. Keeps float64."""
    shape, batch = target.shape, hidden.shape[:-1]
    hidden, target, temperature = flat_rows("hidden", hidden, target, temperature)
    logits = reference_logits(hidden, weight, target, bias, softcap, ignore_index, rows, lora)
    logp, entropy = token_logprob_reference(
        logits, target, temperature=temperature, ignore_index=ignore_index, return_entropy=return_entropy
    )
    return LogProb(shaped(logp, shape), None if entropy is None else shaped(entropy, batch))


def reference_logits(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    ignore_index: int | None,
    rows: Tensor | None,
    lora: tuple[Tensor, Tensor, float] | None,
) -> Tensor:
    """The logits [N, V] of flat rows; only ``rows`` have a gradient, if given."""
    kind = accumulator_dtype(hidden.dtype)
    if ignore_index is not None:
        targets = target if target.dim() > 1 else target[:, None]
        hidden = hidden.masked_fill((targets == ignore_index).all(1, keepdim=True), 0)
    if rows is not None:
        kept = torch.zeros(hidden.shape[:1], dtype=torch.bool, device=rows.device).index_fill_(0, rows, True)[:, None]
        hidden = torch.where(kept, hidden, hidden.detach())
    wide = hidden.to(kind)
    logits = wide @ weight.to(kind).T
    if lora is not None:
        a, b, scale = lora
        logits = logits + scale * (wide @ a.to(kind).T) @ b.to(kind).T
    if bias is not None:
        logits = logits + bias.to(kind)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if rows is not None:  # only the chosen rows have a gradient
        logits = torch.where(kept, logits, logits.detach())
    return logits


def check_rows(rows: Tensor, target: Tensor) -> None:
    if rows.device.type == "cpu" and rows.numel():
        n, low, high = target.shape[0], int(rows.min()), int(rows.max())
        check(low >= 0 and high < n, f"rows: expected indices in 0..{n - 1}, got {low}..{high}")
        check(rows.unique().numel() == rows.numel(), "rows: expected distinct indices, got repeated ones")


def _check_arguments(hidden: Tensor, weight: Tensor, target: Tensor, options: HeadOptions) -> None:
    bias, softcap, rows, scratch_bytes = options.bias, options.softcap, options.rows, options.scratch_bytes
    lora_a, lora_b, _ = options.adapter
    check_shape("hidden", hidden, (None, None))
    check_shape("weight", weight, (None, hidden.shape[1]))
    check(weight.shape[0] > 0, "weight: expected at least one row (vocabulary entry), got 0")
    check_targets(target, hidden.shape[0])
    check_dtype("hidden", hidden, FLOATS)
    check_dtype("weight", weight, (hidden.dtype,))
    check_same_device(hidden=hidden, weight=weight, target=target, bias=bias, rows=rows, lora_A=lora_a, lora_B=lora_b)
    if bias is not None:
        check_shape("bias", bias, (weight.shape[0],))
        check_dtype("bias", bias, FLOATS)
    if rows is not None:
        check_shape("rows", rows, (None,))
        check_dtype("rows", rows, (torch.int64,))
    if lora_a is not None and lora_b is not None:
        check_shape("lora A", lora_a, (None, hidden.shape[1]))
        check_shape("lora B", lora_b, (weight.shape[0], lora_a.shape[0]))
        check_dtype("lora A", lora_a, FLOATS)
        check_dtype("lora B", lora_b, FLOATS)
    check_number("softcap", softcap, softcap is None or 0 < softcap < math.inf, "a finite number > 0")
    whole = isinstance(scratch_bytes, Integral) and scratch_bytes > 0
    check_number("scratch_bytes", scratch_bytes, whole, "a whole number > 0")
