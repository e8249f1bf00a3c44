"""Cross-entropy with class weights, smoothing and z-loss against torch's own in float64, values and gradients."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastrl_kernels import cross_entropy, linear_cross_entropy
from fastrl_kernels.reference import cross_entropy_reference, linear_cross_entropy_reference

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
OPTIONS = [
    {"label_smoothing": smoothing, "z_loss": z, "reduction": reduction, "weighted": weighted}
    for smoothing, z, reduction, weighted in product((0.0, 0.1), (0.0, 1e-2), ("mean", "sum", "none"), (False, True))
]


def relative(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm().clamp(min=1e-30))


def case(n: int, v: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(n + v)
    logits, target, weight = torch.randn(n, v) * 3, torch.randint(v, (n,)), torch.rand(v)
    target[n // 2] = -100
    weight[0] = 0
    return logits.to(dtype).requires_grad_(), target, weight


def compare(ours: Any, twin: Any, leaves: list[Tensor], dtype: torch.dtype) -> None:
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    got, want = ours(*leaves), twin(*doubles)
    up = torch.linspace(-1, 2, max(got.numel(), 1)).view(got.shape)
    assert relative(got, want) < max(TOLERANCE[dtype] if dtype == torch.float64 else 3e-6, 0)
    pairs = zip(
        torch.autograd.grad((got * up.to(got.dtype)).sum(), leaves),
        torch.autograd.grad((want * up.double()).sum(), doubles),
        strict=True,
    )
    for mine, truth in pairs:
        assert mine.dtype == dtype
        assert relative(mine, truth) < TOLERANCE[dtype]


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_logits_as_torch(options: dict[str, Any], dtype: torch.dtype) -> None:
    logits, target, weight = case(7, 300, dtype)
    chosen = dict(options)
    given = weight if chosen.pop("weighted") else None
    z, plain = chosen.pop("z_loss"), dict(chosen)

    def torchs(x: Tensor) -> Tensor:
        loss = F.cross_entropy(x, target, None if given is None else given.double(), **plain)
        square = z * torch.where(target == -100, 0, x.logsumexp(1)).square()
        reduction = plain["reduction"]
        return loss + (square if reduction == "none" else square.sum() / (6 if reduction == "mean" else 1))

    compare(lambda x: cross_entropy(x, target, given, z_loss=z, **plain), torchs, [logits], dtype)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("width", [1, 2, 255, 257, 1031, 4096 + 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_odd_widths_and_half_precision(width: int, dtype: torch.dtype) -> None:
    logits, target, weight = case(5, width, dtype)
    options = {"label_smoothing": 0.2, "z_loss": 1e-3, "temperature": 0.7, "reduction": "sum"}
    weight[:1] = 0.5
    compare(
        lambda x: cross_entropy(x, target, weight, **options),
        lambda x: cross_entropy_reference(x, target, weight.double(), **options),
        [logits],
        dtype,
    )


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("budget", [1 << 30, 40_000])
@pytest.mark.parametrize("feature", ["plain", "softcap", "bias", "lora", "rows"])
def test_heads(feature: str, budget: int) -> None:
    torch.manual_seed(0)
    n, h, v = 11, 8, 700
    leaves = [torch.randn(n, h), torch.randn(v, h)]
    target, weight = torch.randint(v, (n,)), torch.rand(v)
    target[3] = -100
    named: dict[str, Any] = {"softcap": {"softcap": 4.0}, "rows": {"rows": torch.tensor([0, 3, 7])}}.get(feature, {})
    leaves += {"bias": [torch.randn(v)], "lora": [torch.randn(2, h), torch.randn(v, 2)]}.get(feature, [])
    leaves = [leaf.requires_grad_() for leaf in leaves]
    options = {"label_smoothing": 0.1, "z_loss": 1e-3, "temperature": 1.3, **named}

    def run(function: Any, weight: Tensor, tensors: tuple[Tensor, ...], **more: Any) -> Tensor:
        hidden, head, *rest = tensors
        given = {"bias": rest[0]} if feature == "bias" else {"lora": (*rest, 0.5)} if feature == "lora" else {}
        return function(hidden, head, target, weight, **given, **options, **more)

    compare(
        lambda *x: run(linear_cross_entropy, weight, x, scratch_bytes=budget),
        lambda *x: run(linear_cross_entropy_reference, weight.double(), x),
        leaves,
        torch.float32,
    )


def test_a_large_offset_of_the_logits_keeps_the_smoothed_loss() -> None:
    """z - log sum exp is formed from the maximum: 3e4 on every logit leaves only what float32 rounds of the logits."""
    logits, target = (torch.randint(-400, 400, (4, 600)) / 64).float(), torch.randint(600, (4,))
    exact = F.cross_entropy(logits.double(), target, label_smoothing=0.3)
    moved = cross_entropy(logits + 2.0**15, target, label_smoothing=0.3)
    assert relative(moved, exact) < 1e-6


@pytest.mark.usefixtures("path")
def test_ignored_rows_may_hold_nan_and_all_ignored_is_torchs_nan() -> None:
    logits, target, weight = case(6, 70, torch.float32)
    with torch.no_grad():
        logits[3] = torch.nan
    for reduction in ("mean", "none"):
        out = cross_entropy(logits, target, weight, label_smoothing=0.1, z_loss=1e-3, reduction=reduction)
        assert bool(out.isfinite().all())
        (grad,) = torch.autograd.grad(out.sum(), logits)
        assert bool(grad.isfinite().all())
        assert not grad[3].any()
    none = torch.full((6,), -100)
    assert cross_entropy(logits, none).isnan()
    assert F.cross_entropy(logits, none).isnan()
    assert cross_entropy(logits, none, reduction="sum", z_loss=0.1) == 0
    assert cross_entropy(logits[:0], none[:0], reduction="none").shape == (0,)
    assert cross_entropy(logits.nan_to_num(), none % 70, ignore_index=40, label_smoothing=0.1).isnan()  # id 40 it is


def test_padded_rows_and_int32_targets() -> None:
    logits, target, weight = case(6, 70, torch.float32)
    padded, ids = logits.detach().view(2, 3, 70).requires_grad_(), target.view(2, 3).int()
    for reduction in ("mean", "none"):
        options = {"label_smoothing": 0.1, "reduction": reduction}
        got, want = cross_entropy(padded, ids, weight, **options), cross_entropy(logits, target, weight, **options)
        torch.testing.assert_close(got, want.view(got.shape))
    hidden, head = torch.randn(2, 3, 5), torch.randn(70, 5)
    got = linear_cross_entropy(hidden, head, ids, weight, z_loss=0.1, reduction="none")
    torch.testing.assert_close(got, cross_entropy(hidden @ head.T, ids, weight, z_loss=0.1, reduction="none"))
    assert got.shape == (2, 3)


def test_a_forbidden_class_is_infinite_only_where_it_is_smoothed() -> None:
    logits, target = torch.randn(2, 9), torch.tensor([0, 1])
    logits[0, 4] = -torch.inf
    assert cross_entropy(logits, target, label_smoothing=0.1, reduction="none").isinf().tolist() == [True, False]
    torch.testing.assert_close(cross_entropy(logits, target), F.cross_entropy(logits, target))


def test_inplace_backward_writes_over_the_logits() -> None:
    logits, target, weight = case(4, 30, torch.float32)
    middle = (logits.detach().clone().requires_grad_() * 1).requires_grad_()
    options = {"label_smoothing": 0.1, "z_loss": 0.01}
    (want,) = torch.autograd.grad(cross_entropy(logits, target, weight, **options), logits)
    (got,) = torch.autograd.grad(cross_entropy(middle, target, weight, inplace_backward=True, **options), middle)
    assert got.data_ptr() == middle.data_ptr()
    torch.testing.assert_close(got, want)


def test_compiles_without_graph_break_and_opchecks() -> None:
    logits, target, weight = case(5, 31, torch.float32)

    def step(x: Tensor) -> Tensor:
        return cross_entropy(x * 1.5, target, weight, label_smoothing=0.1, z_loss=0.01)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(logits), logits), torch.autograd.grad(step(logits), logits))
    tokens, head = torch.ops.fastrl.token_logprob, torch.ops.fastrl.linear_logprob
    torch.library.opcheck(tokens.default, (logits, target, None, 1.0, -100, False, weight, True))
    v = torch.randn(5)
    rest = (target, None, 1.0, -100, v, None, v, v, None, v, v, weight)
    torch.library.opcheck(torch.ops.fastrl.token_logprob_backward.default, (logits.detach(), *rest))
    hidden, matrix = torch.randn(5, 4, requires_grad=True), torch.randn(31, 4, requires_grad=True)
    none = (None,) * 5
    torch.library.opcheck(
        head.default, (hidden, matrix, target, *none, 1.0, 1.0, None, -100, False, False, 1 << 20, weight, True)
    )
    torch.library.opcheck(
        torch.ops.fastrl.linear_logprob_backward.default,
        (v, None, hidden.detach(), matrix.detach(), target, *none, v, None, v, 1.0, 1.0, None, -100, False, 1 << 20,
         [True, True, False, False, False], v, v, weight),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing: expected a number in \[0, 1\], got 1.5"),
        ({"z_loss": -1.0}, ValueError, "z_loss: expected a finite number >= 0, got -1.0"),
        ({"reduction": "avg"}, ValueError, "reduction: expected one of mean, sum, none, got 'avg'"),
        ({"weight": torch.ones(4)}, ValueError, r"weight: expected shape \[9\], got \[4\]"),
        ({"weight": torch.ones(9).long()}, TypeError, "weight: expected dtype float32, .* got int64"),
        ({"target": torch.ones(3, 9)}, ValueError, r"target: expected class ids, got probabilities"),
        ({"target": torch.zeros(3, 2).long()}, ValueError, r"target: expected one id a row, got shape \[3, 2\]"),
        ({"target": torch.tensor([0, 9, 0])}, ValueError, "target: row 1 is 9, expected 0..8 or ignore_index -100"),
    ],
)
def test_bad_input_is_named(change: dict, error: type[Exception], message: str) -> None:
    named = {"target": torch.zeros(3).long()} | change
    with pytest.raises(error, match=message):
        cross_entropy(torch.zeros(3, 9), **named)
    with pytest.raises(error, match=message):
        linear_cross_entropy(torch.zeros(3, 2), torch.zeros(9, 2), **named)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_matches_float64(dtype: torch.dtype) -> None:
    logits, target, weight = case(300, 5003, dtype)
    options = {"label_smoothing": 0.1, "z_loss": 1e-3}
    leaf = logits.detach().cuda().requires_grad_()
    compare(
        lambda x: cross_entropy(x, target.cuda(), weight.cuda(), **options).cpu(),
        lambda x: cross_entropy_reference(x, target.cuda(), weight.cuda().double(), **options).cpu(),
        [leaf],
        dtype,
    )
