"""``fastrl build perpo``: sample N answers per prompt, score them, keep lists with a large gap between best and worst.

A build processes the data in portions. After each one, whole lines are appended to the list file and the summary next
to it (``NAME.summary.json``) is replaced atomically; it records the length of the file, so an interrupted build
continues after its last complete portion and produces the same bytes. Every portion has its own seed.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from fastrl.batch import PromptGroup
from fastrl.build.portions import resume, unfinished
from fastrl.data import load_data
from fastrl.data.disk import writing
from fastrl.data.files import image_names, write_atomically
from fastrl.data.lists import list_row
from fastrl.methods.ranking import Ranking, Unreadable, rank_answers
from fastrl.models.open import open_policy
from fastrl.rewards import reward_for
from fastrl.rewards.base import Reward, unknown

if TYPE_CHECKING:
    from fastrl.data.records import Record
    from fastrl.models.load import Policy
    from fastrl.rollout import Generator, Sampling

# task → answers per prompt, least best − worst reward, longest answer (PerPO §4.3; the lengths are ours)
DEFAULTS: dict[str, tuple[int, float, int]] = {"grounding": (20, 0.8, 128), "ocr": (5, 0.04, 2048)}
PORTION = 32  # prompts answered together; part of what makes a build reproducible
BINS = 20  # of the histograms, over rewards 0 to 1


@dataclass(frozen=True)
class BuildOptions:
    """Options of a build; it can only be continued with the same options."""

    task: str
    model: str
    data: str
    n: int
    temperature: float
    min_gap: float
    max_new_tokens: int
    seed: int = 0
    limit: int | None = None
    skip_bad: bool = False
    min_pixels: int | None = None  # area of a resized image; training needs the same limits
    max_pixels: int | None = None
    unreadable: Unreadable = "drop"  # answers that cannot be parsed; worst: they stay, with the lowest reward

    def __post_init__(self) -> None:
        if self.n < 2:
            raise ValueError(f"--n: a list needs at least 2 answers, got {self.n}")
        if not self.temperature > 0:
            raise ValueError(f"--temperature: greedy answers are all equal; expected > 0, got {self.temperature}")
        if not self.min_gap >= 0:
            raise ValueError(f"--min-gap: expected 0 or more, got {self.min_gap}")
        if self.unreadable not in get_args(Unreadable):
            raise ValueError(unknown("value of --unreadable", self.unreadable, get_args(Unreadable)))


@dataclass
class Tally:
    """Counts of prompts and answers so far."""

    prompts: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # prompts by reason
    answers: Counter[str] = field(default_factory=Counter)  # sampled, kept, truncated, unreadable, duplicate
    best: float = 0.0  # sums over kept lists
    worst: float = 0.0
    histogram: dict[str, list[int]] = field(default_factory=lambda: {k: [0] * BINS for k in ("all", "best", "worst")})
    seconds: float = 0.0

    def add(self, ranking: Ranking, sampled: int, min_gap: float) -> bool:
        """Count one prompt's answers; returns whether its list is kept."""
        self.prompts += 1
        self.answers.update(ranking.dropped)
        self.answers["sampled"] += sampled
        for reward in ranking.rewards:
            self.histogram["all"][_bin(reward)] += 1
        if len(ranking.order) < 2:
            self.dropped["fewer than two answers"] += 1
            return False
        if ranking.gap < min_gap or ranking.gap <= 0:
            self.dropped[f"gap below {min_gap:g}" if ranking.gap > 0 else "equal rewards"] += 1
            return False
        self.kept += 1
        self.answers["kept"] += len(ranking.order)
        self.best += ranking.rewards[0]
        self.worst += ranking.rewards[-1]
        self.histogram["best"][_bin(ranking.rewards[0])] += 1
        self.histogram["worst"][_bin(ranking.rewards[-1])] += 1
        return True

    @classmethod
    def of(cls, saved: dict[str, Any], out: Path) -> Tally:
        """The tally in the summary of ``out``. Raises ``ValueError`` if it is invalid."""
        try:
            return cls(**{**saved, "dropped": Counter(saved["dropped"]), "answers": Counter(saved["answers"])})
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{out}: its summary has no tally of lists ({error}); remove both to start again"
            ) from None


def make_options(task: str, model: str, data: str, **given: Any) -> BuildOptions:
    """Options with the paper's values as defaults (also for None). Raises ``ValueError`` for an unknown task."""
    if task not in DEFAULTS:
        raise ValueError(unknown("task to build lists for", task, DEFAULTS))
    n, gap, length = DEFAULTS[task]
    values = {"n": n, "temperature": 1.0, "min_gap": gap, "max_new_tokens": length}
    return BuildOptions(task, model, data, **values | {k: v for k, v in given.items() if v is not None})


def build_lists(
    options: BuildOptions,
    out: Path,
    *,
    policy: Policy | None = None,
    records: Sequence[Record] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Build a list file, or continue an interrupted one.

    Args:
        options: see :class:`BuildOptions`.
        out: the JSONL file (``fastrl.data.lists`` describes its format). Next to it: ``NAME.summary.json``,
            ``NAME.rewards.png`` and, if the data's pictures are not files, ``NAME.images/``.
        policy, records: used instead of ``options.model`` and ``options.data``.
        say: called with progress messages.

    Returns:
        The summary: prompts seen, lists kept, prompts dropped and answers dropped by reason, mean best and worst reward
        of the kept lists, seconds.

    Raises:
        ValueError: ``out`` exists and was not written by a build with the same options; or records have another task.
        DataError: the data is bad.
    """
    chunk, size, found = resume(out, asdict(options))
    tally = Tally() if found is None else Tally.of(found, out)
    if records is None:
        records = load_data(options.data, skip_bad=options.skip_bad, deep=options.skip_bad)
    records = records[: options.limit] if options.limit is not None else records
    for record in records:
        if record.task != options.task:
            raise ValueError(
                f"{record.source or record.id}: is a {record.task} record, but lists are built for {options.task}"
            )
    chunks = -(-len(records) // PORTION)
    if chunk:
        say(f"continuing after {min(chunk * PORTION, len(records))} of {len(records)} prompts")
    if chunk < chunks:
        policy = (
            policy
            if policy is not None
            else open_policy(options.model, min_pixels=options.min_pixels, max_pixels=options.max_pixels)
        )
        worker = _Worker(policy, options, out)
        with unfinished(out), out.open("r+b" if out.exists() else "w+b") as file:
            file.truncate(size)
            file.seek(size)
            while chunk < chunks:
                started = time.perf_counter()
                lines = worker.portion(records, chunk, tally)
                data = "".join(lines).encode()
                with writing(out, len(data)):
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                chunk, size = chunk + 1, file.tell()
                tally.seconds += time.perf_counter() - started
                _write_summary(out, options, chunk, size, tally, done=chunk == chunks)
                left = tally.seconds / chunk * (chunks - chunk)
                say(f"{tally.prompts}/{len(records)} prompts, {tally.kept} lists kept, {left:.0f} s left")
    _draw_rewards(tally, options, out.with_suffix(".rewards.png"))
    return _summary(options, tally)


class _Worker:
    """Samples and ranks one portion after another."""

    def __init__(self, policy: Policy, options: BuildOptions, out: Path) -> None:
        from fastrl.rollout import Generator, Sampling

        self.policy, self.options, self.out = policy, options, out
        self.generator: Generator = Generator(policy)
        self.sampling: Sampling = Sampling(options.n, options.max_new_tokens, options.temperature)
        self.reward: Reward = list_reward(options.task)

    def portion(self, records: Sequence[Record], chunk: int, tally: Tally) -> list[str]:
        """Lines of the kept lists among the records of one portion."""
        numbers = range(chunk * PORTION, min((chunk + 1) * PORTION, len(records)))
        given = [records[i] for i in numbers]
        encoded = [self.policy.encode(record) for record in given]
        rng = torch.Generator().manual_seed((self.options.seed * 1_000_003 + chunk) % 2**63)
        answers = self.generator.generate([prompt for prompt, _ in encoded], self.sampling, rng)
        groups = [PromptGroup(p, a, r) for (p, r), a in zip(encoded, answers, strict=True)]
        lines = []
        rankings = rank_answers(groups, self.reward, self.options.unreadable)
        for number, (_, record), group, ranking in zip(numbers, encoded, groups, rankings, strict=True):
            if tally.add(ranking, len(group.completions), self.options.min_gap):
                texts = [group.completions[i].text for i in ranking.order]
                row = list_row(record, image_names(record.images, number, self.out), texts, ranking.rewards)
                lines.append(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        return lines


def list_reward(task: str) -> Reward:
    """The discriminative reward of a task: overlap for grounding, text similarity for OCR; no format reward."""
    return reward_for(task, **({"format": "none"} if task == "grounding" else {}))


def _write_summary(out: Path, options: BuildOptions, chunk: int, size: int, tally: Tally, *, done: bool) -> None:
    state = {
        "done": done,
        "summary": _summary(options, tally),
        "options": asdict(options),
        "portions": chunk,
        "bytes": size,
        "tally": asdict(replace(tally, dropped=dict(tally.dropped), answers=dict(tally.answers))),  # type: ignore[arg-type]
    }
    write_atomically(out.with_suffix(".summary.json"), json.dumps(state, indent=1) + "\n")


def _summary(options: BuildOptions, tally: Tally) -> dict[str, Any]:
    kept = max(1, tally.kept)
    return {
        "task": options.task,
        "prompts": tally.prompts,
        "kept": tally.kept,
        "dropped": dict(tally.dropped),
        "answers": dict(tally.answers),
        "mean_best": tally.best / kept,
        "mean_worst": tally.worst / kept,
        "seconds": tally.seconds,
    }


def _bin(reward: float) -> int:
    return min(BINS - 1, max(0, int(reward * BINS)))


def _draw_rewards(tally: Tally, options: BuildOptions, path: Path) -> None:
    """Histogram of all rewards, and of the best and the worst of the kept lists."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    centres = [(i + 0.5) / BINS for i in range(BINS)]
    left.bar(centres, tally.histogram["all"], width=1 / BINS, color="#4575b4")
    left.set(title=f"answers to {tally.prompts} prompts", xlabel="reward", ylabel="answers")
    for name, color in (("worst", "#d73027"), ("best", "#1a9850")):
        right.bar(centres, tally.histogram[name], width=1 / BINS, color=color, alpha=0.6, label=name)
    right.set(title=f"{tally.kept} lists kept (gap of at least {options.min_gap:g})", xlabel="reward", ylabel="lists")
    right.legend()
    figure.savefig(path, dpi=120)
