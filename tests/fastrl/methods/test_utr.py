"""UTR: likelihood of answers only, weighted by temporal perplexity if set, and twenty steps on the real clip."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastrl.batch import pack, pack_row
from fastrl.build.utr import BuildOptions, build_dialogues
from fastrl.data import DataError, load_data, with_options
from fastrl.data.records import Record
from fastrl.methods.base import Clock
from fastrl.methods.utr import UTR, UTROptions
from fastrl.models.load import Policy, load_policy
from fastrl.recipe import RecipeError, load_recipe
from fastrl.trainer import Run, train
from tests.helpers.training import make_recipe, steady_rows


@pytest.fixture(scope="module")
def policy(tiny_folder: Callable[[str], Path]) -> Policy:
    return load_policy(tiny_folder("qwen2_5"), device="cpu")


@pytest.fixture(scope="module")
def pedestrians(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dialogues about the real clip, five frames each."""
    out = tmp_path_factory.mktemp("utr") / "d.jsonl"
    spec = f"mot:{data_dir}/video/pets09_s2l1_a?window=15&stride=15"
    build_dialogues(BuildOptions(spec, frames=5, motion=True), out)
    return out


def records_of(tpl: list[float | None]) -> list[Record]:
    records = [load_data("scenes:utr?n=9&size=56&frames=3")[i] for i in range(len(tpl))]
    for record, value in zip(records, tpl, strict=True):
        if value is not None:
            record.target["tpl"] = value  # type: ignore[index]
    return records


def method_of(policy: Policy, **options: Any) -> UTR:
    context = SimpleNamespace(policy=policy, clock=Clock(), average=float)
    return UTR(UTROptions(**options), context)  # type: ignore[arg-type]


@pytest.mark.parametrize("aggregate", ["token", "sequence"])
def test_the_loss_is_the_likelihood_of_answer_tokens(policy: Policy, aggregate: str) -> None:
    method = method_of(policy, aggregate=aggregate)
    groups = method.prepare(records_of([None, None, None])).groups
    total, means, tokens = 0.0, 0.0, 0
    for group in groups:  # one at a time, with the whole prompt and answer
        alone = pack_row([group])
        assert alone.targets.tolist() == group.completions[0].token_ids.tolist()
        assert alone.targets[-1] == policy.end_of_turn_id
        nll = -policy.logprob(alone).logp.detach().double()
        total, means, tokens = total + float(nll.sum()), means + float(nll.mean()), tokens + len(nll)
    expected = total / tokens if aggregate == "token" else means / len(groups)
    for budget in (1, 10_000):  # independent of the split into micro-batches
        losses = [method.loss(policy.logprob(b).logp.detach(), None, b)[0] for b in pack(groups, budget)]
        assert float(sum(losses)) == pytest.approx(expected, rel=1e-5)


def test_answers_count_by_their_temporal_perplexity(policy: Policy) -> None:
    prepared = method_of(policy, weight="tpl", aggregate="sequence").prepare(records_of([3.0, 1.0, -0.5]))
    weights = [float(g.completions[0].per_token["weight"].sum()) for g in prepared.groups]
    assert weights == pytest.approx([0.75, 0.25])  # below 0: reward hacking, not learned
    assert prepared.metrics == {"dialogue/used": 2.0, "dialogue/tpl": pytest.approx(3.5 / 3)}
    filtered = method_of(policy, min_tpl=2.0).prepare(records_of([3.0, 1.0]))
    assert [len(filtered.groups), len(filtered.sampled)] == [1, 2]
    assert float(filtered.groups[0].completions[0].per_token["weight"].sum()) == pytest.approx(1.0)


@pytest.mark.parametrize(("options", "tpl"), [({"weight": "tpl"}, None), ({"min_tpl": 1.0}, None)])
def test_missing_temporal_perplexity_is_an_error(policy: Policy, options: dict[str, Any], tpl: None) -> None:
    with pytest.raises(ValueError, match=r"utr-0-0: the record has no tpl.*fastrl tpl"):
        method_of(policy, **options).prepare(records_of([tpl]))


def test_records_without_answers_are_an_error(policy: Policy) -> None:
    with pytest.raises(ValueError, match="has no answer to learn"):
        method_of(policy).prepare([load_data("scenes:trajectory?n=1&size=56")[0]])


def test_a_rank_without_an_answer_to_learn_keeps_step_with_the_others(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = make_recipe(tiny_folder("qwen2_5"), tmp_path, method={"kind": "utr", "min_tpl": 0.9})
    run = Run(recipe, records=records_of([0.1, 0.2, 0.3]))
    run.engine.maximum = lambda value: value + 1  # type: ignore[method-assign]
    row, _ = run.step(1)
    assert (row["dialogue/used"], row["grad_norm"]) == (0, 0)


@pytest.mark.gate
def test_twenty_steps_on_the_real_clip(tiny_folder: Callable[[str], Path], pedestrians: Path, tmp_path: Path) -> None:
    rows = {}
    for run in ("a", "b"):
        recipe = make_recipe(
            tiny_folder("qwen2_5"),
            tmp_path / run,
            method={"kind": "utr"},
            data={"spec": f"utr:{pedestrians}", "frames": 3, "prompts_per_step": 4},
            optim={"steps": 20, "lr": 3e-3, "token_budget": 2048},
            checkpoint={"every": 0, "final": False},
        )
        train(recipe, show=False)
        rows[run] = steady_rows(tmp_path / run)
    assert rows["a"] == rows["b"]  # the same seed gives the same numbers
    losses = [row["loss"] for row in rows["a"]]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    table = (tmp_path / "a/samples.jsonl").read_text()
    assert "Frame1 0" not in json.loads(table.splitlines()[0])["question"]  # frame labels do not belong to a question


def test_a_recipe_chooses_the_frames(pedestrians: Path) -> None:
    changes = {"data.spec": f"utr:{pedestrians}", "data.frames": 3, "data.sample": "first"}
    recipe = load_recipe("utr-tiny", changes)
    data = load_data(recipe.data_spec)
    assert {len(record.images) for record in data} == {3}
    assert load_recipe("utr-tiny").data_spec.endswith("size=84&frames=8")
    with pytest.raises(DataError, match=r"says frames=2, data\.frames says 3"):
        _ = load_recipe("utr-tiny", {**changes, "data.spec": "scenes:utr?frames=2"}).data_spec
    with pytest.raises(DataError, match="unknown option 'sample'"):
        load_data(with_options("refexp:x.jsonl", sample="first"))
    with pytest.raises(RecipeError, match=r"data\.sample"):
        load_recipe("utr-tiny", {"data.sample": "last"})


def test_the_big_recipe_holds_the_released_constants() -> None:
    recipe = load_recipe("utr-7b")
    assert (recipe.data.frames, recipe.optim.lr, recipe.optim.warmup, recipe.optim.schedule) == (
        32,
        1e-5,
        0.03,
        "cosine",
    )
    assert recipe.model.lora is None
    assert recipe.optim.token_budget == 32768
    rates = {group.match: group.lr for group in recipe.optim.groups}
    assert rates == {"projector": 1e-5, "vision": 2e-6}
    assert recipe.data.prompts_per_step * 64 == 512
