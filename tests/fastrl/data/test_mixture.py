"""Mixtures: proportions, tasks, schedules and curricula as documented, and exact resumption of positions."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

from fastrl.data import DataError, load_data
from fastrl.data.identity import identify
from fastrl.data.mixture import Curriculum, Mixture, MixturePlan, Part, entry_names, weight_at
from fastrl.data.orders import shuffled
from fastrl.data.records import Record, question


def records(name: str, n: int, task: str = "ocr", **columns: Any) -> list[Record]:
    made = []
    for i in range(n):
        row = {key: value(i) for key, value in columns.items()}
        made.append(Record(f"{i}", task, (), question("ocr", images=0), {"text": f"{name} {i}"}, columns=row))
    return made


def draws(plan: MixturePlan, epochs: int = 1) -> list[Record]:
    return [plan.mixture[index] for epoch in range(epochs) for index in plan.epoch(epoch)]


def test_records_know_their_part_and_have_ids_of_their_own() -> None:
    mixture = Mixture([Part("a", records("a", 3)), Part("b", records("b", 2))])
    assert [record.id for record in mixture] == ["a/0", "a/1", "a/2", "b/0", "b/1"]
    assert [record.origin for record in mixture[1:4]] == ["a", "a", "b"]
    assert mixture[-1].target == {"text": "b 1"}
    with pytest.raises(IndexError):
        mixture[5]


@pytest.mark.parametrize("step", [1, 4, 7])
@pytest.mark.parametrize(
    ("by", "weights", "shares"),
    [
        ("row", (1.0, 1.0, 1.0), (0.6, 0.3, 0.1)),  # parts of 60, 30 and 10 rows
        ("row", (0.5, 1.0, 3.0), (1 / 3, 1 / 3, 1 / 3)),
        ("task", (1.0, 1.0, 1.0), (1 / 3, 1 / 6, 1 / 2)),  # a and b are of one task, which counts as much as c's
        ("task", (1.0, 1.0, 3.0), (1 / 6, 1 / 12, 3 / 4)),
    ],
)
def test_draws_follow_the_shares(by: Any, weights: tuple[float, ...], shares: tuple[float, ...], step: int) -> None:
    sizes, tasks = (60, 30, 10), ("ocr", "ocr", "caption")
    parts = [Part(n, records(n, s, t), w) for n, s, t, w in zip("abc", sizes, tasks, weights, strict=True)]
    plan = MixturePlan(Mixture(parts), seed=3, step=step, by=by)
    for upto in (20, 50, 100, 300):
        found = Counter(record.origin for record in draws(plan, 3)[:upto])
        for name, share in zip("abc", shares, strict=True):
            assert abs(found[name] - share * upto) <= 2 + step


def test_every_row_comes_once_in_each_pass_of_its_part() -> None:
    plan = MixturePlan(Mixture([Part("a", records("a", 8)), Part("b", records("b", 5), 4.0)]), seed=1, step=1)
    seen = [record.id for record in draws(plan, 6)]
    for name, size in (("a", 8), ("b", 5)):
        own = [identity for identity in seen if identity.startswith(name)]
        passes = [own[i : i + size] for i in range(0, len(own) - size + 1, size)]
        assert all(len(set(each)) == size for each in passes)
        assert any(one != other for one, other in pairwise(passes))  # each in its own order


def test_an_epoch_is_the_same_whenever_it_is_asked_for() -> None:
    mixture = Mixture([Part("a", records("a", 9), {0: 1.0, 5: 0.0}), Part("b", records("b", 6), {0: 0.0, 5: 2.0})])
    made = [MixturePlan(mixture, seed=5, step=4).epoch(epoch) for epoch in range(4)]  # each has weight 0 at one end
    plan = MixturePlan(mixture, seed=5, step=4)
    assert [plan.epoch(epoch) for epoch in range(4)] == made
    assert [plan.epoch(epoch) for epoch in (3, 0, 2)] == [made[3], made[0], made[2]]
    assert MixturePlan(mixture, seed=6, step=4).epoch(0) != made[0]


def test_a_schedule_moves_from_one_part_to_the_other() -> None:
    mixture = Mixture([Part("a", records("a", 40), {0: 1.0, 10: 0.0}), Part("b", records("b", 40), {0: 0.0, 10: 1.0})])
    found = draws(MixturePlan(mixture, seed=0, step=4))
    steps = [Counter(r.origin for r in found[i : i + 4])["b"] for i in range(0, 80, 4)]
    assert steps[0] == 0
    assert steps[10:] == [4] * 10
    assert all(b - a >= -1 for a, b in pairwise(steps))


@pytest.mark.parametrize(("step", "want"), [(0, 1.0), (5, 1.0), (10, 1.0), (15, 0.6), (20, 0.2), (99, 0.2)])
def test_weights_lie_on_straight_lines(step: int, want: float) -> None:
    assert weight_at({10: 1.0, 20: 0.2}, step) == pytest.approx(want)
    assert weight_at(0.5, step) == 0.5


def test_a_curriculum_begins_with_the_easiest_and_ends_with_all() -> None:
    rows = records("a", 40, level=lambda i: (i * 17) % 40)
    plan = MixturePlan(Mixture([Part("a", rows)]), seed=2, step=4, curriculum=Curriculum("level", steps=10, start=0.1))
    found = draws(plan, 3)
    for step in range(10):
        hardest = max(record.columns["level"] for record in found[4 * step : 4 * step + 4])
        assert hardest < round((0.1 + 0.9 * step / 10) * 40)
    rest = [record.id for record in found[40:80]]
    assert len(set(rest)) == 40  # then passes over all rows


@pytest.mark.parametrize(
    ("columns", "by"), [({"boxes": lambda i: "[1, 2]" * (9 - i)}, "boxes"), ({"level": lambda i: -i}, "level")]
)
def test_what_has_a_length_or_a_number_tells_how_hard_a_row_is(columns: dict[str, Any], by: str) -> None:
    rows = records("a", 9, **columns)
    plan = MixturePlan(Mixture([Part("a", rows)]), seed=2, step=1, curriculum=Curriculum(by, steps=1, start=0.1))
    assert draws(plan)[0].id == "a/8"
    with pytest.raises(DataError, match=r"no number, list or text in 'hardness'.* has .*text"):
        MixturePlan(Mixture([Part("a", rows)]), seed=2, step=1, curriculum=Curriculum("hardness", steps=1))


def test_weights_that_leave_nothing_are_an_error_at_their_step() -> None:
    plan = MixturePlan(Mixture([Part("a", records("a", 4), {0: 1.0, 2: 0.0})]), seed=0, step=1)
    with pytest.raises(DataError, match=r"step 2: every weight of data\.mix is 0"):
        plan.epoch(0)


def test_names_are_given_or_taken_from_the_spec() -> None:
    specs = [
        (None, "refexp:d/train.jsonl?limit=3"),
        (None, "pixmo:e/train.jsonl"),
        ("ocr", "ocr:x"),
        (None, "scenes:ocr?n=3"),
    ]
    assert entry_names(specs) == ["train", "train-2", "ocr", "ocr-2"]


@pytest.mark.parametrize(("n", "buffer"), [(10, 3), (9, 3), (5, 1), (4, 100), (0, 2)])
def test_a_bounded_shuffle_keeps_neighbours_together(n: int, buffer: int) -> None:
    order = shuffled(n, 7, 2, buffer=buffer)
    assert sorted(order) == list(range(n))
    assert order == shuffled(n, 7, 2, buffer=buffer)
    blocks: list[int] = []
    for index in order:
        if not blocks or blocks[-1] != index // buffer:
            blocks.append(index // buffer)
    assert len(blocks) == len(set(blocks))  # a block is complete before the next one starts
    if n > buffer > 1:
        assert order != shuffled(n, 7, 3, buffer=buffer)


def test_a_mixture_of_files_is_compared_whole_and_one_with_drawn_scenes_in_samples() -> None:
    whole = Mixture([Part("a", records("a", 50)), Part("b", records("b", 40))])
    assert identify(whole).whole
    assert identify(whole).ids[50] == "b/0"
    drawn = Mixture([Part("a", records("a", 50)), Part("s", load_data("scenes:ocr?n=40"))])
    assert not identify(drawn).whole
