"""RL on UTR's data: the recipe's method and reward on dialogues, with a random model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrl.answers import Track, View, format_tracks
from fastrl.batch import Completion, PromptGroup, pack_row
from fastrl.data import load_data
from fastrl.recipe import load_recipe
from fastrl.rollout import Generator
from fastrl.run.logs import read_rows
from fastrl.trainer import train
from tests.helpers.training import make_recipe

Folder = Callable[[str], Path]


@pytest.mark.parametrize("task", ["trajectory", "utr"])
def test_a_run_scores_trajectories(task: str, tiny_folder: Folder, tmp_path: Path) -> None:
    recipe = make_recipe(
        tiny_folder("qwen2_5"),
        tmp_path,
        optim__steps=2,
        data__spec=f"scenes:{task}?n=8&size=56&frames=3",
        data__prompts_per_step=2,
        reward__options={"threshold": 0.3},
        reward__weights={"order": 0.5},
    )
    train(recipe, show=False)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert len(rows) == 2
    for row in rows:  # a random model writes no trajectory
        assert [row[f"reward/{name}"] for name in ("iou", "coverage", "order", "format")] == [0.0, 0.0, 0.0, -1.0]
        assert row["reward/mean"] == -1.0
        assert row["groups/zero_variance"] == 2.0


def test_answers_that_follow_are_made_likelier(
    tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fixed sampled answers, a trajectory that follows the shape becomes likelier than one that repeats a box."""
    record = next(r for r in load_data("scenes:trajectory?n=20&size=56&frames=4") if moves(r.target["tracks"][0]))
    (truth,) = record.target["tracks"]
    view = View.unresized(*record.target["size"])
    follows = format_tracks([Track(1, truth["name"], truth["boxes"])], view)
    copied = dict.fromkeys(truth["boxes"], truth["boxes"][1])
    copies = format_tracks([Track(1, truth["name"], copied)], view)
    gained: list[float] = []

    def speak(self: Any, prompts: list[Any], sampling: Any, rng: Any) -> list[list[Completion]]:
        ids = [self.policy.encode_text(text) for text in (follows, copies)]
        gained.append(_margin(self.policy, prompts[0], ids))
        message = [(ids[i], text) for _ in range(2) for i, text in enumerate((follows, copies))]
        return [[Completion(i, text=text, sampler_logp=torch.zeros(len(i))) for i, text in message] for _ in prompts]

    monkeypatch.setattr(Generator, "generate", speak)
    changes = {"optim__steps": 6, "data__prompts_per_step": 1, "optim__lr": 3e-3, "rollout__keep_prompts": "off"}
    train(make_recipe(tiny_folder("qwen2_5"), tmp_path, **changes), records=[record] * 6, show=False)
    assert gained[-1] > gained[0] + 0.1
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert rows[0]["reward/iou"] > 0.5  # near 1 and at most 1/4


def moves(track: dict[str, Any]) -> bool:
    return len({tuple(box) for box in track["boxes"].values()}) == len(track["boxes"])


def _margin(policy: Any, prompt: Any, ids: list[torch.Tensor]) -> float:
    """Mean log-prob of the first answer minus that of the second."""
    with torch.no_grad():
        batch = pack_row([PromptGroup(prompt, [Completion(i) for i in ids])])
        first, second = batch.split(policy.logprob(batch).logp)
    return float(first.mean() - second.mean())


def test_the_recipe_names_this_reward_and_these_dialogues() -> None:
    recipe = load_recipe("utr-grpo-tiny")
    assert (recipe.method.kind, recipe.model.path) == ("perception-r1", "tiny:video")
    assert load_data(recipe.data.spec)[0].task == "trajectory"


def test_the_recipe_takes_steps_on_the_model_that_reads_clips(tmp_path: Path) -> None:
    changes = ["optim.steps=2", "data.prompts_per_step=3", "rollout.group_size=4", f"out={tmp_path / 'run'}"]
    summary = train(load_recipe("utr-grpo-tiny", [*changes, "log.tensorboard=false"]), show=False)
    assert summary.steps == 2
    for row in read_rows(tmp_path / "run" / "metrics.jsonl"):
        assert row["reward/iou"] > 0.0  # it writes trajectories that overlap the true ones
        assert row["reward/format"] > -0.8
        assert row["grad_norm"] > 0.0
