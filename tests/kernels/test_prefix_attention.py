"""Prefix-shared attention: both paths and their gradients against a softmax over the visible rows, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastrl_kernels import prefix_attention
from fastrl_kernels._gather_rows import Copies, gather_pair, gather_rows, sum_copies_reference
from fastrl_kernels._prefix_layout import PrefixLayout, Span
from fastrl_kernels.prefix_attention import _layout, gathered_attention
from fastrl_kernels.reference import prefix_attention_reference
from tests.helpers.attention import copy_nothing, eager_varlen, truth

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

Groups = list[tuple[int, tuple[int, ...]]]
SHAPES: dict[str, Groups] = {
    "one group, one answer": [(13, (5,))],
    "a prompt longer than its answers": [(67, (3, 8, 1, 7, 7))],
    "answers longer than their prompt": [(3, (9, 2, 17))],
    "several groups": [(40, (2, 5)), (1, (1,)), (6, ()), (33, (0, 4, 0))],
    "no answers": [(7, ()), (1, ())],
}
HEADS = [(4, 4, 8), (6, 2, 20), (5, 1, 33)]  # Hq, Hk, D


@pytest.fixture(params=["copied", "merged", pytest.param("triton", marks=pytest.mark.interpreter)])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """On torch's path, whose answers copy their prompt's keys or not; and where Triton's interpreter runs."""
    if request.param == "merged":
        copy_nothing(monkeypatch)
    return request.param


@pytest.fixture(params=["copied", "merged"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "merged":
        copy_nothing(monkeypatch)
    return request.param


def told(groups: Groups) -> dict[str, Any]:
    """The lengths as the public function takes them."""
    return {
        "prompt_lengths": [prompt for prompt, _ in groups],
        "completion_lengths": [n for _, completions in groups for n in completions],
        "group_of_completion": [g for g, (_, completions) in enumerate(groups) for _ in completions],
    }


def visible(groups: Groups) -> Tensor:
    """[L, L] bool: may row i attend to row j? The rule of the layout, independent of the library's code."""
    rows = [
        (g, part)
        for g, (prompt, completions) in enumerate(groups)
        for part, n in enumerate((prompt, *completions))
        for _ in range(n)
    ]
    return torch.tensor(
        [[j <= i and a[0] == b[0] and b[1] in (0, a[1]) for j, b in enumerate(rows)] for i, a in enumerate(rows)]
    )


def row(groups: Groups, heads: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys, values and an upstream gradient."""
    hq, hk, d = heads
    length = sum(prompt + sum(completions) for prompt, completions in groups)
    return [torch.randn(length, h, d, dtype=torch.float64).to(dtype) for h in (hq, hk, hk, hq)]


def with_gradients(call: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, upstream: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = call(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def exact(groups: Groups, scale: float) -> Callable[..., Tensor]:
    def call(*inputs: Tensor) -> Tensor:
        q, k, v = (x.double().transpose(0, 1)[None] for x in inputs)
        return truth(q, k, v, visible(groups).to(q.device), scale)[0]

    return call


def assert_near(got: list[Tensor], want: list[Tensor], tolerance: float) -> None:
    for mine, other in zip(got, want, strict=True):
        scale = max(1.0, float(other.abs().max()))
        torch.testing.assert_close(mine.double(), other.double(), rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("groups", SHAPES.values(), ids=SHAPES.keys())
def test_outputs_and_gradients_follow_the_visibility_rule(
    path: str, groups: Groups, heads: tuple[int, int, int], dtype: torch.dtype
) -> None:
    inputs = row(groups, heads, dtype)
    want = with_gradients(exact(groups, 0.3), *(x.double() for x in inputs))
    got = with_gradients(lambda *x: prefix_attention(*x, **told(groups), scale=0.3), *inputs)
    assert all(x.dtype == dtype for x in got)
    assert_near(got, want, TOLERANCE[dtype])
    twin = with_gradients(lambda *x: prefix_attention_reference(*x, **told(groups), scale=0.3), *inputs)
    assert_near(twin, want, TOLERANCE[dtype])


@given(
    st.lists(st.tuples(st.sampled_from([1, 2, 5, 40]), st.lists(st.integers(0, 6), max_size=4).map(tuple)), max_size=4),
    st.sampled_from(["copied", "merged", "gathered"]),
)
def test_any_row_follows_the_visibility_rule(groups: Groups, form: str) -> None:
    """Also with its keys gathered for a variable-length call."""
    torch.manual_seed(0)
    if not groups:
        return
    inputs = row(groups, (4, 2, 8), torch.float64)

    def call(*leaves: Tensor) -> Tensor:
        if form != "gathered":
            return prefix_attention(*leaves, **told(groups))
        prompts, completions, of = (tuple(numbers) for numbers in told(groups).values())
        tables = _layout(prompts, completions, of, torch.device("cpu")).varlen
        return gathered_attention(*leaves, tables, eager_varlen, scale=8**-0.5)

    with pytest.MonkeyPatch.context() as patch:
        if form == "merged":
            copy_nothing(patch)
        got = with_gradients(call, *inputs)
    assert_near(got, with_gradients(exact(groups, 8**-0.5), *inputs), 1e-10)


def test_the_gradients_are_those_of_differences(path: str) -> None:
    q, k, v, _ = (x.requires_grad_() for x in row([(9, (2, 1)), (2, (3,))], (2, 1, 3), torch.float64))
    named = told([(9, (2, 1)), (2, (3,))])
    torch.autograd.gradcheck(lambda *x: prefix_attention(*x, **named), (q, k, v))


def test_the_same_bits_twice(path: str) -> None:
    groups: Groups = [(50, (7, 3, 9, 2)), (20, (4, 4))]
    inputs = row(groups, (4, 2, 16), torch.float32)
    first, second = (
        with_gradients(lambda *x: prefix_attention(*x, **told(groups)), *inputs) for _ in range(2)
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_any_stride_is_taken_and_an_empty_row_is_one(path: str) -> None:
    groups: Groups = [(21, (4, 2))]
    inputs = row(groups, (4, 2, 8), torch.float32)
    want = with_gradients(exact(groups, 8**-0.5), *(x.double() for x in inputs))

    def strided(*x: Tensor) -> Tensor:
        joint = torch.cat([x.transpose(1, 2) for x in x], 2).transpose(1, 2)  # a head's numbers lie apart
        return prefix_attention(*joint.split([4, 2, 2], 1), **told(groups))

    assert_near(with_gradients(strided, *inputs), want, 1e-6)
    joint = torch.cat(inputs[:3], 1)  # of one projection: rows lie apart
    assert_near([prefix_attention(*joint.split([4, 2, 2], 1), **told(groups))], want[:1], 1e-6)
    nothing = torch.empty(0, 4, 8)
    assert prefix_attention(nothing, nothing, nothing, **told([])).shape == (0, 4, 8)


def test_lengths_may_be_tensors_and_layers_share_their_tables() -> None:
    groups: Groups = [(5, (2, 3)), (4, (1,))]
    q, k, v, _ = row(groups, (2, 1, 8), torch.float32)
    tensors: dict[str, Any] = {name: torch.tensor(numbers) for name, numbers in told(groups).items()}
    _layout.cache_clear()
    assert torch.equal(prefix_attention(q, k, v, **tensors), prefix_attention(q, k, v, **told(groups)))
    assert _layout.cache_info().misses == 1


def test_a_prompts_keys_are_not_copied_for_its_answers() -> None:
    """Elements of everything that is saved for the backward, with 32 and with 64 answers of a token."""

    def saved(answers: int) -> int:
        groups: Groups = [(400, (1,) * answers)]
        q, k, v, _ = (x.requires_grad_() for x in row(groups, (2, 2, 8), torch.float32))
        kept: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            prefix_attention(q, k, v, **told(groups))
        return sum(kept.values())

    assert saved(64) - saved(32) < 32 * 10 * 2 * 8  # tens of rows an answer, not 400


@pytest.mark.parametrize(("prompt", "calls"), [(1023, 2), (1024, 3)])
def test_copies_of_less_than_a_mebibyte_stay(prompt: int, calls: int) -> None:
    """Calls of attention: the prompt's, and the answers' one or two."""
    names: list[str] = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    groups: Groups = [(prompt, (2,) * 8)]
    q, k, v, _ = row(groups, (2, 2, 8), torch.float32)  # 8 answers x 16 numbers x 4 bytes, of keys and of values
    with Names():
        prefix_attention(q, k, v, **told(groups))
    assert sum("scaled_dot_product" in name for name in names) == calls


@pytest.mark.interpreter
def test_operators_pass_opcheck() -> None:
    ops, copies = torch.ops.fastrl, Copies.of(torch.tensor([1, 0, 1, 3, 1]), 4)
    a, b = torch.randn(4, 2, 3, requires_grad=True), torch.randn(4, 2, 3, requires_grad=True)
    for b_or_none in (b, None):
        torch.library.opcheck(ops.gather_rows.default, (a, b_or_none, *copies))
    grads = torch.randn(5, 2, 3), torch.randn(5, 2, 3)
    torch.library.opcheck(ops.sum_copies.default, (*grads, copies.places, copies.begins))
    torch.library.opcheck(ops.sum_copies.default, (grads[0], None, copies.places, copies.begins))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 600), (2, 0)])
def test_gathered_rows_and_the_sums_of_their_gradients(path: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Rows that are gathered many times, once and never; a joint tensor, whose rows lie apart; alone and in pairs."""
    index = torch.tensor([4, 0, 0, 2, 4, 4, 4, 0, 4])
    copies = Copies.of(index, 6)
    joint = torch.randn(6, 2, *shape).to(dtype).requires_grad_()
    a, b = joint.unbind(1)
    for pair in (True, False):
        out = gather_pair(a, b, copies) if pair else [gather_rows(a, copies)]
        assert all(torch.equal(x, y[index]) for x, y in zip(out, (a, b), strict=False))
        upstream = [torch.randn(x.shape).to(dtype) for x in out]
        (got,) = torch.autograd.grad(out, joint, upstream)
        want = torch.zeros(joint.shape, dtype=torch.float64)
        for n, grad in enumerate(upstream):
            want[:, n].index_add_(0, index, grad.double())
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=TOLERANCE[dtype], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gathered_gradients_are_summed_in_fp32(path: str, dtype: torch.dtype) -> None:
    """300 copies with a gradient of 1: a running sum in bf16 would stop at 256."""
    copies = Copies.of(torch.cat([torch.zeros(300, dtype=torch.int64), torch.arange(1, 300)]), 300)
    rows = torch.zeros(300, 1, 1, dtype=dtype, requires_grad=True)
    gather_rows(rows, copies).sum().backward()
    assert rows.grad is not None
    assert rows.grad[0].item() == 300
    assert rows.grad[1:].eq(1).all()
    assert sum_copies_reference(torch.ones(599, 1, dtype=dtype), copies.places, copies.begins)[0].item() == 300


def test_tables_name_every_place_once() -> None:
    copies = PrefixLayout((Span(0, 3, (2, 0, 1)), Span(6, 1, ()))).varlen.keys
    assert copies.places.sort().values.tolist() == list(range(len(copies.index)))
    owners = torch.repeat_interleave(copies.begins.diff())
    assert torch.equal(copies.index[copies.places], owners)
    for first, last in zip(copies.begins[:-1], copies.begins[1:], strict=True):
        assert bool((copies.places[first:last].diff() > 0).all())


@pytest.mark.parametrize("lengths", [[(30, (2, 3))], [(2, (4, 1)), (3, ())]])
def test_a_whole_graph_compiles_to_the_same_numbers(form: str, lengths: Groups) -> None:
    torch._dynamo.reset()
    inputs = row(lengths, (2, 1, 8), torch.float32)
    compiled = torch.compile(
        lambda q, k, v: prefix_attention(q, k, v, **told(lengths)), backend="aot_eager", fullgraph=True
    )
    want = with_gradients(lambda *x: prefix_attention(*x, **told(lengths)), *inputs)
    torch.testing.assert_close(with_gradients(compiled, *inputs), want)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_tensors_without_data_have_the_shapes_of_the_result(form: str, device: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, k = (torch.empty(26, h, 8, device=device, requires_grad=True) for h in (4, 2))
        out = prefix_attention(q, k, k, **told([(21, (2, 3))]))
        assert out.shape == q.shape
        assert [x.shape for x in torch.autograd.grad(out.sum(), [q, k])] == [q.shape, k.shape]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(5, 4)}, r"q: expected shape \[any, any, any\], got \[5, 4\]"),
        ({"q": torch.zeros(5, 4, 8, dtype=torch.int64)}, "q: expected dtype"),
        ({"k": torch.zeros(5, 3, 8), "v": torch.zeros(5, 3, 8)}, "k: expected a number of heads that divides 4, got 3"),
        ({"k": torch.zeros(5, 2, 8).half(), "v": torch.zeros(5, 2, 8).half()}, "k: expected dtype float32"),
        ({"v": torch.zeros(5, 4, 8)}, r"v: expected shape \[5, 2, 8\]"),
        ({"v": torch.zeros(5, 2, 8, device="meta")}, "tensors on different devices"),
        ({"prompt_lengths": [4]}, r"q: expected shape \[6, any, any\], got \[5, 4, 8\]"),
        ({"prompt_lengths": [0, 3]}, "prompt_lengths: expected numbers > 0"),
        ({"completion_lengths": [-1, 3]}, "completion_lengths: expected numbers >= 0"),
        ({"group_of_completion": [0]}, "group_of_completion: expected 2 ascending numbers below 1"),
        ({"group_of_completion": [0, 1]}, "group_of_completion: expected 2 ascending numbers below 1"),
        ({"prompt_lengths": [1, 2], "group_of_completion": [1, 0]}, "group_of_completion: expected 2 ascending"),
        ({"prompt_lengths": torch.zeros(1, device="meta")}, "prompt_lengths: expected on the CPU"),
        ({"prompt_lengths": torch.ones(1)}, "prompt_lengths: expected dtype int64, int32, got float32"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    q, k, v, _ = row([(3, (1, 1))], (4, 2, 8), torch.float32)
    given = {"q": q, "k": k, "v": v, **told([(3, (1, 1))]), **change}
    with pytest.raises((ValueError, TypeError), match=message):
        prefix_attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(4, 4, 64), (8, 2, 128), (6, 2, 80), (5, 1, 33)], ids=str)
@pytest.mark.parametrize("groups", SHAPES.values(), ids=SHAPES.keys())
def test_gpu_equals_float64(groups: Groups, heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    inputs = [x.cuda() for x in row(groups, heads, dtype)]
    want = with_gradients(exact(groups, 0.125), *(x.double() for x in inputs))
    got = with_gradients(lambda *x: prefix_attention(*x, **told(groups), scale=0.125), *inputs)
    assert_near(got, want, 3 * TOLERANCE[dtype])


@pytest.mark.gpu
def test_gpu_gathers_and_sums_the_same_bits_twice_without_waiting() -> None:
    copies = PrefixLayout((Span(0, 900, (64,) * 8),)).varlen.keys.to(torch.device("cuda"))
    a, b = (torch.randn(1412, 2, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    upstream = torch.randn(len(copies.index), 2, 128, device="cuda", dtype=torch.bfloat16)

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(gather_pair(a, b, copies), [a, b], [upstream, -upstream])

    first = run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert torch.equal(first[0], -first[1])
