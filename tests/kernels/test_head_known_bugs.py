"""Bugs that other fused heads have shipped, one test each."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastrl_kernels import _linear_logprob_kernels as kernels
from fastrl_kernels import _linear_logprob_launch as launches
from fastrl_kernels._linear_logprob_tiles import RowTerms, TileOptions, Upstream
from fastrl_kernels.linear_logprob import linear_logprob, linear_logprob_reference
from fastrl_kernels.linear_policy_loss import linear_policy_loss
from fastrl_kernels.policy_loss import policy_loss
from fastrl_kernels.token_logprob import token_logprob, token_logprob_reference


def gradients(function, hidden: Tensor, weight: Tensor, target: Tensor, up: Tensor, **kwargs) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in (hidden, weight)]
    logp = function(*leaves, target, **kwargs).logp
    return [grad.double() for grad in torch.autograd.grad(logp, leaves, up.to(logp.dtype))]


def exact_gradients(hidden: Tensor, weight: Tensor, target: Tensor, up: Tensor, **kwargs) -> list[Tensor]:
    return gradients(linear_logprob_reference, hidden.double(), weight.double(), target, up.double(), **kwargs)


@pytest.fixture
def poisoned_empties() -> Iterator[None]:
    """Uninitialised memory holds NaN (as in fla's tests)."""
    was = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert bool(torch.empty(4).isnan().all())
    yield
    torch.use_deterministic_algorithms(was[0])
    torch.utils.deterministic.fill_uninitialized_memory = was[1]


def test_liger_968_every_row_has_its_own_upstream_gradient() -> None:
    hidden, weight, target = torch.randn(9, 8), torch.randn(70, 8), torch.randint(70, (9,))
    up = torch.randn(9) * 10 ** torch.linspace(-3, 3, 9)
    for mine, exact in zip(
        gradients(linear_logprob, hidden, weight, target, up), exact_gradients(hidden, weight, target, up), strict=True
    ):
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("margin", [2.0, 7.0, 12.0])
def test_liger_1268_a_confident_target_keeps_its_gradient(margin: float, dtype: torch.dtype) -> None:
    """p of the target up to 1 - 6e-6; a one-hot subtracted after rounding to bf16 would be off by up to 100 %."""
    logits = torch.zeros(4, 2)
    logits[:, 1] = margin
    logits = (logits + torch.tensor([0.0, 0.25, 0.5, 1.0])[:, None]).to(dtype)
    leaf, twin = logits.clone().requires_grad_(), logits.double().requires_grad_()
    target, up = torch.ones(4).long(), torch.tensor([1.0, -0.5, 2.0, 0.1])
    mine = torch.autograd.grad(token_logprob(leaf, target).logp, leaf, up)[0].double()
    exact = torch.autograd.grad(token_logprob_reference(twin, target).logp, twin, up.double())[0]
    unit = 5e-6 if dtype == torch.float32 else 2**-8
    assert bool(((mine - exact).abs() <= unit * exact.abs()).all())


@pytest.mark.parametrize("budget", [1 << 30, 60_000])
def test_liger_1082_chunks_do_not_change_the_size_of_the_gradient(budget: int) -> None:
    """Normalisation is a weight per row, independent of the split into rows and vocabulary tiles."""
    leaves = [torch.randn(24, 8).requires_grad_(), torch.randn(300, 8).requires_grad_()]
    target, completion = torch.randint(300, (24,)), torch.arange(4).repeat_interleave(6)
    options = {"old_logp": torch.full((24,), -5.0), "aggregate": "sequence"}
    head = (*leaves, target, torch.randn(4), completion)
    logp = torch.log_softmax(leaves[0] @ leaves[1].T, 1).gather(1, target[:, None])[:, 0]
    whole = torch.autograd.grad(policy_loss(logp, *head[3:], **options).loss, leaves)
    fused = torch.autograd.grad(linear_policy_loss(*head, **options, scratch_bytes=budget).loss, leaves)
    for mine, exact in zip(fused, whole, strict=True):
        assert float(exact.norm()) > 0
        torch.testing.assert_close(mine.norm(), exact.norm(), rtol=1e-5, atol=0)
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-6)


def test_liger_1350_python_floats_survive_compilation() -> None:
    hidden, weight, target = torch.randn(5, 8), torch.randn(30, 8), torch.randint(30, (5,))

    def step(temperature: float, softcap: float) -> Tensor:
        return linear_logprob(hidden, weight, target, temperature=temperature, softcap=softcap).logp

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for temperature, softcap in ((0.7, 5.0), (1.3, 2.5), (1.3, 9.0)):
        got = compiled(temperature, softcap)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, step(temperature, softcap), rtol=0, atol=0)


def test_liger_1350_kernels_narrow_python_floats_inside() -> None:
    for kernel in (kernels.linear_logprob_fold_kernel, kernels.linear_logprob_gradient_kernel):
        source = inspect.getsource(kernel.fn)
        assert "softcap = tl.cast(softcap, tl.float32)" in source


def test_liger_1391_weight_gradient_does_not_decay_with_chunks() -> None:
    n = 2048
    hidden, weight = torch.randn(n, 16).bfloat16(), torch.randn(64, 16).bfloat16()
    target, up = torch.randint(64, (n,)), torch.rand(n)
    exact = exact_gradients(hidden, weight, target, up)[1]
    errors = []
    for budget in (1 << 30, 50_000):  # one chunk of rows; more than a hundred
        mine = gradients(linear_logprob, hidden, weight, target, up, scratch_bytes=budget)[1]
        errors.append(float((mine - exact).norm() / exact.norm()))
    assert errors[0] < 2**-8
    assert errors[1] <= 1.01 * errors[0]


def test_liger_1294_more_rows_than_a_grid_axis_but_x_allows() -> None:
    n = 70_000
    hidden, weight, target = torch.randn(n, 2), torch.randn(3, 2), torch.randint(3, (n,))
    logp = linear_logprob(hidden, weight, target).logp
    torch.testing.assert_close(logp, linear_logprob_reference(hidden, weight, target).logp)


def test_liger_1294_rows_are_on_grid_x(monkeypatch: pytest.MonkeyPatch) -> None:
    grids = []

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **kwargs: None

    monkeypatch.setattr(launches, "linear_logprob_fold_kernel", Recorder())
    monkeypatch.setattr(launches, "linear_logprob_gradient_kernel", Recorder())
    vector = torch.zeros(1).expand(70_000)
    rows = RowTerms(vector.long(), vector, vector, vector, None)
    tile, options = torch.zeros(1, 3).expand(70_000, 3), TileOptions(3, None, None, -100)
    launches.launch_fold(tile, 0, options, rows, torch.zeros(4, 1))
    launches.launch_gradient(tile, tile, 0, options, rows, Upstream(vector))
    assert grids == [(70_000,), (70_000,)]


def test_liger_1294_row_offsets_are_64_bit() -> None:
    for kernel in (kernels.linear_logprob_fold_kernel, kernels.linear_logprob_gradient_kernel):
        assert "row = tl.program_id(0).to(tl.int64)" in inspect.getsource(kernel.fn)


@pytest.mark.parametrize("n", [0, 1, 2])
@pytest.mark.parametrize("v", [1, 3, 1021])
@pytest.mark.usefixtures("poisoned_empties")
def test_liger_916_odd_sizes_read_and_write_only_their_own_memory(n: int, v: int) -> None:
    hidden, weight, target, up = torch.randn(n, 5), torch.randn(v, 5), torch.randint(v, (n,)), torch.randn(n)
    mine = gradients(linear_logprob, hidden, weight, target, up, scratch_bytes=100_000)
    for got, exact in zip(mine, exact_gradients(hidden, weight, target, up), strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("v", [65, 1025, 2047])
def test_verl_2656_nothing_beyond_the_vocabulary_counts(v: int) -> None:
    """All logits near -100: a tail counted as zeros would own the whole distribution (log-prob +123 there)."""
    hidden, weight = torch.ones(3, 1), torch.full((v, 1), -100.0) + torch.rand(v, 1)
    target = torch.tensor([0, v - 1, v // 2])
    result = linear_logprob(hidden, weight, target, return_entropy=True, scratch_bytes=50_000)
    want = linear_logprob_reference(hidden.double(), weight.double(), target, return_entropy=True)
    torch.testing.assert_close(result.logp.double(), want.logp, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(result.entropy.double(), want.entropy, rtol=1e-5, atol=2e-5)


def test_verl_running_maximum_starts_below_every_logit() -> None:
    logits = torch.full((2, 9), -1000.0)
    logits[:, 4] = -999.0
    got = token_logprob(logits, torch.tensor([4, 0])).logp
    torch.testing.assert_close(got, logits.log_softmax(1)[[0, 1], [4, 0]])


@pytest.mark.usefixtures("poisoned_empties")
def test_verl_an_invalid_label_leaves_no_output_unwritten() -> None:
    hidden, weight = torch.randn(3, 4), torch.randn(9, 4)
    result = linear_logprob(hidden, weight, torch.tensor([-100, 2, -100]), return_entropy=True)
    assert result.logp[[0, 2]].tolist() == result.entropy[[0, 2]].tolist() == [0, 0]
    with pytest.raises(ValueError, match="target: row 1 is 9"):
        linear_logprob(hidden, weight, torch.tensor([0, 9, 1]))


def test_verl_any_hidden_size() -> None:
    hidden, weight, target = torch.randn(3, 129), torch.randn(9, 129), torch.arange(3)
    torch.testing.assert_close(
        linear_logprob(hidden, weight, target).logp, linear_logprob_reference(hidden, weight, target).logp
    )


def test_cce_14_no_kernel_is_autotuned_at_run_time() -> None:
    """Launch configurations are tables compiled by the ahead-of-time gates; an autotuner could fail or choose
    another."""
    package = Path(kernels.__file__).parent
    assert not [file.name for file in package.rglob("*.py") if "autotune" in file.read_text()]


def test_cce_36_small_gradients_are_not_filtered() -> None:
    hidden, weight = torch.randn(2, 8) * 3, torch.randn(500, 8) * 2
    target, up = torch.tensor([3, 400]), torch.tensor([1.0, -1.0])
    mine = gradients(linear_logprob, hidden, weight, target, up)[1]
    exact = exact_gradients(hidden, weight, target, up)[1]
    tiny = (exact != 0) & (exact.abs() < 1e-6)
    assert int(tiny.sum()) > 100
    torch.testing.assert_close(mine[tiny], exact[tiny], rtol=1e-3, atol=0)


@pytest.mark.usefixtures("poisoned_empties")
@pytest.mark.parametrize("budget", [1 << 30, 60_000])
def test_fla_poisoned_memory_never_shows(budget: int) -> None:
    hidden, weight = torch.randn(21, 8), torch.randn(300, 8)
    target, up = torch.randint(300, (21,)), torch.randn(21)
    target[::4] = -100
    lora = (torch.randn(2, 8), torch.randn(300, 2), 0.5)
    for options in ({}, {"rows": torch.tensor([1, 2, 20])}, {"lora": lora}):
        mine = gradients(linear_logprob, hidden, weight, target, up, scratch_bytes=budget, **options)
        for got, exact in zip(mine, exact_gradients(hidden, weight, target, up, **options), strict=True):
            torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-4)


def test_flash_attention_labels_of_any_stride_and_alignment() -> None:
    hidden, weight = torch.randn(5, 4), torch.randn(9, 4)
    labels = torch.randint(9, (11,))
    for target in (labels[1:6], labels[::2][:5], labels.flip(0)[:5], labels[:1].expand(5)):
        torch.testing.assert_close(
            linear_logprob(hidden, weight, target).logp, linear_logprob_reference(hidden, weight, target).logp
        )


def test_trl_sizes_and_temperatures_do_not_recompile() -> None:
    for kernel in (kernels.linear_logprob_fold_kernel, kernels.linear_logprob_gradient_kernel):
        constants = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
        asked = {"HAS_BIAS", "HAS_SOFTCAP", "HAS_ENTROPY", "HAS_MEAN", "WEIGHTED", "TARGETS", "TARGET_LANES"}
        assert constants - {"SAME_STRIDE", "HAS_MASS"} == asked | {"BLOCK", "PACK"}
    assert {launches.launch_config(v) for v in range(1, 9000)} == {(256, 2), (1024, 4), (4096, 8)}


def test_trl_temperature_may_differ_per_row() -> None:
    logits, target = torch.randn(4, 30), torch.randint(30, (4,))
    temperature = torch.tensor([0.5, 1.0, 2.0, 4.0])
    together = token_logprob(logits, target, temperature=temperature).logp
    apart = [
        token_logprob(logits[i : i + 1], target[i : i + 1], temperature=float(temperature[i])).logp for i in range(4)
    ]
    torch.testing.assert_close(together, torch.cat(apart))


def test_trl_backward_reuses_the_storage_of_the_logits() -> None:
    logits = torch.randn(4, 30)
    middle = (logits.clone().requires_grad_() * 1).requires_grad_()
    grad = torch.autograd.grad(token_logprob(middle, torch.arange(4), inplace_backward=True).logp.sum(), middle)[0]
    assert grad.data_ptr() == middle.data_ptr()


def test_liger_cute_a_frozen_head_gets_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastrl_kernels import _linear_logprob_backward as backward

    shapes = []
    original = backward.matmul_into
    monkeypatch.setattr(
        backward,
        "matmul_into",
        lambda out, a, b, *, add: shapes.append(tuple(out.shape)) or original(out, a, b, add=add),
    )
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(70, 8)
    linear_logprob(hidden, weight, torch.arange(6)).logp.sum().backward()
    assert hidden.grad is not None
    assert set(shapes) == {(6, 8)}
