"""Building UTR dialogues from real pedestrians, mask tracks and scenes: lossless, unique, resumable, counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastrl.answers import format_tracks, parse_tracks
from fastrl.build.utr import BuildOptions, build_dialogues, parse_queries
from fastrl.data import load_data

SCENES = "scenes:trajectory?n=70&size=84&difficulty=3"


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.fixture
def masks(data_dir: Path, tmp_path: Path) -> str:
    """The mask tracks with blank frames, as the video itself is not part of the sample."""
    file = data_dir / "video/sav_000001/sav_000001_manual.json"
    data = json.loads(file.read_text())
    frames = tmp_path / "frames"
    frames.mkdir()
    for number in range(len(data["masklet"])):
        Image.new("L", (int(data["video_width"]), int(data["video_height"]))).save(frames / f"{number}.png")
    return f"sav:{file}?images={frames}"


@pytest.mark.parametrize("source", ["pedestrians", "masks"])
def test_build_parse_rebuild_is_lossless(source: str, data_dir: Path, tmp_path: Path, request: Any) -> None:
    spec = request.getfixturevalue("masks") if source == "masks" else f"mot:{data_dir}/video/pets09_s2l1_a"
    out = tmp_path / "d.jsonl"
    text: list[str] = []
    summary = build_dialogues(BuildOptions(spec, frames=8, motion=True), out, say=text.append)
    assert summary["notes"] == ({"gap": 2} if source == "masks" else {})
    assert sum("gaps, the first between frames" in line for line in text) == sum(summary["notes"].values())
    rows = rows_of(out)
    assert summary["kept"] == len(rows) > 0
    (truth,) = load_data(spec)
    tracks = {t["id"]: t for t in truth.target["tracks"]}
    for row, record in zip(rows, load_data(f"utr:{out}"), strict=True):
        assert record.target["answer"] == row["answer"]
        parsed = parse_tracks(row["answer"])
        assert row["answer"].startswith(format_tracks(parsed))
        (own,) = row["subjects"]
        assert (parsed[0].identity, parsed[0].name) == (own["id"], own["name"])
        assert {str(t) for t in parsed[0].boxes} == set(own["boxes"])
        source_boxes = [list(box) for box in tracks[own["track"]]["boxes"].values()]
        assert all(box in source_boxes for box in own["boxes"].values())
        for t, box in own["boxes"].items():  # to a thousandth of the side
            scale = [row["width"] / 1000, row["height"] / 1000] * 2
            assert [v * s for v, s in zip(parsed[0].boxes[int(t)], scale, strict=True)] == pytest.approx(box, abs=0.75)


def test_a_build_stops_and_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fastrl.build.utr as module

    options = BuildOptions(SCENES, frames=6)
    whole, broken = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    summary = build_dialogues(options, whole)
    assert (summary["clips"], summary["subjects"], summary["kept"]) == (70, 210, len(rows_of(whole)))
    assert sum(summary["queries"].values()) == summary["kept"]
    assert summary["kept"] + sum(summary["dropped"].values()) == 2 * 210  # two queries each, or a reason
    make = module.clip_rows_of

    def fail_at_40(clip: Any, opts: Any, number: int, *rest: Any) -> Any:
        if number == 40:
            raise KeyboardInterrupt
        return make(clip, opts, number, *rest)

    monkeypatch.setattr(module, "clip_rows_of", fail_at_40)
    with pytest.raises(KeyboardInterrupt):
        build_dialogues(options, broken)
    monkeypatch.undo()
    again = build_dialogues(options, broken)
    assert broken.read_text().replace("b.images", "a.images") == whole.read_text()
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in summary.items() if k != "seconds"}
    with pytest.raises(ValueError, match="started with other options"):
        build_dialogues(BuildOptions(SCENES, frames=5), broken)
    records = load_data(f"utr:{broken}")
    assert len(records) == summary["kept"]
    assert all(Path(image).is_file() for image in records[0].images)


def test_only_tracks_over_several_frames_are_kept(data_dir: Path, tmp_path: Path) -> None:
    spec = f"mot:{data_dir}/video/pets09_s2l1_a?window=10&stride=5"
    summary = build_dialogues(BuildOptions(spec, frames=5, min_frames=5, queries=("spatial",)), tmp_path / "d.jsonl")
    assert {len(row["subjects"][0]["boxes"]) for row in rows_of(tmp_path / "d.jsonl")} == {5}
    assert summary["dropped"]["track covers fewer than 5 frames"] > 0


def test_answers_from_one_frame_are_about_that_frame(tmp_path: Path) -> None:
    build_dialogues(BuildOptions(SCENES, frames=6, answers="frame", queries=("spatial",)), tmp_path / "d.jsonl")
    for row in rows_of(tmp_path / "d.jsonl"):
        assert list(parse_tracks(row["answer"])[0].boxes) == [row["query"]["frame"]]
    assert len(load_data(f"utr:{tmp_path}/d.jsonl")) == 210


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 1}, "--frames"),
        ({"sample": "uniformly"}, "did you mean 'uniform'"),
        ({"min_frames": 1}, "--min-frames"),
        ({"answers": "frame"}, "--queries spatial"),
        ({"answers": "all"}, "--answers"),
    ],
)
def test_options_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BuildOptions(**{"data": SCENES, "frames": 6, **changes})


def test_queries_and_data_are_checked(tmp_path: Path) -> None:
    assert parse_queries("temporal, spatial") == ("temporal", "spatial")
    with pytest.raises(ValueError, match="did you mean 'spatial'"):
        parse_queries("spacial")
    with pytest.raises(ValueError, match="no tracked clips"):
        build_dialogues(BuildOptions("refexp:" + str(_refexp(tmp_path)), frames=4), tmp_path / "d.jsonl")
    with pytest.raises(ValueError, match="has pictures, not clips"):
        build_dialogues(BuildOptions("scenes:grounding?n=4", frames=4), tmp_path / "d.jsonl")


def _refexp(folder: Path) -> Path:
    Image.new("RGB", (50, 50)).save(folder / "a.png")
    row = {"image": "a.png", "expression": "it", "bbox": [1, 1, 20, 20]}
    (folder / "r.jsonl").write_text(json.dumps(row) + "\n")
    return folder / "r.jsonl"
