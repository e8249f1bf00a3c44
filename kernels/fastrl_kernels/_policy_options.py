"""The options of a policy loss, as one record that all layers pass on, its per-row tensors, and their checks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl_kernels._common import FLOATS, check, check_dtype, check_number, check_same_device, check_shape, readable
from fastrl_kernels.token_weights import check_ids

KL_KINDS = ("k1", "k2", "k3")
LOSSES = ("clip", "cispo", "sapo")
IMPORTANCE = (None, "truncate", "mask")
LEVELS = ("token", "sequence")
Number = float | Tensor  # a tensor is 0-d and read on the device, so changing its value does not recompile


class PolicyOptions(NamedTuple):
    """The options of ``policy_loss``; see its docstring."""

    clip_low: Number = 0.2
    clip_high: Number = 0.2
    dual_clip: Number | None = None
    beta: Number = 0.0
    kl: str = "k3"
    kl_gradient: str = "value"
    ratio: str = "token"
    loss: str = "clip"
    importance: str | None = None
    importance_level: str = "token"
    importance_cap: Number = 2.0
    tau_positive: Number = 1.0
    tau_negative: Number = 1.05

    @property
    def needs_sums(self) -> bool:
        """Whether a row depends on the other rows of its completion."""
        return self.ratio == "sequence" or (self.importance is not None and self.importance_level == "sequence")

    def split(self, like: Tensor) -> tuple[PolicyOptions, Tensor | None]:
        """Plain numbers for an operator, and the ``bounds`` as one float64 vector if any of them is a tensor."""
        numbers = {name: value for name, value in self._asdict().items() if name in _RANGES and value is not None}
        if not any(isinstance(value, Tensor) for value in numbers.values()):
            return self._replace(**{name: float(value) for name, value in numbers.items()}), None
        given = [getattr(self, name) if name in numbers else 0.0 for name in _RANGES]
        here = [
            x if isinstance(x, Tensor) else torch.full((), x, dtype=torch.float64, device=like.device) for x in given
        ]
        vector = torch.stack([x.detach().double() for x in here])
        shift, sign = vector.new_zeros(len(here)), torch.ones_like(vector)
        shift[:2], sign[:1] = 1.0, -1.0
        return self._replace(**dict.fromkeys(numbers, 2.0)), shift + sign * vector

    def bounds(self, numbers: Tensor | None) -> tuple[Any, ...]:
        """Lowest and highest ratio, dual clip, beta, importance cap, tau of positive and of negative advantages."""
        if numbers is not None:
            return numbers.unbind()
        low, high = 1.0 - self.clip_low, 1.0 + self.clip_high
        return low, high, self.dual_clip or 0.0, self.beta, self.importance_cap, self.tau_positive, self.tau_negative

    def check(self, ref_logp: Tensor | None, sampler_logp: Tensor | None) -> None:
        """Raise ``ValueError`` on the first option that is not allowed. Tensors are read on the CPU only."""
        for name, (inside, expected) in _RANGES.items():
            value = getattr(self, name)
            if isinstance(value, Tensor):
                check_shape(name, value, ())
                if readable(value):
                    check_number(name, float(value), inside(float(value)), expected)
            elif value is not None or name != "dual_clip":
                check_number(name, value, inside(value), expected)
        named = {"kl": KL_KINDS, "kl_gradient": ("value", "k2"), "ratio": LEVELS, "loss": LOSSES}
        named |= {"importance": IMPORTANCE, "importance_level": LEVELS}
        for name, allowed in named.items():
            value = getattr(self, name)
            check(value in allowed, f"{name}: expected one of {', '.join(map(str, allowed))}, got {value!r}")
        unused = self.loss == "clip" or self.dual_clip is None
        check(unused, f"dual_clip: only read with loss='clip', got loss={self.loss!r}")
        weighed = isinstance(self.beta, Tensor) or self.beta != 0
        check(not weighed or ref_logp is not None, "ref_logp: needed because beta is not 0, got None")
        paired = (self.importance is None) == (sampler_logp is None)
        check(paired, "importance, sampler_logp: give both or neither")


_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {  # in the order of ``bounds``
    "clip_low": (lambda x: x >= 0, ">= 0"),
    "clip_high": (lambda x: x >= 0, ">= 0"),
    "dual_clip": (lambda x: x > 1, "> 1 or None"),
    "beta": (lambda x: 0 <= x < math.inf, "a finite number >= 0"),
    "importance_cap": (lambda x: x > 0, "> 0"),
    "tau_positive": (lambda x: 0 < x < math.inf, "a finite number > 0"),
    "tau_negative": (lambda x: 0 < x < math.inf, "a finite number > 0"),
}


def completion_ids(
    name: str, shape: tuple[int, ...], advantage: Tensor, completion: Tensor | None, mask: Tensor | None
) -> Tensor:
    """The completion of each row of ``name``, -1 where masked. Without ids, rows are [C, L], a completion each."""
    if completion is None:
        check(len(shape) == 2, f"{name}: [C, L] without completion ids, got {list(shape)}")
        check_number(name, shape[0], shape[0] == advantage.shape[0], f"{advantage.shape[0]} completions, as advantage")
        completion = torch.arange(shape[0], device=advantage.device)[:, None].expand(shape)
    if mask is None:
        return completion
    check_shape("mask", mask, shape)
    check_shape("completion", completion, shape)
    check_same_device(advantage=advantage, mask=mask, completion=completion)
    return completion.masked_fill(mask == 0, -1)


def options_schema() -> str:
    """The options as arguments of an operator's schema, in their order and with their defaults."""
    kinds = {"dual_clip": "float?", "importance": "str?"}
    arguments = []
    for name, default in PolicyOptions._field_defaults.items():
        written = f'"{default}"' if isinstance(default, str) else repr(default)
        arguments.append(f"{kinds.get(name, type(default).__name__)} {name}={written}")
    return ", ".join(arguments)


class PolicyTensors(NamedTuple):
    """The constants of a policy loss: a number per completion, and vectors with a number per row."""

    advantage: Tensor  # [C]
    completion: Tensor  # [N]
    weight: Tensor  # [N]
    old_logp: Tensor | None = None
    ref_logp: Tensor | None = None
    sampler_logp: Tensor | None = None

    def rows(self, change: Callable[[Tensor], Tensor]) -> PolicyTensors:
        """The same with every per-row vector changed: a slice, a selection, a layout."""
        return PolicyTensors(self.advantage, *[None if t is None else change(t) for t in self[1:]])  # type: ignore[arg-type]

    def check(self, logp: Tensor) -> None:
        """Raise ``ValueError`` or ``TypeError`` on the first vector that does not fit ``logp``."""
        check_shape("advantage", self.advantage, (None,))
        for name, tensor in self._asdict().items():
            if tensor is not None:
                if name != "advantage":
                    check_shape(name, tensor, tuple(logp.shape))
                check_dtype(name, tensor, (torch.int64, torch.int32) if name == "completion" else FLOATS)
        check_same_device(logp=logp, **self._asdict())
        check_ids("completion", self.completion, self.advantage.shape[0])
