"""Adapted linear layers: LoRA's products in the model's dtype, stacked where layers read the same input.

peft computes W x + s B (A x) with A and B in float32, and so casts every input to float32 and every output back. Here A
and B stay float32, as the optimizer's, and are cast to the model's dtype once per call; the products accumulate in
float32 on their own. Layers that read the same input (queries, keys and values; gate and up) are computed by the first
of them that is called: one product with all their A. In training, a layer and its adapter are one function, whose
gradients are summed inside products.

With DoRA, several adapters, autocast or hooks, peft's own forward runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrl.models.layer_kinds import untouched
from fastrl_kernels._common import use_triton
from fastrl_kernels._counting import flops_of
from fastrl_kernels.lora import MOST_OUTPUTS, lora_update

# Names of a module's children that read the same input.
SHARED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
SHARED += (("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),)
KINDS = ("Linear", "Linear4bit")  # peft's layers that compute W x + s B (A x)
AUTOCAST = ("cpu", "cuda")
MOST_ROWS = 512  # of one launch for a stack: its programs compute x A again for each block of columns


def use_stacked(core: nn.Module) -> int:
    """Switch a model's adapted linear layers to this module's forward; returns how many.

    The result of every layer is peft's up to rounding.
    """
    done = 0
    for parent in core.modules():
        named = {name: child for name, child in parent.named_children() if _is_adapted(child)}
        shared = [[named.pop(name) for name in names if name in named] for names in SHARED]
        for members in (*shared, *([module] for module in named.values())):
            group = Shared(members)
            for module in members:
                module.fastrl_shared = group  # type: ignore[assignment]
                module.forward = MethodType(_forward, module)
            done += len(members)
    return done


def _is_adapted(module: Any) -> bool:
    peft = type(module).__module__.startswith("peft.tuners.lora.") and type(module).__name__ in KINDS
    return peft and "forward" not in vars(module) and not module.lora_variant


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args or kwargs or not _fits(self, x):
        return type(self).forward(self, x, *args, **kwargs)
    return self.fastrl_shared.output(self, x)


def _fits(module: Any, x: Tensor) -> bool:
    """Whether ``module`` computes W x + s B (A x) with one adapter, and may do so in the dtype of ``x``."""
    if module.disable_adapters or module.merged or len(module.active_adapters) != 1:
        return False
    name = module.active_adapters[0]
    if name not in module.lora_A or name in module.lora_variant or any(map(torch.is_autocast_enabled, AUTOCAST)):
        return False
    low, high = module.lora_A[name], module.lora_B[name]
    plain = all(untouched(part, nn.Linear) and type(part.weight) is nn.Parameter for part in (low, high))
    return plain and high.bias is None and low.weight.dtype in (torch.float32, x.dtype) and x.is_floating_point()


class _Member(NamedTuple):
    """A layer's parts: ``weight`` is None where its base is not a plain frozen layer of the input's dtype."""

    base: nn.Module
    weight: Tensor | None
    bias: Tensor | None
    low: Tensor  # A [r, in]
    high: Tensor  # B [out, r]
    scale: float
    dropout: nn.Module


def _member(module: Any, x: Tensor) -> _Member:
    name, base = module.active_adapters[0], module.get_base_layer()
    weight = bias = None
    if untouched(base, nn.Linear) and type(base.weight) is nn.Parameter and base.weight.dtype == x.dtype:
        frozen = not base.weight.requires_grad and (base.bias is None or not base.bias.requires_grad)
        weight, bias = (base.weight, base.bias) if frozen else (None, None)
    low, high = module.lora_A[name].weight, module.lora_B[name].weight
    return _Member(base, weight, bias, low, high, module.scaling[name], module.lora_dropout[name])


class _Stack(NamedTuple):
    """The adapters of several layers in one dtype: A [all r, in], and each layer's B [out, r]."""

    low: Tensor
    highs: tuple[Tensor, ...]

    @classmethod
    def of(cls, lows: Sequence[Tensor], highs: Sequence[Tensor], dtype: torch.dtype) -> _Stack:
        if len(lows) == 1:
            low = lows[0].to(dtype)
        else:  # one operator for cast and place
            low = lows[0].new_empty(sum(map(len, lows)), lows[0].shape[1], dtype=dtype)
            for part, given in zip(low.split([len(given) for given in lows]), lows, strict=True):
                part.copy_(given)
        return cls(low, tuple(high.to(dtype) for high in highs))

    def refresh(self, lows: Sequence[Tensor], highs: Sequence[Tensor]) -> None:
        """Take over changed adapters in place."""
        parts = self.low.split([len(given) for given in lows])
        for mine, given in zip((*parts, *self.highs), (*lows, *highs), strict=True):
            if mine.data_ptr() != given.data_ptr() or mine.dtype != given.dtype:  # else they are the adapter itself
                mine.copy_(given)


class Shared:
    """Adapted layers that read the same input. The first that is called computes the outputs of all."""

    def __init__(self, members: list[Any]) -> None:
        self.members = members
        self._waiting: tuple[Tensor, tuple[Any, ...], dict[int, Tensor]] | None = None
        self._held: tuple[tuple[Any, ...], _Stack] | None = None  # for calls without gradients
        self._seen: tuple[int, ...] | None = None  # the adapters' versions that it has

    def output(self, module: Any, x: Tensor) -> Tensor:
        """The output of one of the layers for ``x`` [..., in]."""
        place = next(i for i, member in enumerate(self.members) if member is module)
        state = torch.is_grad_enabled(), _version(x)
        if self._waiting is not None:
            of, when, outputs = self._waiting
            if of is x and when == state and place in outputs:
                found = outputs.pop(place)
                self._waiting = self._waiting if outputs else None
                return found
            self._waiting = None
        chosen = self._together(place, x)
        found = dict(zip(chosen, self._outputs([self.members[i] for i in chosen], x), strict=True))
        mine = found.pop(place)
        self._waiting = (x, state, found) if found else None
        return mine

    def _together(self, place: int, x: Tensor) -> list[int]:
        """The layers to compute with the one at ``place``: itself alone where each has its own dropout."""
        if not all(_fits(module, x) and not _drops(module) for module in self.members):
            return [place]
        return list(range(len(self.members)))

    def _outputs(self, modules: list[Any], x: Tensor) -> Sequence[Tensor]:
        members = [_member(module, x) for module in modules]
        if not torch.is_grad_enabled():
            return self._infer(members, x)
        self._seen = None
        if _drops(modules[0]):
            return _adapted(members[0].dropout(x), members, [members[0].base(x)])
        if any(member.weight is None for member in members):
            return _adapted(x, members, [member.base(x) for member in members])
        return _adapted(x, members, [None] * len(members))

    def _infer(self, members: list[_Member], x: Tensor) -> list[Tensor]:
        stack = self._stack(members, x.dtype)
        if _one_launch(members, x):
            found = [member.base(x) for member in members]
            flat = [out.view(-1, out.shape[-1]) for out in found]
            lora_update(x.reshape(-1, x.shape[-1]), stack.low, list(stack.highs), flat, members[0].scale)
            return found
        inputs = members[0].dropout(x) if len(members) == 1 else x
        reduced = inputs.reshape(-1, x.shape[-1]) @ stack.low.t()
        parts = reduced.split([member.low.shape[0] for member in members], 1)
        outputs = []
        for member, part, high in zip(members, parts, stack.highs, strict=True):
            out = member.base(x)
            flat = out.reshape(-1, out.shape[-1])
            outputs.append(torch.addmm(flat, part, high.t(), alpha=member.scale).view(out.shape))
        return outputs

    def _stack(self, members: list[_Member], dtype: torch.dtype) -> _Stack:
        """The adapters in ``dtype``, kept until they may have changed: until a call with gradients, or an update in
        place, which raises their versions. Then they keep their addresses, which a captured decode step reads."""
        lows, highs = [m.low for m in members], [m.high for m in members]
        of, versions = (dtype, *map(id, (*lows, *highs))), tuple(map(_version, (*lows, *highs)))
        if self._held is None or self._held[0] != of:
            self._held = of, _Stack.of(lows, highs, dtype)
        elif self._seen != versions:
            self._held[1].refresh(lows, highs)
        self._seen = versions
        return self._held[1]


def _one_launch(members: Sequence[_Member], x: Tensor) -> bool:
    """Whether the kernel of decode steps computes the updates: for few rows, into outputs that nothing else holds."""
    few = use_triton(x) and x.numel() <= MOST_ROWS * x.shape[-1] and len(members) <= MOST_OUTPUTS
    alike = {(member.low.shape[0], member.scale) for member in members}
    return few and len(alike) == 1 and all(member.weight is not None for member in members)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _drops(module: Any) -> bool:
    """Whether a call drops numbers of the adapter's input."""
    dropout = module.lora_dropout[module.active_adapters[0]]
    return module.training and not isinstance(dropout, nn.Identity)


def _adapted(inputs: Tensor, members: Sequence[_Member], bases: Sequence[Tensor | None]) -> Sequence[Tensor]:
    """The outputs of layers, or, where the ``bases`` are computed, the bases with the adapters' updates."""
    tensors = [
        tensor
        for member, base in zip(members, bases, strict=True)
        for tensor in (*((member.weight, member.bias) if base is None else (None, None)), base, member.low, member.high)
    ]
    scales = tuple(member.scale for member in members)
    return _Adapted.apply(inputs, scales, inputs.dtype, *tensors)  # type: ignore[no-any-return]


class _Adapted(torch.autograd.Function):
    """W_i x + s_i B_i (A_i x) for several i, by (inputs, scales, dtype, and for each i: W, bias, W x, A, B).

    If W x is given, W is not, and ``inputs`` are those of the adapter alone.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: tuple[float, ...], dtype: torch.dtype, *tensors: Any) -> Any:
        ctx.set_materialize_grads(True)
        weights, biases, bases, lows, highs = (tensors[i::5] for i in range(5))
        stack = _Stack.of(lows, highs, dtype)
        rows = x.reshape(-1, x.shape[-1])
        reduced = rows @ stack.low.t()
        ctx.scales, ctx.ranks, ctx.shape = scales, [len(low) for low in lows], x.shape
        outputs = []
        parts = reduced.split(ctx.ranks, 1)
        for weight, bias, base, part, high, scale in zip(
            weights, biases, bases, parts, stack.highs, scales, strict=True
        ):
            if base is None:
                out = _both(rows, weight, bias, part, high, scale)
            else:
                out = torch.addmm(base.reshape(len(rows), -1), part, high.t(), alpha=scale)
            outputs.append(out.view(*x.shape[:-1], -1))
        ctx.save_for_backward(rows, reduced, stack.low, *stack.highs, *(w for w in weights if w is not None))
        ctx.masters = lows[0].dtype, [base is not None for base in bases]
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        rows, reduced, low, *rest = ctx.saved_tensors
        count, (dtype, given) = len(grads), ctx.masters
        highs, weights = rest[:count], rest[count:]
        flat = [grad.reshape(len(rows), -1) for grad in grads]
        inner = torch.empty_like(reduced)  # gradient of A x
        parts = inner.split(ctx.ranks, 1)
        for part, grad, high, scale in zip(parts, flat, highs, ctx.scales, strict=True):
            torch.addmm(part, grad, high, beta=0, alpha=scale, out=part)
        needs = [ctx.needs_input_grad[3 + i :: 5] for i in range(5)]
        of_lows: Sequence[Tensor | None] = [None] * count
        if any(needs[3]):
            of_lows = (inner.t() @ rows).to(dtype).split(ctx.ranks)
        of_highs = [
            _scaled(grad.t(), part, scale).to(dtype) if need else None
            for grad, part, scale, need in zip(flat, reduced.split(ctx.ranks, 1), ctx.scales, needs[4], strict=True)
        ]
        of_x = None
        if ctx.needs_input_grad[0]:
            for grad, weight in zip(flat, weights, strict=False):
                of_x = grad @ weight if of_x is None else torch.addmm(of_x, grad, weight, out=of_x)
            of_x = inner @ low if of_x is None else torch.addmm(of_x, inner, low, out=of_x)
            of_x = of_x.view(ctx.shape)
        of_bases = [grad if own else None for grad, own in zip(grads, given, strict=True)]
        each = zip(of_bases, of_lows, of_highs, strict=True)
        return of_x, None, None, *(g for base, a, b in each for g in (None, None, base, a, b))


@torch.library.custom_op("fastrl::adapted_linear", mutates_args=())
def _both(
    rows: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],  # noqa: UP045 (the schema parser of older torch wants typing.Optional)
    part: Tensor,
    high: Tensor,
    scale: float,
) -> Tensor:
    """W x + s B (A x), with A x given. One operator, so that a checkpoint that keeps products keeps this one alone."""
    out = F.linear(rows, weight, bias)
    return torch.addmm(out, part, high.t(), alpha=scale, out=out)


@_both.register_fake
def _(rows: Tensor, weight: Tensor, bias: Tensor | None, part: Tensor, high: Tensor, scale: float) -> Tensor:
    return rows.new_empty(len(rows), len(weight))


@flops_of(torch.ops.fastrl.adapted_linear)
def _(*, rows: torch.Size, weight: torch.Size, high: torch.Size, **_: Any) -> int:
    return 2 * rows[0] * (weight.numel() + high.numel())


def _scaled(a: Tensor, b: Tensor, scale: float) -> Tensor:
    out = a.new_empty(a.shape[0], b.shape[1])
    return torch.addmm(out, a, b, beta=0, alpha=scale, out=out)
