"""``add_rms_norm``, ``rope_append``, ``silu_mul``: eager twins against float64, kernels in the interpreter, GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl_kernels import add_rms_norm, rope_append, silu_mul

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
KERNEL_DTYPES = [torch.float32, torch.float16]
SHAPES = [(1, 1), (3, 7), (5, 64), (2, 1000), (0, 8)]
HEADS = [(1, 1, 1, 2, 1), (3, 4, 2, 10, 5), (2, 8, 1, 64, 3), (0, 2, 2, 4, 2)]  # rows, query heads, key heads, D, slots


def normal(*shape: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).to(device)


def close(got: Tensor, truth: Tensor, dtype: torch.dtype, roundings: float = 3) -> None:
    """``truth`` in float64; every rounding to ``dtype`` is half a unit, float32 sums some more."""
    allowed = roundings * torch.finfo(dtype).eps * (4 if dtype in (torch.float32, torch.float64) else 1)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double().cpu(), truth.cpu(), rtol=allowed, atol=allowed)


def check_norm(rows: int, hidden: int, dtype: torch.dtype, added: bool, device: str = "cpu") -> None:
    residual = normal(rows, hidden, dtype=dtype, device=device)
    x = normal(rows, hidden, dtype=dtype, device=device) if added else None
    weight = normal(hidden, dtype=dtype, device=device)
    total = residual if x is None else residual + x  # torch rounds once, too
    out = add_rms_norm(residual, x, weight, 1e-6)
    assert torch.equal(residual, total)
    wide = total.double()
    truth = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    close(out, truth, dtype)


def rope_problem(rows: int, hq: int, hkv: int, dim: int, slots: int, dtype: torch.dtype, device: str = "cpu") -> Any:
    q, k, v = (normal(rows, heads, dim, dtype=dtype, device=device) for heads in (hq, hkv, hkv))
    angle = normal(rows, dim // 2, dtype=torch.float64, device=device)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    keys, values = (normal(rows, hkv, slots, dim, dtype=dtype, device=device) for _ in range(2))
    return q, k, v, cos, sin, keys, values


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """By complex numbers, in float64."""
    first, second = x.double().chunk(2, -1)
    out = torch.complex(first, second) * torch.complex(cos.double(), sin.double())[:, None]
    return torch.cat((out.real, out.imag), -1)


def check_rope(rows: int, hq: int, hkv: int, dim: int, slots: int, dtype: torch.dtype, device: str = "cpu") -> None:
    q, k, v, cos, sin, keys, values = rope_problem(rows, hq, hkv, dim, slots, dtype, device)
    slot = slots - 1
    before = keys.clone(), values.clone()
    out = rope_append(q, k, v, cos, sin, keys, values, torch.tensor([slot], device=device))
    close(out, turned(q, cos, sin), dtype)
    close(keys[:, :, slot], turned(k, cos, sin), dtype)
    assert torch.equal(values[:, :, slot], v)
    for cache, old in zip((keys, values), before, strict=True):  # no other slot is touched
        assert torch.equal(cache[:, :, :slot], old[:, :, :slot])


def check_gate(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> None:
    gate, up = (4 * normal(*shape, dtype=dtype, device=device) for _ in range(2))
    kept = gate.clone()
    out = silu_mul(gate, up)
    assert torch.equal(gate, kept)
    close(out, gate.double().sigmoid() * gate.double() * up.double(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize(("rows", "hidden"), SHAPES)
def test_norm_equals_float64(rows: int, hidden: int, added: bool, dtype: torch.dtype) -> None:
    check_norm(rows, hidden, dtype, added)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "hq", "hkv", "dim", "slots"), HEADS)
def test_rope_equals_float64(rows: int, hq: int, hkv: int, dim: int, slots: int, dtype: torch.dtype) -> None:
    check_rope(rows, hq, hkv, dim, slots, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 7), (2, 5, 6), (0, 4), (2049,)])
def test_gate_equals_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_gate(shape, dtype)


def test_large_numbers_stay_finite() -> None:
    residual = torch.full((1, 4), 1e19)  # squares to the edge of float32
    assert add_rms_norm(residual, None, torch.ones(4), 1e-6).isfinite().all()
    gate = torch.tensor([-1e4, 1e4])
    assert silu_mul(gate, torch.ones(2)).tolist() == [0.0, 1e4]


def test_rope_is_that_of_transformers() -> None:
    """Rotation by halves, as the models' own code has it."""
    from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

    q, k, v, cos, sin, keys, values = rope_problem(3, 4, 2, 10, 5, torch.float32)
    whole = (torch.cat((x, x), -1)[:, None] for x in (cos, sin))
    want_q, want_k = apply_rotary_pos_emb(q[:, :, None], k[:, :, None], *whole)
    out = rope_append(q, k, v, cos, sin, keys, values, torch.tensor([2]))
    torch.testing.assert_close(out, want_q[:, :, 0])
    torch.testing.assert_close(keys[:, :, 2], want_k[:, :, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(3, 4, 9)}, "q: heads of 9 numbers do not split into halves"),
        ({"k": torch.ones(2, 2, 10)}, r"k: expected shape \[3, any, 10\], got \[2, 2, 10\]"),
        ({"v": torch.ones(3, 1, 10)}, r"v: expected shape \[3, 2, 10\]"),
        ({"keys": torch.ones(3, 2, 5, 10).half()}, "keys: expected dtype float32, got float16"),
        ({"keys": torch.ones(3, 2, 10, 5).transpose(2, 3)}, "keys, values: expected equal strides, the last one 1"),
        ({"cos": torch.ones(3, 10)}, r"cos: expected shape \[3, 5\]"),
        ({"at": torch.tensor([1], dtype=torch.int32)}, "at: expected dtype int64"),
        ({"at": torch.tensor(1)}, r"at: expected shape \[1\]"),
        ({"sin": torch.ones(3, 5, device="meta")}, "tensors on different devices"),
    ],
)
def test_bad_rope_arguments_are_named(change: dict[str, Tensor], message: str) -> None:
    names = ("q", "k", "v", "cos", "sin", "keys", "values")
    given = dict(zip(names, rope_problem(3, 4, 2, 10, 5, torch.float32), strict=True)) | {"at": torch.tensor([0])}
    with pytest.raises((ValueError, TypeError), match=message):
        rope_append(**(given | change))


def test_bad_norm_and_gate_arguments_are_named() -> None:
    residual, weight = torch.ones(2, 4), torch.ones(4)
    with pytest.raises(ValueError, match="residual: changed in place"):
        add_rms_norm(torch.ones(4, 2).T, None, weight, 1e-6)
    with pytest.raises(ValueError, match=r"x: expected shape \[2, 4\], got \[4, 2\]"):
        add_rms_norm(residual, torch.ones(4, 2), weight, 1e-6)
    with pytest.raises(TypeError, match="weight: expected dtype float32, got bfloat16"):
        add_rms_norm(residual, None, weight.bfloat16(), 1e-6)
    with pytest.raises(ValueError, match="up: expected shape"):
        silu_mul(residual, weight)
    with pytest.raises(TypeError, match="gate: expected dtype"):
        silu_mul(torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64))


@pytest.mark.parametrize("slot", [-1, 5])
def test_a_slot_outside_the_cache_is_named(slot: int) -> None:
    with pytest.raises(ValueError, match=f"at: slot {slot} is outside a cache of 5"):
        rope_append(*rope_problem(3, 4, 2, 10, 5, torch.float32), torch.tensor([slot]))


def test_nothing_takes_a_gradient() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    weight = torch.nn.Parameter(torch.ones(8))
    assert not add_rms_norm(torch.randn(3, 8), x, weight, 1e-6).requires_grad
    q, k, v, *rest = rope_problem(3, 4, 2, 10, 5, torch.float32)
    assert not rope_append(q.requires_grad_(), k.requires_grad_(), v, *rest, torch.tensor([1])).requires_grad


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize(("rows", "hidden"), SHAPES)
def test_kernels_equal_float64(rows: int, hidden: int, dtype: torch.dtype) -> None:
    for added in (True, False):
        check_norm(rows, hidden, dtype, added)
    check_gate((rows, hidden), dtype)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize(("rows", "hq", "hkv", "dim", "slots"), HEADS)
def test_rope_kernel_equals_float64(rows: int, hq: int, hkv: int, dim: int, slots: int, dtype: torch.dtype) -> None:
    check_rope(rows, hq, hkv, dim, slots, dtype)


@pytest.mark.interpreter
def test_rope_kernel_takes_strided_caches() -> None:
    """Caches of a batch that shrank lie in larger buffers; queries may come as a view."""
    q, k, v, cos, sin, keys, values = rope_problem(3, 4, 2, 10, 5, torch.float32)
    wide = [torch.zeros(3, 2, 9, 10)[:, :, :5].copy_(x) for x in (keys, values)]
    turned_q = q.transpose(0, 1).contiguous().transpose(0, 1)
    out = rope_append(turned_q, k, v, cos, sin, *wide, torch.tensor([3]))
    close(out, turned(q, cos, sin), torch.float32)
    close(wide[0][:, :, 3], turned(k, cos, sin), torch.float32)
    assert torch.equal(wide[1][:, :, 3], v)
    assert torch.equal(wide[0][:, :, :3], keys[:, :, :3])


@pytest.mark.interpreter
def test_ops_pass_opcheck() -> None:
    ops, residual = torch.ops.fastrl, torch.randn(3, 8)
    torch.library.opcheck(ops.add_rms_norm.default, (residual, torch.randn(3, 8), torch.randn(8), 1e-6))
    torch.library.opcheck(ops.add_rms_norm.default, (residual, None, torch.randn(8), 1e-6))
    given = rope_problem(3, 4, 2, 10, 5, torch.float32)
    torch.library.opcheck(ops.rope_append.default, (*given, torch.tensor([1])))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gpu_equals_float64(dtype: torch.dtype) -> None:
    for rows, hidden in (*SHAPES, (64, 2048), (7, 5120)):
        for added in (True, False):
            check_norm(rows, hidden, dtype, added, "cuda")
        check_gate((rows, hidden), dtype, "cuda")
    for shape in (*HEADS, (64, 16, 2, 128, 9)):
        check_rope(*shape, dtype, "cuda")


@pytest.mark.gpu
def test_gpu_never_waits_for_the_device() -> None:
    given = rope_problem(4, 8, 2, 64, 5, torch.bfloat16, "cuda")
    at = torch.zeros(1, dtype=torch.int64, device="cuda")
    x, weight = torch.ones(4, 64, device="cuda"), torch.ones(64, device="cuda")

    def run() -> None:
        rope_append(*given, at)
        add_rms_norm(x, x.clone(), weight, 1e-6)
        silu_mul(x, x)

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
