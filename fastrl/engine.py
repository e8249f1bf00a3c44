"""Engines: backward · step · save · load behind one small protocol. Local torch here, DeepSpeed (ZeRO 0 to 2) beside
it.

The local engine keeps a float32 copy of every low-precision parameter: at the learning rates of RL (1e-6) an update is
smaller than half a unit in the last place of a bfloat16 weight, and would be rounded away.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from fastrl.recipe import EngineRecipe, OptimRecipe


class NonFiniteError(RuntimeError):
    """A loss or gradient that is not a finite number."""


class StepInfo(NamedTuple):
    """One optimizer update: the gradient's norm before clipping, and the learning rate of the first group."""

    grad_norm: float
    lr: float


class Engine(Protocol):
    """What the trainer needs of an engine. ``rank`` and ``world_size`` count data-parallel processes."""

    rank: int
    world_size: int

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add the gradient of ``loss``; ``last``: the next call is :meth:`step`."""
        ...

    def step(self) -> StepInfo:
        """Clip, update, clear. A gradient that is not finite raises ``NonFiniteError`` and leaves the weights alone."""
        ...

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...

    def gradient_of(self, parameter: Tensor) -> Tensor | None:
        """The float32 gradient :meth:`step` will read, zeros where there is none yet; None: this engine shows none."""
        ...

    def gathered(self) -> AbstractContextManager[None]:
        """Inside: the head's weight is whole (it always is up to ZeRO 2)."""
        ...

    def average(self, value: float) -> float: ...

    def maximum(self, value: float) -> float: ...

    def barrier(self) -> None: ...


def make_engine(model: nn.Module, optim: OptimRecipe, engine: EngineRecipe) -> Engine:
    """The engine a recipe names, over the trainable parameters of ``model``."""
    if engine.kind == "deepspeed":
        from fastrl.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(model, optim, engine)
    return LocalEngine(model, optim)


def deepspeed_available() -> bool:
    """Whether DeepSpeed is installed (it is only imported when used)."""
    return importlib.util.find_spec("deepspeed") is not None


def lr_scale(update: int, optim: OptimRecipe) -> float:
    """Factor on the learning rate of update number ``update`` (from 0): linear warm-up, then constant or cosine."""
    total = optim.steps * optim.updates_per_batch
    warmup = math.ceil(optim.warmup * total) if optim.warmup < 1 else int(optim.warmup)
    if update < warmup:
        return (update + 1) / warmup
    if optim.schedule == "constant":
        return 1.0
    progress = min(1.0, (update - warmup) / max(1, total - warmup))
    return optim.min_lr_ratio + (1 - optim.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern names a parameter: a glob over its full name, or a run of whole parts of it."""
    return fnmatch.fnmatchcase(name, pattern) or f".{pattern}." in f".{name}."


def parameter_groups(model: nn.Module, optim: OptimRecipe) -> list[dict[str, Any]]:
    """Trainable parameters by learning rate and weight decay, with their names, in the order the model lists them.

    Raises:
        ValueError: nothing is trainable, or a pattern of ``optim.groups`` names no trainable parameter.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("nothing to train: every parameter is frozen (model.freeze, model.lora)")
    for number, group in enumerate(optim.groups):
        if not any(matches(group.match, name) for name, _ in trainable):
            parts = sorted({part for name, _ in trainable for part in name.split(".") if not part.isdigit()})
            raise ValueError(
                f"optim.groups.{number}.match: {group.match!r} names no trainable parameter; "
                f"parts of names: {', '.join(parts)}"
            )
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in trainable:
        chosen = next((g for g in optim.groups if matches(g.match, name)), None)
        lr = chosen.lr if chosen is not None and chosen.lr is not None else optim.lr
        decay = chosen.weight_decay if chosen is not None and chosen.weight_decay is not None else optim.weight_decay
        decay = decay if parameter.ndim >= 2 else 0.0
        group = groups.setdefault(
            (lr, decay), {"params": [], "names": [], "lr": lr, "weight_decay": decay, "base_lr": lr}
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


class LocalEngine:
    """One process, one device, AdamW."""

    rank = 0
    world_size = 1

    def __init__(self, model: nn.Module, optim: OptimRecipe) -> None:
        self.optim = optim
        self.updates = 0
        self._parameters: dict[str, nn.Parameter] = {}
        self._masters: dict[str, Tensor] = {}  # what the optimizer steps: the parameter itself, or its float32 copy
        groups = parameter_groups(model, optim)
        for group in groups:
            named = dict(zip(group.pop("names"), group["params"], strict=True))
            masters = {name: self._master(parameter) for name, parameter in named.items()}
            self._parameters |= named
            self._masters |= masters
            group["params"] = list(masters.values())
        on_gpu = next(iter(self._parameters.values())).is_cuda
        self._adamw = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=on_gpu)

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add the gradient of ``loss`` (in float32, whatever the parameters are)."""
        loss.backward()

    def step(self) -> StepInfo:
        """Clip by global norm, update, clear the gradients."""
        masters = list(self._masters.values())
        gradients = [m.grad for m in masters if m.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
        grad_norm = float(norm)
        if not math.isfinite(grad_norm):
            self.clear()
            raise NonFiniteError(f"the gradient norm is {grad_norm}")
        if self.optim.clip_norm is not None and gradients:
            torch.nn.utils.clip_grads_with_norm_(masters, self.optim.clip_norm, norm)
        scale = lr_scale(self.updates, self.optim)
        for group in self._adamw.param_groups:
            group["lr"] = group["base_lr"] * scale
        self._adamw.step()
        self._write_back()
        self.clear()
        self.updates += 1
        return StepInfo(grad_norm=grad_norm, lr=float(self._adamw.param_groups[0]["lr"]))

    def gradient_of(self, parameter: Tensor) -> Tensor | None:
        """The float32 gradient of a trained parameter (None: it is not trained)."""
        name = next((n for n, p in self._parameters.items() if p is parameter), None)
        if name is None:
            return None
        master = self._masters[name]
        if master.grad is None:
            master.grad = torch.zeros_like(master)
        return master.grad

    def clear(self) -> None:
        """Forget all gradients."""
        for parameter in (*self._masters.values(), *self._parameters.values()):
            parameter.grad = None

    def save(self, folder: Path) -> None:
        """Write ``optimizer.safetensors`` (weights as the optimizer holds them, moments) and ``optimizer.json``."""
        from safetensors.torch import save_file

        tensors = {key: tensor.detach().contiguous() for key, tensor in self._state()}
        save_file(tensors, folder / "optimizer.safetensors")
        (folder / "optimizer.json").write_text(json.dumps({"updates": self.updates}))

    def load(self, folder: Path) -> None:
        """Restore weights and moments. Raises ``ValueError`` where names or shapes are not this model's."""
        from safetensors.torch import load_file

        saved = load_file(folder / "optimizer.safetensors")
        found = {key.removeprefix("weight.") for key in saved if key.startswith("weight.")}
        if found != set(self._masters):
            odd = sorted(found ^ set(self._masters))
            raise ValueError(f"{folder}: saved for other trainable parameters; {len(odd)} differ, the first: {odd[0]}")
        with torch.no_grad():
            for name, master in self._masters.items():
                weight = saved[f"weight.{name}"]
                if weight.shape != master.shape:
                    raise ValueError(
                        f"{folder}: {name} was saved with shape {list(weight.shape)}, is {list(master.shape)}"
                    )
                master.copy_(weight)
                state = {key: saved[f"state.{key}.{name}"] for key in _MOMENTS if f"state.{key}.{name}" in saved}
                fused = self._adamw.defaults[
                    "fused"
                ]  # keeps its step count beside the weights, the plain one on the CPU
                for key, value in state.items():
                    state[key] = value.to(master.device) if fused or key != "step" else value
                if state:
                    self._adamw.state[master] = state
        self._write_back()
        self.updates = int(json.loads((folder / "optimizer.json").read_text())["updates"])

    def gathered(self) -> AbstractContextManager[None]:
        """Nothing is sharded here."""
        return nullcontext()

    def average(self, value: float) -> float:
        return value

    def maximum(self, value: float) -> float:
        return value

    def barrier(self) -> None:
        return None

    def _master(self, parameter: nn.Parameter) -> Tensor:
        if parameter.dtype == torch.float32:
            return parameter
        master = parameter.detach().float().clone().requires_grad_(True)

        def move(p: Tensor) -> None:
            # As soon as a gradient is complete: accumulated in float32, and the low-precision one freed.
            if p.grad is not None:
                master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
                p.grad = None

        parameter.register_post_accumulate_grad_hook(move)
        return master

    def _write_back(self) -> None:
        """Round the float32 copies into their parameters."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                if self._masters[name] is not parameter:
                    parameter.copy_(self._masters[name])

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        for name, master in self._masters.items():
            yield f"weight.{name}", master
            for key, value in self._adamw.state.get(master, {}).items():
                yield f"state.{key}.{name}", value


_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
