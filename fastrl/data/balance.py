"""The records of a step, dealt to ranks by their work instead of their number.

An epoch's order is cut into the blocks that all ranks together take in one step. Within a block every rank gets equally
many records, because ranks make their steps together, and of about the same work: the largest records go one to each
rank, the next ones to the ranks with the least so far, and so on. The result depends on the order, the number of ranks
and the works alone, so every rank computes it by itself, without asking the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastrl.data.records import Record

KEPT = 4  # dealt blocks that are remembered: those of this step and of the ones that are prepared


def deal(works: Sequence[float], ranks: int) -> list[list[int]]:
    """The places of ``works`` for each rank, equally many. Equal works are dealt in turn.

    Args:
        works: a multiple of ``ranks``.
        ranks: their number.
    """
    places = sorted(range(len(works)), key=lambda place: (-works[place], place))
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for start in range(0, len(places), ranks):
        least_first = sorted(range(ranks), key=lambda rank: (loads[rank], rank))
        for rank, place in zip(least_first, places[start : start + ranks], strict=True):
            shares[rank].append(place)
            loads[rank] += works[place]
    return shares


class Balance:
    """What dealing by work needs to know.

    Args:
        count: records that a rank takes in a step.
        weigh: the work of a record, in any unit. If it raises ``OSError`` or ``ValueError`` the record counts as none:
            whoever gets it raises the error again.
    """

    def __init__(self, count: int, weigh: Callable[[Record], float]) -> None:
        self.count, self._weigh = count, weigh
        self._works: dict[int, float] = {}

    def work(self, records: Sequence[Record], index: int) -> float:
        """The work of one of ``records``, computed once."""
        if index not in self._works:
            try:
                self._works[index] = self._weigh(records[index])
            except (OSError, ValueError, IndexError):
                self._works[index] = 0.0
        return self._works[index]


class Shares:
    """Who takes which of an epoch's records.

    Args:
        order: of all ranks together; a remainder that does not reach all of them is left out.
        ranks: their number.
        block: places of a rank that are dealt together; 0: records are dealt in turn.
        phase: places before the first whole block, which began in the last epoch.
        work: of a record by its index.
    """

    def __init__(
        self,
        order: Sequence[int],
        ranks: int,
        *,
        block: int = 0,
        phase: int = 0,
        work: Callable[[int], float] = lambda index: 0.0,
    ) -> None:
        self._order, self._ranks, self._work = order, ranks, work
        self._block, self._phase = block if ranks > 1 else 0, phase
        self._dealt: dict[int, list[list[int]]] = {}

    def __len__(self) -> int:
        """Places of each rank."""
        return len(self._order) // self._ranks

    def at(self, place: int, rank: int) -> int:
        """The index of the record that ``rank`` takes at ``place``."""
        return self._order[self._slot(place, rank)]

    def left(self, first: Sequence[int]) -> list[int]:
        """What is left when each rank has come to its place in ``first``, in the epoch's order."""
        begun = self._start(min(first))
        taken = {
            self._slot(place, rank) for rank, stop in enumerate(first) for place in range(begun, min(stop, len(self)))
        }
        return [self._order[s] for s in range(begun * self._ranks, len(self) * self._ranks) if s not in taken]

    def _start(self, place: int) -> int:
        """The first place of the block that ``place`` is in."""
        if not self._block:
            return place
        if place < self._phase:
            return 0
        return place - (place - self._phase) % self._block

    def _slot(self, place: int, rank: int) -> int:
        """Where in the order a rank's record is."""
        if not self._block:
            return place * self._ranks + rank
        start = self._start(place)
        if start not in self._dealt:
            while len(self._dealt) >= KEPT:
                del self._dealt[next(iter(self._dealt))]
            stop = min(len(self), self._phase if start < self._phase else start + self._block)
            first, last = start * self._ranks, stop * self._ranks
            self._dealt[start] = deal([self._work(index) for index in self._order[first:last]], self._ranks)
        return start * self._ranks + self._dealt[start][rank][place - start]
