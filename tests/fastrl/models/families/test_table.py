"""The README's table of model families states only what tests show; the pages list every published size."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path

import pytest

from fastrl.answers import style_of
from fastrl.models.families import families, published
from tests.helpers.contract import Pair
from tests.helpers.families import BUILDS

ROOT = Path(__file__).parents[4]
HERE, SERVED = "tests/fastrl/models/families", "tests/fastrl/rollout/test_vllm_families.py"
COLUMNS = ("model type", "released models", "train", "four methods", "rollout", "plan", "vLLM", "frame")
# Tests behind a column. Each runs for every family, as it uses the fixture over all of them.
RESTS_ON = {
    "train": (
        f"{HERE}/test_contract.py",
        "test_prompt_ids_are_the_released_processors_own",
        "test_log_probs_are_transformers_own",
        "test_every_gradient_is_that_of_the_repeated_layout",
        "test_checkpointing_changes_no_gradient",
        "test_a_part_is_frozen_and_trained_by_its_word",
        "test_ten_steps_are_finite_and_resume_bit_for_bit",
    ),
    "four methods": (f"{HERE}/test_keys.py", "test_every_method_trains_every_family"),
    "rollout": (
        f"{HERE}/test_contract.py",
        "test_a_greedy_rollout_is_generate_token_for_token",
        "test_the_sampler_reports_the_trainers_log_probs",
        "test_decoding_through_the_models_own_layers_is_the_same",
    ),
    "plan": (f"{HERE}/test_contract.py", "test_the_plan_is_within_two_percent_of_counted_bytes"),
    "vLLM": (SERVED, "test_every_family_sends_the_right_prompt_and_pictures"),
}


def table_of(text: str, header: Sequence[str]) -> dict[str, list[str]]:
    """The rows of the table with this header, by the text of their first cell."""
    lines = iter(text.splitlines())
    wanted = [cell.strip() for cell in header]
    for line in lines:
        if [cell.strip() for cell in line.strip("|").split("|")] == wanted:
            break
    next(lines)
    rows: dict[str, list[str]] = {}
    for line in lines:
        if not line.startswith("|"):
            break
        first, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        rows[first.strip("`")] = cells
    return rows


def decode_cell(pair: Pair) -> str:
    fast = pair.policy.family.decode_layers(pair.policy.core) is not None
    return "fast step" if fast else "the layers' own step"


def plan_cell(model_type: str) -> str:
    count = len(families()[model_type].published)
    return f"✓, {count} sizes" if count > 1 else "✓, 1 size" if count else "✓"


def served_cell(model_type: str) -> str:
    family = families()[model_type]
    limit = {None: "✓", 0: "no images", 1: "1 image"}[family.served_images]
    return limit if family.served_lora else f"{limit}, no LoRA"


def test_the_readme_has_a_row_for_each_family_and_no_other() -> None:
    assert set(table_of((ROOT / "README.md").read_text(encoding="utf-8"), COLUMNS)) == set(families())


def test_the_cells_of_a_family_are_its_facts(pair: Pair) -> None:
    model_type = pair.policy.family.model_type
    cells = table_of((ROOT / "README.md").read_text(encoding="utf-8"), COLUMNS)[model_type]
    assert cells[1:] == [
        "✓",
        "✓",
        decode_cell(pair),
        plan_cell(model_type),
        served_cell(model_type),
        f"`{style_of(model_type).frame}`",
    ]


@pytest.mark.parametrize("column", RESTS_ON)
def test_what_a_column_states_is_tested_on_every_family(column: str) -> None:
    file, *names = RESTS_ON[column]
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    tests = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for name in names:
        assert {argument.arg for argument in tests[name].args.args} & {"pair", "family"}, name
        assert not any(
            "skip" in ast.unparse(mark) or "xfail" in ast.unparse(mark) for mark in tests[name].decorator_list
        )


def test_the_fixtures_values_are_all_families() -> None:
    assert set(BUILDS) == set(families())
    for file in (f"{HERE}/conftest.py", SERVED):
        text = (ROOT / file).read_text(encoding="utf-8")
        assert "params=sorted(BUILDS)" in text, file


def test_the_page_about_plans_lists_every_published_size() -> None:
    text = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    assert [name for name in published() if f"`{name}`" not in text] == []
