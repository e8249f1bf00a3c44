"""The data position of a run: records in a seeded order, epoch after epoch, resumable."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

from fastrl.data.identity import Change, Identity, Pictures, compare, identify
from fastrl.data.orders import shuffled
from fastrl.data.records import Record


class DataChanged(ValueError):
    """A run would go on with other data than it began with."""


class RecordStream:
    """Records without end. The order of an epoch depends on the seed and the epoch's number alone.

    Args:
        records: the data; every rank gets the same.
        seed: of the shuffle.
        order: ``shuffle``, or ``file`` for the order of ``records``.
        buffer: rows that are shuffled among each other (``orders.shuffled``); none: all.
        plan: the indices of an epoch by its number, in place of ``order``: a mixture's draws.
        rank, world_size: this rank sees every ``world_size``-th record, beginning at ``rank``.
        pictures: how picture files are compared on a resume (see ``fastrl.data.identity``).

    Raises:
        ValueError: fewer records than ranks.
    """

    def __init__(
        self,
        records: Sequence[Record],
        *,
        seed: int = 0,
        order: Literal["shuffle", "file"] = "shuffle",
        buffer: int | None = None,
        plan: Callable[[int], list[int]] | None = None,
        rank: int = 0,
        world_size: int = 1,
        pictures: Pictures = "stat",
    ) -> None:
        if len(records) < max(1, world_size):
            raise ValueError(f"data has {len(records)} records, training needs at least {max(1, world_size)}")
        self.records = records
        self.seed = seed
        self.order = order
        self._buffer, self._plan = buffer, plan
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self.position = 0  # within the epoch
        self.consumed = 0
        self._pictures: Pictures = pictures
        self._identity: Identity | None = None
        self._rest: list[int] | None = None  # of an epoch that began with other data: what all ranks still have to see
        self._passed = 0  # records this rank saw of such an epoch before
        self._indices = self._epoch_indices()
        self._ahead: dict[int, Record] = {}  # records looked at and not taken yet, by index: each is made once

    def take(self, n: int) -> list[Record]:
        """The next ``n`` records, across the end of an epoch where need be."""
        records = [self._ahead.pop(index, None) or self.records[index] for index in self._advance(n)]
        self.consumed += n
        return records

    def peek(self, n: int) -> list[Record]:
        """The ``n`` records that come after those taken so far; the position stays, and :meth:`take` gives these."""
        indices = copy.copy(self)._advance(n)
        for index in indices:
            if index not in self._ahead:
                self._ahead[index] = self.records[index]
        return [self._ahead[index] for index in indices]

    def _advance(self, n: int) -> list[int]:
        """Indices of the next ``n`` records; the position moves behind them."""
        indices = []
        for _ in range(n):
            if self.position == len(self._indices):
                self.epoch += 1
                self.position = self._passed = 0
                self._rest = None
                self._indices = self._epoch_indices()
            indices.append(self._indices[self.position])
            self.position += 1
        return indices

    @property
    def epochs(self) -> float:
        """Passes over the data so far."""
        return self.epoch + (self._passed + self.position) / max(1, self._passed + len(self._indices))

    def identity(self) -> Identity:
        """What the data is; looked at once."""
        if self._identity is None:
            self._identity = identify(self.records, self._pictures)
        return self._identity

    def state(self) -> dict[str, Any]:
        """What :meth:`load` needs to go on from here, beside :meth:`identity`."""
        state = {
            "seed": self.seed,
            "order": self.order,
            "epoch": self.epoch,
            "position": self.position,
            "consumed": self.consumed,
            "records": len(self.records),
        }
        return state if self._rest is None else {**state, "rest": self._rest, "passed": self._passed}

    def load(
        self, state: dict[str, Any], before: Identity | None, *, accept: bool = False, accept_gone: bool = False
    ) -> Change | None:
        """Go to a saved position.

        Args:
            state: what :meth:`state` gave.
            before: the data's identity then; None: it was not kept (a checkpoint of an older fastrl), and the number of
                records and some ids are compared.
            accept: go on with other data. What is left of the epoch is what was left of it, in its order, without
                records that are gone; new ones come with the next epoch. (Where records were drawn on demand, and in a
                mixture, the epoch goes on at the same place.)
            accept_gone: the same where records are gone and nothing else differs.

        Returns:
            What differs, if anything does.

        Raises:
            DataChanged: the data is other than it was, and that is not accepted.
            ValueError: another seed or order, or no saved position.
        """
        _check_state(state)
        for name, now in (("seed", self.seed), ("order", self.order)):
            if state[name] != now:
                raise ValueError(f"cannot resume: data {name} was {state[name]!r} and is now {now!r}")
        if before is not None and before.count != state["records"]:
            raise ValueError(
                f"the data position is of {state['records']} records, its data's identity of {before.count}"
            )
        if before is None:
            change = self._compare_with_older(state)
        else:
            change = compare(before, self.identity())
        if change and not accept and not (accept_gone and change.only_gone):
            raise DataChanged(f"cannot resume: the data is not what the run began with: {change}")
        self.epoch, self.position, self.consumed = state["epoch"], state["position"], state["consumed"]
        self._rest, self._passed, self._ahead = state.get("rest"), state.get("passed", 0), {}
        if change and self._plan is None and before is not None and before.whole and self.identity().whole:
            self._go_on_with_others(before.ids, state["records"])
        self._indices = self._epoch_indices()
        self.position = min(self.position, len(self._indices))
        return change or None

    def _go_on_with_others(self, before: list[str], count: int) -> None:
        """Make the rest of the epoch, whose indices are of ``before``, one of the present records."""
        order = self._epoch_order(count)
        seen = self.position * self.world_size
        place = {name: i for i, name in enumerate(self.identity().ids)}
        left = order[seen : len(order) // self.world_size * self.world_size]
        self._rest = [place[before[index]] for index in left if before[index] in place]
        self._passed += self.position
        self.position = 0

    def _compare_with_older(self, state: dict[str, Any]) -> Change:
        """A state of a fastrl that kept the ids of 32 records alone."""
        n = len(self.records)
        digest = hashlib.sha256()
        for index in sorted({i * (n - 1) // 31 for i in range(32)}):
            record = self.records[index]
            digest.update(f"{record.task}\0{record.id}\0".encode(errors="surrogatepass"))
        same = state.get("fingerprint") in (None, digest.hexdigest()[:16])
        return Change((state["records"], n), [], [], False, {}, note="" if same else "other ids")

    def _epoch_order(self, n: int) -> list[int]:
        """The present epoch's indices of ``n`` records, for all ranks together."""
        if self._rest is not None:
            return self._rest
        if self._plan is not None:
            return self._plan(self.epoch)
        if self.order == "file":
            return list(range(n))
        return shuffled(n, self.seed, self.epoch, buffer=self._buffer)

    def _epoch_indices(self) -> list[int]:
        order = self._epoch_order(len(self.records))
        share = len(order) // self.world_size  # every rank the same number, or they would drift apart
        return order[self.rank :: self.world_size][:share]


def _check_state(state: Any) -> None:
    """Raise ``ValueError`` where a saved position has a part missing or of the wrong type."""
    counts = ("epoch", "position", "consumed", "records", "seed")
    optional = ("passed",)
    if not isinstance(state, dict):
        raise ValueError("the data position is no JSON object")
    for name in (*counts, *(name for name in optional if name in state)):
        if not isinstance(state.get(name), int) or isinstance(state[name], bool) or state[name] < 0:
            raise ValueError(f"the data position has {name} {state.get(name)!r}, which is no count")
    rest = state.get("rest", [])
    if not isinstance(state.get("order"), str) or not isinstance(rest, list):
        raise ValueError("the data position has an order of the wrong type")
    if not all(isinstance(i, int) and 0 <= i < state["records"] for i in rest):
        raise ValueError("the data position has indices of no record")
