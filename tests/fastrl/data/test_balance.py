"""Records dealt to ranks by their work: each once, the same on every rank, resumable, and the largest share falls."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastrl.data.balance import KEPT, Balance, Shares, deal
from fastrl.data.mixture import Mixture, Part, listed
from fastrl.data.records import Dataset, Record
from fastrl.data.scenes import Scenes
from fastrl.data.stream import RecordStream


def records(n: int) -> list[Record]:
    """Of different works, by their ids."""
    return [Record(id=str(i), task="ocr", images=(), messages=(), target={"text": ""}) for i in range(n)]


def work(record: Record) -> float:
    """From 1 to 53, in no order."""
    return 1.0 + (int(record.id) * 7919) % 53


def streams(n: int, ranks: int, count: int, **options: object) -> list[RecordStream]:
    made = {"seed": 3, "balance": Balance(count, work), **options}
    return [RecordStream(records(n), rank=rank, world_size=ranks, **made) for rank in range(ranks)]  # type: ignore[arg-type]


def step(all_ranks: Sequence[RecordStream], count: int) -> list[list[Record]]:
    return [stream.take(count) for stream in all_ranks]


@given(ranks=st.integers(1, 5), count=st.integers(1, 5), data=st.data())
def test_every_rank_gets_equally_many_and_its_sum_is_near_the_mean(ranks: int, count: int, data: st.DataObject) -> None:
    works = data.draw(st.lists(st.floats(0, 100), min_size=ranks * count, max_size=ranks * count))
    shares = deal(works, ranks)
    assert sorted(place for share in shares for place in share) == list(range(len(works)))
    assert {len(share) for share in shares} == {count}
    sums = [sum(works[place] for place in share) for share in shares]
    assert max(sums) - min(sums) <= max(works) - min(works) + 1e-9


def test_equal_works_are_dealt_in_turn() -> None:
    assert deal([2.0] * 6, 3) == [[0, 3], [1, 4], [2, 5]]
    assert deal([1, 9, 2, 8, 3, 7], 2) == [[1, 4, 2], [3, 5, 0]]  # 14 and 16; in turn it would be 6 and 24


def test_a_step_is_that_of_one_process_and_its_largest_share_falls() -> None:
    """Over four epochs of 48 records, in steps of 4 on each of 4 ranks, it is 3 % above the mean instead of 31 %."""
    one, by_work = RecordStream(records(48), seed=3), streams(48, 4, 4)
    by_number = streams(48, 4, 4, balance=None)
    longest = {"work": 0.0, "number": 0.0, "mean": 0.0}
    for _ in range(12):
        shares, plain = step(by_work, 4), step(by_number, 4)
        want = sorted(record.id for record in one.take(16))
        assert sorted(record.id for share in shares for record in share) == want
        longest["work"] += max(sum(map(work, share)) for share in shares)
        longest["number"] += max(sum(map(work, share)) for share in plain)
        longest["mean"] += sum(work(record) for share in shares for record in share) / 4
    assert longest["work"] < 1.04 * longest["mean"]
    assert longest["number"] > 1.3 * longest["mean"]


@pytest.mark.parametrize(("n", "ranks", "count"), [(21, 2, 4), (13, 3, 2), (30, 4, 3)])
def test_steps_across_epochs_stay_those_of_the_order(n: int, ranks: int, count: int) -> None:
    """Where an epoch is no whole number of steps, too, ranks together take what they would take in turn."""
    by_work, by_number = streams(n, ranks, count), streams(n, ranks, count, balance=None)
    for _ in range(3 * n // count):
        found, plain = (sorted(r.id for share in step(some, count) for r in share) for some in (by_work, by_number))
        assert found == plain


@given(takes=st.lists(st.integers(0, 5), max_size=5), rank=st.integers(0, 2))
def test_resuming_anywhere_gives_what_would_have_come(takes: list[int], rank: int) -> None:
    stream, other = (streams(20, 3, 4)[rank] for _ in range(2))
    for count in takes:
        assert [r.id for r in stream.peek(count)] == [r.id for r in stream.take(count)]
    other.load(json.loads(json.dumps(stream.state())), stream.identity())
    assert [r.id for r in other.take(17)] == [r.id for r in stream.take(17)]


@pytest.mark.parametrize("counts", [(4, 4), (5, 3), (8, 2)])
@pytest.mark.parametrize("now", [1, 3])
def test_other_ranks_take_what_is_left(counts: tuple[int, int], now: int) -> None:
    """Of ranks that stand at different places of a block, too, as after replacing records."""
    before = streams(24, 2, 4)
    seen = {r.id for stream, count in zip(before, counts, strict=True) for r in stream.take(count)}
    states = [json.loads(json.dumps(stream.state())) for stream in before]
    after = streams(24, now, 2)
    for stream in after:
        stream.load(stream.merged(states), before[0].identity())
    left = 24 - sum(counts)
    found = [r.id for share in step(after, left // now) for r in share]
    assert len(set(found)) == left // now * now
    assert not seen & set(found)


def test_a_checkpoint_from_before_is_dealt_in_turn_to_the_end_of_its_epoch() -> None:
    old, new = streams(24, 2, 4, balance=None), streams(24, 2, 4)
    for one, other in zip(old, new, strict=True):
        one.take(3)
        other.load(one.state(), one.identity())
    assert [[r.id for r in share] for share in step(new, 9)] == [[r.id for r in share] for share in step(old, 9)]
    assert [[r.id for r in share] for share in step(new, 4)] != [[r.id for r in share] for share in step(old, 4)]


def test_a_record_that_cannot_be_weighed_is_dealt_all_the_same() -> None:
    def broken(record: Record) -> float:
        if record.id == "3":
            raise OSError("no such picture")
        return work(record)

    both = streams(8, 2, 2, balance=Balance(2, broken))
    assert len({r.id for share in step(both, 4) for r in share}) == 8


def test_blocks_are_dealt_when_they_are_reached() -> None:
    asked: list[int] = []
    shares = Shares(range(80), 2, block=4, work=lambda index: float(asked.append(index) or 1))
    shares.at(0, 1)
    assert asked == list(range(8))
    for place in range(40):
        shares.at(place, 0)
    assert asked == list(range(80))
    assert len(shares._dealt) == KEPT


def test_only_records_that_exist_are_weighed() -> None:
    assert listed(Dataset(records(2)))
    assert not listed(Scenes("ocr", 10, 0, 1, 56, 2))
    parts = [Part("a", Dataset(records(2)), 1.0), Part("b", Scenes("ocr", 10, 0, 1, 56, 2), 1.0)]
    assert not listed(Mixture(parts))
    assert listed(Mixture(parts[:1]))
