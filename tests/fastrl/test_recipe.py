"""Recipes: every shipped one loads, and an error for a wrong key names the right one."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fastrl.data import ADAPTERS, Shipped
from fastrl.data.records import question_of
from fastrl.data.rows import READING
from fastrl.data.validate import DataError
from fastrl.evaluate.during import held_out
from fastrl.recipe import RecipeError, build_recipe, differences, load_recipe, load_records, shipped_recipes

TASKS, SIZES = ("grounding", "counting", "detection", "ocr"), ("tiny", "2b", "3b")
MINIMAL: dict[str, Any] = {
    "method": {"kind": "perception-r1"},
    "model": {"path": "m"},
    "data": {"spec": "scenes:grounding"},
    "optim": {"steps": 1},
}


@pytest.mark.parametrize("name", [f"perception-r1-{task}-{size}" for task in TASKS for size in SIZES])
def test_shipped_recipes_load_and_survive_their_dump(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert build_recipe(yaml.safe_load(recipe.dump())) == recipe


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_reward_options_exist(name: str) -> None:
    from fastrl.rewards import reward_for

    recipe = load_recipe(name)
    if recipe.method.kind == "perception-r1":
        task = "trajectory" if name.startswith("utr") else name.split("-")[2]
        for each, reward in (recipe.mix_rewards or {task: recipe.reward}).items():
            reward_for(each, **reward.options, **({"weights": reward.weights} if reward.weights else {}))


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_name_parts_by_the_words_of_every_family(name: str) -> None:
    """Not by the name of a module that other families do not have."""
    recipe = load_recipe(name)
    lora = recipe.model.lora
    named = [*recipe.model.freeze, *(group.match for group in recipe.optim.groups)]
    named += [] if lora is None else [*lora.also_train, *([lora.targets] if isinstance(lora.targets, str) else [])]
    assert [pattern for pattern in named if "visual" in pattern or "merger" in pattern] == []


def test_big_recipes_hold_the_papers_constants() -> None:
    for size in ("2b", "3b"):
        recipe = load_recipe(f"perception-r1-grounding-{size}")
        assert (recipe.rollout.group_size, recipe.method.beta, recipe.optim.lr) == (8, 0.04, 1e-6)
        assert (recipe.rollout.temperature, recipe.rollout.max_new_tokens, recipe.data.prompts_per_step) == (
            1.0,
            2048,
            14,
        )
        assert (recipe.method.aggregate, recipe.method.kl, recipe.method.eps) == ("sequence", "k3", 1e-4)


def test_a_mixture_says_its_parts_and_their_rewards(tmp_path: Path) -> None:
    for size in ("2b", "tiny"):
        recipe = load_recipe(f"perception-r1-mix-{size}")
        assert {entry.name for entry in recipe.mix} == {"grounding", "counting", "ocr", "detection"}
        assert build_recipe(yaml.safe_load(recipe.dump())) == recipe
    entries = [
        {"spec": "refexp:a/train.jsonl", "weight": {0: 1, 50: 0.5}, "reward": {"options": {"metric": "iou"}}},
        {"spec": "train.csv", "adapter": "my_data.py:rows"},
    ]
    named = ["data.spec=", f"data.mix={json.dumps(entries)}", "data.max_image_pixels=100", "reward.weights={iou: 2}"]
    recipe = load_recipe("perception-r1-grounding-2b", named)
    assert [entry.name for entry in recipe.mix] == ["train", "train-2"]
    assert recipe.mix[0].spec == "refexp:a/train.jsonl?max_image_pixels=100"
    assert recipe.mix[0].weight == {0: 1.0, 50: 0.5}
    assert recipe.mix[1].spec == "my_data.py:rows:train.csv?max_image_pixels=100"
    own, whole = recipe.mix_rewards["train"], recipe.mix_rewards["train-2"]
    assert (own.options, own.weights) == ({"metric": "iou"}, {"iou": 2.0})  # an entry's keys override the recipe's
    assert whole == recipe.reward


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.mix=[{spec: 'ocr:a'}]"], "either spec .* or mix"),
        (["data.spec="], "either spec .* or mix"),
        (["data.spec=", "data.adapter=a.py:f", "data.mix=[{spec: 'ocr:a'}]"], "set it for each entry"),
        (["data.spec=", "data.mix=[{spec: 'ocr:a', name: x}, {spec: 'ocr:b', name: x}]"], "two entries of mix"),
        (["data.spec=", "data.mix=[{spec: 'ocr:a', weight: -1}]"], "must be above 0"),
        (["data.spec=", "data.mix=[{spec: 'ocr:a', weight: {0: 0}}]"], "not all 0"),
        (["data.spec=", "data.mix=[{spec: 'ocr:a', wieght: 1}]"], "unknown key"),
        (["data.curriculum={by: level}"], "data.curriculum.steps: missing"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(changes: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("perception-r1-grounding-2b", changes)


@pytest.mark.parametrize(
    ("dotted", "meant"),
    [
        ("optim.stepz", "optim.steps"),
        ("optim.group_size", "rollout.group_size"),
        ("rollout.max_new_token", "rollout.max_new_tokens"),
        ("method.betta", "method.beta"),
        ("modle", "model"),
        ("model.lora.rnak", "model.lora.rank"),
        ("temperature", "rollout.temperature"),
        ("optim.learning_rate", "optim.lr"),  # the name that other trainers use
        ("rollout.n", "rollout.group_size"),
        ("report_to", "log.to"),
        ("num_generations", "rollout.group_size"),
    ],
)
def test_unknown_key_names_its_path_and_the_nearest_valid_one(dotted: str, meant: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe("perception-r1-grounding-tiny", [f"{dotted}=1"])
    assert f"{dotted}: unknown key; did you mean {meant}?" in str(error.value)


def test_all_problems_are_reported_together() -> None:
    values = MINIMAL | {"optim": {"steps": 0, "lrr": 1}, "rollout": {"group_size": "many"}}
    with pytest.raises(RecipeError) as error:
        build_recipe(values, source="mine.yaml")
    message = str(error.value)
    assert message.startswith("mine.yaml:")
    for part in ("optim.steps:", "optim.lrr: unknown key", "rollout.group_size:", "'many'"):
        assert part in message


def test_missing_key_unknown_method_and_unknown_recipe() -> None:
    with pytest.raises(RecipeError, match=r"data: give either spec \(one data set\) or mix"):
        build_recipe(MINIMAL | {"data": {}})
    with pytest.raises(RecipeError, match=r"unknown method 'perception_r1'; did you mean perception-r1\?"):
        build_recipe(MINIMAL | {"method": {"kind": "perception_r1"}})
    with pytest.raises(RecipeError, match=r"did you mean perception-r1-ocr-3b\?"):
        load_recipe("perception-r1-ocr-3")
    with pytest.raises(RecipeError, match="recipe file not found"):
        load_recipe("no/such.yaml")


def test_overrides_are_yaml_and_reach_new_sections() -> None:
    recipe = load_recipe(
        "perception-r1-grounding-tiny",
        [
            "optim.lr=3e-5",
            "model.lora.rank=4",
            "model.freeze=[visual, lm_head]",
            "reward.options={metric: iou}",
            "seed=7",
        ],
    )
    assert recipe.optim.lr == 3e-5
    assert recipe.model.lora is not None
    assert recipe.model.lora.rank == 4
    assert recipe.model.freeze == ["visual", "lm_head"]
    assert recipe.seed == 7
    assert load_recipe("perception-r1-grounding-tiny", {"optim.lr": 3e-5}).optim.lr == 3e-5


@pytest.mark.parametrize(
    ("change", "printed"),
    [
        ("optim.lr=.inf", "optim.lr: .*finite"),
        ("optim.lr=1e39", "optim.lr: .*less than or equal to 100"),
        ("method.eps=.inf", "method.eps: .*finite"),
        ("method.beta=.nan", "method.beta: "),
        ("rollout.group_size=1", "rollout.group_size: .*at least 2"),
        ("rollout.group_schedule={3: 1}", "rollout.group_schedule: .*at least 2"),
        ("rollout.group_schedule={-1: 4}", "rollout.group_schedule: .*steps from 0"),
        ("seed=99999999999999999999999", "seed: "),
        ("data.seed=-1", "data.seed: "),
        ('out=""', "out: .*at least 1 character"),
    ],
)
def test_numbers_no_run_can_have(change: str, printed: str) -> None:
    with pytest.raises(RecipeError, match=printed):
        load_recipe("perception-r1-grounding-tiny", [change])


def test_scientific_notation_without_a_point_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(MINIMAL) + "reward: {options: {exact_bonus: 1e-3}}\n")
    assert load_recipe(path).reward.options["exact_bonus"] == 1e-3


@pytest.mark.parametrize("override", ["optim.lr", "=3", "seed.x=1", "optim.lr=[1"])
def test_bad_override_is_a_recipe_error(override: str) -> None:
    with pytest.raises(RecipeError):
        load_recipe("perception-r1-grounding-tiny", [override])


def test_key_given_twice_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("seed: 1\nseed: 2\n")
    with pytest.raises(RecipeError, match="'seed' is given twice"):
        load_recipe(path)


def test_truncated_sampling_needs_consent() -> None:
    for key in ("rollout.top_p=0.9", "rollout.top_k=50"):
        with pytest.raises(RecipeError, match="allow_truncated_sampling"):
            load_recipe("perception-r1-grounding-tiny", [key])
        load_recipe("perception-r1-grounding-tiny", [key, "rollout.allow_truncated_sampling=true"])


def test_differences_are_dotted() -> None:
    a = build_recipe(MINIMAL)
    b = build_recipe(MINIMAL | {"optim": {"steps": 9}, "model": {"path": "m", "lora": {"rank": 2}}})
    changed = differences(a, b)
    assert changed["optim.steps"] == (1, 9)
    assert changed["model.lora.rank"] == (None, 2)


JUNK = st.none() | st.integers() | st.text(max_size=8)


@given(st.recursive(JUNK, lambda inner: st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=4))
def test_anything_else_is_a_recipe_error_too(junk: Any) -> None:
    for section in ("method", "model", "optim", "rollout", "nonsense"):
        with contextlib.suppress(RecipeError):
            build_recipe(MINIMAL | {section: junk})


@pytest.mark.parametrize("adapter", list(ADAPTERS))
def test_a_raised_limit_of_pixels_goes_to_every_adapter_that_opens_files(adapter: str) -> None:
    """But no other task: drawn scenes have no files to open."""
    path = {"scenes": "counting"}.get(adapter, "x")
    named = [f"data.spec={adapter}:{path}", "data.max_image_pixels=100", "model.path=m"]
    spec = load_recipe("perception-r1-counting-tiny", named).data_spec
    assert ("max_image_pixels=100" in spec) == (adapter != "scenes")
    entry = ADAPTERS[adapter]
    keys = entry.open(adapter).keys if isinstance(entry, Shipped) else ()
    assert adapter == "scenes" or (keys is not None and set(READING) <= set(keys))


def test_scenes_train_with_a_raised_limit() -> None:
    recipe = load_recipe("perception-r1-counting-tiny", ["data.max_image_pixels=100000000"])
    assert len(load_records(recipe)) > 0
    mixed = load_recipe("perception-r1-mix-tiny", ["data.max_image_pixels=100000000"])
    assert len(load_records(mixed)) > 0


def test_a_suffix_follows_every_question_of_data_mixture_and_evaluation() -> None:
    spec = "scenes:grounding?n=2&seed=1&size=84"
    plain = load_recipe("perception-r1-grounding-tiny", {"data.spec": spec})
    asked = question_of(load_records(plain)[0].messages)
    changes = {"data.spec": spec, "data.suffix": "Think {first}.", "eval.spec": spec}
    recipe = load_recipe("perception-r1-grounding-tiny", changes)
    assert question_of(load_records(recipe)[0].messages) == f"{asked} Think {{first}}."
    found = held_out(recipe)
    assert found is not None
    assert question_of(found.tasks["grounding"][0].messages).endswith(" Think {first}.")
    mixed = load_recipe(
        "perception-r1-grounding-tiny", {"data.spec": None, "data.mix": [{"spec": spec}], "data.suffix": "Think."}
    )
    assert question_of(load_records(mixed)[1].messages).endswith(" Think.")
    with pytest.raises(DataError, match="<image>"):
        load_records(load_recipe("perception-r1-grounding-tiny", {"data.spec": spec, "data.suffix": "See <image>"}))
