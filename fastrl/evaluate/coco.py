"""Detection evaluation: COCO average precision with pycocotools; boxes without a score get score 1."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

from fastrl.data.records import Record
from fastrl.rewards.detection import label_key
from fastrl.rewards.reading import read_boxes, to_pixels

MAX_BOXES = 20_000  # read from one answer; COCO scores the best 100 per image and category

_COCO_NAMES = (
    "person; bicycle; car; motorcycle; airplane; bus; train; truck; boat; traffic light; fire hydrant; stop sign; "
    "parking meter; bench; bird; cat; dog; horse; sheep; cow; elephant; bear; zebra; giraffe; backpack; umbrella; "
    "handbag; tie; suitcase; frisbee; skis; snowboard; sports ball; kite; baseball bat; baseball glove; skateboard; "
    "surfboard; tennis racket; bottle; wine glass; cup; fork; knife; spoon; bowl; banana; apple; sandwich; orange; "
    "broccoli; carrot; hot dog; pizza; donut; cake; chair; couch; potted plant; bed; dining table; toilet; tv; "
    "laptop; mouse; remote; keyboard; cell phone; microwave; oven; toaster; sink; refrigerator; book; clock; vase; "
    "scissors; teddy bear; hair drier; toothbrush"
)
_COCO_UNUSED = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}  # of the ids 1 to 90
COCO_2017: Mapping[int | str, str] = dict(
    zip((i for i in range(1, 91) if i not in _COCO_UNUSED), _COCO_NAMES.split("; "), strict=True)
)


def category_names(records: Sequence[Record]) -> Mapping[int | str, str]:
    """Category id → name for result files about ``records``.

    Taken from the targets' ``category_ids`` (the COCO adapter sets them, in the order of ``categories``); records
    without them are assumed to have the ids of COCO 2017.

    Raises:
        ValueError: records without ids have a category that is not COCO's.
    """
    given: dict[int | str, str] = {}
    for record in records:
        target = record.target
        given.update(zip(target.get("category_ids") or (), target["categories"], strict=False))
    if given:
        return given
    known = {label_key(name) for name in COCO_2017.values()}
    for record in records:
        for name in record.target["categories"]:
            if label_key(name) not in known:
                raise ValueError(
                    f"{record.source or record.id}: category {name!r} is not one of COCO's 80, so the category ids of "
                    "a COCO result file are unknown; give categories={id: name}"
                )
    return dict(COCO_2017)


def evaluate_detection(records: Sequence[Record], answers: Sequence[str]) -> dict[str, float | None]:
    """``AP`` (mean over IoU 0.5 to 0.95), ``AP50``, ``AP75``, ``n``, ``unparsable``, and counts that explain a low AP.

    AP is None (undefined) if the data has no object. Boxes are converted to pixels of the original image. Labels are
    case-insensitive. Of the boxes of all answers, ``dropped`` are malformed, ``unlabelled`` have no readable label, and
    ``unknown_label`` have one outside the records' categories; none of these is scored or counts against the answer.
    Boxes of equal score rank by image id, then in the answer's order, so the order of the records does not matter.
    Crowd regions are ignored as in COCO.
    """
    names = sorted({label_key(name) for record in records for name in record.target["categories"]})
    category_of = {name: i for i, name in enumerate(names, 1)}
    image_ids = _image_ids(records)
    truths: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    counts = dict.fromkeys(("unparsable", "dropped", "unlabelled", "unknown_label"), 0)
    for image_id, record, answer in zip(image_ids, records, answers, strict=True):
        target = record.target
        crowd = target.get("crowd") or [False] * len(target["boxes"])
        for box, label, is_crowd in zip(target["boxes"], target["labels"], crowd, strict=True):
            row = _row(len(truths) + 1, image_id, category_of[label_key(label)], box)
            truths.append({**row, "iscrowd": int(is_crowd)})
        parsed = read_boxes(answer, MAX_BOXES)
        counts["unparsable"] += not parsed.parsable
        counts["dropped"] += parsed.dropped
        for item, box in zip(parsed.items, to_pixels(parsed, record), strict=True):
            category = category_of.get(label_key(item.label))
            if category is None:
                counts["unlabelled" if item.label is None else "unknown_label"] += 1
            else:
                row = _row(len(found) + 1, image_id, category, box)
                found.append({**row, "iscrowd": 0, "score": 1.0 if item.score is None else item.score})
    stats = _average_precision(image_ids, sorted(category_of.values()), truths, found)
    defined = [None if value < 0 else value for value in stats]  # pycocotools says -1
    return {"AP": defined[0], "AP50": defined[1], "AP75": defined[2], "n": len(answers), **counts}


def _image_ids(records: Sequence[Record]) -> list[int]:
    """Distinct numbers for the records: their ids if all are numbers (as in COCO), else their rank by id."""
    names = [record.id for record in records]
    if len(set(names)) != len(names):
        twice = sorted(name for name in set(names) if names.count(name) > 1)[0]
        raise ValueError(f"two records have the id {twice!r}: detection is scored per image")
    if all(name.isascii() and name.isdigit() and len(name) <= 15 for name in names):
        numbers = [int(name) for name in names]
        if len(set(numbers)) == len(numbers):
            return numbers
    rank = {name: i for i, name in enumerate(sorted(names), 1)}
    return [rank[name] for name in names]


def _row(number: int, image_id: int, category: int, box: Sequence[float]) -> dict[str, Any]:
    """One annotation in COCO's form; inverted corners give an empty box, which matches nothing."""
    x, y = float(box[0]), float(box[1])
    width, height = max(float(box[2]) - x, 0.0), max(float(box[3]) - y, 0.0)
    place = {"id": number, "image_id": image_id, "category_id": category}
    return {**place, "bbox": [x, y, width, height], "area": width * height}


def _average_precision(
    image_ids: Sequence[int],
    categories: Sequence[int],
    truths: Sequence[Mapping[str, Any]],
    found: Sequence[Mapping[str, Any]],
) -> list[float]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def index(annotations: Sequence[Mapping[str, Any]]) -> COCO:
        tables: Any = {
            "images": [{"id": i} for i in image_ids],
            "categories": [{"id": c} for c in categories],
            "annotations": list(annotations),
        }
        coco = COCO()
        coco.dataset = tables
        coco.createIndex()
        return coco

    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its progress on stdout
        scored = COCOeval(index(truths), index(found), "bbox")
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
    # pycocotools' epsilon keeps a perfect score slightly below 1
    return [round(float(value), 12) for value in scored.stats[:3]]
