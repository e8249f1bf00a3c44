"""Supervised fine-tuning on the truth: its text for each task, its order, and a few steps of training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from fastrl.answers import parse_boxes, parse_tracks
from fastrl.batch import pack, pack_row
from fastrl.data import DataError, load_data
from fastrl.data.records import Record, question
from fastrl.methods.base import Clock
from fastrl.methods.sft import SFT, SFTOptions, in_random_order
from fastrl.models.load import Policy, load_policy
from fastrl.trainer import train
from tests.helpers.training import make_recipe, same_ending, steady_rows


@pytest.fixture(scope="module")
def policy(tiny_folder: Callable[[str], Path]) -> Policy:
    return load_policy(tiny_folder("qwen2_5"), device="cpu")


def method_of(policy: Policy, seed: int = 0, **options: Any) -> SFT:
    rng = torch.Generator().manual_seed(seed)
    context = SimpleNamespace(policy=policy, clock=Clock(), average=float, rng=rng)
    return SFT(SFTOptions(**options), context)  # type: ignore[arg-type]


def scene(task: str, n: int = 1, **options: int) -> list[Record]:
    query = "".join(f"&{key}={value}" for key, value in {"size": 56, **options}.items())
    return list(load_data(f"scenes:{task}?n={n}{query}"))


def learned(policy: Policy, record: Record, **options: Any) -> str:
    (group,) = method_of(policy, **options).prepare([record]).groups
    return group.completions[0].text


@pytest.mark.parametrize("aggregate", ["token", "sequence"])
def test_the_loss_is_the_likelihood_of_the_truths_tokens(policy: Policy, aggregate: str) -> None:
    method = method_of(policy, aggregate=aggregate)
    groups = method.prepare([*scene("grounding", 2), *scene("ocr"), *scene("detection")]).groups
    total, means, tokens = 0.0, 0.0, 0
    for group in groups:  # one at a time, with the whole prompt and answer
        alone = pack_row([group])
        assert alone.targets[-1] == policy.end_of_turn_id
        nll = -policy.logprob(alone).logp.detach().double()
        total, means, tokens = total + float(nll.sum()), means + float(nll.mean()), tokens + len(nll)
    expected = total / tokens if aggregate == "token" else means / len(groups)
    for budget in (1, 10_000):  # independent of the split into micro-batches
        losses = [method.loss(policy.logprob(b).logp.detach(), None, b)[0] for b in pack(groups, budget)]
        assert float(sum(losses)) == pytest.approx(expected, rel=1e-5)


def test_each_task_has_its_answer(policy: Policy) -> None:
    (record,) = scene("grounding")
    (item,) = parse_boxes(learned(policy, record))
    assert all(abs(a - b) <= 1 for a, b in zip(item.box, record.target["box"], strict=True))
    for task in ("counting", "detection"):
        (record,) = scene(task, difficulty=3)
        assert len(parse_boxes(learned(policy, record))) == len(record.target["boxes"])
    (record,) = scene("ocr")
    assert learned(policy, record) == record.target["text"]
    (record,) = scene("caption")
    assert learned(policy, record) == record.target["references"][0]
    (record,) = scene("trajectory", frames=3)
    assert [track.name for track in parse_tracks(learned(policy, record))] == [record.target["tracks"][0]["name"]]
    (record,) = scene("utr", frames=3)
    assert learned(policy, record) == record.target["answer"]
    picture = Image.new("RGB", (56, 56))
    asked = Record("q", "qa", (picture,), question("qa", prompt="Which?"), {"choices": ["x", "y"], "answer": 1})
    assert learned(policy, asked) == "B"


def test_it_is_written_in_the_familys_style(tiny_folder: Callable[[str], Path]) -> None:
    (record,) = scene("grounding")
    text = learned(load_policy(tiny_folder("qwen2"), device="cpu"), record)
    assert "<|box_start|>(" in text  # not the JSON of Qwen2.5-VL
    assert max(parse_boxes(text)[0].box) > 56  # 0 to 1000, not pixels


def test_objects_come_in_another_order_at_each_visit(policy: Policy) -> None:
    record = next(r for r in scene("detection", 20, difficulty=3) if len(r.target["boxes"]) > 2)
    method = method_of(policy, order="random")
    texts = [method.prepare([record]).groups[0].completions[0].text for _ in range(8)]
    assert len(set(texts)) > 1
    items = [sorted((item.label, item.box) for item in parse_boxes(text)) for text in texts]
    assert items == items[:1] * 8  # each box keeps its label
    assert learned(policy, record, seed=3, order="random") == learned(policy, record, seed=3, order="random")
    assert {learned(policy, record, seed=seed) for seed in range(4)} == {learned(policy, record)}


def test_what_belongs_to_an_object_moves_with_it() -> None:
    target = {"boxes": [[0], [1], [2]], "labels": ["a", "b", "c"], "crowd": [True, False, False], "categories": ["a"]}
    moved = in_random_order("detection", target, torch.Generator().manual_seed(1))
    assert moved["boxes"] != target["boxes"]
    assert list(zip(moved["boxes"], moved["labels"], moved["crowd"], strict=True)) == [
        (target["boxes"][i], target["labels"][i], target["crowd"][i]) for (i,) in moved["boxes"]
    ]
    assert moved["categories"] == ["a"]
    points = {"points": [(0, 0), (1, 1)], "boxes": None, "count": 2, "label": "x"}
    assert sorted(in_random_order("counting", points, torch.Generator())["points"]) == points["points"]
    one = {"box": (0, 0, 1, 1)}
    assert in_random_order("grounding", one, torch.Generator()) is one


def test_a_truth_without_an_answer_is_a_bad_row(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    rows = [
        {"image": "a.png", "label": "cat", "count": 2, "points": [[1, 2], [3, 4]]},
        {"image": "a.png", "label": "cat", "count": 2},
    ]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"method": {"kind": "sft-truth"}, "data": {"spec": f"pixmo:{tmp_path}/c.jsonl", "prompts_per_step": 1}}
    recipe = make_recipe(tiny_folder("qwen2_5"), tmp_path / "run", **changes)
    with pytest.raises(DataError, match=r"c\.jsonl:2: counting truth without boxes and points"):
        train(recipe, show=False)
    assert not (tmp_path / "run").exists()


def test_a_task_without_an_answer_is_named(policy: Policy) -> None:
    picture = Image.new("RGB", (56, 56))
    record = Record("own", "poetry", (picture,), question("qa", prompt="Write."), {"text": "x"})
    with pytest.raises(ValueError, match=r"own: no answer format for task 'poetry'; there is one for grounding, "):
        method_of(policy).prepare([record])


def test_it_learns_and_resumes_bit_for_bit(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    def recipe(name: str, steps: int) -> Any:
        return make_recipe(
            tiny_folder("qwen2_5"),
            tmp_path / name,
            method={"kind": "sft-truth", "order": "random"},
            data={"spec": "scenes:detection?n=64&size=56&difficulty=2", "prompts_per_step": 2},
            optim={"steps": steps, "lr": 3e-3, "token_budget": 1024, "warmup": 0, "schedule": "constant"},
            checkpoint={"every": 5},
        )

    train(recipe("whole", 10), show=False)
    losses = [row["loss"] for row in steady_rows(tmp_path / "whole")]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    train(recipe("parts", 5), show=False)
    train(recipe("parts", 10), show=False, resume=True)
    same_ending(tmp_path / "whole", tmp_path / "parts")
