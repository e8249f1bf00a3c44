"""Stages of the shipped models: well formed, all there, and the same bytes whatever the number of threads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
import torch

from fastrl.models.open import WEIGHTS, resolve_model
from fastrl.toy.teach import build as build_module
from fastrl.toy.teach import stages
from fastrl.toy.teach.architectures import TOWERS
from fastrl.toy.teach.build import build
from fastrl.toy.teach.curriculum import CURRICULA
from fastrl.toy.teach.stages import SHIPPED, STAGES, build_shipped, digest, stages_of


def config(name: str) -> dict:
    return json.loads((WEIGHTS / name / "config.json").read_text())


def test_every_shipped_folder_has_its_stages_and_every_stage_belongs_to_one() -> None:
    assert sorted(SHIPPED) == sorted(path.name for path in WEIGHTS.iterdir())
    assert {name for shipped in SHIPPED for name in stages_of(shipped)} == set(STAGES)


@pytest.mark.parametrize("name", SHIPPED)
def test_stages_begin_from_nothing_and_each_continues_the_one_before(name: str) -> None:
    found = stages_of(name)
    assert list(found)[-1] == name
    assert [stage.start for stage in found.values()] == [None, *list(found)[:-1]]
    kinds = {(stage.width, CURRICULA[stage.kind].model_type) for stage in found.values()}
    text = config(name)["text_config"]
    assert kinds == {(text["hidden_size"], config(name)["model_type"])}
    assert config(name)["vision_config"]["hidden_size"] == TOWERS[text["hidden_size"]]
    assert not any(stage.retokenize for stage in found.values() if stage.start is None)


def test_the_stages_of_an_unknown_model_are_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'perception'"):
        stages_of("perceptoin")
    with pytest.raises(ValueError, match="language-1"):  # a stage, but no shipped model
        stages_of("language-1")


@pytest.mark.gate
@pytest.mark.parametrize(("kind", "start"), [("llava", "llava"), ("video", None)])
def test_a_stage_gives_the_same_bytes_with_any_number_of_threads(kind: str, start: str | None, tmp_path: Path) -> None:
    begin = resolve_model(f"tiny:{start}") if start else None
    before = torch.get_num_threads()
    folders = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            folders.append(tmp_path / str(threads))
            build(kind, folders[-1], steps=2, rows=4, start=begin, log=lambda _: None)
            assert torch.get_num_threads() == threads  # the caller's, as before
    finally:
        torch.set_num_threads(before)
    one, more = ({f.name: f.read_bytes() for f in folder.iterdir()} for folder in folders)
    assert len(one) > 5
    assert one == more


def test_other_threads_are_those_that_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr(build_module, "train", lambda *args, **options: seen.append(torch.get_num_threads()))
    for threads in (1, 3):
        build("perception", tmp_path, steps=1, rows=1, threads=threads, log=lambda _: None)
    assert seen == [1, 3]
    assert torch.get_num_threads() == before


@pytest.mark.gate
def test_a_model_of_another_width_is_narrower_throughout_and_begins_with_its_like_only(tmp_path: Path) -> None:
    build("perception", tmp_path, steps=1, rows=1, width=64, log=lambda _: None)
    made = json.loads((tmp_path / "config.json").read_text())
    assert (made["text_config"]["hidden_size"], made["vision_config"]["hidden_size"]) == (64, 64)
    assert made["vision_config"]["out_hidden_size"] == 64
    with pytest.raises(ValueError, match="width 64 cannot begin one of width 128"):
        build("video", tmp_path / "wide", steps=1, start=tmp_path, retokenize=True)
    with pytest.raises(ValueError, match="width: expected one of 128, 64"):
        build("video", tmp_path / "odd", steps=1, width=96)
    assert not (tmp_path / "wide").exists()
    assert not (tmp_path / "odd").exists()


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stages of perception, with one step of one scene each."""
    short = {name: replace(STAGES[name], steps=1, rows=1) for name in stages_of("perception")}
    monkeypatch.setattr(stages, "STAGES", MappingProxyType(STAGES | short))


@pytest.mark.gate
def test_a_shipped_model_is_built_in_its_stages_and_an_interrupted_build_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch)
    whole = build_shipped("perception", tmp_path / "whole", log=lambda _: None)
    assert whole == tmp_path / "whole" / "perception"
    taught: list[str] = []

    def interrupted(kind: str, *args: object, **options: object) -> None:
        taught.append(kind)
        if kind == "perception" and len(taught) == 2:
            build(kind, *args, **options | {"seed": 5})  # type: ignore[arg-type]  # half-finished weights
            raise KeyboardInterrupt
        build(kind, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(stages, "build", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_shipped("perception", tmp_path / "again", log=lambda _: None)
    lines: list[str] = []
    again = build_shipped("perception", tmp_path / "again", log=lines.append)
    assert taught == ["language", "perception", "perception", "perception"]
    assert any("language-1: built before" in line for line in lines)
    assert digest(again) == digest(whole)


@pytest.mark.gate
def test_a_stage_is_built_again_if_its_settings_or_its_beginning_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch)
    first = digest(build_shipped("perception", tmp_path, log=lambda _: None))
    other = stages.STAGES | {"language-1": replace(stages.STAGES["language-1"], seed=1)}
    monkeypatch.setattr(stages, "STAGES", other)
    lines: list[str] = []
    assert digest(build_shipped("perception", tmp_path, log=lines.append)) != first
    assert not any("built before" in line for line in lines)
