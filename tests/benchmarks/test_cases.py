"""The benchmark registry covers the library, and on tiny inputs all contestants of a case compute the same result."""

from __future__ import annotations

import pytest
import torch

import fastrl_kernels
from benchmarks.case import SIZES, Case
from benchmarks.registry import cases
from benchmarks.run import difference

TINY = cases("tiny")
CPU = torch.device("cpu")


def test_every_public_kernel_has_a_case() -> None:
    kernels = {name for name in fastrl_kernels.__all__ if name.islower()}
    assert kernels == {op for case in TINY for op in case.op.split("+")}


@pytest.mark.parametrize("size", SIZES, ids="size-{}".format)
def test_sizes_have_the_same_cases_and_a_floor(size: str) -> None:
    found = cases(size)
    assert [case.op for case in found] == [case.op for case in TINY]
    assert all(case.flops > 0 or case.bytes > 0 for case in found)
    assert all(case.peers for case in found)


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_contestants_agree(case: Case) -> None:
    x = case.make(CPU)
    expected = tuple(t.clone() for t in case.ours(x))
    for name, peer in {"again": case.ours, **case.peers}.items():
        if case.reset is not None:
            case.reset(x)
        if peer is not None:
            assert difference(peer(x), expected) < 1e-5, name


def test_only_selects_by_part_and_by_pattern() -> None:
    assert {case.op for case in cases("tiny", "listwise")} == {"listwise_loss"}
    assert [case.name for case in cases("tiny", "*/perpo")] == ["listwise_loss/perpo"]
    with pytest.raises(ValueError, match="no case matches 'nothing'"):
        cases("tiny", "nothing")
    with pytest.raises(ValueError, match="size: expected one of tiny, cpu, gpu"):
        cases("huge")
