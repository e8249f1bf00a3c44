"""Evaluation while training when a server with vLLM's API gives the answers: those of the weights just trained."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastrl.rollout import RolloutError
from fastrl.run.logs import read_rows
from fastrl.trainer import Run, TrainingError, train
from tests.helpers.training import make_recipe, make_records
from tests.helpers.vllm_server import Handler, VllmServer

Folder = Callable[[str], Path]
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
# A number that another answer would change, which the metrics of a model that knows nothing would not show
REWARD = """
def exact(completions, **kwargs):
    return [sum(i * ord(c) for i, c in enumerate(answer, 1)) / 1e4 for answer in completions]
"""
SECTION = {"every": 1, "max_new_tokens": 6, "metric": "reward", "mode": "max"}


@pytest.fixture
def server(tiny_folder: Folder) -> Iterator[VllmServer]:
    served = VllmServer(tiny_folder("qwen2_5"))
    threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield served
    served.shutdown()
    served.server_close()


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    (tmp_path / "mine.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    return {
        "reward": {"function": "mine.py:exact", "builtin": False, "completions": "text"},
        "eval": SECTION,
        "optim__lr": 0.02,
        "optim__steps": 2,
        "checkpoint__every": 1,
    }


@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["full", "lora"])
def test_it_measures_the_weights_of_its_step(
    server: VllmServer, tiny_folder: Folder, tmp_path: Path, settings: dict[str, Any], lora: dict[str, Any] | None
) -> None:
    served = {"rollout__backend": "vllm", "rollout__server": server.url, "model__lora": lora}
    recipe = make_recipe(tiny_folder("qwen2_5"), tmp_path / "run", **served, **settings)
    train(recipe, records=make_records(), eval_records=make_records(3), show=False)
    rows = read_rows(tmp_path / "run/eval.jsonl")
    models = [tiny_folder("qwen2_5"), *(tmp_path / f"run/checkpoints/step-0000000{n}/model" for n in (1, 2))]
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row, model in zip(rows, models, strict=True):
        alone = make_recipe(model, tmp_path / "alone", **settings)
        found = Run(alone, records=make_records(), eval_records=make_records(3)).evaluation.measure(0).row
        assert row["eval/reward"] == pytest.approx(found["eval/reward"], abs=1e-9)
        assert row["eval/n"] == 3
        assert isinstance(row["eval/sampled/reward"], float)
    assert len({row["eval/reward"] for row in rows}) > 1  # the answers did change


def test_a_server_that_is_gone_saves_the_step(
    server: VllmServer, tiny_folder: Folder, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """The step is saved, and a resume begins with its evaluation."""
    settings = {**settings, "checkpoint__every": 0, "rollout__backend": "vllm", "rollout__server": server.url}
    recipe = make_recipe(tiny_folder("qwen2_5"), tmp_path / "run", **settings)

    def refuse(handler: Handler, body: dict[str, Any]) -> bool:
        handler.reply(400, "no")
        return True

    def spoil(row: dict[str, Any]) -> None:
        server.script = [refuse] * 9

    told = r"evaluation after step 1: .*HTTP 400.*Step 1 was saved: continue from it with --resume"
    with pytest.raises(TrainingError, match=told) as error:
        train(recipe, records=make_records(), eval_records=make_records(3), show=False, on_step=spoil)
    assert isinstance(error.value.__cause__.__cause__, RolloutError)  # type: ignore[union-attr]
    server.script = []
    assert train(recipe, records=make_records(), eval_records=make_records(3), show=False, resume=True).steps == 2
    assert [row["step"] for row in read_rows(tmp_path / "run/eval.jsonl")] == [0, 1, 2]
