"""Figures draw the boxes of the answers and of the truth."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from fastrl.answers import View
from fastrl.data.scenes import scene_record
from fastrl.report.figures import answer_boxes, before_after


def test_before_after_writes_a_picture(tmp_path: Path) -> None:
    records = [scene_record("grounding", i, seed=1) for i in range(3)]
    answers = [(r, '[{"bbox_2d": [1, 2, 30, 40]}]') for r in records]
    before_after(answers, [(r, "nothing") for r in records], tmp_path / "sub" / "figure.png")
    with Image.open(tmp_path / "sub" / "figure.png") as image:
        assert image.width > 300
        assert image.height > 300


def test_boxes_are_drawn_in_original_pixels() -> None:
    from dataclasses import replace

    record = replace(scene_record("grounding", 0, seed=1), views=(View(112, 112, 224, 224),), frame="resized")
    assert answer_boxes(record, '[{"bbox_2d": [20, 40, 60, 80]}]') == [(10.0, 20.0, 30.0, 40.0)]
    assert answer_boxes(record, "garbage [") == []


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("numbers", ["-1e308, 0, 1e308, 1e300", "1e308, 1e308, -1e308, -1e308", "5e-324, 0, 1, 1e-300"])
def test_boxes_of_any_size_are_drawn(tmp_path: Path, numbers: str) -> None:
    record = scene_record("grounding", 0, seed=1)
    answer = f'[{{"bbox_2d": [{numbers}]}}]'
    assert len(answer_boxes(record, answer)) == 1
    before_after([(record, answer)], [(record, answer)], tmp_path / "figure.png")
