"""Batches of a generator: every index once, within the limit, and at least one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastrl.rollout.limits import Limits

SIZES = st.lists(st.integers(1, 50), max_size=30)


@given(lengths=SIZES, rows=st.integers(1, 9), limit=st.integers(1, 40))
def test_chunks_hold_so_many_rows_of_similar_length(lengths: list[int], rows: int, limit: int) -> None:
    chunks = Limits(max_rows=limit).chunks(lengths, rows)
    assert sorted(i for chunk in chunks for i in chunk) == list(range(len(lengths)))
    assert all(0 < len(chunk) * rows <= max(limit, rows) for chunk in chunks)
    flat = [lengths[i] for chunk in chunks for i in chunk]
    assert flat == sorted(lengths)


@given(lengths=SIZES, limit=st.integers(1, 200))
def test_prefill_calls_hold_so_many_tokens_with_their_padding(lengths: list[int], limit: int) -> None:
    calls = list(Limits(prefill_tokens=limit).prefill_calls(lengths))
    assert sorted(i for call in calls for i in call) == list(range(len(lengths)))
    padded = [len(call) * max(lengths[i] for i in call) for call in calls]
    assert all(tokens <= limit or len(call) == 1 for call, tokens in zip(calls, padded, strict=True))


@given(patches=SIZES, limit=st.integers(1, 200))
def test_vision_calls_hold_so_many_patches_in_order(patches: list[int], limit: int) -> None:
    calls = list(Limits(vision_patches=limit).vision_calls(patches))
    assert [i for call in calls for i in call] == list(range(len(patches)))
    totals = [sum(patches[i] for i in call) for call in calls]
    assert all(total <= limit or len(call) == 1 for call, total in zip(calls, totals, strict=True))
    joined = [total + patches[call[0]] for total, call in zip(totals, calls[1:], strict=False)]
    assert all(total > limit for total in joined), "no call ends before it is full"


@pytest.mark.parametrize("name", ["max_rows", "prefill_tokens"])
def test_a_limit_below_one_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected 1 or more, got 0"):
        Limits(**{name: 0})
