"""The interpreter itself: instructions against numpy, and planted faults that it must find."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastrl_kernels._common import interpreting, launch
from fastrl_kernels._triton import HAS_TRITON, tl, triton
from tests.ptx import machine
from tests.ptx.faults import Divergent, Misaligned, OutOfBounds, Race, Uninitialised, Unsupported
from tests.ptx.memory import Global
from tests.ptx.parser import parse
from tests.ptx.values import to_bf16

needs_triton = pytest.mark.skipif(not HAS_TRITON or interpreting(), reason="needs Triton's compiler")

THREADS = 64
_HEAD = """
.version 8.7
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry probe(
{params}
)
.reqntid {threads}
{{
{body}
	ret;
}}
"""


def run(body: str, tensors: list[Tensor], *, threads: int = THREADS, programs: int = 1, shared: int = 0) -> Any:
    """Run a body whose ``%rd1``, ``%rd2``, ... hold the tensors' addresses and ``%r1`` the thread's number."""
    params = ",\n".join(f"\t.param .u64 .ptr .global .align 1 p{i}" for i in range(len(tensors)))
    start = "\tmov.u32 %r1, %tid.x;\n" + "".join(f"\tld.param.b64 %rd{i + 1}, [p{i}];\n" for i in range(len(tensors)))
    kernel = parse(_HEAD.format(params=params, threads=threads, body=start + body))
    memory = Global({f"t{i}": tensor for i, tensor in enumerate(tensors)})
    values = {f"p{i}": np.array([memory.address(tensor)], "u8") for i, tensor in enumerate(tensors)}
    counts = machine.run(machine.prepare(kernel, shared), memory, values, (programs, 1, 1))
    memory.write_back()
    return counts


# ---- instructions ----------------------------------------------------------------------------------------------------


def elementwise(opcode: str, dtype: torch.dtype, result: torch.dtype, *values: Tensor) -> Tensor:
    """``opcode`` of each thread's elements."""
    out = torch.zeros(THREADS, dtype=result)
    width = {1: "b8", 2: "b16", 4: "b32", 8: "b64"}
    prefix = {2: "%rs", 4: "%r", 8: "%rd"}
    lines = []
    for i, value in enumerate(values):
        size = value.element_size()
        lines.append(f"mad.wide.u32 %rd{20 + i}, %r1, {size}, %rd{i + 2};")
        lines.append(f"ld.global.{width[size]} {{ {prefix[size]}{50 + i} }}, [ %rd{20 + i} + 0 ];")
    operands = [f"{prefix[value.element_size()]}{50 + i}" for i, value in enumerate(values)]
    size = out.element_size()
    lines.append(f"{opcode} {prefix[size]}60, {', '.join(operands)};")
    lines.append(f"mad.wide.u32 %rd40, %r1, {size}, %rd1;")
    lines.append(f"st.global.{width[size]} [ %rd40 + 0 ], {{ {prefix[size]}60 }};")
    run("\n".join(lines), [out, *values])
    return out


def integers(seed: int, dtype: torch.dtype = torch.int32) -> Tensor:
    limits = torch.iinfo(dtype)
    rng = np.random.default_rng(seed)
    values = rng.integers(limits.min, limits.max, THREADS, dtype=np.int64)
    values[:4] = [limits.min, limits.max, 0, -1]
    values[4:20] = rng.integers(-40, 40, 16)
    return torch.from_numpy(values).to(dtype)


def floats(seed: int) -> Tensor:
    values = np.random.default_rng(seed).normal(size=THREADS).astype("f4") * 3
    values[:8] = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 3e38, 1.0]
    return torch.from_numpy(values)


A, B, C = integers(1), integers(2), integers(3)
U = [x.numpy().view("u4") for x in (A, B, C)]
F, G, H = floats(1), floats(2).roll(3), floats(3).roll(5)
SAFE = torch.where(B == 0, 7, B)


def _truncated(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    signs = np.where((a < 0) == (b < 0), 1, -1)
    return np.abs(a.astype("i8")) // np.abs(b.astype("i8")) * signs


def _wrap(values: Any) -> np.ndarray:
    return np.array([int(v) & 0xFFFFFFFF for v in values], "u4").view("i4")


INTEGER_FORMS: dict[str, tuple[tuple[Tensor, ...], Callable[[], np.ndarray]]] = {
    "add.s32": ((A, B), lambda: _wrap(A.long() + B.long())),
    "sub.s32": ((A, B), lambda: _wrap(A.long() - B.long())),
    "mul.lo.s32": ((A, B), lambda: _wrap(A.long() * B.long())),
    "mul.hi.s32": ((A, B), lambda: _wrap((A.long() * B.long()) >> 32)),
    "mul.hi.u32": ((A, B), lambda: _wrap((U[0].astype("u8") * U[1].astype("u8")) >> np.uint64(32))),
    "mad.lo.s32": ((A, B, C), lambda: _wrap(A.long() * B.long() + C.long())),
    "div.s32": ((A, SAFE), lambda: _wrap(_truncated(A.numpy(), SAFE.numpy()))),
    "rem.s32": ((A, SAFE), lambda: _wrap(A.long().numpy() - _truncated(A.numpy(), SAFE.numpy()) * SAFE.long().numpy())),
    "div.u32": ((A, SAFE), lambda: _wrap(U[0] // SAFE.numpy().view("u4"))),
    "min.s32": ((A, B), lambda: np.minimum(A.numpy(), B.numpy())),
    "max.u32": ((A, B), lambda: np.maximum(U[0], U[1]).view("i4")),
    "and.b32": ((A, B), lambda: A.numpy() & B.numpy()),
    "or.b32": ((A, B), lambda: A.numpy() | B.numpy()),
    "xor.b32": ((A, B), lambda: A.numpy() ^ B.numpy()),
    "not.b32": ((A,), lambda: ~A.numpy()),
    "neg.s32": ((A,), lambda: _wrap(-A.long())),
    "abs.s32": ((A,), lambda: _wrap(A.long().abs())),
    "popc.b32": ((A,), lambda: np.array([bin(int(x)).count("1") for x in U[0]])),
    "clz.b32": ((A,), lambda: np.array([32 - int(x).bit_length() for x in U[0]])),
    "brev.b32": ((A,), lambda: _wrap(int(f"{int(x):032b}"[::-1], 2) for x in U[0])),
    "shl.b32": ((A, B), lambda: _wrap(int(x) << int(n) if n < 32 else 0 for x, n in zip(U[0], U[1], strict=True))),
    "shr.u32": ((A, B), lambda: _wrap(int(x) >> int(n) if n < 32 else 0 for x, n in zip(U[0], U[1], strict=True))),
    "shr.s32": ((A, B), lambda: _wrap(int(x) >> min(int(n), 31) for x, n in zip(A, U[1], strict=True))),
    "prmt.b32": ((A, B, C), lambda: _wrap(map(_prmt, *U))),
    "bfe.u32": ((A, B, C), lambda: _wrap(map(_bfe, *U))),
    "bfe.s32": (
        (A, B, C),
        lambda: _wrap(map(_signed_bfe, A.tolist(), U[1].tolist(), U[2].tolist())),
    ),
}


def _prmt(a: int, b: int, selector: int) -> int:
    octets = (int(a) | int(b) << 32).to_bytes(8, "little")
    out = []
    for place in range(4):
        nibble = int(selector) >> 4 * place & 15
        octet = octets[nibble & 7]
        out.append((255 if octet > 127 else 0) if nibble & 8 else octet)
    return int.from_bytes(bytes(out), "little")


def _bfe(a: int, position: int, length: int) -> int:
    return int(a) >> (int(position) & 255) & (1 << min(int(length) & 255, 32)) - 1


def _signed_bfe(a: int, position: int, length: int) -> int:
    position, length = position & 255, min(length & 255, 32)
    if length == 0:
        return 0
    field = a >> position & (1 << length) - 1  # Python's shift repeats the sign
    return field - (1 << length) if field >> length - 1 & 1 else field


@pytest.mark.parametrize("opcode", INTEGER_FORMS)
def test_integer_instruction(opcode: str) -> None:
    values, truth = INTEGER_FORMS[opcode]
    got = elementwise(opcode, torch.int32, torch.int32, *values)
    np.testing.assert_array_equal(got.numpy(), truth())


def _fma(a: float, b: float, c: float) -> float:
    """Rounded once, by exact rational arithmetic."""
    from fractions import Fraction

    if not np.isfinite([a, b, c]).all():
        return float(np.float32(a) * np.float32(b) + np.float32(c))
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    near = np.float32(float(exact))
    around = [np.nextafter(near, np.float32(-np.inf)), near, np.nextafter(near, np.float32(np.inf))]
    return float(min(around, key=lambda x: (abs(Fraction(float(x)) - exact), int(x.view("u4")) & 1)))


FLOAT_FORMS: dict[str, tuple[tuple[Tensor, ...], Callable[[], np.ndarray]]] = {
    "add.f32": ((F, G), lambda: F.numpy() + G.numpy()),
    "mul.f32": ((F, G), lambda: F.numpy() * G.numpy()),
    "fma.rn.f32": ((F[8:].repeat(2)[:64] * 1.7, G[8:].repeat(2)[:64], H[8:].repeat(2)[:64]), lambda: _all_fma()),
    "div.full.f32": ((F, G), lambda: F.numpy() / G.numpy()),
    "min.f32": ((F, G), lambda: np.fmin(F.numpy(), G.numpy())),
    "max.NaN.f32": ((F, G), lambda: np.maximum(F.numpy(), G.numpy())),
    "abs.f32": ((F,), lambda: np.abs(F.numpy())),
    "ex2.approx.f32": ((F,), lambda: np.exp2(F.numpy().astype("f8")).astype("f4")),
    "lg2.approx.ftz.f32": ((F,), lambda: np.log2(_ftz(F.numpy()).astype("f8")).astype("f4")),
    "sqrt.approx.ftz.f32": ((F,), lambda: np.sqrt(_ftz(F.numpy()))),
    "rcp.approx.ftz.f32": ((F,), lambda: _ftz(1 / _ftz(F.numpy()))),
}


def _ftz(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < 2.0**-126, np.copysign(0, x), x).astype("f4")


def _all_fma() -> np.ndarray:
    values = FLOAT_FORMS["fma.rn.f32"][0]
    return np.array([_fma(*(float(v[i]) for v in values)) for i in range(THREADS)], "f4")


@pytest.mark.parametrize("opcode", FLOAT_FORMS)
def test_float_instruction(opcode: str) -> None:
    values, truth = FLOAT_FORMS[opcode]
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(elementwise(opcode, torch.float32, torch.float32, *values).numpy(), truth())


def test_fma_rounds_a_tie_by_what_was_lost() -> None:
    a = torch.full((THREADS,), 1.0 + 2.0**-12)  # a * a = 1 + 2^-11 + 2^-24: half way, and c decides
    c = torch.where(torch.arange(THREADS) % 2 == 0, 2.0**-60, -(2.0**-60))
    got = elementwise("fma.rn.f32", torch.float32, torch.float32, a, a, c)
    low = np.float32(1 + 2.0**-11)
    assert got[0].item() == np.nextafter(low, np.float32(2))
    assert got[1].item() == low


def test_bfloat16_rounds_to_even_and_once() -> None:
    values = torch.cat([floats(7), torch.tensor([1.00390625, 1.01171875, 3.3961e38, 1e-40])])
    np.testing.assert_array_equal(to_bf16(values.numpy())[4:5], [0x7FFF])  # NaN
    clean = values[~values.isnan()]
    np.testing.assert_array_equal(to_bf16(clean.numpy()).view("i2"), clean.bfloat16().view(torch.int16).numpy())
    # just above a tie of bfloat16, but float32 would round it to the tie first
    assert to_bf16(np.array([1 + 2.0**-8 + 2.0**-40]))[0] == 0x3F81


@pytest.mark.parametrize("opcode", ["add.bf16", "mul.bf16"])
def test_bfloat16_instruction(opcode: str) -> None:
    a, b = F[8:].repeat(2)[:64].bfloat16(), G[8:].repeat(2)[:64].bfloat16()
    want = a + b if opcode.startswith("add") else a * b
    got = elementwise(opcode, torch.bfloat16, torch.bfloat16, a, b)
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["add", "sub"])
def test_a_16_bit_operand_beside_a_float32(name: str, dtype: torch.dtype) -> None:
    a, b = F[8:].repeat(2)[:64].clamp(-6e4, 6e4).to(dtype), G[8:].repeat(2)[:64]
    kind = "bf16" if dtype == torch.bfloat16 else "f16"
    got = elementwise(f"{name}.rn.f32.{kind}", dtype, torch.float32, a, b)
    assert torch.equal(got, a.float() + b if name == "add" else a.float() - b)


COMPARISONS = {
    "lt": (np.less, False),
    "equ": (np.equal, True),
    "neu": (np.not_equal, True),
    "geu": (np.greater_equal, True),
    "num": (lambda a, b: np.ones_like(a, bool), False),
}


@pytest.mark.parametrize("name", COMPARISONS)
def test_float_comparison_and_nan(name: str) -> None:
    compare, unordered = COMPARISONS[name]
    a, b = F.numpy(), G.numpy()
    want = np.where(np.isnan(a) | np.isnan(b), unordered, compare(a, b))
    out = torch.zeros(THREADS, dtype=torch.int32)
    body = f"""
        mad.wide.u32 %rd10, %r1, 4, %rd2;
        mad.wide.u32 %rd11, %r1, 4, %rd3;
        mad.wide.u32 %rd12, %r1, 4, %rd1;
        ld.global.b32 {{ %r2 }}, [ %rd10 + 0 ];
        ld.global.b32 {{ %r3 }}, [ %rd11 + 0 ];
        setp.{name}.f32 %p1, %r2, %r3;
        selp.b32 %r4, 1, 0, %p1;
        st.global.b32 [ %rd12 + 0 ], {{ %r4 }};
    """
    run(body, [out, F, G])
    np.testing.assert_array_equal(out.numpy(), want.astype("i4"))


SHUFFLES = {
    "bfly.b32 %r3, %r2, 5, 31": lambda lane: lane ^ 5,
    "idx.b32 %r3, %r2, 9, 31": lambda lane: np.full(32, 9),
    "up.b32 %r3, %r2, 3, 0": lambda lane: np.where(lane >= 3, lane - 3, lane),
    "down.b32 %r3, %r2, 4, 31": lambda lane: np.where(lane + 4 <= 31, lane + 4, lane),
    "bfly.b32 %r3, %r2, 16, 15": lambda lane: np.where((lane ^ 16) <= 15, lane ^ 16, lane),
}


@pytest.mark.parametrize("form", SHUFFLES)
def test_shuffle(form: str) -> None:
    out = torch.zeros(THREADS, dtype=torch.int32)
    body = f"""
        mul.lo.s32 %r2, %r1, 10;
        shfl.sync.{form}, -1;
        mad.wide.u32 %rd2, %r1, 4, %rd1;
        st.global.b32 [ %rd2 + 0 ], {{ %r3 }};
    """
    run(body, [out])
    source = SHUFFLES[form](np.arange(32))
    np.testing.assert_array_equal(out.numpy(), np.concatenate([source, source + 32]) * 10)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_matrix_product_through_shared_memory(kind: str) -> None:
    """A 16x16 by 16x8 product by ldmatrix and mma.sync, the operands brought by cp.async."""
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    out = torch.zeros(16, 8)
    product = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32"
    body = f"""
        shl.b32 %r2, %r1, 4;
        cvt.u64.u32 %rd10, %r2;
        add.s64 %rd11, %rd2, %rd10;
        add.s64 %rd12, %rd3, %rd10;
        setp.lt.u32 %p1, %r1, 16;
        cp.async.cg.shared.global [ %r2 + 0 ], [ %rd11 + 0 ], 0x10;
        @%p1 cp.async.cg.shared.global [ %r2 + 512 ], [ %rd12 + 0 ], 0x10;
        cp.async.commit_group;
        cp.async.wait_group 0;
        bar.sync 0;
        and.b32 %r3, %r1, 15;
        shl.b32 %r4, %r3, 5;
        and.b32 %r5, %r1, 16;
        add.s32 %r6, %r4, %r5;
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r10, %r11, %r12, %r13}}, [%r6];
        shl.b32 %r7, %r3, 4;
        ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {{%r14, %r15}}, [%r7+512];
        mov.b32 %r20, 0;
        {product} {{%r21, %r22, %r23, %r24}}, {{%r10, %r11, %r12, %r13}}, {{%r14, %r15}}, {{%r20, %r20, %r20, %r20}};
        shr.u32 %r30, %r1, 2;
        and.b32 %r31, %r1, 3;
        shl.b32 %r32, %r31, 1;
        mad.lo.s32 %r33, %r30, 8, %r32;
        mad.wide.u32 %rd20, %r33, 4, %rd1;
        st.global.v2.b32 [ %rd20 + 0 ], {{ %r21, %r22 }};
        st.global.v2.b32 [ %rd20 + 256 ], {{ %r23, %r24 }};
    """
    run(body, [out, a, b], threads=32, shared=768)
    torch.testing.assert_close(out, (a.double() @ b.double()).float(), rtol=1e-6, atol=1e-6)


def test_threads_part_and_come_together() -> None:
    """A loop whose trip count differs from thread to thread, then a barrier."""
    out = torch.zeros(THREADS, dtype=torch.int32)
    body = """
        mov.b32 %r2, 0;
        mov.b32 %r3, 0;
$L_again:
        setp.ge.s32 %p1, %r2, %r1;
        @%p1 bra $L_done;
        add.s32 %r3, %r3, %r2;
        add.s32 %r2, %r2, 1;
        bra.uni $L_again;
$L_done:
        bar.sync 0;
        mad.wide.u32 %rd2, %r1, 4, %rd1;
        st.global.b32 [ %rd2 + 0 ], { %r3 };
    """
    counts = run(body, [out], programs=1)
    np.testing.assert_array_equal(out.numpy(), [n * (n - 1) // 2 for n in range(THREADS)])
    assert counts.barriers == 1
    assert counts.written == (4 * THREADS, 8)  # bytes, 32-byte sectors
    assert counts.opcodes["bar.sync"] == 2  # once a warp


# ---- planted faults in PTX -------------------------------------------------------------------------------------------

EXCHANGE = """
        shl.b32 %r2, %r1, 2;
        st.shared.b32 [ %r2 + 0 ], %r1;
        bar.sync 0;
        xor.b32 %r3, %r2, 128;
        ld.shared.b32 %r4, [%r3];
        mad.wide.u32 %rd2, %r1, 4, %rd1;
        st.global.b32 [ %rd2 + 0 ], { %r4 };
        bar.sync 0;
        st.shared.b32 [ %r2 + 0 ], %r4;
"""


def exchange(body: str, length: int = THREADS) -> Tensor:
    out = torch.zeros(length, dtype=torch.int32)
    run(body, [out], shared=4 * THREADS)
    return out


def test_exchange_is_right_as_it_is() -> None:
    np.testing.assert_array_equal(exchange(EXCHANGE).numpy(), np.arange(THREADS) ^ 32)


@pytest.mark.parametrize(
    ("old", "new", "fault", "message"),
    [
        ("bar.sync 0;\n        xor", "xor", Race, "reads what warp 1 wrote in shared memory without a barrier"),
        ("bar.sync 0;\n        st.shared", "st.shared", Race, "overwrites what warp 1 read in shared memory"),
        ("st.shared.b32 [ %r2 + 0 ], %r1;", "", Uninitialised, "shared memory that was never written"),
        ("xor.b32 %r3, %r2, 128", "add.s32 %r3, %r2, 128", OutOfBounds, "byte 256 of shared memory, which has 256"),
        ("%r1, 4, %rd1", "%r1, 5, %rd1", Misaligned, "write of 4 bytes at byte"),
        ("%r1, 4, %rd1", "%r1, 8, %rd1", OutOfBounds, "write of 4 bytes at byte .* of t0"),
        ("{ %r4 }", "{ %r9 }", Uninitialised, "a stored value comes from a register"),
        ("[ %rd2 + 0 ]", "[ %rd9 + 0 ]", Uninitialised, "an address comes from a register"),
        ("bar.sync 0;\n        xor", "setp.lt.u32 %p1, %r1, 7;\n@%p1 bar.sync 0;\n        xor", Divergent, "barrier"),
    ],
)
def test_planted_fault_is_found(old: str, new: str, fault: type[Exception], message: str) -> None:
    assert EXCHANGE.count(old) == 1
    with pytest.raises(fault, match=message):
        exchange(EXCHANGE.replace(old, new))


def test_two_programs_may_not_store_to_one_place() -> None:
    out = torch.zeros(THREADS, dtype=torch.int32)
    body = "mad.wide.u32 %rd2, %r1, 4, %rd1;\nst.global.b32 [ %rd2 + 0 ], { %r1 };"
    with pytest.raises(Race, match="two programs store"):
        run(body, [out], programs=2)


def test_a_copy_that_is_not_waited_for_is_found() -> None:
    body = """
        shl.b32 %r2, %r1, 4;
        cvt.u64.u32 %rd10, %r2;
        add.s64 %rd11, %rd1, %rd10;
        cp.async.cg.shared.global [ %r2 + 0 ], [ %rd11 + 0 ], 0x10;
        cp.async.commit_group;
        {wait}
        ld.shared.b32 %r3, [%r2];
    """
    source = torch.zeros(4 * THREADS)
    run(body.format(wait="cp.async.wait_group 0;"), [source], shared=16 * THREADS)
    for wait in ("", "cp.async.wait_group 1;"):
        with pytest.raises(Race, match=r"a cp\.async has not been waited for"):
            run(body.format(wait=wait), [source], shared=16 * THREADS)


def test_masked_load_without_a_value_poisons_only_what_uses_it() -> None:
    body = """
        setp.lt.u32 %p1, %r1, {some};
        mad.wide.u32 %rd3, %r1, 4, %rd2;
        @%p1 ld.global.b32 {{ %r2 }}, [ %rd3 + 0 ];
        add.s32 %r3, %r2, 1;
        selp.b32 %r4, %r3, 0, %p1;
        mad.wide.u32 %rd4, %r1, 4, %rd1;
        st.global.b32 [ %rd4 + 0 ], {{ %r{stored} }};
    """
    out, source = torch.full((THREADS,), 9, dtype=torch.int32), torch.arange(40, dtype=torch.int32)
    run(body.format(some=40, stored=4), [out, source])
    np.testing.assert_array_equal(out.numpy(), [*range(1, 41), *[0] * 24])
    with pytest.raises(Uninitialised, match="thread 40: a stored value"):
        run(body.format(some=40, stored=3), [out, source])
    with pytest.raises(OutOfBounds, match="thread 40: read of 4 bytes at byte 160 of t1"):
        run(body.format(some=41, stored=4), [out, source])


def test_the_gaps_of_a_strided_tensor_are_not_its_own() -> None:
    whole = torch.zeros(4, 16, dtype=torch.int32)
    body = "mad.wide.u32 %rd2, %r1, 4, %rd1;\nsetp.lt.u32 %p1, %r1, {n};\n@%p1 st.global.b32 [ %rd2 + 0 ], {{ %r1 }};"
    run(body.format(n=10), [whole[:, :10]])
    assert whole[0, :10].tolist() == list(range(10))
    with pytest.raises(OutOfBounds, match="which are not its elements"):
        run(body.format(n=11), [whole[:, :10]])


@pytest.mark.parametrize("opcode", ["atom.global.add.f32", "wgmma.fence.sync.aligned", "add.rz.f32", "cvt.rz.f16.f32"])
def test_what_is_not_interpreted_says_so(opcode: str) -> None:
    with pytest.raises(Unsupported, match=opcode.split(".")[0]):
        run(f"{opcode} %r2, %r1;", [])


# ---- planted faults in Triton kernels --------------------------------------------------------------------------------


@triton.jit
def _row_sums_kernel(source, out, rows, columns, stride, BLOCK: tl.constexpr, MASKED: tl.constexpr, OFF: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    if MASKED:
        x = tl.load(source + row * (stride + OFF) + at, mask=at < columns, other=0.0)
    else:
        x = tl.load(source + row * (stride + OFF) + at)
    tl.store(out + row, tl.sum(x, 0))


def row_sums(source: Tensor, *, masked: bool = True, off: int = 0) -> Tensor:
    from tests.ptx.launch import run_ptx

    rows, columns = source.shape
    out = torch.empty(rows)
    with run_ptx(90):
        options: Any = {"BLOCK": 128, "MASKED": masked, "OFF": off}
        launch(_row_sums_kernel, rows)(source, out, rows, columns, source.stride(0), **options)
    return out


@needs_triton
def test_a_sound_kernel_passes() -> None:
    source = torch.randn(5, 101)
    torch.testing.assert_close(row_sums(source), source.sum(1))


@needs_triton
def test_a_dropped_mask_is_caught() -> None:
    with pytest.raises(OutOfBounds, match=r"test_machine\.py:\d+: program 4, thread .* read of .* of source"):
        row_sums(torch.randn(5, 101), masked=False)
    whole = torch.randn(6, 128)
    with pytest.raises(OutOfBounds, match="which are not its elements"):  # inside the storage, but past the row
        row_sums(whole[:5, :101], masked=False)


@needs_triton
def test_an_off_by_one_stride_is_caught() -> None:
    with pytest.raises(OutOfBounds, match=r"test_machine\.py:\d+: program 4, .* of source"):
        row_sums(torch.randn(5, 101), off=1)
    source = torch.randn(5, 101)
    with pytest.raises(AssertionError):  # one that stays inside shows as a wrong result
        torch.testing.assert_close(row_sums(source, off=-1), source.sum(1))


@needs_triton
def test_a_missing_barrier_is_caught() -> None:
    """Each barrier of a compiled row sum, taken out of its PTX, leaves a race between warps."""
    from tests.ptx.launch import execute, run_ptx

    source, out = torch.randn(3, 1000), torch.empty(3)
    arguments: Any = {"source": source, "out": out, "rows": 3, "columns": 1000, "stride": 1000}
    arguments |= {"BLOCK": 1024, "MASKED": True, "OFF": 0}
    with run_ptx(90) as launches:
        launch(_row_sums_kernel, 3)(*arguments.values())
    torch.testing.assert_close(out, source.sum(1))
    compiled = launches[0].compiled
    text = compiled.asm["ptx"]
    barriers = text.count("bar.sync")
    assert barriers >= 1
    pieces = text.split("bar.sync")
    for left_out in range(1, barriers + 1):
        before, after = "bar.sync".join(pieces[:left_out]), "bar.sync".join(pieces[left_out:])
        compiled.asm["ptx"] = before + after.partition(";")[2]
        with pytest.raises(Race, match="without a barrier between"):
            execute(compiled, arguments, (3,))
