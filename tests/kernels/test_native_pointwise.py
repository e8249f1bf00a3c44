"""What lies between a layer's products in C++: against float64 and the eager twins it replaces, at every edge."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastrl_kernels import (
    _native,
    bias_activation,
    gated,
    gelu_mul,
    qkv_rope,
    reference,
    residual_rms_norm,
    rms_norm,
    rope,
    silu_mul,
)
from fastrl_kernels._activations import KINDS
from fastrl_kernels._common import interpreting
from fastrl_kernels.decode_layer import add_rms_norm, rope_append
from tests.helpers.gradients import outputs_and_gradients, outputs_of, same_bits_with_threads

NAMES = ("gated", "gated_backward", "norm", "norm_backward", "rope", "rope_append")
pytestmark = [
    pytest.mark.skipif(any(_native.lacks(f"fastrl_{name}") for name in NAMES), reason="the extension lacks these"),
    pytest.mark.skipif(interpreting(), reason="the interpreter runs the Triton kernels"),
]


@pytest.fixture(autouse=True)
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the C++ functions that were called; C++ takes few numbers, too."""
    names: list[str] = []
    call = _native._call
    monkeypatch.setattr(_native, "_call", lambda name, *rest: (names.append(name), call(name, *rest))[1])
    monkeypatch.setattr(gated, "_NATIVE_FROM", {})
    return names


Call = tuple[Callable[..., Any], Callable[..., Any], list[tuple[int, ...]]]


def _biased(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, y, a, b: function(x, y, gate_bias=a, up_bias=b)


def _calls(shape: tuple[int, ...]) -> dict[str, Call]:
    """Ours, the twin, and the shapes of what takes gradients."""
    row, twin = shape[-1:], reference
    calls: dict[str, Call] = {
        "rms_norm": (rms_norm, twin.rms_norm_reference, [shape, row]),
        "residual_rms_norm": (residual_rms_norm, twin.residual_rms_norm_reference, [shape, shape, row]),
        "stream": (lambda x, w: residual_rms_norm(x, None, w), twin.rms_norm_reference, [shape, row]),
        "silu_mul": (silu_mul, twin.silu_mul_reference, [shape, shape]),
        "silu_mul, biases": (_biased(silu_mul), _biased(twin.silu_mul_reference), [shape, shape, row, row]),
        "gelu_mul": (gelu_mul, twin.gelu_mul_reference, [shape, shape]),
        "gelu_mul, tanh": (
            partial(gelu_mul, approximate="tanh"), partial(twin.gelu_mul_reference, approximate="tanh"), [shape, shape]
        ),
    }  # fmt: skip
    calls["stream"] = (calls["stream"][0], lambda x, w: (x * 1, twin.rms_norm_reference(x, w)), [shape, row])
    for kind in KINDS:
        both = [partial(f, kind=kind) for f in (bias_activation, twin.bias_activation_reference)]
        calls[f"{kind}, bias"] = (*both, [shape, row])  # type: ignore[assignment]
    both = [partial(f, kind="quick_gelu") for f in (bias_activation, twin.bias_activation_reference)]
    calls["quick_gelu"] = (*both, [shape])  # type: ignore[assignment]
    return calls


NAMED = list(_calls((1, 1)))
SHAPES = [(1, 1), (3, 15), (70, 129), (2, 3, 1030), (0, 8), (5, 0), (300, 257)]


def _near(got: list[Tensor], want: list[Tensor], tolerance: float = 2e-6) -> None:
    for mine, truth in zip(got, want, strict=True):
        assert mine.shape == truth.shape
        scale = max(1.0, float(truth.abs().max())) if truth.numel() else 1.0
        torch.testing.assert_close(mine.double(), truth.double(), rtol=0, atol=tolerance * scale)


def _against_float64(ours: Callable[..., Any], twin: Callable[..., Any], inputs: list[Tensor]) -> None:
    upstream = [torch.randn(x.shape) for x in outputs_of(twin(*inputs))]
    want = outputs_and_gradients(twin, [x.double() for x in inputs], upstream)
    _near(outputs_and_gradients(ours, inputs, upstream), want)
    with torch.no_grad():
        _near(outputs_of(ours(*inputs)), want[: len(upstream)])


@pytest.mark.parametrize("name", NAMED)
def test_equals_float64(called: list[str], name: str) -> None:
    for shape in SHAPES:
        ours, twin, shapes = _calls(shape)[name]
        _against_float64(ours, twin, [1.5 * torch.randn(size) for size in shapes])
    family = "norm" if "norm" in name or name == "stream" else "gated"
    assert called == [f"fastrl_{family}", f"fastrl_{family}_backward", f"fastrl_{family}"] * len(SHAPES)


@pytest.mark.parametrize("name", NAMED)
def test_without_the_extension_torch_computes_the_same(
    called: list[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    ours, twin, shapes = _calls((9, 40))[name]
    inputs = [torch.randn(size) for size in shapes]
    upstream = [torch.randn(x.shape) for x in outputs_of(twin(*inputs))]
    native = outputs_and_gradients(ours, inputs, upstream)
    assert len(called) == 2
    monkeypatch.setattr(_native, "lacks", lambda name: "left out")
    _near(native, outputs_and_gradients(ours, inputs, upstream))
    assert len(called) == 2


@pytest.mark.parametrize("name", NAMED)
def test_any_strides_are_read(called: list[str], name: str) -> None:
    ours, twin, shapes = _calls((33, 20))[name]
    inputs = [torch.randn(*reversed(size), 2)[..., 0].permute(*reversed(range(len(size)))) for size in shapes]
    want = outputs_and_gradients(twin, [x.double() for x in inputs], _ones(twin, inputs))
    _near(outputs_and_gradients(ours, inputs, _ones(twin, inputs)), want)
    assert len(called) == 2


def _ones(twin: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    """Gradients of a sum: of strides of 0."""
    return [torch.ones(()).expand(x.shape) for x in outputs_of(twin(*inputs))]


@pytest.mark.parametrize("name", ["residual_rms_norm", "silu_mul, biases", "gelu, bias"])
def test_frozen_inputs_get_no_gradient(name: str) -> None:
    ours, _, shapes = _calls((6, 10))[name]
    inputs = [torch.randn(size, requires_grad=True) for size in shapes]
    whole = torch.autograd.grad(sum(x.square().sum() for x in outputs_of(ours(*inputs))), inputs)
    for kept in range(len(inputs)):
        given = [x if i == kept else x.detach() for i, x in enumerate(inputs)]
        (one,) = torch.autograd.grad(sum(x.square().sum() for x in outputs_of(ours(*given))), inputs[kept])
        assert torch.equal(one, whole[kept])


@pytest.mark.parametrize("used", [0, 1])
def test_the_sum_and_the_norm_may_be_used_alone(used: int) -> None:
    ours, twin, shapes = _calls((6, 10))["residual_rms_norm"]
    inputs = [torch.randn(size, requires_grad=True) for size in shapes]
    got = torch.autograd.grad(ours(*inputs)[used].square().sum(), inputs, allow_unused=True)
    want = torch.autograd.grad(twin(*inputs)[used].square().sum(), inputs, allow_unused=True)
    for mine, truth in zip(got, want, strict=True):
        assert (mine is None) == (truth is None)
        if mine is not None and truth is not None:
            _near([mine], [truth])


@pytest.mark.parametrize("name", [*NAMED, "rope", "qkv_rope"])
def test_second_derivatives_and_many_gradients_at_once_are_the_twins(name: str) -> None:
    ours, twin, shapes = {**_calls((4, 6)), **_turns(1, 3, 2, 1, 6, 4)}[name]
    inputs = [torch.randn(size, requires_grad=True) for size in shapes]
    found = []
    for function in (ours, twin):
        firsts = torch.autograd.grad(
            sum(x.pow(3).sum() for x in outputs_of(function(*inputs))), inputs, create_graph=True
        )
        found.append(torch.autograd.grad(sum(x.square().sum() for x in firsts), inputs))
    _near(list(found[0]), list(found[1]), 1e-5)
    outs = [outputs_of(function(*inputs)) for function in (ours, twin)]
    upstream = [torch.randn(3, *x.shape) for x in outs[0]]
    many = [torch.autograd.grad(out, inputs, upstream, is_grads_batched=True) for out in outs]
    _near(list(many[0]), list(many[1]), 1e-5)


def test_what_watches_or_replaces_operators_is_not_left_out(called: list[str]) -> None:
    x, weight = torch.randn(4, 6), torch.randn(6)
    with FlopCounterMode(display=False):
        rms_norm(x, weight)
    torch.vmap(rms_norm, in_dims=(0, None))(x, weight)
    torch.func.grad(lambda y: rms_norm(y, weight).sum())(x)
    torch.jit.trace(silu_mul, (x, x), check_trace=False)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        rms_norm(x.to(dtype), weight.to(dtype))
        bias_activation(x.to(dtype), weight.to(dtype))
    with pytest.raises(NotImplementedError), torch.autograd.forward_ad.dual_level():
        rms_norm(torch.autograd.forward_ad.make_dual(x, x), weight)
    assert not called


@pytest.mark.parametrize("kind", KINDS)
def test_far_out_gates_are_open_or_shut(kind: str) -> None:
    x = torch.tensor([-1e30, -100.0, -20.0, 0.0, 20.0, 100.0, 1e30, torch.nan], requires_grad=True)
    y = bias_activation(x, torch.zeros(8), kind=kind)
    (slope,) = torch.autograd.grad(y.sum(), x)
    want = torch.tensor([0.0, 0.0, 0.0, 0.0, 20.0, 100.0, 1e30, torch.nan])
    torch.testing.assert_close(y, want, atol=1e-7, rtol=1e-6, equal_nan=True)
    torch.testing.assert_close(slope[[0, 1, 3, 5, 6]], torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]), atol=1e-7, rtol=1e-6)
    assert slope[-1].isnan()


def test_small_gates_keep_their_digits() -> None:
    x = torch.linspace(-9, 9, 20001)
    for kind, tolerance in (("gelu", 5e-6), ("gelu_tanh", 2e-5), ("silu", 5e-6), ("quick_gelu", 5e-6)):
        truth = reference.bias_activation_reference(x.double(), kind=kind)
        got = bias_activation(x, torch.zeros(len(x)), kind=kind)
        error = ((got.double() - truth) / truth.abs().clamp_min(1e-30))[x.abs() < 4]
        assert float(error.abs().max()) < tolerance, kind
        _near([got], [truth], 2e-7)


# Rotary embeddings


def _turns(batch: int, length: int, heads: int, kv_heads: int, dim: int, width: int, own: int = 1) -> dict[str, Call]:
    angles = torch.randn(2, own, length, width)
    axes = torch.randn(2, 3, own, length, width)
    half = width // 2
    sections = (half - half // 2, half // 2, 0)
    shapes = [(batch, heads, length, dim), (batch, kv_heads, length, dim)]

    def both(function: Callable[..., Any], twin: Callable[..., Any], given: Tensor, **more: Any) -> tuple[Any, Any]:
        def call(f: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *x: f(*x, *given.to(x[0].dtype).unbind(), **more)

        return call(function), call(twin)

    return {
        "rope": (*both(rope, reference.rope_reference, angles), shapes),
        "rope, three axes": (*both(rope, reference.rope_reference, axes, sections=sections), shapes),
        "qkv_rope": (*both(qkv_rope, reference.qkv_rope_reference, angles[:, 0]), [(length, 3, heads, dim)]),
    }


HEADS = [(1, 1, 1, 1, 2, 2), (2, 5, 4, 2, 12, 12), (3, 7, 6, 1, 17, 10), (1, 0, 2, 2, 4, 4), (2, 300, 4, 2, 80, 40)]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", ["rope", "rope, three axes", "qkv_rope"])
def test_rotations_equal_float64(called: list[str], heads: tuple[int, ...], name: str) -> None:
    for own in {1, heads[0]}:
        ours, twin, shapes = _turns(*heads, own=own)[name]
        _against_float64(ours, twin, [torch.randn(size) for size in shapes])
        _against_float64(ours, twin, [torch.randn(*reversed(s), 2)[..., 0].permute(3, 2, 1, 0) for s in shapes])
    assert set(called) == {"fastrl_rope"}


def test_rotations_read_heads_in_place_and_write_token_by_token() -> None:
    joint, angles = torch.randn(3, 3, 2, 8), torch.randn(2, 3, 4)
    q, k, _ = (x.transpose(0, 1)[None] for x in joint.unbind(1))
    out = rope(q, k, *(a[None] for a in angles))
    assert out.q.transpose(1, 2).is_contiguous()
    split = qkv_rope(joint.requires_grad_(), *angles)
    assert split.v.data_ptr() == joint[:, 2].data_ptr()
    assert torch.equal(split.q, out.q[0].transpose(0, 1))


def test_angles_that_take_a_gradient_stay_with_torch(called: list[str]) -> None:
    cos = torch.randn(1, 3, 4, requires_grad=True)
    rope(torch.randn(1, 2, 3, 4), torch.randn(1, 1, 3, 4), cos, torch.randn(1, 3, 4)).q.sum().backward()
    assert cos.grad is not None
    assert not called


# Decoding


@pytest.mark.parametrize(("rows", "hidden"), [(1, 1), (5, 30), (0, 4), (200, 300)])
def test_the_decoding_norm_equals_its_twin(called: list[str], rows: int, hidden: int) -> None:
    stream, x, weight = torch.randn(rows, hidden), torch.randn(rows, hidden), torch.randn(hidden)
    mine, theirs = stream.clone(), stream.double()
    version = mine._version
    got = add_rms_norm(mine, x, weight, 1e-6)
    want = reference.add_rms_norm_reference(theirs, x.double(), weight.double(), 1e-6)
    _near([mine, got], [theirs, want])
    assert mine._version > version
    before = mine.clone()
    _near([add_rms_norm(mine, None, weight, 1e-6)], [want])
    assert torch.equal(mine, before)
    assert called == ["fastrl_norm"] * 2


@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "dim"), [(1, 1, 1, 2), (5, 6, 2, 12), (0, 2, 1, 4), (90, 8, 4, 64)]
)
def test_appending_equals_its_twin(called: list[str], rows: int, heads: int, kv_heads: int, dim: int) -> None:
    q, k, v = (torch.randn(rows, h, dim) for h in (heads, kv_heads, kv_heads))
    cos, sin = torch.randn(2, rows, dim // 2).unbind()
    whole = torch.randn(2, rows, 9, kv_heads, dim)
    mine, theirs = ([x.transpose(1, 2) for x in y.unbind()] for y in (whole.clone(), whole.double()))
    at = torch.tensor([3])
    got = rope_append(q, k, v, cos, sin, *mine, at)
    want = reference.rope_append_reference(*(x.double() for x in (q, k, v, cos, sin)), *theirs, at)
    _near([got, *mine], [want, *theirs])
    assert called == ["fastrl_rope_append"]
    if rows:
        with pytest.raises(ValueError, match="slot 9 is outside a cache of 9"):
            rope_append(q, k, v, cos, sin, *mine, torch.tensor([9]))


@pytest.mark.parametrize(
    "name", ["residual_rms_norm", "silu_mul, biases", "gelu, bias", "rope, three axes", "qkv_rope"]
)
def test_thread_count_changes_nothing(name: str) -> None:
    ours, _, shapes = {**_calls((300, 700)), **_turns(2, 200, 8, 2, 64, 64)}[name]
    inputs = [torch.randn(size) for size in shapes]
    upstream = [torch.randn(x.shape) for x in outputs_of(ours(*inputs))]
    assert same_bits_with_threads((1, 2, 5, 2), lambda: outputs_and_gradients(ours, inputs, upstream))
