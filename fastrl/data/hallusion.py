"""``hallusion:HallusionBench.json`` → yes/no records (arXiv:2310.14566).

The file is a list of ``category`` (VD, VS), ``subcategory``, ``visual_input`` (0: no picture), ``set_id``,
``figure_id``, ``question_id``, ``question``, ``gt_answer`` (1: yes, 0: no). A picture is
``CATEGORY/SUBCATEGORY/SET_FIGURE.png`` in ``images``, as the authors' code has it, or in the row, as tables have it. A
record belongs to the groups ``figure`` (its picture) and ``pair`` (the same question about other pictures), of which
``fastrl eval qa`` reports how many are right as a whole; a group of which a question is missing (a bad row that was
skipped, or one after the limit) is counted in neither. Answers are read as yes or no; the authors have a language
model judge them.

Query keys: ``images`` (folder of the pictures), ``limit``, ``seed``, ``prompt``. Without ``images`` the records have no
pictures, which is enough to score answers from a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastrl.data import rows
from fastrl.data.pictures import AnyPicture, holds_picture
from fastrl.data.qa import YES_NO_PROMPT
from fastrl.data.records import Dataset, Record, question
from fastrl.data.rows import load_rows, read_rows, reading
from fastrl.data.truth import is_empty, whole_number
from fastrl.data.validate import Problem, Row, short

KEYS = (*rows.KEYS, "prompt")
CATEGORIES = ("VD", "VS")
Sizes = Mapping[tuple[str, str], int]  # (heading, name of a group) → number of its questions


def load(path: str, query: Mapping[str, str]) -> Dataset:
    """Read HallusionBench. Raises ``DataError`` for an unreadable file or option."""
    stated = reading(query, path).stated
    pictures, sizes = None if stated else "images" in query, _sizes(path, query.get("split"))
    return load_rows(path, query, lambda row: _record(row, pictures, sizes))


def _sizes(path: str, split: str | None) -> Sizes:
    """How many questions each group has in the whole file, bad ones included if their numbers can be read."""
    members: dict[tuple[str, str], set[tuple[int | None, ...]]] = {}
    for _, _, fields in read_rows(Path(path), split):
        if isinstance(fields, Problem):
            continue
        place, figure, number = (whole_number(fields.get(name)) for name in ("set_id", "figure_id", "question_id"))
        for group in _groups(fields.get("category"), fields.get("subcategory"), place, figure, number).items():
            members.setdefault(group, set()).add((figure, number))
    return {group: len(each) for group, each in members.items()}


def _groups(category: Any, group: Any, place: int | None, figure: int | None, number: int | None) -> dict[str, str]:
    """The groups of a question, of which those are left out that its numbers do not tell."""
    if not isinstance(category, str) or not isinstance(group, str) or place is None:
        return {}
    of = f"{category.strip()}_{group.strip()}_{place}"
    found = {} if number is None else {"pair": f"{of}_{number}"}
    # Questions about no figure have no entry in the accuracy by figure
    return found if figure is None or _bare(category.strip(), figure) else found | {"figure": f"{of}_{figure}"}


def _bare(category: str, figure: int) -> bool:
    """Whether a question is about no figure: then "I do not know" is a right answer to it."""
    return category == "VS" and figure == 0


def _record(row: Row, pictures: bool | None, sizes: Sizes) -> Record | None:
    category, group, asked = row.text("category"), row.text("subcategory"), row.text("question")
    numbers = [_number(row, name) for name in ("set_id", "figure_id", "question_id", "visual_input", "gt_answer")]
    if category is not None and category not in CATEGORIES:
        row.fail("wrong type", f"category must be one of {', '.join(CATEGORIES)}, got {short(category)}")
    if group is not None and ("/" in group or group in ("", ".", "..")):
        row.fail("wrong type", f"subcategory must be the name of a folder, got {short(group)}")
    if numbers[4] not in (0, 1, None):
        row.fail("wrong answer", f"gt_answer must be 1 (yes) or 0 (no), got {short(numbers[4])}")
    if row.problems or category is None or group is None or asked is None:
        return None
    place, figure, number, visual, answer = numbers
    image = _picture(row, f"{category}/{group}/{place}_{figure}.png", pictures) if visual else None
    if row.problems:
        return None
    groups, bare = _groups(category, group, place, figure, number), _bare(category, figure or 0)
    target: dict[str, Any] = {"answer": "yes" if answer else "no", "question": asked, "type": category}
    target |= {"groups": groups, "group_sizes": {heading: sizes[heading, name] for heading, name in groups.items()}}
    target |= {"subcategory": group} | ({"unsure_is_right": True} if bare else {})
    messages = question("qa", images=int(image is not None), prompt=f"{asked} {YES_NO_PROMPT}")
    identity = f"{category}_{group}_{place}_{figure}_{number}"
    return Record(identity, "qa", (image[0],) if image else (), messages, target)


def _picture(row: Row, name: str, wanted: bool | None) -> tuple[AnyPicture, tuple[int, int]] | None:
    """The figure: the row's own, as tables have it, or the file of that name; ``wanted`` is None if it may be
    missing."""
    if holds_picture(row.fields.get("image")):
        return row.image("image")
    if wanted is False and "image" in row.fields and is_empty(row.fields["image"]):
        row.fail("missing image", f"image is empty, but the question is about {name}")
    if not wanted:
        return None
    named = Row({"image": name}, row.where, row.number, row.images)
    image = named.image("image")
    row.problems += named.problems
    return image


def _number(row: Row, name: str) -> int | None:
    """A whole number from 0, also as a text."""
    value = whole_number(row.fields.get(name))
    if value is None or value < 0:
        row.fail("wrong type", f"{name} must be a whole number from 0, got {short(row.fields.get(name))}")
    return value
