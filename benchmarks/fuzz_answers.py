"""Runs random answers through all parsers and rewards: nothing may raise, and every reward must be in its range.

``python -m benchmarks.fuzz_answers`` reads a million: each text by every parser, by the check of one form and task, and
by one reward, which take turns. ``make test`` reads five thousand. The same seed gives the same texts.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastrl.answers import FRAMES, STYLES, View, matches_format, parse_boxes, parse_points, parse_tracks, plain_answer
from fastrl.answers.choice import parse_choice, parse_yes_no
from fastrl.captions import parse_caption
from fastrl.data.records import Record
from fastrl.rewards import Reward, reward_for

RESULTS = Path(__file__).parent / "results" / "fuzz_answers.json"
BATCH = 100
VIEW = View(640, 480, 644, 476)
BOXES = [[10.0, 20.0, 200.0, 300.0], [300.0, 300.0, 400.0, 400.0]]
RUNS = {"action": "runs", "first": 1, "last": 3}
TRACK = {"id": 1, "name": "dog", "boxes": {1: BOXES[0], 3: BOXES[0]}, "spans": [RUNS]}
TARGETS: dict[str, dict[str, Any]] = {
    "grounding": {"box": BOXES[0], "expression": "the dog"},
    "counting": {"label": "dog", "count": 2, "points": [(5.0, 5.0), (600.0, 400.0)], "boxes": None},
    "detection": {"boxes": BOXES, "labels": ["dog", "cat"], "crowd": [False, False], "categories": ["cat", "dog"]},
    "ocr": {"text": "hello world"},
    "trajectory": {"tracks": [TRACK], "frames": 3},
}
LOWEST = {"missing": -1.0, "points": -1.0, "iou": -1.0, "format": -1.0}
REWARDS: tuple[Reward, ...] = (
    reward_for("grounding"),
    reward_for("grounding", metric="graded", format="loose"),
    reward_for("counting", exact_bonus=1.0),
    reward_for("counting", score_by="precursor"),
    reward_for("detection"),
    reward_for("detection", matching="sequence"),
    reward_for("ocr"),
    reward_for("ocr", normalise="none"),
    reward_for("trajectory"),
)

PIECES = (
    *('[{"bbox_2d": [', "]", "}", "{", "[", ", ", '"', "'", "\\", "\n", ": ", '"label": "dog"', '"score": 0.5'),
    *("```json\n", "[]", "<answer>", "</answer>", "<think>", "</think>", "“", "”", "：", "，", "［", "box_2d"),
    *("'bbox': ", '"x1": 3, ', "<|box_start|>", "<|box_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<ref>", "</ref>", "<box>", "</box>", '<point x="1.5" y="2" alt="', "<points x1=", "</point>", "<loc0010>"),
    *("<|begin_of_box|>", "<|end_of_box|>", "1, 2, 3, 4", "(1,2),(3,4)", "[10,20,200,300]", "nan", "inf", "1e400"),
    *("-0.0", "1e-320", "٣", "９", "9" * 30, "Track1: dog", "<Id1>", "Frame1:[1,2,3,4];", "</Id1>"),
    *("`", "«", "»", "„", '\\"', "\\n", "%", ";", "- bbox: ", '"labels": ["a", ', '"boxes": [{', "<|think|>", "،", "٤"),
    *(" It runs in frames 1-99", "\ud800", "\x00", "字", "e\u0301"),
)


def random_text(rng: random.Random) -> str:
    """A text made of pieces of answers, some of them damaged, or of any characters at all."""
    if rng.random() < 0.1:
        return "".join(chr(rng.randrange(0x110000)) for _ in range(rng.randrange(40)))
    text = "".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 25)))
    for _ in range(rng.randrange(3)):
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice(("", *PIECES)) + text[at + rng.randrange(4) :]
    return text


FORMS = tuple((style, task) for style in STYLES for task in ("grounding", "counting", "detection", "ocr"))


def read_all(text: str, forms: Sequence[tuple[str, str]] = FORMS) -> None:
    """Read one text as every kind of answer; raises where a reader does, or gives what it must not."""
    for parsed in (parse_boxes(text), parse_points(text)):
        for item in parsed:
            assert len(item.coords) in (2, 4), item
            assert all(math.isfinite(v) for v in item.coords), item
            (item.label or "").encode("utf-8")
    for track in parse_tracks(text):
        assert track.boxes, text
    plain_answer(text)
    parse_caption(text)
    parse_choice(text, ["a dog", "a cat"])
    parse_yes_no(text)
    for style, task in forms:
        matches_format(task, text, style)


def score_all(texts: Sequence[str], frame: str, rewards: Sequence[Reward] = REWARDS) -> None:
    """Score texts by every reward; raises where one raises or leaves its range."""
    for reward in rewards:
        row = Record("a", reward.task, (), (), TARGETS[reward.task], views=(VIEW,), frame=frame)
        for name, values in reward(list(texts), row).items():
            assert len(values) == len(texts)
            for text, value in zip(texts, values, strict=True):
                assert isinstance(value, float), (reward, name, text)
                assert LOWEST.get(name, 0.0) <= value <= 1.0, (reward, name, value, text)
        for counts in reward.diagnose(texts, [row] * len(texts)).values():
            assert all(isinstance(count, int) and count >= 0 for count in counts)


def fuzz(n: int, seed: int, *, turns: bool = False) -> int:
    """Parse and score ``n`` random texts; returns their number of characters. Raises at the first failure.

    ``turns``: each text meets one form, each batch one reward.
    """
    rng = random.Random(seed)
    characters = 0
    for start in range(0, n, BATCH):
        texts = [random_text(rng) for _ in range(min(BATCH, n - start))]
        for number, text in enumerate(texts, start):
            try:
                read_all(text, FORMS[number % len(FORMS) :][:1] if turns else FORMS)
            except Exception as error:
                raise AssertionError(f"seed {seed}, text {text!r}") from error
        batch = start // BATCH
        rewards = REWARDS[batch % len(REWARDS) :][:1] if turns else REWARDS
        frame = FRAMES[(batch // len(REWARDS) if turns else batch) % len(FRAMES)]
        score_all(texts, frame, rewards)
        characters += sum(map(len, texts))
    return characters


def main(argv: list[str] | None = None) -> int:
    """Fuzz and write the result."""
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz_answers", description=about)
    parser.add_argument("--n", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    characters = fuzz(args.n, args.seed, turns=True)
    from benchmarks.run import environment

    result = {"texts": args.n, "seed": args.seed, "characters": characters, "raised": 0, "out_of_range": 0}
    result |= {"seconds": round(time.perf_counter() - started)}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(environment() | result, indent=1) + "\n")
    print(f"{args.n} texts of {characters} characters (seed {args.seed}): nothing raised, every reward in its range")
    return 0


if __name__ == "__main__":
    sys.exit(main())
