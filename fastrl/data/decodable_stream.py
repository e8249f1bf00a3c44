"""The data stream of a run that skips records with broken pictures."""

from __future__ import annotations

from typing import Any

from fastrl.data.decodable import broken_picture
from fastrl.data.records import Record
from fastrl.data.stream import RecordStream
from fastrl.data.validate import DataError, Problem


class DecodableStream(RecordStream):
    """A stream that skips records whose pictures cannot be decoded, and counts them.

    Its arguments are those of ``RecordStream``. :meth:`take` and :meth:`peek` raise ``DataError`` when no record can be
    decoded.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.broken = 0  # number of times a record was skipped for its pictures
        self.unreported: list[Problem] = []  # their problems that have not been reported yet
        self._known: dict[str, Problem | None] = {}

    def take(self, n: int) -> list[Record]:
        """The next ``n`` records that can be decoded."""
        kept: list[Record] = []
        fruitless = 0
        while len(kept) < n:
            found = super().take(n - len(kept))
            decodable = [record for record in found if self._problem(record) is None]
            self.broken += len(found) - len(decodable)
            fruitless = 0 if decodable else fruitless + len(found)
            self._give_up_after(fruitless)
            kept += decodable
        return kept

    def peek(self, n: int) -> list[Record]:
        """The ``n`` records that :meth:`take` would return."""
        look = n
        while True:
            decodable = [record for record in super().peek(look) if self._problem(record) is None]
            if len(decodable) >= n:
                return decodable[:n]
            self._give_up_after(0 if decodable else look)
            look += n - len(decodable)

    def state(self) -> dict[str, Any]:
        return {**super().state(), "broken": self.broken}

    def load(self, state: dict[str, Any], *args: Any, **options: Any) -> Any:
        result = super().load(state, *args, **options)
        self.broken = state.get("broken", 0)  # a run that started without --skip-bad has no count
        return result

    def _problem(self, record: Record) -> Problem | None:
        if record.id not in self._known:
            self._known[record.id] = found = broken_picture(record)
            if found is not None:
                self.unreported.append(found)
        return self._known[record.id]

    def _give_up_after(self, fruitless: int) -> None:
        if fruitless > 2 * len(self.records):
            raise DataError([problem for problem in self._known.values() if problem is not None])
