"""Bytes moved by operators: each tensor once, views nothing, gathers and scatters the elements they touch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastrl.plan.ledger import Ledger
from fastrl.plan.traffic import traffic

META = torch.device("meta")
N = 4 * 6  # bytes of a float32 vector of six


class Recorded(TorchDispatchMode):
    """The traffic of every operator in a block."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.bytes.append(traffic(func, args, kwargs or {}, out))
        return out


def vector(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape or (6,), dtype=dtype, device=META)


def rows(*shape: int) -> Tensor:
    return vector(*shape, dtype=torch.int64)


CASES: dict[str, tuple[Callable[[], Any], int]] = {
    "two in, one out": (lambda: vector() + vector(), 3 * N),
    "a number": (lambda: vector() * 2.0, 2 * N),
    "in place": (lambda: vector().add_(vector()), 3 * N),
    "overwritten": (lambda: vector().copy_(vector()), 2 * N),
    "cast": (lambda: vector().to(torch.bfloat16), N + N // 2),
    "a view": (lambda: vector(2, 3).t()[1:].unsqueeze(0), 0),
    "a view of a product": (lambda: torch.ops.aten._unsafe_view(vector(2, 3), [6]), 0),
    "an allocation": (lambda: torch.empty_like(vector()), 0),
    "expanded is read once": (lambda: vector(1).expand(6) + vector(), 4 + 2 * N),
    "a list": (lambda: torch.cat([vector(), vector()]), 4 * N),
    "two results": (lambda: torch.max(vector(2, 3), dim=1), N + 2 * (4 + 8)),
    "gathered": (lambda: vector(1000, 6)[rows(2)], 2 * 8 + 2 * 2 * N),
    "embedded": (lambda: torch.nn.functional.embedding(rows(2), vector(1000, 6)), 2 * 8 + 2 * 2 * N),
    "scattered": (lambda: vector(1000, 6).index_add_(0, rows(2), vector(2, 6)), 2 * 8 + 3 * 2 * N),
    "empty": (lambda: vector(0) + vector(0), 0),
}


@pytest.mark.parametrize("name", CASES)
def test_counted_by_hand(name: str) -> None:
    call, expected = CASES[name]
    with Recorded() as recorded:
        call()
    assert sum(recorded.bytes) == expected


def test_the_ledger_leaves_products_to_their_flops() -> None:
    left, right = vector(3, 4), vector(4, 5)
    with Ledger([left, right], gpu=True) as ledger:
        product = left @ right
        assert (ledger.flops, ledger.traffic) == (2 * 3 * 4 * 5, 0)
        product.relu()
    assert ledger.traffic == 2 * 3 * 5 * 4
