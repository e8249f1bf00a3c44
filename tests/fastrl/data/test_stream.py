"""The data position: every record once per epoch, in an order that depends on seed and epoch only; resumable."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastrl.data.clips import Clip, ClipRecords, Subject
from fastrl.data.identity import compare, identify, read_identity
from fastrl.data.records import Dataset, Record
from fastrl.data.scenes import Scenes
from fastrl.data.stream import DataChanged, RecordStream


def records(n: int, prefix: str = "") -> list[Record]:
    return [Record(id=f"{prefix}{i}", task="ocr", images=(), messages=(), target={"text": ""}) for i in range(n)]


@given(n=st.integers(1, 9), takes=st.lists(st.integers(0, 7), max_size=6), seed=st.integers(0, 5))
def test_resuming_anywhere_gives_what_would_have_come(n: int, takes: list[int], seed: int) -> None:
    stream = RecordStream(records(n), seed=seed)
    for count in takes:
        stream.take(count)
    state = json.loads(json.dumps(stream.state()))
    other = RecordStream(records(n), seed=seed)
    other.load(state, stream.identity())
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


def test_another_seed_or_no_state_is_refused() -> None:
    stream = RecordStream(records(5))
    state, identity = stream.state(), stream.identity()
    with pytest.raises(ValueError, match="seed was 0 and is now 3"):
        RecordStream(records(5), seed=3).load(state, identity)
    with pytest.raises(ValueError, match="0 records"):
        RecordStream([])
    for name, value in (("epoch", "1"), ("position", -1), ("consumed", None), ("records", True), ("order", 3)):
        with pytest.raises(ValueError, match="the data position has"):
            RecordStream(records(5)).load({**state, name: value}, identity)
    with pytest.raises(ValueError, match="not a JSON object"):
        RecordStream(records(5)).load([1], identity)  # type: ignore[arg-type]


def changed(record: Record, **fields: Any) -> Record:
    return replace(record, **fields)


RED = Image.new("RGB", (8, 8), "red")
TEXT = ({"role": "user", "content": [{"type": "text", "text": "Read."}]},)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:-1], "5 records where there were 6; gone: '5'"),
        (lambda rows: [*rows, *records(1, "x")], "7 records where there were 6; new: 'x0'"),
        (lambda rows: rows[::-1], "in another order"),
        (lambda rows: [rows[1], rows[0], *rows[2:]], "in another order"),
        (lambda rows: [*rows[:3], changed(rows[3], target={"text": "no"}), *rows[4:]], "other target of '3'"),
        (lambda rows: [changed(r, target={"boxes": [[0, 0, 1, 2]]}) for r in rows], "other target of .* and 3 more"),
        (lambda rows: [*rows[:5], changed(rows[5], messages=TEXT)], "other messages of '5'"),
        (lambda rows: [changed(rows[0], task="caption"), *rows[1:]], "other target of '0'"),
        (lambda rows: [changed(rows[0], id="new"), *rows[1:]], "gone: '0'; new: 'new'"),
        (
            lambda rows: [changed(rows[0], images=(Image.new("RGB", (8, 8), "red"),)), *rows[1:]],
            "other pictures of '0'",
        ),
    ],
)
def test_data_that_changed_is_refused_and_named(change: Callable[[list[Record]], list[Record]], message: str) -> None:
    """All rows are compared, not a sample of ids."""
    begun = [replace(r, images=(Image.new("RGB", (8, 8)),)) for r in records(6)]
    stream = RecordStream(begun)
    with pytest.raises(DataChanged, match=f"data has changed since the run started: .*{message}"):
        RecordStream(change(begun)).load(stream.state(), stream.identity())
    again = RecordStream(change(begun))
    assert str(again.load(stream.state(), stream.identity(), accept=True))
    assert again.load(again.state(), again.identity()) is None
    same = RecordStream([replace(r, source="elsewhere:7") for r in begun])
    assert same.load(stream.state(), stream.identity()) is None  # a row's position in the file is not compared


def test_picture_files_count_by_size_and_time_or_by_their_bytes(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    picture.write_bytes(b"one")
    os.utime(picture, ns=(5, 5))
    rows = [replace(record, images=(picture,)) for record in records(3)]
    stat, whole = identify(rows, "stat"), identify(rows, "bytes")
    os.utime(picture, ns=(6, 6))
    assert compare(stat, identify(rows, "stat")).changed == {"pictures": ["0", "1", "2"]}
    assert not compare(whole, identify(rows, "bytes"))
    picture.write_bytes(b"two")
    os.utime(picture, ns=(5, 5))
    assert not compare(stat, identify(rows, "stat"))  # the documented limit of that option
    assert compare(whole, identify(rows, "bytes")).changed == {"pictures": ["0", "1", "2"]}
    assert "compared by stat, now by bytes" in str(compare(stat, whole))
    picture.unlink()
    assert compare(stat, identify(rows, "stat"))
    assert read_identity(json.loads(json.dumps(whole.plain()))) == whole
    for broken in ([], {}, {**whole.plain(), "ids": ["0"]}, {**whole.plain(), "ids": [0, 1, 2]}):
        with pytest.raises(ValueError, match="not the identity"):
            read_identity(broken)


def test_clips_count_without_their_frames_being_decoded(tmp_path: Path) -> None:
    def clip(number: int, *boxes: float) -> Clip:
        subject = Subject(1, "dog", {1: (0, 0, *boxes)})  # type: ignore[arg-type]
        return Clip(f"c{number}", 9, 9, (0.0,), (subject,), video=tmp_path / "no.mp4", video_frames=(0,))

    before = identify(Dataset(ClipRecords([clip(i, 5, 5) for i in range(40)])))
    after = identify(Dataset(ClipRecords([clip(i, 5, 6 if i == 17 else 5) for i in range(40)])))
    assert compare(before, after).changed == {"target": ["c17"]}


def test_drawn_scenes_count_by_a_sample() -> None:
    before, after = (identify(Scenes("ocr", 1000, seed, 1, 56, 2)) for seed in (0, 1))
    assert len(before.ids) == 32
    assert compare(before, after)
    assert not compare(before, identify(Scenes("ocr", 1000, 0, 1, 56, 2)))


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("taken", [0, 1, 3])
def test_an_epoch_goes_on_with_what_is_left_of_it(world_size: int, taken: int) -> None:
    """Removed rows are left out, the others keep their order, and new ones follow in the next epoch."""
    begun = records(12)
    streams = [RecordStream(begun, seed=4, rank=r, world_size=world_size) for r in range(world_size)]
    seen = [record.id for stream in streams for record in stream.take(taken)]
    coming = [r.id for group in zip(*(s.peek(12 // world_size - taken) for s in streams), strict=True) for r in group]
    now = [record for record in begun if record.id not in ("2", "7")] + records(1, "x")
    found: list[list[str]] = []
    for old in streams:
        stream = RecordStream(now, seed=4, rank=old.rank, world_size=world_size)
        change = stream.load(json.loads(json.dumps(old.state())), old.identity(), accept=True)
        assert change is not None
        assert (sorted(change.gone), change.new) == (["2", "7"], ["x0"])
        again = RecordStream(now, seed=4, rank=old.rank, world_size=world_size)  # interrupted once more
        stream.take(1)
        assert again.load(json.loads(json.dumps(stream.state())), stream.identity()) is None
        expected = [name for name in coming if name not in ("2", "7")]
        share = len(expected) // world_size
        rest = expected[old.rank :: world_size][:share]
        assert [r.id for r in again.take(share - 1)] == rest[1:]
        found.append([r.id for r in again.take(11 // world_size)])
        assert again.epoch == 1
    assert not set(seen) & set(expected)
    assert len({name for names in found for name in names}) == 11 // world_size * world_size  # of all current rows
    assert any("x0" in names for names in found) or world_size == 2


def test_an_older_state_is_compared_as_it_was() -> None:
    state = RecordStream(records(5)).state() | {"fingerprint": "9c251b449f7f58fe"}
    assert RecordStream(records(5)).load(state, None) is None
    with pytest.raises(DataChanged, match="6 records where there were 5"):
        RecordStream(records(6)).load(state, None)
    with pytest.raises(DataChanged, match="other ids"):
        RecordStream(records(5, "x")).load(state, None)


@pytest.mark.parametrize(("before", "now"), [(2, 4), (4, 2), (3, 1), (1, 3)])
def test_another_number_of_ranks_takes_what_is_left(before: int, now: int) -> None:
    streams = [RecordStream(records(12), seed=4, rank=rank, world_size=before) for rank in range(before)]
    taken = 12 // before // 2
    seen = [record.id for stream in streams for record in stream.take(taken)]
    coming = [r.id for group in zip(*(s.peek(12 // before - taken) for s in streams), strict=True) for r in group]
    states = [json.loads(json.dumps(stream.state())) for stream in streams]
    others = [RecordStream(records(12), seed=4, rank=rank, world_size=now) for rank in range(now)]
    for stream in others:
        assert stream.load(stream.merged(states), streams[0].identity()) is None
        assert stream.consumed == len(seen) // now
        assert stream.epochs == pytest.approx(len(seen) / 12, abs=0.1)
    found = [r.id for group in zip(*(s.take(len(coming) // now) for s in others), strict=True) for r in group]
    assert found == coming[: len(coming) // now * now]
    assert {s.take(1)[0].id for s in others} <= {record.id for record in records(12)}
    assert [s.epoch for s in others] == [1] * now
    with pytest.raises(ValueError, match="position 'x', which is not a count"):
        others[0].merged([{**states[0], "position": "x"}])


def test_ranks_in_different_epochs_go_on_in_the_earliest() -> None:
    streams = [RecordStream(records(4), order="file", rank=rank, world_size=2) for rank in range(2)]
    streams[0].take(1)
    streams[1].take(3)  # one of the next epoch
    alone = RecordStream(records(4), order="file")
    alone.load(alone.merged([stream.state() for stream in streams]), None)
    assert [record.id for record in alone.take(3)] == ["2", "0", "1"]
