"""The image-unconditional study: blank pictures, training and evaluating with them, the 2×2 table."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastrl.cli.main import main
from fastrl.data import load_data
from fastrl.data.blank import GREY, BlankImages
from fastrl.evaluate.run import run_evaluation
from fastrl.models.load import load_policy
from fastrl.recipe import load_recipe
from fastrl.run.integrity import CheckpointError
from fastrl.studies.blind import print_study, run_study
from fastrl.trainer import Run
from tests.helpers.training import make_recipe, make_records

Folder = Callable[[str], Path]


def test_blank_images_keep_size_and_truth(tmp_path: Path) -> None:
    Image.new("RGB", (31, 17), (200, 10, 10)).save(tmp_path / "a.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "a.png", "text": "abc"}) + "\n")
    (record,) = BlankImages(load_data(f"ocr:{tmp_path / 'rows.jsonl'}"))
    (picture,) = record.images
    assert isinstance(picture, Image.Image)
    assert picture.size == (31, 17)
    assert picture.getcolors() == [(31 * 17, GREY)]
    assert record.target["text"] == "abc"
    scenes = load_data("scenes:grounding?n=5")
    assert [r.id for r in BlankImages(scenes)[1:3]] == [scenes[1].id, scenes[2].id]
    assert len(BlankImages(scenes)) == 5


def test_training_on_blank_images_sees_one_grey(tiny_folder: Folder, tmp_path: Path) -> None:
    folder = tiny_folder("qwen2_5")
    run = Run(make_recipe(folder, tmp_path, data__blank_images=True), records=make_records())
    records = run.stream.take(6)
    assert {r.images[0].getpixel((3, 3)) for r in records} == {GREY}  # type: ignore[union-attr]
    prompts = [run.policy.encode(r)[0] for r in records]
    assert len({image.key for p in prompts for image in p.images}) == 2  # one per size
    plain = Run(make_recipe(folder, tmp_path), records=make_records())
    keys = {image.key for r in plain.stream.take(6) for image in plain.policy.encode(r)[0].images}
    assert len(keys) == 6


def test_evaluation_on_blank_images_gives_equal_answers_to_equal_prompts(tmp_path: Path) -> None:
    answers = {}
    for blank in (False, True):
        out = tmp_path / f"{blank}.jsonl"
        run_evaluation(
            "ocr", "scenes:ocr?n=3&difficulty=1", model="tiny:language", blank_images=blank, max_new_tokens=12, out=out
        )
        answers[blank] = {json.loads(line)["answer"] for line in out.read_text().splitlines()}
    assert len(answers[False]) == 3
    assert len(answers[True]) == 1


def test_blank_images_need_a_model() -> None:
    with pytest.raises(ValueError, match="--blank-images"):
        run_evaluation("grounding", "scenes:grounding?n=1", predictions=Path("x"), blank_images=True)


def make_study(out: Path) -> dict[str, Any]:
    small = {"optim.steps": 2, "rollout.group_size": 6, "data.prompts_per_step": 2, "method.online_every": 2}
    recipe = load_recipe("perpo-grounding-tiny", small | {"method.min_gap": 0.0, "log.tensorboard": False})
    return run_study(recipe, "scenes:grounding?n=4&seed=5", out=out, max_new_tokens=40)


def test_the_study_trains_twice_and_prints_two_by_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = make_study(tmp_path / "study")
    cells = result["cells"]
    assert list(cells) == ["with image", "without image"]
    for when in ("before", "blank_before"):
        assert cells["with image"][when] == cells["without image"][when]
    assert cells["with image"]["before"] > cells["with image"]["blank_before"]
    assert set(cells["with image"]) == {"before", "after", "blank_before", "blank_after"}
    assert result["metric"] == "mean_iou"
    weights = [tmp_path / "study" / name / "model" for name in ("with-image", "without-image")]
    a, b = (load_policy(path, device="cpu").core.state_dict() for path in weights)
    assert any(not a[name].equal(b[name]) for name in a)
    print_study(result)
    shown = capsys.readouterr().out
    assert "without image" in shown
    assert "grey pictures" in shown
    with pytest.raises(CheckpointError, match="already contains a study"):
        make_study(tmp_path / "study")


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["fastrl", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_build_train_and_study_from_the_command_line(
    tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = str(tiny_folder("qwen2_5"))
    spec = "scenes:ocr?n=4&size=56"
    build = ("build", "perpo", "--task", "ocr", "--model", folder, "--data", spec, "--out", "lists.jsonl", "--json")
    assert command(monkeypatch, *build, "--min-gap", "0", "--max-new-tokens", "6", "--n", "6") == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["prompts"] == 4
    steps = ("--set", "optim.steps=1", "--set", "log.tensorboard=false", "--set", "model.lora=null")
    given = ("--model", folder, "--data", "lists:lists.jsonl", "--set", "method.min_gap=0", "--out", "run")
    if summary["kept"]:
        assert command(monkeypatch, "train", "perpo-ocr-tiny", *given, *steps, "--blank-images") == 0
        assert "blank_images: true" in (tmp_path / "run" / "recipe.yaml").read_text()
    capsys.readouterr()
    study = ("study", "perpo-ocr-tiny", "--model", folder, "--data", spec, "--held-out", spec, "--out", "study")
    short = ("--max-new-tokens", "6", "--set", "rollout.max_new_tokens=6", "--limit", "2", "--json")
    assert command(monkeypatch, *study, *steps, *short) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == 1
    assert command(monkeypatch, *build[:3], "juggling", *build[4:]) == 2
    assert "grounding, ocr" in capsys.readouterr().err


def test_the_demo_compares_three_methods(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything except its size: whether PerPO wins is measured elsewhere, as this run is too short."""
    from fastrl.toy.demos import run_demo

    result = run_demo("perpo", out=tmp_path, held_out=8, prompts=8, steps=2, say=lambda text: None)
    assert {"method", "metric", "before", "after", "greedy_before", "greedy_after", "seconds"} <= set(result)
    assert list(result["models"]) == ["start", "perpo", "dpo", "sft"]
    assert result["before"] == result["models"]["start"]["sampled_mean_iou"]
    assert result["after"] == result["models"]["perpo"]["sampled_mean_iou"]
    assert all(0 <= value <= 1 for row in result["models"].values() for value in row.values())
    for name in ("comparison.png", "before_after.png", "lists.rewards.png"):
        assert (tmp_path / name).stat().st_size > 1000
    assert "SFT (best)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="demo task"):
        run_demo("perpo", task="juggling", out=tmp_path / "new")
    with pytest.raises(ValueError, match="is not empty, and a demo overwrites nothing"):
        run_demo("perpo", out=tmp_path)
