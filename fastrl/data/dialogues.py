"""UTR dialogues: questions about tracked clips, their answers, and checks that a question refers to one subject only.

Bidirectional querying (Video-UTR, arXiv:2502.12081, eq. 9): a *spatial* attribute in one frame (box, location or
appearance) asks for identity, action and the trajectory over all frames; a *temporal* one (frames, time or action) asks
for the subject and its boxes. The paper's figure names these attributes; the wording of questions and answers is a
reconstruction after Merlin's trajectory text, because no such file was released:

    Track1: red circle<Id1>Frame1:[0,119,286,405];Frame2:[…];…</Id1> It moves right in frames 1-3, then stays in …

Coordinates are 0-1000, frames count from 1, and :func:`answer_text` of a parsed answer gives the same text.
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
from fastrl.data.truth import short

SPATIAL = ("box", "location", "appearance")
TEMPORAL = ("span", "time", "action")
QUERIES = {"spatial": SPATIAL, "temporal": TEMPORAL}
SAME_PLACE = 0.5  # IoU from which a box in the question does not distinguish two boxes of a frame
_COLUMNS, _ROWS = ("left", "center", "right"), ("upper", "middle", "lower")
MAX_ACTION = 100  # characters of an action's words
MAX_SPANS = 64  # parsed from one answer


class Query(NamedTuple):
    """A question about an attribute of a subject in ``frame`` (spatial) or over frames ``first`` to ``last``."""

    kind: str
    attribute: str
    frame: int | None = None
    first: int | None = None
    last: int | None = None

    def plain(self) -> dict[str, Any]:
        """The query as JSON values."""
        return {name: value for name, value in self._asdict().items() if value is not None}


@dataclass(frozen=True)
class Dialogue:
    """One question about a clip and its answer; ``subjects`` are those the answer is about."""

    clip: Clip
    subjects: tuple[Subject, ...]
    query: Query
    question: str
    answer: str
    tpl: float | None = None  # temporal perplexity of the answer, if measured

    @property
    def id(self) -> str:
        """The clip's."""
        return self.clip.id

    def record(self) -> Record:
        """A record of one user turn: frames with their times, then the question. Decodes frames of a video file."""
        clip = self.clip
        images = clip.images()
        messages = question("trajectory", images=len(images), prompt=self.question, seconds=clip.seconds)
        target = replace(clip, subjects=self.subjects).target()
        target |= {"answer": self.answer, "query": self.query.plain()}
        if self.tpl is not None:
            target["tpl"] = self.tpl
        return Record(clip.id, "trajectory", images, messages, target, source=clip.source)


def make_dialogue(clip: Clip, subject: Subject, query: Query) -> Dialogue:
    """The dialogue that asks ``query`` about a subject of ``clip``: its answer is the subject through all frames. If
    the clip has a caption, what happens in the video is asked too, and the caption ends the answer."""
    answer = answer_text([subject], (clip.width, clip.height), clip.caption)
    asked = ask(clip, subject, query) + (f" {_CAPTION_END}" if clip.caption else "")
    return Dialogue(clip, (subject,), query, asked, answer)


def one_frame_dialogue(clip: Clip, subject: Subject, query: Query) -> Dialogue:
    """A spatial query answered from its own frame only, for comparison: such questions allow temporal hacking.

    Raises ``ValueError`` for a temporal query.
    """
    if query.frame is None:
        raise ValueError("only spatial queries can be answered from one frame")
    shown = replace(subject, boxes={query.frame: subject.boxes[query.frame]}, spans=())
    answer = answer_text([shown], (clip.width, clip.height))
    asked = ask(clip, subject, query).removesuffix(_SPATIAL_END) + _ONE_FRAME_END
    return Dialogue(clip, (shown,), query, asked, answer)


def select_frames(dialogue: Dialogue, count: int, how: str, seed: int | str) -> Dialogue:
    """The dialogue about ``count`` of its frames, with question, answer and boxes renumbered; keeps the query's frames.

    If the question asks who is seen from one frame to another, the frames just before and after are needed too: they
    distinguish the subject from one that is seen longer.

    Args:
        dialogue: with the wording of this module.
        count, how, seed: see ``fastrl.data.clips.sample_frames``.

    Raises:
        ValueError: the dialogue has another wording, so it cannot be renumbered.
    """
    clip, query, subject = dialogue.clip, dialogue.query, dialogue.subjects[0]
    make = next((m for m in (make_dialogue, one_frame_dialogue) if _is_made_by(m, dialogue)), None)
    if make is None:
        raise ValueError("frames can only be chosen for questions and answers in the wording of fastrl build utr")
    numbers = sample_frames(len(clip), count, how, seed)
    needed = {t for t in query[2:] if t is not None}
    if query.first is not None and query.last is not None and not _action(subject, query):
        needed |= {t for t in (query.first - 1, query.last + 1) if 1 <= t <= len(clip)}
    for frame in sorted(needed - set(numbers)):
        replaceable = [t for t in numbers if t not in needed]
        if replaceable:
            numbers[numbers.index(min(replaceable, key=lambda t: abs(t - frame)))] = frame
    numbers = sorted({*numbers, *needed})
    chosen = clip.select(numbers)
    place = {number: i for i, number in enumerate(numbers, start=1)}
    moved = Query(query.kind, query.attribute, *(place.get(t) if t is not None else None for t in query[2:]))
    own = next(s for s in chosen.subjects if s.identity == subject.identity)
    return make(chosen, own, moved)


def _is_made_by(make: Callable[[Clip, Subject, Query], Dialogue], dialogue: Dialogue) -> bool:
    """Whether ``make`` gives the same question and answer for the dialogue's query."""
    try:
        again = make(dialogue.clip, dialogue.subjects[0], dialogue.query)
    except (ValueError, KeyError):  # no such question, or about a frame the subject is not in
        return False
    return len(dialogue.subjects) == 1 and (again.question, again.answer) == (dialogue.question, dialogue.answer)


def pick_query(rng: random.Random, clip: Clip, subject: Subject, kind: str) -> Query | None:
    """Draw a unique query of a kind about a subject: first its attribute, then frame or span. None if there is none.

    Raises ``ValueError`` for an unknown kind.
    """
    if kind not in QUERIES:
        raise ValueError(f"unknown kind of query {short(kind)}; allowed: {', '.join(QUERIES)}")
    possible = spatial_queries(subject) if kind == "spatial" else temporal_queries(subject)
    attributes = [a for a in QUERIES[kind] if any(q.attribute == a for q in possible)]
    for attribute in rng.sample(attributes, len(attributes)):
        own = [query for query in possible if query.attribute == attribute]
        for query in rng.sample(own, len(own)):
            if is_unique(clip, subject, query):
                return query
    return None


def number_subjects(clip: Clip) -> tuple[Clip, dict[int, int]]:
    """Number the subjects 1, 2, … in the order in which they first appear, then from left to right.

    A model can infer these numbers from the frames; those of an annotation file would be noise.

    Returns:
        The clip, and a mapping from new to old numbers.
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

    Its action with its time in frames or seconds, or the action only; without known actions, the frames that show it.
    """
    if not subject.spans:
        shown = sorted(subject.boxes)
        return [Query("temporal", name, first=shown[0], last=shown[-1]) for name in ("span", "time")]
    return [Query("temporal", name, first=s.first, last=s.last) for name in TEMPORAL for s in subject.spans]


def is_unique(clip: Clip, subject: Subject, query: Query) -> bool:
    """Whether the question can only refer to ``subject``.

    Box: no other box of that frame overlaps it by ``SAME_PLACE`` or more. Location: no other centre in the same ninth
    of the picture. Appearance: no other subject in that frame has the same appearance or name. Span and time: no other
    subject does the same in any of these frames (without actions: no other is first and last seen in the same frames).
    Action: no other subject ever does it, and the subject itself does it only once.
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
    """The question's text. Raises ``ValueError`` for an unknown attribute."""
    if query.frame is not None and query.attribute in SPATIAL:
        return f"In frame {query.frame} there is {_thing(clip, subject, query)}. {_SPATIAL_END}"
    if query.kind != "temporal" or query.attribute not in TEMPORAL:
        raise ValueError(f"no question about {short(query.attribute)} in {query.kind} queries")
    action = _action(subject, query)
    return f"Who {action or 'is seen'}{_when(clip, query, only=not action)}, and {_TEMPORAL_END}"


_SPATIAL_END = "Who is it, what does it do, and what is its trajectory?"
_TEMPORAL_END = "what is the whole trajectory?"
_CAPTION_END = "By the way, what happens in this video?"  # as in the paper's figure
_ONE_FRAME_END = "Who is it, and where is it in that frame?"


def location(clip: Clip, box: Sequence[float]) -> str:
    """The ninth of the picture that contains the centre of a box, as words (``upper left``, ``middle center``, …)."""
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
    """The subject's action over exactly the query's frames; empty if the query is about when it is seen."""
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
    """The whole answer: every subject's track and actions, then the caption.

    Args:
        subjects: in the order of the answer; boxes in pixels.
        size: (width, height) of the frames in pixels.

    Raises:
        ValueError: trajectory text cannot represent a name, or a subject has no boxes.
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


def parsable_action(action: str) -> str:
    """An action's words without parts that :func:`parse_actions` cannot parse (punctuation, a leading ``then``)."""
    words = re.sub(r"[,.;:<>\[\]\s]+", " ", action).strip()[:MAX_ACTION]
    return re.sub(r"^(?:then )+|(?: in frames? [0-9-]+)+", "", words, flags=re.IGNORECASE).strip()


def parse_actions(text: str) -> tuple[Span, ...]:
    """The actions in an answer with their spans, in order: the inverse of :func:`action_text` for a whole answer.

    Never raises; spans that end before they begin, and those beyond ``MAX_SPANS``, are left out.
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
