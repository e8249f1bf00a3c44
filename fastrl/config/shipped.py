"""The recipes that come with the package, as files."""

from __future__ import annotations

from pathlib import Path

SHIPPED = Path(__file__).parent.parent / "recipes"


def shipped_recipes() -> list[str]:
    """Their names."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def shipped_path(name: str) -> Path:
    """The file of one of them."""
    return SHIPPED / f"{name}.yaml"


def described(name: str) -> str:
    """What a shipped recipe is for: the first sentence of the comment at the top of its file."""
    lines = shipped_path(name).read_text(encoding="utf-8").splitlines()
    comment = []
    for line in lines:
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
    text = " ".join(comment)
    return text.split(". ")[0].removesuffix(".") if text else ""
