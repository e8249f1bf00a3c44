"""Shared by the modules of the ``fastrl`` command: common options, and output of messages and results."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Count and skip bad rows instead of refusing the data.")]


def say(text: str) -> None:
    """Print a progress line on stderr."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: dict[str, Any]) -> None:
    """Print the result as one line on stdout."""
    print(json.dumps(value), flush=True)
