"""``mme:FOLDER`` or ``mme:FILE``: MME (arXiv:2306.13394) → yes/no records, two for each picture.

- the released folder: a folder for each category with pictures and, beside them or in ``questions_answers_YN`` (then
  the pictures are in ``images``), a text file of the same name with two lines ``question<TAB>Yes``
- rows: ``question_id`` (the same for both questions of a picture), ``image``, ``question``, ``answer``, ``category``

The group ``mme`` of a record is its picture: ``fastrl eval qa`` reports accuracy, accuracy+ (both right) and their sum,
the score, by category.

Query keys: ``images`` (of row files: folder the image names start from, ``none``: no pictures), ``limit`` (even: no
picture's questions are parted), ``prompt``, ``split``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastrl.data.page_ocr import IMAGE_SUFFIXES
from fastrl.data.records import Dataset, Record, question
from fastrl.data.rows import READING, int_option, load_rows, read_text, reading
from fastrl.data.tables import is_table
from fastrl.data.truth import read_id
from fastrl.data.validate import Problem, Row, fail, short

KEYS = ("images", "split", "limit", "prompt", *READING)


def load(path: str, query: Mapping[str, str]) -> Dataset:
    """Read MME. Raises ``DataError`` for an unreadable file or option."""
    limit = int_option(query, "limit", path, 2)
    if limit is not None and limit % 2:
        raise fail(path, "bad option", f"limit must be even, got {limit}: MME asks two questions about each picture")
    folder = Path(path).is_dir() and not is_table(Path(path))
    if folder and "images" in query:
        raise fail(path, "bad option", "images is for row files; the released folder holds its pictures itself")
    pictures = query.get("images") != "none" and not reading(query, path).stated
    plain = {key: value for key, value in query.items() if pictures or key != "images"}
    plain |= {"images": path} if folder else {}
    seen: Counter[str] = Counter()
    given = list(_folder_rows(Path(path))) if folder else None
    data = load_rows(path, plain, lambda row: _record(row, seen, pictures), given)
    return _paired(data, seen, path)


def _paired(data: Dataset, seen: Counter[str], path: str) -> Dataset:
    """Without the questions about pictures that do not have two: those would count as a pair, and are bad rows."""
    kept: list[Record] = []
    problems = list(data.problems)
    for record in data:
        key = record.target["groups"]["mme"]
        if seen[key] == 2:
            kept.append(record)
        else:
            message = f"{seen[key]} readable questions about a picture that has two in MME"
            problems.append(Problem(f"{path}:{key}", "unpaired question", message))
    return Dataset(kept, problems, data.left_out, data.notes)


def _record(row: Row, seen: Counter[str], pictures: bool) -> Record | None:
    category, asked, answer = row.text("category"), row.text("question"), row.text("answer")
    name = read_id(row.fields.get("question_id"))
    if name is None:
        row.fail(
            "wrong type", f"question_id must be a string or an integer, got {short(row.fields.get('question_id'))}"
        )
    said = answer.strip(" .").lower() if answer is not None else ""
    if answer is not None and said not in ("yes", "no"):
        row.fail("wrong answer", f"answer must be Yes or No, got {short(answer)}")
    image = row.image("image") if pictures else None
    if row.problems or category is None or asked is None or name is None:
        return None
    key = name if name.startswith(f"{category}/") else f"{category}/{name}"
    seen[key] += 1
    target: dict[str, Any] = {"answer": said, "question": asked, "type": category}
    target |= {"groups": {"mme": key}, "group_sizes": {"mme": 2}}
    messages = question("qa", images=int(image is not None), prompt=asked)
    return Record(f"{key}/{seen[key]}", "qa", (image[0],) if image else (), messages, target)


def _folder_rows(folder: Path) -> Iterator[tuple[int, str, Mapping[str, Any] | Problem]]:
    """A row for each line of the text files of the released folder."""
    number = 0
    files = sorted([*folder.glob("*/*.txt"), *folder.glob("*/questions_answers_YN/*.txt")])
    if not files:
        raise fail(str(folder), "missing file", "no CATEGORY/NAME.txt or CATEGORY/questions_answers_YN/NAME.txt in it")
    for file in files:
        home = file.parent.parent if file.parent.name == "questions_answers_YN" else file.parent
        shown = home / "images" if home != file.parent else home
        suffix = next((s for s in IMAGE_SUFFIXES if (shown / f"{file.stem}{s}").is_file()), IMAGE_SUFFIXES[0])
        image = str((shown / f"{file.stem}{suffix}").relative_to(folder))
        for line_number, line in enumerate(read_text(file).splitlines(), start=1):
            if not line.strip():
                continue
            where, (asked, _, answer) = f"{file}:{line_number}", line.rpartition("\t")
            row = {"question_id": file.stem, "image": image, "question": asked, "answer": answer}
            fault = Problem(where, "wrong length", "expected question<TAB>answer")
            yield number, where, {**row, "category": home.name} if asked else fault
            number += 1
