"""``fastrl build reper``: captions at several temperatures, scored by a critic, turned into dialogues from bad to good.

For each picture (RePer §3.2), one caption is sampled at each of eight temperatures, from one prefill. Pictures are kept
if their best caption is good and their captions differ. A dialogue of one to three turns starts with the worst caption
(if it has more than one turn), ends with the best, and has the critic's feedback in between.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastrl.build.portions import Tally, build_portions
from fastrl.critics import Case, Critic, Critique, open_critic
from fastrl.critics.feedback import request, rng_for
from fastrl.data import load_data
from fastrl.data.files import image_names
from fastrl.data.records import question_of
from fastrl.data.reflection import SpokenTurn, dialogue_row
from fastrl.models.open import open_policy

if TYPE_CHECKING:
    from fastrl.data.records import Record
    from fastrl.models.load import Policy

TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4)
# For scores from rules and others: smallest best score and smallest gap between best and worst, both exclusive
FILTERS = {False: (0.9, 0.4), True: (0.55, 0.2)}
TURN_WEIGHTS = (3649, 2621, 3795)  # the paper's dialogues of one, two and three turns
PORTION = 32  # pictures captioned together; part of what makes a build reproducible


@dataclass(frozen=True)
class BuildOptions:
    """Options of a build; it can only be continued with the same options."""

    model: str
    data: str
    critic: str
    temperatures: tuple[float, ...] = TEMPERATURES
    min_best: float | None = None  # None: the paper's, by the kind of critic
    min_gap: float | None = None
    max_new_tokens: int = 512
    seed: int = 0
    limit: int | None = None
    skip_bad: bool = False

    def __post_init__(self) -> None:
        if len(self.temperatures) < 2 or not all(0 <= t < 10 for t in self.temperatures):
            raise ValueError(f"--temperatures: expected two or more from 0 to 10, got {list(self.temperatures)}")
        for name, value in (("--min-best", self.min_best), ("--min-gap", self.min_gap)):
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name}: expected a number, got {value}")


def parse_temperatures(text: str) -> tuple[float, ...]:
    """``"0,0.2,1.4"`` as numbers. Raises ``ValueError``."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--temperatures: expected numbers such as 0,0.5,1; got {text!r}") from None


def build_dialogues(
    options: BuildOptions,
    out: Path,
    *,
    policy: Policy | None = None,
    critic: Critic | None = None,
    records: Sequence[Record] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Build a dialogue file, or continue an interrupted one.

    Args:
        options: see :class:`BuildOptions`.
        out: the JSONL file (``fastrl.data.reflection`` describes its format); the summary is written next to it.
        policy, critic, records: used instead of those that ``options`` names.
        say: called with progress messages.

    Returns:
        The summary: pictures seen, dialogues kept by number of turns, pictures dropped by reason, captions by outcome,
        mean best and worst score of the kept pictures, seconds.

    Raises:
        ValueError: ``out`` belongs to another build, or records have another task.
        DataError: the data is bad.
        CriticError: the critic failed; completed portions are kept, and the build continues when called again.
    """
    records = load_data(options.data, skip_bad=options.skip_bad, deep=options.skip_bad) if records is None else records
    records = records[: options.limit] if options.limit is not None else records
    for record in records:
        if record.task != "caption":
            raise ValueError(
                f"{record.source or record.id}: is a {record.task} record, but dialogues need caption records"
            )
    maker: list[_Maker] = []

    def work(portion: int, tally: Tally) -> list[str]:
        if not maker:  # a completed build loads no model
            cache = out.with_suffix(".critic")
            judge = critic if critic is not None else open_critic(options.critic, cache=cache, say=say)
            maker.append(_Maker(policy if policy is not None else open_policy(options.model), judge, options, out))
        started = time.perf_counter()
        lines = maker[0].portion(records, portion, tally)
        tally["seconds"] += time.perf_counter() - started
        return lines

    def after(portion: int, tally: Tally) -> None:
        left = tally["seconds"] / (portion + 1) * (portions - portion - 1)
        say(f"{tally['pictures']}/{len(records)} pictures, {tally['kept']} dialogues, {left:.0f} s left")

    portions = -(-len(records) // PORTION)
    start: Tally = {"pictures": 0, "kept": 0, "turns": {}, "dropped": {}, "captions": {}}
    start |= {"best": 0.0, "worst": 0.0, "seconds": 0.0}
    # As JSON values, so that options with tuples compare equal after reading them back
    plain = json.loads(json.dumps(asdict(options)))
    return _summary(build_portions(out, plain, portions, work, start, after=after))


class _Maker:
    """Captions, scores and turns one portion after another into dialogues."""

    def __init__(self, policy: Policy, critic: Critic, options: BuildOptions, out: Path) -> None:
        from fastrl.rollout import Generator

        self.policy, self.critic, self.options, self.out = policy, critic, options, out
        self.generator = Generator(policy)
        best, gap = FILTERS[critic.rules]
        self.min_best = options.min_best if options.min_best is not None else best
        self.min_gap = options.min_gap if options.min_gap is not None else gap

    def portion(self, records: Sequence[Record], number: int, tally: Tally) -> list[str]:
        """Lines of the dialogues among the pictures of one portion."""
        numbers = range(number * PORTION, min((number + 1) * PORTION, len(records)))
        given = [records[i] for i in numbers]
        captions = self._captions(given, number)
        cases = [Case(r, text) for r, texts in zip(given, captions, strict=True) for text in texts]
        critiques = iter(self.critic.score(cases))
        lines = []
        for index, record, texts in zip(numbers, given, captions, strict=True):
            scored = [(text, next(critiques)) for text in texts]
            tally["pictures"] += 1
            _count(tally["captions"], "scored", sum(c.score is not None for _, c in scored))
            _count(tally["captions"], "unscored", sum(c.score is None for _, c in scored))
            ranked = sorted(((t, c) for t, c in scored if c.score is not None), key=lambda pair: pair[1].score or 0.0)
            reason = self._refuse(ranked)
            if reason:
                _count(tally["dropped"], reason)
                continue
            turns = make_turns(ranked, rng_for(self.options.seed, record.id))
            candidates = [(text, critique.score or 0.0) for text, critique in reversed(ranked)]
            row = dialogue_row(
                record,
                image_names(record.images, index, self.out),
                turns,
                candidates,
                prompt=question_of(record.messages),
            )
            lines.append(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            tally["kept"] += 1
            _count(tally["turns"], str(len(turns)))
            tally["best"] += candidates[0][1]
            tally["worst"] += candidates[-1][1]
        return lines

    def _captions(self, records: Sequence[Record], number: int) -> list[list[str]]:
        """Each record's different captions; all temperatures from one prefill."""
        from fastrl.rollout import Sampling

        options = self.options
        rng = torch.Generator().manual_seed((options.seed * 1_000_003 + number) % 2**63)
        session = self.generator.session([self.policy.encode(record)[0] for record in records])
        found: list[dict[str, None]] = [{} for _ in records]
        for temperature in options.temperatures:
            answers = session.generate(Sampling(1, options.max_new_tokens, temperature), rng)
            for texts, (completion,) in zip(found, answers, strict=True):
                text = completion.text.strip()
                if completion.finished and text:  # truncated captions are not used
                    texts[text] = None
        return [list(texts) for texts in found]

    def _refuse(self, ranked: Sequence[tuple[str, Critique]]) -> str:
        """The reason why a picture is dropped; empty if it is kept."""
        if len(ranked) < 2:
            return "fewer than two captions"
        worst, best = ranked[0][1].score or 0.0, ranked[-1][1].score or 0.0
        if best <= self.min_best:
            return f"best score at most {self.min_best:g}"
        return f"gap at most {self.min_gap:g}" if best - worst <= self.min_gap else ""


def make_turns(ranked: Sequence[tuple[str, Critique]], rng: random.Random) -> tuple[SpokenTurn, ...]:
    """A dialogue of one to three turns from captions in rising order of score.

    The last turn is the best caption; with more turns the first is the worst, and a middle one is drawn from those
    strictly between (with none between, the dialogue has two turns).
    """
    count = rng.choices((1, 2, 3), TURN_WEIGHTS)[0]
    worst, best = ranked[0], ranked[-1]
    between = [pair for pair in ranked[1:-1] if (worst[1].score or 0) < (pair[1].score or 0) < (best[1].score or 0)]
    chosen = [best] if count == 1 else [worst, best]
    if count == 3 and between:
        chosen.insert(1, rng.choice(between))
    turns = [SpokenTurn(text, critique.score or 0.0, critique.feedback or request(rng)) for text, critique in chosen]
    return (*turns[:-1], turns[-1]._replace(feedback=""))


def _count(counts: dict[str, int], name: str, number: int = 1) -> None:
    counts[name] = counts.get(name, 0) + number


def _summary(tally: Tally) -> dict[str, Any]:
    kept = max(1, tally["kept"])
    kinds = ("pictures", "kept", "turns", "dropped", "captions", "seconds")
    means = {"mean_best": tally["best"] / kept, "mean_worst": tally["worst"] / kept}
    return {kind: tally[kind] for kind in kinds} | means
