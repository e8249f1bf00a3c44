"""``fastrl export``: a trained model as one standard Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastrl.cli.terminal import Json, print_json


def export(
    source: Annotated[str, typer.Argument(metavar="RUN_OR_FOLDER", help="A run, checkpoint, model or adapter folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The new folder.")],
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 [as stored].")] = None,
    base: Annotated[str | None, typer.Option(metavar="DIR", help="Model under adapters [by their config].")] = None,
    best: Annotated[bool, typer.Option("--best", help="For a run: export its best checkpoint by evaluation.")] = False,
    push: Annotated[str | None, typer.Option(metavar="REPO", help="Upload it to owner/name on the hub.")] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push: make a new repository public.")] = False,
    as_json: Json = False,
) -> None:
    """Merge adapters into their model, cast the weights, and write a standard Hugging Face folder."""
    from fastrl.models import export as library

    if public and push is None:
        raise ValueError("--public needs --push")
    if push is not None:
        library.check_repo(push)
    made = library.export(source, out, dtype=dtype, base=base, best=best)
    address = library.push(out, push, private=not public) if push is not None else None
    if as_json:
        print_json({**made._asdict(), "source": str(made.source), "out": str(made.out), "pushed": address})
        return
    merged = ", adapters merged" if made.merged else ""
    print(f"{made.out}: {made.files} files, {made.bytes / 2**20:.1f} MiB{merged}; from {made.source}")
    if address is not None:
        print(f"uploaded: {address}")
