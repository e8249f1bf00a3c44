"""The data position of a run: records in a seeded order, epoch after epoch, resumable."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import torch

from fastrl.data.records import Record


class RecordStream:
    """Records without end. The order of an epoch depends on the seed and the epoch's number alone.

    Args:
        records: the data; every rank gets the same.
        seed: of the shuffle.
        order: ``shuffle``, or ``file`` for the order of ``records``.
        rank, world_size: this rank sees every ``world_size``-th record, beginning at ``rank``.

    Raises:
        ValueError: fewer records than ranks.
    """

    def __init__(
        self,
        records: Sequence[Record],
        *,
        seed: int = 0,
        order: Literal["shuffle", "file"] = "shuffle",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if len(records) < max(1, world_size):
            raise ValueError(f"data has {len(records)} records, training needs at least {max(1, world_size)}")
        self.records = records
        self.seed = seed
        self.order = order
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self.position = 0  # within the epoch
        self.consumed = 0
        self._fingerprint: str | None = None
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
                self.position = 0
                self._indices = self._epoch_indices()
            indices.append(self._indices[self.position])
            self.position += 1
        return indices

    @property
    def epochs(self) -> float:
        """Passes over the data so far."""
        return self.epoch + self.position / len(self._indices)

    def state(self) -> dict[str, Any]:
        """What :meth:`load` needs to go on from here."""
        return {
            "seed": self.seed,
            "order": self.order,
            "epoch": self.epoch,
            "position": self.position,
            "consumed": self.consumed,
            "records": len(self.records),
            "fingerprint": self.fingerprint(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go to a saved position. Raises ``ValueError`` where data, order or seed are not those of the state."""
        for name, now in (("records", len(self.records)), ("seed", self.seed), ("order", self.order)):
            if state[name] != now:
                raise ValueError(f"cannot resume: data {name} was {state[name]!r} and is now {now!r}")
        if state["fingerprint"] != self.fingerprint():
            raise ValueError("cannot resume: the data has as many records as before, but other ids")
        self.epoch, self.position, self.consumed = state["epoch"], state["position"], state["consumed"]
        self._indices = self._epoch_indices()
        self._ahead = {}

    def fingerprint(self) -> str:
        """Hash of the tasks and ids of up to 32 records spread over the data (making one on demand may cost)."""
        if self._fingerprint is None:
            n = len(self.records)
            digest = hashlib.sha256()
            for index in sorted({i * (n - 1) // 31 for i in range(32)}):
                record = self.records[index]
                digest.update(f"{record.task}\0{record.id}\0".encode(errors="surrogatepass"))
            self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint

    def _epoch_indices(self) -> list[int]:
        n = len(self.records)
        if self.order == "file":
            order = list(range(n))
        else:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
            order = torch.randperm(n, generator=generator).tolist()
        share = n // self.world_size  # every rank the same number, or they would drift apart
        return order[self.rank :: self.world_size][:share]
