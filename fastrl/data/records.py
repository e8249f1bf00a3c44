"""``Record``: one row of data from any file format; ``Dataset``: many records, and the rows that were left out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, overload

from fastrl.answers.choice import LETTERS

if TYPE_CHECKING:
    from fastrl.answers import View
    from fastrl.data.pictures import AnyPicture
    from fastrl.data.validate import Problem

# Perception-R1's training prompts (the caption prompt is RePer's); "{}" takes the expression, label or category names.
PROMPTS: Mapping[str, str] = {
    "grounding": "Output the bounding box of the {} in the image.",
    "counting": "Output all the bounding boxes of the {}",
    "detection": "Please output bbox coordinates and names of {}.",
    "ocr": "OCR this image.",
    "caption": "Please generate a detailed caption that accurately describes the image.",
    "trajectory": "Track the {}.",
}


def question(
    task: str, text: str = "", *, images: int = 1, prompt: str | None = None, seconds: Sequence[float] = ()
) -> tuple[Mapping[str, Any], ...]:
    """The messages of a record: one user turn with its images, then ``prompt`` or that of ``task`` about ``text``.

    With ``seconds`` (one for each image) the images are the frames of a clip: each is preceded by a text with its
    number and time, ``Frame1 0.5s:``.
    """
    words = PROMPTS[task].format(text) if prompt is None else prompt
    content: list[dict[str, Any]] = []
    for number in range(images):
        if seconds:
            content.append({"type": "text", "text": frame_label(number + 1, seconds[number])})
        content.append({"type": "image"})
    return ({"role": "user", "content": [*content, {"type": "text", "text": words}]},)


_FRAME = re.compile(r"Frame[0-9]+ [0-9.e+-]+s:")


def question_of(messages: Sequence[Mapping[str, Any]]) -> str:
    """Text of the last user turn, without pictures and the labels of frames."""
    for message in reversed(messages):
        if message.get("role") == "user":
            content = message.get("content", "")
            if isinstance(content, str):
                return content
            texts = [part["text"] for part in content if part.get("type") == "text"]
            return " ".join(text.strip() for text in texts if not is_frame_label(text))
    return ""


def lettered(choices: Sequence[str]) -> list[str]:
    """Options with their letters, ``A. dog``, as models are shown them; at most 26."""
    return [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]


def frame_label(number: int, seconds: float) -> str:
    """The label before a frame in a prompt: its number (from 1) and its time to a hundredth of a second."""
    return f"Frame{number} {round(seconds, 2):g}s:"


def is_frame_label(text: str) -> bool:
    """Whether a text is one of :func:`frame_label`."""
    return _FRAME.fullmatch(text) is not None


@dataclass(frozen=True)
class Record:
    """One prompt with its truth.

    ``messages`` are chat messages whose content is a list of ``{"type": "image"}`` (taken in order from ``images``) and
    ``{"type": "text", "text": ...}`` parts. ``target`` holds the truth in **pixels of the original image**; its keys:

    - grounding: ``box`` (x1, y1, x2, y2), ``expression``
    - counting: ``label``, ``count``, ``points`` [(x, y), ...] or None, ``boxes`` or None
    - detection: ``boxes`` [[x1, y1, x2, y2], ...], ``labels`` [str, ...], ``crowd`` [bool, ...], ``categories`` [str]
    - ocr: ``text``
    - caption: ``references`` [str, ...], and if known ``objects``, ``attributes``, ``relations``
    - trajectory: ``tracks`` [{``id``, ``name``, ``boxes`` {frame number from 1: (x1, y1, x2, y2)}}, ...], ``frames``,
      ``seconds``, ``size``; for a dialogue also ``answer`` (the text to learn), ``query``, and ``tpl`` if known
    - qa: ``choices`` [str, ...] and ``answer`` (index of the right one, from 0), or ``answer`` yes or no; ``type``,
      ``question``; ``groups``, under which answers are right only if all are, and ``group_sizes``, how many questions
      each of them has (``fastrl.evaluate.groups``)
    """

    id: str
    task: str
    images: tuple[AnyPicture, ...]
    messages: tuple[Mapping[str, Any], ...]
    target: Mapping[str, Any]
    source: str = ""  # "file:line", for messages about this row
    origin: str = ""  # name of its entry in a mixture
    # The row's columns as they were read, except pictures; for user reward functions
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    views: tuple[View, ...] = field(default=())  # original and resized size of each image, filled in by the encoder
    frame: str = "auto"  # meaning of the model's coordinates (``fastrl.answers.FRAMES``)
    style: str = ""  # how the model writes answers (``fastrl.answers.STYLES``), filled in by the encoder


class Dataset(Sequence[Record]):
    """Records in order, and the rows that did not become one.

    ``problems`` are bad rows; ``left_out`` are valid rows with nothing to train on (such as a referring expression for
    an object that is absent). Both count as ``skipped``. ``notes`` are observations about rows that were kept (such as
    a gap in a track).
    """

    def __init__(
        self,
        records: Sequence[Record],
        problems: Sequence[Problem] = (),
        left_out: Sequence[Problem] = (),
        notes: Sequence[Problem] = (),
    ) -> None:
        self.records = records
        self.problems = tuple(problems)
        self.left_out = tuple(left_out)
        self.notes = tuple(notes)

    def fitting(self, misfit: Callable[[Record], str | None]) -> Dataset:
        """The records for which ``misfit`` returns None; the others become problems. Records that are made on demand
        (drawn scenes, clips) are not checked, because that would make all of them."""
        from fastrl.data.validate import Problem  # imported here, as it imports this module

        if not isinstance(self.records, list):
            return self
        kept: list[Record] = []
        found: list[Problem] = []
        for record in self.records:
            why = misfit(record)
            if why is None:
                kept.append(record)
            else:
                found.append(Problem(record.source or record.id, "no truth", why))
        return Dataset(kept, (*self.problems, *found), self.left_out, self.notes)

    @property
    def skipped(self) -> int:
        """Number of rows that did not become a record."""
        return len({problem.where for problem in (*self.problems, *self.left_out)})

    @property
    def reasons(self) -> dict[str, int]:
        """Reasons for skipped rows: kind → count, most frequent first."""
        return dict(Counter(problem.kind for problem in (*self.problems, *self.left_out)).most_common())

    @property
    def skips(self) -> str:
        """A line on the rows that were skipped; empty where none was."""
        reasons = ", ".join(f"{kind} {count}" for kind, count in self.reasons.items())
        return f"skipped {self.skipped} of {self.skipped + len(self)} rows: {reasons}" if reasons else ""

    @property
    def summary(self) -> str:
        """A line about skipped rows and one for each kind of note; empty if there are none."""
        lines = [self.skips] if self.skips else []
        first = {note.kind: note for note in reversed(self.notes)}
        for kind, count in Counter(note.kind for note in self.notes).items():
            more = f" (and {count - 1} more: {kind})" if count > 1 else ""
            lines.append(f"note: {first[kind]}{more}")
        return "\n".join(lines)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        return self.records[index]

    def __len__(self) -> int:
        return len(self.records)
