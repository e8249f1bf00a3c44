"""Temporal perplexity: how much a text about a clip needs the whole clip (Video-UTR, arXiv:2502.12081, eq. 6).

    TPL = R(all frames, y) − R(a single frame, y)

If it is low, one frame explains the text, which allows temporal hacking; if it is high, the text needs several frames.
The paper gives the difference and its interpretation. The definition of R, the choice of single frames and the sign are
a **reconstruction**, because neither code nor the full text was released: with ℓ(F) = mean over the answer's tokens of
log p(y_k | F, question, y_<k), teacher forced, without the end of turn,

    log:  TPL = ℓ(all) − mean_f ℓ({f})                       in nats per token
    ppl:  TPL = mean_f exp(−ℓ({f})) − exp(−ℓ(all))           perplexities, so that larger still means more is needed

over ``samples`` random frames f (without repetition), or the first, middle, last or best one. ``best`` uses the
frame that explains the text best, which is the most conservative choice: all frames are then scored.

A single frame is shown without the others, or (``absent="grey"``) with grey pictures in their place: the prompt then
has its whole length, and TPL does not grow with the number of frames because a short prompt is unusual.

Every subset of a clip's frames is a separate prompt in the packed batch; they share the images, so the vision tower
processes each frame only once.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fastrl.answers import format_answer
from fastrl.batch import Completion, ImageInput, PromptGroup, pack
from fastrl.data.blank import blank_images
from fastrl.data.records import Record
from fastrl.rewards.base import unknown

if TYPE_CHECKING:
    from fastrl.models.families import VisionFeatures
    from fastrl.models.policy import Policy

SINGLES = ("random", "first", "middle", "last", "best")
FORMS = ("log", "ppl")
ABSENT = ("left out", "grey")


class TemporalPerplexity(NamedTuple):
    """TPL of one record and its components. Scores ℓ are mean log-probs per answer token, in nats."""

    id: str
    tpl: float
    full: float  # ℓ with all frames
    single: float  # mean ℓ of the chosen frames
    chosen: tuple[int, ...]  # their numbers, from 1
    curve: Mapping[int, float]  # ℓ with only that frame, for every frame that was scored
    frames: int
    tokens: int  # of the answer

    def explaining(self, tolerance: float = 0.05) -> list[int]:
        """Frames that explain the answer by themselves: ℓ at most ``tolerance`` nats per token below that of all."""
        return [frame for frame, score in self.curve.items() if score >= self.full - tolerance]


def temporal_perplexity(
    policy: Policy,
    records: Iterable[Record],
    *,
    samples: int = 4,
    single: str = "random",
    form: str = "log",
    seed: int = 0,
    curve: bool = False,
    absent: str = "left out",
    token_budget: int = 8192,
) -> list[TemporalPerplexity]:
    """Temporal perplexity of each record's answer under a model.

    Args:
        policy: the model; nothing is trained.
        records: clips whose text is ``target["answer"]`` (else the truth written by ``format_answer``). The prompt is
            the record's, with a subset of its images (see :func:`frame_subset`).
        samples: random frames per record, at most all; only read with ``single="random"``.
        single: the single frame(s) with which the whole clip is compared.
        form: ``log`` or ``ppl``.
        seed: of the random frames, which also depend on the record's id but not on the other records.
        curve: score every single frame, for ``TemporalPerplexity.curve``; TPL itself only uses the chosen ones.
        absent: what a prompt with a single frame has in place of the others: nothing (``left out``), or ``grey``
            pictures of the same size.
        token_budget: tokens of one packed batch; a prompt is never split. Only affects memory and time.

    Raises:
        ValueError: ``single``, ``form`` or ``absent`` is unknown, ``samples`` is less than 1, or a record has no images
            or answer.
        EncodeError: the policy cannot encode a record.
    """
    check_choices(samples, single, form, absent)
    scorer = _Scorer(policy, token_budget)
    results = []
    for clip, scores in scorer.score(_clip(policy, r, samples, single, seed, curve, absent) for r in records):
        singles = dict(zip(clip.alone, scores[1:], strict=True))
        chosen = (max(singles, key=singles.__getitem__),) if single == "best" else clip.chosen
        alone = [singles[frame] for frame in chosen]
        results.append(
            TemporalPerplexity(
                clip.id,
                _tpl(scores[0], alone, form),
                scores[0],
                _mean(alone),
                chosen,
                singles,
                clip.frames,
                clip.tokens,
            )
        )
    return results


def check_choices(samples: int, single: str, form: str, absent: str = ABSENT[0]) -> None:
    """Raise ``ValueError`` for options that :func:`temporal_perplexity` does not support."""
    for name, value, known in (("single", single, SINGLES), ("form", form, FORMS), ("absent", absent, ABSENT)):
        if value not in known:
            raise ValueError(f"--{name}: " + unknown("choice", value, known))
    if samples < 1:
        raise ValueError(f"--samples: expected at least 1, got {samples}")


def frame_subset(record: Record, numbers: Sequence[int]) -> Record:
    """The record with only the images ``numbers`` (from 1), each with the text part directly before it (its label).

    The rest of the messages is unchanged.

    Raises:
        ValueError: there is no image of that number.
    """
    if not set(numbers) <= set(range(1, len(record.images) + 1)):
        raise ValueError(f"record {record.id!r} has images 1 to {len(record.images)}, got {list(numbers)}")
    at = 0
    messages = []
    for message in record.messages:
        if isinstance(message["content"], str):
            messages.append(message)
            continue
        kept: list[Mapping[str, Any]] = []
        for part in message["content"]:
            if part["type"] == "image":
                at += 1
                if at not in numbers:
                    if kept and kept[-1]["type"] == "text":
                        kept.pop()
                    continue
            kept.append(part)
        messages.append({**message, "content": kept})
    images = tuple(image for number, image in enumerate(record.images, start=1) if number in numbers)
    views = tuple(view for number, view in enumerate(record.views, start=1) if number in numbers)
    return replace(record, images=images, messages=tuple(messages), views=views)


def greyed(record: Record, numbers: Sequence[int]) -> Record:
    """The record with grey pictures in place of all images but ``numbers`` (from 1). Raises ``ValueError``: there is no
    image of that number."""
    if not set(numbers) <= set(range(1, len(record.images) + 1)):
        raise ValueError(f"record {record.id!r} has images 1 to {len(record.images)}, got {list(numbers)}")
    grey = blank_images(record).images
    images = (image if n in numbers else grey[n - 1] for n, image in enumerate(record.images, start=1))
    return replace(record, images=tuple(images))


@dataclass(frozen=True)
class _Clip:
    """One record, encoded: the prompt with all frames, then with one each of ``alone``."""

    id: str
    groups: tuple[PromptGroup, ...]
    alone: tuple[int, ...]
    chosen: tuple[int, ...]
    frames: int
    tokens: int

    @property
    def size(self) -> int:
        return sum(group.tokens for group in self.groups)

    @property
    def images(self) -> list[ImageInput]:
        return [image for group in self.groups for image in group.prompt.images]


def _clip(policy: Policy, record: Record, samples: int, single: str, seed: int, curve: bool, absent: str) -> _Clip:
    from fastrl.data.pictures import open_picture

    where = f"record {record.id!r}" + (f" ({record.source})" if record.source else "")
    if not record.images:
        raise ValueError(f"{where}: temporal perplexity needs frames, this record has no images")
    count = len(record.images)
    try:  # each subset reads them again
        record = replace(record, images=tuple(open_picture(image) for image in record.images))
    except OSError as error:
        raise ValueError(f"{where}: {error}") from error
    prompt, seen = policy.encode(record)
    text = record.target.get("answer")
    if not isinstance(text, str):
        text = format_answer(record.task, record.target, policy.style, seen.views[0])
    ids = policy.encode_text(text)[:-1]
    if len(ids) == 0:
        raise ValueError(f"{where}: an empty answer has no perplexity")
    chosen = _choose(record.id, count, samples, single, seed)
    alone = tuple(range(1, count + 1)) if curve or single == "best" else chosen
    subset = greyed if absent == "grey" else frame_subset
    prompts = [prompt, *(policy.encode(subset(record, [frame]))[0] for frame in alone)]
    groups = tuple(PromptGroup(each, [Completion(token_ids=ids)]) for each in prompts)
    return _Clip(record.id, groups, alone, chosen, count, len(ids))


def _choose(name: str, count: int, samples: int, single: str, seed: int) -> tuple[int, ...]:
    if single == "random":
        rng = random.Random(f"tpl/{seed}/{name}")
        return tuple(sorted(rng.sample(range(1, count + 1), min(samples, count))))
    return ({"first": 1, "middle": (count + 1) // 2, "last": count}.get(single, 1),)


class _Scorer:
    """Scores clips in batches; each frame of a batch goes through the vision tower once."""

    def __init__(self, policy: Policy, token_budget: int) -> None:
        self.policy, self.token_budget = policy, token_budget
        self._features: dict[str, VisionFeatures] = {}

    def score(self, clips: Iterable[_Clip]) -> Iterator[tuple[_Clip, list[float]]]:
        """Each clip with the ℓ of its groups, in order."""
        waiting: list[_Clip] = []
        for clip in clips:
            if waiting and sum(each.size for each in waiting) + clip.size > self.token_budget:
                yield from self._flush(waiting)
                waiting = []
            waiting.append(clip)
        if waiting:
            yield from self._flush(waiting)

    @torch.no_grad()
    def _flush(self, clips: Sequence[_Clip]) -> list[tuple[_Clip, list[float]]]:
        images = {image.key: image for clip in clips for image in clip.images}
        known = {key: self._features[key] for key in images if key in self._features}
        missing = [image for key, image in images.items() if key not in known]
        self._features = known | self.policy.features(missing)  # consecutive clips often have the same frames
        scores: list[float] = []
        for batch in pack((group for clip in clips for group in clip.groups), self.token_budget):
            logp = self.policy.logprob(batch.to(self.policy.device), features=self._features).logp
            scores += [float(part.double().mean()) for part in batch.split(logp.cpu())]
        rest = iter(scores)
        return [(clip, [next(rest) for _ in clip.groups]) for clip in clips]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _tpl(full: float, alone: Sequence[float], form: str) -> float:
    if form == "log":
        return full - _mean(alone)
    return _mean([_perplexity(score) for score in alone]) - _perplexity(full)


def _perplexity(score: float) -> float:
    return math.exp(min(-score, 700.0))  # finite for any log-prob
