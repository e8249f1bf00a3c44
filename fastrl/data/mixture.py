"""Mixtures of several data sets: how often each is drawn, the order of its rows, and the position of a run.

Every ``data.mix`` entry is split by task into *units*. Draw ``k`` of the run takes the next row of one unit:

- **proportions**: ``by row``, a unit's proportion is its weight times its number of rows (weight 2: each of its rows is
  drawn twice as often); ``by task``, a task's proportion is the mean weight of its entries, independent of their sizes,
  and is split by rows within the task. A weight may change with the step: ``{0: 1.0, 200: 0.25}`` is interpolated
  linearly.
- **draws** follow the proportions as closely as integers allow (largest credit first), and are shuffled within a step,
  so that units are spread evenly over steps and ranks.
- **rows** of a unit are drawn in shuffled passes over it. During a curriculum they are drawn at random from the easiest
  part of the unit, which grows from ``start`` to the whole over its steps.

Everything is a function of seed and draw, so a resumed run continues as if it had not been interrupted.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import Literal, NamedTuple, overload

from fastrl.data import load_data, parse_spec
from fastrl.data.blank import BlankImages
from fastrl.data.difficulty import Curriculum, difficulty
from fastrl.data.orders import shuffled
from fastrl.data.prompts import suffixed
from fastrl.data.records import Dataset, Record
from fastrl.data.validate import DataError, fail

Weight = float | Mapping[int, float]


class Part(NamedTuple):
    """One data set of a mixture; ``name`` is its records' ``origin`` and its name in metrics."""

    name: str
    records: Sequence[Record]
    weight: Weight = 1.0


class MixtureEntry(NamedTuple):
    """An entry of ``data.mix``."""

    name: str
    spec: str
    weight: Weight = 1.0


def entry_names(entries: Sequence[tuple[str | None, str]]) -> list[str]:
    """A name for each (name or None, spec): the given one, else the last part of its path, numbered if not unique."""
    names: list[str] = []
    taken = {name for name, _ in entries if name is not None}
    for name, spec in entries:
        if name is None:
            _, path, _ = parse_spec(spec)
            plain = Path(path).stem or path
            name = next(n for n in chain([plain], (f"{plain}-{i}" for i in count(2))) if n not in taken)
            taken.add(name)
        names.append(name)
    return names


def load_mixture(
    entries: Sequence[MixtureEntry],
    *,
    skip_bad: bool = False,
    misfit: Callable[[Record], str | None] | None = None,
    suffix: str | None = None,
) -> Mixture:
    """Load every entry like ``load_data``, with ``suffix`` after every question. Raises one ``DataError`` for all
    entries, which names them by their specs."""
    parts, problems = [], []
    for entry in entries:
        fits = (lambda record, name=entry.name: misfit(replace(record, origin=name))) if misfit is not None else None
        try:
            found = suffixed(load_data(entry.spec, skip_bad=skip_bad, misfit=fits), suffix, entry.spec)
            parts.append(Part(entry.name, found, entry.weight))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    return Mixture(parts)


class Mixture(Sequence[Record]):
    """The records of all parts in sequence, each with its part's name as ``origin`` and as a prefix of its id."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        self._starts = [0]
        for part in parts:
            self._starts.append(self._starts[-1] + len(part.records))

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        place = bisect_right(self._starts, index) - 1
        part = self.parts[place]
        record = part.records[index - self._starts[place]]
        return replace(record, id=f"{part.name}/{record.id}", origin=part.name)

    @property
    def summary(self) -> str:
        """The summaries of the parts, each line with its part's name."""
        lines = [(part.name, line) for part in self.parts for line in summary_of(part.records).split("\n")]
        return "\n".join(f"{name}: {line}" for name, line in lines if line)

    def part_of(self, place: int) -> range:
        """The indices of a part's records."""
        return range(self._starts[place], self._starts[place + 1])


def summary_of(records: Sequence[Record]) -> str:
    """Which rows were skipped when these records were loaded, and what was noted of others; empty for records that were
    not loaded from a data set."""
    return records.summary if isinstance(records, Dataset | Mixture) else ""


def listed(records: Sequence[Record]) -> bool:
    """Whether records exist already. Others are made on demand (drawn scenes, clips): to weigh all would make all."""
    if isinstance(records, BlankImages):
        return listed(records.records)
    if isinstance(records, Mixture):
        return all(listed(part.records) for part in records.parts)
    return isinstance(records.records if isinstance(records, Dataset) else records, list | tuple)


@dataclass
class _Unit:
    """The rows of one task in one part, easiest first if there is a curriculum."""

    rows: list[int]
    task: str
    weight: Weight
    drawn: int = 0  # number of rows drawn so far
    credit: float = 0.0
    easy: int = 0  # draws made during the curriculum, which do not count in its passes
    order: list[int] | None = None  # of the current pass


def parts_of(records: Sequence[Record]) -> Mixture:
    """A mixture (possibly with blanked pictures), or any other data as a mixture of one part, for ``MixturePlan``."""
    inner = records.records if isinstance(records, BlankImages) else records
    return inner if isinstance(inner, Mixture) else Mixture([Part("", inner)])


class MixturePlan:
    """Assigns a record to each draw of a run.

    Args:
        mixture: the data.
        seed: of shuffles.
        step: draws per optimizer step, over all ranks.
        by: ``row`` or ``task``, see above.
        order: order of a unit's rows, ``shuffle`` or ``file``.
        buffer: buffer size of the shuffle (``orders.shuffled``).
        curriculum: from easy to hard, if set.

    Raises:
        DataError: a record lacks the value that the curriculum uses.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        seed: int,
        step: int,
        by: Literal["row", "task"] = "row",
        order: Literal["shuffle", "file"] = "shuffle",
        buffer: int | None = None,
        curriculum: Curriculum | None = None,
    ) -> None:
        self.mixture, self.seed, self.step, self.by = mixture, seed, step, by
        self.order, self.buffer, self.curriculum = order, buffer, curriculum
        self._rows = _rows_by_unit(mixture, curriculum)
        self._units: list[_Unit] = []
        self._next = 0  # the next epoch to draw from the units

    def epoch(self, number: int) -> list[int]:
        """Record indices of the draws of an epoch, which has as many draws as the mixture has records."""
        if number < self._next or not self._units:
            self._units = [_Unit(rows, task, weight) for rows, task, weight in self._rows]
            self._next = 0
        draws: list[int] = []
        while self._next <= number:
            draws = self._draw(self._next)
            self._next += 1
        return draws

    def _draw(self, epoch: int) -> list[int]:
        size = len(self.mixture)
        taken: list[int] = []
        while len(taken) < size:
            first = epoch * size + len(taken)
            step, within = divmod(first, self.step)
            proportions = self._proportions(step)
            found = [self._take(proportions, step) for _ in range(min(self.step - within, size - len(taken)))]
            random.Random(f"{self.seed}/{first}").shuffle(found)
            taken += found
        return taken

    def _proportions(self, step: int) -> list[float]:
        """Each unit's proportion of the draws at a step; they sum to 1."""
        weights = [weight_at(unit.weight, step) for unit in self._units]
        worth = [weight * len(unit.rows) for weight, unit in zip(weights, self._units, strict=True)]
        if self.by == "task":
            tasks: dict[str, list[int]] = {}
            for place, unit in enumerate(self._units):
                tasks.setdefault(unit.task, []).append(place)
            for places in tasks.values():
                total = sum(worth[p] for p in places)
                mean = sum(weights[p] for p in places) / len(places)
                for p in places:
                    worth[p] = mean * worth[p] / total if total else 0.0
        total = sum(worth)
        if not total:
            raise fail(f"step {step}", "bad weights", "every weight of data.mix is 0 here")
        return [value / total for value in worth]

    def _take(self, proportions: Sequence[float], step: int) -> int:
        for unit, proportion in zip(self._units, proportions, strict=True):
            unit.credit += proportion
        place = max(range(len(self._units)), key=lambda p: (self._units[p].credit, -p))
        unit = self._units[place]
        unit.credit -= 1
        unit.drawn += 1
        n = len(unit.rows)
        if self.curriculum is not None and step < self.curriculum.steps:
            part = self.curriculum.start + (1 - self.curriculum.start) * step / self.curriculum.steps
            unit.easy += 1
            return unit.rows[random.Random(f"{self.seed}/{place}/{unit.drawn}").randrange(max(1, round(part * n)))]
        done, at = divmod(unit.drawn - unit.easy - 1, n)
        if at == 0 or unit.order is None:
            seed = self.seed + 7_919 * place
            unit.order = list(range(n)) if self.order == "file" else shuffled(n, seed, done, buffer=self.buffer)
        return unit.rows[unit.order[at]]


def weight_at(weight: Weight, step: int) -> float:
    """The weight at a step: constant, or interpolated linearly between the given steps."""
    if not isinstance(weight, Mapping):
        return float(weight)
    steps = sorted(weight)
    after = bisect_right(steps, step)
    if after == 0 or after == len(steps):
        return float(weight[steps[min(after, len(steps) - 1)]])
    low, high = steps[after - 1], steps[after]
    return weight[low] + (weight[high] - weight[low]) * (step - low) / (high - low)


def _rows_by_unit(mixture: Mixture, curriculum: Curriculum | None) -> list[tuple[list[int], str, Weight]]:
    units = []
    for place, part in enumerate(mixture.parts):
        indices = mixture.part_of(place)
        if not indices:
            continue
        looked = _looked_at(part.records) if curriculum is None else part.records
        by_task: dict[str, list[int]] = {}
        for offset, index in enumerate(indices):
            by_task.setdefault(looked[min(offset, len(looked) - 1)].task, []).append(index)
        for task, rows in by_task.items():
            if curriculum is not None:
                hard = {row: difficulty(part.records[row - indices.start], curriculum) for row in rows}
                rows = sorted(rows, key=hard.__getitem__)
            units.append((rows, task, part.weight))
    return units


def _looked_at(records: Sequence[Record]) -> Sequence[Record]:
    """The records from which tasks are read: only the first if they are made on demand, as all have the same task."""
    inner = records.records if isinstance(records, Dataset) else records
    return inner if isinstance(inner, list) else [records[0]]
