"""The image-unconditional study: blank pictures, training and evaluating with them, and the arms."""

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
from fastrl.recipe import load_recipe
from fastrl.studies.blind import Experiment, Own
from fastrl.studies.outcome import print_result
from fastrl.studies.runner import folder_name, run_study
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


def small_study() -> Experiment:
    small = {"optim.steps": 2, "rollout.group_size": 6, "data.prompts_per_step": 2, "optim.lr": 1e-3}
    recipe = load_recipe("perpo-grounding-tiny", small | {"method.min_gap": 0.0, "log.tensorboard": False})
    return Experiment(own=Own(recipe, "scenes:grounding?n=4&seed=5", max_new_tokens=40))


@pytest.mark.gate
def test_every_arm_trains_on_the_same_lists_with_pictures_and_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = small_study()
    result = run_study(study, tmp_path / "study", seeds=1)
    arms = [f"{kind}, {look}" for kind in ("perpo", "dpo", "sft") for look in ("pictures", "grey")]
    assert list(result["arms"]) == ["start", *arms]
    recipes = {
        arm: load_recipe(tmp_path / "study" / folder_name(arm) / "seed-0" / "run" / "recipe.yaml") for arm in arms
    }
    lists = {recipe.data.spec for recipe in recipes.values()}
    assert lists == {f"lists:{tmp_path / 'study' / 'seed-0' / 'lists.jsonl'}"}
    assert [recipes[arm].data.blank_images for arm in arms] == [False, True] * 3
    assert [recipes[arm].method.kind for arm in arms] == ["perpo", "perpo", "dpo", "dpo", "sft", "sft"]
    ious = {arm: result["arms"][arm]["sampled"]["mean"] for arm in arms}
    assert len(set(ious.values())) > 2  # the arms did learn different things
    found = result["changes"]["perpo: seeing − blind"]
    assert found["change"] == pytest.approx(ious["perpo, pictures"] - ious["perpo, grey"])
    contrast = result["changes"]["seeing − blind: perpo − sft"]
    seeing = [ious[f"{kind}, pictures"] - ious[f"{kind}, grey"] for kind in ("perpo", "sft")]
    assert contrast["change"] == pytest.approx(seeing[0] - seeing[1])
    print_result(study, result)
    assert "sft, grey" in capsys.readouterr().out


def test_other_methods_are_compared_with_themselves() -> None:
    study = Experiment(own=Own(load_recipe("perception-r1-grounding-tiny"), "scenes:grounding?n=4"))
    assert [arm.name for arm in study.arms()] == ["start", "perception-r1, pictures", "perception-r1, grey"]
    assert {c.name for c in study.comparisons()} == {
        f"perception-r1: {what}{how}" for what in ("seeing", "blind", "seeing − blind") for how in ("", ", greedy")
    }


def test_a_task_without_a_measure_is_refused() -> None:
    study = Experiment(own=Own(load_recipe("perpo-grounding-tiny"), "scenes:caption?n=4"))
    with pytest.raises(ValueError, match=r"caption.*grounding"):
        study.begin()


@pytest.mark.parametrize(
    ("recipe", "changes", "held_out", "message"),
    [
        (
            "perpo-grounding-tiny",
            {"data.spec": "scenes:counting?n=4"},
            "grounding",
            "is for counting, scenes:grounding",
        ),
        ("perpo-grounding-tiny", {"data.spec": "scenes:detection?n=4"}, "detection", "task to build lists for"),
        ("perpo-grounding-tiny", {"reward.weights": {"iou": 2.0}}, "grounding", "ranked by the task's own reward"),
        ("perception-r1-grounding-tiny", {"data.spec": "scenes:counting?n=4"}, "grounding", "reward does not fit"),
    ],
)
def test_a_recipe_that_cannot_be_trained_leaves_no_folder(
    recipe: str, changes: dict[str, Any], held_out: str, message: str, tmp_path: Path
) -> None:
    study = Experiment(own=Own(load_recipe(recipe, changes), f"scenes:{held_out}?n=2&seed=1&difficulty=1"))
    with pytest.raises(ValueError, match=message):
        run_study(study, tmp_path / "study", seeds=1)
    assert not (tmp_path / "study").exists()


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
    own = ("--recipe", "perpo-ocr-tiny", "--model", folder, "--held-out", spec)
    Image.new("RGB", (56, 56), (200, 10, 10)).save("a.png")
    rows = [{"id": n, "image": "a.png", "prompt": "Read.", "answers": ["ab", "c"], "rewards": [1, 0]} for n in (1, 2)]
    Path("ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ("--data", "lists:ranked.jsonl")
    study = ("study", "blind", *own, *given, "--out", "study", "--seeds", "1", "--set", "data.prompts_per_step=2")
    short = ("--max-new-tokens", "6", "--set", "rollout.max_new_tokens=6", "--limit", "2", "--json")
    assert command(monkeypatch, *study, *steps, *short) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["study"], result["seeds"], result["records"]) == ("blind", 1, 2)
    assert command(monkeypatch, *build[:3], "juggling", *build[4:]) == 2
    assert "grounding, ocr" in capsys.readouterr().err


@pytest.mark.gate
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


def test_the_small_model_of_another_family_is_another_study() -> None:
    default, named, llava = Experiment(), Experiment(family="qwen2_5_vl"), Experiment(family="llava")
    assert default.recipe.model.path == "tiny:perception"
    assert llava.recipe.model.path == "tiny:llava"
    assert default.settings() == named.settings() != llava.settings()
    again = llava.again()()
    assert isinstance(again, Experiment)
    assert again.settings() == llava.settings()  # a worker makes the same study
    assert again.rates == default.rates  # one grid for all
