"""``hallusion:HallusionBench.json`` → yes/no records (arXiv:2310.14566).

The file is a list of ``category`` (VD, VS), ``subcategory``, ``visual_input`` (0: no picture), ``set_id``,
``figure_id``, ``question_id``, ``question``, ``gt_answer`` (1: yes, 0: no). A picture is
``CATEGORY/SUBCATEGORY/SET_FIGURE.png`` in ``images``, as the authors' code has it, or in the row, as tables have it. A
record belongs to the groups ``figure`` (its picture) and ``pair`` (the same question about other pictures), of which
``fastrl eval qa`` reports how many are right as a whole. Answers are read as yes or no; the authors have a language
model judge them.

Query keys: ``images`` (folder of the pictures), ``limit``, ``seed``, ``prompt``. Without ``images`` the records have no
pictures, which is enough to score answers from a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastrl.data import rows
from fastrl.data.pictures import AnyPicture, holds_picture
from fastrl.data.qa import YES_NO_PROMPT
from fastrl.data.records import Dataset, Record, question
from fastrl.data.rows import load_rows, reading
from fastrl.data.truth import whole_number
from fastrl.data.validate import Row, short

KEYS = (*rows.KEYS, "prompt")
CATEGORIES = ("VD", "VS")


def load(path: str, query: Mapping[str, str]) -> Dataset:
    """Read HallusionBench. Raises ``DataError`` for an unreadable file or option."""
    pictures = "images" in query and not reading(query, path).stated
    return load_rows(path, query, lambda row: _record(row, pictures))


def _record(row: Row, pictures: bool) -> Record | None:
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
    # Questions about no figure have no entry in the accuracy by figure, and "I do not know" is a right answer to them.
    bare = category == "VS" and figure == 0
    groups = {"pair": f"{category}_{group}_{place}_{number}"}
    groups |= {} if bare else {"figure": f"{category}_{group}_{place}_{figure}"}
    target: dict[str, Any] = {"answer": "yes" if answer else "no", "question": asked, "type": category}
    target |= {"groups": groups, "subcategory": group} | ({"unsure_is_right": True} if bare else {})
    messages = question("qa", images=int(image is not None), prompt=f"{asked} {YES_NO_PROMPT}")
    identity = f"{category}_{group}_{place}_{figure}_{number}"
    return Record(identity, "qa", (image[0],) if image else (), messages, target)


def _picture(row: Row, name: str, wanted: bool) -> tuple[AnyPicture, tuple[int, int]] | None:
    """The figure: the row's own, as tables have it, or the file of that name."""
    if holds_picture(row.fields.get("image")):
        return row.image("image")
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
