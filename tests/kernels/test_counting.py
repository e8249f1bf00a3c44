"""Costs that operators report: by argument name, and equal to the allocations of their own code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import count
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from fastrl_kernels import (
    _counting,
    _linear_logprob_backward,
    _linear_logprob_driver,
    _linear_policy_composed,
    _native,
)
from fastrl_kernels._counting import flops_of, named_arguments, scratch, scratch_of
from fastrl_kernels.linear_logprob import linear_logprob
from fastrl_kernels.linear_policy_loss import linear_policy_loss
from tests.helpers.planned import counted_peak

N, V, H, RANK = 1100, 3000, 64, 8
fastrl = torch.ops.fastrl


# By name


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.library.Library]:
    monkeypatch.setattr(_counting, "_SCRATCH", dict(_counting._SCRATCH))
    with torch.library._scoped_library("counting_test", "FRAGMENT") as made:
        yield made


_numbers = count()


def with_arguments_reversed(library: torch.library.Library, op: Any) -> Any:
    """An operator with the arguments and results of ``op``, the last argument first."""
    arguments, results = re.fullmatch(r"\w+::\w+\((.*)\) -> (.*)", str(op.default._schema)).groups()  # type: ignore[union-attr]
    name = f"reversed_{next(_numbers)}"
    parts = [re.sub(r"=.*", "", part).replace("(a!)", "") for part in reversed(arguments.split(", "))]
    library.define(f"{name}({', '.join(parts)}) -> {results}")
    library.impl(name, lambda *_: None, "Meta")
    return getattr(torch.ops.counting_test, name)


def calls() -> dict[Any, tuple[Any, ...]]:
    """A call of each operator with all its arguments, on the meta device."""

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    ids, vector, rows = meta(N, dtype=torch.int64), meta(N), meta(N // 3, dtype=torch.int64)
    head = (meta(N, H), meta(V, H), ids, None, None, meta(RANK, H), meta(V, RANK), rows)
    return {
        fastrl.linear_logprob: (*head, 1.0, 0.5, None, -100, True, False, 1 << 22),
        fastrl.linear_logprob_backward: (
            *(vector, None, *head, vector, None, vector, 1.0, 0.5, None, -100, False, 1 << 22),
            [True, True, False, True, True],
        ),
        fastrl.linear_policy_loss: (
            *(meta(N, H), meta(V, H), ids, None, None, rows, None, 1.0, None, -100, 1.0, 1 << 22, [True, False, False]),
            *(meta(8), ids, vector),
        ),
        fastrl.decode_attention: (
            *(meta(4, 8, 16), *[meta(2, 2, 9, 16)] * 2, *[meta(4, 2, 3, 16)] * 2),
            *(*[meta(2, dtype=torch.int32)] * 3, 2, 1.0),
        ),
    }


@pytest.mark.parametrize("op", calls(), ids=str)
def test_an_operator_whose_arguments_change_places_counts_the_same(library: torch.library.Library, op: Any) -> None:
    """The registered formulas, for an operator with the same arguments in reverse order."""
    args = calls()[op]
    named = named_arguments(op.default, args, {})
    other = with_arguments_reversed(library, op)
    backwards = [named[argument.name] for argument in other.default._schema.arguments]
    told = [argument.name for argument in op.default._schema.arguments]
    assert [argument.name for argument in other.default._schema.arguments] == told[::-1]

    flops_of(other)(formula_of(flop_registry[op]))
    try:
        assert flop_registry[other](*backwards) == flop_registry[op](*args) > 0
    finally:
        del flop_registry[other]
    if op in _counting._SCRATCH:
        scratch_of(other)(_counting._SCRATCH[op])
        for triton in (False, True):
            told = [scratch(o.default, given, {}, triton=triton) for o, given in ((op, args), (other, backwards))]
            assert told[0] == told[1]
            assert told[0].bounded > 0


def formula_of(registered: Any) -> Any:
    """The formula within what ``flops_of`` hands torch, which torch wraps once."""
    held = [cell.cell_contents for cell in registered.__wrapped__.__closure__]
    (formula,) = [found for found in held if isinstance(found, FunctionType)]
    return formula


def test_arguments_that_a_call_leaves_out_have_their_defaults(library: torch.library.Library) -> None:
    library.define("toy(Tensor x, int n, *, float scale=2.5, bool on=True) -> Tensor")
    op = torch.ops.counting_test.toy.default
    x = torch.ones(2)
    assert named_arguments(op, (x, 3), {"on": False}) == {"x": x, "n": 3, "scale": 2.5, "on": False}
    assert named_arguments(op, (), {"n": 3, "x": x}) == {"x": x, "n": 3, "scale": 2.5, "on": True}


def test_an_operator_that_registers_nothing_has_no_scratch() -> None:
    assert scratch(torch.ops.aten.mm.default, (torch.ones(2, 2), torch.ones(2, 2)), {}, triton=True) == (0, 0)


# Equal to the allocations of one call on this CPU


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, H, generator=rng).to(dtype) for n in (N, V))
    return hidden, weight, torch.randint(0, V, (N,), generator=rng)


class Told(TorchDispatchMode):
    """Scratch of each operator called, as the planner requests it."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.bytes[func.__name__] = sum(scratch(func, args, kwargs or {}, triton=False))
        return func(*args, **(kwargs or {}))


WITHIN = 0.03  # about twelve numbers per row beside the tiles are not counted
ONE, MANY = 1 << 30, 3 << 20  # budgets: all rows and columns in one tile or two, and in many
CASES = [
    (ONE, torch.float32, {"return_entropy": True}),
    (ONE, torch.bfloat16, {}),
    (ONE, torch.float32, {"temperature": 0.7}),
    (MANY, torch.float32, {"softcap": 5.0}),
    (MANY, torch.bfloat16, {"lora": 0.5}),
    pytest.param(MANY, torch.bfloat16, {"return_entropy": True, "temperature": 0.7}, marks=pytest.mark.gate),
    pytest.param(MANY, torch.float32, {"lora": 0.5}, marks=pytest.mark.gate),
]


@pytest.fixture(params=["with the extension", "torch alone"])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """C++ makes no temporaries where it folds tiles (fp32, log-probs alone), torch does."""
    if request.param == "torch alone":
        monkeypatch.setattr(_native, "lacks", lambda name: "left out")


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("budget", "dtype", "options"), CASES, ids=str)
def test_the_heads_scratch_is_what_it_allocates(budget: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    hidden, weight, target = (x.requires_grad_(x.is_floating_point()) for x in inputs(dtype))
    if "lora" in options:
        a, b = torch.randn(RANK, H, requires_grad=True), torch.randn(V, RANK, requires_grad=True)
        options = {"lora": (a, b, options["lora"])}
    made: list[Tensor] = []

    def forward() -> None:
        out = linear_logprob(hidden, weight, target, scratch_bytes=budget, **options)
        made[:] = [out.logp.sum() if out.entropy is None else out.logp.sum() + out.entropy.sum()]

    with Told() as told:
        forward()
        made[0].backward()
    results = sum(x.numel() * x.element_size() for x in (hidden, weight, *options.get("lora", ())[:2]))
    counted = counted_peak(forward), counted_peak(made[0].backward)
    planned = told.bytes["linear_logprob.default"], told.bytes["linear_logprob_backward.default"]
    assert planned[0] == pytest.approx(counted[0], rel=WITHIN)
    assert planned[1] + results == pytest.approx(counted[1], rel=WITHIN)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("budget", "dtype"), [(ONE, torch.float32), (MANY, torch.bfloat16)], ids=str)
def test_the_row_local_heads_scratch_is_what_it_allocates(
    monkeypatch: pytest.MonkeyPatch, budget: int, dtype: torch.dtype
) -> None:
    hidden, weight, target = (x.requires_grad_(x.is_floating_point()) for x in inputs(dtype))
    ids, advantage = torch.arange(N) // 100, torch.randn(N // 100)
    monkeypatch.setattr(_linear_policy_composed, "FEW_ROWS", 1)

    def forward() -> Any:
        return linear_policy_loss(hidden, weight, target, advantage, ids, scratch_bytes=budget)

    with Told() as told:
        forward()
    counted = counted_peak(forward)
    results = hidden.numel() * hidden.element_size() + 4 * weight.numel()
    assert told.bytes["linear_policy_loss.default"] + results == pytest.approx(counted, rel=WITHIN)


@pytest.mark.usefixtures("compiled")
def test_the_row_local_heads_scratch_where_it_holds_few_rows_is_that_of_log_probs() -> None:
    hidden, weight, target = (x.requires_grad_(x.is_floating_point()) for x in inputs(torch.float32))
    ids, advantage = torch.arange(N) // 100, torch.randn(N // 100)
    made: list[Tensor] = []

    def forward() -> None:
        made[:] = [linear_policy_loss(hidden, weight, target, advantage, ids, scratch_bytes=1 << 20).loss]

    with Told() as told:
        forward()
        made[0].backward()
    assert "linear_policy_loss.default" not in told.bytes
    counted = counted_peak(forward), counted_peak(made[0].backward)
    results = 4 * (hidden.numel() + weight.numel())
    planned = told.bytes["linear_logprob.default"], told.bytes["linear_logprob_backward.default"]
    vectors = 8 * 30 * N  # row terms, their copies and masks, far below the tiles elsewhere
    assert planned[0] < counted[0] < planned[0] + vectors
    assert planned[1] < counted[1] - results < planned[1] + vectors


@pytest.mark.parametrize("op", [fastrl.linear_logprob, fastrl.linear_policy_loss], ids=str)
def test_the_extension_lowers_what_a_cpu_holds_where_it_folds(monkeypatch: pytest.MonkeyPatch, op: Any) -> None:
    named = named_arguments(op.default, calls()[op], {}) | {"scratch_bytes": ONE}
    logprobs = op is fastrl.linear_logprob
    several: dict[str, Any] = {"target": torch.empty((N, 2), dtype=torch.int64, device="meta")}
    one = {"return_entropy": False} if logprobs else {}

    def held(*, lacking: str | None, triton: bool, **changes: Any) -> int:
        with monkeypatch.context() as patch:
            patch.setattr(_native, "lacks", lambda name: lacking)
            return scratch(op.default, (), named | changes, triton=triton).bounded

    def saved(*, triton: bool, **changes: Any) -> int:
        return held(lacking="left out", triton=triton, **changes) - held(lacking=None, triton=triton, **changes)

    assert saved(triton=False, **one) > 0
    assert saved(triton=True, **one) == saved(triton=False, softcap=5.0, **one) == 0
    if logprobs:
        kept = [several, {"return_mean": True}, {"return_entropy": True}]
        assert [saved(triton=False, **(one | changes)) for changes in kept] == [0, 0, 0]


def test_scratch_follows_the_code_that_allocates(monkeypatch: pytest.MonkeyPatch) -> None:
    args = (*calls()[fastrl.linear_logprob][:-1], 1 << 30)
    before = scratch(fastrl.linear_logprob.default, args, {}, triton=False)
    monkeypatch.setattr(_linear_logprob_driver, "EAGER_ROWS", 64)
    after = scratch(fastrl.linear_logprob.default, args, {}, triton=False)
    assert after.bounded < before.bounded / 2


@pytest.mark.parametrize(
    ("rows", "limit", "expected"),
    [(256, None, 151936), (256, 16 << 20, 15232), (1024, 16 << 20, 4032), (4096, 16 << 20, 4032)],
)
def test_a_limit_of_a_tile_makes_slabs_narrower_and_never_narrow(rows: int, limit: int | None, expected: int) -> None:
    sizes = {"per_element": 4, "per_row": 0, "per_column": 0, "row_limit": rows}
    plan = _linear_logprob_driver.plan_tiles(rows, 151936, 4 << 30, tile_limit=limit, **sizes)
    assert (plan.rows, plan.columns) == (rows, expected)


@pytest.mark.parametrize("op", [fastrl.linear_logprob, fastrl.linear_logprob_backward], ids=str)
def test_tiles_on_a_cpu_fit_its_cache_though_scratch_would_hold_more(op: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    large = {"weight": torch.empty((65536, H), device="meta"), "scratch_bytes": 1 << 30, "lora_b": None}
    named = named_arguments(op.default, calls()[op], {}) | large | {"lora_a": None}

    def held(*, triton: bool) -> int:
        return scratch(op.default, (), named, triton=triton).bounded

    limited, on_a_gpu = held(triton=False), held(triton=True)
    for module in (_linear_logprob_driver, _linear_logprob_backward):
        monkeypatch.setattr(module, "EAGER_TILE", None)
    assert limited < held(triton=False) / 2
    assert on_a_gpu == held(triton=True)


def test_flops_are_read_through_torchs_own_counter() -> None:
    hidden, weight, target = inputs(torch.float32)
    with FlopCounterMode(display=False) as counter:
        linear_logprob(hidden, weight, target)
    assert counter.get_total_flops() == 2 * N * V * H
