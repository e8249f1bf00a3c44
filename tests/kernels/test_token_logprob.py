"""token_logprob against its float64 twin: values, gradients, masks, in-place backward, registration."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastrl_kernels.token_logprob import token_logprob, token_logprob_reference

TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}


def relative(got: Tensor, want: Tensor) -> float:
    want = want.detach().double()
    return float((got.detach().double() - want).norm() / want.norm().clamp(min=1e-30))


def upstream(n: int) -> Tensor:
    return torch.randn(2, n, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def loss_of(result) -> Tensor:
    up = upstream(result.logp.shape[0])
    loss = (result.logp.double() * up[0]).sum()
    return loss if result.entropy is None else loss + (result.entropy.double() * up[1]).sum()


def case(n: int, v: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    target = torch.randint(v, (n,))
    target[2::5] = -100
    return (torch.randn(n, v, dtype=torch.float64) * 4).to(dtype), target


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("temperature", [1.0, 0.6, "rows"])
def test_values_and_gradients_match_float64(
    temperature: float | str, dtype: torch.dtype, entropy: bool, inplace: bool
) -> None:
    logits, target = case(13, 2100, dtype)
    divisor = torch.rand(13) + 0.5 if isinstance(temperature, str) else temperature
    leaf = logits.clone().requires_grad_()
    got = token_logprob(
        leaf * 1, target, temperature=divisor, return_entropy=entropy, inplace_backward=inplace
    )  # fmt: skip
    grad = torch.autograd.grad(loss_of(got), leaf)[0]
    twin = logits.double().requires_grad_()
    exact = divisor.double() if isinstance(divisor, Tensor) else divisor
    want = token_logprob_reference(twin, target, temperature=exact, return_entropy=entropy)
    truth = torch.autograd.grad(loss_of(want), twin)[0]
    assert relative(got.logp, want.logp) < (1e-13 if dtype == torch.float64 else 1e-6)
    if entropy:
        assert relative(got.entropy, want.entropy) < (1e-13 if dtype == torch.float64 else 1e-6)
    assert grad.dtype == dtype
    assert relative(grad, truth) < TOLERANCE[dtype]


@pytest.mark.parametrize(("n", "v"), [(0, 5), (1, 1), (3, 2), (7, 1023), (2, 1024), (2, 1025)])
def test_awkward_shapes(n: int, v: int) -> None:
    logits, target = case(n, v)
    leaf = logits.clone().requires_grad_()
    got = token_logprob(leaf, target, return_entropy=True)
    want = token_logprob_reference(logits.double(), target, return_entropy=True)
    torch.testing.assert_close(got.logp, want.logp.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.entropy, want.entropy.float(), rtol=1e-5, atol=1e-6)
    assert torch.autograd.grad(loss_of(got), leaf)[0].shape == (n, v)


def test_gradcheck() -> None:
    logits, target = case(6, 11, torch.float64)
    temperature = torch.rand(6) + 0.5
    leaf = logits.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: token_logprob(x, target, temperature=temperature, return_entropy=True)[:2], (leaf,)
    )


@pytest.mark.parametrize("view", ["transposed", "strided", "expanded"])
def test_strides_of_every_kind(view: str) -> None:
    made = {
        "transposed": torch.randn(40, 9).t(),
        "strided": torch.randn(18, 80)[::2, ::2],
        "expanded": torch.randn(1, 40).expand(9, 40),
    }[view]
    target = torch.randint(40, (18,))[::2]
    leaf = made.detach().requires_grad_()
    got = token_logprob(leaf, target)
    torch.testing.assert_close(got.logp, token_logprob_reference(made, target).logp)
    grad = torch.autograd.grad(got.logp.sum(), leaf)[0]  # upstream gradient of stride 0
    want = torch.nn.functional.one_hot(target, 40) - made.softmax(1)
    torch.testing.assert_close(grad, want)


def test_inplace_backward_writes_into_the_logits() -> None:
    logits, target = case(6, 40)
    leaf = logits.clone().requires_grad_()
    middle = leaf * 1
    middle.retain_grad()
    up = torch.randn(6)
    token_logprob(middle, target, inplace_backward=True).logp.backward(up)
    want = torch.autograd.grad(token_logprob(leaf, target).logp, leaf, up)[0]
    torch.testing.assert_close(leaf.grad, want)
    torch.testing.assert_close(middle.detach(), want)


def test_inplace_backward_on_a_strided_view() -> None:
    logits, target = case(6, 40)
    leaf = logits.clone().requires_grad_()
    up = torch.randn(6)
    token_logprob((leaf * 1).t().contiguous().t(), target, inplace_backward=True).logp.backward(up)
    torch.testing.assert_close(leaf.grad, torch.autograd.grad(token_logprob(leaf, target).logp, leaf, up)[0])


def test_inplace_backward_is_noticed_by_other_users_of_the_logits() -> None:
    leaf = torch.randn(3, 5, requires_grad=True)
    middle = leaf * 1
    other = middle.square().sum()
    token_logprob(middle, torch.tensor([0, 1, 2]), inplace_backward=True).logp.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_inplace_backward_refuses_expanded_logits() -> None:
    leaf = torch.randn(1, 5, requires_grad=True)
    with pytest.raises(ValueError, match="inplace_backward: logits are an expanded view"):
        token_logprob(leaf.expand(3, 5), torch.tensor([0, 1, 2]), inplace_backward=True)


def test_poisoned_ignored_rows_are_harmless() -> None:
    logits, target = case(12, 33)
    ignored = target == -100
    logits[ignored] = torch.nan
    leaf = logits.requires_grad_()
    result = token_logprob(leaf, target, return_entropy=True)
    up = torch.randn(12)
    up[ignored] = torch.nan
    grad = torch.autograd.grad([result.logp, result.entropy], leaf, [up, up])[0]
    assert not result.logp[ignored].any()
    assert not result.entropy[ignored].any()
    assert not grad[ignored].any()
    assert bool(grad.isfinite().all())


def test_nan_logits_are_not_hidden() -> None:
    logits, target = case(4, 33)
    logits[1, 20] = torch.nan
    result = token_logprob(logits, target.clamp(min=0), return_entropy=True)
    assert result.logp.isnan().tolist() == [False, True, False, False]
    assert result.entropy.isnan().tolist() == [False, True, False, False]


def test_huge_logits_do_not_overflow() -> None:
    logits = torch.tensor([[3e38, -3e38, 0.0], [-3e38, 0.0, 0.0], [90.0, 0.0, -90.0]])
    result = token_logprob(logits, torch.tensor([0, 1, 0]), return_entropy=True)
    torch.testing.assert_close(result.logp, torch.tensor([0.0, -0.6931472, 0.0]))
    torch.testing.assert_close(result.entropy, torch.tensor([0.0, 0.6931472, 0.0]))


def test_opcheck() -> None:
    logits, target = case(4, 21)
    temperature = torch.rand(4) + 0.5
    for entropy in (False, True):
        for op in (torch.ops.fastrl.token_logprob, torch.ops.fastrl.token_logprob_consuming):
            # the consuming op rewrites its input in the backward, which the checks that rerun it cannot have
            tests = ("test_schema", "test_faketensor") if op is torch.ops.fastrl.token_logprob_consuming else None
            leaf = logits.clone().requires_grad_()
            arguments = (leaf, target, temperature, 1.0, -100, entropy)
            if tests is None:
                torch.library.opcheck(op.default, arguments)
            else:
                torch.library.opcheck(op.default, arguments, test_utils=tests)
    vector = torch.randn(4)
    rest = (target, temperature, 1.0, -100, vector, vector, vector, vector, vector)
    torch.library.opcheck(torch.ops.fastrl.token_logprob_backward.default, (logits, *rest))
    torch.library.opcheck(torch.ops.fastrl.token_logprob_backward_.default, (logits.clone(), *rest))


@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_without_graph_break(inplace: bool) -> None:
    logits, target = case(5, 31)
    leaf = logits.requires_grad_()

    def step(x: Tensor) -> Tensor:
        result = token_logprob(x * 2, target, return_entropy=True, inplace_backward=inplace)
        assert result.entropy is not None
        return (result.logp + result.entropy).sum()

    want = torch.autograd.grad(step(leaf), leaf)[0]
    got = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(leaf), leaf)[0]
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(4)}, ValueError, r"logits: expected shape \[any, any\], got \[4\]"),
        ({"logits": torch.zeros(4, 0)}, ValueError, "logits: expected at least one column"),
        ({"logits": torch.zeros(4, 9).int()}, TypeError, "logits: expected dtype float32, bfloat16"),
        ({"target": torch.zeros(3).long()}, ValueError, r"target: expected shape \[4\], got \[3\]"),
        ({"target": torch.tensor([0, 0, 9, 0])}, ValueError, "target: row 2 is 9, expected 0..8"),
        ({"temperature": -2.0}, ValueError, "temperature: expected a finite number > 0 .* got -2.0"),
    ],
)
def test_bad_input_is_named(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        token_logprob(**({"logits": torch.zeros(4, 9), "target": torch.zeros(4).long()} | change))


@pytest.mark.gpu
def test_gpu_inplace_backward_allocates_nothing_of_the_logits_size() -> None:
    logits = torch.randn(512, 50_001, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(50_001, (512,), device="cuda")
    middle = logits * 1
    result = token_logprob(middle, target, inplace_backward=True)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(result.logp.sum(), middle)
    assert torch.cuda.max_memory_allocated() - before < middle.numel()
