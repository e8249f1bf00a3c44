"""The results of a study from its finished jobs: means with the spread over seeds, and changes with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import fastrl
from fastrl.evaluate.intervals import crossed_interval
from fastrl.studies.base import EXPECTED, MARGIN, REPORTED, Measured, Study
from fastrl.studies.cells import Cell, Chosen
from fastrl.studies.machine import machine
from fastrl.toy.demos.evidence import Compared, Scores, write_scores
from fastrl.toy.demos.table import print_rows

MANY = 20  # seeds whose spread an interval can rest on
Cells = Mapping[tuple[str, int], Cell]  # (arm, seed) -> its finished job


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
        ``before``, ``after``, ``change`` (means over seeds and records), ``low``, ``high`` (an interval over both) and
        ``seeds`` (the change on each); ``claims``: main comparison → ``expected``, ``found``, ``seen`` (null: not
        decided; see :func:`seen`) and, where a margin decides, ``margin``; ``findings``;
        ``stopped``, why nothing was trained (empty: it was);
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
    write_scores(out / "scores.jsonl", ids, averaged)
    wanted = {c.name: c for c in study.comparisons() if c.before[0] in averaged and c.after[0] in averaged}
    changes = {name: _change(compared, list(each.values())) for name, compared in wanted.items()}
    margins = {name: study.margins.get(compared.after[1], MARGIN) for name, compared in wanted.items()}
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
        "claims": {
            name: seen(expected, changes[name], margins[name])
            for name, expected in study.claims().items()
            if name in changes
        },
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


def seen(expected: str, change: Mapping[str, Any], margin: float = MARGIN) -> dict[str, Any]:
    """``expected`` of a comparison (see ``EXPECTED``), its verdict as ``found``, and whether they agree as ``seen``.

    That a measure does not rise, or does not fall, cannot be seen in an interval so wide that it may have: where the
    verdict is level and the interval reaches further than ``margin`` in that direction, ``seen`` is None. ``margin`` is
    part of the result for such claims.
    """
    found = verdict(change)
    agrees = found in EXPECTED[expected]
    if "level" not in EXPECTED[expected]:
        return {"expected": expected, "found": found, "seen": agrees}
    reach = change["high"] if expected == "does not rise" else -change["low"]
    decided = found != "level" or reach <= margin
    return {"expected": expected, "found": found, "seen": agrees if decided else None, "margin": margin}


def answer(claim: Mapping[str, Any]) -> str:
    """``seen``, ``not seen`` or ``not decided``, of what :func:`seen` gives."""
    return {True: "seen", False: "not seen", None: "not decided"}[claim["seen"]]


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


def claim_rows(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table of main comparisons."""
    columns = ["claimed of", "expected", "found", "95 % interval", "it was"]
    rows = []
    for name, claim in result["claims"].items():
        change = result["changes"][name]
        margin = f" (margin {claim['margin']:g})" if "margin" in claim else ""
        shown = f"{change['change']:+.3f} {interval(change)}"
        rows.append([name, claim["expected"] + margin, claim["found"], shown, answer(claim)])
    return columns, rows


def interval(change: Mapping[str, Any]) -> str:
    """``[+0.010, +0.052]``."""
    return f"[{change['low']:+.3f}, {change['high']:+.3f}]"


def interval_of(result: Mapping[str, Any]) -> str:
    """What the intervals of a result are of."""
    if result["seeds"] == 1:
        return "intervals (95 %) over records; with one seed they know nothing of other seeds"
    few = f"; {result['seeds']} seeds give only a rough idea of their spread" if result["seeds"] < MANY else ""
    return f"intervals (95 %) over records and seeds{few}"


def change_rows(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table of comparisons."""
    columns = ["compared", "from", "change", "95 % interval", "± seeds", "it"]
    rows = [
        [
            name,
            f"{c['before']:.3f}",
            f"{c['change']:+.3f}",
            interval(c),
            spread(c["seeds"]).removeprefix(" ± ") or "–",
            verdict(c),
        ]
        for name, c in result["changes"].items()
    ]
    return columns, rows


def conditions(result: Mapping[str, Any]) -> str:
    """One sentence: records, seeds, learning rates and β (and which is an end of what was tried), quick or not."""
    rates, betas = (
        ", ".join(
            f"{group} {value:g}{_at_an_end(value, result.get(tried, {}).get(group, ()))}"
            for group, value in result[of].items()
            if value is not None
        )
        for of, tried in (("rates", "tried"), ("betas", "tried_betas"))
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
    print_rows(interval_of(result), columns, rows)
    for name, claim in result["claims"].items():
        told = "" if claim["seen"] else f" ({answer(claim)})"
        print(f"{name}: expected: {claim['expected']}; {claim['found']}{told}")
    for name, found in result["findings"].items():
        print(f"{name}: {found['value']:+.3f} {interval(found)}")
    spent = f"{result['seconds']:.0f} s of runs; {result['process_cpu_seconds']:.0f} of a core with all that they share"
    print(f"{spent}; page: {result['out']}/study.html")


def _change(compared: Compared, each: Sequence[Mapping[str, Scores]]) -> dict[str, Any]:
    """A comparison over seeds; ``each``: states by seed."""
    before, after = ([states[state][measure] for states in each] for state, measure in compared[1:])
    return {
        "before": fmean(map(fmean, before)),
        "after": fmean(map(fmean, after)),
        **crossed_interval(before, after)._asdict(),
        "seeds": [fmean(new) - fmean(old) for old, new in zip(before, after, strict=True)],
    }


def _at_an_end(value: float, tried: Sequence[Sequence[float]]) -> str:
    """``tried``: (value, mean) in order; empty where nothing was chosen."""
    return " (at an end of its grid)" if tried and value in (tried[0][0], tried[-1][0]) else ""


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
