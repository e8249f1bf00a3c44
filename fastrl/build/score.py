"""``fastrl score``: how difficult each record is for a model, by the rewards of its answers before any training.

Perception-R1 orders its data from easy to hard by the rewards that the initial model earns (§3.4). Difficulty here is 1
less the mean reward of N sampled answers. A line of the file is

    {"id": "17", "reward": 0.625, "difficulty": 0.375, "best": 1.0, "worst": 0.0}

and ``data.curriculum: {scores: FILE, by: difficulty, …}`` draws records in that order.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from fastrl.build.portions import Tally, build_portions
from fastrl.data import load_data
from fastrl.evaluate.run import MAX_NEW_TOKENS
from fastrl.models.open import open_policy
from fastrl.rewards import reward_for
from fastrl.rewards.base import Reward, unknown

if TYPE_CHECKING:
    from fastrl.data.records import Record
    from fastrl.models.load import Policy

PORTION = 32  # prompts answered together; part of what makes a file reproducible


@dataclass(frozen=True)
class ScoreOptions:
    """Options of a file of scores; it can only be continued with the same options."""

    model: str
    data: str
    n: int = 8
    temperature: float = 1.0
    max_new_tokens: int | None = None  # None: the protocol's
    component: str | None = None  # of the task's reward; None: their weighted sum
    seed: int = 0
    limit: int | None = None
    skip_bad: bool = False
    min_pixels: int | None = None
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"--n: expected 1 or more answers, got {self.n}")
        if not self.temperature >= 0:
            raise ValueError(f"--temperature: expected 0 (greedy) or more, got {self.temperature}")


def score_data(
    options: ScoreOptions,
    out: Path,
    *,
    policy: Policy | None = None,
    records: Sequence[Record] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Score every record, or continue an interrupted file.

    Args:
        options: see :class:`ScoreOptions`.
        out: the JSONL file; its summary is written next to it.
        policy, records: used instead of ``options.model`` and ``options.data``.
        say: called with progress messages.

    Returns:
        ``kept`` (records scored), ``mean_reward``, ``seconds``.

    Raises:
        ValueError: ``out`` belongs to other options, the data has several tasks or one without a reward, or the reward
            has no such component.
        DataError: the data is bad.
    """
    if records is None:
        records = load_data(options.data, skip_bad=options.skip_bad, deep=options.skip_bad)
    records = records[: options.limit] if options.limit is not None else records
    reward, length = _reward_of(records, options), options.max_new_tokens or MAX_NEW_TOKENS.get(records[0].task, 256)
    scorer: list[Policy] = []

    def work(portion: int, tally: Tally) -> list[str]:
        if not scorer:  # a finished file loads no model
            pixels = {"min_pixels": options.min_pixels, "max_pixels": options.max_pixels}
            scorer.append(policy if policy is not None else open_policy(options.model, **pixels))
        started = time.perf_counter()
        given = [records[i] for i in range(portion * PORTION, min((portion + 1) * PORTION, len(records)))]
        lines = []
        for record, values in zip(given, _rewards(scorer[0], given, reward, options, length, portion), strict=True):
            row = {"id": record.id, "reward": fmean(values), "difficulty": 1 - fmean(values)}
            lines.append(json.dumps({**row, "best": max(values), "worst": min(values)}) + "\n")
            tally["kept"] += 1
            tally["reward"] += fmean(values)
        tally["seconds"] += time.perf_counter() - started
        return lines

    def after(portion: int, tally: Tally) -> None:
        left = tally["seconds"] / (portion + 1) * (portions - portion - 1)
        say(f"{tally['kept']}/{len(records)} records, {left:.0f} s left")

    portions = -(-len(records) // PORTION)
    start: Tally = {"kept": 0, "reward": 0.0, "seconds": 0.0}
    tally = build_portions(out, asdict(options), portions, work, start, after=after)
    return {"kept": tally["kept"], "mean_reward": tally["reward"] / max(1, tally["kept"]), "seconds": tally["seconds"]}


def _reward_of(records: Sequence[Record], options: ScoreOptions) -> Reward:
    tasks = sorted({record.task for record in records})
    if len(tasks) > 1:
        raise ValueError(f"{options.data}: has records of several tasks ({', '.join(tasks)}); score each by itself")
    reward = reward_for(tasks[0])
    if options.component is not None and options.component not in reward.parts:
        raise ValueError(
            "--component: " + unknown(f"part of the reward for {tasks[0]}", options.component, reward.parts)
        )
    return reward


def _rewards(
    policy: Policy, records: Sequence[Record], reward: Reward, options: ScoreOptions, length: int, portion: int
) -> list[list[float]]:
    """The rewards of each record's answers."""
    from fastrl.rollout import Generator, Sampling

    rng = torch.Generator().manual_seed((options.seed * 1_000_003 + portion) % 2**63)
    encoded = [policy.encode(record) for record in records]
    sampling = Sampling(options.n, length, options.temperature)
    answers = Generator(policy).generate([prompt for prompt, _ in encoded], sampling, rng)
    texts = [completion.text for completions in answers for completion in completions]
    asked = [record for _, record in encoded for _ in range(options.n)]
    parts = reward.score(texts, asked)
    values = reward.total(parts) if options.component is None else parts[options.component]
    return [list(values[at : at + options.n]) for at in range(0, len(values), options.n)]
