"""``docs/tree.md`` has a line for every folder and every top file, no outdated line, and names only what exists."""

from __future__ import annotations

import importlib
import re
import subprocess
from pathlib import Path

import pytest

from tests.helpers.rooms import LEVELS

REPO = Path(__file__).resolve().parents[2]
PAGE = (REPO / "docs" / "tree.md").read_text(encoding="utf-8")
MIRRORED = ("tests/", "fastrl/toy/weights/")  # one line covers all their folders


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [Path(line) for line in done.stdout.splitlines()]


def listed(heading: str) -> dict[str, str]:
    """Path → its description, from one section's table."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| `([^`]+)` \| (.+?) \|$", section, re.MULTILINE))


def test_every_folder_has_its_line_and_no_line_is_stale() -> None:
    folders = {str(parent) for path in tracked() for parent in path.parents} - {"."}
    assert set(listed("Folders")) == {folder for folder in folders if not folder.startswith(MIRRORED)}


def test_every_file_at_the_top_has_its_line() -> None:
    files = {str(path) for path in tracked() if str(path.parent) == "fastrl"}
    assert set(listed("Files at the top of `fastrl`")) == files


def test_every_line_says_something() -> None:
    for heading in ("Folders", "Files at the top of `fastrl`"):
        assert [path for path, message in listed(heading).items() if len(message) < 8] == []


def test_what_the_table_of_additions_names_exists() -> None:
    section = PAGE.split("## To add something\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("| a")]
    assert [row[0].strip().removeprefix("a ") for row in rows] == [
        *("method", "reward", "data format", "model family", "kernel", "logger")
    ]
    for _, write, line, outside in rows:
        template, places = re.findall(r"`([^`]+\.py)`", write)[0], re.findall(r"`([^`]+\.py)`", line)
        assert (REPO / template).parent.is_dir(), template
        assert places
        assert [place for place in places if not (REPO / place).is_file()] == []
        for module, function in re.findall(r"`(fastrl[\w.]*)\.(\w+)\(", outside):
            assert callable(getattr(importlib.import_module(module), function))


def test_the_order_of_imports_is_the_tested_one() -> None:
    line = next(line for line in PAGE.splitlines() if line.startswith("`cli →"))
    levels = [sorted(room.strip() for room in level.split(",")) for level in line.split("`")[1].split("→")]
    assert levels == [sorted(level) for level in reversed(LEVELS[1:])]
    assert all(f"`{room}`" in PAGE for room in LEVELS[0])
