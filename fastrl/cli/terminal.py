"""What the modules of the ``fastrl`` command share: common options, and where text and results go."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Count and skip bad rows instead of refusing the data.")]


def say(text: str) -> None:
    """A line about the work, on stderr."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: dict[str, Any]) -> None:
    """The result, as one line on stdout."""
    print(json.dumps(value), flush=True)
