"""linear_policy_loss: the same loss, metrics and gradients as the composition, with three matmuls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastrl_kernels import _linear_policy_composed
from fastrl_kernels._policy_options import PolicyOptions
from fastrl_kernels.linear_logprob import linear_logprob
from fastrl_kernels.linear_policy_loss import linear_policy_loss, linear_policy_loss_reference
from fastrl_kernels.policy_loss import policy_loss
from tests.helpers.planned import counted_peak

TOLERANCE = {torch.float64: (1e-12, 1e-12), torch.float32: (1e-5, 5e-6), torch.bfloat16: (1e-5, 6e-3)}
VARIANTS = [
    "on_policy",
    "ratio",
    "dual_clip",
    "k1",
    "k2",
    "k3",
    "sequence",
    "constant",
    "weight",
    "head",
    "cispo",
    "sapo",
]
BOUNDED = {"importance": "truncate", "importance_cap": 1.3}


FEW = {"scratch_bytes": 60_000}  # a few rows of these logits


def relative(got: Tensor, want: Tensor) -> float:
    want = want.detach().double()
    return float((got.detach().double() - want).norm() / want.norm().clamp(min=1e-30))


def case(n: int, h: int, v: int, c: int, dtype: torch.dtype, variant: str) -> tuple[list[Tensor], tuple, dict]:
    """(leaves, (target, advantage, completion), keyword arguments)"""
    hidden = torch.randn(n, h, dtype=torch.float64).to(dtype).requires_grad_()
    weight = (torch.randn(v, h, dtype=torch.float64) * h**-0.5).to(dtype).requires_grad_()
    target = torch.randint(v, (n,))
    target[3::7] = -100
    advantage = torch.randn(c)
    advantage[0] = 0
    completion = torch.randint(-1, c, (n,))
    kwargs: dict = {}
    if variant != "on_policy":
        near = linear_logprob(hidden.detach(), weight.detach(), target).logp
        kwargs["old_logp"] = near + torch.randn(n) * 0.4
        kwargs["ref_logp"] = near + torch.randn(n) * 0.4
    if variant in ("k1", "k2", "k3"):
        kwargs |= {"beta": 0.05, "kl": variant}
    kwargs |= {"dual_clip": {"dual_clip": 1.1}, "sequence": {"aggregate": "sequence"}}.get(variant, {})
    if variant == "constant":
        kwargs |= {"aggregate": "constant", "normalizer": 100.0, "clip_low": 0.1, "clip_high": 0.3}
    if variant in ("cispo", "sapo"):
        level = "sequence" if variant == "sapo" else "token"
        kwargs |= {"loss": variant, "sampler_logp": near + torch.randn(n) * 0.4, "importance_level": level} | BOUNDED
    if variant == "weight":
        kwargs["weight"] = torch.rand(n) * (torch.rand(n) > 0.3)
    leaves = [hidden, weight]
    if variant == "head":
        bias = torch.randn(v, dtype=torch.float64).to(dtype).requires_grad_()
        kwargs |= {
            "bias": bias,
            "softcap": 3.0,
            "temperature": torch.rand(n) + 0.5,
            "rows": torch.randperm(n)[: n // 2],
        }
        leaves.append(bias)
    return leaves, (target, advantage, completion), kwargs


def doubled(leaves: list[Tensor], rest: tuple, kwargs: dict) -> tuple[list[Tensor], tuple, dict]:
    twins = [leaf.detach().double().requires_grad_() for leaf in leaves]
    rest = tuple(t.double() if t.is_floating_point() else t for t in rest)
    swapped = {k: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for k, t in kwargs.items()}
    if "bias" in swapped:
        swapped["bias"] = twins[2]
    return twins, rest, swapped


@pytest.fixture(params=["composed", "fused"])
def schedule(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a CPU does where scratch holds few rows, or would do if it held enough of them."""
    if request.param == "fused":
        monkeypatch.setattr(_linear_policy_composed, "FEW_ROWS", 1)
    return request.param


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_metrics_and_gradients_match_float64(variant: str, dtype: torch.dtype) -> None:
    leaves, rest, kwargs = case(41, 16, 700, 5, dtype, variant)
    got = linear_policy_loss(leaves[0], leaves[1], *rest, scratch_bytes=250_000, **kwargs)
    twins, twin_rest, twin_kwargs = doubled(leaves, rest, kwargs)
    want = linear_policy_loss_reference(twins[0], twins[1], *twin_rest, **twin_kwargs)
    value, gradient = TOLERANCE[dtype]
    for mine, truth in zip(got, want, strict=True):
        atol = 1e-13 if dtype == torch.float64 else value if mine.ndim else 1e-6
        torch.testing.assert_close(mine.double(), truth, rtol=value, atol=atol)
    grads = torch.autograd.grad(got.loss * 0.37, leaves)
    truths = torch.autograd.grad(want.loss * 0.37, twins)
    for mine, truth, leaf in zip(grads, truths, leaves, strict=True):
        assert mine.dtype == leaf.dtype
        assert relative(mine, truth) <= gradient


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_as_the_composition(variant: str) -> None:
    leaves, (target, advantage, completion), kwargs = case(30, 8, 90, 4, torch.float32, variant)
    head = {key: kwargs.pop(key) for key in ("bias", "softcap", "temperature") if key in kwargs}
    rows = kwargs.pop("rows", None)
    fused = linear_policy_loss(*leaves[:2], target, advantage, completion, rows=rows, **head, **kwargs)
    if "weight" not in kwargs:  # as linear_policy_loss does by default: ignored rows count in no normaliser
        from fastrl_kernels.token_weights import token_weights

        counted = {key: kwargs.pop(key) for key in ("aggregate", "normalizer") if key in kwargs}
        counted.setdefault("aggregate", "token")
        kwargs["weight"] = token_weights(completion, mask=target != -100, **counted)
    if rows is not None:
        kwargs["weight"] = torch.zeros(30).index_copy_(0, rows, kwargs["weight"][rows])
    kwargs["weight"] = kwargs["weight"] * (target != -100)
    apart = policy_loss(linear_logprob(*leaves[:2], target, **head).logp, advantage, completion, **kwargs)
    torch.testing.assert_close(tuple(fused)[:-1], tuple(apart), rtol=1e-5, atol=1e-6)
    logp = linear_logprob(*leaves[:2], target, **head).logp
    expected = logp.detach().masked_fill((kwargs["weight"] == 0) | (completion < 0), torch.inf)
    torch.testing.assert_close(fused.logp, expected, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(
        torch.autograd.grad(fused.loss, leaves), torch.autograd.grad(apart.loss, leaves), strict=True
    ):
        assert relative(mine, theirs) < 5e-6


def test_three_matmuls_and_only_what_is_needed() -> None:
    leaves, rest, _ = case(20, 8, 300, 4, torch.float32, "on_policy")
    product = 2 * 20 * 8 * 300
    live = 2 * 8 * 300 * int(((rest[0] != -100) & (rest[2] >= 0)).sum())

    def flops(hidden: bool, weight: bool, **kwargs) -> int:
        leaves[0].requires_grad_(hidden)
        leaves[1].requires_grad_(weight)
        with FlopCounterMode(display=False) as counter:
            loss = linear_policy_loss(leaves[0], leaves[1], *rest, **kwargs).loss
            grads = torch.autograd.grad(
                loss, [leaf for leaf, wanted in zip(leaves, (hidden, weight), strict=True) if wanted]
            )
        assert all(bool(grad.any()) for grad in grads)
        return counter.get_total_flops()

    assert flops(True, True) == 3 * product
    assert flops(True, False) == 2 * product
    assert flops(True, True, rows=torch.arange(10)) == 3 * product // 2
    assert flops(True, True, **FEW) == product + 3 * live
    assert flops(True, False, **FEW) == product + 2 * live
    assert flops(True, False, **FEW, head_grad=torch.zeros(300, 8)) == 2 * product
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        linear_policy_loss(leaves[0], leaves[1], *rest)
    assert counter.get_total_flops() == product


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_gradient_goes_straight_into_the_given_buffer(dtype: torch.dtype) -> None:
    leaves, rest, kwargs = case(41, 16, 700, 5, dtype, "k3")
    before = torch.randn(700, 16)
    buffer = before.clone()
    loss = linear_policy_loss(
        *leaves, *rest, head_grad=buffer, grad_scale=0.25, scratch_bytes=250_000, **kwargs
    ).loss  # fmt: skip
    (loss * 0.25).backward()
    twins, twin_rest, twin_kwargs = doubled(leaves, rest, kwargs)
    (linear_policy_loss_reference(*twins, *twin_rest, **twin_kwargs).loss * 0.25).backward()
    assert leaves[1].grad is None
    assert relative(buffer - before, twins[1].grad) < 1e-4  # of a sum with `before`
    assert relative(leaves[0].grad, twins[0].grad) < TOLERANCE[dtype][1]


@pytest.mark.parametrize("scratch", [{}, FEW])
def test_poisoned_dead_rows_are_harmless(scratch: dict[str, int]) -> None:
    leaves, (target, advantage, completion), kwargs = case(30, 8, 90, 4, torch.float32, "k3")
    weight = torch.rand(30)
    weight[::3] = 0
    dead = (weight == 0) | (target == -100) | (completion < 0)
    with torch.no_grad():
        leaves[0][dead] = torch.nan
    for name in ("old_logp", "ref_logp"):
        kwargs[name] = kwargs[name].nan_to_num().masked_fill(dead, torch.nan)
    result = linear_policy_loss(*leaves, target, advantage, completion, weight=weight, **scratch, **kwargs)
    grads = torch.autograd.grad(result.loss, leaves)
    assert all(bool(x.isfinite().all()) for x in (*result[:-1], *grads))
    assert torch.equal(result.logp.isinf(), dead)
    assert not grads[0][dead].any()


def check_padding_is_harmless() -> None:
    """Rows without a completion may hold NaN, for any weight."""
    hidden, head = torch.randn(3, 4), torch.randn(5, 4, requires_grad=True)
    hidden[2] = torch.nan
    hidden.requires_grad_()
    completion, weight = torch.tensor([0, 0, -1]), torch.full((3,), 1 / 3)
    for function in (linear_policy_loss, linear_policy_loss_reference):
        out = function(hidden, head, torch.tensor([0, 1, 2]), torch.ones(1), completion, weight=weight)
        d_hidden, d_head = torch.autograd.grad(out.loss, (hidden, head))
        assert out.loss.isfinite()
        assert d_head.isfinite().all()
        assert d_hidden[2].tolist() == [0.0] * 4


def test_padding_is_harmless() -> None:
    check_padding_is_harmless()


@pytest.mark.interpreter
def test_padding_is_harmless_to_the_kernels() -> None:
    check_padding_is_harmless()


@pytest.mark.parametrize("head_dtype", [torch.float32, torch.bfloat16])
def test_autocast_is_that_of_linear_logprob(head_dtype: torch.dtype) -> None:
    hidden = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)
    head = torch.randn(5, 4, dtype=head_dtype, requires_grad=True)
    target, completion = torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1])
    advantage = torch.tensor([1.0, -1.0])
    with torch.autocast("cpu", torch.bfloat16):
        fused = linear_policy_loss(hidden, head, target, advantage, completion).loss
        apart = policy_loss(linear_logprob(hidden, head, target).logp, advantage, completion).loss
    torch.testing.assert_close(fused, apart)
    for got, want in zip(*(torch.autograd.grad(x, (hidden, head)) for x in (fused, apart)), strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dead", ["empty", "masked"])
def test_nothing_to_learn_gives_zero(dead: str) -> None:
    n = 0 if dead == "empty" else 6
    hidden, weight = torch.randn(n, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    target = torch.full((n,), -100)
    result = linear_policy_loss(hidden, weight, target, torch.ones(2), torch.zeros(n).long())
    grads = torch.autograd.grad(result.loss, [hidden, weight])
    assert all(not x.any() for x in (*result[:-1], *grads))
    assert result.logp.isinf().all()


@pytest.mark.usefixtures("schedule")
def test_same_bits_twice() -> None:
    leaves, rest, kwargs = case(50, 16, 500, 5, torch.float32, "head")
    runs = []
    for _ in range(2):
        result = linear_policy_loss(leaves[0], leaves[1], *rest, scratch_bytes=200_000, **kwargs)
        runs.append([*result[:-1], result.logp, *torch.autograd.grad(result.loss, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_little_scratch_holds_no_gradient_of_the_heads_size_until_the_backward(schedule: str) -> None:
    n, h, v, budget = 256, 64, 4096, 2 << 20
    hidden, weight = (torch.randn(x, h, requires_grad=True) for x in (n, v))
    given = (torch.randint(v, (n,)), torch.randn(8), torch.arange(n) // 32)
    kept: list[Tensor] = []
    peak = counted_peak(lambda: kept.append(linear_policy_loss(hidden, weight, *given, scratch_bytes=budget).loss))
    allowed = 1.1 * budget + (4 * v * h if schedule == "fused" else 0)
    assert allowed - 1.1 * budget < peak < allowed
    backward = counted_peak(lambda: torch.autograd.grad(kept[0], (hidden, weight)))
    assert backward < 4 * (v + 2 * n) * h + 1.1 * budget


def test_opcheck() -> None:
    leaves, (target, advantage, completion), kwargs = case(6, 8, 70, 3, torch.float32, "head")
    fixed = [leaf.detach() for leaf in leaves]
    weight = torch.rand(6)
    for head_grad in (None, torch.zeros(70, 8)):
        torch.library.opcheck(
            torch.ops.fastrl.linear_policy_loss.default,
            (fixed[0], fixed[1], target, fixed[2], kwargs["temperature"], kwargs["rows"], head_grad, 1.0, 3.0, -100,
             1.0, 1 << 20, [True, True, True], advantage, completion, weight, kwargs["old_logp"], kwargs["ref_logp"],
             None, None, *PolicyOptions(beta=0.1)),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"),
        )  # fmt: skip
    torch.library.opcheck(
        torch.ops.fastrl.with_gradients.default,
        (torch.tensor(1.0), leaves[0], leaves[1], None, fixed[0], fixed[1], fixed[1].new_zeros(0), 1.0),
    )


def test_compiles_without_graph_break() -> None:
    leaves, rest, kwargs = case(10, 8, 70, 3, torch.float32, "k3")

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_policy_loss(hidden * 2, weight, *rest, **kwargs).loss * 3

    want = torch.autograd.grad(step(*leaves), leaves)
    got = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    assert all(torch.equal(mine, truth) for mine, truth in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ratio": "sequence"}, ValueError, "ratio: linear_policy_loss computes gradients row by row"),
        ({"beta": 0.1}, ValueError, "ref_logp"),
        ({"grad_scale": 0.0}, ValueError, "grad_scale"),
        ({"head_grad": torch.zeros(9, 7)}, ValueError, r"head_grad: expected shape \[9, 8\], got \[9, 7\]"),
        ({"head_grad": torch.zeros(9, 8).bfloat16()}, TypeError, "head_grad: expected dtype float32"),
        ({"scratch_bytes": 100}, ValueError, "scratch_bytes: 100 is too small for a row of 9 logits"),
        ({"completion": torch.zeros(3).long()}, ValueError, r"completion: expected shape \[4\], got \[3\]"),
        ({"target": torch.tensor([0, 0, 0, 9])}, ValueError, "target: row 3 is 9"),
        ({"head_weight": torch.zeros(9, 8).double()}, TypeError, "head_weight: expected dtype float32, got float64"),
    ],
)
def test_bad_input_is_named(change: dict, error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "hidden": torch.zeros(4, 8), "head_weight": torch.zeros(9, 8), "target": torch.zeros(4).long(),
        "advantage": torch.ones(2), "completion": torch.zeros(4).long(),
    } | change  # fmt: skip
    with pytest.raises(error, match=message):
        linear_policy_loss(**arguments)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["on_policy", "k3", "head", "sapo"])
def test_through_the_kernels(variant: str, dtype: torch.dtype) -> None:
    leaves, rest, kwargs = case(9, 8, 131, 3, torch.float32, variant)
    leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
    if "bias" in kwargs:
        kwargs["bias"] = leaves[2]
    dead = (rest[0] == -100) | (rest[2] < 0)
    with torch.no_grad():
        leaves[0][dead] = torch.nan
    got = linear_policy_loss(leaves[0], leaves[1], *rest, scratch_bytes=3000, **kwargs)
    twins, twin_rest, twin_kwargs = doubled(leaves, rest, kwargs)
    want = linear_policy_loss_reference(twins[0], twins[1], *twin_rest, **twin_kwargs)
    limit = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(got.loss.double(), want.loss, rtol=limit, atol=limit)
    for mine, truth in zip(torch.autograd.grad(got.loss, leaves), torch.autograd.grad(want.loss, twins), strict=True):
        assert relative(mine, truth) < limit


@pytest.mark.gpu
def test_gpu_matches_float64_without_synchronising() -> None:
    leaves, rest, kwargs = case(300, 64, 5003, 16, torch.bfloat16, "k3")
    leaves = [leaf.detach().cuda().requires_grad_() for leaf in leaves]
    rest = tuple(t.cuda() for t in rest)
    kwargs = {k: t.cuda() if isinstance(t, Tensor) else t for k, t in kwargs.items()}
    linear_policy_loss(*leaves, *rest, **kwargs).loss.backward()  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = linear_policy_loss(*leaves, *rest, scratch_bytes=1 << 21, **kwargs)
        grads = torch.autograd.grad(got.loss, leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    twins, twin_rest, twin_kwargs = doubled(leaves, rest, kwargs)
    want = linear_policy_loss_reference(*twins, *twin_rest, **twin_kwargs)
    for mine, truth in zip(grads, torch.autograd.grad(want.loss, twins), strict=True):
        assert relative(mine, truth) < 2e-2
