"""Steps in which all groups have equal rewards are reported, once per series of such steps."""

from __future__ import annotations

from fastrl.run.variance import AFTER, EqualRewards


def told(spreads: list[float | None], *, done: int = 0, last: int = 99) -> tuple[list[int], str]:
    """Steps with a note, and the note at the end."""
    watch, message = EqualRewards(done, last), []
    for number, spread in enumerate(spreads, done + 1):
        row = {"step": number, "reward/mean": 0.0, **({} if spread is None else {"reward/group_std": spread})}
        text = watch.step(row)
        if text:
            message.append(number)
            assert f"to {number}: the rewards of every group were equal (mean reward 0)" in text or number == last
    return message, watch.end(done + len(spreads))


def test_a_few_in_a_row_are_said_once() -> None:
    assert told([0.0] * (AFTER + 5)) == ([AFTER], "in all 8 steps, no group had different rewards: " + TAUGHT)
    assert told([0.1] + [0.0] * 4)[0] == [AFTER + 1]
    assert told([*[0.0] * 4, 0.1, *[0.0] * 4], done=10)[0] == [13, 18]


def test_what_has_rewards_that_differ_or_none_is_not_said() -> None:
    assert told([0.0, 0.0, 0.1] * 5) == ([], "")
    assert told([None] * 9) == ([], "")


def test_a_run_too_short_for_that_is_said_at_its_last_step() -> None:
    assert told([0.0], last=1) == ([1], "in its only step, no group had different rewards: " + TAUGHT)
    assert told([0.1, 0.0], last=2) == ([2], "")
    assert told([]) == ([], "")


TAUGHT = "the model has learned nothing from them"
