"""linear_assignment: optimal against SciPy on every path, and its results where SciPy raises."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching
from torch import Tensor

from fastrl_kernels import _native
from fastrl_kernels._common import interpreting
from fastrl_kernels.linear_assignment import (
    INFEASIBLE,
    INVALID,
    Assignment,
    linear_assignment,
    linear_assignment_reference,
)

PATHS = ["eager"] if _native.library() is None else ["eager", "native"]
SHAPES = [(8, 8), (6, 11), (11, 6), (1, 9), (9, 1), (4, 5), (3, 3), (2, 12)]
KINDS = ["uniform", "ties", "boxes", "forbidden"]


def solve(path: str, cost: Tensor, **options: Any) -> Assignment:
    return linear_assignment_reference(cost, **options) if path == "eager" else linear_assignment(cost, **options)


def make_costs(kind: str, problems: int, n: int, m: int, rng: np.random.Generator) -> np.ndarray:
    if kind == "ties":
        return rng.integers(-2, 4, (problems, n, m)).astype(np.float32)
    if kind == "boxes":  # L1 distance of centres and sizes minus a bounded overlap term, as detectors build them
        a, b = rng.random((problems, n, 1, 4)), rng.random((problems, 1, m, 4))
        distance = np.abs(a - b)
        return (distance.sum(-1) - np.clip(1 - 4 * distance.max(-1), 0, 1)).astype(np.float32)
    cost = rng.normal(size=(problems, n, m)).astype(np.float32)
    if kind == "forbidden":
        cost[rng.random(cost.shape) < 0.35] = np.inf
    return cost


def scipy_total(cost: np.ndarray, maximize: bool = False) -> float | None:
    """Optimal total, or None where no complete matching exists."""
    try:
        rows, cols = linear_sum_assignment(cost, maximize=maximize)
    except ValueError:
        return None
    return float(cost[rows, cols].astype(np.float64).sum())


def assert_matching(out: Assignment, cost: Tensor, rows: Tensor, cols: Tensor) -> None:
    """``match`` is a partial matching inside the counts, and ``total`` is the sum of its costs."""
    problems, n, m = cost.shape
    matched = out.match >= 0
    assert (out.match < cols[:, None]).all()
    assert not (matched & (torch.arange(n) >= rows[:, None])).any()
    taken = torch.zeros(problems, m + 1, dtype=torch.int64)
    taken.scatter_add_(1, torch.where(matched, out.match, m), matched.long())
    assert (taken[:, :m] <= 1).all()
    if m:
        picked = torch.where(matched, cost.gather(2, out.match.clamp(min=0)[:, :, None])[:, :, 0].double(), 0.0)
        torch.testing.assert_close(out.total.double(), picked.sum(1), rtol=1e-5, atol=1e-5)


def check_against_scipy(path: str, cost: np.ndarray, rng: np.random.Generator, maximize: bool = False) -> int:
    problems, n, m = cost.shape
    rows = torch.from_numpy(rng.integers(-1, n + 3, problems))
    cols = torch.from_numpy(rng.integers(-1, m + 3, problems))
    half = problems // 2  # the first half is not ragged
    rows[:half], cols[:half] = n, m
    given_cost = torch.from_numpy(-cost if maximize else cost)
    out = solve(path, given_cost, n_rows=rows, n_cols=cols, maximize=maximize)
    rows, cols = rows.clamp(0, n), cols.clamp(0, m)
    assert_matching(out, given_cost, rows, cols)
    sign = -1.0 if maximize else 1.0
    totals, statuses, counts = out.total.tolist(), out.status.tolist(), (out.match >= 0).sum(1).tolist()
    for b, (r, c) in enumerate(zip(rows.tolist(), cols.tolist(), strict=True)):
        want = scipy_total(cost[b, :r, :c])
        if want is None:
            assert statuses[b] == INFEASIBLE
            assert counts[b] < min(r, c)
        else:
            assert statuses[b] == 0
            assert counts[b] == min(r, c)
            assert abs(sign * totals[b] - want) <= 1e-5 * (1 + abs(want)), (b, cost[b, :r, :c])
    return problems


@pytest.mark.parametrize("path", PATHS)
def test_total_equals_scipy_on_a_hundred_thousand_problems(path: str) -> None:
    rng = np.random.default_rng(1)
    done = 0
    for n, m in SHAPES:
        for kind in KINDS:
            done += check_against_scipy(path, make_costs(kind, 3200, n, m, rng), rng, maximize=kind == "uniform")
    assert done >= 100_000


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 0), (0, 0)])
def test_empty_problems(path: str, n: int, m: int) -> None:
    out = solve(path, torch.empty(3, n, m))
    assert out.match.shape == (3, n)
    assert (out.match == -1).all()
    assert out.total.tolist() == [0, 0, 0]
    assert out.status.tolist() == [0, 0, 0]
    assert solve(path, torch.empty(0, n, m)).match.shape == (0, n)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [(2, 150, 150), (2, 300, 20), (2, 20, 300), (1, 257, 33)])
def test_large_problems_in_float64(path: str, shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(2)
    for cost in (rng.random(shape), rng.integers(0, 30, shape).astype(np.float64)):
        out = solve(path, torch.from_numpy(cost))
        assert out.total.dtype == torch.float64
        np.testing.assert_allclose(out.total.numpy(), [scipy_total(c) for c in cost], rtol=1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_float64_is_not_cast(path: str) -> None:
    # the two matchings differ by less than a float32 can hold
    cost = torch.tensor([[[1.0, 1.0], [1.0, 1.0 + 1e-12]]], dtype=torch.float64)
    assert solve(path, cost).match.tolist() == [[1, 0]]
    assert solve(path, cost, maximize=True).match.tolist() == [[0, 1]]


@pytest.mark.parametrize("path", PATHS)
def test_infeasible_matches_as_many_lines_as_possible_in_order(path: str) -> None:
    rng = np.random.default_rng(3)
    infeasible = 0
    for n, m in [(4, 5), (5, 4), (6, 6)]:
        cost = make_costs("ties", 120, n, m, rng)
        cost[rng.random(cost.shape) < 0.65] = np.inf
        out = solve(path, torch.from_numpy(cost))
        for b in range(len(cost)):
            c = cost[b] if n <= m else cost[b].T
            taken: list[int] = []  # lines of the shorter side, each if it can be matched beside the earlier ones
            for line in range(len(c)):
                cover = maximum_bipartite_matching(csr_matrix(np.isfinite(c[[*taken, line]])), perm_type="column")
                if (cover >= 0).sum() == len(taken) + 1:
                    taken.append(line)
            complete = len(taken) == len(c)
            infeasible += not complete
            assert out.status[b] == (0 if complete else INFEASIBLE)
            matched = out.match[b]
            lines = (matched >= 0).nonzero()[:, 0] if n <= m else matched[matched >= 0].sort().values
            assert lines.tolist() == taken
            best = scipy_total(c[taken])
            assert best is not None
            assert abs(out.total[b].item() - best) < 1e-4
    assert 100 < infeasible < 350


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("bad", "maximize"), [(np.nan, False), (np.nan, True), (-np.inf, False), (np.inf, True)])
def test_invalid_entries_are_forbidden_and_reported(path: str, bad: float, maximize: bool) -> None:
    cost = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4).sin()
    cost[0, 1, 2] = bad
    out = solve(path, cost, maximize=maximize)
    assert out.status.tolist() == [INVALID, 0]
    assert out.match[0, 1] != 2
    clean = cost.clone()
    clean[0, 1, 2] = -np.inf if maximize else np.inf
    same = solve(path, clean, maximize=maximize)
    assert same.status.tolist() == [0, 0]
    assert torch.equal(same.match, out.match)
    beyond = solve(path, cost, n_rows=torch.tensor([1, 3]), maximize=maximize)
    assert beyond.status.tolist() == [0, 0]  # only the entries within the counts are read


@pytest.mark.parametrize("path", PATHS)
def test_all_forbidden(path: str) -> None:
    out = solve(path, torch.full((1, 2, 3), torch.inf))
    assert (out.match.tolist(), out.total.tolist(), out.status.tolist()) == ([[-1, -1]], [0.0], [INFEASIBLE])
    out = solve(path, torch.full((1, 2, 3), torch.nan))
    assert out.status.tolist() == [INFEASIBLE + INVALID]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_and_strides(path: str, dtype: torch.dtype) -> None:
    cost = torch.randn(3, 14, 9)[:, ::2].mT.to(dtype)
    out = solve(path, cost)
    same = solve(path, cost.float().contiguous())
    assert out.total.dtype == torch.float32
    assert torch.equal(out.match, same.match)
    assert torch.equal(
        solve(path, cost, n_rows=torch.tensor([4, 9, 0], dtype=torch.int32)).match[2], out.match[2] * 0 - 1
    )


def test_strict_raises_with_the_problem_and_its_status() -> None:
    cost = torch.zeros(3, 2, 2)
    linear_assignment(cost, strict=True)
    cost[1, 0] = torch.nan
    with pytest.raises(ValueError, match=r"problem 1 has status 3"):
        linear_assignment(cost, strict=True)


def test_wrong_arguments_are_named() -> None:
    cost = torch.zeros(3, 2, 2)
    with pytest.raises(ValueError, match=r"cost: expected shape \[any, any, any\], got \[2\]"):
        linear_assignment(cost[0, 0])
    with pytest.raises(TypeError, match=r"cost: .*got bool"):
        linear_assignment(cost.bool())
    with pytest.raises(ValueError, match=r"n_rows: expected shape \[3\]"):
        linear_assignment(cost, n_rows=torch.tensor([1]))
    with pytest.raises(TypeError, match=r"n_cols: .*got float32"):
        linear_assignment(cost, n_cols=torch.ones(3))


WILD = st.one_of(
    st.floats(width=32),  # NaN, infinities, denormals and the largest numbers included
    st.sampled_from([0.0, -0.0, 1e-45, 3.4e38, -3.4e38, np.inf, -np.inf, np.nan, 1.0, 2.0]),
)


@given(data=st.data())
def test_any_values_and_counts(data: st.DataObject) -> None:
    n, m = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 5))
    cost = torch.from_numpy(data.draw(arrays(np.float32, (2, n, m), elements=WILD)))
    rows = torch.tensor(data.draw(st.lists(st.integers(-3, 9), min_size=2, max_size=2)))
    cols = torch.tensor(data.draw(st.lists(st.integers(-3, 9), min_size=2, max_size=2)))
    maximize = data.draw(st.booleans())
    outs = [solve(path, cost, n_rows=rows, n_cols=cols, maximize=maximize) for path in PATHS]
    rows, cols = rows.clamp(0, n), cols.clamp(0, m)
    for out in outs:
        assert torch.equal(out.status, outs[0].status)
        assert torch.equal((out.match >= 0).sum(1), (outs[0].match >= 0).sum(1))
        torch.testing.assert_close(out.total, outs[0].total)
        for b in range(2):
            chosen = out.match[b][out.match[b] >= 0]
            assert chosen.unique().numel() == chosen.numel()
            assert (chosen < cols[b]).all()
            picked = cost[b, (out.match[b] >= 0).nonzero()[:, 0], chosen]
            assert picked.isfinite().all()
            part = cost[b, : rows[b], : cols[b]]
            invalid = part.isnan().any() or (part == (torch.inf if maximize else -torch.inf)).any()
            assert bool(out.status[b] & INVALID) == bool(invalid)


def test_operator_registration_and_compile() -> None:
    cost, rows = torch.randn(3, 4, 6), torch.tensor([4, 2, 0])
    torch.library.opcheck(torch.ops.fastrl.linear_assignment.default, (cost, rows, None, False))
    torch.library.opcheck(torch.ops.fastrl.linear_assignment.default, (cost.double(), None, rows, True))
    compiled = torch.compile(lambda c, r: linear_assignment(c * 2, n_rows=r), fullgraph=True, backend="aot_eager")
    want = linear_assignment(cost * 2, n_rows=rows)
    for got, value in zip(compiled(cost, rows), want, strict=True):
        assert torch.equal(got, value)


def test_gradients_stop_here() -> None:
    cost = torch.randn(1, 3, 3, requires_grad=True)
    assert not linear_assignment(cost).total.requires_grad


@pytest.mark.interpreter
def test_kernel_equals_scipy() -> None:
    assert interpreting()
    rng = np.random.default_rng(4)
    done = 0
    for n, m in [(5, 5), (3, 7), (7, 3), (1, 6), (6, 1)]:
        for kind in KINDS:
            done += check_against_scipy("kernel", make_costs(kind, 12, n, m, rng), rng, maximize=kind == "uniform")
    done += check_against_scipy("kernel", make_costs("boxes", 3, 40, 33, rng), rng)
    assert done >= 240


@pytest.mark.interpreter
def test_kernel_takes_the_eager_steps_on_ties_and_forbidden_entries() -> None:
    rng = np.random.default_rng(5)
    for n, m in [(6, 6), (4, 7), (7, 4)]:
        cost = make_costs("ties", 12, n, m, rng)
        cost[rng.random(cost.shape) < 0.4] = np.inf
        cost[0, 0, 0], cost[1, 1, 1] = np.nan, -np.inf
        rows, cols = torch.from_numpy(rng.integers(0, n + 2, 12)), torch.from_numpy(rng.integers(0, m + 2, 12))
        for counts in ({}, {"n_rows": rows}, {"n_rows": rows, "n_cols": cols}):
            out = linear_assignment(torch.from_numpy(cost), **counts)
            want = linear_assignment_reference(torch.from_numpy(cost), **counts)
            assert torch.equal(out.match, want.match)  # integers: no rounding, so ties break alike
            assert torch.equal(out.total, want.total)
            assert torch.equal(out.status, want.status)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kernel_dtypes_strides_and_operator(dtype: torch.dtype) -> None:
    cost = torch.randn(2, 10, 5)[:, ::2].mT.to(dtype)
    torch.testing.assert_close(linear_assignment(cost).total, linear_assignment_reference(cost).total)
    assert linear_assignment(torch.empty(2, 0, 3)).total.tolist() == [0, 0]
    torch.library.opcheck(torch.ops.fastrl.linear_assignment.default, (cost.float(), None, None, True))


@pytest.mark.gpu
def test_gpu_equals_scipy_without_a_sync() -> None:
    rng = np.random.default_rng(6)
    for n, m in [(32, 32), (300, 20), (20, 300), (300, 300), (700, 600), (1500, 90), (3000, 40)]:
        cost = make_costs("boxes", 8, n, m, rng)
        on_device = torch.from_numpy(cost).cuda()
        linear_assignment(on_device)  # compiled before the sync check
        torch.cuda.set_sync_debug_mode("error")
        out = linear_assignment(on_device)
        again = linear_assignment(on_device)
        torch.cuda.set_sync_debug_mode("default")
        np.testing.assert_allclose(out.total.cpu().numpy(), [scipy_total(c) for c in cost], rtol=1e-5)
        assert torch.equal(out.match, again.match)
    with pytest.raises(ValueError, match="float64 is solved on CPU only"):
        linear_assignment(on_device.double())
    with pytest.raises(ValueError, match="at most 4096 rows and columns"):
        linear_assignment(torch.zeros(1, 2, 4097, device="cuda"))
