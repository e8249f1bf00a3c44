"""``fastrl score``: rewards of the initial model's answers, resumable, in the form that a curriculum reads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fastrl.build import score
from fastrl.build.score import ScoreOptions, score_data
from fastrl.cli.main import main
from fastrl.data import load_data
from fastrl.data.difficulty import read_scores
from fastrl.recipe import build_recipe, load_recipe
from fastrl.run.setup import make_stream

SPEC = "scenes:grounding?n=6&seed=3&size=84"
OPTIONS = ScoreOptions("tiny:perception", SPEC, n=2, max_new_tokens=24, component="iou")


def test_every_record_has_its_mean_reward_and_a_stopped_file_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score, "PORTION", 4)
    whole = score_data(OPTIONS, tmp_path / "whole.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "whole.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [record.id for record in load_data(SPEC)]
    assert all(row["difficulty"] == pytest.approx(1 - row["reward"]) for row in rows)
    assert all(0 <= row["worst"] <= row["reward"] <= row["best"] <= 1 for row in rows)
    assert whole["kept"] == 6
    assert whole["mean_reward"] == pytest.approx(sum(row["reward"] for row in rows) / 6)
    calls: list[str] = []

    def stop(text: str) -> None:
        calls.append(text)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_data(OPTIONS, tmp_path / "part.jsonl", say=stop)
    assert len((tmp_path / "part.jsonl").read_text().splitlines()) == 4
    score_data(OPTIONS, tmp_path / "part.jsonl")
    assert (tmp_path / "part.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    with pytest.raises(ValueError, match="n: was 2, is 3"):
        score_data(replace(OPTIONS, n=3), tmp_path / "part.jsonl")


def test_a_recipe_draws_the_easiest_of_the_file_first(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    ids = [record.id for record in load_data(SPEC)]
    path.write_text("".join(json.dumps({"id": each, "difficulty": 9 - i}) + "\n" for i, each in enumerate(ids)))
    assert read_scores(path, "difficulty")[ids[-1]] == 4
    curriculum = {"by": "difficulty", "steps": 4, "start": 0.1, "scores": str(path)}
    values = load_recipe("perception-r1-grounding-tiny", {"data.spec": SPEC}).model_dump(mode="json")
    values["data"] |= {"curriculum": curriculum, "prompts_per_step": 1}
    recipe = build_recipe(values)
    stream = make_stream(recipe, load_data(SPEC), rank=0, world_size=1)
    assert stream.take(1)[0].id == ids[-1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"component": "overlap"}, "part of the reward for grounding"),
        ({"data": "scenes:caption?n=2&size=84"}, "unknown task for a reward 'caption'"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_a_model_is_loaded(
    changes: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        score_data(replace(OPTIONS, model="tiny:none", **changes), tmp_path / "scores.jsonl")  # type: ignore[arg-type]


def test_options_outside_their_range_are_refused() -> None:
    with pytest.raises(ValueError, match="--n: expected 1"):
        ScoreOptions("m", "d", n=0)
    with pytest.raises(ValueError, match="--temperature"):
        ScoreOptions("m", "d", temperature=-1.0)


def test_the_command_prints_where_the_scores_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "scores.jsonl"
    given = ["--model", "tiny:perception", "--data", SPEC, "--out", str(out), "--n", "1", "--limit", "2"]
    monkeypatch.setattr("sys.argv", ["fastrl", "score", *given, "--max-new-tokens", "16", "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert json.loads(capsys.readouterr().out)["kept"] == 2
    assert len(out.read_text().splitlines()) == 2
