"""UTR dialogues: what is asked about a tracked clip, what is answered, and when a question means one subject only.

Bidirectional querying (Video-UTR, arXiv:2502.12081, eq. 9): a *spatial* attribute in one frame (box, location or
appearance) asks for identity, action and the trajectory over all frames; a *temporal* one (frames, time or action) asks
for the subject and its boxes. The paper's figure names these attributes; how questions and answers are worded is a
reconstruction after Merlin's trajectory text, for no such file was released:

    Track1: red circle<Id1>Frame1:[0,119,286,405];Frame2:[…];…</Id1> It moves right in frames 1-3, then stays in …

Coordinates are 0-1000, frames count from 1, and :func:`answer_text` of what was parsed gives the same text again.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from fastrl.answers import View, format_tracks, from_original
from fastrl.answers.text import answer_region
from fastrl.data.clips import Clip, Span, Subject, box_iou, sample_frames
from fastrl.data.records import Record, question

SPATIAL = ("box", "location", "appearance")
TEMPORAL = ("span", "time", "action")
QUERIES = {"spatial": SPATIAL, "temporal": TEMPORAL}
SAME_PLACE = 0.5  # IoU from which two boxes of one frame are no longer told apart by a box in the question
_COLUMNS, _ROWS = ("left", "center", "right"), ("upper", "middle", "lower")
MAX_ACTION = 100  # characters of an action's words
MAX_SPANS = 64  # read from one answer


class Query(NamedTuple):
    """What is asked: an attribute of a subject in ``frame`` (spatial) or over frames ``first`` to ``last``."""

    kind: str
    attribute: str
    frame: int | None = None
    first: int | None = None
    last: int | None = None

    def plain(self) -> dict[str, Any]:
        """The query as JSON has it."""
        return {name: value for name, value in self._asdict().items() if value is not None}


@dataclass(frozen=True)
class Dialogue:
    """One question about a clip and its answer; ``subjects`` are those the answer is about."""

    clip: Clip
    subjects: tuple[Subject, ...]
    query: Query
    question: str
    answer: str
    tpl: float | None = None  # temporal perplexity of the answer, where it was measured

    @property
    def id(self) -> str:
        """The clip's."""
        return self.clip.id

    def record(self) -> Record:
        """As one user turn of frames with their times, then the question. Frames of a video file are decoded now."""
        clip = self.clip
        images = clip.images()
        messages = question("trajectory", images=len(images), prompt=self.question, seconds=clip.seconds)
        target = replace(clip, subjects=self.subjects).target()
        target |= {"answer": self.answer, "query": self.query.plain()}
        if self.tpl is not None:
            target["tpl"] = self.tpl
        return Record(clip.id, "trajectory", images, messages, target, source=clip.source)


def make_dialogue(clip: Clip, subject: Subject, query: Query) -> Dialogue:
    """The dialogue that asks ``query`` about a subject of ``clip``: its answer is the subject through all frames."""
    answer = answer_text([subject], (clip.width, clip.height), clip.caption)
    return Dialogue(clip, (subject,), query, ask(clip, subject, query), answer)


def one_frame_dialogue(clip: Clip, subject: Subject, query: Query) -> Dialogue:
    """A spatial query answered from its own frame alone: what temporal hacking thrives on, for comparison.

    Raises ``ValueError`` for a temporal query.
    """
    if query.frame is None:
        raise ValueError("only spatial queries can be answered from one frame")
    shown = replace(subject, boxes={query.frame: subject.boxes[query.frame]}, spans=())
    answer = answer_text([shown], (clip.width, clip.height))
    asked = ask(clip, subject, query).removesuffix(_SPATIAL_END) + _ONE_FRAME_END
    return Dialogue(clip, (shown,), query, asked, answer)


def select_frames(dialogue: Dialogue, count: int, how: str, seed: int | str) -> Dialogue:
    """The dialogue about ``count`` of its frames: question, answer and boxes renumbered; the query's frames stay.

    Where it asks who is seen from one frame to another, the frames just before and after stay too: they tell the
    subject from one that was seen longer.

    Args:
        dialogue: worded as this module words them.
        count, how, seed: see ``fastrl.data.clips.sample_frames``.

    Raises:
        ValueError: a dialogue of other wording, which cannot be renumbered.
    """
    clip, query, subject = dialogue.clip, dialogue.query, dialogue.subjects[0]
    make = next((m for m in (make_dialogue, one_frame_dialogue) if _is_made_by(m, dialogue)), None)
    if make is None:
        raise ValueError("question and answer are not as fastrl build utr words them: their frames cannot be chosen")
    numbers = sample_frames(len(clip), count, how, seed)
    kept = {t for t in query[2:] if t is not None}
    if query.first is not None and query.last is not None and not _action(subject, query):
        kept |= {t for t in (query.first - 1, query.last + 1) if 1 <= t <= len(clip)}
    for frame in sorted(kept - set(numbers)):
        spare = [t for t in numbers if t not in kept]
        if spare:
            numbers[numbers.index(min(spare, key=lambda t: abs(t - frame)))] = frame
    numbers = sorted({*numbers, *kept})
    chosen = clip.select(numbers)
    place = {number: i for i, number in enumerate(numbers, start=1)}
    moved = Query(query.kind, query.attribute, *(place.get(t) if t is not None else None for t in query[2:]))
    own = next(s for s in chosen.subjects if s.identity == subject.identity)
    return make(chosen, own, moved)


def _is_made_by(make: Callable[[Clip, Subject, Query], Dialogue], dialogue: Dialogue) -> bool:
    """Whether the dialogue's words are those that ``make`` finds for its query."""
    try:
        again = make(dialogue.clip, dialogue.subjects[0], dialogue.query)
    except (ValueError, KeyError):  # no such question, or about a frame the subject is not in
        return False
    return len(dialogue.subjects) == 1 and (again.question, again.answer) == (dialogue.question, dialogue.answer)


def pick_query(rng: random.Random, clip: Clip, subject: Subject, kind: str) -> Query | None:
    """A unique query of a kind about a subject, its attribute drawn first, then its frame or span; None: there is none.

    Raises ``ValueError`` for an unknown kind.
    """
    if kind not in QUERIES:
        raise ValueError(f"unknown kind of query {kind!r}; allowed: {', '.join(QUERIES)}")
    possible = spatial_queries(subject) if kind == "spatial" else temporal_queries(subject)
    attributes = [a for a in QUERIES[kind] if any(q.attribute == a for q in possible)]
    for attribute in rng.sample(attributes, len(attributes)):
        own = [query for query in possible if query.attribute == attribute]
        for query in rng.sample(own, len(own)):
            if is_unique(clip, subject, query):
                return query
    return None


def number_subjects(clip: Clip) -> tuple[Clip, dict[int, int]]:
    """The clip with its subjects numbered 1, 2, … by when they are first seen, then from left to right.

    Such numbers can be read off the frames; those of an annotation file cannot, and learning them is learning noise.

    Returns:
        The clip, and each new number's old one.
    """
    order = sorted(clip.subjects, key=lambda s: (min(s.boxes), s.boxes[min(s.boxes)][:2], s.identity))
    subjects = tuple(replace(subject, identity=i) for i, subject in enumerate(order, start=1))
    return replace(clip, subjects=subjects), {i: s.identity for i, s in enumerate(order, start=1)}


# ---- questions


def spatial_queries(subject: Subject) -> list[Query]:
    """Every spatial query one could ask about a subject, unique or not."""
    looks = SPATIAL if subject.appearance else SPATIAL[:2]
    return [Query("spatial", attribute, frame=t) for attribute in looks for t in sorted(subject.boxes)]


def temporal_queries(subject: Subject) -> list[Query]:
    """Every temporal query one could ask about a subject, unique or not.

    What it does and when, by frames or by seconds, or what it does alone; where no action is known, in which frames
    it is to be seen.
    """
    if not subject.spans:
        shown = sorted(subject.boxes)
        return [Query("temporal", name, first=shown[0], last=shown[-1]) for name in ("span", "time")]
    return [Query("temporal", name, first=s.first, last=s.last) for name in TEMPORAL for s in subject.spans]


def is_unique(clip: Clip, subject: Subject, query: Query) -> bool:
    """Whether ``subject`` is the only one of the clip that the question can mean.

    Box: no other box of that frame overlaps it by ``SAME_PLACE`` or more. Location: no other centre in the same ninth
    of the picture. Appearance: nobody else in that frame looks the same or is called so. Span and time: nobody else
    does the same in any of these frames (without actions: nobody else is first and last seen in the same frames).
    Action: nobody else ever does it, and the subject itself does it only once.
    """
    others = [other for other in clip.subjects if other is not subject]
    if query.frame is not None:
        rivals = [other for other in others if query.frame in other.boxes]
        box = subject.boxes[query.frame]
        if query.attribute == "box":
            return all(box_iou(box, other.boxes[query.frame]) < SAME_PLACE for other in rivals)
        if query.attribute == "location":
            place = location(clip, box)
            return all(location(clip, other.boxes[query.frame]) != place for other in rivals)
        looks = subject.appearance.casefold()
        return all(looks not in (other.appearance.casefold(), other.name.casefold()) for other in rivals)
    first, last = query.first or 0, query.last or 0
    action = _action(subject, query)
    if not action:
        return all((min(o.boxes), max(o.boxes)) != (first, last) for o in others if o.boxes)
    doing = [s for other in others for s in other.spans if s.action.casefold() == action.casefold()]
    if query.attribute == "action":
        return not doing and sum(s.action.casefold() == action.casefold() for s in subject.spans) == 1
    return all(s.last < first or s.first > last for s in doing)


def ask(clip: Clip, subject: Subject, query: Query) -> str:
    """The question's text. Raises ``ValueError`` for an attribute there is no question for."""
    if query.frame is not None and query.attribute in SPATIAL:
        return f"In frame {query.frame} there is {_thing(clip, subject, query)}. {_SPATIAL_END}"
    if query.kind != "temporal" or query.attribute not in TEMPORAL:
        raise ValueError(f"no question about {query.attribute!r} in {query.kind} queries")
    action = _action(subject, query)
    return f"Who {action or 'is seen'}{_when(clip, query, only=not action)}, and {_TEMPORAL_END}"


_SPATIAL_END = "Who is it, what does it do, and what is its trajectory?"
_TEMPORAL_END = "what is the whole trajectory?"
_ONE_FRAME_END = "Who is it, and where is it in that frame?"


def location(clip: Clip, box: Sequence[float]) -> str:
    """In which ninth of the picture a box has its centre, as words (``upper left``, ``middle center``, …)."""
    x, y = (box[0] + box[2]) / 2 / clip.width, (box[1] + box[3]) / 2 / clip.height
    return f"{_ROWS[min(max(int(3 * y), 0), 2)]} {_COLUMNS[min(max(int(3 * x), 0), 2)]}"


def _thing(clip: Clip, subject: Subject, query: Query) -> str:
    box = subject.boxes[query.frame or 0]
    if query.attribute == "box":
        numbers = from_original(box, "thousand", View.unresized(clip.width, clip.height))
        return f"an object at [{','.join(str(min(max(int(v + 0.5), 0), 1000)) for v in numbers)}]"
    if query.attribute == "location":
        return f"an object in the {location(clip, box)}"
    return f"an object that looks like this: {subject.appearance}"


def _action(subject: Subject, query: Query) -> str:
    """What the subject does over exactly the query's frames; empty: the query is about being seen."""
    return next((s.action for s in subject.spans if (s.first, s.last) == (query.first, query.last)), "")


def _when(clip: Clip, query: Query, *, only: bool) -> str:
    if query.attribute == "action":
        return ""
    first, last = query.first or 1, query.last or 1
    alone = " only" if only else ""
    if query.attribute == "span":
        return f"{alone} in frame{_range(first, last)}"
    return f"{alone} from {clip.seconds[first - 1]:.2f} s to {clip.seconds[last - 1]:.2f} s"


def _range(first: int, last: int) -> str:
    return f" {first}" if first == last else f"s {first}-{last}"


# ---- answers

_DOES = re.compile(
    r"(?:\bit |, )(?:then )?([^,.;<>\[\]]{1,120}?) in frames? ([0-9]{1,6}+)(?:-([0-9]{1,6}+))?", re.IGNORECASE
)


def answer_text(subjects: Sequence[Subject], size: tuple[int, int], caption: str = "") -> str:
    """The whole answer: every subject's track, what each does and when, then the caption.

    Args:
        subjects: in the order of the answer; boxes in pixels.
        size: (width, height) of the frames in pixels.

    Raises:
        ValueError: a name that trajectory text cannot hold, or a subject without boxes.
    """
    clip = Clip("", *size, (), tuple(subjects))
    lines = []
    view = View.unresized(*size)
    for text, subject in zip(format_tracks(clip.tracks(), view).split("\n"), subjects, strict=True):
        lines.append(f"{text} {action_text(subject.spans)}".rstrip())
    return "\n".join(lines) + (f" {caption}" if caption else "")


def action_text(spans: Sequence[Span]) -> str:
    """``It moves left in frames 1-3, then stays in frames 4-6.``; empty for no spans."""
    parts = [f"{s.action} in frame{_range(s.first, s.last)}" for s in spans]
    return f"It {', then '.join(parts)}." if parts else ""


def sound_action(action: str) -> str:
    """An action's words without what :func:`parse_actions` could not read back (punctuation, a leading ``then``)."""
    words = re.sub(r"[,.;:<>\[\]\s]+", " ", action).strip()[:MAX_ACTION]
    return re.sub(r"^(?:then )+|(?: in frames? [0-9-]+)+", "", words, flags=re.IGNORECASE).strip()


def parse_actions(text: str) -> tuple[Span, ...]:
    """What an answer says is done and when, in its order: the inverse of :func:`action_text` over a whole answer.

    Never raises; spans that end before they begin, and what is beyond ``MAX_SPANS``, are left out.
    """
    found = []
    for match in _DOES.finditer(re.sub(r"<Id.*?(?:</Id[0-9]*>|$)", ";", answer_region(text), flags=re.I | re.S)):
        first = int(match.group(2))
        last = int(match.group(3) or first)
        if 1 <= first <= last:
            found.append(Span(match.group(1).strip(), first, last))
        if len(found) == MAX_SPANS:
            break
    return tuple(found)
