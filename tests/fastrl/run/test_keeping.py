"""Which checkpoints are kept: the last few, the best evaluation, and the last one before all rewards were equal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fastrl.run.integrity import CheckpointError
from fastrl.run.keeping import (
    BEFORE_EQUAL,
    BEST,
    folder_of,
    keep,
    keep_best,
    kept,
    list_checkpoints,
    rotate,
    set_aside,
    step_of,
    watch_rewards,
)


def make(out: Path, *steps: int) -> None:
    for step in steps:
        (out / "checkpoints" / f"step-{step:08d}" / "model").mkdir(parents=True)


def steps(out: Path) -> list[int]:
    return [step_of(path) for path in list_checkpoints(out)]


def test_rotation_never_removes_the_best(tmp_path: Path) -> None:
    make(tmp_path, 1, 2)
    keep(tmp_path, BEST, 1)
    make(tmp_path, 3, 4)
    rotate(tmp_path, 1)
    assert steps(tmp_path) == [1, 4]
    assert (tmp_path / "best").resolve() == (tmp_path / "checkpoints" / "step-00000001" / "model").resolve()
    keep(tmp_path, BEST, 4)
    rotate(tmp_path, 1)
    assert steps(tmp_path) == [4]
    assert (tmp_path / "best").resolve().is_dir()


def test_the_best_is_where_its_links_lead_and_nowhere_without_one(tmp_path: Path) -> None:
    make(tmp_path, 1, 2)
    inner, outer = tmp_path / "checkpoints" / "best", tmp_path / "best"
    assert keep_best(tmp_path, 2) == ""
    assert inner.resolve() == folder_of(tmp_path, 2).resolve()
    assert outer.resolve() == (folder_of(tmp_path, 2) / "model").resolve()
    assert steps(tmp_path) == [1, 2]  # a link is not a checkpoint
    moved = shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-moved", symlinks=True)
    assert (moved / "checkpoints" / "best").resolve() == folder_of(moved, 2).resolve()
    assert "of step 7, no longer exists" in keep_best(tmp_path, 7)
    assert not inner.is_symlink()
    assert not outer.is_symlink()
    assert kept(tmp_path) == {}
    outer.mkdir()  # a user's own folder
    assert keep_best(tmp_path, 1) == ""
    assert inner.resolve() == folder_of(tmp_path, 1).resolve()
    assert not outer.is_symlink()
    keep_best(tmp_path, None)
    assert outer.is_dir()


def test_the_checkpoint_from_before_equal_rewards_stays_until_they_differ_again(tmp_path: Path) -> None:
    assert watch_rewards(tmp_path, True) == ""  # there is none
    make(tmp_path, 10)
    assert watch_rewards(tmp_path, False) == ""
    message = watch_rewards(tmp_path, True)
    assert "step-00000010, is kept" in message
    for step in (20, 30, 40):
        make(tmp_path, step)
        rotate(tmp_path, 1)
        assert watch_rewards(tmp_path, True) == ""
    assert steps(tmp_path) == [10, 40]
    assert kept(tmp_path) == {BEFORE_EQUAL: 10}
    watch_rewards(tmp_path, False)
    rotate(tmp_path, 1)
    assert steps(tmp_path) == [40]


def test_later_checkpoints_are_set_aside_not_lost(tmp_path: Path) -> None:
    make(tmp_path, 1, 2, 3)
    keep(tmp_path, BEST, 3)
    keep(tmp_path, BEFORE_EQUAL, 1)
    moved = set_aside(tmp_path, 1)
    assert [path.name for path in moved] == ["aside-step-00000002", "aside-step-00000003"]
    assert steps(tmp_path) == [1]
    assert kept(tmp_path) == {BEFORE_EQUAL: 1}
    make(tmp_path, 2)
    assert [path.name for path in set_aside(tmp_path, 1)] == ["aside-step-00000002-1"]
    assert all(path.is_dir() for path in moved)


@pytest.mark.parametrize("text", ["[]", '{"best": "1"}', '{"best": -1}', '{"best": true}', "{", ""])
def test_a_keep_file_that_cannot_be_read_removes_nothing(tmp_path: Path, text: str) -> None:
    make(tmp_path, 1, 2, 3)
    (tmp_path / "checkpoints" / "keep.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"keep\.json: "):
        rotate(tmp_path, 1)
    assert steps(tmp_path) == [1, 2, 3]
    (tmp_path / "checkpoints" / "keep.json").write_text(json.dumps({"by hand": 1}))
    rotate(tmp_path, 1)
    assert steps(tmp_path) == [1, 3]
