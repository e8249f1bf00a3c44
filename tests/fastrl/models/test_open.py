"""Finding a model: every command with a model argument accepts a shipped name, a folder and a downloaded hub name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import fastrl.models.load
from fastrl.cli.main import app
from fastrl.critics import open_critic
from fastrl.models.export import find_source
from fastrl.models.open import WEIGHTS, resolve_model
from fastrl.plan.configs import config_of, image_limit, is_published

HUB = "someone/small-perception"


class Reached(Exception):
    """Raised in place of loading a model from this folder."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with one downloaded model, and no network."""
    import huggingface_hub.constants

    cache = tmp_path / "hub"
    place = cache / f"models--{HUB.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    shutil.copytree(WEIGHTS / "perception", place / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return place / "snapshots" / commit


@pytest.fixture
def named(hub: Path, tmp_path: Path) -> dict[str, tuple[str, Path]]:
    """What a user writes, and the folder that it stands for."""
    folder = Path(shutil.copytree(WEIGHTS / "perception", tmp_path / "mine"))
    return {
        "shipped": ("tiny:perception", WEIGHTS / "perception"),
        "folder": (str(folder), folder),
        "hub name": (HUB, hub),
    }


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    from PIL import Image

    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    say = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A square."}]
    (tmp_path / "d.json").write_text(json.dumps([{"id": "d", "image": str(tmp_path / "a.png"), "conversations": say}]))
    return {"picture": tmp_path / "a.png", "dialogues": tmp_path / "d.json", "out": tmp_path / "out.jsonl"}


COMMANDS = {
    "train": "train perception-r1-grounding-tiny --model {model} --out {out}",
    "eval": "eval grounding --data scenes:grounding --model {model} --limit 1",
    "eval --reflect": "eval caption --data scenes:caption --model {model} --reflect 2 --limit 1",
    "tpl": "tpl --model {model} --data scenes:utr --limit 1",
    "reflect": "reflect --model {model} --critic rule --image {picture} --reference square",
    "reflect --critic": "reflect --model tiny:language --critic model:{model} --image {picture}",
    "build perpo": "build perpo --task grounding --model {model} --data scenes:grounding --out {out} --limit 1",
    "build reper": "build reper --model {model} --critic rule --data scenes:caption --out {out} --limit 1",
    "study": (
        "study blind --recipe perception-r1-grounding-tiny --held-out scenes:grounding --model {model} --out {out}"
    ),
}


@pytest.mark.parametrize("kind", ["shipped", "folder", "hub name"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_finds_a_model_by_any_of_its_names(
    command: str,
    kind: str,
    named: dict[str, tuple[str, Path]],
    files: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, folder = named[kind]
    asked: list[Path] = []

    def load(where: Path, **options: Any) -> Any:
        asked.append(where)
        if where == folder:
            raise Reached
        return None  # the policy, in an error about the critic

    monkeypatch.setattr(fastrl.models.load, "load_policy", load)
    line = COMMANDS[command].format(model=model, **files)
    result = CliRunner().invoke(app, line.split())
    assert isinstance(result.exception, Reached), (result.output, result.exception)
    assert asked[-1] == folder


@pytest.mark.parametrize("kind", ["shipped", "folder", "hub name"])
def test_critics_plan_and_export_find_it_too(
    kind: str, named: dict[str, tuple[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastrl.models.families import family_of

    model, folder = named[kind]
    config = config_of(model)
    assert config == json.loads((folder / "config.json").read_text())
    assert image_limit(model, family_of(config)) == 112 * 112
    assert not is_published(model)
    assert find_source(model) == folder
    result = CliRunner().invoke(
        app, ["plan", "perception-r1-grounding-tiny", "--model", model, "--gpu", "l4", "--json"]
    )
    assert result.exit_code == 0, result.output

    def load(where: Path, **options: Any) -> Any:
        raise Reached(where)

    monkeypatch.setattr(fastrl.models.load, "load_policy", load)
    with pytest.raises(Reached) as reached:
        open_critic(f"model:{model}?attempts=2")
    assert reached.value.args == (folder,)


def test_a_published_name_that_is_downloaded_is_read_from_its_files(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    name = "Qwen/Qwen2.5-VL-3B-Instruct"
    assert is_published(name)
    place = hub.parent.parent.parent / f"models--{name.replace('/', '--')}"
    shutil.copytree(hub.parent.parent, place)
    assert huggingface_hub.constants.HF_HUB_CACHE in str(place)
    assert config_of(name)["text_config"]["hidden_size"] == 128
    assert not is_published(name)


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("tiny:nothing", ValueError, "tiny:language, tiny:llava, tiny:perception, tiny:video, tiny:video-narrow"),
        ("nobody/nothing", FileNotFoundError, "hf download nobody/nothing"),
        ("no/such/folder", FileNotFoundError, "model folder not found: no/such/folder$"),
        ("../up", FileNotFoundError, "model folder not found"),
    ],
)
def test_a_name_of_no_model_says_what_to_do(hub: Path, name: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        resolve_model(name)
