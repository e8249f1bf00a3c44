"""``refcoco:refs(unc).p``: RefCOCO, RefCOCO+ and RefCOCOg as they were released → grounding records.

The pickle (read without running code from it, see ``plain_pickle``) is a list of references: ``ref_id, ann_id,
image_id, split`` and ``sentences``, each with ``sent_id`` and ``sent``. Boxes and picture files are in the COCO
instance JSON beside it. A record is one sentence, its id the ``sent_id``.

Query keys: ``instances`` (default ``instances.json`` beside the pickle), ``images`` (folder of COCO's train2014),
``split`` (``train``, ``val``, ``testA``, …; default all), ``limit``, ``seed``, ``prompt``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastrl.data import refexp, rows
from fastrl.data.plain_pickle import read_plain_pickle
from fastrl.data.records import Dataset
from fastrl.data.rows import load_rows, parse_json, read_text
from fastrl.data.validate import DataError, Problem, corners, fail, nearest, short

KEYS = (*rows.KEYS, "instances", "prompt")
Sentences = Iterator[tuple[str, Mapping[str, Any] | Problem]]  # (where, row)


def load(path: str, query: Mapping[str, str]) -> Dataset:
    """Read a file of references. Raises ``DataError`` for an unreadable file or option."""
    refs = read_plain_pickle(Path(path))
    if not isinstance(refs, list) or not all(isinstance(ref, dict) for ref in refs):
        raise fail(path, "wrong type", f"expected a list of references, got {type(refs).__name__}")
    split = query.get("split")
    splits = list(dict.fromkeys(str(ref.get("split")) for ref in refs))
    if split is not None and split not in splits:
        raise fail(path, "bad option", f"no split {short(split)}{nearest(split, splits)}")
    instances = query.get("instances", str(Path(path).with_name("instances.json")))
    annotations, images = _instances(instances)
    chosen = [(number, ref) for number, ref in enumerate(refs) if split in (None, str(ref.get("split")))]
    found = [
        row for number, ref in chosen for row in _sentences(f"{path}:reference {number}", ref, annotations, images)
    ]
    given = [(number, where, row) for number, (where, row) in enumerate(found)]
    plain = {key: value for key, value in query.items() if key != "split"}
    return load_rows(path, plain, lambda row: refexp.record(row, "xyxy", "original", "paper"), given)


def _instances(path: str) -> tuple[dict[Any, Mapping[str, Any]], dict[Any, Mapping[str, Any]]]:
    """Annotations and images of a COCO file by their ids."""
    value = parse_json(read_text(Path(path)), path)
    if isinstance(value, Problem):
        raise DataError([value])
    tables = []
    for name in ("annotations", "images"):
        entries = value.get(name) if isinstance(value, dict) else None
        if not isinstance(entries, list):
            raise fail(path, "wrong type", f"no list {short(name)}: not a COCO instance file")
        tables.append({e["id"]: e for e in entries if isinstance(e, dict) and isinstance(e.get("id"), int | str)})
    return tables[0], tables[1]


def _sentences(
    where: str,
    ref: Mapping[str, Any],
    annotations: Mapping[Any, Mapping[str, Any]],
    images: Mapping[Any, Mapping[str, Any]],
) -> Sentences:
    """A row for each sentence of a reference, in the form of ``refexp``."""
    annotation, image = _entry(annotations, ref.get("ann_id")), _entry(images, ref.get("image_id"))
    sentences = ref.get("sentences")
    if annotation is None or image is None:
        key, owner = ("ann_id", "annotations") if annotation is None else ("image_id", "images")
        yield where, Problem(where, "unknown id", f"{key} {short(ref.get(key))} is not among the instances' {owner}")
        return
    if annotation.get("image_id", ref["image_id"]) != ref["image_id"]:
        message = f"annotation {ref['ann_id']} is of image {short(annotation['image_id'])}, not of {ref['image_id']}"
        yield where, Problem(where, "wrong image", message)
        return
    if not isinstance(sentences, list) or not all(isinstance(s, dict) for s in sentences):
        yield where, Problem(where, "wrong type", f"sentences must be a list of them, got {short(sentences)}")
        return
    size = {side: image[side] for side in ("width", "height") if side in image}
    for place, sentence in enumerate(sentences):
        row = {
            "id": sentence.get("sent_id"),
            "image": image.get("file_name"),
            **size,
            "expression": sentence.get("sent"),
            "bbox": corners(annotation.get("bbox")),
            "ref_id": ref.get("ref_id"),
            "split": ref.get("split"),
        }
        yield f"{where}, sentence {place}", row


def _entry(table: Mapping[Any, Mapping[str, Any]], key: Any) -> Mapping[str, Any] | None:
    return table.get(key) if isinstance(key, int | float | str) else None  # 17.0 finds 17
