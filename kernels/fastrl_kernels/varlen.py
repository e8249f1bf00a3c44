"""Detects which variable-length attention is installed, and decides whether a call may use it.

All libraries are adapted to one contract, ``VarlenCall``: queries [Tq, Hq, D] and keys and values [Tk, Hkv, D] of many
segments, concatenated. A segment's queries attend to all of its keys, or causally, with the last query aligned to the
last key.
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
FLASH_3 = ("flash_attn_interface", "flash_attn_3.flash_attn_interface")  # its module, by how it was installed
DENSE = "scaled-dot-product attention, a block per prompt, group of answers, or window length"


class VarlenCall(Protocol):
    """``call(q, k, v, cu_q, cu_k, max_q, max_k, scale=…, causal=…)`` → [Tq, Hq, D]; differentiable in q, k and v.

    ``cu_q``, ``cu_k`` [S + 1] int32 on the device: the start of each segment; ``max_q``, ``max_k``: the longest length.
    The number of key heads divides the number of query heads. Causal: a segment's last query attends to all its keys.
    """

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *,
        scale: float | None, causal: bool,
    ) -> Tensor: ...  # fmt: skip


class Found(NamedTuple):
    """The library found, or None; and why each library before it is unavailable."""

    call: VarlenCall | None
    name: str
    missing: tuple[str, ...]


class Path(NamedTuple):
    """The attention path: a variable-length ``call``, or None for the dense path; and the reason."""

    call: VarlenCall | None
    reason: str


def choose(device: torch.device, dtype: torch.dtype, head_dim: int) -> Path:
    """Choose the path for tensors of this device, dtype and head size, without synchronising the device."""
    if device.type != "cuda":
        return Path(None, f"no GPU: {DENSE}")
    if dtype not in DTYPES:
        return Path(None, f"variable-length kernels take bfloat16 and float16, not {dtype}: {DENSE}")
    if head_dim % 8 or head_dim > MAX_HEAD_DIM:
        return Path(None, f"head size {head_dim} is not a multiple of 8 up to {MAX_HEAD_DIM}: {DENSE}")
    if _capability(device) < (8, 0):
        return Path(None, f"the GPU is older than compute capability 8.0: {DENSE}")
    found = find(hopper=is_hopper(device))
    if found.call is None:
        return Path(None, f"{'; '.join(found.missing)}: {DENSE}")
    return Path(found.call, f"one variable-length call per layer: {found.name}")


def is_hopper(device: torch.device) -> bool:
    """Whether flash-attn 3 is written for this device: a GPU of compute capability 9."""
    return device.type == "cuda" and _capability(device)[0] == 9


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def find(*, hopper: bool = False) -> Found:
    """The first available of torch, flash-attn 3, 2 and 4 (last: its backward is not tuned for every GPU).

    ``hopper``: flash-attn 3, which is written for GPUs of compute capability 9, comes before torch there. That order
    follows its authors' figures (arXiv:2407.08608); this project has never run it.
    """
    missing: list[str] = []
    third = [("flash-attn 3", module, _flash_call) for module in FLASH_3]
    torch_own = [("torch.nn.attention.varlen", "torch.nn.attention.varlen", _torch_call)]
    for name, module, adapt in (
        *(third + torch_own if hopper else torch_own + third),
        ("flash-attn 2", "flash_attn", _flash_call),
        ("flash-attn 4", "flash_attn.cute", _flash_call),
    ):
        try:
            call = adapt(importlib.import_module(module))
        except (ImportError, OSError) as error:  # OSError: a compiled extension that does not load
            missing.append(f"{name}: {type(error).__name__}")
            continue
        if call is not None:
            return Found(call, name, tuple(dict.fromkeys(missing)))
        missing.append(f"{name}: too old")
    return Found(None, "none", tuple(dict.fromkeys(missing)))


def _torch_call(module: Any) -> VarlenCall | None:
    """torch's call. Early versions have no ``scale`` (not supported here), or ``is_causal`` instead of a window."""
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
    """flash-attn's call, any generation: arguments by name, as their order differs; some return (out, lse)."""
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


def eager_call(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *,
    scale: float | None, causal: bool,
) -> Tensor:  # fmt: skip
    """A ``VarlenCall`` in plain torch, on the host: every segment by itself."""
    queries, keys = ((cu[1:] - cu[:-1]).tolist() for cu in (cu_q, cu_k))
    parts = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
    return torch.cat([segment(*part, scale, causal=causal) for part in parts])


def segment(q: Tensor, k: Tensor, v: Tensor, scale: float | None, *, causal: bool) -> Tensor:
    """Attention of one segment: q [n, Hq, D] to k, v [m, Hk, D], in float32 or wider → [n, Hq, D]."""
    wide = torch.promote_types(q.dtype, torch.float32)
    query, key, value = (x.transpose(0, 1).to(wide) for x in (q, k, v))
    key, value = (x.repeat_interleave(len(query) // len(x), 0) for x in (key, value))
    scores = query @ key.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        later = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).triu(len(k) - len(q) + 1)
        scores = scores.masked_fill(later, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(0, 1).to(q.dtype)
