"""The results of a study from its finished jobs: means with the spread over seeds, and changes with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import fastrl
from fastrl.evaluate.intervals import paired_interval
from fastrl.studies.base import EXPECTED, REPORTED, Measured, Study
from fastrl.studies.cells import Cell, Chosen
from fastrl.studies.machine import machine
from fastrl.toy.demos.evidence import Scores, report
from fastrl.toy.demos.table import print_rows

Cells = Mapping[tuple[str, int], Cell]  # (arm, seed) -> its finished job


class _Named(NamedTuple):
    id: str


def outcome(
    study: Study,
    cells: Cells,
    chosen: Mapping[str, Chosen],
    out: Path,
    stopped: str = "",
    other_cpu_seconds: float = 0.0,
) -> dict[str, Any]:
    """The results of a study; scores of every record, averaged over seeds, go to ``OUT/scores.jsonl``.

    Returns:
        What the study is (``study``, ``question``, …), ``quick``, ``seeds`` (their number), ``rates`` and ``betas`` by
        group, ``records``; ``arms``: arm → measure → ``mean``, ``seeds`` (the value of each); ``changes``: comparison →
        ``before``, ``after``, ``change``, ``low``, ``high`` (of the scores averaged over seeds, an interval over
        records) and ``seeds`` (the change on each); ``claims``: main comparison → ``expected``, ``found``, ``seen``
        (see :func:`seen`); ``findings``; ``stopped``, why nothing was trained (empty: it was);
        ``seconds`` and ``cpu_seconds`` of these jobs; ``process_cpu_seconds``, which also has ``other_cpu_seconds``, of
        what seeds share and of the choice of rates; ``machine``, with torch's threads in each process; the ``commit``
        of the code (of jobs that ran on different ones, all; empty outside a checkout) and its ``version``.

    Raises:
        ValueError: arms were measured on different records.
    """
    seeds = sorted({seed for _, seed in cells})
    ids = _same_ids(cells)
    each = {seed: _with_differences(study, _states(cells, seed)) for seed in seeds}
    averaged = {state: _average([each[seed][state] for seed in seeds]) for state in each[seeds[0]]}
    wanted = [c for c in study.comparisons() if c.before[0] in averaged and c.after[0] in averaged]
    records = [_Named(identity) for identity in ids]
    changes = report(out / "scores.jsonl", records, averaged, wanted)["changes"]
    for name, before, after in wanted:
        changes[name]["seeds"] = [
            paired_interval(each[s][before[0]][before[1]], each[s][after[0]][after[1]], draws=1).change for s in seeds
        ]
    about, cpu = study.about._asdict(), sum(cell.cpu_seconds for cell in cells.values())
    return {
        "study": about.pop("name"),
        **about,
        "quick": study.quick,
        "settings": dict(study.settings()),
        "seeds": len(seeds),
        "rates": {group: found.rate for group, found in chosen.items()},
        "betas": {group: found.beta for group, found in chosen.items() if found.beta is not None},
        "records": len(ids),
        "arms": {arm: _means(cells, arm) for arm in dict.fromkeys(arm for arm, _ in cells)},
        "changes": changes,
        "claims": {name: seen(expected, changes[name]) for name, expected in study.claims().items() if name in changes},
        "findings": dict(study.findings(out)),
        "stopped": stopped,
        "seconds": sum(cell.seconds for cell in cells.values()),
        "cpu_seconds": cpu,
        "process_cpu_seconds": cpu + other_cpu_seconds,
        "machine": {**machine(), "threads": sorted({cell.threads for cell in cells.values() if cell.threads})},
        "commit": ", ".join(dict.fromkeys(cell.commit for cell in cells.values() if cell.commit)),
        "version": fastrl.__version__,
    }


def verdict(change: Mapping[str, Any]) -> str:
    """``rises``, ``falls`` or ``level``: whether the whole interval is above 0, below 0, or neither."""
    return "rises" if change["low"] > 0 else "falls" if change["high"] < 0 else "level"


def seen(expected: str, change: Mapping[str, Any]) -> dict[str, Any]:
    """``expected`` of a comparison (see ``EXPECTED``), its verdict as ``found``, and whether they agree as ``seen``."""
    found = verdict(change)
    return {"expected": expected, "found": found, "seen": found in EXPECTED[expected]}


def spread(values: Sequence[float]) -> str:
    """``± 0.012``, the standard deviation over seeds; empty for one seed."""
    return f" ± {stdev(values):.3f}" if len(values) > 1 else ""


def arm_rows(study: Study, result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table of arms."""
    found = result["arms"]
    names = dict.fromkeys(name for row in found.values() for name in row)
    columns = ["arm", *(study.measures.get(name, name) for name in names)]
    rows = [
        [arm, *(f"{row[n]['mean']:.3f}{spread(row[n]['seeds'])}" if n in row else "" for n in names)]
        for arm, row in found.items()
    ]
    return columns, rows


def change_rows(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table of comparisons."""
    columns = ["compared", "from", "change", "95 % interval", "± seeds", "it"]
    rows = [
        [
            name,
            f"{c['before']:.3f}",
            f"{c['change']:+.3f}",
            f"[{c['low']:+.3f}, {c['high']:+.3f}]",
            spread(c["seeds"]).removeprefix(" ± ") or "–",
            verdict(c),
        ]
        for name, c in result["changes"].items()
    ]
    return columns, rows


def conditions(result: Mapping[str, Any]) -> str:
    """One sentence: records, seeds, learning rates and β, quick or not."""
    rates, betas = (
        ", ".join(f"{group} {value:g}" for group, value in result[of].items() if value is not None)
        for of in ("rates", "betas")
    )
    seeds = "one seed" if result["seeds"] == 1 else f"{result['seeds']} seeds"
    if result["quick"]:
        how = "quick: one seed, smaller, and no learning rate was chosen"
    else:
        how = f"{seeds}; learning rates " + (f"chosen on other records: {rates}" if rates else "are the recipe's")
        how += f"; so was β: {betas}" if betas else ""
    stopped = f"; nothing was trained, as {result['stopped']}" if result["stopped"] else ""
    return f"{result['records']} records on which nothing was chosen; {how}{stopped}"


def print_result(study: Study, result: Mapping[str, Any]) -> None:
    """The tables, on stdout."""
    columns, rows = arm_rows(study, result)
    print_rows(f"{result['study']}: {result['question']}\n{conditions(result)}", columns, rows)
    columns, rows = change_rows(result)
    print_rows("intervals over records of the scores averaged over seeds", columns, rows)
    for name, claim in result["claims"].items():
        print(f"{name}: expected: {claim['expected']}; {claim['found']}" + ("" if claim["seen"] else " (not seen)"))
    for name, found in result["findings"].items():
        print(f"{name}: {found['value']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]")
    spent = f"{result['seconds']:.0f} s of runs; {result['process_cpu_seconds']:.0f} of a core with all that they share"
    print(f"{spent}; page: {result['out']}/study.html")


def _same_ids(cells: Cells) -> Sequence[str]:
    given = {(arm, seed): tuple(cell.sets[REPORTED].ids) for (arm, seed), cell in cells.items()}
    (first, ids), *rest = given.items()
    for other, theirs in rest:
        if theirs != ids:
            raise ValueError(f"{other[0]}, seed {other[1]}, was measured on other records than {first[0]}")
    return ids


def _states(cells: Cells, seed: int) -> dict[str, Scores]:
    """Arm → scores with this seed; arms that are not trained have those of seed 0."""
    arms = dict.fromkeys(arm for arm, _ in cells)
    return {arm: cells.get((arm, seed), cells[arm, 0]).sets[REPORTED].scores for arm in arms}


def _with_differences(study: Study, states: dict[str, Scores]) -> dict[str, Scores]:
    made = {}
    for name, (arm, other) in study.differences().items():
        if arm in states and other in states:
            made[name] = {
                key: [a - b for a, b in zip(values, states[other][key], strict=True)]
                for key, values in states[arm].items()
            }
    return {**states, **made}


def _average(scores: Sequence[Scores]) -> Scores:
    return {key: [fmean(values) for values in zip(*(s[key] for s in scores), strict=True)] for key in scores[0]}


def _means(cells: Cells, arm: str) -> dict[str, dict[str, Any]]:
    found: dict[str, list[float]] = {}
    for (name, _), cell in cells.items():
        if name == arm:
            measured: Measured = cell.sets[REPORTED]
            for key, values in measured.scores.items():
                found.setdefault(key, []).append(fmean(values))
            for key, value in measured.numbers.items():
                found.setdefault(key, []).append(value)
    return {key: {"mean": fmean(values), "seeds": values} for key, values in found.items()}
