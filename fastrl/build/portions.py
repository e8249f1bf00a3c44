"""A JSONL file built portion by portion, resumable to the byte.

After each portion the file grows by whole lines and the summary beside it (``NAME.summary.json``) is replaced in one
step; it says where the file then ended, so that a build that was stopped, however it was, goes on from its last whole
portion and ends with the same bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastrl.data.disk import writing
from fastrl.data.files import write_atomically

Tally = dict[str, Any]  # JSON values; what became of the records so far


def build_portions(
    out: Path,
    options: Mapping[str, Any],
    portions: int,
    work: Callable[[int, Tally], list[str]],
    start: Tally,
    *,
    after: Callable[[int, Tally], None] = lambda portion, tally: None,
) -> Tally:
    """Build ``out``, or go on with it.

    Args:
        out: the file.
        options: what the build does; one begun with other options does not go on.
        portions: their number; work: lines of a portion, counting into the tally; start: the tally of nothing.
        after: called after each portion with its number and the tally.

    Returns:
        The tally at the end.

    Raises:
        ValueError: ``out`` exists and is not a build's, or one with other options, or its summary is damaged.
    """
    done, size, found = resume(out, options)
    tally = start if found is None else found
    if done >= portions:
        return tally
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("r+b" if out.exists() else "w+b") as file:
        file.truncate(size)
        file.seek(size)
        for portion in range(done, portions):
            lines = work(portion, tally)
            data = "".join(lines).encode()
            with writing(out, len(data)):
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            state = {
                "done": portion + 1 == portions,
                "options": dict(options),
                "portions": portion + 1,
                "bytes": file.tell(),
                "tally": tally,
            }
            write_atomically(out.with_suffix(".summary.json"), json.dumps(state, indent=1) + "\n")
            after(portion, tally)
    return tally


def resume(out: Path, options: Mapping[str, Any]) -> tuple[int, int, Any]:
    """Portions done of ``out``, bytes of the file they made, and their tally (None: nothing is done).

    Raises:
        ValueError: ``out`` exists and is not a build's, or one with other options, or its summary is damaged.
    """
    state = out.with_suffix(".summary.json")
    if not state.is_file():
        if out.exists() and out.stat().st_size:
            raise ValueError(f"{out} exists and is no build that could go on ({state.name} is missing); choose another")
        return 0, 0, None
    try:
        saved = json.loads(state.read_text(encoding="utf-8"))
        began, tally = dict(saved["options"]), dict(saved["tally"])
        portions, size = int(saved["portions"]), int(saved["bytes"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{state}: not a build's summary ({type(error).__name__}: {error}); remove it and {out.name} to build anew"
        ) from None
    changed = [f"{k}: was {began.get(k)!r}, is {options[k]!r}" for k in options if began.get(k) != options[k]]
    if changed:
        raise ValueError(f"{out} was begun with other options ({'; '.join(changed)}); choose another --out")
    if not out.is_file() or out.stat().st_size < size:
        raise ValueError(f"{out} is shorter than {state.name} says; remove both to build anew")
    return portions, size, tally
