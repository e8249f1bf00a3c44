"""Every ``fastrl`` command of the docs, the README and the examples is one that the program understands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup

from fastrl.cli.main import app
from fastrl.recipe import load_recipe, shipped_recipes

REPO = Path(__file__).resolve().parents[2]
PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LAUNCHED = re.compile(r"^(?:\w+=\S+ )*(?:deepspeed|torchrun)\b.*?(?=\btrain\b)|^(?:\w+=\S+ )*fastrl (?=\w)")


def commands() -> Iterator[object]:
    for page in PAGES:
        for block in BLOCK.findall(page.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                begun = LAUNCHED.match(line)
                if begun is not None:
                    words = shlex.split(line[begun.end() :], comments=True)
                    yield pytest.param(words, id=f"{page.stem}: {' '.join(words)[:60]}")


@pytest.mark.parametrize("words", commands())
def test_a_command_of_the_docs_is_understood(words: list[str]) -> None:
    """Its options are there and their values of the right type; the keys that it sets are those of its recipe."""
    command = typer.main.get_command(app)
    elided = "..." in words  # stands for the options of the command above
    words = [word for word in words if word != "..."]
    while isinstance(command, TyperGroup):
        name = words.pop(0)
        assert name in command.commands, f"no command {name}"
        command = command.commands[name]
    context = command.make_context(command.name, words, resilient_parsing=elided)
    recipe, changes = context.params.get("recipe"), context.params.get("overrides") or ()
    if isinstance(recipe, str) and recipe in shipped_recipes():
        load_recipe(recipe, list(changes))


def test_commands_are_found() -> None:
    assert len(list(commands())) > 30


@pytest.mark.parametrize(
    "words",
    [
        ["trian", "perception-r1-grounding-tiny"],
        ["train", "perception-r1-grounding-tiny", "--sett", "a.b=c"],
        ["train", "perception-r1-grounding-tiny", "--set", "optim.stepz=1"],
        ["train", "perception-r1-grounding-tiny", "--from-step", "first"],
    ],
)
def test_a_command_that_is_not_understood_is_noticed(words: list[str]) -> None:
    with pytest.raises(Exception, match=r"no command trian|No such option|unknown key|valid integer"):
        test_a_command_of_the_docs_is_understood(words)
