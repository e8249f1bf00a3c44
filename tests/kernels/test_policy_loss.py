"""The clipped policy loss: against autograd through the textbook formula, exact zeros, boundaries, extremes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastrl_kernels._policy_options import PolicyOptions, PolicyTensors
from fastrl_kernels._policy_rows import PolicyRows, policy_row_terms, policy_totals
from fastrl_kernels.policy_loss import _policy_loss_op, policy_loss, policy_loss_reference
from fastrl_kernels.token_weights import token_weights

KL = ["k1", "k2", "k3"]
BOOK_OPTIONS = [
    {},
    {"beta": 0.3, "kl": "k1"},
    {"beta": 0.3, "kl": "k2", "dual_clip": 1.3},
    {"beta": 0.3, "kl": "k3", "clip_low": 0.1, "clip_high": 0.28},
    {"beta": 0.3, "kl": "k3", "ratio": "sequence", "clip_low": 0.05, "clip_high": 0.02},
    {"ratio": "sequence", "clip_low": 0.02, "clip_high": 0.02, "dual_clip": 1.05},
]
CORRECTED = [
    {"loss": "cispo", "clip_high": 0.1, "beta": 0.3},
    {"loss": "cispo", "ratio": "sequence", "clip_low": 0.02, "importance": "mask", "importance_cap": 1.1},
    {"loss": "sapo", "tau_positive": 2.0},
    {"loss": "sapo", "ratio": "sequence", "importance": "truncate", "importance_level": "sequence"},
    {"importance": "truncate", "importance_cap": 1.2, "beta": 0.3, "kl": "k2"},
    {"importance": "mask", "importance_cap": 1.05, "importance_level": "sequence", "dual_clip": 1.3},
    {"ratio": "sequence", "importance": "truncate", "importance_cap": 1.1},
]
OPTIONS = BOOK_OPTIONS + CORRECTED


def _problem(n: int, c: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    """Unsorted rows, every fourth one masked, with NaN in masked positions."""
    generator = torch.Generator().manual_seed(1000 * seed + n)
    logp = -3 * torch.rand(n, generator=generator)
    old = logp + 0.3 * torch.randn(n, generator=generator)
    ref = logp + 0.3 * torch.randn(n, generator=generator)
    advantage = torch.randn(c, generator=generator)
    completion = torch.randint(0, max(c, 1), (n,), generator=generator)
    weight = torch.rand(n, generator=generator) + 0.1
    masked = torch.arange(n) % 4 == 3
    weight[masked] = 0
    sampler = old + 0.2 * torch.randn(n, generator=generator)
    for vector in (logp, old, ref, sampler):
        vector[masked] = math.nan
    sampler[5:6] = math.nan  # an unmasked row without a sampler log-prob
    tensors = {"logp": logp, "old_logp": old, "ref_logp": ref, "advantage": advantage, "weight": weight}
    tensors["sampler_logp"] = sampler
    return {name: tensor.to(dtype) for name, tensor in tensors.items()} | {"completion": completion}


def _textbook(p: dict[str, Tensor], logp: Tensor, **options) -> Tensor:
    """PPO, dual clip, KL and GSPO with torch's clamp, min and autograd, over the live rows only."""
    o = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None, "beta": 0.0, "kl": "k3", "ratio": "token"} | options
    live = p["weight"] != 0
    lp, old, ref, w, ids = (t[live] for t in (logp, p["old_logp"], p["ref_logp"], p["weight"], p["completion"]))
    advantage, log_ratio = p["advantage"][ids], lp - old
    if o["ratio"] == "sequence":
        log_ratio = torch.stack([log_ratio[ids == i].mean() for i in ids])
    ratio = log_ratio.exp()
    loss = -torch.min(ratio * advantage, ratio.clamp(1 - o["clip_low"], 1 + o["clip_high"]) * advantage)
    if o["dual_clip"] is not None:
        loss = torch.where(advantage < 0, torch.min(loss, -advantage * o["dual_clip"]), loss)
    x = ref - lp
    kl = {"k1": -x, "k2": x * x / 2, "k3": x.exp() - x - 1}[o["kl"]]
    return (w * (loss + o["beta"] * kl)).sum()


def _call(function, p: dict[str, Tensor], logp: Tensor, **options):
    out = ("logp", "advantage", "completion", *(() if "importance" in options else ("sampler_logp",)))
    rest = {key: value for key, value in p.items() if key not in out}
    return function(logp, p["advantage"], p["completion"], **(rest | options))


def _grad(function, p: dict[str, Tensor], **options) -> tuple[Tensor, Tensor]:
    logp = p["logp"].clone().requires_grad_()
    loss = _call(function, p, logp, **options)
    loss = loss if isinstance(loss, Tensor) else loss.loss
    return loss.detach(), torch.autograd.grad(loss, logp)[0]


@pytest.mark.parametrize("options", BOOK_OPTIONS)
@pytest.mark.parametrize("function", [policy_loss, policy_loss_reference])
def test_equals_the_textbook_under_autograd(function, options):
    p = _problem(61, 7)
    loss, grad = _grad(function, p, **options)
    want, want_grad = _grad(lambda logp, a, c, **o: _textbook(p, logp, **options), p)
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(grad, torch.nan_to_num(want_grad), rtol=1e-10, atol=1e-13)
    assert (grad[p["weight"] == 0] == 0).all()


@pytest.mark.parametrize("numbers", [float, torch.tensor])
@pytest.mark.parametrize("options", OPTIONS)
def test_equals_the_reference(options, numbers):
    p = _problem(61, 7)
    given = {key: numbers(value) if isinstance(value, float) else value for key, value in options.items()}
    logp = [p["logp"].clone().requires_grad_() for _ in range(2)]
    got, want = _call(policy_loss, p, logp[0], **given), _call(policy_loss_reference, p, logp[1], **options)
    bound = 1e-12 if numbers is float else 1e-6
    torch.testing.assert_close(tuple(got), tuple(want), rtol=bound, atol=bound)
    grads = [torch.autograd.grad(out.loss, x)[0] for out, x in zip((got, want), logp, strict=True)]
    torch.testing.assert_close(grads[0], grads[1], rtol=bound, atol=bound)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck(options):
    p = {name: t[:12] if name != "advantage" else t for name, t in _problem(16, 3).items()}
    p["logp"] = torch.nan_to_num(p["logp"], nan=-1.0)
    for function in (policy_loss, policy_loss_reference):
        if options.get("loss") == "cispo":  # its gradient is not the derivative of its value
            continue
        torch.autograd.gradcheck(
            lambda logp, f=function: _call(f, p, logp, **options).loss, p["logp"].clone().requires_grad_()
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS)
def test_precision_of_the_inputs_is_the_only_loss(dtype, options):
    p = _problem(301, 9, dtype)
    exact = {name: t.double() if t.is_floating_point() else t for name, t in p.items()}
    (loss, grad), (want, want_grad) = _grad(policy_loss, p, **options), _grad(policy_loss, exact, **options)
    assert loss.dtype == torch.float32
    assert grad.dtype == dtype
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad, want_grad.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)


def _rows(logp: Tensor, advantage, completion, weight, old_logp=None, ref_logp=None, **options) -> PolicyRows:
    tensors = PolicyTensors(advantage, completion, weight, old_logp, ref_logp)
    return policy_row_terms(logp, tensors, PolicyOptions(**options))


def _one(logp: float, old: float, advantage: float, dtype=torch.float64, **options) -> tuple[float, float]:
    p = torch.tensor([logp], dtype=dtype, requires_grad=True)
    old_logp, weight = torch.tensor([old], dtype=dtype), torch.ones(1, dtype=dtype)
    ids = torch.zeros(1, dtype=torch.int64)
    loss = policy_loss(p, torch.tensor([advantage], dtype=dtype), ids, old_logp=old_logp, weight=weight, **options).loss
    return loss.item(), torch.autograd.grad(loss, p)[0].item()


def _ratio(log_ratio: float, dtype: torch.dtype) -> float:
    p, zero = torch.tensor([log_ratio], dtype=dtype), torch.zeros(1, dtype=dtype)
    return policy_loss(p, zero, torch.zeros(1, dtype=torch.int64), old_logp=zero).ratio_max.item()


def _check_boundaries(dtype):
    # the bounds are exactly the ratios that this backend computes, so equality is exact
    up, down = _ratio(0.25, dtype) - 1, 1 - _ratio(-0.25, dtype)
    step = 1e-4
    for advantage in (1.5, -1.5):
        for ratio in ("token", "sequence"):
            bounds = {"clip_low": down, "clip_high": up, "ratio": ratio}
            above, below = _one(0.25, 0, advantage, dtype, **bounds), _one(-0.25, 0, advantage, dtype, **bounds)
            assert above[1] == pytest.approx(-advantage * (1 + up))  # exactly on a bound: the gradient flows
            assert below[1] == pytest.approx(-advantage * (1 - down))
            past, under = (
                _one(0.25 + step, 0, advantage, dtype, **bounds),
                _one(-0.25 - step, 0, advantage, dtype, **bounds),
            )
            assert (past[1] == 0) == (advantage > 0)
            assert (under[1] == 0) == (advantage < 0)
        assert _one(-1.0, -1.0, advantage, dtype, clip_low=0, clip_high=0) == (
            -advantage,
            -advantage,
        )  # ratio 1, no room
    assert _one(0.25, 0, -1.0, dtype, dual_clip=1 + up)[1] == pytest.approx(1 + up)
    assert _one(0.25 + step, 0, -1.0, dtype, dual_clip=1 + up) == (pytest.approx(1 + up), 0)


def test_clip_boundaries():
    _check_boundaries(torch.float64)


def _check_extremes(dtype):
    for advantage in (2.0, -2.0):
        for gap in (1e4, -1e4, 21.0, -21.0):
            loss, grad = _one(gap, 0.0, advantage, dtype)
            assert math.isfinite(loss)
            assert grad == 0  # beyond the clamp of the log-ratio
    for kl in KL:
        for x in (300.0, -300.0):
            p, zero = torch.tensor([-x], dtype=dtype, requires_grad=True), torch.zeros(1, dtype=torch.int64)
            out = policy_loss(
                p, torch.zeros(1, dtype=dtype), zero, ref_logp=torch.zeros(1, dtype=dtype), beta=0.5, kl=kl
            )
            slope = torch.autograd.grad(out.loss, p)[0].item()
            assert math.isfinite(out.loss.item())
            assert slope > 0 if kl == "k1" else (slope < 0) == (x > 0)  # towards the reference


def test_extremes_stay_finite():
    _check_extremes(torch.float64)


def _check_k3_tangent(dtype):
    """Beyond x = 20 the estimator is a line of slope exp(20) - 1, in its value and its gradient."""
    x = torch.tensor([20.0, 24.0, 30.0], dtype=dtype)
    ones, zeros = torch.ones(3, dtype=dtype), torch.zeros(3, dtype=dtype)
    rows = _rows(-x, zeros, torch.arange(3), ones, ref_logp=zeros, beta=1.0, kl="k3")
    slope = math.expm1(20)
    assert rows.loss.tolist() == pytest.approx([slope - 20 + slope * (v - 20) for v in (20, 24, 30)], rel=1e-5)
    assert rows.dlogp.tolist() == pytest.approx([-slope] * 3, rel=1e-5)


def test_k3_goes_on_along_its_tangent():
    _check_k3_tangent(torch.float64)


def _check_small_kl(dtype):
    x = torch.logspace(-5, 0.5, 40, dtype=torch.float64).to(dtype)
    x = torch.cat([x, -x])
    ids = torch.arange(80)
    for kl in KL:
        rows = _rows(-x, torch.zeros(80), ids, torch.ones(80), ref_logp=torch.zeros(80), beta=1.0, kl=kl)
        exact = x.double()
        value = {"k1": -exact, "k2": exact**2 / 2, "k3": torch.expm1(exact) - exact}[kl]
        slope = {"k1": torch.ones_like(exact), "k2": -exact, "k3": -torch.expm1(exact)}[kl]
        torch.testing.assert_close(rows.loss.double(), value, rtol=1e-6, atol=0)
        torch.testing.assert_close(rows.dlogp.double(), slope, rtol=1e-6, atol=0)


def test_small_kl_does_not_cancel():
    _check_small_kl(torch.float32)


def test_zeros_are_exact():
    p = _problem(200, 5)
    p["advantage"][2] = 0
    _, grad = _grad(policy_loss, p, clip_low=0.1, clip_high=0.1)
    ratio, a = (p["logp"] - p["old_logp"]).exp(), p["advantage"][p["completion"]]
    stopped = (a == 0) | ((a > 0) & (ratio > 1.1)) | ((a < 0) & (ratio < 0.9)) | (p["weight"] == 0)
    assert 20 < stopped.sum() < 180
    assert torch.equal(grad == 0, stopped)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_no_rows_and_all_masked_give_zero(ratio):
    for n in (0, 5):
        p = _problem(n, 2)
        p["weight"] = torch.zeros(n, dtype=torch.float64)
        p["logp"] = torch.full((n,), math.nan, dtype=torch.float64)
        loss, grad = _grad(policy_loss, p, beta=0.1, ratio=ratio)
        assert loss == 0
        assert (grad == 0).all()
        assert all(t == 0 for t in _call(policy_loss, p, p["logp"], beta=0.1, ratio=ratio))
    empty = policy_loss(torch.empty(0), torch.empty(0), torch.empty(0, dtype=torch.int64), ratio=ratio)
    assert empty.loss == 0


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_on_policy_is_the_detached_logp(ratio):
    p = _problem(40, 4)
    p["old_logp"] = p["logp"].clone()
    explicit = _grad(policy_loss, p, ratio=ratio)
    implicit = _grad(policy_loss, p, ratio=ratio, old_logp=None)
    torch.testing.assert_close(implicit[0], explicit[0])
    torch.testing.assert_close(implicit[1], explicit[1])
    if ratio == "token":
        torch.testing.assert_close(implicit[1], -p["weight"] * p["advantage"][p["completion"]])


def test_metrics_are_plain_means_without_gradient():
    p = _problem(50, 6)
    logp = p["logp"].clone().requires_grad_()
    out = _call(policy_loss, p, logp, kl="k2", clip_low=0.1, clip_high=0.2)
    live = p["weight"] != 0
    ratio, a = (p["logp"] - p["old_logp"]).exp()[live], p["advantage"][p["completion"]][live]
    assert out.loss.requires_grad
    assert not any(metric.requires_grad for metric in out[1:])
    torch.testing.assert_close(out.kl, ((p["ref_logp"] - p["logp"])[live] ** 2 / 2).mean())
    torch.testing.assert_close(out.clip_low_fraction, ((a < 0) & (ratio < 0.9)).double().mean())
    torch.testing.assert_close(out.clip_high_fraction, ((a > 0) & (ratio > 1.2)).double().mean())
    torch.testing.assert_close(out.ratio_mean, ratio.mean())
    torch.testing.assert_close(out.ratio_max, ratio.max())


def test_straight_through_kl_gradient():
    p = _problem(30, 3)
    base, value = _grad(policy_loss, p), _grad(policy_loss, p, beta=0.2, kl="k3")
    through, k2 = _grad(policy_loss, p, beta=0.2, kl="k3", kl_gradient="k2"), _grad(policy_loss, p, beta=0.2, kl="k2")
    torch.testing.assert_close(through[0], value[0])
    torch.testing.assert_close(through[1], k2[1])
    assert not torch.allclose(base[1], k2[1])


@pytest.mark.parametrize("aggregate", ["token", "sequence", "constant"])
def test_default_weights_and_split_into_micro_batches(aggregate):
    n, c = 60, 6
    p = _problem(n, c)
    p["completion"] = p["completion"].sort().values
    for name in ("logp", "old_logp", "ref_logp"):
        p[name] = torch.nan_to_num(p[name], nan=-1.0)
    del p["weight"]
    normalizer = 50.0 if aggregate == "constant" else None
    step = token_weights(p["completion"], aggregate=aggregate, normalizer=normalizer, dtype=torch.float64)
    for ratio in ("token", "sequence"):
        whole = _grad(policy_loss, p, aggregate=aggregate, normalizer=normalizer, ratio=ratio, beta=0.1)
        torch.testing.assert_close(_grad(policy_loss, p | {"weight": step}, ratio=ratio, beta=0.1), whole)
        cut = int((p["completion"] < 3).sum())
        parts = []
        for rows in (slice(0, cut), slice(cut, n)):
            part = {name: t[rows] if name != "advantage" else t for name, t in (p | {"weight": step}).items()}
            parts.append(_grad(policy_loss, part, ratio=ratio, beta=0.1))
        torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0])
        torch.testing.assert_close(torch.cat([parts[0][1], parts[1][1]]), whole[1])


def _check_chunks(dtype):
    p = _problem(700, 9, dtype)
    advantage, _ = p.pop("advantage"), p.pop("sampler_logp")

    def rows_of(rows: slice):
        part = {name: tensor[rows] for name, tensor in p.items()}
        return _rows(advantage=advantage, beta=0.1, **part)

    whole = rows_of(slice(None))
    chunks = [rows_of(slice(a, b)) for a, b in ((0, 300), (300, 301), (301, 301), (301, 700))]
    assert torch.equal(torch.cat([chunk.dlogp for chunk in chunks]), whole.dlogp)
    assert torch.equal(torch.cat([chunk.loss for chunk in chunks]), whole.loss)
    split, full = policy_totals(torch.cat([chunk.partials for chunk in chunks])), policy_totals(whole.partials)
    torch.testing.assert_close(split[0], full[0])
    torch.testing.assert_close(split[1], full[1])


def test_rows_of_chunks_are_the_rows_of_the_whole():
    _check_chunks(torch.float64)


def test_layouts_and_upstream_gradients():
    p = _problem(33, 4)
    loss, grad = _grad(policy_loss, p, beta=0.1)
    spread = {name: torch.stack([t, t], 1)[:, 0] if name != "advantage" else t for name, t in p.items()}
    spread["completion"] = spread["completion"].int()
    torch.testing.assert_close(_grad(policy_loss, spread, beta=0.1), (loss, grad))
    logp = p["logp"].clone().requires_grad_()
    upstream = (_call(policy_loss, p, logp, beta=0.1).loss.expand(3) * torch.tensor([1.0, -2.0, 4.0])).sum()
    torch.testing.assert_close(torch.autograd.grad(upstream, logp)[0], 3 * grad)


def test_padding_rows_are_not_looked_at():
    p = _problem(9, 2)
    p["completion"][:2] = -1
    live = {name: t[2:] if name != "advantage" else t for name, t in p.items()}
    torch.testing.assert_close(_grad(policy_loss, p)[0], _grad(policy_loss, live)[0])
    assert (_grad(policy_loss, p)[1][:2] == 0).all()


def test_same_bits_twice():
    p = _problem(999, 12, torch.float32)
    first, second = _grad(policy_loss, p, beta=0.1), _grad(policy_loss, p, beta=0.1)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_op_is_well_registered(ratio):
    p = _problem(17, 3, torch.float32)
    logp = torch.nan_to_num(p["logp"], nan=-1.0).requires_grad_()
    full = (logp, p["advantage"], p["completion"], p["weight"], p["old_logp"].nan_to_num(), p["ref_logp"].nan_to_num())
    told = PolicyOptions(dual_clip=3.0, beta=0.1, ratio=ratio, importance="mask")
    torch.library.opcheck(_policy_loss_op, (*full, full[4] + 0.1, None, *told))
    torch.library.opcheck(_policy_loss_op, (*full, None, torch.ones(7).double(), *told._replace(importance=None)))
    torch.library.opcheck(_policy_loss_op, (*full[:4], None, None, None, None, *PolicyOptions(kl="k1", ratio=ratio)))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gate)])
def test_compiles_into_one_graph(backend):
    p = _problem(17, 3, torch.float32)
    for name in ("logp", "old_logp", "ref_logp"):
        p[name] = torch.nan_to_num(p[name], nan=-1.0)
    del p["weight"]

    def step(logp, advantage, completion, old_logp, ref_logp):
        out = policy_loss(
            logp, advantage, completion, old_logp=old_logp, ref_logp=ref_logp, aggregate="sequence", beta=0.1
        )
        return out.loss * 2, out.ratio_max

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    grads = []
    for function in (step, compiled):
        logp = p["logp"].clone().requires_grad_()
        loss, _ = function(logp, p["advantage"], p["completion"], p["old_logp"], p["ref_logp"])
        grads.append((loss.detach(), torch.autograd.grad(loss, logp)[0]))
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (ValueError, r"logp: expected shape \[N\] or \[C, L\], got \[4, 1, 1\]", {"logp": torch.ones(4, 1, 1)}),
        (ValueError, r"completion: expected shape \[4, 1\], got \[4\]", {"logp": torch.ones(4, 1)}),
        (TypeError, "logp: expected dtype .* got int64", {"logp": torch.ones(4, dtype=torch.int64)}),
        (ValueError, r"old_logp: expected shape \[4\], got \[3\]", {"old_logp": torch.ones(3)}),
        (ValueError, r"weight: expected shape \[4\]", {"weight": torch.ones(5)}),
        (TypeError, "weight: expected dtype .* got bool", {"weight": torch.ones(4, dtype=torch.bool)}),
        (TypeError, "completion: expected dtype int64, int32, got float32", {"completion": torch.zeros(4)}),
        (ValueError, "completion: id 3 is out of range, there are 2", {"completion": torch.full((4,), 3)}),
        (ValueError, "ref_logp: needed because beta is not 0", {"ref_logp": None, "beta": 0.1}),
        (ValueError, "normalizer: only without weight", {"normalizer": 3}),
        (ValueError, "clip_low: expected >= 0, got -0.1", {"clip_low": -0.1}),
        (ValueError, "dual_clip: expected > 1 or None, got 1.0", {"dual_clip": 1.0}),
        (ValueError, "kl: expected one of k1, k2, k3, got 'k4'", {"kl": "k4"}),
        (ValueError, "kl_gradient: expected one of value, k2", {"kl_gradient": "k1"}),
        (ValueError, "importance, sampler_logp: give both or neither", {"importance": "mask"}),
        (ValueError, "importance_cap: expected > 0, got 0", {"importance_cap": 0}),
        (ValueError, "beta: expected a finite number >= 0, got -1.0", {"beta": torch.tensor(-1.0)}),
        (ValueError, "ref_logp: needed because beta is not 0", {"ref_logp": None, "beta": torch.tensor(0.1)}),
        (ValueError, r"clip_low: expected shape \[\], got \[1\]", {"clip_low": torch.ones(1)}),
        (ValueError, "loss: expected one of clip, cispo, sapo, got 'ppo'", {"loss": "ppo"}),
        (ValueError, "dual_clip: only read with loss='clip'", {"loss": "sapo", "dual_clip": 3.0}),
        (TypeError, "unexpected keyword argument", {"clip": 0.2}),
        (ValueError, "ratio: expected one of token, sequence, got 'group'", {"ratio": "group"}),
    ],
)
def test_bad_arguments_are_named(error, match, change):
    good = _problem(4, 2, torch.float32) | {"weight": torch.ones(4), "sampler_logp": None}
    with pytest.raises(error, match=match):
        policy_loss(**(good | change))


@pytest.fixture
def poisoned(monkeypatch):
    """torch.empty gives NaN, so that an element that a kernel does not write is detected."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(math.nan))


@pytest.mark.interpreter
@pytest.mark.parametrize("n", [1, 257, 521])
@pytest.mark.parametrize("options", OPTIONS)
def test_kernel_equals_float64(poisoned, n, options):
    dtype = torch.float32 if n != 257 else torch.bfloat16
    p = _problem(n, 5, dtype)
    exact = {name: t.double() if t.is_floating_point() else t for name, t in p.items()}
    (loss, grad), (want, want_grad) = _grad(policy_loss, p, **options), _grad(policy_loss_reference, exact, **options)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), want_grad, rtol=max(1e-5, torch.finfo(dtype).eps), atol=1e-6)
    metrics = _call(policy_loss, p, p["logp"], **options)[1:]
    wanted = _call(policy_loss_reference, exact, exact["logp"], **options)[1:]
    torch.testing.assert_close([m.double() for m in metrics], list(wanted), rtol=1e-5, atol=1e-6)


@pytest.mark.interpreter
def test_kernel_on_policy_padding_and_layouts(poisoned):
    p = _problem(300, 5, torch.float32)
    p["completion"][:7] = -1
    p = {name: torch.stack([t, t], 1)[:, 0] if name != "advantage" else t for name, t in p.items()}
    for options in ({"old_logp": None, "ref_logp": None}, {"old_logp": None, "ratio": "sequence"}):
        got, want = _grad(policy_loss, p, **options), _grad(policy_loss_reference, p, **options)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.interpreter
@pytest.mark.parametrize("n", [0, 5])
def test_kernel_without_live_rows(poisoned, n):
    p = _problem(n, 2, torch.float32) | {"weight": torch.zeros(n)}
    assert all(value == 0 for value in _call(policy_loss, p, p["logp"], beta=0.1))
    assert (_grad(policy_loss, p, beta=0.1)[1] == 0).all()


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "check", [_check_boundaries, _check_extremes, _check_k3_tangent, _check_small_kl, _check_chunks]
)
def test_kernel_at_the_edges(poisoned, check):
    check(torch.float32)
