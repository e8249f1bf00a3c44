"""Whole decode steps on a CPU in one call: from a token of each row to the next one drawn, in float32.

A step of a few rows is some hundred operators a layer stack; each costs more to start, and on several threads to wait
for, than to compute. ``csrc/decode_step.cpp`` walks through the layers itself: threads take pieces of five phases a
layer, and a phase is over when its pieces are done, so that a thread which the system has put aside holds up nothing
but the piece in its hands. Rows of a group read their prompt's keys together, as in ``decode_attention``.

The threads are those of torch's own OpenMP runtime, found in the loaded torch. Products are dot products with AVX-512
or AVX2 where the machine has them. No gradient, and no Triton twin: a GPU captures its step in a graph instead. The
eager twin is the layers' own code, operator by operator.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_double, c_int64, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fastrl_kernels import _native
from fastrl_kernels._common import check, check_dtype, check_shape, interpreting, readable


class Linear(NamedTuple):
    """``y = x W^T + b``."""

    weight: Tensor  # [outputs, inputs], float32; lines may lie apart, numbers of a line next to each other
    bias: Tensor | None = None  # [outputs]


class Norm(NamedTuple):
    """RMSNorm: ``w * x / sqrt(mean x^2 + eps)``."""

    weight: Tensor
    eps: float


class Layer(NamedTuple):
    """One decoder layer: rotary attention, then a gated SiLU, each added to what it read the norm of."""

    before_attention: Norm
    query: Linear
    key: Linear
    value: Linear
    output: Linear
    before_gate: Norm
    gate: Linear
    up: Linear
    down: Linear
    scale: float  # on the scores
    query_norm: Norm | None = None  # of each head, before it is turned
    key_norm: Norm | None = None


class Keys(NamedTuple):
    """Keys and values of R rows in G groups, per layer: of each group's prompt, and of each row.

    Prompts are [G, Hkv, P, D], own ones [R, Hkv, T, D], contiguous; a step writes into the latter.
    """

    prompt_keys: Sequence[Tensor]
    prompt_values: Sequence[Tensor]
    own_keys: Sequence[Tensor]
    own_values: Sequence[Tensor]
    row_offsets: Tensor  # [G + 1] int32 from 0 to R
    prompt_len: Tensor  # [G] int32
    step: int  # own keys of every row so far


class Angles(NamedTuple):
    """Rotary embedding: lines of cosines and sines, and the line of each row's token. Those of its next ones follow."""

    cos: Tensor  # [A, D / 2], float32
    sin: Tensor
    line: Tensor  # [R] int64


class Draws(NamedTuple):
    """How tokens are drawn, and where they go. Tables have a line for each row there ever was, a column for each token.

    See ``fastrl.rollout.sampler.sample``: a row's token is the inverse of its cumulative distribution at its one
    uniform number.
    """

    head: Linear
    temperature: float  # 0: the likeliest
    suppressed: Tensor  # [S] int64: never drawn
    ends: Tensor  # [E] int64: tokens behind which a row is no longer alive
    uniform: Tensor | None  # [lines, columns] float64 in [0, 1); None at temperature 0
    tokens: Tensor  # [lines, columns] int64, written to
    logp: Tensor  # [lines, columns] float32, written to
    line: Tensor  # [R] int64
    column: int  # of the first token drawn
    alive: Tensor  # [R] bool, updated
    stop_at: int  # return when this many rows or fewer are alive


_BUFFERS = ("prompt_keys", "prompt_values", "own_keys", "own_values")


class _CLinear(ctypes.Structure):
    _fields_ = [("weight", c_void_p), ("bias", c_void_p), ("line", c_int64), ("inputs", c_int64), ("outputs", c_int64)]


class _CNorm(ctypes.Structure):
    _fields_ = [("weight", c_void_p), ("eps", c_double)]


class _CLayer(ctypes.Structure):
    _fields_ = [
        *((name, _CNorm) for name in ("before_attention", "query_norm", "key_norm", "before_gate")),
        *((name, _CLinear) for name in ("query", "key", "value", "output", "gate", "up", "down")),
        ("scale", c_double),
        *((name, c_void_p) for name in _BUFFERS),
    ]


class _CModel(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("hidden", "query_heads", "key_heads", "head_dim", "layers", "vocabulary")),
        ("layer", ctypes.POINTER(_CLayer)),
        ("embedding", c_void_p),
        ("last", _CNorm),
    ]


class _CRows(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("rows", "groups", "prompt_capacity", "own_capacity", "step")),
        *((name, c_void_p) for name in ("offsets", "prompt_length", "token", "cos", "sin", "angle")),
        ("angles", c_int64),
        ("hidden", c_void_p),
    ]


class _CSampler(ctypes.Structure):
    _fields_ = [
        ("head", _CLinear),
        ("temperature", c_double),
        ("suppressed", c_void_p), ("suppressed_count", c_int64),
        ("ends", c_void_p), ("ends_count", c_int64),
        ("line", c_void_p),
        *((name, c_int64) for name in ("lines", "columns", "column")),
        *((name, c_void_p) for name in ("uniform", "tokens", "logp", "alive")),
        ("stop_at", c_int64),
    ]  # fmt: skip


_BAD_ROWS = -2


class DecodeStep:
    """The decode step of one model, whose weights stay where they are while this lives.

    Args:
        embedding: [V, H] float32.
        layers: of one number of heads and one head size.
        last: the norm behind them.
        query_heads, key_heads: of each layer; the first is a multiple of the second.
        level: instruction set, 0 (any) to ``best_level()``, for tests; None: the best.

    Raises:
        ValueError: what :func:`unfit` says.
    """

    def __init__(
        self,
        embedding: Tensor,
        layers: Sequence[Layer],
        last: Norm,
        *,
        query_heads: int,
        key_heads: int,
        level: int | None = None,
    ) -> None:
        reason = unfit(embedding, layers, last, query_heads=query_heads, key_heads=key_heads)
        check(reason is None, f"decode step: {reason}")
        self._kept = (embedding, tuple(layers), last)
        self._level = best_level() if level is None else level
        check(0 <= self._level <= best_level(), f"level: expected 0 to {best_level()}, got {level}")
        self._layers = (_CLayer * len(layers))(*map(_c_layer, layers))
        self.hidden_size, self.vocabulary = embedding.shape[1], embedding.shape[0]
        self.key_heads, self.head_dim = key_heads, layers[0].query.weight.shape[0] // query_heads
        self._model = _CModel(
            self.hidden_size, query_heads, key_heads, self.head_dim, len(layers), self.vocabulary,
            ctypes.cast(self._layers, ctypes.POINTER(_CLayer)), embedding.data_ptr(), _c_norm(last),
        )  # fmt: skip

    def takes_head(self, head: Linear) -> bool:
        """Whether :meth:`draw` draws from this head: of the hidden states, for tokens that all have an embedding."""
        return _unfit_linear("head", head, self.hidden_size) is None and len(head.weight) <= self.vocabulary

    def hidden(self, token: Tensor, keys: Keys, angles: Angles) -> Tensor:
        """Hidden states [R, H] behind the last norm for ``token`` [R] int64, whose keys and values are appended.

        Raises:
            ValueError: shapes, dtypes or numbers that do not fit; a token outside the vocabulary.
        """
        rows = self._rows(token, keys, angles, 1)
        out = torch.empty(len(token), self.hidden_size, device=token.device)
        rows.hidden = out.data_ptr()
        self._call(rows, None, 1)
        return out

    def draw(self, token: Tensor, keys: Keys, angles: Angles, draws: Draws, steps: int) -> int:
        """Up to ``steps`` steps: each feeds ``token`` [R] int64 and draws the next one, in place.

        Raises:
            ValueError: as for :meth:`hidden`.

        Returns:
            Steps done: fewer than asked for where no more than ``stop_at`` rows are alive.
        """
        rows = self._rows(token, keys, angles, steps)
        return self._call(rows, self._sampler(draws, len(token), steps), steps)

    def _rows(self, token: Tensor, keys: Keys, angles: Angles, steps: int) -> _CRows:
        size, groups = len(token), len(keys.prompt_len)
        lengths = {name: len(getattr(keys, name)) for name in _BUFFERS}
        check(set(lengths.values()) == {len(self._layers)}, f"keys: expected {len(self._layers)} layers, got {lengths}")
        check(size > 0, "token: no rows")
        prompt, own = keys.prompt_keys[0].shape[2], keys.own_keys[0].shape[2]
        prompts, owns = ((n, self.key_heads, t, self.head_dim) for n, t in ((groups, prompt), (size, own)))
        shapes = dict(zip(_BUFFERS, (prompts, prompts, owns, owns), strict=True))
        for i, layer in enumerate(self._layers):
            for name, shape in shapes.items():
                buffer = getattr(keys, name)[i]
                _check(f"{name}[{i}]", buffer, shape, torch.float32)
                setattr(layer, name, buffer.data_ptr())
        _check("token", token, (size,), torch.int64)
        _check("row_offsets", keys.row_offsets, (groups + 1,), torch.int32)
        _check("prompt_len", keys.prompt_len, (groups,), torch.int32)
        _check("cos", angles.cos, (len(angles.cos), self.head_dim // 2), torch.float32)
        _check("sin", angles.sin, tuple(angles.cos.shape), torch.float32)
        _check("line", angles.line, (size,), torch.int64)
        check(0 < steps <= own - keys.step, f"steps: {steps} do not fit behind {keys.step} of {own} own keys")
        return _CRows(
            size, groups, prompt, own, keys.step,
            *(x.data_ptr() for x in (keys.row_offsets, keys.prompt_len, token, angles.cos, angles.sin, angles.line)),
            len(angles.cos), None,
        )  # fmt: skip

    def _sampler(self, draws: Draws, size: int, steps: int) -> _CSampler:
        lines, columns = draws.tokens.shape
        check(
            self.takes_head(draws.head),
            f"head: expected a float32 weight [{self.vocabulary} or less, {self.hidden_size}] on the CPU, got "
            f"{list(draws.head.weight.shape)} of {draws.head.weight.dtype}",
        )
        check(draws.temperature >= 0, f"temperature: expected 0 or more, got {draws.temperature}")
        check(draws.temperature == 0 or draws.uniform is not None, "uniform: needed unless the temperature is 0")
        _check("tokens", draws.tokens, (lines, columns), torch.int64)
        _check("logp", draws.logp, (lines, columns), torch.float32)
        _check("line", draws.line, (size,), torch.int64)
        _check("alive", draws.alive, (size,), torch.bool)
        for name in ("suppressed", "ends"):
            _check(name, getattr(draws, name), (getattr(draws, name).numel(),), torch.int64)
        if draws.uniform is not None:
            _check("uniform", draws.uniform, (lines, columns), torch.float64)
        check(
            0 <= draws.column <= columns - steps, f"column: {steps} steps from {draws.column} leave {columns} columns"
        )
        return _CSampler(
            _c_linear(draws.head), draws.temperature,
            draws.suppressed.data_ptr(), len(draws.suppressed), draws.ends.data_ptr(), len(draws.ends),
            draws.line.data_ptr(), lines, columns, draws.column,
            None if draws.uniform is None else draws.uniform.data_ptr(),
            draws.tokens.data_ptr(), draws.logp.data_ptr(), draws.alive.data_ptr(), draws.stop_at,
        )  # fmt: skip

    def _call(self, rows: _CRows, sampler: _CSampler | None, steps: int) -> int:
        lib = _native.library()
        assert lib is not None
        done = lib.fastrl_decode(
            ctypes.byref(self._model), ctypes.byref(rows), None if sampler is None else ctypes.byref(sampler), steps,
            torch.get_num_threads(), _native.parallel(), self._level,
        )  # fmt: skip
        if done == _BAD_ROWS:
            raise ValueError(
                "decode step: a token, length, offset or line lies outside its table: tokens "
                f"0 to {self.vocabulary - 1}, row_offsets rising from 0 to {rows.rows}, prompt_len 0 to "
                f"{rows.prompt_capacity}, angles 0 to {rows.angles - steps}"
            )
        if done < 0:
            raise MemoryError("decode step: out of memory") if done == -1 else RuntimeError(f"decode step: {done}")
        return done


def best_level() -> int:
    """The best instruction set of this machine: 0 any, 1 AVX2, 2 AVX-512."""
    lib = _native.library()
    return 0 if lib is None or _native.lacks("fastrl_decode") else lib.fastrl_decode_level()


def unfit(embedding: Tensor, layers: Sequence[Layer], last: Norm, *, query_heads: int, key_heads: int) -> str | None:
    """Why these weights are not decoded here (arguments as of :class:`DecodeStep`), or None where they are."""
    if (reason := unavailable()) is not None:
        return reason
    if not layers:
        return "no layers"
    if not _plain(embedding) or embedding.dim() != 2 or not embedding.is_contiguous():
        return "embedding: expected a contiguous float32 matrix on the CPU"
    width = len(layers[0].query.weight)
    if key_heads < 1 or query_heads % key_heads or width % query_heads or width // query_heads % 2:
        return f"{width} numbers do not split into {query_heads} query heads of an even size for {key_heads} key heads"
    hidden, dim = embedding.shape[1], width // query_heads
    for i, layer in enumerate(layers):
        if (reason := _unfit_layer(layer, hidden, width, key_heads * dim, dim)) is not None:
            return f"layers[{i}]: {reason}"
    return _unfit_norm("last", last, hidden)


def unavailable() -> str | None:
    """Why nothing is decoded here at the moment, whatever the weights, or None."""
    if (reason := _native.lacks("fastrl_decode")) is not None:
        return reason
    if interpreting():
        return "the Triton interpreter is on"
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return "operators are watched or traced, and there are none here"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if torch.get_num_threads() > 1 and _native.parallel() is None:
        return "torch's threads are not found (no GOMP_parallel in its OpenMP runtime)"
    return None


def _unfit_layer(layer: Layer, hidden: int, queries: int, keys: int, dim: int) -> str | None:
    inner = layer.gate.weight.shape[0]
    linears = {
        "query": (hidden, queries), "key": (hidden, keys), "value": (hidden, keys), "output": (queries, hidden),
        "gate": (hidden, inner), "up": (hidden, inner), "down": (inner, hidden),
    }  # fmt: skip
    for name, (inputs, outputs) in linears.items():
        if (reason := _unfit_linear(name, getattr(layer, name), inputs, outputs)) is not None:
            return reason
    norms = {"before_attention": hidden, "before_gate": hidden, "query_norm": dim, "key_norm": dim}
    for name, size in norms.items():
        norm = getattr(layer, name)
        if norm is not None and (reason := _unfit_norm(name, norm, size)) is not None:
            return reason
    return None


def _unfit_linear(name: str, linear: Linear, inputs: int, outputs: int | None = None) -> str | None:
    weight, bias = linear
    if not _plain(weight) or weight.dim() != 2 or weight.stride(1) != 1 or weight.stride(0) < weight.shape[1]:
        return f"{name}: expected a float32 matrix on the CPU with lines one after another"
    if weight.shape[1] != inputs or (outputs is not None and len(weight) != outputs):
        return f"{name}: expected a weight [{outputs or 'any'}, {inputs}], got {list(weight.shape)}"
    if bias is not None and (not _plain(bias) or bias.shape != weight.shape[:1] or not bias.is_contiguous()):
        return f"{name}: expected a contiguous float32 bias [{len(weight)}] on the CPU"
    return None


def _unfit_norm(name: str, norm: Norm, size: int) -> str | None:
    if _plain(norm.weight) and norm.weight.shape == (size,) and norm.weight.is_contiguous():
        return None
    return f"{name}: expected a contiguous float32 weight [{size}] on the CPU"


def _plain(tensor: Tensor) -> bool:
    return readable(tensor) and tensor.dtype == torch.float32 and tensor.layout == torch.strided


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_shape(name, tensor, shape)
    check_dtype(name, tensor, (dtype,))
    check(readable(tensor) and tensor.is_contiguous(), f"{name}: expected a contiguous tensor on the CPU")


def _c_linear(linear: Linear) -> _CLinear:
    weight, bias = linear
    return _CLinear(
        weight.data_ptr(), None if bias is None else bias.data_ptr(), weight.stride(0), weight.shape[1], len(weight)
    )


def _c_norm(norm: Norm | None) -> _CNorm:
    return _CNorm(None, 0.0) if norm is None else _CNorm(norm.weight.data_ptr(), norm.eps)


def _c_layer(layer: Layer) -> _CLayer:
    norms = ("before_attention", "query_norm", "key_norm", "before_gate")
    linears = ("query", "key", "value", "output", "gate", "up", "down")
    return _CLayer(
        *(_c_norm(getattr(layer, name)) for name in norms),
        *(_c_linear(getattr(layer, name)) for name in linears),
        layer.scale,
    )
