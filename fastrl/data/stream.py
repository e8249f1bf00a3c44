"""The data position of a run: records in a seeded order, epoch after epoch, resumable."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

from fastrl.data.balance import Balance, Shares
from fastrl.data.identity import Change, Identity, Pictures, compare, identify
from fastrl.data.orders import shuffled
from fastrl.data.records import Record
from fastrl.data.truth import short


class DataChanged(ValueError):
    """A run would continue with different data than it started with."""


class RecordStream:
    """An endless stream of records. The order of an epoch depends only on the seed and the epoch's number.

    Args:
        records: the data, the same on every rank.
        seed: of the shuffle.
        order: ``shuffle``, or ``file`` for the order of ``records``.
        buffer: number of rows that are shuffled together (``orders.shuffled``); None: all.
        plan: epoch number → indices, instead of ``order``: a mixture's draws.
        rank, world_size: this rank gets every ``world_size``-th record, starting at ``rank``.
        pictures: how picture files are compared on a resume (see ``fastrl.data.identity``).
        balance: deal the records of a step to ranks by their work instead (see ``fastrl.data.balance``).

    Raises:
        ValueError: there are fewer records than ranks.
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
        balance: Balance | None = None,
    ) -> None:
        if len(records) < max(1, world_size):
            raise ValueError(f"data has {len(records)} records; training needs at least {max(1, world_size)}")
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
        # remaining indices, for all ranks, of an epoch that started with other data
        self._rest: list[int] | None = None
        self._passed = 0  # records of such an epoch that this rank had already taken
        self._balance = balance
        self._block = self._count  # places that are dealt together in this epoch
        self._shares = self._epoch_shares()
        self._ahead: dict[int, Record] = {}  # records peeked at but not taken yet, by index, so that each is made once

    def take(self, n: int) -> list[Record]:
        """The next ``n`` records, continuing into the next epoch if necessary."""
        records = [self._ahead.pop(index, None) or self.records[index] for index in self._advance(n)]
        self.consumed += n
        return records

    def peek(self, n: int) -> list[Record]:
        """The next ``n`` records without advancing; :meth:`take` returns the same ones."""
        indices = copy.copy(self)._advance(n)
        for index in indices:
            if index not in self._ahead:
                self._ahead[index] = self.records[index]
        return [self._ahead[index] for index in indices]

    def _advance(self, n: int) -> list[int]:
        """Advance by ``n`` records and return their indices."""
        indices = []
        for _ in range(n):
            if self.position == len(self._shares):
                self.epoch += 1
                self.position = self._passed = 0
                self._rest, self._block = None, self._count
                self._shares = self._epoch_shares()
            indices.append(self._shares.at(self.position, self.rank))
            self.position += 1
        return indices

    @property
    def epochs(self) -> float:
        """Passes over the data so far."""
        return self.epoch + (self._passed + self.position) / max(1, self._passed + len(self._shares))

    def identity(self) -> Identity:
        """The identity of the data, computed once."""
        if self._identity is None:
            self._identity = identify(self.records, self._pictures)
        return self._identity

    def state(self) -> dict[str, Any]:
        """The state that :meth:`load` needs, besides :meth:`identity`, to continue from here."""
        state = {
            "seed": self.seed,
            "order": self.order,
            "epoch": self.epoch,
            "position": self.position,
            "consumed": self.consumed,
            "records": len(self.records),
        }
        if self._block:
            state["block"] = self._block
        return state if self._rest is None else {**state, "rest": self._rest, "passed": self._passed}

    def merged(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The :meth:`state` with which a rank of this stream goes on where another number of ranks stopped.

        The rest of the epoch is what none of those ranks has taken, in the order in which they would have. (Of ranks
        in different epochs, only those in the earliest count: the others' few records of the next one are repeated.)

        Args:
            states: of all those ranks, in their order.

        Raises:
            ValueError: one is not a saved position.
        """
        for state in states:
            _check_state(state)
        epoch = min(state["epoch"] for state in states)
        before = copy.copy(self)
        before.epoch, before._rest = epoch, states[0].get("rest")
        before._block, before.world_size = states[0].get("block", 0), len(states)
        shares = before._epoch_shares(states[0]["records"])
        first = [state["position"] if state["epoch"] == epoch else len(shares) for state in states]
        rest = shares.left(first)
        taken = sum(state["consumed"] for state in states)
        passed = sum(state.get("passed", 0) for state in states) + sum(first)
        same = {name: states[0][name] for name in ("seed", "order", "records")}
        return {
            **same, "epoch": epoch, "position": 0, "consumed": taken // self.world_size,
            "rest": rest, "passed": passed // self.world_size, "block": self._count,
        }  # fmt: skip

    def load(
        self, state: dict[str, Any], before: Identity | None, *, accept: bool = False, accept_gone: bool = False
    ) -> Change | None:
        """Restore a saved position.

        Args:
            state: a value of :meth:`state`. before: the data's identity at that time; None: not saved (a checkpoint of
            an older fastrl), so that only the
                number of records and some ids are compared.
            accept: continue with changed data. The rest of the epoch keeps its order, without records that are gone;
                new records follow in the next epoch. (With records made on demand, and in a mixture, the epoch
                continues at the same position.)
            accept_gone: continue if records are gone and nothing else differs.

        Returns:
            The differences, if any.

        Raises:
            DataChanged: the data has changed, which is not accepted.
            ValueError: the seed or order differs, or ``state`` is not a saved position.
        """
        _check_state(state)
        for name, now in (("seed", self.seed), ("order", self.order)):
            if state[name] != now:
                raise ValueError(f"cannot resume: data {name} was {short(state[name])} and is now {short(now)}")
        if before is not None and before.count != state["records"]:
            raise ValueError(
                f"the data position is for {state['records']} records, but its data's identity for {before.count}"
            )
        if before is None:
            change = self._compare_with_older(state)
        else:
            change = compare(before, self.identity())
        if change and not accept and not (accept_gone and change.only_gone):
            raise DataChanged(f"cannot resume: the data has changed since the run started: {change}")
        self.epoch, self.position, self.consumed = state["epoch"], state["position"], state["consumed"]
        self._rest, self._passed, self._ahead = state.get("rest"), state.get("passed", 0), {}
        self._block = state.get("block", 0)
        if change and self._plan is None and before is not None and before.whole and self.identity().whole:
            self._go_on_with_others(before.ids, state["records"])
        self._shares = self._epoch_shares()
        self.position = min(self.position, len(self._shares))
        return change or None

    def _go_on_with_others(self, before: list[str], count: int) -> None:
        """Convert the rest of the epoch from indices into ``before`` to indices into the current records."""
        order = self._epoch_order(count)
        seen = self.position * self.world_size
        place = {name: i for i, name in enumerate(self.identity().ids)}
        left = order[seen : len(order) // self.world_size * self.world_size]
        self._rest = [place[before[index]] for index in left if before[index] in place]
        self._passed += self.position
        self.position = 0

    def _compare_with_older(self, state: dict[str, Any]) -> Change:
        """Compare with a state of an older fastrl, which saved only the ids of 32 records."""
        n = len(self.records)
        digest = hashlib.sha256()
        for index in sorted({i * (n - 1) // 31 for i in range(32)}):
            record = self.records[index]
            digest.update(f"{record.task}\0{record.id}\0".encode(errors="surrogatepass"))
        same = state.get("fingerprint") in (None, digest.hexdigest()[:16])
        return Change((state["records"], n), [], [], False, {}, note="" if same else "other ids")

    def _epoch_order(self, n: int) -> list[int]:
        """The current epoch's indices of ``n`` records, for all ranks."""
        if self._rest is not None:
            return self._rest
        if self._plan is not None:
            return self._plan(self.epoch)
        if self.order == "file":
            return list(range(n))
        return shuffled(n, self.seed, self.epoch, buffer=self._buffer)

    @property
    def _count(self) -> int:
        """Places that are dealt together in an epoch that begins here; 0: records are dealt in turn."""
        return self._balance.count if self._balance is not None and self.world_size > 1 else 0

    def _epoch_shares(self, n: int | None = None) -> Shares:
        """Of the current epoch, which has equally many places on every rank, so that ranks stay in step."""
        order = self._epoch_order(len(self.records) if n is None else n)
        balance = self._balance
        if balance is None or not self._block:
            return Shares(order, self.world_size)
        # A step in which an epoch ends takes the rest of its records from the next one.
        phase = -self.epoch * (len(order) // self.world_size) % self._block if self._rest is None else 0
        work = partial(balance.work, self.records)
        return Shares(order, self.world_size, block=self._block, phase=phase, work=work)


def _check_state(state: Any) -> None:
    """Raise ``ValueError`` if a part of a saved position is missing or has the wrong type."""
    counts = ("epoch", "position", "consumed", "records", "seed")
    optional = ("passed", "block")
    if not isinstance(state, dict):
        raise ValueError("the data position is not a JSON object")
    for name in (*counts, *(name for name in optional if name in state)):
        if not isinstance(state.get(name), int) or isinstance(state[name], bool) or state[name] < 0:
            raise ValueError(f"the data position has {name} {short(state.get(name))}, which is not a count")
    rest = state.get("rest", [])
    if not isinstance(state.get("order"), str) or not isinstance(rest, list):
        raise ValueError("the data position has an order of the wrong type")
    if not all(isinstance(i, int) and 0 <= i < state["records"] for i in rest):
        raise ValueError("the data position has indices of no record")
