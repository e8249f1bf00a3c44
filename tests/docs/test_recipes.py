"""``docs/recipes.md`` lists every key with the default and range that the sections declare, and its use."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from fastrl.config.problems import key_paths
from fastrl.methods import METHODS
from fastrl.recipe import Recipe, build_recipe
from tests.helpers.recipe_keys import tables

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")


def page_tables() -> dict[str, dict[str, tuple[str, ...]]]:
    """Heading → key → (default, allowed, meaning)."""
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for part in PAGE.split("\n## ")[1:]:
        heading, _, body = part.partition("\n")
        lines = [line for line in body.splitlines() if line.startswith("| `")]
        rows = [tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in lines]
        if rows:
            found[heading] = {row[0]: row[1:] for row in rows}
    return found


def test_the_page_has_every_section() -> None:
    assert list(page_tables()) == list(tables())


@pytest.mark.parametrize("heading", list(tables()))
def test_every_key_has_its_default_its_range_and_its_meaning(heading: str) -> None:
    """Defaults and ranges are those of the sections. The page may add links, and may refer to a section with the same
    keys."""
    listed, held = page_tables()[heading], tables()[heading]
    assert {key: row[:2] for key, row in listed.items()} == {key: row[:2] for key, row in held.items()}
    plain = {key: re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", row[2]) for key, row in listed.items()}
    again = {key: f"As `{key.strip('`').removeprefix('data.mix.')}`." for key in listed}
    differ = {key: (text, held[key][2]) for key, text in plain.items() if text not in (held[key][2], again[key])}
    assert differ == {}
    assert [key for key, row in held.items() if len(row[2]) < 10] == []


def test_the_tables_leave_no_key_out() -> None:
    listed = {key.strip("`") for rows in tables().values() for key in rows}
    paths = {
        *key_paths(Recipe),
        *(
            path
            for m in METHODS.values()
            if m.__module__.startswith("fastrl.")
            for path in key_paths(m.Options, "method.")
        ),
    }
    sections = {path for path in paths if any(other.startswith(f"{path}.") for other in paths)}
    assert paths - sections - listed == set()
    assert listed - paths == set()


def test_the_example_is_a_recipe() -> None:
    block = re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert block is not None
    build_recipe(yaml.safe_load(block[1].replace("1e-5", "1.0e-5")))
