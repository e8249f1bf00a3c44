"""The C++ CPU paths of ``csrc/``, called through ctypes (which releases the GIL).

The extension is optional: if it was not built or has another version, :func:`library` returns ``None`` and callers take
their eager path. Number of threads: ``torch.get_num_threads()``.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from ctypes import c_double, c_int, c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

ABI_VERSION = 1

_SIGNATURES = {
    # is_double, cost, n_rows, n_cols, problems, n, m, maximize, match, total, status, threads
    "fastrl_linear_assignment": [c_int, *[c_void_p] * 3, *[c_int64] * 3, c_int, *[c_void_p] * 3, c_int],
    # is_double, pred, gt, n_pred, n_gt, pred_label, gt_label, problems, n, m, boxes, sequence, threshold, scale,
    # match, quality, parts, threads
    "fastrl_detection_reward": [
        c_int, *[c_void_p] * 6, *[c_int64] * 3, c_int, c_int, c_double, c_double, *[c_void_p] * 3, c_int,
    ],
    # model, rows, sampler, steps, threads, parallel, level (see decode_step.py)
    "fastrl_decode": [*[c_void_p] * 3, c_int64, c_int, c_void_p, c_int],
    "fastrl_decode_level": [],
}  # fmt: skip
_RESULTS = {"fastrl_decode": c_int64}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded extension, or ``None``; :func:`why_not` gives the reason."""
    return _load()[0]


@functools.cache
def why_not() -> str | None:
    """The reason why the native path is not used, or ``None`` if it is."""
    return _load()[1]


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    spec = importlib.util.find_spec("fastrl_kernels._C")
    if spec is None or spec.origin is None:
        return None, "the extension was not built (no C++ compiler at installation)"
    try:
        lib = ctypes.CDLL(spec.origin)
        lib.fastrl_abi_version.restype = c_int32
        version = lib.fastrl_abi_version()
    except (OSError, AttributeError) as error:
        return None, f"{Path(spec.origin).name} cannot be loaded: {error}"
    if version != ABI_VERSION:
        return None, f"{Path(spec.origin).name} has version {version}, this package needs {ABI_VERSION}: rebuild it"
    for name, arguments in _SIGNATURES.items():
        if (function := getattr(lib, name, None)) is not None:  # a library built before it was added lacks it
            function.argtypes = arguments
            function.restype = _RESULTS.get(name, c_int)
    return lib, None


def lacks(name: str) -> str | None:
    """Why this function cannot be called, or ``None`` where it can."""
    lib = library()
    if lib is None:
        return why_not()
    return None if hasattr(lib, name) else f"the extension was built without {name}: rebuild it"


def linear_assignment(
    cost: Tensor, n_rows: Tensor | None, n_cols: Tensor | None, maximize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``(match, total, status)`` of CPU costs ``[B, n, m]``; counts int64, contiguous. Solves in double."""
    cost = _float(cost)
    problems, n, m = cost.shape
    match = torch.empty((problems, n), dtype=torch.int64)
    total = torch.empty(problems, dtype=cost.dtype)
    status = torch.empty(problems, dtype=torch.int32)
    tensors = (cost, n_rows, n_cols)
    _call(
        "fastrl_linear_assignment",
        cost.dtype == torch.float64, *map(_pointer, tensors), problems, n, m, maximize,
        match.data_ptr(), total.data_ptr(), status.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return match, total, status


def detection_reward(
    pred: Tensor,
    gt: Tensor,
    n_pred: Tensor,
    n_gt: Tensor,
    pred_label: Tensor | None,
    gt_label: Tensor | None,
    boxes: bool,
    sequence: bool,
    threshold: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(match [B, n], quality [B, n], parts [6, B])`` of CPU boxes or points; counts and labels int64, contiguous."""
    pred, gt = _float(pred), _float(gt)
    problems, n, _ = pred.shape
    match = torch.empty((problems, n), dtype=torch.int64)
    quality = torch.empty((problems, n), dtype=pred.dtype)
    parts = torch.empty((6, problems), dtype=pred.dtype)
    tensors = (pred, gt, n_pred, n_gt, pred_label, gt_label)
    _call(
        "fastrl_detection_reward",
        pred.dtype == torch.float64, *map(_pointer, tensors), problems, n, gt.shape[1], boxes, sequence,
        threshold, scale, match.data_ptr(), quality.data_ptr(), parts.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return match, quality, parts


def _float(tensor: Tensor) -> Tensor:
    return (tensor if tensor.dtype == torch.float64 else tensor.float()).contiguous()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _call(name: str, *arguments: object) -> None:
    lib = library()
    if lib is None:
        raise RuntimeError(f"{name}: {why_not()}")
    if getattr(lib, name)(*arguments) != 0:
        raise MemoryError(f"{name}: out of memory")
