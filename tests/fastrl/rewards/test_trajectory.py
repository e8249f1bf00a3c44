"""Trajectory reward: what a single frame can earn is bounded (a property test), tracking earns 1, and named cases."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastrl.answers import Track, View, format_answer, format_tracks
from fastrl.data import load_data
from fastrl.data.records import Record
from fastrl.rewards import reward_for
from fastrl.rewards.trajectory import credit

Box = tuple[float, float, float, float]
EARNED = ("iou", "coverage", "order")
ROUNDING = 1e-9
reward = reward_for("trajectory")


def record(tracks: list[dict[int, Box]], spans: list[list[tuple[str, int, int]]] | None = None) -> Record:
    """A record whose answers are in original pixels; subject k is called ``thing k``."""
    spans = spans or [[] for _ in tracks]
    listed = [
        {
            "id": k,
            "name": f"thing {k}",
            "boxes": boxes,
            "spans": [{"action": a, "first": first, "last": last} for a, first, last in acts],
        }
        for k, (boxes, acts) in enumerate(zip(tracks, spans, strict=True), start=1)
    ]
    return Record("a", "trajectory", (), (), {"tracks": listed, "frames": 9}, frame="original")


def text(tracks: list[dict[int, Box]], message: list[str] | None = None) -> str:
    lines = [format_tracks([Track(k, f"thing {k}", boxes)]) for k, boxes in enumerate(tracks, start=1)]
    return "\n".join(f"{line} {s}".strip() for line, s in zip(lines, message or [""] * len(lines), strict=True))


def parts(answer: str, row: Record, **options: Any) -> dict[str, float]:
    return {name: values[0] for name, values in reward_for("trajectory", **options)([answer], row).items()}


def moving(frames: int, step: float = 30.0, y: float = 10.0) -> dict[int, Box]:
    return {t: (step * t, y, step * t + 40, y + 40) for t in range(1, frames + 1)}


# ---- the bound

ACTIONS = ("moves left", "stays", "turns")
corner = st.integers(0, 60).map(float)
boxes = st.tuples(corner, corner, corner, corner).map(lambda c: (c[0], c[1], c[0] + 1 + c[2], c[1] + 1 + c[3]))


@st.composite
def clips(draw: st.DrawFn) -> tuple[list[dict[int, Box]], list[list[tuple[str, int, int]]]]:
    """One to three subjects, still, slow or fast, visible in all of two to seven frames, with two actions each."""
    frames, count = draw(st.integers(2, 7)), draw(st.integers(1, 3))
    tracks, spans = [], []
    for _ in range(count):
        first, wild = draw(boxes), draw(st.booleans())
        step = draw(st.integers(0, 20))
        track = {}
        for t in range(1, frames + 1):
            track[t] = draw(boxes) if wild else (first[0] + step * t, first[1], first[2] + step * t, first[3])
        tracks.append(track)
        cut = draw(st.integers(1, frames - 1))
        a, b = draw(st.permutations(ACTIONS))[:2]
        spans.append([(a, 1, cut), (b, cut + 1, frames)])
    return tracks, spans


def action_text(spans: list[tuple[str, int, int]]) -> str:
    return "It " + ", then ".join(f"{a} in frames {first}-{last}" for a, first, last in spans) + "."


def assert_bounded(answer: str, row: Record, frames: int) -> None:
    found = parts(answer, row)
    for name in EARNED:
        assert found[name] <= 1 / frames + ROUNDING, (name, answer)
    assert found["format"] == 0.0
    # for any weights: at most 1/T of what the components can give
    weights = {"iou": 3.0, "coverage": 0.5, "order": 2.0, "format": 1.0}
    weighted = replace(reward, weights=weights)
    assert weighted.total({k: [v] for k, v in found.items()})[0] <= (3.0 + 0.5 + 2.0) / frames + ROUNDING


@given(clip=clips(), box=st.lists(boxes, min_size=3, max_size=3), data=st.data())
def test_a_constant_box_earns_at_most_one_frame(clip: Any, box: list[Box], data: st.DataObject) -> None:
    """Any box, for any frames of each subject, even together with the true actions."""
    tracks, spans = clip
    frames = len(tracks[0])
    some = st.sets(st.integers(1, frames), min_size=1)
    found = [dict.fromkeys(data.draw(some), box[k]) for k in range(len(tracks))]
    message = [action_text(s) for s in spans] if data.draw(st.booleans()) else None
    assert_bounded(text(found, message), record(tracks, spans), frames)


@given(clip=clips(), data=st.data())
def test_the_true_box_of_one_frame_copied_anywhere_earns_at_most_one_frame(clip: Any, data: st.DataObject) -> None:
    tracks, spans = clip
    frames = len(tracks[0])
    source = data.draw(st.integers(1, frames))
    some = st.sets(st.integers(1, frames), min_size=1)
    found = [dict.fromkeys(data.draw(some), track[source]) for track in tracks]
    message = [action_text(s) for s in spans] if data.draw(st.booleans()) else None
    assert_bounded(text(found, message), record(tracks, spans), frames)


@given(clip=clips(), data=st.data())
def test_the_truth_of_one_frame_alone_earns_at_most_one_frame(clip: Any, data: st.DataObject) -> None:
    tracks, spans = clip
    frames = len(tracks[0])
    first = data.draw(st.sampled_from([1, data.draw(st.integers(1, frames))]))
    found = [{first: track[first]} for track in tracks]
    assert_bounded(text(found, [action_text(s) for s in spans]), record(tracks, spans), frames)


@given(clip=clips(), data=st.data())
def test_with_gaps_the_bound_is_the_frame_s_share_of_the_true_boxes(clip: Any, data: st.DataObject) -> None:
    tracks, _ = clip
    shown = [{t: b for t, b in track.items() if t == 1 or data.draw(st.booleans())} for track in tracks]
    found = [dict.fromkeys(track, track[1]) for track in shown]
    share = len(shown) / sum(map(len, shown))
    assert parts(text(found), record(shown))["iou"] <= share + ROUNDING


@given(clip=clips(), keep=st.integers(1, 6))
def test_part_of_the_frames_earns_at_most_its_part(clip: Any, keep: int) -> None:
    tracks, spans = clip
    frames = len(tracks[0])
    found = [{t: b for t, b in track.items() if t <= keep} for track in tracks]
    values = parts(text(found), record(tracks, spans))
    assert max(values[name] for name in ("iou", "coverage")) <= min(1.0, keep / frames) + ROUNDING


@pytest.mark.parametrize("frames", [2, 5, 12])
def test_a_still_subject_earns_one_frame_at_most_even_when_right(frames: int) -> None:
    still = [dict.fromkeys(range(1, frames + 1), (10.0, 10.0, 50.0, 50.0))]
    row = record(still, [[("stays", 1, frames)]])
    found = parts(text(still, [f"It stays in frames 1-{frames}."]), row)
    assert [found[name] for name in EARNED] == pytest.approx([1 / frames] * 3)


# ---- rewards of correct tracking


def test_the_whole_truth_earns_everything_and_the_bound_is_far_below() -> None:
    tracks = [moving(6), moving(6, -20.0, 100.0)]
    spans = [[("moves right", 1, 3), ("stays", 4, 6)], [("stays", 1, 3), ("moves left", 4, 6)]]
    answer = text(tracks, [action_text(s) for s in spans])
    assert parts(answer, record(tracks, spans)) == pytest.approx({"iou": 1, "coverage": 1, "order": 1, "format": 0})


def test_actions_in_the_wrong_order_earn_nothing_beyond_chance() -> None:
    tracks, spans = [moving(6)], [[("moves right", 1, 3), ("stays", 4, 6)]]
    row = record(tracks, spans)
    swapped = text(tracks, [action_text([("stays", 1, 3), ("moves right", 4, 6)])])
    one = text(tracks, [action_text([("moves right", 1, 6)])])
    assert parts(swapped, row)["order"] == 0.0
    assert parts(one, row)["order"] == pytest.approx(0.5 / 6)
    assert parts(text(tracks), row)["order"] == 0.0


def test_more_frames_right_earn_more() -> None:
    row = record([moving(8)])
    values = [parts(text([{t: b for t, b in moving(8).items() if t <= n}]), row)["iou"] for n in range(1, 9)]
    assert values == sorted(values)
    assert values[-1] == pytest.approx(1.0)


def test_an_identity_that_changes_subject_loses_what_comes_after() -> None:
    a, b = moving(6), moving(6, -30.0, 200.0)
    row = record([a, b])
    swapped = [{t: (a if t <= 3 else b)[t] for t in a}, {t: (b if t <= 3 else a)[t] for t in a}]
    assert parts(text(swapped), row)["iou"] <= 0.5
    assert parts(text([b, a]), row)["iou"] == pytest.approx(1.0)  # a track's number does not matter


def test_surplus_boxes_and_tracks_lower_the_reward() -> None:
    row = record([moving(4)])
    spare = dict.fromkeys(range(1, 5), (500.0, 500.0, 520.0, 520.0))
    assert parts(text([moving(4), spare]), row)["iou"] == pytest.approx(0.5)
    beyond = moving(4) | {9: (0.0, 0.0, 5.0, 5.0)}
    assert parts(text([beyond]), row)["iou"] == pytest.approx(4 / 5)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Track1: thing 1<Id1>Frame1:[0,10,40,50];Frame2:[30,10,70,50];</Id1>", 0.0),
        ("thing 1<Id1>Frame1:[0,10,40,50];</Id1> It stays in frames 1-2. A quiet day.\nIndeed.", 0.0),
        ("Track1: thing 1<Id1>Frame1:[0,10,40,50];", -1.0),
        ("Track1: thing 1<Id1>Frame1:[0,10,40,50];</Id2>", -1.0),
        ("Track1: thing 1<Id1>Frame2:[0,10,40,50];Frame1:[0,10,40,50];</Id1>", -1.0),
        ("Track1: thing 1<Id1></Id1>", -1.0),
        ("Here it is:\nTrack1: thing 1<Id1>Frame1:[0,10,40,50];</Id1>", -1.0),
        ("", -1.0),
        ("[0, 10, 40, 50]", -1.0),
    ],
)
def test_format_is_a_fine(answer: str, expected: float) -> None:
    assert parts(answer, record([moving(2)]))["format"] == expected


def test_scene_answers_in_0_to_1000_earn_nearly_everything_where_something_moves() -> None:
    for row in load_data("scenes:trajectory?n=24&seed=5"):
        answer = format_answer("trajectory", row.target, view=View.unresized(*row.target["size"]))
        spans = row.target["tracks"][0]["spans"]
        found = parts(answer, row)
        assert found["format"] == 0.0
        if any(s["action"] != "stays" and s["last"] - s["first"] >= 2 for s in spans):
            ends = {tuple(b) for b in row.target["tracks"][0]["boxes"].values()}
            assert found["iou"] > (0.9 if len(ends) > 3 else 0.1)
        elif len(spans) == 1:
            assert found["iou"] <= 1 / 6


def test_a_guess_from_the_first_frame_earns_less_than_one_frame_on_average() -> None:
    rows = list(load_data("scenes:trajectory?n=120&seed=3&size=84"))
    rng, answers = random.Random(0), []
    for row in rows:
        (track,) = row.target["tracks"]
        x, y, x2, _ = track["boxes"][1]
        side, (dx, dy) = x2 - x, rng.choice([(-8, 0), (8, 0), (0, -8), (0, 8), (0, 0)])
        guess = {}
        for t in track["boxes"]:
            guess[t] = (x, y, x + side, y + side)
            x, y = min(max(x + dx, 0), 84 - side), min(max(y + dy, 0), 84 - side)
        answers.append(format_tracks([Track(1, track["name"], guess)], View.unresized(84, 84)))
    earned = reward.score(answers, rows)["iou"]
    assert 0.0 < sum(earned) / len(earned) < 1 / 6


# ---- the formula, and batching


def oracle(a: list[list[float]], given: set[int], b: list[list[float]], shown: set[int], still: float) -> float:
    n, both = len(shown), sorted(given & shown)
    if not n:
        return 0.0
    right = sum(a[t][t] for t in both)
    gained = right - max((sum(a[s][t] for t in both) for s in both), default=0.0)
    possible = max(n - max(sum(b[s][t] for t in shown) for s in shown), still * n)
    c = right / n
    return c / n + (1 - 1 / n) * max(0.0, min(c, gained / possible))


@given(st.data())
def test_credit_is_the_formula(data: st.DataObject) -> None:
    frames, pairs = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    unit = st.lists(
        st.lists(st.floats(0, 1, width=16), min_size=frames, max_size=frames), min_size=frames, max_size=frames
    )
    some = st.sets(st.integers(0, frames - 1))
    cases = [(data.draw(unit), data.draw(some), data.draw(unit), data.draw(some)) for _ in range(pairs)]
    masks = [[[t in case[i] for t in range(frames)] for case in cases] for i in (1, 3)]
    got = credit(
        torch.tensor([case[0] for case in cases], dtype=torch.float64),
        torch.tensor(masks[0]),
        torch.tensor([case[2] for case in cases], dtype=torch.float64),
        torch.tensor(masks[1]),
        0.05,
    )
    assert got.tolist() == pytest.approx([oracle(*case, 0.05) for case in cases], abs=1e-12)
    assert bool(((got >= 0) & (got <= 1)).all())


def test_answers_are_scored_together_as_they_are_alone() -> None:
    short, long = record([moving(3)]), record([moving(9), moving(7, -9.0)], [[("runs", 1, 4), ("rests", 5, 9)], []])
    spam = "".join(format_tracks([Track(i, "x", moving(2, float(i)))]) + "\n" for i in range(60))
    answers = [text([moving(3)]), text([moving(9)], ["It runs in frames 1-9."]), spam, "junk", text([moving(9, 29.0)])]
    rows = [short, long, long, short, short]
    together = reward.score(answers, rows)
    for i in range(len(answers)):
        alone = reward.score([answers[i]], [rows[i]])
        assert {k: v[i] for k, v in together.items()} == pytest.approx({k: v[0] for k, v in alone.items()}, abs=1e-12)


def test_loose_columns_and_json_truth_are_read_as_well() -> None:
    row = record([moving(3)])
    tracks = [{"id": 1, "name": "thing 1", "boxes": {str(t): list(b) for t, b in moving(3).items()}}]
    assert reward(completions=[text([moving(3)])], tracks=[tracks], frame=["original"])[0] == pytest.approx(2.0)
    scored = reward(
        data_source="x",
        solution_str=text([moving(3)]),
        ground_truth={"tracks": tracks},
        extra_info={"frame": "original"},
    )
    assert scored["iou"] == pytest.approx(parts(text([moving(3)]), row)["iou"])
    with pytest.raises(ValueError, match="track 1: needs 'boxes'"):
        reward(completions=["x"], tracks=[[{"id": 1}]])


@pytest.mark.parametrize("name", ["threshold", "still"])
def test_options_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must lie in"):
        reward_for("trajectory", **{name: 0.0})


def test_truth_without_boxes_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one track"):
        reward(["x"], record([]))
