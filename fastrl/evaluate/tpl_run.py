"""``fastrl tpl``: measure temporal perplexity of a file, draw its distribution, and keep the rows with high values."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastrl.data import load_data, parse_spec
from fastrl.data.disk import nothing_empty_left
from fastrl.data.files import image_names, write_atomically
from fastrl.data.records import Record
from fastrl.data.rows import read_rows
from fastrl.data.validate import find_image_folder
from fastrl.evaluate.tpl import TemporalPerplexity, check_choices, temporal_perplexity
from fastrl.models.open import open_policy


@dataclass(frozen=True)
class TplOptions:
    """Options of ``fastrl tpl``; see also ``temporal_perplexity``."""

    model: str
    data: str  # a file of dialogues, or any adapter:path
    samples: int = 4
    single: str = "random"
    form: str = "log"
    absent: str = "left out"
    seed: int = 0
    curve: bool = False
    keep_top: float | None = None  # a fraction up to 1; above that a percentage
    limit: int | None = None
    skip_bad: bool = False
    min_pixels: int | None = None
    max_pixels: int | None = None
    token_budget: int = 8192

    @property
    def spec(self) -> str:
        return f"utr:{self.data}" if Path(self.data).is_file() else self.data

    @property
    def fraction(self) -> float:
        """The fraction of records to keep. Raises ``ValueError`` unless ``keep_top`` is above 0 and at most 100."""
        keep = 1.0 if self.keep_top is None else self.keep_top
        if not 0 < keep <= 100:
            raise ValueError(f"--keep-top: expected a fraction in (0, 1], or a percentage up to 100, got {keep:g}")
        return keep if keep <= 1 else keep / 100


def run_tpl(
    options: TplOptions,
    *,
    out: Path | None = None,
    plot: Path | None = None,
    draw: Callable[..., None] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Temporal perplexity of all records of a data set.

    Args:
        options: see :class:`TplOptions`.
        out: write the kept rows of the data file here, in their order, each with its ``tpl``.
        plot: PNG of the distribution; default next to ``out``, else ``runs/tpl-NAME.png``.
        draw: draws it, such as ``fastrl.report.tpl.draw_tpl``; None: no figure.
        say: called with progress messages.

    Returns:
        Mean, spread and quantiles of TPL, the number of kept rows, ``plot``, and ``values``: one object per record
        (``id``, ``tpl``, ``full``, ``single``, ``chosen``, ``curve``, ``explaining``, …).

    Raises:
        ValueError: options or data are bad, ``keep_top`` is given without ``out``, or rows cannot be written back.
    """
    started = time.perf_counter()
    check_choices(options.samples, options.single, options.form, options.absent)
    fraction = options.fraction
    if options.keep_top is not None and out is None:
        raise ValueError("--keep-top needs --out: the file for the rows that are kept")
    adapter, path, _ = parse_spec(options.spec)
    data = load_data(options.spec, skip_bad=options.skip_bad, deep=options.skip_bad)
    records = data if options.limit is None else data[: options.limit]
    rows = _rows(Path(path), adapter, records, out) if out is not None else {}
    policy = open_policy(options.model, min_pixels=options.min_pixels, max_pixels=options.max_pixels)
    say(f"{len(records)} records, {options.single} single frames")
    results = temporal_perplexity(
        policy,
        (records[i] for i in range(len(records))),
        samples=options.samples,
        single=options.single,
        form=options.form,
        absent=options.absent,
        seed=options.seed,
        curve=options.curve,
        token_budget=options.token_budget,
    )
    kept = keep_top(results, fraction)
    threshold = min(results[i].tpl for i in kept)
    if out is not None:
        lines = [_line(rows[i], records[i], i, results[i], Path(path), out) for i in kept]
        with nothing_empty_left(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(out, "".join(lines))
    filtered = len(kept) < len(results)
    plot = plot or (out.with_suffix(".png") if out is not None else Path("runs") / f"tpl-{Path(path).stem}.png")
    return {
        **summary(results),
        "form": options.form,
        "single_frame": options.single,
        "samples": options.samples,
        "absent": options.absent,
        "kept": len(kept),
        "threshold": threshold,
        "out": None if out is None else str(out),
        "plot": _figure(draw, results, plot, say, form=options.form, threshold=threshold if filtered else None),
        "seconds": time.perf_counter() - started,
        "values": [plain(result) for result in results],
    }


def keep_top(results: Sequence[TemporalPerplexity], fraction: float) -> list[int]:
    """Indices of the ``fraction`` with the highest TPL (rounded up), in the order of the data; of equals, the first."""
    ranked = sorted(range(len(results)), key=lambda i: (-results[i].tpl, i))
    return sorted(ranked[: math.ceil(fraction * len(results) - 1e-9)])


def summary(results: Sequence[TemporalPerplexity]) -> dict[str, Any]:
    """``n``, ``mean_tpl``, ``std_tpl``, quartiles, extremes, and the mean scores they come from."""
    values = [result.tpl for result in results]
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {
        "n": len(values),
        "mean_tpl": statistics.fmean(values),
        "std_tpl": statistics.pstdev(values),
        "min": min(values),
        **dict(zip(("q1", "median", "q3"), quartiles, strict=True)),
        "max": max(values),
        "full": statistics.fmean(result.full for result in results),
        "single": statistics.fmean(result.single for result in results),
    }


def plain(result: TemporalPerplexity) -> dict[str, Any]:
    """A result as JSON values."""
    values = result._asdict()
    values["curve"] = {str(frame): score for frame, score in result.curve.items()}
    return values | {"chosen": list(result.chosen), "explaining": result.explaining()}


def _rows(path: Path, adapter: str, records: Sequence[Record], out: Path) -> dict[int, Mapping[str, Any]]:
    """The file's row of each record, by the record's index. Raises ``ValueError`` if there is none."""
    if not path.is_file():
        raise ValueError(f"--out writes rows of a data file back; {adapter}:{path} is not a file of rows")
    if out.resolve() == path.resolve():
        raise ValueError(f"--out: {out} is the data itself; choose another file")
    by_place = {where: row for _, where, row in read_rows(path) if isinstance(row, Mapping)}
    found = {}
    for i in range(len(records)):
        row = by_place.get(records[i].source)
        if row is None:
            raise ValueError(f"--out: record {records[i].id!r} ({records[i].source}) is not a single row of {path}")
        found[i] = row
    return found


def _line(
    row: Mapping[str, Any], record: Record, number: int, result: TemporalPerplexity, path: Path, out: Path
) -> str:
    """The row with its TPL; picture paths are made relative to the new file's folder."""
    row = {**row, "tpl": result.tpl}
    if out.parent.resolve() != path.parent.resolve():
        frames = row.get("frames")
        if (
            isinstance(frames, list)
            and len(frames) == len(record.images)
            and all(isinstance(i, Path) for i in record.images)
        ):
            row["frames"] = image_names(record.images, number, out)
        elif isinstance(row.get("video"), str):
            row["video"] = str((find_image_folder(path, [row["video"]]) / row["video"]).resolve())
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def _figure(
    draw: Callable[..., None] | None,
    results: Sequence[TemporalPerplexity],
    plot: Path,
    say: Callable[[str], None],
    **shown: Any,
) -> str | None:
    """Draw ``plot``; returns None if nothing was drawn."""
    if draw is None:
        return None
    try:
        with nothing_empty_left(plot):
            draw(results, plot, **shown)
    except ModuleNotFoundError as error:
        say(f"no figure: {error.name} is not installed")
        return None
    return str(plot)
