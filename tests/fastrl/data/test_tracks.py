"""Tracked clips: real MOTChallenge and mask-track files, JSONL, the results of their checks, frames and videos."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastrl.answers import View, format_answer, format_tracks, parse_tracks, to_original
from fastrl.data import DataError, load_data
from fastrl.data.clips import (
    Clip,
    ClipRecords,
    Span,
    Subject,
    clip_to_dict,
    frame_files,
    read_video,
    sample_frames,
    settle,
    video_info,
    windows,
)
from fastrl.data.masks import rle_box, rle_runs
from fastrl.data.pictures import Picture, PictureError, open_picture


def clips(spec: str, **options: bool) -> list[Clip]:
    records = load_data(spec, **options).records
    assert isinstance(records, ClipRecords)
    return list(records.clips)


def test_mot_folder_reads_as_published(data_dir: Path) -> None:
    folder = data_dir / "video/pets09_s2l1_a"
    data = load_data(f"mot:{folder}")
    assert (len(data), data.skipped, data.notes) == (1, 0, ())
    record = data[0]
    assert (record.id, record.task, len(record.images)) == ("pets09_s2l1_a", "trajectory", 50)
    assert [Path(str(image)).name for image in record.images[:2]] == ["000001.jpg", "000002.jpg"]
    content = record.messages[0]["content"]
    assert [part["type"] for part in content] == ["text", "image"] * 50 + ["text"]
    assert [part["text"] for part in content[:4:2]] == ["Frame1 0s:", "Frame2 0.1s:"]
    tracks = record.target["tracks"]
    assert {t["id"]: len(t["boxes"]) for t in tracks} == {9: 50, 11: 34, 12: 29, 13: 10, 15: 50, 19: 50}
    assert record.target["seconds"][10] == pytest.approx(1.0)
    # Pixels of the file count from 1: its first line is 1,9,311.875,98.750,19.394,46.981
    assert tracks[0]["boxes"][1] == pytest.approx([310.875, 97.75, 330.269, 144.731])


@pytest.mark.parametrize("spec", ["mot:video/pets09_s2l1_a", "sav:video/sav_000001/sav_000001_manual.json"])
def test_build_parse_rebuild_is_lossless_on_real_tracks(data_dir: Path, spec: str) -> None:
    adapter, _, path = spec.partition(":")
    (clip,) = clips(f"{adapter}:{data_dir}/{path}")
    view = View.unresized(clip.width, clip.height)
    text = format_tracks(clip.tracks(), view)
    parsed = parse_tracks(text)
    assert format_tracks(parsed) == text
    assert [(t.identity, t.name, sorted(t.boxes)) for t in parsed] == [
        (s.identity, s.name, sorted(s.boxes)) for s in clip.subjects
    ]
    for track, subject in zip(parsed, clip.subjects, strict=True):
        for frame, box in subject.boxes.items():
            back = to_original(track.boxes[frame], "thousand", view)
            assert np.allclose(back, box, rtol=0, atol=0.0005 * max(clip.width, clip.height) + 1e-9)
    assert format_tracks(clip.tracks()) == format_tracks(
        parse_tracks(format_tracks(clip.tracks()))
    )  # exact numbers are accepted, too
    assert format_answer("trajectory", clip.record().target, "qwen2_5", view) == text


def test_mask_tracks_have_the_boxes_pycocotools_finds(data_dir: Path) -> None:
    masks = pytest.importorskip("pycocotools.mask")
    file = data_dir / "video/sav_000001/sav_000001_manual.json"
    source = json.loads(file.read_text())
    data = load_data(f"sav:{file}")
    record = data[0]
    assert (record.id, record.target["size"], record.target["frames"]) == ("sav_000001", [480, 848], 121)
    assert record.target["seconds"][1] == pytest.approx(4 / 24)  # every fourth frame is annotated
    boxes = {t["id"]: t["boxes"] for t in record.target["tracks"]}
    for frame, row in enumerate(source["masklet"], start=1):
        for identity, mask in enumerate(row):
            x, y, w, h = masks.toBbox(mask)
            if w * h == 0:
                assert frame not in boxes[identity]
            else:
                assert boxes[identity][frame] == [x, y, x + w, y + h]
    assert {note.kind for note in data.notes} == {"gap"}


@given(st.integers(1, 7), st.integers(1, 7), st.data())
def test_rle_box_is_the_box_of_the_decoded_mask(height: int, width: int, data: st.DataObject) -> None:
    flat = data.draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    runs, inside, length = [], False, 0
    for value in flat:
        if value != inside:
            runs.append(length)
            inside, length = value, 0
        length += 1
    runs.append(length)
    ys, xs = np.nonzero(np.array(flat).reshape(width, height).T)
    expected = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) if len(xs) else None
    assert rle_box(runs, height, width) == expected
    masks = pytest.importorskip("pycocotools.mask")
    compressed = masks.frPyObjects({"size": [height, width], "counts": runs}, height, width)["counts"].decode()
    assert rle_box(compressed, height, width) == expected


@given(
    st.one_of(st.text(), st.text(st.characters(min_codepoint=48, max_codepoint=111)), st.none(), st.lists(st.none()))
)
def test_a_broken_mask_is_a_value_error(counts: Any) -> None:
    try:
        runs = rle_runs(counts)
    except ValueError:
        return
    assert all(run >= 0 for run in runs)
    with pytest.raises(ValueError, match="add up to"):
        rle_box(counts, 1, sum(runs) + 1)


def test_windows_and_frame_sampling(data_dir: Path) -> None:
    folder = data_dir / "video/pets09_s2l1_a"
    cut = load_data(f"mot:{folder}?window=16&stride=8&frames=4")
    assert [record.id for record in cut] == [f"pets09_s2l1_a:{start}" for start in (1, 9, 17, 25, 33)]
    assert all(len(record.images) == 4 for record in cut)
    assert [Path(str(image)).name for image in cut[1].images] == [f"0000{t}.jpg" for t in ("10", "14", "18", "22")]
    whole = clips(f"mot:{folder}")[0]
    third = cut[1].target["tracks"][0]["boxes"][3]
    assert third == list(whole.subjects[0].boxes[18])
    assert len(load_data(f"mot:{folder}?window=5&limit=3")) == 3
    assert [r.id for r in load_data(f"mot:{folder}?window=5&seed=1")] != [
        r.id for r in load_data(f"mot:{folder}?window=5")
    ]


@given(st.integers(1, 60), st.integers(1, 20), st.sampled_from(["uniform", "first", "random"]), st.integers(0, 9))
def test_sampled_frames_are_ascending_distinct_and_inside(total: int, count: int, how: str, seed: int) -> None:
    numbers = sample_frames(total, count, how, seed)
    assert numbers == sorted(set(numbers))
    assert len(numbers) == min(total, count)
    assert numbers[0] >= 1
    assert numbers[-1] <= total
    assert numbers == sample_frames(total, count, how, seed)


def test_sampling_names_its_choices() -> None:
    with pytest.raises(ValueError, match="allowed: uniform, first, random"):
        sample_frames(9, 3, "middle")


# ---- checks

CLIP = Clip("c", 100, 50, (0.0, 0.5, 1.0, 1.5), (), source="f:1")


def moving(identity: int, x: float, frames: tuple[int, ...] = (1, 2, 3, 4), step: float = 1.0) -> Subject:
    return Subject(identity, "dog", {t: (x + step * t, 10, x + step * t + 10, 30) for t in frames})


def exchanged() -> tuple[Subject, ...]:
    a, b = moving(1, 0), moving(2, 50)
    swap = {t: (b if t > 2 else a).boxes[t] for t in a.boxes}, {t: (a if t > 2 else b).boxes[t] for t in b.boxes}
    return replace(a, boxes=swap[0]), replace(b, boxes=swap[1])


@pytest.mark.parametrize(
    ("subjects", "problems", "notes"),
    [
        ((moving(1, 0), moving(2, 50)), [], []),
        ((moving(1, 95),), [], ["box outside"]),
        ((moving(1, 0, (1, 4)),), [], ["gap"]),
        ((moving(1, 0, (2,)), moving(2, 0)), [], ["zero-length track"]),
        ((replace(moving(1, 0), boxes={}),), [], ["zero-length track"]),
        (exchanged(), [], ["identity switch", "identity switch"]),
        ((moving(1, 0, step=22),), [], []),  # fast, but not onto another subject: not a switch
        ((moving(1, 200),), ["box outside"] * 4, ["zero-length track"]),
        ((moving(1, 0), moving(1, 50)), ["duplicate identity"], []),
        ((moving(1, 0, (1, 2, 5)),), ["frame outside"], []),
        ((replace(moving(1, 0), boxes={1: (5, 5, 5, 9), 2: (5, 5, 9, 9), 3: (5, 5, 9, 9)}),), ["box without area"], []),
    ],
)
def test_checks_find_what_is_wrong_with_tracks(
    subjects: tuple[Subject, ...], problems: list[str], notes: list[str]
) -> None:
    settled, wrong, worth_knowing = settle(replace(CLIP, subjects=subjects))
    assert [problem.kind for problem in wrong] == problems
    assert [note.kind for note in worth_knowing] == notes
    assert all(problem.where.startswith("f:1:subject ") for problem in (*wrong, *worth_knowing))
    for subject in settled.subjects:
        for x1, y1, x2, y2 in subject.boxes.values():
            assert 0 <= x1 < x2 <= 100
            assert 0 <= y1 < y2 <= 50


def test_selecting_frames_renumbers_boxes_and_spans() -> None:
    subject = replace(moving(1, 0, (2, 3)), spans=(Span("runs", 1, 2), Span("sits", 3, 4), Span("jumps", 2, 2)))
    clip = replace(CLIP, subjects=(subject, moving(2, 0, (1,))))
    picked = clip.select([3, 4], "c:3")
    assert (picked.id, picked.seconds) == ("c:3", (1.0, 1.5))
    assert [(s.identity, list(s.boxes), s.spans) for s in picked.subjects] == [(1, [1], (Span("sits", 1, 2),))]
    assert [w.id for w in windows(clip, 3, 1)] == ["c:1", "c:2"]


# ---- files


@pytest.fixture
def sequence(tmp_path: Path) -> Path:
    folder = tmp_path / "seq"
    (folder / "gt").mkdir(parents=True)
    (folder / "img1").mkdir()
    for i in (1, 2, 10):
        Image.new("RGB", (40, 30)).save(folder / "img1" / f"{i}.png")
    (folder / "seqinfo.ini").write_text(
        "[Sequence]\nname=seq\nimDir=img1\nframeRate=5\nseqLength=3\nimWidth=40\nimHeight=30\n"
    )
    (folder / "gt/gt.txt").write_text("1,1,2,3,10,10,1,1,1\n2,1,3,3,10,10,1,1,1\n3,1,3,3,10,10,1,1,1\n")
    return folder


def test_mot_columns_and_frame_order(sequence: Path) -> None:
    gt = sequence / "gt/gt.txt"
    gt.write_text(gt.read_text() + "1,2,20,3,10,10,0,1,1\n1,3,20,3,10,10,1,3,1\n2,3,21,3,10,10,1,3,1\n\n")
    (clip,) = clips(f"mot:{sequence.parent}?name=walker")
    assert [(s.identity, s.name) for s in clip.subjects] == [(1, "walker"), (3, "car")]  # a 0 in column 7: ignored
    assert [p.name for p in frame_files(sequence / "img1")] == ["1.png", "2.png", "10.png"]
    assert clip.seconds == (0.0, 0.2, 0.4)


@pytest.mark.parametrize(
    ("file", "text", "kind"),
    [
        ("gt/gt.txt", "1,1,2,3,ten,10\n", "wrong type"),
        ("gt/gt.txt", "1,1,2\n", "wrong type"),
        ("gt/gt.txt", "1,1,nan,3,10,10\n", "not a number"),
        ("gt/gt.txt", "inf,1,2,3,10,10\n", "wrong type"),
        ("gt/gt.txt", "1,1,2,3,10,10\n1,1,5,3,10,10\n", "duplicate box"),
        ("gt/gt.txt", "1,1,2,3,-5,10\n2,1,2,3,5,10\n", "box without area"),
        ("gt/gt.txt", "1,1,99,3,10,10\n2,1,2,3,5,10\n", "box outside"),
        ("gt/gt.txt", "4,1,2,3,10,10\n1,1,2,3,5,5\n2,1,2,3,5,10\n", "frame outside"),
        ("gt/gt.txt", "1,-1,2,3,10,10\n2,-1,2,3,5,10\n", "bad name"),
        ("seqinfo.ini", "", "bad seqinfo"),
        ("seqinfo.ini", "[Sequence]\nframeRate=x\n", "bad seqinfo"),
        ("seqinfo.ini", "[Sequence]\nframeRate=nan\nseqLength=3\nimWidth=40\nimHeight=30\n", "bad seqinfo"),
        ("seqinfo.ini", "[Sequence]\nframeRate=5\nseqLength=9\nimWidth=40\nimHeight=30\n", "wrong length"),
        ("seqinfo.ini", "[Sequence]\nframeRate=5\nseqLength=3\nimWidth=41\nimHeight=30\n", "wrong size"),
    ],
)
def test_a_bad_mot_folder_is_reported_and_can_be_skipped(sequence: Path, file: str, text: str, kind: str) -> None:
    good = sequence.parent / "good"
    shutil.copytree(sequence, good)
    (good / "seqinfo.ini").write_text((good / "seqinfo.ini").read_text().replace("name=seq", "name=good"))
    (sequence / file).write_text(text)
    with pytest.raises(DataError) as error:
        load_data(f"mot:{sequence.parent}")
    assert {problem.kind for problem in error.value.problems} == {kind}
    assert all(problem.where.startswith(str(sequence / file)) for problem in error.value.problems)
    assert [record.id for record in load_data(f"mot:{sequence.parent}", skip_bad=True)] == ["good"]


def test_a_missing_part_of_a_mot_folder_is_named(sequence: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        load_data("mot:nowhere")
    with pytest.raises(DataError, match=r"holds no gt/gt\.txt"):
        load_data(f"mot:{sequence / 'img1'}")
    (sequence / "gt/gt.txt").unlink()
    with pytest.raises(DataError, match=r"gt\.txt: no such file"):
        load_data(f"mot:{sequence}")


def masklets(**change: Any) -> dict[str, Any]:
    masks = [[{"size": [3, 4], "counts": [1, 2, 9]}], [{"size": [3, 4], "counts": [4, 2, 6]}]]
    base = {"video_id": "v", "video_width": 4, "video_height": 3, "video_frame_count": 8, "video_duration": 2.0}
    return {**base, "masklet_id": [7], "masklet": masks, **change}


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"masklet": []}, "wrong type"),
        ({"masklet": [None, None]}, "wrong type"),
        ({"masklet_id": [1, 2]}, "wrong type"),
        ({"masklet_id": ["a"]}, "wrong type"),
        ({"video_duration": 0}, "wrong type"),
        ({"video_width": 5}, "wrong size"),
        ({"masklet": [[{"size": [3, 4], "counts": [1, 2]}]]}, "bad mask"),
        ({"masklet": [[{"size": [3, 4], "counts": "é"}]]}, "bad mask"),
    ],
)
def test_a_bad_mask_file_is_reported(tmp_path: Path, change: dict, kind: str) -> None:
    file = tmp_path / "v_manual.json"
    file.write_text(json.dumps(masklets(**change)))
    with pytest.raises(DataError) as error:
        load_data(f"sav:{file}")
    assert {problem.kind for problem in error.value.problems} == {kind}


def test_mask_tracks_find_their_frames_in_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "v_manual.json"
    file.write_text(json.dumps(masklets()))
    for i in range(8):
        Image.new("RGB", (4, 3)).save(tmp_path / f"{i:05d}.png")
    record = load_data(f"sav:{file}?images={tmp_path}&name=ball")[0]
    assert [Path(str(image)).name for image in record.images] == ["00000.png", "00004.png"]  # the annotated frames
    assert record.target["tracks"] == [
        {"id": 7, "name": "ball", "boxes": {1: [0.0, 1.0, 1.0, 3.0], 2: [1.0, 1.0, 2.0, 3.0]}}
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="2 frames announced, 0 picture files found"):
        load_data(f"sav:{file}?images={tmp_path / 'empty'}")


def row(**change: Any) -> dict[str, Any]:
    subject = {"id": 3, "name": "red ball", "boxes": {"1": [1, 2, 11, 12], "2": [3, 2, 13, 12]}, "appearance": "red"}
    subject["spans"] = [{"action": "rolls", "first": 1, "last": 2}]
    return {
        "id": "r",
        "frames": ["1.png", "2.png"],
        "fps": 2,
        "caption": "A ball rolls.",
        "subjects": [subject],
        **change,
    }


def test_clips_survive_the_way_through_jsonl(sequence: Path, tmp_path: Path) -> None:
    file = tmp_path / "clips.jsonl"
    file.write_text(
        json.dumps(row()) + "\n" + json.dumps(row(id="s", frames=None, width=40, height=30, seconds=[0, 1]))
    )
    first, second = clips(f"tracks:{file}?images={sequence / 'img1'}")
    assert (first.seconds, first.width, first.caption) == ((0.0, 0.5), 40, "A ball rolls.")
    assert first.subjects[0].spans == (Span("rolls", 1, 2),)
    assert second.frames == ()
    again = tmp_path / "again.jsonl"
    again.write_text("\n".join(json.dumps(clip_to_dict(clip)) for clip in (first, second)))
    assert [replace(clip, source="") for clip in clips(f"tracks:{again}")] == [
        replace(first, source=""),
        replace(second, source=""),
    ]


def damaged(edit: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    broken = json.loads(json.dumps(row()))
    edit(broken["subjects"][0])
    return broken


@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        (row(frames=[]), "wrong type"),
        (row(frames=["gone.png", "1.png"], width=40, height=30), "bad image"),
        (row(frames=["1.png", 2]), "wrong type"),
        (row(frames=None), "wrong type"),
        (row(fps=0), "wrong type"),
        (row(seconds=[1, 0]), "wrong type"),
        (row(seconds=[0, 1, 2]), "wrong type"),
        (row(width=41, height=30), "wrong size"),
        (row(frames=None, seconds=[0, 1]), "wrong size"),
        (row(caption=1), "wrong type"),
        (row(subjects={}), "wrong type"),
        (row(subjects=[5]), "wrong type"),
        (row(frames=None, video="gone.mp4", video_frames=[0, 1], width=40, height=30), "missing video"),
        (row(frames=None, video="1.png"), "wrong type"),
        (damaged(lambda s: s.update(id="x")), "wrong type"),
        (damaged(lambda s: s.update(name=" ")), "wrong type"),
        (damaged(lambda s: s.update(name="a<b")), "bad name"),
        (damaged(lambda s: s["boxes"].update({"x": [1, 2, 3, 4]})), "wrong type"),
        (damaged(lambda s: s["boxes"].update({"1": [1, 2, 3, None]})), "not a number"),
        (damaged(lambda s: s["boxes"].update({"1": [1, 2, 3, float("nan")]})), "not a number"),
        (damaged(lambda s: s["boxes"].update({"3": [1, 2, 3, 4]})), "frame outside"),
        (damaged(lambda s: s.update(spans=[{"action": "x", "first": 2, "last": 1}])), "wrong type"),
        (row(id="good"), "duplicate id"),
    ],
)
def test_a_bad_clip_row_is_reported_with_its_line(sequence: Path, tmp_path: Path, bad: dict, kind: str) -> None:
    file = tmp_path / "clips.jsonl"
    file.write_text(json.dumps(row(id="good")) + "\n" + json.dumps(bad))
    spec = f"tracks:{file}?images={sequence / 'img1'}"
    with pytest.raises(DataError) as error:
        load_data(spec)
    assert kind in {problem.kind for problem in error.value.problems}
    assert all(problem.where.startswith(f"{file}:2") for problem in error.value.problems)
    assert [record.id for record in load_data(spec, skip_bad=True)] == ["good"]


# ---- video files


def test_video_frames_are_read_when_asked_for(data_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("av")
    video = data_dir / "video/files/mmtracking_demo.mp4"
    assert tuple(video_info(video)) == (1920, 1080, 8, 3.0)
    file = tmp_path / "clips.jsonl"
    content = row(frames=None, video=str(video), video_frames=[5, 0, 7][1:], width=1920, height=1080)
    file.write_text(json.dumps(content))
    record = load_data(f"tracks:{file}")[0]
    assert [image.size for image in record.images if not isinstance(image, Path)] == [(1920, 1080)] * 2
    first, last = read_video(video, [0, 7])
    assert record.images[0] == first
    assert record.images[1] == last
    assert first != last
    file.write_text(json.dumps({**content, "video_frames": [0, 8]}))
    with pytest.raises(DataError, match="has 8 frames; frame 8"):
        load_data(f"tracks:{file}")
    with pytest.raises(DataError, match="no frame 8"):
        read_video(video, [8])


def test_a_file_that_is_no_video_says_so(tmp_path: Path) -> None:
    pytest.importorskip("av")
    (tmp_path / "x.mp4").write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot be read as video"):
        read_video(tmp_path / "x.mp4", [0])


# ---- options for reading pictures


def quarter_turned(file: Path, size: tuple[int, int] = (40, 30)) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", size).save(file, exif=exif)


@pytest.mark.parametrize("adapter", ["mot", "tracks", "sav", "utr"])
def test_a_limit_of_pixels_holds_for_the_frames_of_clips(sequence: Path, tmp_path: Path, adapter: str) -> None:
    spec = spec_of(adapter, sequence, tmp_path)
    with pytest.raises(DataError, match=r"image of 40x30 pixels, more than the limit of 1,199.*data\.max_image_pixels"):
        load_data(f"{spec}max_image_pixels=1199")
    record = load_data(f"{spec}max_image_pixels=1200")[0]
    assert all(isinstance(image, Picture) and image.max_pixels == 1200 for image in record.images)
    assert open_picture(record.images[0]).size == (40, 30)
    assert record.images != ()


@pytest.mark.parametrize("adapter", ["mot", "tracks", "sav", "utr"])
def test_where_sizes_are_enough_frames_may_be_missing(sequence: Path, tmp_path: Path, adapter: str) -> None:
    spec = spec_of(adapter, sequence, tmp_path)
    for file in (sequence / "img1").iterdir():
        file.unlink()
    with pytest.raises(DataError, match=r"image not found|picture files found"):
        load_data(spec)
    (record,) = load_data(f"{spec}pictures=stated")
    assert record.target["size"] == [40, 30]
    for image in record.images:
        with pytest.raises(PictureError, match="image not found"):
            open_picture(image)


def spec_of(adapter: str, sequence: Path, tmp_path: Path) -> str:
    """A spec with three frames for each adapter of clips, to which one more key can be added."""
    images, file = sequence / "img1", tmp_path / "clips.jsonl"
    stated = row(frames=["1.png", "2.png", "10.png"], width=40, height=30)
    if adapter == "mot":
        return f"mot:{sequence}?"
    if adapter == "sav":
        masks = [[{"size": [30, 40], "counts": [5, 20, 1175]}]] * 3
        (tmp_path / "v.json").write_text(
            json.dumps(masklets(masklet=masks, video_width=40, video_height=30, video_frame_count=3))
        )
        return f"sav:{tmp_path / 'v.json'}?images={images}&"
    if adapter == "utr":
        stated |= {"query": {"kind": "spatial", "attribute": "box", "frame": 1}, "question": "Who?"}
        stated["answer"] = "Track1: red ball<Id3>Frame1:[1,2,30,40];</Id3>"
    file.write_text(json.dumps(stated))
    return f"{adapter}:{file}?images={images}&"


def test_a_tag_that_turns_frames_is_named_followed_or_noted(sequence: Path, tmp_path: Path) -> None:
    for i in (1, 2, 10):
        quarter_turned(sequence / "img1" / f"{i}.jpg", (30, 40))
        (sequence / "img1" / f"{i}.png").unlink()
    with pytest.raises(DataError, match=r"1\.jpg has 30x40 pixels, not 40x30 \(its EXIF tag turns it"):
        load_data(f"mot:{sequence}")
    record = load_data(f"mot:{sequence}?orient=exif")[0]
    assert open_picture(record.images[0]).size == (40, 30)
    file = tmp_path / "clips.jsonl"
    file.write_text(json.dumps(row(frames=["1.jpg", "2.jpg"])))
    data = load_data(f"tracks:{file}?images={sequence / 'img1'}")
    assert [note.kind for note in data.notes] == ["EXIF tag not followed"]
    assert "orient=exif" in data.summary


@pytest.mark.parametrize("change", [lambda r: json.dumps(r["subjects"]), lambda r: [json.dumps(r["subjects"][0])]])
def test_json_text_means_the_same_in_the_columns_of_clips(sequence: Path, tmp_path: Path, change: Any) -> None:
    file = tmp_path / "clips.jsonl"
    plain = row()
    written = {**plain, "subjects": change(plain), "frames": json.dumps(plain["frames"])}
    found = []
    for each in (plain, written):
        file.write_text(json.dumps(each))
        found.append(load_data(f"tracks:{file}?images={sequence / 'img1'}")[0].target)
    assert found[0] == found[1]
