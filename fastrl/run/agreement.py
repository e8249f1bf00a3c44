"""Compares the log-probs of servers that sample with the trainer's, on the same tokens, before they are learned from.

A server that kept old weights, all or some of them, answers like any other: only its log-probs differ. The trainer
computes its own for the update anyway, so every answer is compared, at the price of a few sums.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastrl.batch import PackedBatch

if TYPE_CHECKING:
    from fastrl.config.sections import RolloutRecipe


class Gap(NamedTuple):
    """How far a server's log-probs were from the trainer's."""

    total: float  # sum of |difference| over tokens
    tokens: float

    @property
    def mean(self) -> float:
        return self.total / max(self.tokens, 1.0)


def excess(sampler: Tensor, trainer: Tensor, rollout: RolloutRecipe) -> Tensor:
    """How far log-probs of a server are from what they must be with the trainer's weights.

    At temperature 1 both are over the full vocabulary. At others a server leaves out what ``top_p`` and ``top_k`` cut
    off and divides by the rest, so that its log-probs are larger: by at most −log ``top_p``, with ``top_k`` by any
    amount. Within these bounds nothing is known to be wrong, and the excess is 0.

    Args:
        sampler, trainer: [N] float, of the same tokens.
        rollout: how was sampled.

    Returns:
        [N], at least 0.
    """
    most = 0.0
    if rollout.temperature != 1:
        most = math.inf if rollout.top_k else -math.log(rollout.top_p)
    delta = sampler - trainer
    return (delta - delta.clamp(0.0, most)).abs()


class Agreement:
    """The gaps of a step's servers, and those of the steps before.

    Args:
        rollout: the recipe's section, with the largest gap that is accepted.
        tied: whether the model's head is its embedding.
        adapter: whether only adapters are pushed.
    """

    def __init__(self, rollout: RolloutRecipe, *, tied: bool, adapter: bool) -> None:
        self._rollout, self._tied, self._adapter = rollout, tied, adapter
        self._before: dict[str, float] = {}  # the last accepted mean gap of each server
        self._parts: list[tuple[list[str], Tensor]] = []

    def add(self, logp: Tensor, batch: PackedBatch) -> None:
        """Take a micro-batch's tokens: its log-probs [N] under the trainer, +inf where not evaluated."""
        sampler = batch.per_token.get("sampler_logp")
        servers = sorted({c.sampler for c in batch.completions} - {""})
        if sampler is None or not servers:
            return
        place = torch.tensor([servers.index(c.sampler) if c.sampler else -1 for c in batch.completions])
        owner = place.to(logp.device)[batch.completion_of_token]
        known = ~logp.isposinf() & (owner >= 0)
        off = torch.where(known, excess(sampler, logp.detach().float(), self._rollout), 0.0)
        sums = torch.zeros(2, len(servers), device=logp.device)
        sums[0].index_add_(0, owner.clamp(min=0), off)
        sums[1].index_add_(0, owner.clamp(min=0), known.float())
        self._parts.append((servers, sums))

    def take(self) -> dict[str, Gap]:
        """This rank's gaps since the last call, by the server's address."""
        found: dict[str, Gap] = defaultdict(lambda: Gap(0.0, 0.0))
        for servers, sums in self._parts:
            for server, total, tokens in zip(servers, *sums.tolist(), strict=True):
                found[server] = Gap(found[server].total + total, found[server].tokens + tokens)
        self._parts = []
        return dict(found)

    def fault(self, ranks: Sequence[Mapping[str, Gap]]) -> str:
        """Why the answers cannot be learned from, given the gaps of all ranks; empty: they can."""
        sums: dict[str, Gap] = defaultdict(lambda: Gap(0.0, 0.0))
        for found in ranks:
            for server, gap in found.items():
                sums[server] = Gap(sums[server].total + gap.total, sums[server].tokens + gap.tokens)
        for server, gap in sorted(sums.items()):
            if not gap.mean <= self._rollout.server_gap:  # NaN too
                return self._reason(server, gap)
        self._before |= {server: gap.mean for server, gap in sums.items() if gap.tokens}
        return ""

    def _reason(self, server: str, gap: Gap) -> str:
        said = (
            f"the vLLM server at {server} does not sample with the trainer's weights: over {gap.tokens:,.0f} tokens "
            f"its log-probs differ from the trainer's by {gap.mean:.3g} on average, and rollout.server_gap is "
            f"{self._rollout.server_gap:g}. No update was made with its answers. "
        )
        if server not in self._before:
            return said + (
                "These are its first answers in this run: does it serve the folder model.path, in the trainer's type "
                "(--dtype)? A server that another run has used may hold that run's weights: start it again"
            )
        stale = "the adapter" if self._adapter else "all or some of the pushed weights"
        head = ", such as the head, which this model ties to its embedding and a server may hold twice"
        return said + (
            f"After an earlier push it was {self._before[server]:.3g}, so it has probably not taken {stale}"
            f"{head if self._tied and not self._adapter else ''}. Start the server again and continue with --resume "
            "(docs/vllm.md)"
        )
