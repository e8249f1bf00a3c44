"""Perception in reflection (RePer, algorithm 1): the policy answers, the critic scores and explains, the policy answers
again with the whole history before it.

Images and history are processed only once: a session keeps their keys and values between turns, and each turn only adds
the new text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastrl.critics import Case, Critic, CriticError, RuleCritic, Turn, open_critic
from fastrl.critics.feedback import request, rng_for
from fastrl.data.disk import nothing_empty_left, write_file
from fastrl.data.records import Record, question
from fastrl.data.reflection import SpokenTurn, dialogue_messages

if TYPE_CHECKING:
    import torch

    from fastrl.captions.embedding import Soft
    from fastrl.models.attention.readout import HeatMaps
    from fastrl.models.load import Policy
    from fastrl.rollout import Session


@dataclass
class Reflection:
    """One picture's dialogue. ``error``: why it ended early (the critic failed)."""

    record: Record
    turns: list[Turn] = field(default_factory=list)
    error: str = ""

    @property
    def answer(self) -> str:
        """The last answer, as in algorithm 1; if the critic failed, the best scored answer (or the last one)."""
        scored = [turn for turn in self.turns if turn.score is not None]
        if self.error and scored:
            return max(scored, key=lambda turn: turn.score or 0.0).answer
        return self.turns[-1].answer if self.turns else ""

    def row(self) -> dict[str, Any]:
        """The dialogue as a JSON object."""
        turns = [
            {"answer": t.answer, "score": t.score, "feedback": t.feedback}
            | ({"problem": t.problem} if t.problem else {})
            for t in self.turns
        ]
        return {"id": self.record.id, "turns": turns, "answer": self.answer, "error": self.error}


def reflect(
    policy: Policy,
    critic: Critic,
    records: Sequence[Record],
    *,
    turns: int = 3,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    rng: torch.Generator | None = None,
    stop_at: float | None = None,
    portion: int = 64,
    on_turn: Callable[[int, list[Reflection]], None] | None = None,
) -> list[Reflection]:
    """Let the policy answer each record's question ``turns`` times, with the critic's feedback in between.

    Args:
        policy: gives the answers.
        critic: scores them.
        records: a record's messages are its question.
        turns: answers per record; all are sampled (the paper never stops early) unless ``stop_at`` is set.
        max_new_tokens, temperature, rng: for sampling answers; greedy by default.
        stop_at: a dialogue ends with its first answer of at least this score.
        portion: number of dialogues processed together.
        on_turn: called after each turn of a portion with its number from 1 and the portion's dialogues.

    Returns:
        One reflection per record. An answer that could not be scored is followed by a plain request. If the critic
        fails, the portion ends there with ``error`` set, and later portions are not started.

    Raises:
        ValueError: ``turns`` is less than 1, or ``stop_at`` is not a number.
    """
    if turns < 1:
        raise ValueError(f"turns: expected 1 or more, got {turns}")
    if stop_at is not None and math.isnan(stop_at):
        raise ValueError(f"stop_at: expected a score, got {stop_at}")
    out: list[Reflection] = []
    for start in range(0, len(records), portion):
        done = [Reflection(records[i]) for i in range(start, min(start + portion, len(records)))]
        out += done
        for number in _loop(policy, critic, done, turns, max_new_tokens, temperature, rng, stop_at):
            if on_turn is not None:
                on_turn(number, done)
        if any(reflection.error for reflection in done):
            break
    return out


def _loop(
    policy: Policy,
    critic: Critic,
    dialogues: list[Reflection],
    turns: int,
    max_new_tokens: int,
    temperature: float,
    rng: torch.Generator | None,
    stop_at: float | None,
) -> Iterator[int]:
    """Algorithm 1 for dialogues that are processed together; yields each turn's number when it is done."""
    from fastrl.rollout import Generator, Sampling

    sampling = Sampling(1, max_new_tokens, temperature)
    live = list(dialogues)
    session = Generator(policy).session([policy.encode(d.record)[0] for d in live])
    for number in range(1, turns + 1):
        answers = [completions[0].text for completions in session.generate(sampling, rng)]
        cases = [Case(d.record, text, tuple(d.turns)) for d, text in zip(live, answers, strict=True)]
        try:
            critiques = critic.score(cases)
        except CriticError as error:
            for dialogue, text in zip(live, answers, strict=True):
                dialogue.turns.append(Turn(text, problem=str(error)))
                dialogue.error = f"the critic failed at turn {number}: {error}"
            yield number
            return
        for dialogue, text, critique in zip(live, answers, critiques, strict=True):
            feedback = critique.feedback or request(rng_for(dialogue.record.id, number))
            dialogue.turns.append(Turn(text, critique.score, feedback, critique.problem))
        yield number
        over = [stop_at is not None and (d.turns[-1].score or 0.0) >= stop_at for d in live]
        if number == turns or all(over):
            return
        if any(over):  # continue with the other dialogues only
            live = [d for d, ended in zip(live, over, strict=True) if not ended]
            session = Generator(policy).session([policy.encode(_so_far(d))[0] for d in live])
        else:
            _go_on(policy, session, live)


def _go_on(policy: Policy, session: Session, dialogues: Sequence[Reflection]) -> None:
    """Append each dialogue's last answer and its feedback to the session."""
    session.extend([policy.encode_continuation(_so_far(dialogue)) for dialogue in dialogues])


def _so_far(dialogue: Reflection) -> Record:
    """The record with the whole dialogue so far as its messages."""
    spoken = [SpokenTurn(turn.answer, turn.score or 0.0, turn.feedback) for turn in dialogue.turns]
    return replace(dialogue.record, messages=dialogue_messages(dialogue.record.messages, spoken))


def spoken(dialogue: Reflection) -> Record:
    """The record with the dialogue up to the last answer as its messages."""
    so_far = _so_far(dialogue)
    return replace(so_far, messages=so_far.messages[:-1] if dialogue.turns[-1].feedback else so_far.messages)


def reflect_on_image(
    image: Path,
    asked: str,
    *,
    model: str,
    critic: str,
    turns: int = 3,
    references: Sequence[str] = (),
    max_new_tokens: int = 512,
    stop_at: float | None = None,
    attention: Path | None = None,
    draw: HeatMaps | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """``fastrl reflect``: one picture, printed turn by turn.

    Args:
        image, asked: the picture and the question.
        model, critic: a model folder or ``tiny:NAME``, and a critic's spec.
        references: true captions of the picture; the rule critic needs at least one.
        turns, max_new_tokens, stop_at: see :func:`reflect`.
        attention: folder for the attention maps of the answers.
        draw: draws them (see :func:`write_attention`).

    Raises:
        ValueError, FileNotFoundError: an argument is invalid, or a file does not exist.
    """
    from fastrl.models.open import open_policy

    if not image.is_file():
        raise FileNotFoundError(f"image not found: {image}")
    judge = open_critic(critic, say=say)
    if judge.rules and not references:
        raise ValueError("--critic rule compares with true captions: give one or more with --reference TEXT")
    target = {"references": list(references)} if references else {}
    record = Record(image.name, "caption", (image,), question("caption", prompt=asked), target)
    policy = open_policy(model)

    def show(number: int, dialogues: list[Reflection]) -> None:
        turn = dialogues[0].turns[-1]
        score = f"{turn.score:.2f}" if turn.score is not None else f"no score ({turn.problem})"
        say(f"turn {number}: {turn.answer}\n  score {score}")
        if number < turns and not dialogues[0].error:
            say(f"  critic: {turn.feedback}")

    (result,) = reflect(
        policy, judge, [record], turns=turns, max_new_tokens=max_new_tokens, stop_at=stop_at, on_turn=show
    )
    if result.error:
        say(f"{result.error}\nbest answer so far: {result.answer}")
    row = result.row()
    if attention is not None:
        row["attention"] = write_attention(policy, [result], attention, draw)["mean_mass"]
        shown = ", ".join(f"{mass:.3f}" for mass in row["attention"])
        say(f"attention on the image by turn: {shown}; {attention}")
    return row


def write_attention(
    policy: Policy, reflections: Sequence[Reflection], folder: Path, draw: HeatMaps | None = None
) -> dict[str, Any]:
    """Compute the attention maps of finished reflections, and write ``attention.json`` and, if ``draw`` is given
    (``fastrl.report.figures.heat_maps``), ``attention.png``.

    Returns:
        The summary of ``fastrl.models.attention.readout.save_attention``; ``mean_mass`` is the fraction of attention on
        image tokens by turn.
    """
    from fastrl.models.attention.readout import read_attention, save_attention

    with nothing_empty_left(folder):
        read = [(r.record, read_attention(policy, spoken(r))) for r in reflections]
        return save_attention(read, folder, draw=draw)


def evaluate_reflection(
    spec: str,
    *,
    model: str,
    critic: str = "rule",
    turns: int = 3,
    max_new_tokens: int | None = None,
    pixels: tuple[int | None, int | None] = (None, None),
    limit: int | None = None,
    skip_bad: bool = False,
    soft: str | None = "auto",
    out: Path | None = None,
    attention: Path | None = None,
    draw: HeatMaps | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """``fastrl eval caption --reflect N``: caption metrics of each turn, as ``turn1/score`` and so on, and
    ``matching`` (see ``run_evaluation``).

    Args:
        spec: caption records with truth (whatever the critic, metrics compare with it).
        model, critic, turns: see :func:`reflect_on_image`; max_new_tokens: default the caption protocol's.
        pixels: least and largest area of a resized picture; None: the model folder's.
        limit, skip_bad: of the data.
        soft: soft matching in the metrics (:func:`fastrl.evaluate.soft.caption_soft`); for ``auto`` the rule critic's
            model comes first, if it has one.
        out: write the dialogues to this JSONL file.
        attention: folder for attention maps; the mean by turn is also a metric (``turn1/image_attention``).
        draw: draws them (see :func:`write_attention`).

    Raises:
        ValueError: records have another task or no truth.
        CriticError: the critic failed.
    """
    from fastrl.data import load_data
    from fastrl.evaluate import evaluate
    from fastrl.evaluate.run import MAX_NEW_TOKENS
    from fastrl.models.open import open_policy

    data = load_data(spec, skip_bad=skip_bad, deep=skip_bad)
    records = data if limit is None else data[:limit]
    wrong = next((record for record in records if record.task != "caption"), None)
    if wrong is not None:
        raise ValueError(f"{wrong.source or wrong.id}: a {wrong.task} record; reflection is evaluated on captions")
    judge = open_critic(critic, say=say)
    softly = _softly(judge, soft, records)
    if softly.note:
        say(softly.note)
    policy = open_policy(model, min_pixels=pixels[0], max_pixels=pixels[1])
    found = reflect(
        policy,
        judge,
        records,
        turns=turns,
        max_new_tokens=max_new_tokens or MAX_NEW_TOKENS["caption"],
        on_turn=lambda number, dialogues: say(f"turn {number} of {len(dialogues)} dialogues"),
    )
    if out is not None and found:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_file(out, "".join(json.dumps(r.row(), ensure_ascii=False) + "\n" for r in found))
    failed = next((reflection.error for reflection in found if reflection.error), "")
    if failed:
        raise CriticError(f"{failed}; {len(found)} of {len(records)} dialogues" + (f" are in {out}" if out else ""))
    metrics: dict[str, Any] = {}
    for number in range(turns):
        answers = [reflection.turns[number].answer for reflection in found]
        of_turn = evaluate("caption", records, answers, similarity=softly.similarity)
        metrics |= {f"turn{number + 1}/{name}": value for name, value in of_turn.items()}
    metrics["matching"] = softly.matching
    if attention is not None:
        for number, mass in enumerate(write_attention(policy, found, attention, draw)["mean_mass"], start=1):
            metrics[f"turn{number}/image_attention"] = mass
    return metrics


def _softly(judge: Critic, soft: str | None, records: Sequence[Record]) -> Soft:
    """Soft matching in the metrics: as it is asked for, else by the rule critic's model, else ``auto``."""
    from fastrl.captions.embedding import AUTO, Soft
    from fastrl.evaluate.soft import caption_soft, is_free

    if soft == AUTO and isinstance(judge, RuleCritic) and judge.similarity is not None:
        return Soft(judge.similarity, judge.matching)
    return caption_soft("caption", soft, free=any(is_free(record.task, record.target) for record in records))
