"""The operations of a layer between its products, forward and backward: norms with residual sums, gates, activations
and rotary embeddings.

Peers in eager torch are what transformers' layers compute, one operator after another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.case import Case, Inputs, Run, dtype_for, installed, leaf, with_gradients
from fastrl_kernels.bias_activation import bias_activation
from fastrl_kernels.gated import gelu_mul, silu_mul
from fastrl_kernels.lora import lora_update
from fastrl_kernels.rms_norm import residual_rms_norm, rms_norm
from fastrl_kernels.rope import qkv_rope, rope

EPS = 1e-6
ROWS = {"tiny": 6, "cpu": 512, "gpu": 8192}
HIDDEN = {"tiny": 8, "cpu": 512, "gpu": 2048}  # of Qwen2.5-VL-3B on a GPU, as all widths below
INNER = {"tiny": 12, "cpu": 1376, "gpu": 11008}


def cases(size: str) -> list[Case]:
    """All cases of this file at one of ``SIZES``."""
    return [
        _norm_case(size),
        _residual_case(size),
        *_gate_cases(size),
        _bias_case(size),
        _rope_case(size),
        _split_case(size),
        _adapter_case(size),
    ]


def _case(
    size: str, name: str, op: str, shapes: Mapping[str, tuple[int, ...]], call: Run, eager: Run,
    *, angles: int | None = None, **more: Run,
) -> Case:  # fmt: skip
    """Every input of ``shapes`` gets a gradient, which is compared like the outputs. ``angles``: of so many columns.
    Least traffic: inputs, outputs, and in the backward the gradients of both, each once."""
    dtype = dtype_for(size)

    def make(device: torch.device) -> Inputs:
        x: Inputs = {key: leaf(torch.randn(shape, device=device).to(dtype)) for key, shape in shapes.items()}
        if angles is not None:
            x["cos"], x["sin"] = _angles(ROWS[size], angles, device, dtype)
        return x

    def run(function: Run) -> Run:
        def both(x: Inputs) -> tuple[Tensor, ...]:
            outs = function(x)
            value = torch.stack([out.float().square().mean() for out in outs]).sum()
            return (*(out.detach() for out in outs), *with_gradients(value, [x[key] for key in shapes])[1:])

        return both

    numbers = sum(torch.Size(shape).numel() for shape in shapes.values())
    rows, *_ = next(iter(shapes.values()))
    return Case(
        name=name, op=op, shape={"rows": rows, "width": next(iter(shapes.values()))[-1]}, make=make, ours=run(call),
        peers={"eager": run(eager), **{key: run(peer) if _runs(key) else None for key, peer in more.items()}},
        bytes=float(4 * numbers * dtype.itemsize), dtype=dtype,
    )  # fmt: skip


def _adapter_case(size: str) -> Case:
    """Queries, keys and values of a decode step of 64 rows, with adapters of rank 16, into outputs that are reset."""
    dtype, hidden, rank, scale = dtype_for(size), HIDDEN[size], 16, 2.0
    rows, sizes = min(ROWS[size], 64), (HIDDEN[size], HIDDEN[size] // 8, HIDDEN[size] // 8)

    def make(device: torch.device) -> Inputs:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=device).to(dtype)

        x: Inputs = {"x": normal(rows, hidden), "low": normal(3 * rank, hidden) / hidden**0.5}
        for i, width in enumerate(sizes):
            x[f"high {i}"], x[f"before {i}"] = normal(width, rank), normal(rows, width)
            x[f"out {i}"] = x[f"before {i}"].clone()
        return x

    def parts(x: Inputs, name: str) -> list[Tensor]:
        return [x[f"{name} {i}"] for i in range(len(sizes))]

    def ours(x: Inputs) -> tuple[Tensor, ...]:
        lora_update(x["x"], x["low"], parts(x, "high"), parts(x, "out"), scale)
        return tuple(out.clone() for out in parts(x, "out"))

    def eager(x: Inputs) -> tuple[Tensor, ...]:
        lows = x["low"].split(rank)
        for out, low, high in zip(parts(x, "out"), lows, parts(x, "high"), strict=True):
            out.add_(F.linear(F.linear(x["x"], low), high), alpha=scale)
        return tuple(out.clone() for out in parts(x, "out"))

    def reset(x: Inputs) -> None:
        for out, before in zip(parts(x, "out"), parts(x, "before"), strict=True):
            out.copy_(before)

    numbers = rows * hidden + 3 * rank * hidden + sum(sizes) * (rank + 2 * rows)
    return Case(
        name="lora_update/q, k, v", op="lora_update", shape={"rows": rows, "width": hidden, "rank": rank},
        make=make, ours=ours, peers={"eager": eager}, bytes=float(numbers * dtype.itemsize), dtype=dtype, graph=True,
        reset=reset,
    )  # fmt: skip


def _runs(peer: str) -> bool:
    return installed(f"{peer}_kernel", gpu=True)


def _plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def _liger_norm(x: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_rms_norm

    return liger_rms_norm(x, weight, EPS, in_place=False)


def _norm_case(size: str) -> Case:
    return _case(
        size, "rms_norm/text", "rms_norm", {"x": (ROWS[size], HIDDEN[size]), "weight": (HIDDEN[size],)},
        lambda x: (rms_norm(x["x"], x["weight"], EPS),),
        lambda x: (_plain_norm(x["x"], x["weight"]),),
        liger=lambda x: (_liger_norm(x["x"], x["weight"]),),
    )  # fmt: skip


def _residual_case(size: str) -> Case:
    def with_norm(norm: Callable[[Tensor, Tensor], Tensor]) -> Run:
        def call(x: Inputs) -> tuple[Tensor, ...]:
            total = x["residual"] + x["x"]
            return total, norm(total, x["weight"])

        return call

    row = (ROWS[size], HIDDEN[size])
    return _case(
        size, "residual_rms_norm/text", "residual_rms_norm", {"residual": row, "x": row, "weight": (HIDDEN[size],)},
        lambda x: tuple(residual_rms_norm(x["residual"], x["x"], x["weight"], EPS)),
        with_norm(_plain_norm),
        liger=with_norm(_liger_norm),
    )  # fmt: skip


def _liger_swiglu(x: Inputs) -> tuple[Tensor, ...]:
    from liger_kernel.transformers.functional import liger_swiglu

    return (liger_swiglu(x["gate"], x["up"]),)


def _liger_geglu(x: Inputs) -> tuple[Tensor, ...]:
    from liger_kernel.transformers.functional import liger_geglu

    return (liger_geglu(x["gate"], x["up"]),)


def _gate_cases(size: str) -> list[Case]:
    row = (ROWS[size], INNER[size])
    shapes = {"gate": row, "up": row}
    return [
        _case(
            size, "silu_mul/backward", "silu_mul", shapes,
            lambda x: (silu_mul(x["gate"], x["up"]),),
            lambda x: (F.silu(x["gate"]) * x["up"],),
            liger=_liger_swiglu,
        ),
        _case(
            size, "gelu_mul/tanh", "gelu_mul", shapes,
            lambda x: (gelu_mul(x["gate"], x["up"], approximate="tanh"),),
            lambda x: (F.gelu(x["gate"], approximate="tanh") * x["up"],),
            liger=_liger_geglu,
        ),
    ]  # fmt: skip


def _bias_case(size: str) -> Case:
    width = {"tiny": 12, "cpu": 640, "gpu": 5120}[size]
    return _case(
        size, "bias_activation/gelu", "bias_activation", {"x": (ROWS[size], width), "bias": (width,)},
        lambda x: (bias_activation(x["x"], x["bias"]),),
        lambda x: (F.gelu(x["x"] + x["bias"]),),
    )  # fmt: skip


def _angles(rows: int, dim: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [rows, dim] of positions from 0, the second half as the first."""
    speeds = 10000.0 ** (-torch.arange(0, dim, 2, device=device) / dim)
    angle = (torch.arange(rows, device=device)[:, None] * speeds).repeat(1, 2)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def _rope_case(size: str) -> Case:
    heads, kv_heads, dim = {"tiny": (2, 1, 8), "cpu": (8, 2, 64), "gpu": (16, 2, 128)}[size]
    rows = ROWS[size]

    def ours(x: Inputs) -> tuple[Tensor, ...]:
        q, k = (x[name].transpose(0, 1)[None] for name in "qk")
        return tuple(y[0].transpose(0, 1) for y in rope(q, k, x["cos"][None], x["sin"][None]))

    def eager(x: Inputs) -> tuple[Tensor, ...]:
        cos, sin = x["cos"][:, None], x["sin"][:, None]
        return tuple(_turn(x[name], cos, sin) for name in "qk")

    shapes = {"q": (rows, heads, dim), "k": (rows, kv_heads, dim)}
    return _case(size, "rope/text", "rope", shapes, ours, eager, angles=dim)


def _split_case(size: str) -> Case:
    heads, dim = {"tiny": (2, 8), "cpu": (8, 64), "gpu": (16, 80)}[size]
    rows = ROWS[size]

    def ours(x: Inputs) -> tuple[Tensor, ...]:
        return tuple(qkv_rope(x["qkv"], x["cos"], x["sin"]))

    def eager(x: Inputs) -> tuple[Tensor, ...]:
        cos, sin = x["cos"][:, None], x["sin"][:, None]
        q, k, v = x["qkv"].unbind(1)
        return _turn(q, cos, sin), _turn(k, cos, sin), v

    return _case(size, "qkv_rope/vision", "qkv_rope", {"qkv": (rows, 3, heads, dim)}, ours, eager, angles=dim)
