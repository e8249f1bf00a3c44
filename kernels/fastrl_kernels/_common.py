"""Common to all kernel files: the choice between Triton and eager code, launches, and argument checks."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

from fastrl_kernels._triton import HAS_TRITON

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KERNEL_FLOATS = FLOATS[:3]  # those that Triton kernels take: float64 is torch's
INTEGERS = (torch.int64, torch.int32)  # of targets, ids, counts and labels
WHOLE = (torch.uint8, torch.int8, torch.int16, *INTEGERS)  # of coordinates


class Recorder(Protocol):
    """Replaces a GPU inside ``aot.as_launched``: it receives launches, and none runs."""

    processors: int

    def record(self, kernel: Any, programs: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> None: ...


_INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"  # as Triton read it when kernels were decorated
RECORDERS: list[Recorder] = []  # those of the active ``as_launched`` contexts, the innermost last


def interpreting() -> bool:
    """True if the Triton interpreter replaces the compiler (``TRITON_INTERPRET=1``), as in the CPU tests."""
    return _INTERPRETING


def use_triton(*tensors: Tensor | None) -> bool:
    """True if these tensors take the Triton path: on a CUDA device, under the interpreter, or inside
    ``as_launched``."""
    if not HAS_TRITON:
        return False
    return bool(RECORDERS) or interpreting() or any(t is not None and t.is_cuda for t in tensors)


def use_operator(tensor: Tensor) -> bool:
    """True if a pointwise function takes its operator for ``tensor``: on the Triton path in a dtype of its kernels, and
    on the meta device, where the operator is counted. Elsewhere it is C++ (``_native_pointwise``) or plain torch."""
    return tensor.dtype != torch.float64 and (tensor.is_meta or use_triton(tensor))


def launch(kernel: Any, programs: int) -> Callable[..., None]:
    """``kernel[(programs,)]``, to be called with the kernel's arguments; launches on the GPU of their first tensor.

    Triton itself launches on the current device, which may not be the tensors' device.
    """

    def start(*arguments: Any, **options: Any) -> None:
        if RECORDERS:
            RECORDERS[-1].record(kernel, programs, arguments, options)
            return
        with torch.cuda.device_of(next(a for a in arguments if isinstance(a, Tensor))):
            kernel[(programs,)](*arguments, **options)

    return start


def processors(device: torch.device) -> int:
    """Number of multiprocessors of the device that kernels are launched on."""
    if RECORDERS:
        return RECORDERS[-1].processors
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def readable(*tensors: Tensor | None) -> bool:
    """True if the tensors' values can be read without synchronisation: on the CPU, neither traced, fake nor inside a
    transform of ``torch.func``."""
    for tensor in tensors:
        if tensor is not None:
            plain = type(tensor) is Tensor or type(tensor) is torch.nn.Parameter
            if not plain or tensor.device.type != "cpu" or torch.compiler.is_compiling():
                return False
            if is_functorch_wrapped_tensor(tensor):
                return False
    return True


def shaped(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """``tensor.view(shape)``; no operator is dispatched where it has that shape."""
    return tensor if tensor.shape == torch.Size(shape) else tensor.view(shape)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """``tensor.contiguous()`` of a tensor that may be left out."""
    return None if tensor is None else tensor.contiguous()


def join_batches(size: int, dims: Sequence[int | None], tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Arguments of an operator under ``torch.vmap`` with the mapped dimension joined to their first one, the batch.

    Args:
        size: of the mapped dimension.
        dims: which dimension of each tensor is mapped; None: it is the same for all, and is repeated.
        tensors: each with a batch as its first dimension beside the mapped one.
    """
    joined: list[Tensor | None] = []
    for tensor, dim in zip(tensors, dims, strict=True):
        if tensor is not None:
            tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            tensor = tensor.flatten(0, 1)
        joined.append(tensor)
    return joined


def floating_pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Whole coordinates as floats: of the other's dtype if that is one, else float32 (exact up to 2^24)."""
    like = next((x.dtype for x in (a, b) if x.is_floating_point()), torch.float32)
    whole = [x.to(like) if x.dtype in WHOLE else x for x in (a, b)]
    return whole[0], whole[1]


def refuse_forward_mode(name: str, *tensors: Tensor | None) -> None:
    """Raise if a tensor has a tangent: an operator would drop it, and the derivative would silently be 0."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(t is not None and t.is_floating_point() and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            f"{name}: has no forward-mode derivative; use fastrl_kernels.reference.{name}_reference, or reverse mode"
        )


class Once(torch.autograd.Function):
    """A first derivative whose own derivative raises instead of being 0. Applied to (gradient, at, name)."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, at: Tensor, name: str) -> Tensor:
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(f"{ctx.name}: has no second derivative")


def check(condition: bool, message: str) -> None:
    """Raise ``ValueError(message)`` unless ``condition``; messages name the argument and what it got."""
    if not condition:
        raise ValueError(message)


def check_number(name: str, value: object, good: bool, expected: str) -> None:
    """Raise unless ``good``. The message is only formatted then: under ``torch.compile`` the number may be symbolic."""
    if not good:
        raise ValueError(f"{name}: expected {expected}, got {value}")


def check_shape(name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    """Raise unless ``tensor`` has this shape (``None``: any size)."""
    got = tensor.shape
    if len(got) == len(shape):
        for have, want in zip(got, shape, strict=True):  # a plain loop, as every call runs it
            if want is not None and have != want:
                break
        else:
            return
    wanted = "[" + ", ".join("any" if w is None else str(w) for w in shape) + "]"
    raise ValueError(f"{name}: expected shape {wanted}, got {list(got)}")


def check_dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """Raise ``TypeError`` unless ``tensor.dtype`` is one of ``allowed``."""
    if tensor.dtype not in allowed:
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(f"{name}: expected dtype {names}, got {str(tensor.dtype).removeprefix('torch.')}")


def check_same_device(**tensors: Tensor | None) -> None:
    """Raise unless all given tensors live on one device."""
    named = {k: t.device for k, t in tensors.items() if t is not None}
    if len(set(named.values())) > 1:
        raise ValueError("tensors on different devices: " + ", ".join(f"{k} on {d}" for k, d in named.items()))
