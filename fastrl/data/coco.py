"""COCO instance JSON → detection records (one per image) or counting records (one per image and category).

Query keys: ``images`` (folder of the image files), ``task`` (``detection`` or ``counting``), ``categories`` (names
separated by commas; default all), ``limit``, ``seed``, ``empty`` (detection: ``keep`` or ``drop`` images without an
instance), ``min_count`` and ``max_count`` (counting).

A detection record's id is the image id; a counting record's is ``image id/category``. Crowd regions stay in the truth
of detection, marked as such; a category with a crowd region in an image is not counted there. The prompt names the
categories. An image with a bad annotation is bad as a whole, since its truth would be incomplete.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fastrl.data import rows
from fastrl.data.pictures import AnyPicture
from fastrl.data.records import Dataset, Record, question
from fastrl.data.rows import Result, choice_option, collect, int_option, ordered, parse_json, read_text, reading
from fastrl.data.truth import box_value
from fastrl.data.validate import (
    DataError,
    ImageFolder,
    Problem,
    Row,
    corners,
    fail,
    find_image_folder,
    is_number,
    nearest,
    short,
)

KEYS = (*rows.KEYS, "task", "categories", "empty", "min_count", "max_count", "prompt")


class _Instance(NamedTuple):
    box: tuple[float, float, float, float]
    label: str
    crowd: bool


class _Options(NamedTuple):
    task: str
    names: list[str]  # requested categories, in the file's order
    ids: list[int | str]  # their ids in the file
    keep_empty: bool
    low: int
    high: int | None


def load(path: str, query: Mapping[str, str]) -> Dataset:
    """Read an instance file. Raises ``DataError`` for an unreadable file or option."""
    limit, seed = int_option(query, "limit", path, 1), int_option(query, "seed", path)
    data = _read(path)
    categories, groups = _categories(data, path)
    options = _options(query, categories, path)
    images = ordered(data["images"], seed)
    folder = Path(query["images"]) if "images" in query else _find_folder(path, images)
    pictures = ImageFolder(folder, reading(query, path))
    if not folder.is_dir() and not pictures.reading.stated:
        raise fail(path, "missing file", f"images folder not found: {folder}")
    annotations, orphans = _by_image(data, path)
    dataset = collect(_records(images, annotations, categories, pictures, options, path), limit, path, pictures)
    return Dataset(dataset.records, (*dataset.problems, *orphans), (*dataset.left_out, *groups), dataset.notes)


def _read(path: str) -> dict[str, Any]:
    data = parse_json(read_text(Path(path)), path)
    if isinstance(data, Problem):
        raise DataError([data])
    for key in ("images", "annotations", "categories"):
        if not isinstance(data, dict) or not isinstance(data.get(key), list):
            raise fail(path, "wrong type", f"no list {short(key)}: not a COCO instance file")
    return data


def _categories(data: Mapping[str, Any], path: str) -> tuple[dict[Any, str], list[Problem]]:
    """Names by id, and the categories that are left out: those that only group others and have no instance (in
    exports of annotation tools)."""
    categories: dict[Any, str] = {}
    for i, category in enumerate(data["categories"]):
        name = category.get("name") if isinstance(category, dict) else None
        if not isinstance(name, str) or not name.strip() or not _is_id(category.get("id")):
            raise fail(f"{path}:category {i}", "wrong type", f"needs an id and a name, got {short(category)}")
        if category["id"] in categories or name in categories.values():
            raise fail(f"{path}:category {i}", "duplicate id", f"id or name twice: {short(category)}")
        categories[category["id"]] = name
    above = {str(c.get("supercategory")) for c in data["categories"] if c.get("supercategory") != c["name"]}
    used = {str(a.get("category_id")) for a in data["annotations"] if isinstance(a, dict)}
    groups = {identity: name for identity, name in categories.items() if name in above and str(identity) not in used}
    left_out = [
        Problem(
            f"{path}:category {identity}", "supercategory", f"{name} only groups other categories; no instance has it"
        )
        for identity, name in groups.items()
    ]
    return {identity: name for identity, name in categories.items() if identity not in groups}, left_out


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


def _options(query: Mapping[str, str], categories: Mapping[Any, str], path: str) -> _Options:
    names = list(categories.values())
    asked = [name.strip() for name in query.get("categories", "").split(",") if name.strip()]
    for name in asked:
        if name not in names:
            raise fail(path, "unknown category", f"unknown category {short(name)}{nearest(name, names)}")
    return _Options(
        choice_option(query, "task", ("detection", "counting"), path),
        [name for name in names if not asked or name in asked],
        [identity for identity, name in categories.items() if not asked or name in asked],
        choice_option(query, "empty", ("keep", "drop"), path) == "keep",
        int_option(query, "min_count", path) or 1,
        int_option(query, "max_count", path),
    )


def _find_folder(path: str, images: list[Any]) -> Path:
    file = Path(path)
    split = file.stem.removeprefix("instances_")
    beside = [file.parent / split, file.parent.parent / split, file.parent.parent / "images" / split]
    names = (image.get("file_name", "") for image in images if isinstance(image, dict))
    return find_image_folder(file, names, [file.parent / "images", file.parent.parent / "images", *beside])


def _by_image(data: Mapping[str, Any], path: str) -> tuple[dict[Any, list[tuple[int, dict]]], list[Problem]]:
    """Annotations (with their index in the file) by image id, and those that belong to no image."""
    by_image: dict[Any, list[tuple[int, dict]]] = {}
    for image in data["images"]:
        if isinstance(image, dict) and _is_id(image.get("id")):
            by_image[image["id"]] = []
    orphans = []
    for i, annotation in enumerate(data["annotations"]):
        owner = annotation.get("image_id") if isinstance(annotation, dict) else None
        if isinstance(annotation, dict) and _is_id(owner) and owner in by_image:
            by_image[owner].append((i, annotation))
        else:
            where = _where(path, i, annotation)
            orphans.append(Problem(where, "unknown image", f"image_id {short(owner)} is not an image of the file"))
    return by_image, orphans


class _Once:
    """Detects repeated annotations, by id or by content."""

    def __init__(self) -> None:
        self._ids: dict[Any, int] = {}
        self._contents: dict[str, int] = {}

    def check(self, row: Row, annotation: Mapping[str, Any], index: int) -> None:
        identity = annotation.get("id")
        if identity is not None and not _is_id(identity):
            row.fail("wrong type", f"id must be an integer or a string, got {short(identity)}")
        elif identity is not None and self._ids.setdefault(identity, index) != index:
            row.fail("repeated annotation", f"id {short(identity)} is already that of number {self._ids[identity]}")
            return
        box = box_value(annotation.get("bbox"))
        box = [float(v) for v in box] if isinstance(box, list) and all(is_number(v) for v in box) else box
        crowd = bool(annotation.get("iscrowd"))
        content = repr([box, crowd, *(annotation.get(key) for key in ("image_id", "category_id", "segmentation"))])
        if self._contents.setdefault(content, index) != index:
            row.fail(
                "repeated annotation",
                f"same content as number {self._contents[content]}; no object may occur twice",
            )


def _where(path: str, index: int, annotation: Any) -> str:
    identity = annotation.get("id", "?") if isinstance(annotation, dict) else "?"
    return f"{path}:annotation {identity} (number {index})"


def _records(
    images: list[Any],
    annotations: Mapping[Any, list[tuple[int, dict]]],
    categories: Mapping[Any, str],
    folder: ImageFolder,
    options: _Options,
    path: str,
) -> Iterator[Result]:
    once = _Once()
    for i, image in enumerate(images):
        if not isinstance(image, dict):
            yield [Problem(f"{path}:image number {i}", "wrong type", f"must be an object, got {short(image)}")]
            continue
        where = f"{path}:image {image.get('id', '?')}"
        row = Row(image, where, i, folder)
        if image.get("id") is None:
            row.fail("missing field", "no id")
        identity, file = row.id(), row.image("file_name")
        if file is None or row.problems:
            yield row.problems
            continue
        instances = []
        for index, annotation in annotations[image["id"]]:
            row.where = _where(path, index, annotation)
            once.check(row, annotation, index)
            instances.append(_instance(row, annotation, categories, file[1]))
        if row.problems:
            yield row.problems
            continue
        valid = [instance for instance in instances if instance is not None and instance.label in options.names]
        if options.task == "detection":
            yield _detection(identity, file[0], valid, options, where)
        else:
            yield from _countings(identity, file[0], valid, options, where)


def _instance(
    row: Row, annotation: Mapping[str, Any], categories: Mapping[Any, str], size: tuple[int, int]
) -> _Instance | None:
    category = annotation.get("category_id")
    label = categories.get(category) if _is_id(category) else None
    if label is None:
        row.fail("unknown category", f"category_id {short(category)} is not a category of the file")
    valid = row.box(corners(annotation.get("bbox")), size, "bbox (as x1, y1, x2, y2)")
    area = annotation.get("area")
    if area is not None and not (is_number(area) and area >= 0):
        row.fail("wrong type", f"area must be a number of at least 0, got {short(area)}")
    crowd = annotation.get("iscrowd")
    if crowd is not None and crowd not in (0, 1):
        row.fail("wrong type", f"iscrowd must be 0 or 1, got {short(crowd)}")
    return None if valid is None or label is None else _Instance(valid, label, bool(crowd))


def _detection(
    identity: str, file: AnyPicture, instances: list[_Instance], options: _Options, where: str
) -> Record | tuple[Problem]:
    if not instances and not options.keep_empty:
        return (Problem(where, "no instances", "no instance of the requested categories"),)
    target = {
        "boxes": [list(instance.box) for instance in instances],
        "labels": [instance.label for instance in instances],
        "crowd": [instance.crowd for instance in instances],
        "categories": list(options.names),
        "category_ids": list(options.ids),
    }
    messages = question("detection", ", ".join(options.names))
    return Record(identity, "detection", (file,), messages, target, source=where)


def _countings(
    identity: str, file: AnyPicture, instances: list[_Instance], options: _Options, where: str
) -> Iterator[Record | tuple[Problem]]:
    crowded = {instance.label for instance in instances if instance.crowd}
    for name in options.names:
        boxes = [list(instance.box) for instance in instances if instance.label == name]
        if not boxes:
            continue
        place = f"{where}/{name}"
        if name in crowded:
            yield (Problem(place, "crowd", f"{name} has a crowd region: its instances cannot be counted"),)
        elif len(boxes) < options.low or (options.high is not None and len(boxes) > options.high):
            yield (Problem(place, "count out of range", f"{len(boxes)} of {name}"),)
        else:
            target = {"label": name, "count": len(boxes), "points": None, "boxes": boxes}
            yield Record(f"{identity}/{name}", "counting", (file,), question("counting", name), target, source=place)
