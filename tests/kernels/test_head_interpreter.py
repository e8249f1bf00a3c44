"""The head's Triton kernels, run by the interpreter, against the float64 twins on awkward shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastrl_kernels import _linear_logprob_kernels as kernels
from fastrl_kernels._linear_logprob_tiles import (
    NO_IGNORE,
    RowTerms,
    TileOptions,
    Upstream,
    differentiate_tile,
    fold_tile,
)
from fastrl_kernels.linear_logprob import linear_logprob, linear_logprob_reference
from fastrl_kernels.token_logprob import token_logprob, token_logprob_reference

pytestmark = pytest.mark.interpreter

WIDTHS = [[1], [255], [256], [257], [1031], [64, 64, 5], [256, 128, 1], [4096 + 3]]  # slabs of one vocabulary


def relative(got: Tensor, want: Tensor) -> float:
    want = want.detach().double()
    return float((got.detach().double() - want).norm() / want.norm().clamp(min=1e-30))


def terms(target: Tensor, temperature: Tensor, entropy: bool = True) -> RowTerms:
    """Outputs are filled with NaN, so that elements that the kernel does not write are detected."""
    n = target.shape[0]
    poison = [torch.full((n,), torch.nan) for _ in range(3)]
    return RowTerms(target, temperature.reciprocal(), poison[0], poison[1], poison[2] if entropy else None)


def fold_in_slabs(s: Tensor, widths: list[int], options: TileOptions, rows: RowTerms) -> None:
    state, first = torch.full((4, s.shape[0]), torch.nan), 0
    for width in widths:
        fold_tile(s[:, first : first + width], first, options, rows, state)
        first += width
    assert first == s.shape[1]


def reference(s: Tensor, target: Tensor, temperature: Tensor, bias: Tensor | None, cap: float | None):
    z = s.double() if bias is None else s.double() + bias.double()
    z = z if cap is None else cap * torch.tanh(z / cap)
    return token_logprob_reference(z, target, temperature=temperature.double(), return_entropy=True)


@pytest.mark.parametrize(("cap", "with_bias"), [(None, False), (3.0, True)])
@pytest.mark.parametrize("widths", WIDTHS, ids=lambda widths: "+".join(map(str, widths)))
def test_kernels_match_the_twin(widths: list[int], cap: float | None, with_bias: bool) -> None:
    n, v = 5, sum(widths)
    s = torch.randn(n, v) * 3
    bias = torch.randn(v) if with_bias else None
    target = torch.randint(v, (n,))
    target[2] = -100
    s[2] = torch.nan
    temperature = torch.rand(n) + 0.5
    options = TileOptions(v, bias, cap, -100)
    rows = terms(target, temperature)
    fold_in_slabs(s, widths, options, rows)
    twin = s.double().requires_grad_()
    want = reference(twin.masked_fill((target == -100)[:, None], 0), target, temperature, bias, cap)
    assert relative(rows.logp, want.logp) < 1e-6
    assert relative(rows.entropy, want.entropy) < 1e-6
    assert rows.logp[2] == rows.entropy[2] == rows.lse[2] == 0

    g, h = torch.randn(n), torch.randn(n)
    g[4] = h[4] = 0
    g[2] = torch.nan  # upstream of an ignored row
    out, first = torch.full((n, v), torch.nan), 0
    for width in widths:
        part = slice(first, first + width)
        differentiate_tile(s[:, part], out[:, part], first, options, rows, Upstream(g, h))
        first += width
    loss = (want.logp * g.nan_to_num().double()).sum() + (want.entropy * h.double()).sum()
    truth = torch.autograd.grad(loss, twin)[0]
    assert relative(out, truth) < 3e-6 if v > 1 else not out.any()
    assert not out[2].any()
    assert not out[4].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_are_rounded_once(dtype: torch.dtype) -> None:
    s = (torch.randn(4, 300) * 3).to(dtype)
    target, temperature = torch.randint(300, (4,)), torch.ones(4)
    options, rows = TileOptions(300, None, None, NO_IGNORE), terms(target, temperature, entropy=False)
    fold_tile(s, 0, options, rows, torch.empty(4, 4))
    up = torch.randn(4)
    twin = s.double().requires_grad_()
    want = reference(twin, target, temperature, None, None)
    truth = torch.autograd.grad(want.logp, twin, up.double())[0]
    differentiate_tile(s, s, 0, options, rows, Upstream(up))
    unit = torch.finfo(dtype).eps / (1 if dtype == torch.bfloat16 else 2)  # the interpreter truncates to bf16
    tiny = torch.finfo(dtype).tiny  # below: fp16 loses bits to subnormals
    assert bool(((s.double() - truth).abs() <= truth.abs() * unit * 1.02 + tiny * 2**-10).all())


def test_a_target_outside_the_vocabulary_gives_nan_and_a_nan_logit_is_not_hidden() -> None:
    s, target = torch.randn(4, 70), torch.tensor([3, 70, -5, 9])
    s[3, 60] = torch.nan
    rows = terms(target, torch.ones(4))
    fold_in_slabs(s, [64, 6], TileOptions(70, None, None, -100), rows)
    assert rows.logp.isnan().tolist() == [False, True, True, True]
    assert rows.entropy is not None
    assert rows.entropy.isnan().tolist() == [False, False, False, True]


def test_forbidden_tokens_weigh_nothing() -> None:
    s, target = torch.randn(3, 600), torch.tensor([599, 300, 301])
    s[:, :300] = -torch.inf
    options, rows = TileOptions(600, None, None, -100), terms(target, torch.ones(3))
    fold_in_slabs(s, [256, 344], options, rows)
    want = token_logprob_reference(s[:, 300:].double(), target - 300, return_entropy=True)
    assert relative(rows.logp, want.logp) < 1e-6
    assert relative(rows.entropy, want.entropy) < 1e-6
    up = torch.tensor([1.0, -2.0, 3.0])
    differentiate_tile(s, s, 0, options, rows, Upstream(up, up))
    assert not s[:, :300].any()
    assert bool(s.isfinite().all())


@pytest.mark.parametrize("widths", [[300], [256, 44], [64, 236]])
@pytest.mark.parametrize("position", [0, 280])
def test_a_confident_target_keeps_its_gradient(position: int, widths: list[int]) -> None:
    """1 - p down to 2e-7 with a relative error of 1e-5, for any position of the target and any slab size."""
    s = torch.randn(4, 300)
    s[:, position] = torch.tensor([10.0, 14.0, 18.0, 22.0])
    target, options = torch.full((4,), position), TileOptions(300, None, None, -100)
    rows = terms(target, torch.ones(4))
    fold_in_slabs(s, widths, options, rows)
    twin = s.double().requires_grad_()
    want = reference(twin, target, torch.ones(4), None, None)
    assert bool(((rows.logp - want.logp).abs() <= 1e-5 * want.logp.abs()).all())
    assert bool(((rows.entropy - want.entropy).abs() <= 1e-5 * want.entropy.abs()).all())
    up = torch.tensor([1.0, -1.0, 0.5, 2.0])
    truth = torch.autograd.grad(want.logp, twin, up.double())[0]
    differentiate_tile(s, s, 0, options, rows, Upstream(up))
    assert bool(((s - truth).abs() <= 1e-5 * truth.abs()).all())


@pytest.mark.parametrize("large", [-200.0, 200.0])
def test_large_logits_keep_their_entropy(large: float) -> None:
    s, target = torch.randn(4, 520) + large, torch.randint(520, (4,))
    rows = terms(target, torch.ones(4))
    fold_in_slabs(s, [256, 264], TileOptions(520, None, None, -100), rows)
    want = token_logprob_reference(s.double(), target, return_entropy=True)
    assert float((rows.logp - want.logp).abs().max()) < 2e-5  # one ulp of the logits themselves
    assert float((rows.entropy - want.entropy).abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("feature", ["plain", "rows", "lora", "all"])
def test_linear_logprob_through_the_kernels(feature: str, dtype: torch.dtype) -> None:
    n, h, v = 7, 8, 131
    hidden, weight = torch.randn(n, h).to(dtype), torch.randn(v, h).to(dtype)
    target = torch.randint(v, (n,))
    target[::4] = -100
    hidden[::4] = torch.nan
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    kwargs: dict = {"scratch_bytes": 8000}
    if feature in ("rows", "all"):
        kwargs["rows"] = torch.tensor([1, 6, 5, 4])
    if feature in ("lora", "all"):
        a, b = torch.randn(2, h).to(dtype).requires_grad_(), torch.randn(v, 2).to(dtype).requires_grad_()
        leaves += [a, b]
        kwargs["lora"] = (a, b, 0.5)
    if feature == "all":
        kwargs |= {
            "softcap": 4.0,
            "temperature": torch.rand(n) + 0.5,
            "bias": torch.randn(v).to(dtype).requires_grad_(),
        }
        leaves.append(kwargs["bias"])
    up = torch.randn(2, n)

    def run(function, tensors: list[Tensor], options: dict) -> list[Tensor]:
        result = function(tensors[0], tensors[1], target, return_entropy=True, **options)
        loss = (result.logp * up[0].to(result.logp.dtype)).sum() + (result.entropy * up[1].to(result.logp.dtype)).sum()
        return [result.logp, result.entropy, *torch.autograd.grad(loss, tensors)]

    twins = [leaf.detach().double().requires_grad_() for leaf in leaves]
    twin_options = {key: value for key, value in kwargs.items() if key != "scratch_bytes"}
    if "lora" in kwargs:
        twin_options["lora"] = (twins[2], twins[3], 0.5)
    if "bias" in kwargs:
        twin_options["bias"] = twins[-1]
    limit = 5e-6 if dtype == torch.float32 else 3e-2
    for mine, truth in zip(
        run(linear_logprob, leaves, kwargs), run(linear_logprob_reference, twins, twin_options), strict=True
    ):
        assert relative(mine, truth) < limit


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_token_logprob_through_the_kernels(layout: str, inplace: bool) -> None:
    logits = torch.randn(6, 301) if layout == "rows" else torch.randn(301, 6).t()
    target = torch.randint(301, (12,))[::2]
    target[3] = -100
    leaf = logits.detach().requires_grad_()
    got = token_logprob(leaf * 1, target, return_entropy=True, temperature=0.8, inplace_backward=inplace)
    twin = logits.detach().double().requires_grad_()
    want = token_logprob_reference(twin, target, return_entropy=True, temperature=0.8)
    assert relative(got.logp, want.logp) < 1e-6
    grad = torch.autograd.grad(got.logp.sum() + got.entropy.sum(), leaf)[0]  # stride-0 upstream gradients
    assert relative(grad, torch.autograd.grad(want.logp.sum() + want.entropy.sum(), twin)[0]) < 3e-6


def test_no_rows_and_no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "linear_logprob_fold_kernel", None)
    monkeypatch.setattr(kernels, "linear_logprob_gradient_kernel", None)
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.zeros(9, 4, requires_grad=True)
    result = linear_logprob(hidden, weight, torch.zeros(0).long(), return_entropy=True)
    assert result.logp.shape == (0,)
    grads = torch.autograd.grad(result.logp.sum(), [hidden, weight])
    assert grads[1].shape == (9, 4)
    assert not grads[1].any()
