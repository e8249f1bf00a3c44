"""Instructions that compute each thread's result from its own registers: opcode text to a numpy function.

Arithmetic rounds as PTX says. The approximations (``ex2.approx``, ``lg2.approx``, ``div.full``, ...) are computed to
the nearest float32: a GPU may differ in the last two bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tests.ptx.faults import Unsupported

Array = Any  # a numpy array, any dtype


class Operation(NamedTuple):
    """Types of the result and the operands, and the function between them."""

    result: str
    operands: tuple[str, ...]
    compute: Callable[..., Array]


_HALF = ("f16", "bf16", "f16x2", "bf16x2")
_FLOATS = ("f32", "f64", *_HALF)


def resolve(opcode: str, sources: int) -> Operation:
    """The operation of an element-wise opcode such as ``fma.rn.ftz.f32`` with so many operands.

    Raises:
        Unsupported: it is none of those known here.
    """
    name, *modifiers = opcode.split(".")
    kind = modifiers[-1] if modifiers else ""
    if name == "setp":
        return _setp(opcode, modifiers)
    if name == "cvt":
        return _cvt(opcode, modifiers)
    if name == "selp":
        return Operation(kind, (kind, kind, "pred"), lambda a, b, p: np.where(p, a, b))
    if name == "fma" and modifiers in (["rn", "f32", "bf16"], ["rn", "f32", "f16"]):
        return Operation("f32", (kind, kind, "f32"), fma)
    if name in _SUMS and modifiers in (["rn", "f32", "bf16"], ["rn", "f32", "f16"]):  # sm_100
        return Operation("f32", (kind, "f32"), _in_single(_SUMS[name]))
    if name in ("min", "max") and sources == 3:  # sm_100
        two = resolve(opcode, 2)
        return Operation(kind, (kind,) * 3, lambda a, b, c: two.compute(two.compute(a, b), c))
    known = _KNOWN.get((name, *modifiers[:-1])) or _KNOWN.get((name, *(m for m in modifiers[:-1] if m != "ftz")))
    if known is None or kind not in known.kinds:
        raise Unsupported(f"instruction {opcode}")
    compute = known.compute
    if kind in _HALF:
        compute = _in_halves(_multiply_add if name == "fma" else compute)
    elif "ftz" in modifiers:
        compute = _flushing(compute)
    if known.wide:
        wide = f"{kind[0]}{2 * int(kind[1:])}"
        return Operation(wide, (kind, kind, wide)[: known.arity], compute)
    operands = known.operands or (kind,) * known.arity
    if name in ("shl", "shr", "bfe"):  # positions and lengths are 32 bits
        operands = (kind, *("u32",) * (known.arity - 1))
    return Operation(known.result or kind, operands, compute)


class _Known(NamedTuple):
    arity: int
    compute: Callable[..., Array]
    kinds: tuple[str, ...]
    wide: bool = False
    result: str | None = None
    operands: tuple[str, ...] | None = None


_SIGNED = ("s16", "s32", "s64")
_INTS = ("u16", "u32", "u64", *_SIGNED)
_BITS = ("b16", "b32", "b64")


def fma(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of float32, rounded once (subnormal results may be rounded twice)."""
    product = a.astype("f8") * b.astype("f8")  # exact
    total = product + c
    tie = (total.view("u8") & 0x1FFFFFFF) == 0x10000000  # half way between two float32: what was lost decides
    if tie.any():
        part = total - product
        lost = (product - (total - part)) + (c - part)
        nudged = np.nextafter(total, np.where(lost > 0, np.inf, -np.inf))
        total = np.where(tie & (lost != 0), nudged, total)
    return total.astype("f4")


def _in_halves(compute: Callable[..., Array]) -> Callable[..., Array]:
    """16-bit floats: in float64, rounded when they are encoded."""
    return lambda *values: compute(*(value.astype("f8") for value in values))


def _in_single(compute: Callable[..., Array]) -> Callable[..., Array]:
    return lambda *values: compute(*(value.astype("f4") for value in values))


_SUMS: dict[str, Callable[..., Array]] = {"add": np.add, "sub": np.subtract}


def _multiply_add(a: Array, b: Array, c: Array) -> Array:
    return a * b + c


def flush(value: Array) -> Array:
    """Subnormal float32 to zero, the sign kept."""
    tiny = np.abs(value) < np.float32(2.0**-126)
    return np.where(tiny, np.copysign(np.float32(0), value), value) if tiny.any() else value


def _flushing(compute: Callable[..., Array]) -> Callable[..., Array]:
    return lambda *values: flush(compute(*(flush(value) for value in values)))


def _in_double(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    return lambda value: function(value.astype("f8")).astype("f4")


def _divide(a: Array, b: Array) -> Array:
    if a.dtype.kind == "f":
        return a / b
    size = _magnitude(a) // np.maximum(_magnitude(b), 1)  # whoever divides by zero is told so by the machine
    return np.where((a < 0) != (b < 0), np.negative(size), size).astype(a.dtype)


def _remainder(a: Array, b: Array) -> Array:
    size = _magnitude(a) % np.maximum(_magnitude(b), 1)
    return np.where(a < 0, np.negative(size), size).astype(a.dtype)


def _magnitude(value: Array) -> Array:
    unsigned = value.view(f"u{value.dtype.itemsize}")
    return np.where(value < 0, np.negative(unsigned), unsigned)


def _high(a: Array, b: Array) -> Array:
    if a.dtype.itemsize > 4:
        raise Unsupported("mul.hi of 64 bits")
    wide = a.dtype.kind + str(2 * a.dtype.itemsize)
    return ((a.astype(wide) * b.astype(wide)) >> (8 * a.dtype.itemsize)).astype(a.dtype)


def _widening(a: Array, b: Array, c: Array | None = None) -> Array:
    wide = a.dtype.kind + str(2 * a.dtype.itemsize)
    product = a.astype(wide) * b.astype(wide)
    return product if c is None else product + c


def _shift_left(value: Array, amount: Array) -> Array:
    bits = 8 * value.dtype.itemsize
    shifted = np.left_shift(value, np.minimum(amount, bits - 1).astype(value.dtype))
    return np.where(amount < bits, shifted, value.dtype.type(0))


def _shift_right(value: Array, amount: Array) -> Array:
    bits = 8 * value.dtype.itemsize
    shifted = np.right_shift(value, np.minimum(amount, bits - 1).astype(value.dtype))
    return shifted if value.dtype.kind == "i" else np.where(amount < bits, shifted, value.dtype.type(0))


def _extract(value: Array, position: Array, length: Array) -> Array:
    """``bfe``: ``length`` bits from ``position``; signed types extend the field's top bit."""
    position, length = (x.astype("i8") & 0xFF for x in (position, length))
    wide = value.astype("i8")
    length = np.minimum(length, 32)
    mask = (np.int64(1) << length) - 1
    field = np.where(position < 32, (wide >> np.minimum(position, 32)) & mask, 0)
    if value.dtype.kind == "i":
        field = np.where(position < 32, field, np.where(wide < 0, mask, 0))
        top = (field >> np.maximum(length - 1, 0)) & 1
        field = np.where((top == 1) & (length > 0), field - mask - 1, field)
    return field.astype(value.dtype)


def _insert(field: Array, value: Array, position: Array, length: Array) -> Array:
    """``bfi``: the low ``length`` bits of ``field`` put into ``value`` at ``position``."""
    position, length = (x.astype("u8") & np.uint64(0xFF) for x in (position, length))
    mask = ((np.uint64(1) << np.minimum(length, np.uint64(32))) - np.uint64(1)) << np.minimum(position, np.uint64(63))
    wide = (value.astype("u8") & ~mask) | ((field.astype("u8") << np.minimum(position, np.uint64(63))) & mask)
    return np.where(position < 32, wide, value).astype(value.dtype)


def _permute(a: Array, b: Array, selector: Array) -> Array:
    """``prmt``: four bytes out of eight, each by a nibble; its top bit spreads the byte's sign."""
    both = a.astype("u8") | (b.astype("u8") << np.uint64(32))
    out = np.zeros(np.broadcast_shapes(a.shape, b.shape, selector.shape), "u4")
    for place in range(4):
        nibble = (selector >> np.uint32(4 * place)) & np.uint32(0xF)
        byte = ((both >> ((nibble & np.uint32(7)).astype("u8") * np.uint64(8))) & np.uint64(0xFF)).astype("u4")
        sign = np.where(byte & np.uint32(0x80), np.uint32(0xFF), np.uint32(0))
        out |= np.where(nibble & np.uint32(8), sign, byte) << np.uint32(8 * place)
    return out


def _lop3(a: Array, b: Array, c: Array, table: Array) -> Array:
    out = np.zeros_like(a | b | c)
    for row in range(8):
        term = (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        out |= np.where((table >> np.uint32(row)) & np.uint32(1), term, np.uint32(0))
    return out


def _bits_set(value: Array) -> Array:
    return np.bitwise_count(value).astype("u4")


def _leading_zeros(value: Array) -> Array:
    return (32 - np.frexp(value.astype("f8"))[1]).astype("u4")


def _reversed_bits(value: Array) -> Array:
    octets = np.unpackbits(value.astype(">u4").view("u1").reshape(-1, 4), axis=1)
    return np.packbits(octets[:, ::-1], axis=1).view(">u4").astype("u4").reshape(value.shape)


def _minimum(a: Array, b: Array) -> Array:
    return np.fmin(a, b) if a.dtype.kind == "f" else np.minimum(a, b)


def _maximum(a: Array, b: Array) -> Array:
    return np.fmax(a, b) if a.dtype.kind == "f" else np.maximum(a, b)


def _table() -> dict[tuple[str, ...], _Known]:
    both = ("f32", "f64", *_INTS)
    table = {
        ("add",): _Known(2, np.add, (*both, *_HALF, "f32x2")),
        ("sub",): _Known(2, np.subtract, (*both, *_HALF, "f32x2")),
        ("mul",): _Known(2, np.multiply, ("f32", "f64", *_HALF, "f32x2")),
        ("fma", "rn"): _Known(3, fma, ("f32", *_HALF, "f32x2")),
        ("div",): _Known(2, _divide, _INTS),
        ("rem",): _Known(2, _remainder, _INTS),
        ("min",): _Known(2, _minimum, (*both, *_HALF)),
        ("max",): _Known(2, _maximum, (*both, *_HALF)),
        ("abs",): _Known(1, np.abs, ("f32", "f64", *_SIGNED, *_HALF)),
        ("neg",): _Known(1, np.negative, ("f32", "f64", *_SIGNED, *_HALF)),
        ("and",): _Known(2, np.bitwise_and, (*_BITS, "pred")),
        ("or",): _Known(2, np.bitwise_or, (*_BITS, "pred")),
        ("xor",): _Known(2, np.bitwise_xor, (*_BITS, "pred")),
        ("not",): _Known(1, np.invert, (*_BITS, "pred")),
        ("mul", "lo"): _Known(2, np.multiply, _INTS),
        ("mul", "hi"): _Known(2, _high, _INTS),
        ("mul", "wide"): _Known(2, _widening, ("u16", "s16", "u32", "s32"), wide=True),
        ("mad", "lo"): _Known(3, lambda a, b, c: a * b + c, _INTS),
        ("mad", "wide"): _Known(3, _widening, ("u16", "s16", "u32", "s32"), wide=True),
        ("prmt",): _Known(3, _permute, ("b32",)),
        ("lop3",): _Known(4, _lop3, ("b32",)),
        ("shl",): _Known(2, _shift_left, (*_BITS, *_INTS)),
        ("shr",): _Known(2, _shift_right, (*_BITS, *_INTS)),
        ("bfe",): _Known(3, _extract, ("u32", "s32")),
        ("popc",): _Known(1, _bits_set, ("b32", "b64"), result="u32"),
        ("clz",): _Known(1, _leading_zeros, ("b32",), result="u32"),
        ("brev",): _Known(1, _reversed_bits, ("b32",)),
        ("bfi",): _Known(4, _insert, ("b32",), operands=("b32", "b32", "u32", "u32")),
        ("ex2", "approx"): _Known(1, _in_double(np.exp2), ("f32",)),
        ("lg2", "approx"): _Known(1, _in_double(np.log2), ("f32",)),
        ("sin", "approx"): _Known(1, _in_double(np.sin), ("f32",)),
        ("cos", "approx"): _Known(1, _in_double(np.cos), ("f32",)),
        ("tanh", "approx"): _Known(1, _in_double(np.tanh), ("f32",)),
        ("rsqrt", "approx"): _Known(1, _in_double(lambda x: 1 / np.sqrt(x)), ("f32",)),
        ("copysign",): _Known(2, lambda a, b: np.copysign(b, a), ("f32",)),
    }
    for mode in ("approx", "rn"):
        table[("sqrt", mode)] = _Known(1, np.sqrt, ("f32",))
        table[("rcp", mode)] = _Known(1, lambda a: a.dtype.type(1) / a, ("f32",))
    for mode in ("full", "approx", "rn"):
        table[("div", mode)] = _Known(2, _divide, ("f32", "f64")[: 2 if mode == "rn" else 1])
    for mode in ("min", "max"):
        propagating = np.minimum if mode == "min" else np.maximum
        table[(mode, "NaN")] = _Known(2, propagating, ("f32", *_HALF))
    for name, operation in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply)):
        table[(name, "rn")] = _Known(2, operation, ("f32", "f64", *_HALF, "f32x2"))
    return table


_KNOWN = _table()


def _setp(opcode: str, modifiers: list[str]) -> Operation:
    comparison, kind = modifiers[0], modifiers[-1]
    if len([m for m in modifiers if m != "ftz"]) != 2:
        raise Unsupported(f"instruction {opcode}")
    compare = _COMPARISONS.get(comparison)
    if compare is None or (comparison in _UNSIGNED_ORDER and kind.startswith(("s", "f"))):
        compare = _FLOAT_COMPARISONS.get(comparison) if kind in _FLOATS else None
    if compare is None:
        raise Unsupported(f"instruction {opcode}")
    return Operation("pred", (kind, kind), compare)


_COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    # an unordered pair is not "ne" for PTX, unlike for numpy
    "ne": lambda a, b: (a != b) & (a == a) & (b == b),
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
_UNSIGNED_ORDER = ("lo", "ls", "hi", "hs")
_FLOAT_COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "equ": lambda a, b: ~(a < b) & ~(a > b),
    "neu": lambda a, b: a != b,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: (a == a) & (b == b),
    "nan": lambda a, b: (a != a) | (b != b),
}


def _cvt(opcode: str, modifiers: list[str]) -> Operation:
    rounding = [m for m in modifiers[:-2] if m != "ftz"]
    to, source = modifiers[-2:]
    if to.endswith("x2") and source == "f32" and rounding == ["rn"]:  # the first operand goes to the upper half
        return Operation(to, ("f32", "f32"), lambda high, low: np.stack(np.broadcast_arrays(low, high), -1))
    if to in _FLOATS and rounding in ([], ["rn"]):
        if source in _INTS:
            exact = {"f32": "f4", "f64": "f8"}.get(to)
            if exact is None:
                raise Unsupported(f"instruction {opcode}")
            return Operation(to, (source,), lambda a: a.astype(exact))
        if source in _FLOATS:
            widths = {"f16": "f4", "bf16": "f4", "f32": "f4", "f64": "f8"}
            return Operation(to, (source,), lambda a: a.astype(widths[to]))
    integers = (*_INTS, "u8", "s8")
    if to in integers and source in integers and not rounding:
        return Operation(to, (source,), lambda a: a.astype(f"{'i' if to[0] == 's' else 'u'}{int(to[1:]) // 8}"))
    if to in _INTS and source == "f32" and rounding and rounding[0] in _TO_INTEGER:
        low, high = (float(x) for x in (np.iinfo(_integer(to)).min, np.iinfo(_integer(to)).max))

        def convert(a: Array) -> Array:  # saturating; NaN gives 0
            whole = _TO_INTEGER[rounding[0]](a.astype("f8"))
            inside = np.where(np.isnan(whole) | (whole >= high) | (whole <= low), 0, whole).astype(_integer(to))
            limits = np.iinfo(_integer(to))
            return np.where(whole >= high, limits.max, np.where(whole <= low, limits.min, inside)).astype(_integer(to))

        return Operation(to, (source,), convert)
    raise Unsupported(f"instruction {opcode}")


_TO_INTEGER: dict[str, Callable[[Array], Array]] = {
    "rni": np.rint,
    "rzi": np.trunc,
    "rmi": np.floor,
    "rpi": np.ceil,
}


def _integer(kind: str) -> np.dtype[Any]:
    return np.dtype(f"{'i' if kind[0] == 's' else 'u'}{int(kind[1:]) // 8}")
