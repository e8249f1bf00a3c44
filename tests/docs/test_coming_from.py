"""The table of other trainers' keys: what it names here is there, and each of their names is answered with ours."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastrl.recipe import RecipeError, key_tables, load_recipe

PAGE = Path(__file__).resolve().parents[2] / "docs" / "coming-from.md"
NAME = re.compile(r"`([^`]+)`")
THEIRS = re.compile(r"[\w.…]+(?==)|^[\w.…]+$|[\w.]+(?= ×)|(?<=× )[\w.]+")
OURS = {key.path for keys in key_tables().values() for key in keys}


def rows() -> list[list[str]]:
    table = PAGE.read_text(encoding="utf-8").split("## Keys", 1)[1].split("## ", 1)[0]
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def ours(cell: str) -> list[str]:
    """Our keys of a cell; one may leave out the section of the one before it."""
    found: list[str] = []
    for name in NAME.findall(cell):
        name, _, value = name.partition(": ")
        section = found[-1].rpartition(".")[0] + "." if found else ""
        if name in OURS:
            found.append(name)
        elif section + name in OURS:
            found.append(section + name)
        else:
            assert not value, f"{name} is no key"
            assert "." not in name, f"{name} is no key"
    return found


def theirs(cell: str) -> list[str]:
    """Their keys of a cell, whole: ``LoraConfig(r=…, lora_alpha=…)`` and ``a × b`` name two."""
    names = [part for name in NAME.findall(cell) for part in THEIRS.findall(name)]
    return [name for name in names if "…" not in name and name.islower()]  # others are classes


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[3])
def test_a_row(row: list[str]) -> None:
    keys = ours(row[3])
    assert keys, row
    for name in [name for cell in row[:3] for name in theirs(cell)]:
        if name in OURS:
            continue
        with pytest.raises(RecipeError) as error:
            load_recipe("perception-r1-grounding-tiny", {name: 1})
        assert any(f"did you mean {key}?" in str(error.value) for key in keys), f"{name}: {error.value}"
