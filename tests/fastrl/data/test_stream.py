"""The data position: every record once an epoch, in an order of the seed and epoch alone, resumable anywhere."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastrl.data.records import Record
from fastrl.data.stream import RecordStream


def records(n: int, prefix: str = "") -> list[Record]:
    return [Record(id=f"{prefix}{i}", task="ocr", images=(), messages=(), target={"text": ""}) for i in range(n)]


@given(n=st.integers(1, 9), takes=st.lists(st.integers(0, 7), max_size=6), seed=st.integers(0, 5))
def test_resuming_anywhere_gives_what_would_have_come(n: int, takes: list[int], seed: int) -> None:
    stream = RecordStream(records(n), seed=seed)
    for count in takes:
        stream.take(count)
    state = json.loads(json.dumps(stream.state()))
    other = RecordStream(records(n), seed=seed)
    other.load(state)
    assert [r.id for r in other.take(2 * n + 1)] == [r.id for r in stream.take(2 * n + 1)]
    assert other.consumed == stream.consumed == sum(takes) + 2 * n + 1


def test_each_epoch_has_every_record_once_and_its_own_order() -> None:
    stream = RecordStream(records(20), seed=1)
    epochs = [[r.id for r in stream.take(20)] for _ in range(3)]
    assert all(sorted(e, key=int) == [str(i) for i in range(20)] for e in epochs)
    assert len({tuple(e) for e in epochs}) == 3
    assert [r.id for r in RecordStream(records(20), seed=1, order="file").take(20)] == [str(i) for i in range(20)]


def test_ranks_share_an_epoch_without_overlap() -> None:
    parts = [[r.id for r in RecordStream(records(10), rank=r, world_size=3).take(3)] for r in range(3)]
    assert len({i for part in parts for i in part}) == 9


def test_other_data_is_refused_on_resume() -> None:
    state = RecordStream(records(5)).state()
    with pytest.raises(ValueError, match="records was 5 and is now 6"):
        RecordStream(records(6)).load(state)
    with pytest.raises(ValueError, match="other ids"):
        RecordStream(records(5, "x")).load(state)
    with pytest.raises(ValueError, match="seed was 0 and is now 3"):
        RecordStream(records(5), seed=3).load(state)
    with pytest.raises(ValueError, match="0 records"):
        RecordStream([])
