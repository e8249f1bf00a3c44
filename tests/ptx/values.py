"""Registers as numpy arrays, one element per thread: raw unsigned bits, read and written as PTX types.

Half-precision types are decoded to float32 and rounded once when they are encoded; a packed pair is a second axis.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.ptx.faults import Unsupported

Raw = NDArray[Any]  # unsigned integers, or bool for predicates
UNSIGNED = {1: np.dtype("u1"), 2: np.dtype("u2"), 4: np.dtype("u4"), 8: np.dtype("u8")}
_PLAIN = {
    **{f"{kind}{8 * size}": np.dtype(f"u{size}") for kind in "bu" for size in (1, 2, 4, 8)},
    **{f"s{8 * size}": np.dtype(f"i{size}") for size in (1, 2, 4, 8)},
    "f32": np.dtype("f4"),
    "f64": np.dtype("f8"),
}
_PACKED = {"f16": 2, "bf16": 2, "f16x2": 4, "bf16x2": 4, "f32x2": 8, "tf32": 4}
_REGISTER = re.compile(r"%(p|rs|rd|r|rq)\d+$")
_WIDTHS = {"p": 0, "rs": 2, "r": 4, "rd": 8}


def size_of(kind: str) -> int:
    """Bytes of a type (a predicate: 0)."""
    if kind == "pred":
        return 0
    if kind in _PLAIN:
        return _PLAIN[kind].itemsize
    if kind in _PACKED:
        return _PACKED[kind]
    raise Unsupported(f"type .{kind}")


def register_size(name: str) -> int:
    """Bytes of a register, by its prefix (a predicate: 0)."""
    match = _REGISTER.match(name)
    if match is None or match[1] not in _WIDTHS:
        raise Unsupported(f"register {name}")
    return _WIDTHS[match[1]]


def immediate(text: str, size: int) -> Raw:
    """A literal as an array of one: ``0f``/``0d`` bits, or an integer taken modulo the size (0: a predicate)."""
    if text[:2] in ("0f", "0F"):
        bits = int(text[2:], 16)
        return np.array([np.uint32(bits).view("f4")], "f8").view("u8") if size == 8 else np.array([bits], "u4")
    number = int(text[2:], 16) if text[:2] in ("0d", "0D") else int(text.rstrip("U"), 0)
    if size == 0:
        return np.array([number != 0])
    return np.array([number & ((1 << 8 * size) - 1)], UNSIGNED[size])


def decode(kind: str, raw: Raw) -> NDArray[Any]:
    """Raw bits as numbers of a type; of a wider register the low bits."""
    if kind == "pred":
        return raw
    size = size_of(kind)
    if raw.dtype.itemsize > size:
        raw = raw.astype(UNSIGNED[size])
    if kind in _PLAIN:
        if raw.dtype.itemsize < size:
            raise Unsupported(f".{kind} in a register of {raw.dtype.itemsize} bytes")
        return raw.view(_PLAIN[kind])
    if kind == "tf32":
        return raw.view("f4")
    if kind == "f32x2":
        return np.ascontiguousarray(raw).view("f4").reshape(*raw.shape, 2)
    pairs = np.ascontiguousarray(raw).view("u2")
    if kind.endswith("x2"):
        pairs = pairs.reshape(*raw.shape, 2)
    if kind.startswith("bf16"):
        return (pairs.astype("u4") << 16).view("f4")
    return pairs.view("f2").astype("f4")


def encode(kind: str, value: NDArray[Any], size: int) -> Raw:
    """Numbers of a type as raw bits of a register of ``size`` bytes, sign-extended where the type is signed."""
    if kind == "pred":
        return value.astype(bool)
    if kind in _PLAIN:
        value = value.astype(_PLAIN[kind], copy=False)
        if size > value.dtype.itemsize:
            value = value.astype(f"{'i' if kind[0] == 's' else 'u'}{size}")
        return value.view(UNSIGNED[value.dtype.itemsize])
    if kind == "f32x2":
        return np.ascontiguousarray(value.astype("f4")).view("u8")[..., 0]
    if kind.startswith("bf16"):
        halves = to_bf16(value)
    else:
        halves = value.astype("f2").view("u2")
    if kind.endswith("x2"):
        return np.ascontiguousarray(halves).view("u4").reshape(halves.shape[:-1])
    return halves


def to_bf16(value: NDArray[Any]) -> NDArray[np.uint16]:
    """float32 or float64 to the nearest bfloat16, ties to even; NaN to the canonical 0x7FFF."""
    wide = value.astype("f8")
    bits = wide.view("u8")
    # Rounded at bfloat16's 8 bits at once, not through float32: a second rounding would move ties.
    exponent = np.maximum(((bits >> 52) & 0x7FF).astype("i8") - 1023, -126)
    unit = np.ldexp(1.0, (exponent - 7).astype("i4"))
    rounded = np.rint(wide / unit) * unit
    out = (rounded.astype("f4").view("u4") >> 16).astype("u2")
    return np.where(np.isnan(wide), np.uint16(0x7FFF), out)
