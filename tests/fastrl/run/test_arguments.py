"""What is handed to ``train`` from Python is checked before any work: types, and each record of a list."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fastrl
from fastrl.data import DataError
from fastrl.data.records import Record
from fastrl.evaluate import evaluate
from fastrl.run.arguments import check_arguments
from tests.helpers.training import make_recipe, make_records


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recipe": "perception-r1-grounding-tiny"}, "recipe must be a Recipe, got 'perception.*fastrl.load_recipe"),
        ({"policy": "tiny:perception"}, "policy must be a Policy, got 'tiny:perception': fastrl.load_policy"),
        (
            {"records": "ocr:a.jsonl"},
            "records must be a sequence of Records, got the text .* set data.spec in the recipe",
        ),
        ({"eval_records": "ocr:a.jsonl"}, "eval_records must be .* set eval.spec in the recipe"),
        ({"records": iter(())}, "records must be a sequence of Records, as a list is; got tuple_iterator"),
        ({"records": [*make_records(1), {"image": "a.png"}]}, r"records\[1\] must be a fastrl.Record, got {'image'"),
        ({"callbacks": object()}, "callbacks must be a list of objects, got <object"),
    ],
)
def test_another_type_names_what_makes_one(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"recipe": make_recipe(tmp_path / "no model", tmp_path / "out"), **arguments}
    with pytest.raises(TypeError, match=message):
        fastrl.train(show=False, **given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["records", "eval_records"])
def test_the_records_of_a_list_are_checked(tmp_path: Path, name: str) -> None:
    first, second, third = make_records(3)
    bad = [first, replace(second, target={}), replace(third, images=())]
    recipe = make_recipe(tmp_path / "no model", tmp_path / "out")
    given: dict[str, Any] = {"records": make_records(2), name: bad}
    with pytest.raises(DataError, match=rf"(?s)2 problems.*{name}\[1\]: target has no 'text'.*{name}\[2\]: 0 images"):
        fastrl.train(recipe, show=False, **given)


def test_records_made_on_demand_are_not_all_made(tmp_path: Path) -> None:
    class Lazy:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Record:
            raise AssertionError("made")

    check_arguments(make_recipe(tmp_path, tmp_path), None, records=Lazy(), eval_records=None)


def test_answers_that_are_no_strings_are_named() -> None:
    records = make_records(2)
    with pytest.raises(TypeError, match=r"answers\[1\] must be a string, got None; without an answer, give ''"):
        evaluate("ocr", records, ["a", None])  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"ocr_reward: answers\[0\] must be a string, got 3"):
        fastrl.reward_for("ocr")([3], records[0])  # pyright: ignore[reportArgumentType]
