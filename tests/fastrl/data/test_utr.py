"""UTR dialogues: queries that identify one subject, texts that can be parsed back, valid rows and refused ones."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastrl.answers import format_tracks, parse_tracks
from fastrl.build.utr import BuildOptions, build_dialogues
from fastrl.data import DataError, load_data
from fastrl.data.clips import Clip, Span, Subject
from fastrl.data.dialogues import (
    QUERIES,
    Query,
    action_text,
    answer_text,
    ask,
    is_unique,
    make_dialogue,
    number_subjects,
    one_frame_dialogue,
    parsable_action,
    parse_actions,
    pick_query,
    select_frames,
)
from fastrl.data.utr import dialogue_row


def subject(identity: int, x: float, *spans: Span, looks: str = "", frames: int = 4, name: str = "dog") -> Subject:
    boxes = {t: (x + t, 10.0, x + t + 10, 30.0) for t in range(1, frames + 1)}
    return Subject(identity, name, boxes, looks, tuple(spans))


def clip(*subjects: Subject, frames: tuple[Any, ...] = ()) -> Clip:
    return Clip("c", 100, 100, (0.0, 0.5, 1.0, 1.5), subjects, frames)


RUNS = Span("runs", 1, 2)


@pytest.mark.parametrize(
    ("query", "other", "unique"),
    [
        (Query("spatial", "box", 2), subject(2, 60), True),
        (Query("spatial", "box", 2), subject(2, 8), False),  # overlaps by more than half
        (Query("spatial", "location", 2), subject(2, 60), True),
        (Query("spatial", "location", 2), subject(2, 14), False),  # another position in the same ninth of the picture
        (Query("spatial", "location", 4), subject(2, 14, frames=2), True),  # absent in that frame
        (Query("spatial", "appearance", 2), subject(2, 60, looks="white"), True),
        (Query("spatial", "appearance", 2), subject(2, 60, looks="Brown"), False),
        (Query("spatial", "appearance", 2), subject(2, 60, name="brown"), False),
        (Query("temporal", "span", first=1, last=2), subject(2, 60, Span("runs", 3, 4)), True),
        (Query("temporal", "span", first=1, last=2), subject(2, 60, Span("runs", 2, 4)), False),
        (Query("temporal", "time", first=1, last=2), subject(2, 60, Span("sits", 1, 2)), True),
        (Query("temporal", "action", first=1, last=2), subject(2, 60, Span("sits", 1, 2)), True),
        (Query("temporal", "action", first=1, last=2), subject(2, 60, Span("Runs", 3, 4)), False),
    ],
)
def test_a_query_is_unique_where_it_can_mean_one_subject_only(query: Query, other: Subject, unique: bool) -> None:
    asked = subject(1, 5, RUNS, looks="brown")
    assert is_unique(clip(asked, other), asked, query) is unique


def test_subjects_without_actions_are_asked_by_when_they_are_seen() -> None:
    asked, same, longer = subject(1, 5, frames=2), subject(2, 60, frames=2), subject(2, 60)
    query = Query("temporal", "span", first=1, last=2)
    assert is_unique(clip(asked, longer), asked, query)
    assert not is_unique(clip(asked, same), asked, query)
    assert ask(clip(asked, longer), asked, query) == "Who is seen only in frames 1-2, and what is the whole trajectory?"


def test_picked_queries_are_unique_and_of_every_attribute() -> None:
    data = load_data("scenes:utr?n=200&size=84&difficulty=3")
    seen = {(r.target["query"]["kind"], r.target["query"]["attribute"]) for r in data}
    assert seen == {(kind, attribute) for kind, names in QUERIES.items() for attribute in names}
    crowd = clip(*(subject(i, 5) for i in range(3)))
    assert pick_query(random.Random(0), crowd, crowd.subjects[0], "spatial") is None
    with pytest.raises(ValueError, match="unknown kind of query"):
        pick_query(random.Random(0), crowd, crowd.subjects[0], "both")


def test_questions_say_what_the_papers_figure_says() -> None:
    asked = subject(1, 5, RUNS, looks="brown")
    whole = clip(asked)
    words = [ask(whole, asked, Query("spatial", a, 3)) for a in QUERIES["spatial"]]
    words += [ask(whole, asked, Query("temporal", a, first=1, last=2)) for a in QUERIES["temporal"]]
    end = "Who is it, what does it do, and what is its trajectory?"
    assert words == [
        f"In frame 3 there is an object at [80,100,180,300]. {end}",
        f"In frame 3 there is an object in the upper left. {end}",
        f"In frame 3 there is an object that looks like this: brown. {end}",
        "Who runs in frames 1-2, and what is the whole trajectory?",
        "Who runs from 0.00 s to 0.50 s, and what is the whole trajectory?",
        "Who runs, and what is the whole trajectory?",
    ]


@pytest.mark.parametrize("kind", ["spatial", "temporal"])
def test_what_happens_is_asked_before_it_is_answered(kind: str) -> None:
    dog = subject(1, 8, RUNS)
    told, plain = replace(clip(dog), caption="A dog runs off."), clip(dog)
    query = Query("spatial", "box", 2) if kind == "spatial" else Query("temporal", "span", first=1, last=2)
    dialogue = make_dialogue(told, dog, query)
    assert dialogue.question == f"{ask(plain, dog, query)} By the way, what happens in this video?"
    assert dialogue.answer.endswith(" A dog runs off.")
    assert make_dialogue(plain, dog, query).question == ask(plain, dog, query)  # no caption: nothing to answer it with
    fewer = select_frames(dialogue, 3, "uniform", 0)
    assert fewer.question.endswith("trajectory? By the way, what happens in this video?")
    if kind == "spatial":
        assert "what happens" not in one_frame_dialogue(told, dog, query).question


def test_answers_read_back() -> None:
    spans = (Span("moves left", 1, 3), Span("stays", 4, 4))
    text = answer_text([subject(1, 5, *spans), subject(2, 60)], (100, 100), "Two dogs then play.")
    assert parse_actions(text) == spans
    tracks = parse_tracks(text)
    assert [(t.identity, t.name, len(t.boxes)) for t in tracks] == [(1, "dog", 4), (2, "dog", 4)]
    assert all(line in text for line in format_tracks(tracks).split("\n"))
    assert action_text(spans) == "It moves left in frames 1-3, then stays in frame 4."


@pytest.mark.parametrize("text", ["", "It runs in frames 9-2.", "in frames 1-2", "It " + "x" * 50_000, "<Id1>" * 5000])
def test_reading_actions_never_fails(text: str) -> None:
    assert parse_actions(text) == ()


@pytest.mark.parametrize("action", ["then runs, and: jumps.", "sits in frames 1-2", "walks <fast>;\n slowly"])
def test_any_action_can_be_made_one_that_reads_back(action: str) -> None:
    parsable = parsable_action(action)
    assert parse_actions(action_text([Span(parsable, 2, 3)])) == (Span(parsable, 2, 3),)


def test_subjects_are_numbered_by_when_and_where_they_are_seen() -> None:
    late = Subject(3, "dog", {2: (0, 0, 9, 9)})
    numbered, old = number_subjects(clip(late, subject(9, 60), subject(4, 5)))
    assert [s.identity for s in numbered.subjects] == [1, 2, 3]
    assert old == {1: 4, 2: 9, 3: 3}


@pytest.mark.parametrize("how", ["uniform", "first", "random"])
def test_frames_of_a_dialogue_can_be_chosen(how: str) -> None:
    asked = subject(1, 5, RUNS, Span("sits", 3, 4))
    for query in (Query("spatial", "box", 3), Query("temporal", "span", first=3, last=4)):
        few = select_frames(make_dialogue(clip(asked), asked, query), 2, how, 0)
        assert len(few.clip) == 2
        assert few.answer == answer_text(few.subjects, (100, 100))
        kept = {t: few.subjects[0].boxes[t] for t in (few.query.frame, few.query.first, few.query.last) if t}
        old = [asked.boxes[t] for t in (query.frame, query.first, query.last) if t]
        assert list(kept.values()) == old  # the query still identifies the same boxes
    single = one_frame_dialogue(clip(asked), asked, Query("spatial", "box", 3))
    assert len(parse_tracks(select_frames(single, 2, how, 0).answer)[0].boxes) == 1
    with pytest.raises(ValueError, match="frames can only be chosen"):
        select_frames(replace(single, answer="other words"), 2, how, 0)


@pytest.mark.parametrize("how", ["uniform", "first", "random"])
def test_chosen_frames_still_tell_a_subject_from_one_seen_longer(how: str) -> None:
    """If the query is when a subject is visible, the frames before and after distinguish subjects."""
    times = tuple(t / 2 for t in range(12))
    dog, cat = (Subject(i, name, {t: (10.0 * i, 10, 10.0 * i + 10 + t, 30) for t in range(*seen)}, "", ())
                for i, name, seen in ((1, "dog", (3, 10)), (2, "cat", (2, 11))))  # fmt: skip
    whole = Clip("c", 100, 100, times, (dog, cat), ())
    query = Query("temporal", "time", first=3, last=9)
    assert is_unique(whole, dog, query)
    alone = replace(whole, subjects=(dog,))  # in the form of a row
    few = select_frames(make_dialogue(alone, dog, query), 6, how, 0)
    shown = [round(t * 2) + 1 for t in few.clip.seconds]
    rival = replace(cat, boxes={place: cat.boxes[t] for place, t in enumerate(shown, start=1) if t in cat.boxes})
    assert len(few.clip) == 6
    assert is_unique(replace(few.clip, subjects=(few.subjects[0], rival)), few.subjects[0], few.query)


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, Any]]:
    frames = []
    for number in range(4):
        Image.new("RGB", (100, 100)).save(tmp_path / f"{number}.png")
        frames.append(f"{number}.png")
    asked = subject(1, 5, RUNS, looks="brown")
    whole = clip(asked, subject(2, 60), frames=tuple(frames))
    one = make_dialogue(whole, asked, Query("spatial", "box", 2))
    two = replace(make_dialogue(replace(whole, id="d"), asked, Query("temporal", "action", first=1, last=2)), tpl=0.25)
    return [dialogue_row(one, frames), dialogue_row(two, frames)]


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_become_records(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    data = load_data(f"utr:{write(tmp_path, rows)}")
    assert [r.id for r in data] == ["c", "d"]
    record = data[0]
    assert (record.task, len(record.images)) == ("trajectory", 4)
    content = record.messages[0]["content"]
    assert [part["type"] for part in content] == ["text", "image"] * 4 + ["text"]
    assert [part["text"] for part in content[:8:2]] == ["Frame1 0s:", "Frame2 0.5s:", "Frame3 1s:", "Frame4 1.5s:"]
    assert content[-1]["text"] == rows[0]["question"]
    assert record.target["answer"] == rows[0]["answer"]
    assert record.target["query"] == {"kind": "spatial", "attribute": "box", "frame": 2}
    assert [t["id"] for t in record.target["tracks"]] == [1]
    assert "tpl" not in record.target
    assert data[1].target["tpl"] == 0.25
    kept = load_data(f"utr:{tmp_path}/d.jsonl?min_tpl=0.2")
    assert ([r.id for r in kept], kept.reasons) == (["d"], {"no tpl": 1})
    assert len(load_data(f"utr:{tmp_path}/d.jsonl?frames=2&sample=first")[0].images) == 2


def test_frames_of_a_video_file_stay_in_it(data_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("av")
    video = data_dir / "video/files/mmtracking_demo.mp4"
    runner = {"id": 4, "name": "person", "boxes": {str(t): [100, 100, 200, 300] for t in (1, 2, 3)}}
    source = {"id": "v", "video": str(video), "video_frames": [1, 3, 5], "width": 1920, "height": 1080, "fps": 3}
    (tmp_path / "c.jsonl").write_text(json.dumps(source | {"subjects": [runner]}))
    out = tmp_path / "d.jsonl"
    assert build_dialogues(BuildOptions(f"tracks:{tmp_path}/c.jsonl", frames=2, min_frames=2), out)["kept"] == 2
    assert [json.loads(line)["video_frames"] for line in out.read_text().splitlines()] == [[1, 3]] * 2
    record = load_data(f"utr:{out}")[0]
    assert [image.size for image in record.images if not isinstance(image, Path)] == [(1920, 1080)] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": "It runs."}, "answer must be trajectory text"),
        ({"answer": "Track1: dog<Id7>Frame1:[0,0,9,9];</Id7>"}, "identity 7"),
        ({"answer": "Track1: dog<Id1>Frame5:[0,0,9,9];</Id1>"}, "frame 5, the clip has 4"),
        ({"answer": "Track1: dog<Id1>Frame1:[0,0,9,1009];</Id1>"}, "0 to 1000"),
        ({"query": {"kind": "spatial", "attribute": "span", "frame": 1}}, "'span' is not spatial"),
        ({"query": {"kind": "spacial", "attribute": "box", "frame": 1}}, "did you mean 'spatial'"),
        ({"query": {"kind": "spatial", "attribute": "box", "frame": 9}}, "must lie in 1 to 4"),
        ({"query": {"kind": "temporal", "attribute": "span", "first": 3, "last": 2}}, "must lie in 1 to 4"),
        ({"query": None}, "query must be an object"),
        ({"frames": ["no.png"] * 4}, "image not found"),
        ({"frames": ["0.png"]}, "one for each frame"),
        ({"subjects": []}, "at least one subject"),
        ({"question": " "}, "question is empty"),
        ({"tpl": "high"}, "tpl must be a finite number"),
        ({"id": "c"}, "already the id of"),
    ],
)
def test_bad_rows_are_reported_with_file_and_line(
    changes: dict[str, Any], message: str, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    path = write(tmp_path, [rows[0], rows[1] | changes])
    with pytest.raises(DataError, match=message) as caught:
        load_data(f"utr:{path}")
    assert all(p.where == f"{path}:2" or f"{path}:2" in p.where for p in caught.value.problems)
    assert len(load_data(f"utr:{path}", skip_bad=True)) == 1
