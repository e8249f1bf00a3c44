"""Every Python block of the docs and the README runs as printed. A block after ``<!-- skip: reason -->`` is only
compiled; the reason is a GPU or a download."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import fastrl.data
import fastrl.methods
import fastrl.models.families
import fastrl.rewards
from fastrl.answers import styles

REPO = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"(?:<!-- skip: (?P<skip>[^\n]+?) -->\n)?^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def snippets() -> list[object]:
    found = []
    for path in [*sorted((REPO / "docs").glob("*.md")), REPO / "README.md"]:
        text = path.read_text() if path.is_file() else ""
        for match in BLOCK.finditer(text):
            number = text.count("\n", 0, match.start("code")) + 1
            found.append(pytest.param(path, number, match["code"], match["skip"], id=f"{path.name}:{number}"))
    return found


@pytest.fixture(autouse=True)
def own_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a block registers is removed after it."""
    registries = (fastrl.methods.METHODS, fastrl.rewards.REWARDS, fastrl.data.ADAPTERS, fastrl.models.families.FAMILIES)
    for registry in registries:
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))  # type: ignore[attr-defined]
    monkeypatch.setattr(styles, "_OF_FAMILY", dict(styles._OF_FAMILY))  # the families that ``answers`` knows


@pytest.mark.parametrize(("path", "number", "code", "skip"), snippets())
def test_snippet(path: Path, number: int, code: str, skip: str | None, monkeypatch, tmp_path) -> None:
    lines = "\n" * (number - 1) + code  # so that errors show the document's line numbers
    compiled = compile(lines, str(path), "exec", dont_inherit=True)
    if skip and not ("GPU" in skip and torch.cuda.is_available()):
        pytest.skip(skip)
    monkeypatch.chdir(tmp_path)
    exec(compiled, {"__name__": "__main__"})


def test_blocks_are_found() -> None:
    """The pattern above finds every Python fence, so no block is skipped by mistake."""
    for path in (REPO / "docs").glob("*.md"):
        text = path.read_text()
        assert len(BLOCK.findall(text)) == len(re.findall(r"^\s*```(?:python|py)\b", text, re.MULTILINE)), path.name
