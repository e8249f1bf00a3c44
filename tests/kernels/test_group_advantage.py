"""Group advantages against Python's statistics, exact zeros, ragged and unsorted groups, and the interpreter."""

from __future__ import annotations

import statistics

import pytest
import torch

from fastrl_kernels.group_advantage import _group_advantage_op, group_advantage, group_advantage_reference

OPTIONS = [(b, s, u) for b in ("mean", "leave_one_out") for s in ("std", "none") for u in (True, False)]


def _oracle(rewards, ids, n_groups, baseline, scale, unbiased, eps):
    """Advantage, mean, std and constant by lists; groups are given by id, in any order."""
    advantage, mean, std, constant = [0.0] * len(ids), [], [], []
    for g in range(n_groups):
        rows = [i for i, id_ in enumerate(ids) if id_ == g]
        values = [rewards[i] for i in rows]
        mean.append(statistics.fmean(values) if values else 0.0)
        constant.append(len(set(values)) <= 1)
        spread = statistics.stdev if unbiased else statistics.pstdev
        std.append(0.0 if constant[-1] else spread(values))
        for i in rows:
            others = [rewards[j] for j in rows if j != i]
            base = mean[-1] if baseline == "mean" else statistics.fmean(others) if others else rewards[i]
            advantage[i] = 0.0 if constant[-1] else (rewards[i] - base) / (std[-1] + eps if scale == "std" else 1)
    return advantage, mean, std, constant


def _check(baseline, scale, unbiased, dtype, r=37):
    generator = torch.Generator().manual_seed(r)
    parts = torch.randint(0, 4, (r, 3), generator=generator).to(dtype) / 4
    weights = torch.tensor([1.0, 0.5, 2.0], dtype=dtype)
    ids = torch.randint(-1, 7, (r,), generator=generator)  # unsorted; -1 belongs to no group; group 8 is empty
    got = group_advantage(
        parts, ids, n_groups=9, weights=weights, baseline=baseline, scale=scale, unbiased=unbiased, eps=1e-3
    )
    rewards = (parts.double() @ weights.double()).tolist()
    advantage, mean, std, constant = _oracle(rewards, ids.tolist(), 9, baseline, scale, unbiased, 1e-3)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    assert got.constant.tolist() == constant
    for name, want in (("advantage", advantage), ("mean", mean), ("std", std)):
        value = getattr(got, name)
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert value.tolist() == pytest.approx(want, rel=tolerance, abs=tolerance), name
    assert got.reward.tolist() == pytest.approx([x * (i >= 0) for x, i in zip(rewards, ids.tolist(), strict=True)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("baseline", "scale", "unbiased"), OPTIONS)
def test_equals_statistics(baseline, scale, unbiased, dtype):
    _check(baseline, scale, unbiased, dtype)


def test_equal_sizes_are_ids_in_order():
    rewards = torch.randn(12)
    ids = torch.arange(12) // 4
    for a, b in zip(group_advantage(rewards, 4), group_advantage(rewards, ids), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("scale", ["std", "none"])
def test_constant_and_single_groups_are_exactly_zero(baseline, scale):
    # 0.1 three times: the rounded mean is not 0.1, so only a comparison gives an exact zero
    got = group_advantage(
        torch.tensor([0.1, 0.1, 0.1, 7.0]), torch.tensor([0, 0, 0, 1]), baseline=baseline, scale=scale
    )
    assert got.advantage.tolist() == [0, 0, 0, 0]
    assert got.constant.tolist() == [True, True]
    assert got.std.tolist() == [0, 0]
    assert got.mean.tolist() == pytest.approx([0.1, 7.0])


def test_no_rewards():
    for group in (4, torch.empty(0, dtype=torch.int64)):
        got = group_advantage(torch.empty(0), group)
        assert [tuple(t.shape) for t in got] == [(0,)] * 5
    assert (
        group_advantage(torch.empty(0), torch.empty(0, dtype=torch.int64), n_groups=2).constant.tolist() == [True] * 2
    )


@pytest.mark.parametrize("ids", [[-1, -1], [-2, -5]])
def test_rows_of_no_group_alone(ids):
    out = group_advantage(torch.randn(2), torch.tensor(ids))
    assert out.mean.numel() == 0
    assert out.advantage.tolist() == [0.0, 0.0]


def test_advantage_does_not_depend_on_row_order_or_layout():
    rewards, ids = torch.randn(40, dtype=torch.float64), torch.randint(0, 5, (40,))
    order = torch.randperm(40)
    base = group_advantage(rewards, ids, n_groups=5)
    torch.testing.assert_close(group_advantage(rewards[order], ids[order], n_groups=5).advantage, base.advantage[order])
    wide = torch.stack([rewards, rewards]).T[:, :1]  # stride 2 in memory
    torch.testing.assert_close(group_advantage(wide, ids.int(), n_groups=5).advantage, base.advantage)


def test_op_is_well_registered_and_compiles():
    args = (torch.randn(10, 2), torch.arange(10) % 3, torch.ones(2), 0, 3, True, True, True, 1e-4)
    torch.library.opcheck(_group_advantage_op, args)
    compiled = torch.compile(
        lambda r, i: group_advantage(r, i, n_groups=3).advantage, fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(
        compiled(args[0][:, 0], args[1]), group_advantage(args[0][:, 0], args[1], n_groups=3).advantage
    )


@pytest.mark.parametrize(
    ("error", "match", "rewards", "group", "options"),
    [
        (ValueError, r"rewards: expected shape \[R\] or \[R, K\], got \[1, 1, 1\]", torch.ones(1, 1, 1), 1, {}),
        (TypeError, "rewards: expected dtype .* got complex64", torch.ones(2, dtype=torch.complex64), 2, {}),
        (ValueError, "group: 5 rewards cannot be split into groups of 2", torch.ones(5), 2, {}),
        (ValueError, "group: expected a positive group size, got 0", torch.ones(5), 0, {}),
        (ValueError, "n_groups: 4 rewards make 2 groups, got 3", torch.ones(4), 2, {"n_groups": 3}),
        (ValueError, "group: id 2 is out of range", torch.ones(2), torch.tensor([0, 2]), {"n_groups": 2}),
        (ValueError, r"group: expected shape \[2\]", torch.ones(2), torch.tensor([0]), {}),
        (ValueError, r"weights: expected shape \[1\]", torch.ones(2), 2, {"weights": torch.ones(2)}),
        (
            ValueError,
            "baseline: expected mean or leave_one_out, got 'median'",
            torch.ones(2),
            2,
            {"baseline": "median"},
        ),
        (ValueError, "scale: expected std or none", torch.ones(2), 2, {"scale": "batch"}),
        (ValueError, "eps: expected >= 0", torch.ones(2), 2, {"eps": -1.0}),
        (ValueError, r"rewards: not finite at \[\[1\]\]", torch.tensor([1.0, float("nan")]), 2, {}),
    ],
)
def test_bad_arguments_are_named(error, match, rewards, group, options):
    with pytest.raises(error, match=match):
        group_advantage(rewards, group, **options)


@pytest.fixture
def poisoned(monkeypatch):
    """torch.empty gives NaN, so that an element that a kernel does not write is detected."""
    empty = torch.empty

    def filled(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", filled)


@pytest.mark.interpreter
@pytest.mark.parametrize("r", [1, 255, 257])
@pytest.mark.parametrize(("baseline", "scale", "unbiased"), OPTIONS)
def test_kernel_equals_statistics(poisoned, baseline, scale, unbiased, r):
    _check(baseline, scale, unbiased, torch.float32, r)


@pytest.mark.interpreter
@pytest.mark.parametrize("size", [1, 3, 256, 300])
def test_kernel_with_equal_sizes(poisoned, size):
    rewards = torch.randint(0, 3, (2 * size,)).to(torch.bfloat16) * 0.1
    rewards[:size] = 0.1
    got = group_advantage(rewards, size)
    want = group_advantage_reference(rewards.double(), size)
    assert got.constant.tolist() == want.constant.tolist()
    assert (got.advantage[:size] == 0).all()
    torch.testing.assert_close(got.advantage.double(), want.advantage, rtol=2e-5, atol=2e-5)


@pytest.mark.interpreter
def test_kernel_keeps_nan_in_its_group(poisoned):
    rewards = torch.tensor([[1.0], [float("nan")], [1.0], [2.0]])  # the public function refuses these on a CPU
    advantage, _, _, _, constant = _group_advantage_op(rewards, None, None, 2, 2, False, True, True, 1e-4)
    assert advantage.isnan().tolist() == [True, True, False, False]
    assert constant.tolist() == [False, False]
