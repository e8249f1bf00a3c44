"""``fastrl data``: inspect the data of a spec before training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastrl.cli.terminal import Json, print_json


def data(
    spec: Annotated[str, typer.Argument(metavar="SPEC", help="adapter:path[?key=value&…]")],
    deep: Annotated[bool, typer.Option("--deep", help="Decode every picture, not just its header.")] = False,
    seed: Annotated[int, typer.Option(help="Which three records are shown.")] = 0,
    draw: Annotated[Path | None, typer.Option(metavar="PNG", help="Draw their pictures with the ground truth.")] = None,
    as_json: Json = False,
) -> None:
    """Show the data of a spec: counts, bad rows, and three records with their ground truth."""
    from fastrl.data.show import contents, contents_text, drawn, shown

    dataset = contents(spec, deep=deep)
    records = drawn(dataset, seed)
    if draw is not None:
        from fastrl.report.figures import truths

        truths(records, draw)
    if as_json:
        print_json(shown(dataset, records))
    else:
        print(contents_text(dataset, records))
        if draw is not None:
            print(f"figure: {draw}")
