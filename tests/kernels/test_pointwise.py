"""Norms, gates, activations and rotary embeddings: both paths against float64, with their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastrl_kernels
from fastrl_kernels import (
    bias_activation,
    gelu_mul,
    qkv_rope,
    reference,
    residual_rms_norm,
    rms_norm,
    rope,
    silu_mul,
)
from fastrl_kernels._activations import KINDS
from fastrl_kernels._common import use_operator
from tests.helpers.gradients import outputs_and_gradients, outputs_of

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def check(name: str, shapes: list[tuple[int, ...]], dtype: torch.dtype, device: str = "cpu", **options: Any) -> None:
    """The public function ``name`` against its twin in float64, angles of an embedding given after the tensors."""
    angles = [x.to(device) for x in options.pop("angles", ())]
    inputs = [(1.5 * torch.randn(shape, dtype=torch.float64)).to(dtype).to(device) for shape in shapes]
    ours, twin = getattr(fastrl_kernels, name), getattr(reference, f"{name}_reference")
    like = outputs_of(twin(*inputs, *angles, **options))
    upstream = [torch.randn_like(x, dtype=torch.float64).to(dtype) for x in like]
    got = outputs_and_gradients(lambda *x: ours(*x, *angles, **options), inputs, upstream)
    wide, exact = [x.double() for x in inputs], [x.double() for x in angles]
    want = outputs_and_gradients(lambda *x: twin(*x, *exact, **options), wide, upstream)
    for mine, truth in zip(got, want, strict=True):
        assert mine.dtype == dtype
        assert mine.shape == truth.shape
        scale = max(1.0, float(truth.abs().max())) if truth.numel() else 1.0
        torch.testing.assert_close(mine.double(), truth, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale)


ROWS = [(1, 1), (17, 40), (2, 3, 130), (0, 8)]
WIDE, NARROW = torch.float32, torch.float16


def check_norms(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> None:
    hidden = shape[-1:]
    check("rms_norm", [shape, hidden], dtype, device, eps=1e-5)
    check("residual_rms_norm", [shape, shape, hidden], dtype, device, eps=1e-5)
    twin = reference.residual_rms_norm_reference
    stream, weight = torch.randn(shape, dtype=dtype, device=device), torch.randn(hidden, dtype=dtype, device=device)
    upstream = [torch.randn_like(stream) for _ in range(2)]
    got = outputs_and_gradients(lambda x, w: residual_rms_norm(x, None, w), [stream, weight], upstream)
    want = outputs_and_gradients(lambda x, w: twin(x, None, w), [stream.double(), weight.double()], upstream)
    for mine, truth in zip(got, want, strict=True):
        tolerance = TOLERANCE[dtype] * max(1.0, float(truth.abs().max()) if truth.numel() else 1.0)
        torch.testing.assert_close(mine.double(), truth, rtol=TOLERANCE[dtype], atol=tolerance)


def check_gates(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> None:
    check("silu_mul", [shape, shape], dtype, device)
    for approximate in ("none", "tanh"):
        check("gelu_mul", [shape, shape], dtype, device, approximate=approximate)
    bias = torch.randn(2, shape[-1], device=device).to(dtype)
    wide = bias.double()

    def ours(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return silu_mul(x, y, gate_bias=a, up_bias=b)

    inputs = [torch.randn(shape, device=device).to(dtype) for _ in range(2)]
    upstream = [torch.randn(shape, device=device)]
    got = outputs_and_gradients(ours, [*inputs, *bias.unbind()], upstream)
    want = outputs_and_gradients(
        lambda x, y, a, b: reference.silu_mul_reference(x, y, gate_bias=a, up_bias=b),
        [*(x.double() for x in inputs), *wide.unbind()],
        [u.to(dtype) for u in upstream],
    )
    for mine, truth in zip(got, want, strict=True):
        tolerance = TOLERANCE[dtype] * max(1.0, float(truth.abs().max()) if truth.numel() else 1.0)
        torch.testing.assert_close(mine.double(), truth, rtol=TOLERANCE[dtype], atol=tolerance)


def check_activations(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> None:
    for kind in KINDS:
        check("bias_activation", [shape, shape[-1:]], dtype, device, kind=kind)
        check("bias_activation", [shape], dtype, device, kind=kind)


HEADS = [(1, 1, 1, 1, 2, 2), (2, 5, 4, 2, 12, 12), (1, 3, 6, 1, 17, 10), (1, 0, 2, 2, 4, 4)]  # B, L, Hq, Hk, D, R


def check_ropes(heads: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> None:
    batch, length, hq, hk, dim, turned = heads
    shapes = [(batch, hq, length, dim), (batch, hk, length, dim)]
    for own in {1, batch}:
        check("rope", shapes, dtype, device, angles=torch.randn(2, own, length, turned).to(dtype).unbind())
    half = turned // 2
    sections = (half - half // 2, half // 2, 0)
    angles = torch.randn(2, 3, batch, length, turned).unbind()
    check("rope", shapes, dtype, device, angles=angles, sections=sections)
    check("qkv_rope", [(length, 3, hq, dim)], dtype, device, angles=torch.randn(2, length, turned).unbind())


@pytest.fixture
def near(path: str) -> str:
    """The path that a test runs on; the interpreter's is the operators'."""
    assert use_operator(torch.ones(1)) == (path == "triton")
    return path


@pytest.mark.parametrize(("shape", "dtype"), [*((shape, WIDE) for shape in ROWS), ((3, 7), NARROW)])
def test_norms_equal_float64(near: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_norms(shape, dtype)


@pytest.mark.parametrize(("shape", "dtype"), [((1, 520), WIDE), ((0, 4), WIDE), ((18, 5), NARROW)])
def test_gates_and_activations_equal_float64(near: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_gates(shape, dtype)
    check_activations(shape, dtype)


@pytest.mark.parametrize(("heads", "dtype"), [*((heads, WIDE) for heads in HEADS), (HEADS[2], NARROW)])
def test_ropes_equal_float64(near: str, heads: tuple[int, ...], dtype: torch.dtype) -> None:
    check_ropes(heads, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_far_out_activations_and_slopes_are_those_of_a_gate_open_or_shut(near: str, kind: str) -> None:
    far = 1e4 if near == "torch" else 1e30  # where torch's own slope of gelu_tanh is NaN
    x = torch.tensor([-far, -40.0, 0.0, 40.0, far], requires_grad=True)
    y = bias_activation(x, kind=kind)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(y, torch.tensor([0.0, 0.0, 0.0, 40.0, far]), atol=1e-15, rtol=1e-6)
    torch.testing.assert_close(slope, torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]), atol=1e-15, rtol=1e-6)


CALLS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "rms_norm": (rms_norm, [(3, 6), (6,)]),
    "residual_rms_norm": (residual_rms_norm, [(3, 6), (3, 6), (6,)]),
    "forked": (lambda x, w: residual_rms_norm(x, None, w), [(3, 6), (6,)]),
    "silu_mul": (silu_mul, [(3, 6), (3, 6)]),
    "biased": (lambda x, y, a, b: silu_mul(x, y, gate_bias=a, up_bias=b), [(3, 6), (3, 6), (6,), (6,)]),
    "gelu_mul": (gelu_mul, [(3, 6), (3, 6)]),
    "bias_activation": (lambda x, b: bias_activation(x, b, kind="quick_gelu"), [(3, 6), (6,)]),
    "rope": (lambda q, k: rope(q, k, *ANGLES), [(1, 2, 3, 6), (1, 1, 3, 6)]),
    "qkv_rope": (lambda x: qkv_rope(x, *(a[0] for a in ANGLES)), [(3, 3, 2, 6)]),
}
ANGLES = tuple(torch.randn(2, 1, 3, 4, generator=torch.Generator().manual_seed(0)).unbind())


def inputs_of(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype, device=device).requires_grad_() for shape in CALLS[name][1]]


@pytest.mark.parametrize("name", CALLS)
def test_gradients_in_float64_are_those_of_differences(name: str) -> None:
    torch.autograd.gradcheck(lambda *x: tuple(outputs_of(CALLS[name][0](*x))), inputs_of(name, torch.float64))


@pytest.mark.parametrize("name", ["forked", "biased", "bias_activation", "rope", "qkv_rope"])
def test_a_whole_graph_compiles_to_the_same_numbers(near: str, name: str) -> None:
    torch._dynamo.reset()
    call, inputs = CALLS[name][0], inputs_of(name)
    compiled = torch.compile(lambda *x: tuple(outputs_of(call(*x))), backend="aot_eager", fullgraph=True)
    upstream = [torch.randn_like(x) for x in outputs_of(call(*inputs))]
    want, got = outputs_and_gradients(call, inputs, upstream), outputs_and_gradients(compiled, inputs, upstream)
    torch.testing.assert_close(got, want)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", CALLS)
def test_only_gradients_that_are_asked_for_are_computed(name: str) -> None:
    """With the first input frozen the others' are the same, and a frozen weight costs no sums."""
    call, inputs = CALLS[name][0], inputs_of(name)
    whole = torch.autograd.grad(sum(x.square().sum() for x in outputs_of(call(*inputs))), inputs)
    for kept in range(len(inputs)):
        given = [x if i == kept else x.detach() for i, x in enumerate(inputs)]
        (one,) = torch.autograd.grad(sum(x.square().sum() for x in outputs_of(call(*given))), inputs[kept])
        torch.testing.assert_close(one, whole[kept])


@pytest.mark.interpreter
@pytest.mark.parametrize("name", [name for name in CALLS if name != "rope"])  # which is linear, and has them
def test_a_second_derivative_is_refused(name: str) -> None:
    inputs = inputs_of(name)
    out = sum(x.square().sum() for x in outputs_of(CALLS[name][0](*inputs)))
    (first,) = torch.autograd.grad(out, inputs[0], create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.square().sum() + inputs[0].sum(), inputs[0])


@pytest.mark.interpreter
def test_the_rotation_has_derivatives_of_every_order() -> None:
    q, k = inputs_of("rope")
    out = rope(q, k, *ANGLES)
    (first,) = torch.autograd.grad(out.q.pow(3).sum(), q, create_graph=True)
    twin = reference.rope_reference(q, k, *ANGLES)
    (want,) = torch.autograd.grad(twin.q.pow(3).sum(), q, create_graph=True)
    torch.testing.assert_close(
        torch.autograd.grad(first.square().sum(), q), torch.autograd.grad(want.square().sum(), q)
    )


@pytest.mark.interpreter
def test_heads_are_read_where_they_lie_and_written_token_by_token() -> None:
    joint = torch.randn(3, 3, 2, 8)
    q, k, v = (x.transpose(0, 1)[None] for x in joint.unbind(1))
    out = rope(q, k, *ANGLES)
    assert out.q.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(tuple(out), tuple(reference.rope_reference(q, k, *ANGLES)))
    split = qkv_rope(joint.requires_grad_(), *(a[0] for a in ANGLES))
    assert split.v.data_ptr() == joint[:, 2].data_ptr()
    torch.testing.assert_close(split.q, out.q[0].transpose(0, 1))
    torch.testing.assert_close(split.v, v[0].transpose(0, 1))


@pytest.mark.interpreter
def test_operators_pass_opcheck() -> None:
    ops, x, weight = torch.ops.fastrl, torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    torch.library.opcheck(ops.rms_norm.default, (x, weight, 1e-6))
    torch.library.opcheck(ops.residual_rms_norm.default, (x, x.detach(), weight, 1e-6))
    torch.library.opcheck(ops.rms_norm_backward.default, (x.detach(), None, x.detach(), weight.detach(), 1e-6, True))
    torch.library.opcheck(ops.gated_mul.default, (x, x.detach(), weight, weight.detach(), "silu"))
    torch.library.opcheck(ops.bias_activation.default, (x, weight, "gelu"))
    heads = torch.randn(1, 3, 2, 8, requires_grad=True)
    angles = [a[None] for a in ANGLES]
    torch.library.opcheck(ops.rope.default, (heads, heads.detach(), *angles, [], False))
    grads = [heads[0].detach() for _ in range(3)]
    torch.library.opcheck(ops.qkv_rope_backward.default, (*grads, *(a[0] for a in ANGLES)))


@pytest.mark.parametrize("name", [name for name in CALLS if "rope" not in name])
def test_meta_tensors_take_the_operators(name: str) -> None:
    inputs = inputs_of(name, torch.bfloat16, "meta")
    out = outputs_of(CALLS[name][0](*inputs))
    grads = torch.autograd.grad(out, inputs, [torch.empty_like(x) for x in out])
    assert [g.shape for g in grads] == [x.shape for x in inputs]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: rms_norm(x, x), r"weight: expected shape \[4\], got \[2, 4\]"),
        (lambda x: rms_norm(x[0, 0], x[0]), "x: expected at least one dimension"),
        (lambda x: residual_rms_norm(x, x.half(), x[0]), "x: expected dtype float32, got float16"),
        (lambda x: residual_rms_norm(x.long(), x, x[0]), "residual: expected dtype"),
        (lambda x: silu_mul(x, x[0]), r"up: expected shape \[2, 4\]"),
        (lambda x: silu_mul(x, x, gate_bias=x[0]), "gate_bias, up_bias: expected both or neither"),
        (lambda x: gelu_mul(x, x, gate_bias=x[0], up_bias=x), r"up_bias: expected shape \[4\]"),
        (lambda x: gelu_mul(x, x, approximate="erf"), "approximate: expected none or tanh, got 'erf'"),
        (lambda x: bias_activation(x, kind="relu"), "kind: expected one of silu, gelu, gelu_tanh, quick_gelu"),
        (lambda x: bias_activation(x, x[0].to("meta")), "tensors on different devices"),
        (lambda x: rope(x[None, None], x[None, None], x, x), r"cos: expected shape \[any, 2, any\], got \[2, 4\]"),
        (lambda x: rope(x[None, None], x[None, None], x[None, :, :3], x[None, :, :3]), "cos: expected an even number"),
        (lambda x: rope(x[None, None], x[None], x[None], x[None]), "k: expected shape"),
        (
            lambda x: rope(x[None, None], x[None, None], *[x.expand(3, 1, 2, 4)] * 2, sections=(1, 1, 1)),
            r"sections: expected three numbers of sum 2, got \[1, 1, 1\]",
        ),
        (lambda x: qkv_rope(x[None, None], x, x), r"qkv: expected shape \[any, 3, any, any\]"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call(torch.ones(2, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gpu_equals_float64(dtype: torch.dtype) -> None:
    for shape in (*ROWS, (300, 2048), (40, 8192)):
        check_norms(shape, dtype, "cuda")
    for shape in ((3, 7), (300, 3420), (0, 4)):
        check_gates(shape, dtype, "cuda")
        check_activations(shape, dtype, "cuda")
    for heads in (*HEADS, (1, 300, 16, 2, 128, 128), (1, 300, 16, 16, 80, 80)):
        check_ropes(heads, dtype, "cuda")


@pytest.mark.gpu
def test_gpu_gives_the_same_bits_twice_and_never_waits() -> None:
    x, weight = torch.randn(3000, 1280, device="cuda", requires_grad=True), torch.ones(1280, device="cuda")
    weight.requires_grad_()

    def run() -> tuple[Tensor, ...]:
        total, normed = residual_rms_norm(x, x, weight)
        out = bias_activation(silu_mul(total, normed), weight)
        return torch.autograd.grad(out, [x, weight], torch.ones_like(out))

    first = run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
