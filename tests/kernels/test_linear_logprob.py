"""linear_logprob against its float64 twin: values, gradients, masks, budget, registration."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastrl_kernels import _linear_logprob_driver as driver
from fastrl_kernels.linear_logprob import linear_logprob, linear_logprob_reference

FEATURES = ["plain", "bias", "softcap", "temperature", "row_temperature", "lora", "rows", "all"]
# against float64 on the same inputs: fp32 tiles, and gradients rounded once to the inputs' dtype
TOLERANCE = {
    torch.float64: (1e-13, 1e-13),
    torch.float32: (2e-6, 5e-6),
    torch.bfloat16: (2e-6, 4e-3),
    torch.float16: (2e-6, 1e-3),
}


def relative(got: Tensor, want: Tensor) -> float:
    want = want.detach().double()
    return float((got.detach().double() - want).norm() / want.norm().clamp(min=1e-30))


def case(n: int, h: int, v: int, dtype: torch.dtype, feature: str = "plain") -> tuple[list[Tensor], Tensor, dict]:
    """(leaves = [hidden, weight, ...], target, keyword arguments)"""

    def leaf(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype).requires_grad_()

    leaves = [leaf(n, h), leaf(v, h, scale=2 / h**0.5)]
    target = torch.randint(v, (n,))
    target[1::5] = -100
    kwargs: dict = {}
    if feature in ("bias", "all"):
        kwargs["bias"] = leaf(v)
        leaves.append(kwargs["bias"])
    if feature in ("softcap", "all"):
        kwargs["softcap"] = 3.0
    if feature == "temperature":
        kwargs["temperature"] = 0.7
    if feature in ("row_temperature", "all"):
        kwargs["temperature"] = torch.rand(n) + 0.5
    if feature in ("lora", "all"):
        a, b = leaf(3, h), leaf(v, 3)
        kwargs["lora"] = (a, b, 0.5)
        leaves += [a, b]
    if feature in ("rows", "all"):
        kwargs["rows"] = torch.randperm(n)[: n // 2 + 1]
    return leaves, target, kwargs


def to_double(leaves: list[Tensor], kwargs: dict) -> tuple[list[Tensor], dict]:
    twins = [leaf.detach().double().requires_grad_() for leaf in leaves]
    by_id = {id(leaf): twin for leaf, twin in zip(leaves, twins, strict=True)}
    swapped = dict(kwargs)
    if "bias" in kwargs:
        swapped["bias"] = by_id[id(kwargs["bias"])]
    if "lora" in kwargs:
        a, b, scale = kwargs["lora"]
        swapped["lora"] = (by_id[id(a)], by_id[id(b)], scale)
    if isinstance(kwargs.get("temperature"), Tensor):
        swapped["temperature"] = kwargs["temperature"].double()
    return twins, swapped


def loss_of(result, seed: int = 1) -> Tensor:
    """Random, non-uniform upstream gradients for both outputs."""
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(2, result.logp.shape[0], generator=generator, dtype=torch.float64)
    loss = (result.logp.double() * up[0]).sum()
    return loss if result.entropy is None else loss + (result.entropy.double() * up[1]).sum()


def compare(leaves: list[Tensor], target: Tensor, kwargs: dict, *, entropy: bool = True, budget: int = 1 << 30) -> None:
    dtype = leaves[0].dtype
    got = linear_logprob(leaves[0], leaves[1], target, return_entropy=entropy, scratch_bytes=budget, **kwargs)
    got_grads = torch.autograd.grad(loss_of(got), leaves)
    twins, twin_kwargs = to_double(leaves, kwargs)
    want = linear_logprob_reference(twins[0], twins[1], target, return_entropy=entropy, **twin_kwargs)
    want_grads = torch.autograd.grad(loss_of(want), twins)
    value, gradient = TOLERANCE[dtype]
    assert got.logp.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative(got.logp, want.logp) <= value
    if entropy:
        assert relative(got.entropy, want.entropy) <= value
    for mine, truth in zip(got_grads, want_grads, strict=True):
        assert mine.dtype == dtype
        assert relative(mine, truth) <= gradient


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("feature", FEATURES)
def test_values_and_gradients_match_float64(feature: str, dtype: torch.dtype) -> None:
    leaves, target, kwargs = case(37, 24, 1100, dtype, feature)
    compare(leaves, target, kwargs, budget=300_000)  # several slabs, several chunks of rows


@pytest.mark.parametrize("feature", ["plain", "rows", "lora"])
def test_one_tile_and_many_tiles_agree(feature: str) -> None:
    leaves, target, kwargs = case(50, 16, 777, torch.float32, feature)
    compare(leaves, target, kwargs, budget=1 << 30)
    compare(leaves, target, kwargs, budget=60_000)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize(
    ("n", "h", "v"), [(1, 1, 1), (1, 7, 2), (3, 1, 63), (5, 8, 64), (2, 5, 65), (67, 3, 127), (9, 4, 4097)]
)
def test_awkward_shapes(n: int, h: int, v: int, entropy: bool) -> None:
    leaves, target, kwargs = case(n, h, v, torch.float32)
    compare(leaves, target, kwargs, entropy=entropy, budget=200_000)


def test_no_rows() -> None:
    leaves, target, kwargs = case(0, 4, 9, torch.float32, "lora")
    result = linear_logprob(leaves[0], leaves[1], target, return_entropy=True, **kwargs)
    assert result.logp.shape == result.entropy.shape == (0,)
    for grad, leaf in zip(torch.autograd.grad(loss_of(result), leaves), leaves, strict=True):
        assert grad.shape == leaf.shape
        assert not grad.any()


def test_no_hidden_features() -> None:
    result = linear_logprob(torch.zeros(3, 0), torch.zeros(8, 0), torch.tensor([0, 5, -100]), return_entropy=True)
    torch.testing.assert_close(result.logp, torch.tensor([-2.0794415, -2.0794415, 0]))
    torch.testing.assert_close(result.entropy, torch.tensor([2.0794415, 2.0794415, 0]))


def test_gradcheck() -> None:
    leaves, target, kwargs = case(4, 2, 70, torch.float64, "all")
    bias, (a, b, scale) = leaves[2], kwargs["lora"]

    def both(hidden, weight, bias, a, b):
        result = linear_logprob(
            hidden, weight, target, bias=bias, lora=(a, b, scale), temperature=kwargs["temperature"], softcap=3.0,
            return_entropy=True, scratch_bytes=40_000,
        )  # fmt: skip
        return result.logp, result.entropy

    assert torch.autograd.gradcheck(both, (leaves[0], leaves[1], bias, a, b), fast_mode=False)


def test_strides_of_every_kind() -> None:
    base = torch.randn(6, 40, dtype=torch.float32)
    hidden = base.t()[::2].requires_grad_()  # [20, 6], neither stride is 1
    weight = torch.randn(6, 90).t().requires_grad_()
    target = torch.randint(90, (40,))[1::2]
    compare([hidden, weight], target, {"temperature": (torch.rand(40) + 0.5)[::2]})
    result = linear_logprob(hidden, weight, target)
    want = linear_logprob_reference(hidden.double(), weight.double(), target)
    got = torch.autograd.grad(result.logp.sum(), [hidden, weight])  # upstream gradient of stride 0
    truth = torch.autograd.grad(want.logp.sum(), [hidden, weight])
    assert all(relative(mine, theirs) < 5e-6 for mine, theirs in zip(got, truth, strict=True))


def test_expanded_hidden_rows() -> None:
    hidden, weight = torch.randn(1, 8).expand(5, 8), torch.randn(30, 8, requires_grad=True)
    target = torch.arange(5)
    got = linear_logprob(hidden, weight, target)
    torch.testing.assert_close(got.logp, linear_logprob_reference(hidden, weight, target).logp)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_poisoned_ignored_rows_are_harmless(dtype: torch.dtype) -> None:
    leaves, target, kwargs = case(23, 8, 100, dtype, "lora")
    with torch.no_grad():
        leaves[0][target == -100] = torch.nan
    result = linear_logprob(leaves[0], leaves[1], target, return_entropy=True, **kwargs)
    ignored = target == -100
    assert not result.logp[ignored].any()
    assert not result.entropy[ignored].any()
    up = torch.randn(23)
    up[ignored] = torch.nan
    grads = torch.autograd.grad(result.logp, leaves, up)
    assert all(bool(grad.isfinite().all()) for grad in grads)
    assert not grads[0][ignored].any()


def test_all_rows_ignored() -> None:
    leaves, target, _ = case(6, 8, 50, torch.float32)
    result = linear_logprob(leaves[0], leaves[1], target.fill_(-100), return_entropy=True)
    assert not result.logp.any()
    assert all(not grad.any() for grad in torch.autograd.grad(loss_of(result), leaves))


def test_ignore_index_may_be_a_token_or_nothing() -> None:
    hidden, weight = torch.randn(4, 8), torch.randn(10, 8)
    target = torch.tensor([0, 3, 0, 9])
    full = linear_logprob(hidden, weight, target, ignore_index=None).logp
    assert bool((full < 0).all())
    torch.testing.assert_close(
        linear_logprob(hidden, weight, target, ignore_index=0).logp, full * torch.tensor([0, 1, 0, 1])
    )


def test_rows_keep_dropped_rows_out_of_every_gradient() -> None:
    leaves, target, _ = case(30, 8, 200, torch.float32)
    rows = torch.tensor([4, 29, 0, 17])
    with torch.no_grad():
        leaves[0][2] = torch.nan  # not named: its forward is NaN, its gradient is not
    result = linear_logprob(leaves[0], leaves[1], target, rows=rows)
    up = torch.randn(30)
    got = torch.autograd.grad(result.logp, leaves, up)
    alone = linear_logprob(leaves[0][rows], leaves[1], target[rows])
    want = torch.autograd.grad(alone.logp, leaves, up[rows])
    assert bool(got[0].isfinite().all())
    torch.testing.assert_close(got[0][rows], want[0][rows], rtol=0, atol=0)
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=0)
    assert int((got[0] != 0).any(1).sum()) <= 4
    nobody = linear_logprob(leaves[0], leaves[1], target, rows=rows[:0])
    assert all(not grad.any() for grad in torch.autograd.grad(nobody.logp, leaves, up))


def test_zero_upstream_rows_cost_nothing_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves, target, _ = case(40, 8, 300, torch.float32)
    up = torch.randn(40) * (torch.arange(40) % 4 == 0)
    seen = []
    whole = driver.ranges
    monkeypatch.setattr(
        "fastrl_kernels._linear_logprob_backward.ranges", lambda n, step: seen.append(n) or whole(n, step)
    )
    result = linear_logprob(leaves[0], leaves[1], target)
    got = torch.autograd.grad(result.logp, leaves, up)
    live = int(((up != 0) & (target != -100)).sum())
    assert live in seen
    assert 40 not in seen
    twins, _ = to_double(leaves, {})
    want = torch.autograd.grad(linear_logprob_reference(*twins, target).logp, twins, up.double())
    assert all(relative(mine, truth) < 5e-6 for mine, truth in zip(got, want, strict=True))


def test_only_needed_gradients_are_computed() -> None:
    n, h, v = 20, 8, 300
    product = 2 * n * h * v

    def flops(hidden: bool, weight: bool, **kwargs) -> int:
        leaves, target, _ = case(n, h, v, torch.float32)
        leaves[0].requires_grad_(hidden)
        leaves[1].requires_grad_(weight)
        with FlopCounterMode(display=False) as counter:
            linear_logprob(leaves[0], leaves[1], target, **kwargs).logp.sum().backward()
        assert (leaves[0].grad is not None, leaves[1].grad is not None) == (hidden, weight)
        return counter.get_total_flops()

    assert flops(True, True) == 4 * product
    assert flops(True, False) == flops(False, True) == 3 * product
    assert flops(True, True, rows=torch.arange(5)) == product + 3 * product // 4


def test_counted_flops_are_the_flops_done() -> None:
    leaves, target, _ = case(20, 8, 300, torch.float32)
    target = target.clamp(min=0)
    head = driver.Head(leaves[1].detach(), None, None, None, 1.0, None, None, 1 << 20)
    with FlopCounterMode(display=False) as counter:
        driver.forward(leaves[0].detach(), head, target, torch.ones(20))
    assert counter.get_total_flops() == 2 * 20 * 8 * 300


@pytest.mark.parametrize("used", ["logp", "entropy"])
def test_either_output_may_be_unused(used: str) -> None:
    leaves, target, kwargs = case(12, 8, 90, torch.float32)
    up = torch.randn(12)
    got = getattr(linear_logprob(leaves[0], leaves[1], target, return_entropy=True), used)
    twins, _ = to_double(leaves, kwargs)
    want = getattr(linear_logprob_reference(*twins, target, return_entropy=True), used)
    pairs = zip(torch.autograd.grad(got, leaves, up), torch.autograd.grad(want, twins, up.double()), strict=True)
    assert all(relative(mine, truth) < 5e-6 for mine, truth in pairs)


def test_same_bits_twice() -> None:
    leaves, target, kwargs = case(64, 16, 500, torch.float32, "all")
    runs = []
    for _ in range(2):
        result = linear_logprob(leaves[0], leaves[1], target, return_entropy=True, scratch_bytes=200_000, **kwargs)
        runs.append([result.logp, result.entropy, *torch.autograd.grad(loss_of(result), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_forbidden_tokens_have_probability_zero() -> None:
    leaves, target, _ = case(9, 8, 70, torch.float32)
    bias = torch.zeros(70)
    bias[40:] = -torch.inf
    target = target.clamp(min=0) % 40
    result = linear_logprob(leaves[0], leaves[1], target, bias=bias, return_entropy=True)
    want = linear_logprob_reference(leaves[0], leaves[1][:40], target, return_entropy=True)
    torch.testing.assert_close(result.logp, want.logp)
    torch.testing.assert_close(result.entropy, want.entropy)
    grad = torch.autograd.grad(loss_of(result), leaves[1])[0]
    assert not grad[40:].any()
    assert bool(grad.isfinite().all())


def test_lora_in_fp32_on_a_bf16_head() -> None:
    leaves, target, _ = case(11, 16, 90, torch.bfloat16)
    a, b = torch.randn(2, 16, requires_grad=True), torch.randn(90, 2, requires_grad=True)
    result = linear_logprob(leaves[0], leaves[1], target, lora=(a, b, 2.0))
    grads = torch.autograd.grad(loss_of(result), [a, b])
    twins = [x.detach().double().requires_grad_() for x in (a, b)]
    want = linear_logprob_reference(leaves[0].double(), leaves[1].double(), target, lora=(twins[0], twins[1], 2.0))
    for mine, truth in zip(grads, torch.autograd.grad(loss_of(want), twins), strict=True):
        assert mine.dtype == torch.float32
        assert relative(mine, truth) < 5e-6


def test_autocast_casts_like_a_linear_layer() -> None:
    hidden, weight = torch.randn(7, 16, requires_grad=True), torch.randn(40, 16, requires_grad=True)
    target = torch.randint(40, (7,))
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_logprob(hidden, weight, target).logp
    want = linear_logprob(hidden.bfloat16(), weight.bfloat16(), target).logp
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert torch.autograd.grad(got.sum(), weight)[0].dtype == torch.float32


@given(
    n=st.integers(1, 5000),
    v=st.integers(1, 300_000),
    h=st.sampled_from([1, 64, 2048]),
    budget=st.integers(1 << 16, 1 << 31),
    copies=st.tuples(st.booleans(), st.booleans()),
    limit=st.sampled_from([1024, 4096, 1 << 40]),
)
def test_plan_stays_in_its_budget(n: int, v: int, h: int, budget: int, copies: tuple[bool, bool], limit: int) -> None:
    per_row, per_column = copies[0] * h * 4 + 8192, copies[1] * h * 4
    arguments = {"per_element": 4, "per_row": per_row, "per_column": per_column, "row_limit": limit}
    if per_row + 64 * (4 + per_column) > budget:
        with pytest.raises(ValueError, match="scratch_bytes"):
            driver.plan_tiles(n, v, budget, **arguments)
        return
    plan = driver.plan_tiles(n, v, budget, **arguments)
    assert 1 <= plan.rows <= min(n, limit)
    assert plan.stride % 64 == 0
    assert plan.columns <= plan.stride
    assert plan.rows * plan.stride * 4 + plan.rows * per_row + plan.columns * per_column <= budget


def test_reference_shape_tiles() -> None:
    """The tiles of the GPU goals: N = 16384, H = 2048, V = 151936, bf16, 1 GiB."""
    plan = driver.plan_tiles(16384, 151936, 1 << 30, per_element=2, per_row=0, per_column=0, row_limit=4096)
    assert (plan.rows, plan.columns) == (4096, 75968)
    plan = driver.plan_tiles(16384, 151936, 1 << 30, per_element=2, per_row=4096, per_column=0, row_limit=16384)
    assert plan.rows == 16384
    assert -(-151936 // plan.columns) == 5


def test_opcheck() -> None:
    leaves, target, kwargs = case(6, 8, 70, torch.float32, "all")
    a, b, scale = kwargs["lora"]
    rows = kwargs["rows"]
    options = (1.0, scale, 3.0, -100)
    for entropy in (False, True):
        torch.library.opcheck(
            torch.ops.fastrl.linear_logprob.default,
            (
                leaves[0],
                leaves[1],
                target,
                leaves[2],
                kwargs["temperature"],
                a,
                b,
                rows,
                *options,
                entropy,
                False,
                1 << 20,
            ),
        )
    vector = torch.randn(6)
    tensors = [leaf.detach() for leaf in leaves]
    for needs in ([True] * 5, [True, False, False, False, False]):
        torch.library.opcheck(
            torch.ops.fastrl.linear_logprob_backward.default,
            (vector, vector, tensors[0], tensors[1], target, tensors[2], kwargs["temperature"], a.detach(), b.detach(),
             rows, vector, vector, vector, *options, False, 1 << 20, needs),
        )  # fmt: skip


def test_autocast_leaves_float64_alone() -> None:
    hidden, weight = torch.randn(3, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    target = torch.tensor([0, 1, 2])
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_logprob(hidden, weight, target).logp
    assert found.dtype == torch.float64
    assert torch.equal(found, linear_logprob(hidden, weight, target).logp)


@pytest.mark.parametrize("feature", ["plain", "all"])
def test_compiles_without_graph_break(feature: str) -> None:
    leaves, target, kwargs = case(10, 8, 70, torch.float32, feature)

    def step(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        result = linear_logprob(hidden * 1.5, weight, target, return_entropy=True, **kwargs)
        assert result.entropy is not None
        return (result.logp * result.logp.detach() + result.entropy).sum()

    want = torch.autograd.grad(step(leaves[0], leaves[1], target), leaves)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=False)
    got = torch.autograd.grad(compiled(leaves[0], leaves[1], target), leaves)
    assert all(torch.equal(mine, truth) for mine, truth in zip(got, want, strict=True))


def test_compiles_with_dynamic_sizes() -> None:
    compiled = torch.compile(
        lambda hidden, weight, target: linear_logprob(hidden, weight, target).logp.sum(),
        fullgraph=True, backend="aot_eager", dynamic=True,
    )  # fmt: skip
    for n, v in ((5, 70), (9, 41)):
        leaves, target, _ = case(n, 8, v, torch.float32)
        got = compiled(leaves[0], leaves[1], target)
        got.backward()
        torch.testing.assert_close(got, linear_logprob(leaves[0], leaves[1], target).logp.sum())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.zeros(4)}, ValueError, r"hidden: expected shape \[any, any\], got \[4\]"),
        ({"weight": torch.zeros(9, 7)}, ValueError, r"weight: expected shape \[any, 8\], got \[9, 7\]"),
        ({"weight": torch.zeros(0, 8)}, ValueError, "weight: expected at least one row"),
        ({"weight": torch.zeros(9, 8).bfloat16()}, TypeError, "weight: expected dtype float32, got bfloat16"),
        ({"target": torch.zeros(5).long()}, ValueError, r"target: expected shape \[4\], got \[5\]"),
        ({"target": torch.zeros(4)}, TypeError, "target: expected dtype .*, got float32"),
        ({"target": torch.tensor([0, 9, 0, 0])}, ValueError, "target: row 1 is 9, expected 0..8 or ignore_index -100"),
        ({"target": torch.tensor([0, 0, 0, -1])}, ValueError, "target: row 3 is -1"),
        ({"bias": torch.zeros(8)}, ValueError, r"bias: expected shape \[9\], got \[8\]"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a finite number > 0 .* got 0.0"),
        ({"temperature": torch.ones(3)}, ValueError, r"temperature: expected shape \[4\], got \[3\]"),
        ({"temperature": torch.tensor([1, 1, -1.0, 1])}, ValueError, "temperature: expected > 0, got -1.0"),
        ({"softcap": -1.0}, ValueError, "softcap: expected a finite number > 0, got -1.0"),
        ({"rows": torch.tensor([0, 4])}, ValueError, r"rows: expected indices in 0..3, got 0..4"),
        ({"rows": torch.tensor([1, 1])}, ValueError, "rows: expected distinct indices"),
        ({"lora": (torch.zeros(2, 8), torch.zeros(9, 3), 1.0)}, ValueError, r"lora B: expected shape \[9, 2\]"),
        ({"scratch_bytes": 100}, ValueError, "scratch_bytes: 100 is too small"),
    ],
)  # fmt: skip
def test_bad_input_is_named(change: dict, error: type[Exception], message: str) -> None:
    arguments = {"hidden": torch.zeros(4, 8), "weight": torch.zeros(9, 8), "target": torch.zeros(4).long()} | change
    with pytest.raises(error, match=message):
        linear_logprob(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("feature", FEATURES)
def test_gpu_matches_float64_without_synchronising(feature: str, dtype: torch.dtype) -> None:
    leaves, target, kwargs = case(300, 64, 5003, dtype, feature)
    leaves = [leaf.detach().cuda().requires_grad_() for leaf in leaves]
    kwargs = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    position = 2
    if "bias" in kwargs:
        kwargs["bias"], position = leaves[2], 3
    if "lora" in kwargs:
        kwargs["lora"] = (leaves[position], leaves[position + 1], kwargs["lora"][2])
    target = target.cuda()
    torch.backends.cuda.matmul.allow_tf32 = False

    def run(function, tensors, options):
        result = function(tensors[0], tensors[1], target, return_entropy=True, **options)
        up = torch.linspace(-1, 1, 300, device="cuda", dtype=torch.float64)
        return [
            result.logp,
            result.entropy,
            *torch.autograd.grad((result.logp * up - result.entropy * up).sum(), tensors),
        ]

    twins, twin_kwargs = to_double(leaves, kwargs)
    truth = run(linear_logprob_reference, twins, twin_kwargs)
    run(linear_logprob, leaves, kwargs)  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = run(linear_logprob, leaves, kwargs | {"scratch_bytes": 1 << 22})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for mine, theirs in zip(got, truth, strict=True):
        assert relative(mine, theirs) <= rounding
