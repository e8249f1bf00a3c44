"""AdamW with 8-bit states: two bytes a parameter for both moments instead of eight.

Each block of 256 numbers has a float32 scale, its largest magnitude; a number x is stored as one of 255 levels

    first moment   sign · (q / 127)³ · scale, q in −127 … 127        second moment   (q / 255)⁴ · scale, q in 0 … 255

which are dense near zero, like moments. Block-wise scales are from arXiv:2110.02861. Rounding between the two
neighbouring levels is stochastic, so that moments are correct in expectation: a decay of 0.1 % per step is less than
the distance to the next level and would be lost by rounding to the nearest. A nonzero second moment is never rounded to
zero, as its parameter would make a huge step. The random numbers depend only on the step and the parameter's index, so
a resumed run is bitwise identical.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256
CHUNK_BYTES = 42  # of the temporaries of _update_chunk for each of its numbers, at their peak (in encode)
CHUNK = 1 << 22  # numbers processed at once, which bounds the temporaries


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (arXiv:1711.05101) whose moments are kept in 8 bits. Parameters and gradients are float32.

    Args:
        params: parameters or groups of them, as any torch optimizer takes.
        lr, betas, eps, weight_decay: as ``torch.optim.AdamW``.

    State of a parameter of n numbers: ``step`` (a 0-d float32 on the CPU), ``exp_avg`` int8 and ``exp_avg_sq`` uint8
    [ceil(n / 256), 256], ``exp_avg_scale`` and ``exp_avg_sq_scale`` float32 [ceil(n / 256)].
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = closure() if closure is not None else None
        place = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                place += 1
                if parameter.grad is not None:
                    self._update(parameter, group, place)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any], place: int) -> None:
        state = self.state[parameter]
        if not state:
            state.update(empty_state(parameter))
        state["step"] += 1
        step = int(state["step"])
        rng = torch.Generator(parameter.device).manual_seed((step * 1_000_003 + place) % 2**63)
        weights, gradient = parameter.view(-1), parameter.grad
        assert gradient is not None
        gradient = gradient.reshape(-1)
        for start in range(0, len(weights), CHUNK):
            numbers = slice(start, start + CHUNK)
            blocks = slice(start // BLOCK, -(-min(start + CHUNK, len(weights)) // BLOCK))
            _update_chunk(weights[numbers], gradient[numbers], state, blocks, group, step, rng)


def empty_state(parameter: Tensor) -> dict[str, Tensor]:
    """State of a parameter before its first update."""
    blocks = -(-parameter.numel() // BLOCK)
    made = parameter.new_zeros
    return {
        "step": torch.zeros(()),
        "exp_avg": made((blocks, BLOCK), dtype=torch.int8),
        "exp_avg_sq": made((blocks, BLOCK), dtype=torch.uint8),
        "exp_avg_scale": made(blocks),
        "exp_avg_sq_scale": made(blocks),
    }


def adamw_state(parameter: Tensor, states: str) -> dict[str, Tensor]:
    """Tensors like those that the optimizer of ``optim.states`` keeps of a parameter, without memory."""
    like = torch.empty_like(parameter, device="meta")
    if states == "8bit":
        return empty_state(like)
    return {"step": torch.zeros((), device="meta"), "exp_avg": like, "exp_avg_sq": like}


def step_scratch(numbers: int, states: str, *, fused: bool) -> int:
    """Bytes that AdamW's step allocates for a moment, for a largest parameter of so many numbers.

    The fused kernel allocates nothing, torch's loop the second moment's square root and its quotient, the 8-bit step
    what ``_update_chunk`` makes of a chunk.
    """
    if states == "8bit":
        return CHUNK_BYTES * min(numbers, CHUNK)
    return 0 if fused else 2 * torch.float32.itemsize * numbers


def _update_chunk(
    weight: Tensor,
    gradient: Tensor,
    state: dict[str, Tensor],
    blocks: slice,
    group: dict[str, Any],
    step: int,
    rng: torch.Generator,
) -> None:
    """One AdamW update of ``weight`` [n] in place, and of its ``blocks`` of the state."""
    beta1, beta2 = group["betas"]
    n = len(weight)
    g = F.pad(gradient.float(), (0, -n % BLOCK)).view(-1, BLOCK)
    m = decode(state["exp_avg"][blocks], state["exp_avg_scale"][blocks])
    m.lerp_(g, 1 - beta1)
    v = decode(state["exp_avg_sq"][blocks], state["exp_avg_sq_scale"][blocks])
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    del g
    weight.mul_(1 - group["lr"] * group["weight_decay"])
    denominator = (v.sqrt() / (1 - beta2**step) ** 0.5).add_(group["eps"])
    weight.addcdiv_(m.view(-1)[:n], denominator.view(-1)[:n], value=-group["lr"] / (1 - beta1**step))
    del denominator
    for name, value in (("exp_avg", m), ("exp_avg_sq", v)):
        levels, scale = encode(value, state[name].dtype, rng)
        state[name][blocks], state[f"{name}_scale"][blocks] = levels, scale


def decode(levels: Tensor, scale: Tensor) -> Tensor:
    """Levels [blocks, 256] int8 (signed, cubic) or uint8 (quartic) and scales [blocks] → float32 [blocks, 256]."""
    signed = levels.dtype == torch.int8
    return (levels.float() / (127 if signed else 255)).pow_(3 if signed else 4).mul_(scale[:, None])


def encode(value: Tensor, dtype: torch.dtype, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Float32 [blocks, 256] → levels of ``dtype`` (see ``decode``) and scales, rounded so that the mean is kept."""
    power, most = (3, 127) if dtype == torch.int8 else (4, 255)
    scale = value.abs().amax(1)
    unit = value.abs() / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    low = (unit ** (1 / power)).mul_(most).floor_().clamp_(0, most)
    below, above = (low / most) ** power, ((low + 1) / most) ** power
    fraction = (unit - below).div_(above - below)
    up = torch.rand(value.shape, generator=rng, device=value.device) < fraction
    levels = (low + up).clamp_(0, most)
    if dtype == torch.uint8:
        levels = torch.where(value > 0, levels.clamp_(min=1), levels)
    return (levels * value.sign()).to(dtype), scale
