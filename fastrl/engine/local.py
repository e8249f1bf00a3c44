"""The local engine: one process, one device, AdamW.

It keeps a float32 copy of every low-precision parameter: at the learning rates of RL (1e-6) an update is smaller than
half a unit in the last place of a bfloat16 weight, and would be rounded away.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastrl.engine.base import NonFiniteError, StepInfo, T, lr_scale, parameter_groups
from fastrl.engine.costs import FLOAT, moment_bytes
from fastrl.engine.names import unchanged
from fastrl.engine.optimizers import AdamW8bit, adamw_state

if TYPE_CHECKING:
    from fastrl.config.sections import OptimRecipe


class LocalEngine:
    """One process, one device, AdamW.

    ``optim.states`` sets the storage of moments: ``fp32`` on the device, ``8bit`` (see ``fastrl.engine.optimizers``),
    or ``offload``: moments and float32 weights are on the host, each gradient is moved there when it is complete, and
    the host does the update. ``optim.gradient_release`` updates each parameter within the backward, as soon as its
    gradient is complete, and frees the gradient: with one micro-batch, gradients never exist all at once.
    """

    any_ranks = False
    rank = 0
    world_size = 1

    def __init__(self, model: nn.Module, optim: OptimRecipe, *, alias: Callable[[str], str] = unchanged) -> None:
        self.optim = optim
        self.updates = 0
        self._parameters: dict[str, nn.Parameter] = {}
        self._masters: dict[str, Tensor] = {}  # what the optimizer updates: the parameter itself, or its float32 copy
        self._last = False  # whether the current backward is the last before the update
        self._released: list[Tensor] = []  # norms of gradients that were applied within the backward
        groups = parameter_groups(model, optim, alias)
        for group in groups:
            named = dict(zip(group.pop("names"), group["params"], strict=True))
            masters = {name: self._master(parameter) for name, parameter in named.items()}
            self._parameters |= named
            self._masters |= masters
            group["params"] = list(masters.values())
        self._optimizers = self._make_optimizers(groups)
        each = self._optimizers if optim.gradient_release else self._optimizers * len(self._masters)
        self._optimizer_of = dict(zip(self._masters, each, strict=True))
        if optim.gradient_release:
            for name, parameter in self._parameters.items():
                parameter.register_post_accumulate_grad_hook(partial(self._release, name))

    def _make_optimizers(self, groups: list[dict[str, Any]]) -> list[torch.optim.Optimizer]:
        """One optimizer, or with gradient release one for each parameter, in the order of the masters."""
        optim = self.optim
        options: dict[str, Any] = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps}
        if optim.states == "8bit":
            Kind: Any = AdamW8bit
        else:
            Kind = torch.optim.AdamW
            options["fused"] = next(iter(self._parameters.values())).is_cuda
        if not optim.gradient_release:
            return [Kind(groups, **options)]
        return [Kind([{**group, "params": [p]}], **options) for group in groups for p in group["params"]]

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add the gradient of ``loss``, in float32 for parameters of any dtype.

        Raises:
            NonFiniteError: with gradient release, the loss is not finite; no weight was changed.
        """
        if self.optim.gradient_release:
            if not bool(loss.isfinite()):
                self.clear()
                raise NonFiniteError("the loss is not a finite number")
            self._last = last
            self._set_rates()
        loss.backward()

    def step(self) -> StepInfo:
        """Clip by global norm, update, clear the gradients.

        Raises:
            NonFiniteError: a gradient is not finite. The weights are unchanged, except with gradient release: then they
                were updated with 0 in place of non-finite values.
        """
        masters = list(self._masters.values())
        gradients = [m.grad for m in masters if m.grad is not None]
        norms = [torch.nn.utils.get_total_norm(gradients)] if gradients else []
        norms += self._released
        norm = (
            torch.stack([n.float() for n in norms]).norm() if len(norms) > 1 else norms[0] if norms else torch.zeros(())
        )
        grad_norm = float(norm)
        self._released = []
        if not math.isfinite(grad_norm):
            self.clear()
            raise NonFiniteError(f"the gradient norm is {grad_norm}")
        if self.optim.clip_norm is not None and gradients:
            torch.nn.utils.clip_grads_with_norm_(masters, self.optim.clip_norm, norm)
        rate = self._set_rates()
        for optimizer in self._optimizers:  # parameters without a gradient are not updated
            optimizer.step()
        self._write_back(self._parameters)
        self.clear()
        self.updates += 1
        return StepInfo(grad_norm=grad_norm, lr=rate)

    def _set_rates(self) -> float:
        """Set the learning rates of this update; returns the first group's."""
        scale = lr_scale(self.updates, self.optim)
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        for group in groups:
            group["lr"] = group["base_lr"] * scale
        return float(groups[0]["lr"])

    def _release(self, name: str, parameter: Tensor) -> None:
        """Update a parameter whose gradient is complete, and free the gradient."""
        if not self._last:
            return
        master = self._masters[name]
        assert master.grad is not None
        self._released.append(master.grad.norm())  # shows non-finite values in step() without synchronising here
        torch.nan_to_num_(master.grad, 0.0, 0.0, 0.0)
        self._optimizer_of[name].step()
        self._write_back([name])
        master.grad = parameter.grad = None

    def whole(self, core: nn.Module, state: Callable[[], Mapping[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """They are."""
        yield from state().items()

    def gradient_of(self, parameter: Tensor) -> Tensor | None:
        """The float32 gradient of a trained parameter (None: not trained, or its gradient is moved to the host)."""
        name = next((n for n, p in self._parameters.items() if p is parameter), None)
        if name is None or self.optim.states == "offload":
            return None
        master = self._masters[name]
        if master.grad is None:
            master.grad = torch.zeros_like(master)
        return master.grad

    def clear(self) -> None:
        """Drop all gradients."""
        for parameter in (*self._masters.values(), *self._parameters.values()):
            parameter.grad = None

    def save(self, folder: Path) -> None:
        """Write ``optimizer.safetensors`` (the optimizer's copy of the weights, and its state) and
        ``optimizer.json``."""
        from safetensors.torch import save_file

        tensors = {key: tensor.detach().contiguous() for key, tensor in self._state()}
        save_file(tensors, folder / "optimizer.safetensors")
        moments = [name for name, master in self._masters.items() if self._optimizer_of[name].state.get(master)]
        (folder / "optimizer.json").write_text(json.dumps({"updates": self.updates, "moments": moments}))

    def saved_bytes(self) -> int:
        """Weights in float32 and two moments."""
        per_weight = FLOAT + moment_bytes(self.optim.states)
        return int(sum(master.numel() for master in self._masters.values()) * per_weight)

    def load(self, folder: Path) -> None:
        """Restore weights and moments. Raises ``ValueError`` if names, shapes or states do not fit, without changing
        anything."""
        path = folder / "optimizer.safetensors"
        updates, with_moments = _read_counts(folder / "optimizer.json")
        saved = _read_tensors(path)
        found = {key.removeprefix("weight.") for key in saved if key.startswith("weight.")}
        if found != set(self._masters):
            odd = sorted(found ^ set(self._masters))
            raise ValueError(f"{path}: saved for other trainable parameters; {len(odd)} differ, the first: {odd[0]}")
        for name, master in self._masters.items():
            _check_like(path, name, saved[f"weight.{name}"], master)
        states = self._check_states(path, saved, updates, with_moments)
        with torch.no_grad():
            for name, master in self._masters.items():
                master.copy_(saved[f"weight.{name}"])
        for name, state in states.items():
            master, optimizer = self._masters[name], self._optimizer_of[name]
            # fused keeps the step count on the weights' device, the others on the CPU
            fused = optimizer.defaults.get("fused")
            optimizer.state[master] = {
                key: value.to(master.device) if fused or key != "step" else value for key, value in state.items()
            }
        self._write_back(self._parameters)
        self.updates = updates

    def _check_states(
        self, path: Path, saved: dict[str, Tensor], updates: int, with_moments: list[str] | None
    ) -> dict[str, dict[str, Tensor]]:
        """The saved state of each parameter that has one, checked to be complete and of the right shape."""
        by_name: dict[str, dict[str, Tensor]] = {}
        for key, value in saved.items():
            kind, _, rest = key.partition(".")
            if kind == "state":
                entry, _, name = rest.partition(".")
                by_name.setdefault(name, {})[entry] = value
        # A parameter that never had a gradient has no moments. Older files do not list these; before the first update
        # there are no moments at all.
        missing = [] if with_moments is None else [name for name in with_moments if name not in by_name]
        if missing or (with_moments is None and updates and not by_name):
            names = missing or list(self._masters)
            raise ValueError(f"{path}: the moments of {len(names)} parameters are missing, the first: {names[0]}")
        for name, state in by_name.items():
            if name not in self._masters:
                raise ValueError(f"{path}: contains moments of {name}, which is not trained")
            if ("exp_avg_scale" in state) != (self.optim.states == "8bit"):
                raise ValueError(f"{path}: saved with other optimizer states than optim.states: {self.optim.states}")
            expected = adamw_state(self._masters[name], self.optim.states)
            if odd := sorted(state.keys() ^ expected.keys()):
                raise ValueError(f"{path}: the moments of {name} have a missing or an extra part: {', '.join(odd)}")
            for key, value in state.items():
                _check_like(path, f"{key} of {name}", value, expected[key])
        return by_name

    def forward(self, work: Callable[[], T]) -> T:
        return work()

    def gathered(self, module: nn.Module) -> AbstractContextManager[None]:
        """Nothing is sharded here."""
        return nullcontext()

    def average(self, value: float) -> float:
        return value

    def maximum(self, value: float) -> float:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def barrier(self) -> None:
        return None

    def abandon(self, error: str) -> None:
        return None

    def close(self) -> None:
        return None

    def _master(self, parameter: nn.Parameter) -> Tensor:
        offload = self.optim.states == "offload"
        if parameter.dtype == torch.float32 and not offload:
            return parameter
        place = torch.device("cpu") if offload else parameter.device
        master = parameter.detach().to(place, torch.float32, copy=True).requires_grad_(True)

        def move(p: Tensor) -> None:
            # When a gradient is complete, accumulate it in float32 and free the low-precision one.
            if p.grad is not None:
                gradient = p.grad.to(place)
                master.grad = gradient.float() if master.grad is None else master.grad.add_(gradient)
                p.grad = None

        parameter.register_post_accumulate_grad_hook(move)
        return master

    def _write_back(self, names: Iterable[str]) -> None:
        """Round the float32 copies into their parameters."""
        with torch.no_grad():
            for name in names:
                parameter = self._parameters[name]
                if self._masters[name] is not parameter:
                    parameter.copy_(self._masters[name])

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        for name, master in self._masters.items():
            yield f"weight.{name}", master
            for key, value in self._optimizer_of[name].state.get(master, {}).items():
                yield f"state.{key}.{name}", value


def _check_like(path: Path, what: str, saved: Tensor, expected: Tensor) -> None:
    for name, there, here in (
        ("shape", list(saved.shape), list(expected.shape)),
        ("type", saved.dtype, expected.dtype),
    ):
        if there != here:
            raise ValueError(f"{path}: {what} was saved with {name} {there}, but is now {here}")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None


def _read_counts(path: Path) -> tuple[int, list[str] | None]:
    """Number of updates, and the parameters that have moments (None: an older file without that list)."""
    try:
        value = json.loads(path.read_text())
        updates, moments = value["updates"], value.get("moments")
        good = isinstance(updates, int) and not isinstance(updates, bool) and updates >= 0
        good &= moments is None or all(isinstance(name, str) for name in moments)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read ({type(error).__name__}: {error})") from None
    if not good:
        raise ValueError(f"{path}: updates or moments are of the wrong type")
    return updates, moments
