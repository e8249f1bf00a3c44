"""Sampled answers → ranked lists: distinct, readable, finished answers with their rewards, best first (PerPO §4.3);
optionally unreadable ones as the worst."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from fastrl.rewards.base import Reward
from fastrl.rewards.checked import checked_scores

if TYPE_CHECKING:
    from fastrl.batch import PromptGroup

    Places = Sequence[tuple[PromptGroup, int]]  # answers, each as (group, index of the completion)


Unreadable = Literal["drop", "worst"]


@dataclass
class Ranking:
    """The usable answers of one prompt, ranked."""

    order: list[int]  # indices of the usable answers, best first (equal rewards: in sampling order)
    rewards: list[float]  # in the same order
    components: list[dict[str, float]]
    dropped: Counter[str] = field(default_factory=Counter)  # truncated, unreadable, duplicate → number of answers

    @property
    def gap(self) -> float:
        """Best minus worst reward; 0 for fewer than two answers."""
        return self.rewards[0] - self.rewards[-1] if self.rewards else 0.0


def rank_answers(groups: Sequence[PromptGroup], reward: Reward, unreadable: Unreadable = "drop") -> list[Ranking]:
    """:func:`rank` by one reward."""

    def readable(group: PromptGroup) -> list[bool]:
        assert group.record is not None
        texts = [c.text for c in group.completions]
        return reward.readable(texts, [group.record] * len(texts))

    def scores(places: Places) -> list[tuple[dict[str, float], float]]:
        texts, truths = [g.completions[i].text for g, i in places], [g.record for g, _ in places if g.record]
        components, totals = checked_scores(reward, texts, truths)
        return [
            ({n: v[row] for n, v in components.items() if v[row] is not None}, value)
            for row, value in enumerate(totals)
        ]

    return rank(groups, readable, scores, unreadable)


def worst_reward(rewards: Sequence[float]) -> float:
    """The reward of an unreadable answer in a list whose readable ones have ``rewards``: 1 below the lowest of them and
    of 0. Of rewards from 0 on that is −1, what the authors' development code gives it."""
    return min([0.0, *rewards]) - 1.0


def rank(
    groups: Sequence[PromptGroup],
    readable: Callable[[PromptGroup], list[bool]],
    scores: Callable[[Places], Sequence[tuple[dict[str, float], float]]],
    unreadable: Unreadable = "drop",
) -> list[Ranking]:
    """Rank the completions of each group; all are scored in one call.

    ``readable`` returns which answers of a group can be parsed, ``scores`` the components and reward of each answer.

    Answers that were truncated, cannot be parsed, or repeat an earlier text are dropped (otherwise a frequent answer of
    the reference would count many times). With ``unreadable="worst"``, those that cannot be parsed but are whole stay:
    they are not scored, but come last with :func:`worst_reward`.
    """
    rankings, places = [], []
    last: list[list[int]] = []  # unreadable answers that stay, by group
    for group in groups:
        ranking = Ranking([], [], [])
        seen: set[str] = set()
        last.append([])
        for i, (completion, parsed) in enumerate(zip(group.completions, readable(group), strict=True)):
            text = completion.text.strip()
            drop = not parsed and unreadable == "drop"
            why = "truncated" if not completion.finished else "unreadable" if drop else "duplicate"
            if completion.finished and (parsed or unreadable == "worst") and text not in seen:
                seen.add(text)
                (ranking.order if parsed else last[-1]).append(i)
            else:
                ranking.dropped[why] += 1
        rankings.append(ranking)
        places += [(group, i) for i in ranking.order]
    found = scores(places)
    at = 0
    for ranking, unread in zip(rankings, last, strict=True):
        rows = sorted(range(at, at + len(ranking.order)), key=lambda row: -found[row][1])
        at += len(rows)
        ranking.order = [places[row][1] for row in rows]
        ranking.components, ranking.rewards = [found[row][0] for row in rows], [found[row][1] for row in rows]
        below = worst_reward(ranking.rewards)
        ranking.order += unread
        ranking.components += [{} for _ in unread]
        ranking.rewards += [below] * len(unread)
    return rankings
