"""The C++ CPU paths of ``csrc/``, called through ctypes (which releases the GIL).

The extension is optional: if it was not built or has another version, :func:`library` returns ``None`` and callers take
their eager path. Number of threads: ``torch.get_num_threads()``.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Sequence
from ctypes import c_double, c_int, c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor, peek_interpreter_stack
from torch.autograd import forward_ad
from torch.nn import Parameter

from fastrl_kernels import _common

ABI_VERSION = 1

_SIGNATURES = {
    # is_double, cost, n_rows, n_cols, problems, n, m, maximize, match, total, status, threads
    "fastrl_linear_assignment": [c_int, *[c_void_p] * 3, *[c_int64] * 3, c_int, *[c_void_p] * 3, c_int],
    # is_double, pred, gt, n_pred, n_gt, pred_label, gt_label, problems, n, m, boxes, sequence, threshold, scale,
    # match, quality, parts, threads
    "fastrl_detection_reward": [
        c_int, *[c_void_p] * 6, *[c_int64] * 3, c_int, c_int, c_double, c_double, *[c_void_p] * 3, c_int,
    ],
    # completion, mask, n, completions, per_row, denominator, weight
    "fastrl_token_weights": [*[c_void_p] * 2, *[c_int64] * 2, c_int, c_double, c_void_p],
    # rewards, weights, group, r, k, size, groups, leave_one_out, scale, unbiased, eps, five results
    "fastrl_group_advantage": [
        *[c_void_p] * 3, *[c_int64] * 4, *[c_int] * 3, c_double, *[c_void_p] * 5,
    ],
    # logp, advantage, completion, weight, old, ref, sampler, bounds, n, completions, loss, kl, k2_gradient, penalised,
    # dual, sequence, importance, importance_sequence, three results
    "fastrl_policy_rows": [*[c_void_p] * 8, *[c_int64] * 2, *[c_int] * 8, *[c_void_p] * 3],
    # score, reward, mask, lists, items, by_order, beta, gamma, loss, grad, threads
    "fastrl_listwise_loss": [*[c_void_p] * 3, *[c_int64] * 2, c_int, *[c_double] * 2, *[c_void_p] * 2, c_int],
    # a, b, n_a, n_b, problems, n, m, kind, reduce, out, threads
    "fastrl_pairwise_iou": [*[c_void_p] * 4, *[c_int64] * 3, *[c_int] * 2, c_void_p, c_int],
    # tile, line, rows, width, scale, column, top, rest, at_target, threads
    "fastrl_fold_tile": [c_void_p, *[c_int64] * 3, *[c_void_p] * 5, c_int],
    # tile, line, out, out_line, rows, width, scale, lse, mass, column, target, silent, threads
    "fastrl_differentiate_tile": [c_void_p, c_int64, c_void_p, *[c_int64] * 3, *[c_void_p] * 6, c_int],
    # gate, up, gate_bias, up_bias, rows, n, kind, out, threads, parallel
    "fastrl_gated": [*[c_void_p] * 4, *[c_int64] * 2, c_int, c_void_p, c_int, c_void_p],
    # grad, gate, up, gate_bias, up_bias, rows, n, kind, grad_gate, grad_up, grad_biases, threads, parallel
    "fastrl_gated_backward": [*[c_void_p] * 5, *[c_int64] * 2, c_int, *[c_void_p] * 3, c_int, c_void_p],
    # residual, x, weight, eps, rows, n, total, out, threads, parallel
    "fastrl_norm": [*[c_void_p] * 3, c_double, *[c_int64] * 2, *[c_void_p] * 2, c_int, c_void_p],
    # grad, grad_total, total, weight, eps, rows, n, grad_in, grad_weight, threads, parallel
    "fastrl_norm_backward": [*[c_void_p] * 4, c_double, *[c_int64] * 2, *[c_void_p] * 2, c_int, c_void_p],
    # tensors, cos, sin, numbers, back, threads, parallel
    "fastrl_rope": [*[c_void_p] * 4, *[c_int] * 2, c_void_p],
    # q, k, v, cos, sin, numbers, q_out, keys, values, threads, parallel
    "fastrl_rope_append": [*[c_void_p] * 9, c_int, c_void_p],
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


@functools.cache
def parallel() -> c_void_p | None:
    """``GOMP_parallel`` of the OpenMP runtime that torch computes with, among all that its libraries need."""
    try:
        return ctypes.cast(ctypes.CDLL(torch._C.__file__).GOMP_parallel, c_void_p)
    except (OSError, AttributeError):
        return None


def lacks(name: str) -> str | None:
    """Why this function cannot be called, or ``None`` where it can."""
    lib = library()
    if lib is None:
        return why_not()
    return None if hasattr(lib, name) else f"the extension was built without {name}: rebuild it"


def computes(name: str, first: Tensor, *others: Tensor | None) -> bool:
    """Whether this function computes these tensors: on the CPU, none float64 (which eager code keeps), and built."""
    if first.device.type != "cpu" or first.dtype == torch.float64 or lacks(name) is not None:
        return False
    return all(x is None or x.dtype != torch.float64 for x in others)


def reads(name: str, first: Tensor, *others: Tensor | None) -> bool:
    """Whether this function may read these tensors' memory: built, all float32 on the CPU, and nobody watches or
    replaces operators (a trace, a transform, a counter, Triton's interpreter), who would not see it."""
    if torch.compiler.is_compiling() or not first.is_cpu or forward_ad._current_level >= 0 or lacks(name) is not None:
        return False
    if torch._C._len_torch_dispatch_stack() or peek_interpreter_stack() is not None or torch._C._is_tracing():
        return False
    for x in (first, *others):
        if x is not None and not (
            (type(x) is Tensor or type(x) is Parameter) and x.dtype is torch.float32 and x.is_cpu
            and x.layout is torch.strided and not x.is_neg() and not is_legacy_batchedtensor(x)
        ):  # fmt: skip
            return False
    return not (_common.RECORDERS or _common.interpreting())


def token_weights(
    completion: Tensor, mask: Tensor | None, completions: int, per_row: bool, denominator: float
) -> Tensor:
    """``[N]`` fp32 weights of CPU ids; mask bool. ``denominator`` 0: the completions that have a row, or the rows."""
    completion = _whole(completion)
    kept = None if mask is None else mask.contiguous()
    weight = torch.empty(completion.shape[0])
    _call(
        "fastrl_token_weights",
        completion.data_ptr(), pointer(kept), completion.shape[0], completions, per_row, denominator,
        weight.data_ptr(),
    )  # fmt: skip
    return weight


def group_advantage(
    rewards: Tensor,
    group: Tensor | None,
    weights: Tensor | None,
    size: int,
    n_groups: int,
    leave_one_out: bool,
    scale: bool,
    unbiased: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(advantage [R], reward [R], mean [G], std [G], constant [G])`` of CPU rewards ``[R, K]``."""
    rewards, weights, group = _float(rewards), _maybe_float(weights), _maybe_whole(group)
    r, k = rewards.shape
    advantage, reward = torch.empty(r), torch.empty(r)
    mean, std, constant = torch.empty(n_groups), torch.empty(n_groups), torch.empty(n_groups, dtype=torch.bool)
    _call(
        "fastrl_group_advantage",
        *map(pointer, (rewards, weights, group)), r, k, size, n_groups, leave_one_out, scale, unbiased, eps,
        *map(pointer, (advantage, reward, mean, std, constant)),
    )  # fmt: skip
    return advantage, reward, mean, std, constant


def policy_rows(
    vectors: Sequence[Tensor | None], bounds: Tensor | Sequence[float], choices: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """``(loss [N], dlogp [N], partials [1, 8])``, fp32.

    Args:
        vectors: logp, advantage, completion, weight, and old, reference and sampler log-probs or None.
        bounds: the seven of ``PolicyOptions.bounds``, a tensor in float64.
        choices: loss, kl, k2_gradient, penalised, dual, sequence, importance, importance_sequence.
    """
    logp, advantage, completion, *rest = vectors
    assert logp is not None
    assert advantage is not None
    assert completion is not None
    given = (_float(logp), _float(advantage), _whole(completion), *map(_maybe_float, rest))
    n = logp.shape[0]
    loss, dlogp, partials = torch.empty(n), torch.empty(n), torch.empty(1, 8)
    numbers = bounds.contiguous() if isinstance(bounds, Tensor) else (c_double * 7)(*bounds)
    at = numbers.data_ptr() if isinstance(numbers, Tensor) else numbers
    _call(
        "fastrl_policy_rows",
        *map(pointer, given), at, n, advantage.shape[0], *choices, *map(pointer, (loss, dlogp, partials)),
    )  # fmt: skip
    return loss, dlogp, partials


def listwise_loss(
    score: Tensor, reward: Tensor, mask: Tensor | None, listmle: bool, beta: float, gamma: float
) -> tuple[Tensor, Tensor]:
    """``(loss [B], its gradient [B, K])`` of CPU scores and rewards, fp32."""
    given = (_float(score), _float(reward), None if mask is None else mask.contiguous())
    b, k = score.shape
    loss, grad = torch.empty(b), torch.empty(b, k)
    _call(
        "fastrl_listwise_loss",
        *map(pointer, given), b, k, listmle, beta, gamma, *map(pointer, (loss, grad)), torch.get_num_threads(),
    )  # fmt: skip
    return loss, grad


def pairwise_iou(a: Tensor, b: Tensor, n_a: Tensor | None, n_b: Tensor | None, kind: int, reduce: bool) -> Tensor:
    """``[B, n, m]``, or row maxima ``[B, n]``, of CPU boxes ``[B, n, 4]`` and ``[B, m, 4]``, fp32; counts ``[B]``."""
    given = (_float(a), _float(b), _maybe_whole(n_a), _maybe_whole(n_b))
    (problems, n, _), m = a.shape, b.shape[1]
    out = torch.empty((problems, n) if reduce else (problems, n, m))
    _call(
        "fastrl_pairwise_iou",
        *map(pointer, given), problems, n, m, kind, reduce, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def fold_tile(tile: Tensor, scale: Tensor, column: Tensor, top: Tensor, rest: Tensor, at_target: Tensor) -> None:
    """Fold an fp32 tile of unit column stride into ``top``, ``rest`` and ``at_target`` [n], which are contiguous."""
    vectors = (scale.contiguous(), column.contiguous(), top, rest, at_target)
    _call(
        "fastrl_fold_tile",
        tile.data_ptr(), tile.stride(0), *tile.shape, *map(pointer, vectors), torch.get_num_threads(),
    )  # fmt: skip


def differentiate_tile(
    tile: Tensor,
    out: Tensor,
    scale: Tensor,
    lse: Tensor,
    mass: Tensor,
    column: Tensor,
    at_target: Tensor,
    silent: Tensor,
) -> None:
    """Write an fp32 tile's gradient into ``out`` (which may be it), both of unit column stride."""
    vectors = [x.contiguous() for x in (scale, lse, mass, column, at_target, silent)]
    _call(
        "fastrl_differentiate_tile",
        tile.data_ptr(), tile.stride(0), out.data_ptr(), out.stride(0), *tile.shape, *map(pointer, vectors),
        torch.get_num_threads(),
    )  # fmt: skip


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
        cost.dtype == torch.float64, *map(pointer, tensors), problems, n, m, maximize,
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
        pred.dtype == torch.float64, *map(pointer, tensors), problems, n, gt.shape[1], boxes, sequence,
        threshold, scale, match.data_ptr(), quality.data_ptr(), parts.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return match, quality, parts


def _float(tensor: Tensor) -> Tensor:
    return (tensor if tensor.dtype == torch.float64 else tensor.float()).contiguous()


def _maybe_float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _float(tensor)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.to(torch.int64).contiguous()


def _maybe_whole(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _whole(tensor)


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def call_team(name: str, *arguments: object) -> None:
    """Call a function that shares its work among torch's threads."""
    _call(name, *arguments, torch.get_num_threads(), parallel())


def _call(name: str, *arguments: object) -> None:
    lib = library()
    if lib is None:
        raise RuntimeError(f"{name}: {why_not()}")
    if getattr(lib, name)(*arguments) != 0:
        raise MemoryError(f"{name}: out of memory")
