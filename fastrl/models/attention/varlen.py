"""Which variable-length attention this machine has, and whether a call may take it. Found by looking at what is there.

All libraries are brought to one contract, ``VarlenCall``: queries [Tq, Hq, D] and keys and values [Tk, Hkv, D] of many
segments, one after another; a segment's queries see its own keys, causally aligned with its last ones, or all of them.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
DENSE = "scaled-dot-product attention, a block per prompt, group of answers, or window length"


class VarlenCall(Protocol):
    """``call(q, k, v, cu_q, cu_k, max_q, max_k, scale=…, causal=…)`` → [Tq, Hq, D]; differentiable in q, k and v.

    ``cu_q``, ``cu_k`` [S + 1] int32 on the device: where each segment begins; ``max_q``, ``max_k``: the longest ones.
    Key heads may be fewer than query heads and divide them. Causal: the last query sees all keys of its segment.
    """

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *,
        scale: float | None, causal: bool,
    ) -> Tensor: ...  # fmt: skip


class Found(NamedTuple):
    """The library found, or None and why each one is not there."""

    call: VarlenCall | None
    name: str
    missing: tuple[str, ...]


class Path(NamedTuple):
    """The way attention takes: a variable-length ``call``, or None for the dense path; and why."""

    call: VarlenCall | None
    reason: str


def choose(device: torch.device, dtype: torch.dtype, head_dim: int) -> Path:
    """The way for tensors of this device, dtype and head size. Asks nothing of the device that would synchronise it."""
    if device.type != "cuda":
        return Path(None, f"no GPU: {DENSE}")
    if dtype not in DTYPES:
        return Path(None, f"{dtype} on a GPU, and variable-length kernels take bfloat16 and float16: {DENSE}")
    if head_dim % 8 or head_dim > MAX_HEAD_DIM:
        return Path(None, f"heads of {head_dim}, not a multiple of 8 up to {MAX_HEAD_DIM}: {DENSE}")
    if _capability(device) < (8, 0):
        return Path(None, f"the GPU is older than compute capability 8.0: {DENSE}")
    found = find()
    if found.call is None:
        return Path(None, f"{'; '.join(found.missing)}: {DENSE}")
    return Path(found.call, f"one variable-length call per layer: {found.name}")


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def find() -> Found:
    """The first of: torch's own, flash-attn 3, flash-attn 2, flash-attn 4 (its backward is not tuned for every GPU)."""
    missing: list[str] = []
    for name, module, adapt in (
        ("torch.nn.attention.varlen", "torch.nn.attention.varlen", _torch_call),
        ("flash-attn 3", "flash_attn_interface", _flash_call),
        ("flash-attn 2", "flash_attn", _flash_call),
        ("flash-attn 4", "flash_attn.cute", _flash_call),
    ):
        try:
            call = adapt(importlib.import_module(module))
        except (ImportError, OSError) as error:  # OSError: a compiled part that does not load here
            missing.append(f"{name}: {type(error).__name__}")
            continue
        if call is not None:
            return Found(call, name, tuple(missing))
        missing.append(f"{name}: too old")
    return Found(None, "none", tuple(missing))


def _torch_call(module: Any) -> VarlenCall | None:
    """torch's call. The first versions knew no scale and ``is_causal`` in place of a window."""
    varlen_attn: Callable[..., Any] | None = getattr(module, "varlen_attn", None)
    if varlen_attn is None:
        return None
    known = inspect.signature(varlen_attn).parameters
    if "scale" not in known:
        return None

    def call(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *,
        scale: float | None, causal: bool,
    ) -> Tensor:  # fmt: skip
        options: dict[str, Any] = {"scale": scale}
        if "window_size" in known:
            options["window_size"] = (-1, 0) if causal else (-1, -1)
        else:
            options["is_causal"] = causal
        if "enable_gqa" in known:
            options["enable_gqa"] = q.shape[1] != k.shape[1]
        elif q.shape[1] != k.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return cast(Tensor, varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, **options))

    return call


def _flash_call(module: Any) -> VarlenCall | None:
    """flash-attn's call, of any generation: arguments by name, as their order differs; some return (out, lse)."""
    varlen_func: Callable[..., Any] | None = getattr(module, "flash_attn_varlen_func", None)
    if varlen_func is None:
        return None
    known = inspect.signature(varlen_func).parameters

    def call(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *,
        scale: float | None, causal: bool,
    ) -> Tensor:  # fmt: skip
        options = {
            "cu_seqlens_q": cu_q,
            "cu_seqlens_k": cu_k,
            "max_seqlen_q": max_q,
            "max_seqlen_k": max_k,
            "softmax_scale": scale,
            "causal": causal,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }
        out = varlen_func(q, k, v, **{name: value for name, value in options.items() if name in known})
        return out[0] if isinstance(out, tuple) else cast(Tensor, out)

    return call
