"""Train on data of your own, from Python: a function that reads your files and yields records.

The "files" are made here: pictures of coloured squares, and a CSV with the square to find. Your function replaces
``rows``; on the command line the same is ``--set data.adapter=examples/own_data.py:rows --data squares.csv``, and
``fastrl data 'examples/own_data.py:rows:squares.csv'`` shows what it reads. Runs on a CPU in less than a minute::

    python examples/own_data.py
"""

from __future__ import annotations

import csv
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw

from fastrl import Record, load_recipe, train
from fastrl.data import question

COLOURS = ("red", "green", "blue")
SIDE = 84  # of a picture, in pixels


def rows(path: str, limit: str = "1000") -> Iterator[Record]:
    """A record for each line of the CSV. ``limit`` comes from ``squares.csv?limit=8``; such values are texts."""
    with open(path, newline="") as file:
        for number, row in zip(range(int(limit)), csv.DictReader(file), strict=False):
            picture = Path(path).parent / row["picture"]
            box = tuple(float(row[key]) for key in ("x1", "y1", "x2", "y2"))
            wanted = f"{row['colour']} square"
            yield Record(
                id=str(number),
                task="grounding",
                images=(picture,),
                messages=question("grounding", wanted),
                target={"box": box, "expression": wanted},  # in pixels of the picture
            )


def make_files(folder: Path, count: int = 16) -> Path:
    """Pictures with one square of each colour, and the CSV."""
    rng = random.Random(0)
    lines = []
    for number in range(count):
        picture = Image.new("RGB", (SIDE, SIDE), "white")
        boxes = {}
        for place, colour in enumerate(COLOURS):
            size, top = rng.randint(14, 22), 2 + 28 * place
            left = rng.randint(2, SIDE - size - 3)
            boxes[colour] = (left, top, left + size, top + size)
            ImageDraw.Draw(picture).rectangle(boxes[colour], fill=colour)
        picture.save(folder / f"{number}.png")
        colour = rng.choice(COLOURS)
        lines.append([f"{number}.png", colour, *boxes[colour]])
    with (folder / "squares.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["picture", "colour", "x1", "y1", "x2", "y2"], *lines])
    return folder / "squares.csv"


def main() -> int:
    """Train a few steps; returns how many records were consumed."""
    with tempfile.TemporaryDirectory() as folder:
        table = make_files(Path(folder))
        recipe = load_recipe(
            "perception-r1-grounding-tiny",
            {
                "out": f"{folder}/run",
                "data.adapter": f"{__file__}:rows",
                "data.spec": f"{table}?limit=12",
                "data.prompts_per_step": 6,
                "rollout.group_size": 4,
                "optim.steps": 4,
                "log.samples_every": 0,
                "checkpoint.final": False,
            },
        )
        summary = train(recipe, show=False)
    consumed = int(summary.last["data/consumed"])
    print(f"{summary.steps} steps on {consumed} prompts; mean IoU of the last {summary.last['reward/iou']:.3f}")
    return consumed


if __name__ == "__main__":
    main()
