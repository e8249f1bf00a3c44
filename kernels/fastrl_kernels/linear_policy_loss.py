"""The clipped policy loss from hidden states, with gradients computed in the forward: three matmuls instead of four.

``d loss / d logp_i`` of a token-ratio policy loss depends on row i alone (given its old and reference log-prob and a
weight known beforehand). So a chunk of rows can be finished while its logits are still in scratch:

    tile = hidden_c W^T  ->  logp_c  ->  c_i = d loss / d logp_i  (``policy_row_terms``, the one row function)
         ->  tile := c_i (1[j = target] - p_ij) / T  in place  ->  d hidden_c = tile W,   d W += tile^T hidden_c

and nothing is recomputed: 25 % fewer FLOPs than ``policy_loss(linear_logprob(...))`` with the same results. Rows are
computed by the same function and tiles by the same kernels; only the schedule differs.

On a CPU whose ``scratch_bytes`` hold few rows, such a chunk's traffic costs more than the matmul saves: there, unless
``head_grad`` is given, the two operators are called one after the other (``_linear_policy_composed``).

Cost: both gradients are stored from forward to backward, the weight's as an fp32 ``[V, H]`` sum over chunks (with a
full tile, about +2.7 GB at N = 16384, H = 2048, V = 151936 in bf16). ``head_grad`` avoids that by adding chunks to an
existing fp32 gradient. Do not use it under activation checkpointing, which would compute everything twice. ``d hidden``
is stored in the inputs' dtype: an upstream gradient that is not a power of two rounds it again, and in fp16 small
values are lost before a loss scale is applied. Passing that factor as ``grad_scale`` avoids both. ``ratio="sequence"``
is not supported, as its rows are not independent.
"""

from __future__ import annotations

import math
from numbers import Integral
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
from fastrl_kernels._counting import Scratch, flops_of, scratch_of
from fastrl_kernels._linear_logprob_driver import Head, accumulator_dtype, route_of
from fastrl_kernels._linear_logprob_tiles import RowTerms, triton_path
from fastrl_kernels._linear_policy_composed import composed, live_rows, rows_to_compose
from fastrl_kernels._linear_policy_loop import Gradients, Policy, held_bytes, run
from fastrl_kernels._policy_options import PolicyOptions, PolicyTensors, completion_ids, options_schema
from fastrl_kernels._policy_rows import policy_totals, sequence_importance
from fastrl_kernels.linear_logprob import HeadOptions, autocast_pair, check_rows, linear_logprob_reference
from fastrl_kernels.policy_loss import policy_loss_reference
from fastrl_kernels.token_logprob import check_values, flat_rows, inverse_temperature, row_temperature
from fastrl_kernels.token_weights import token_weights

__all__ = ["LinearPolicyLoss", "linear_policy_loss", "linear_policy_loss_reference"]


class LinearPolicyLoss(NamedTuple):
    """Result of ``linear_policy_loss``: the fields of ``PolicyLoss``, and the log-probs."""

    loss: Tensor
    kl: Tensor
    clip_low_fraction: Tensor
    clip_high_fraction: Tensor
    ratio_mean: Tensor
    ratio_max: Tensor
    logp: Tensor  # [N], without gradient; +inf where a row was not evaluated


def _forward(
    hidden: Tensor,
    head_weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
    rows: Tensor | None,
    head_grad: Tensor | None,
    temperature_value: float,
    softcap: float | None,
    ignore_index: int | None,
    grad_scale: float,
    scratch_bytes: int,
    needs: list[bool],
    advantage: Tensor,
    completion: Tensor,
    weight: Tensor,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    sampler_logp: Tensor | None = None,
    numbers: Tensor | None = None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss [], metrics [5], log-probs [N], and the gradients of hidden, head_weight and bias (empty: not needed)."""
    head = Head(head_weight, bias, None, None, 1.0, softcap, ignore_index, scratch_bytes)
    kind = accumulator_dtype(hidden.dtype)
    check_values(target, head_weight.shape[0], ignore_index, temperature)
    if rows is not None:
        check_rows(rows, target)
    live = live_rows(PolicyTensors(advantage, completion, weight), target, ignore_index)
    weight = weight.to(kind).masked_fill(~live, 0)
    tensors = PolicyTensors(advantage, completion, weight, old_logp, ref_logp, sampler_logp)
    policy = Policy(tensors, PolicyOptions(*options), numbers)
    if policy.options.needs_sums and old_logp is not None and sampler_logp is not None:
        counted = weight if rows is None else torch.zeros_like(weight).index_copy_(0, rows, weight[rows])
        log_weight = sequence_importance(old_logp, sampler_logp, completion, counted, advantage.shape[0])
        # the weight of the sequence, at each token
        tensors = tensors._replace(sampler_logp=old_logp.to(kind) - log_weight)
        policy = Policy(tensors, policy.options._replace(importance_level="token"), numbers)
    index = rows
    if hidden.device.type == "cpu" and not triton_path(hidden):
        index = live.nonzero()[:, 0] if rows is None else rows[live[rows]]
    logp, lse = (torch.zeros(target.shape[0], dtype=kind, device=hidden.device) for _ in range(2))
    terms = RowTerms(
        target.contiguous(), inverse_temperature(target, kind, temperature, temperature_value), logp, lse, None
    )
    if index is not None:
        terms, policy = terms.select(index), policy.select(index)
    need_hidden, need_weight, need_bias = needs
    made = Gradients(
        torch.zeros_like(hidden, memory_format=torch.contiguous_format) if need_hidden else hidden.new_zeros(0),
        hidden.new_empty(head_weight.shape if need_weight and head_grad is None else (0,), dtype=kind),
        hidden.new_zeros(head_weight.shape[:1] if need_bias else (0,), dtype=kind),
    )
    if not terms.target.shape[0]:
        made.weight.zero_()  # which ``run`` would overwrite
    into = made if head_grad is None or not need_weight else made._replace(weight=head_grad, adds=True)
    with torch.autocast(hidden.device.type, enabled=False):
        partials = run(hidden, head, terms, policy, index, into, grad_scale)
        loss, metrics = policy_totals(partials)
    if index is not None:
        logp = logp.index_copy_(0, index, terms.logp)
        live &= torch.zeros_like(live).index_fill_(0, index, True)
    return loss, metrics, logp.masked_fill_(~live, torch.inf), made.hidden, made.weight, made.bias


_forward_op = torch.library.custom_op(
    "fastrl::linear_policy_loss",
    _forward,
    mutates_args=("head_grad",),
    schema="(Tensor hidden, Tensor head_weight, Tensor target, Tensor? bias, Tensor? temperature, Tensor? rows, "
    "Tensor(a!)? head_grad, float temperature_value, float? softcap, int? ignore_index, float grad_scale, "
    "int scratch_bytes, bool[] needs, Tensor advantage, Tensor completion, Tensor weight, Tensor? old_logp=None, "
    f"Tensor? ref_logp=None, Tensor? sampler_logp=None, Tensor? numbers=None, {options_schema()}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_forward_op.register_fake
def _(
    hidden: Tensor, head_weight: Tensor, target: Tensor, bias: Any, temperature: Any, rows: Any, head_grad: Any,
    temperature_value: float, softcap: Any, ignore_index: Any, grad_scale: float, scratch_bytes: int,
    needs: list[bool], *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    kind = accumulator_dtype(hidden.dtype)
    return (
        hidden.new_empty((), dtype=kind),
        hidden.new_empty(5, dtype=kind),
        hidden.new_empty(target.shape, dtype=kind),
        hidden.new_empty(hidden.shape if needs[0] else (0,)),
        hidden.new_empty(head_weight.shape if needs[1] and head_grad is None else (0,), dtype=kind),
        hidden.new_empty(head_weight.shape[:1] if needs[2] else (0,), dtype=kind),
    )


@flops_of(torch.ops.fastrl.linear_policy_loss)
def _(*, hidden: Any, head_weight: Any, rows: Any, needs: list[bool], **_: Any) -> int:
    """Logits, and one product per needed gradient."""
    count = hidden[0] if rows is None else rows[0]
    return 2 * count * hidden[1] * head_weight[0] * (1 + needs[0] + needs[1])


@scratch_of(torch.ops.fastrl.linear_policy_loss)
def _(
    *, hidden: Tensor, head_weight: Tensor, bias: Any, temperature: Any, rows: Any, temperature_value: float,
    softcap: Any, ignore_index: Any, scratch_bytes: int, needs: list[bool], triton: bool, **_: Any,
) -> Scratch:  # fmt: skip
    """Over the named rows: those without weight are unknown."""
    head = Head(head_weight, bias, None, None, 1.0, softcap, ignore_index, scratch_bytes)
    n = hidden.shape[0] if rows is None else rows.shape[0]
    plain = bias is None and softcap is None and temperature is None and temperature_value == 1.0
    return Scratch(held_bytes(hidden, head, n, route_of(hidden, triton=triton), need_hidden=needs[0], plain=plain))


@torch.library.custom_op("fastrl::with_gradients", mutates_args=())
def _attach_op(
    loss: Tensor,
    hidden: Tensor,
    head_weight: Tensor,
    bias: Tensor | None,
    d_hidden: Tensor,
    d_weight: Tensor,
    d_bias: Tensor,
    grad_scale: float,
) -> Tensor:
    """``loss`` with precomputed gradients, which are ``grad_scale`` times those of hidden, head_weight and bias."""
    return loss.clone()


@_attach_op.register_fake
def _(loss: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(loss)


def _attach_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, hidden, weight, bias, d_hidden, d_weight, d_bias, ctx.grad_scale = inputs
    ctx.save_for_backward(d_hidden, d_weight, d_bias)
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]


def _attach_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        raise NotImplementedError("linear_policy_loss: has no second derivative; use policy_loss(linear_logprob(...))")
    factor = grad / ctx.grad_scale
    made = []
    for gradient, dtype, wanted in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[1:4], strict=True):
        if not wanted or dtype is None or (gradient.ndim == 1 and gradient.numel() == 0):
            made.append(None)
        else:  # one pass: scaled in the accumulator dtype, rounded once
            made.append(torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype)))
    return None, *made, None, None, None, None


_attach_op.register_autograd(_attach_backward, setup_context=_attach_setup)


def linear_policy_loss(
    hidden: Tensor,
    head_weight: Tensor,
    target: Tensor,
    advantage: Tensor,
    completion: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    sampler_logp: Tensor | None = None,
    weight: Tensor | None = None,
    aggregate: str = "token",
    normalizer: float | Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = -100,
    rows: Tensor | None = None,
    head_grad: Tensor | None = None,
    grad_scale: float = 1.0,
    scratch_bytes: int = 1 << 30,
    **options: Any,
) -> LinearPolicyLoss:
    """``policy_loss(linear_logprob(hidden, head_weight, target), ...)`` with gradients computed in the forward.

    Differentiable in ``hidden``, ``head_weight`` and ``bias``; gradients that are not needed are not computed. First
    derivatives only. Deterministic, no host synchronisation. The result holds the log-probs too. Loss arguments and
    options (``clip_low=0.2`` and so on) are those of ``policy_loss``, head arguments those of ``linear_logprob``. Also:

    Args:
        hidden: [N, H], or padded, [C, L, H], with ``target`` and every vector [C, L] (and ``mask``, or ``completion``
            ids [C, L]); ``rows`` counts c L + l then, and ``logp`` is [C, L].
        ratio: only ``"token"``.
        importance_level: ``"sequence"`` needs ``old_logp``.
        rows: [R] int64, distinct: the rows to evaluate; all others have weight 0, in the metrics too.
        head_grad: [V, H] fp32 (fp64 for fp64 inputs), contiguous: the head's gradient is added here, in the forward,
            and autograd returns none for ``head_weight``. Nothing of its size is allocated then. The gradient added is
            ``grad_scale`` times the loss's, so the loss must enter the backward with exactly this factor.
        grad_scale: the upstream gradient the loss will get (1 / accumulation steps; in fp16 the scaler's scale, without
            which small gradients are lost). Not 0.
        scratch_bytes: must hold at least one row of logits; memory beside it, see the top of this file. On a CPU, give
            it 128 rows of fp32 logits and their hidden states or more: with less, gradients are computed in the
            backward, by four matmuls, and nothing of the head's size is held until then.

    Raises:
        ValueError, TypeError: wrong shape, dtype, device or option, before any launch.
    """
    hidden, head_weight = autocast_pair(hidden, head_weight)
    chosen, shape = PolicyOptions(**options), target.shape
    vectors = (old_logp, ref_logp, sampler_logp, weight)
    hidden, target, temperature, completion, vectors = _flat(
        hidden, target, temperature, advantage, completion, mask, vectors
    )
    old_logp, ref_logp, sampler_logp, weight = vectors
    like = hidden.new_empty(hidden.shape[:1], dtype=accumulator_dtype(hidden.dtype))  # checked where no weight is given
    tensors = PolicyTensors(advantage, completion, like if weight is None else weight, old_logp, ref_logp, sampler_logp)
    _check_arguments(hidden, head_weight, target, tensors, bias, rows, head_grad)
    check(
        chosen.ratio == "token",
        "ratio: linear_policy_loss computes gradients row by row and needs ratio='token', got "
        f"{chosen.ratio!r}; use policy_loss(linear_logprob(...))",
    )
    chosen.check(ref_logp, sampler_logp)
    check_number("grad_scale", grad_scale, 0 < abs(grad_scale) < math.inf, "a finite number other than 0")
    check_number("softcap", softcap, softcap is None or 0 < softcap < math.inf, "a finite number > 0")
    whole = isinstance(scratch_bytes, Integral) and scratch_bytes > 0
    check_number("scratch_bytes", scratch_bytes, whole, "a whole number > 0")
    per_row, value = row_temperature(temperature, target)
    weight = _weight(target, advantage, completion, weight, aggregate, normalizer, ignore_index, hidden)
    tensors = tensors._replace(weight=weight)
    known = old_logp is not None or not chosen.needs_sums
    check(known, "importance_level: 'sequence' needs old_logp in linear_policy_loss, which computes rows in chunks")
    refuse_forward_mode("linear_policy_loss", hidden, head_weight, bias)
    head = HeadOptions(bias, temperature, softcap, ignore_index, False, rows, None, False, scratch_bytes)
    live = None if head_grad is not None else rows_to_compose(hidden, head_weight, target, tensors, head)
    if live is not None:
        found, logp = composed(hidden, head_weight, target, tensors, chosen, head, live)
        return LinearPolicyLoss(**found._asdict(), logp=logp.view(shape))
    plain, numbers = chosen.split(hidden)
    learning = torch.is_grad_enabled()
    needs = [learning and tensor is not None and tensor.requires_grad for tensor in (hidden, head_weight, bias)]
    fixed = [None if tensor is None else tensor.detach() for tensor in (hidden, head_weight, bias)]
    loss, metrics, logp, *gradients = _forward_op(
        fixed[0], fixed[1], target, fixed[2], per_row, rows, head_grad, value, softcap, ignore_index,
        float(grad_scale), scratch_bytes, needs, *tensors, numbers, *plain,
    )  # fmt: skip
    if any(needs):
        loss = _attach_op(loss, hidden, head_weight, bias, *gradients, float(grad_scale))
    divergence, low, high, mean, largest = metrics.unbind()
    return LinearPolicyLoss(loss, divergence, low, high, mean, largest, logp.view(shape))


def linear_policy_loss_reference(
    hidden: Tensor,
    head_weight: Tensor,
    target: Tensor,
    advantage: Tensor,
    completion: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    sampler_logp: Tensor | None = None,
    weight: Tensor | None = None,
    aggregate: str = "token",
    normalizer: float | Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = -100,
    rows: Tensor | None = None,
    **loss: Any,
) -> LinearPolicyLoss:
    """The composition of the two twins, with the whole logits; the truth in tests. Keeps float64."""
    shape, vectors = target.shape, (old_logp, ref_logp, sampler_logp, weight)
    hidden, target, temperature, completion, vectors = _flat(
        hidden, target, temperature, advantage, completion, mask, vectors
    )
    old_logp, ref_logp, sampler_logp, weight = vectors
    weight = _weight(target, advantage, completion, weight, aggregate, normalizer, ignore_index, hidden)
    weight = weight.masked_fill((completion < 0) | (completion >= advantage.shape[0]), 0)
    if ignore_index is not None:
        weight = weight.masked_fill(target == ignore_index, 0)
    if rows is not None:
        weight = torch.zeros_like(weight).index_copy_(0, rows, weight[rows])
    hidden = torch.where((weight != 0)[:, None], hidden, 0)
    logp = linear_logprob_reference(
        hidden, head_weight, target, bias=bias, temperature=temperature, softcap=softcap, ignore_index=ignore_index
    ).logp
    given = {"old_logp": old_logp, "ref_logp": ref_logp, "sampler_logp": sampler_logp}
    result = policy_loss_reference(logp, advantage, completion, weight=weight, **given, **loss)
    return LinearPolicyLoss(**result._asdict(), logp=logp.detach().masked_fill(weight == 0, torch.inf).view(shape))


def _flat(
    hidden: Tensor,
    target: Tensor,
    temperature: float | Tensor,
    advantage: Tensor,
    completion: Tensor | None,
    mask: Tensor | None,
    vectors: tuple[Tensor | None, ...],
) -> tuple[Tensor, Tensor, float | Tensor, Tensor, tuple[Tensor | None, ...]]:
    """Padded rows as [N] of them, their completion ids, and int32 targets as int64."""
    shape = tuple(target.shape)
    check_shape("advantage", advantage, (None,))
    completion = completion_ids("target", shape, advantage, completion, mask)
    hidden, target, temperature = flat_rows("hidden", hidden, target, temperature)
    if len(shape) > 1:
        names = ("old_logp", "ref_logp", "sampler_logp", "weight")
        for name, vector in zip(("completion", *names), (completion, *vectors), strict=True):
            if vector is not None:
                check_shape(name, vector, shape)
        completion, *rest = (None if x is None else x.reshape(-1) for x in (completion, *vectors))
        vectors = tuple(rest)
    assert completion is not None
    return hidden, target, temperature, completion, vectors


def _weight(
    target: Tensor,
    advantage: Tensor,
    completion: Tensor,
    weight: Tensor | None,
    aggregate: str,
    normalizer: float | Tensor | None,
    ignore_index: int | None,
    hidden: Tensor,
) -> Tensor:
    if weight is not None:
        check(normalizer is None, "normalizer: only without weight (a given weight is already normalised)")
        return weight
    return token_weights(
        completion, aggregate=aggregate, normalizer=normalizer, n_completions=advantage.shape[0],
        mask=None if ignore_index is None else target != ignore_index, dtype=accumulator_dtype(hidden.dtype),
    )  # fmt: skip


def _check_arguments(
    hidden: Tensor,
    head_weight: Tensor,
    target: Tensor,
    tensors: PolicyTensors,
    bias: Tensor | None,
    rows: Tensor | None,
    head_grad: Tensor | None,
) -> None:
    check_shape("hidden", hidden, (None, None))
    check_shape("head_weight", head_weight, (None, hidden.shape[1]))
    check(head_weight.shape[0] > 0, "head_weight: expected at least one row (vocabulary entry), got 0")
    check_dtype("hidden", hidden, FLOATS)
    check_dtype("head_weight", head_weight, (hidden.dtype,))
    check_shape("target", target, (hidden.shape[0],))
    check_dtype("target", target, (torch.int64,))
    like = hidden.new_empty(hidden.shape[0], dtype=accumulator_dtype(hidden.dtype))
    tensors.check(like)
    check_same_device(hidden=hidden, head_weight=head_weight, target=target, bias=bias, rows=rows, head_grad=head_grad)
    if bias is not None:
        check_shape("bias", bias, (head_weight.shape[0],))
        check_dtype("bias", bias, FLOATS)
    if rows is not None:
        check_shape("rows", rows, (None,))
        check_dtype("rows", rows, (torch.int64,))
    if head_grad is not None:
        check_shape("head_grad", head_grad, tuple(head_weight.shape))
        check_dtype("head_grad", head_grad, (accumulator_dtype(hidden.dtype),))
        check(not head_grad.requires_grad, "head_grad: expected a plain buffer, got a tensor that requires grad")
