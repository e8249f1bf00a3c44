"""Text lines, words and pages → OCR records.

Either a row file with ``image`` and ``text``, or a folder of page images, each with its transcript next to it
(``page.png`` and ``page.txt``; the record's id is the file's stem).

Query keys: ``images`` (folder the image paths start from), ``limit``, ``seed``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from fastrl.data import rows
from fastrl.data.records import Dataset, Record, question
from fastrl.data.rows import IMAGE_FIELDS, collect, int_option, load_rows, ordered, read_text, reading
from fastrl.data.tables import is_table
from fastrl.data.validate import DataError, ImageFolder, Problem, Row, fail

KEYS = (*rows.KEYS, "prompt")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp")


def load(path: str, query: Mapping[str, str]) -> Dataset:
    """Read a row file or a folder of pages. Raises ``DataError`` for an unreadable file or option."""
    if not Path(path).is_dir() or is_table(Path(path)):
        return load_rows(path, query, _record)
    if "images" in query:
        raise fail(path, "bad option", "images is for row files; a folder of pages holds its images itself")
    limit, seed = int_option(query, "limit", path, 1), int_option(query, "seed", path)
    pages = sorted(p for p in Path(path).iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    images = ImageFolder(Path(path), reading(query, path))
    return collect(_pages(ordered(pages, seed), images), limit, path, images)


def _pages(pages: list[Path], images: ImageFolder) -> Iterator[Record | list[Problem]]:
    for page in pages:
        fields = {"id": page.stem, "image": page.name}
        transcript = page.with_suffix(".txt")
        try:
            fields["text"] = read_text(transcript)
        except DataError as error:
            yield list(error.problems)
            continue
        row = Row(fields, str(page), 0, images)
        record = _record(row)
        yield row.problems if record is None else record


def _record(row: Row) -> Record | None:
    identity, text, image = row.id(), row.text("text"), row.image(*IMAGE_FIELDS)
    if row.problems or text is None or image is None:
        return None
    return Record(identity, "ocr", (image[0],), question("ocr"), {"text": text}, source=row.where)
