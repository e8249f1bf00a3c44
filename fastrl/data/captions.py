"""Reference captions: ``captions:FILE`` → caption records, from COCO's caption JSON or from rows.

- COCO's ``captions_*.json``: one record per image with its captions as references. Query key ``instances`` names the
  matching instance JSON, whose categories then count as present in the picture (for CHAIR).
- JSONL (or a JSON list): ``{"image": …, "references": [str, …], "prompt"?: str, "objects"?: [str, …], "id"?}``;
  ``captions`` and ``human_captions`` are read as ``references`` too, and so are the columns of DetailCaps-4870
  (``GT_Caption_GPT4O``, ``GT_Caption_GPT4V``, ``GT_Caption_Gemini15Pro``; the picture in ``binary``, as bytes or in
  base64).

Other query keys: ``images`` (folder), ``limit``, ``seed``, ``prompt`` (see ``prompts``; default the row's own, else
RePer's). With
``images=none`` records have no picture, for scoring existing captions.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastrl.data import rows
from fastrl.data.records import Dataset, Record, question
from fastrl.data.rows import IMAGE_FIELDS, LeftOut, load_rows, parse_json, read_text
from fastrl.data.truth import is_empty, read_truth
from fastrl.data.validate import DataError, Problem, Row, fail, short

KEYS = (*rows.KEYS, "instances", "prompt")
REFERENCES = ("references", "captions", "human_captions")
DETAILCAPS = ("GT_Caption_GPT4O", "GT_Caption_GPT4V", "GT_Caption_Gemini15Pro")  # its three references


def load(path: str, query: Mapping[str, str]) -> Dataset:
    """Read a file of reference captions. Raises ``DataError`` for an unreadable file or option."""
    pictures = query.get("images") != "none"
    plain = {k: v for k, v in query.items() if pictures or k != "images"}
    is_coco = path.endswith(".json") and not read_text(Path(path)).lstrip().startswith("[")
    given = _coco_rows(path, query.get("instances")) if is_coco else None
    return load_rows(path, plain, lambda row: _record(row, pictures), given)


def _record(row: Row, pictures: bool) -> Record | LeftOut | None:
    identity = row.id()
    name, value = row.first(REFERENCES)
    value = read_truth(value)
    detailed = [column for column in DETAILCAPS if column in row.fields]
    if name not in row.fields and detailed:
        name, value = detailed[0], [row.fields[each] for each in detailed if not is_empty(row.fields[each])]
    # DetailCaps has the bytes in ``binary`` and the name of the original in ``image``
    image = row.image("binary", *IMAGE_FIELDS) if pictures else None
    if name not in row.fields:
        row.fail("missing field", f"no {', '.join(REFERENCES)} or {', '.join(DETAILCAPS)}")
    elif not isinstance(value, list) or not all(isinstance(v, str) and v.strip() for v in value):
        row.fail("wrong type", f"{name} must be a list of captions, got {short(value)}")
    objects = row.truth("objects", [])
    if not isinstance(objects, list) or not all(isinstance(o, str) for o in objects):
        row.fail("wrong type", f"objects must be a list of names, got {short(objects)}")
    if row.problems or (pictures and image is None):
        return None
    if not value:
        return LeftOut("no references", "has no reference captions")
    words = row.fields.get("prompt")
    asked = question("caption", images=int(pictures), prompt=words if isinstance(words, str) and words else None)
    target: dict[str, Any] = {"references": list(value)}
    if objects:
        target["objects"] = list(objects)
    return Record(identity, "caption", (image[0],) if image else (), asked, target)


def _coco_rows(path: str, instances: str | None) -> rows.Rows:
    """COCO caption JSON as rows: one per image that has captions; entries that are malformed are problems."""
    captions = _read_json(path)
    problems: list[Problem] = []
    captions_of: dict[Any, list[str]] = {}
    for image, entry in _of_images(captions, "annotations", "caption", str, path, problems):
        captions_of.setdefault(image, []).append(" ".join(entry.split()))
    objects: dict[Any, list[str]] = {}
    if instances is not None:
        found = _read_json(instances)
        names = dict(_of_images(found, "categories", "name", str, instances, problems, key="id"))
        for image, entry in _of_images(found, "annotations", "category_id", int | str, instances, problems):
            if entry in names:
                objects.setdefault(image, []).append(names[entry])
            else:
                problems.append(Problem(instances, "unknown category", f"category_id {short(entry)} is no category"))
    sizes = {
        each.get("id"): {side: each[side] for side in ("width", "height") if side in each}
        for each in captions.get("images") or []
        if isinstance(each, Mapping) and isinstance(each.get("id"), int | str)
    }
    listed = _of_images(captions, "images", "file_name", str, path, problems, key="id")
    made: list[dict[str, Any]] = [
        {
            "id": str(image),
            "image": name,
            **sizes[image],
            "references": captions_of[image],
            "objects": sorted(set(objects.get(image, []))),
        }
        for image, name in listed
        if image in captions_of
    ]
    rows = [(n, f"{path}:image {row['id']}", row) for n, row in enumerate(made)]
    return [*rows, *((len(rows) + n, problem.where, problem) for n, problem in enumerate(problems))]


def _of_images(
    data: Mapping[str, Any], table: str, name: str, kind: Any, path: str, problems: list[Problem], key: str = "image_id"
) -> list[tuple[Any, Any]]:
    """(``key``, ``name``) of each entry of a table; those without are problems."""
    found = []
    entries = data.get(table)
    if not isinstance(entries, list):
        raise fail(path, "wrong type", f"expected COCO JSON: an object with a list of {table}")
    for number, each in enumerate(entries):
        values = (each.get(key), each.get(name)) if isinstance(each, Mapping) else (None, None)
        if isinstance(values[0], int | str) and isinstance(values[1], kind):
            found.append(values)
        else:
            message = f"needs {key} and {name}, got {short(each)}"
            problems.append(Problem(f"{path}:{table} number {number}", "wrong type", message))
    return found


def _read_json(path: str) -> dict[str, Any]:
    value = parse_json(read_text(Path(path)), path)
    if isinstance(value, Problem):
        raise DataError([value])
    if not isinstance(value, dict) or not isinstance(value.get("annotations"), list):
        raise fail(path, "wrong type", "expected COCO JSON: an object with images and annotations")
    return value
