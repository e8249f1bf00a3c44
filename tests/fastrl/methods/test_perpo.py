"""PerPO and its baselines: loss against the formula in float64, shared prompts, rewards of each list, resumption."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl.batch import Completion, PackedBatch, Prompt, PromptGroup, pack, pack_row
from fastrl.data import load_data
from fastrl.data.lists import RankedList
from fastrl.data.records import Record
from fastrl.data.stream import RecordStream
from fastrl.engine.base import parameter_groups
from fastrl.methods import Context, method_for
from fastrl.methods.perpo import PerPO, PerPOOptions, preference_loss
from fastrl.models.load import Policy, load_policy
from fastrl.recipe import RewardRecipe, RolloutRecipe, load_recipe
from fastrl.run import keeping
from fastrl.trainer import Run, train
from tests.helpers.training import TEXT, make_recipe, make_records, steady_rows

Folder = Callable[[str], Path]
KINDS = ("perpo", "lipo", "listmle", "dpo", "sft")


def given(records: Sequence[Record], lists: Sequence[RankedList]) -> list[Record]:
    """Records with these lists."""
    return [replace(r, target={**r.target, "list": found}) for r, found in zip(records, lists, strict=True)]


def list_records(n: int = 4, answers: int = 3) -> list[Record]:
    """OCR records with lists of their own: the same number of answers, other rewards."""
    lists = [
        RankedList(
            tuple(TEXT[i + k : i + 4 + 2 * k] for k in range(answers)),
            tuple((1 + (k * (i + 2)) % 5) / 6 + 0.01 * k for k in range(answers)),
        )
        for i in range(n)
    ]
    return given(make_records(n), lists)


def text_group(lengths: Sequence[int], rewards: Sequence[float]) -> PromptGroup:
    prompt = Prompt(token_ids=torch.arange(3), positions=torch.arange(3).expand(3, 3))
    completions = [
        Completion(token_ids=torch.arange(n), scalars={"reward": r}) for n, r in zip(lengths, rewards, strict=True)
    ]
    return PromptGroup(prompt, completions)


def method(records: Sequence[Record] = (), policy: Any = None, **options: Any) -> PerPO:
    context = Context(
        policy=policy,
        stream=RecordStream(records or make_records(2), order="file"),
        rng=torch.Generator().manual_seed(0),
        rollout=RolloutRecipe(group_size=4, max_new_tokens=6),  # type: ignore[call-arg]
        reward=RewardRecipe(),
    )
    return PerPO(PerPOOptions(**options), context)


def weighed(groups: list[PromptGroup], **options: Any) -> list[PromptGroup]:
    """The groups that ``prepare`` returns for packing."""
    made = method(**options)
    chosen = [g for g in map(made._choose, groups) if g is not None]
    made._weigh(groups, chosen)
    return chosen


def formula(logp: Tensor, ref: Tensor, groups: Sequence[PromptGroup], kind: str, beta: float, gamma: float) -> Tensor:
    """The step's loss as in the paper: float64, loops over lists, sorted by reward, and over pairs."""
    total, at, tokens = logp.new_zeros(()), 0, 0
    for group in groups:
        scores, parts = [], []
        for completion in group.completions:
            n = len(completion.token_ids)
            scores.append((logp[at : at + n] - ref[at : at + n]).sum())
            parts.append(logp[at : at + n])
            at += n
        rewards = [c.scalars["reward"] for c in group.completions]
        order = sorted(range(len(rewards)), key=lambda i: -rewards[i])
        s, r = [scores[i] for i in order], [rewards[i] for i in order]
        pairs = [(i, j) for i, j in itertools.combinations(range(len(s)), 2) if r[i] > r[j]]
        if kind == "sft":
            total, tokens = total - parts[order[0]].sum(), tokens + len(parts[order[0]])
        elif kind == "dpo":
            total = total - torch.nn.functional.logsigmoid(beta * (s[0] - s[-1]))
        elif kind == "listmle":
            total = total + sum(torch.logsumexp(beta * torch.stack(s[i:]), 0) - beta * s[i] for i in range(len(s)))
        else:
            weight = [(r[i] - r[j]) ** (gamma if kind == "perpo" else 0.0) for i, j in pairs]
            terms = [torch.log1p(torch.exp(-beta * (s[i] - s[j]))) for i, j in pairs]
            total = total + sum(w * t for w, t in zip(weight, terms, strict=True)) / sum(weight)
    return total / (tokens if kind == "sft" else len(groups))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("beta", "gamma"), [(0.1, 0.5), (1.5, 2.0)])
def test_loss_and_gradient_follow_the_formula(kind: str, beta: float, gamma: float) -> None:
    groups = [
        text_group([3, 1, 4, 2], [0.3, 0.9, 0.0, 0.31]),
        text_group([2, 5], [0.1, 0.8]),
        text_group([1, 1, 6], [0.5, 0.2, 0.7]),
    ]
    chosen = weighed(groups, kind=kind)
    batch = pack_row(chosen)
    generator = torch.Generator().manual_seed(3)
    logp = -3 * torch.rand(len(batch.targets), generator=generator, dtype=torch.float64)
    ref = logp + torch.randn(len(logp), generator=generator, dtype=torch.float64)
    batch.per_token["ref_logp"] = ref
    ours, theirs = logp.clone().requires_grad_(), logp.clone().requires_grad_()
    loss, metrics = preference_loss(ours, batch, PerPOOptions(kind=kind, beta=beta, gamma=gamma))  # type: ignore[arg-type]
    expected = formula(theirs, ref, chosen, kind, beta, gamma)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)
    assert not any(value.requires_grad for value in metrics.values())


def test_mean_scores_divide_by_the_answers_own_length() -> None:
    groups = weighed([text_group([2, 8], [1.0, 0.0])])
    batch = pack_row(groups)
    batch.per_token["ref_logp"] = torch.zeros(10)
    logp = torch.cat([torch.full((2,), -1.0), torch.full((8,), -2.0)])
    loss, metrics = preference_loss(logp, batch, PerPOOptions(score="mean", beta=1.0))
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1.0)))
    assert metrics["list/margin"].item() == pytest.approx(1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_order_of_answers_does_not_matter_once_rewards_are_given(kind: str) -> None:
    lengths, rewards = [3, 1, 4, 2], [0.3, 0.9, 0.0, 0.31]
    logps = [-torch.rand(n, dtype=torch.float64) for n in lengths]
    losses = []
    for order in ([0, 1, 2, 3], [2, 0, 3, 1], [3, 2, 1, 0]):
        group = text_group([lengths[i] for i in order], [rewards[i] for i in order])
        for completion, i in zip(group.completions, order, strict=True):
            completion.per_token["given"] = logps[i]
        batch = pack_row(weighed([group], kind=kind))
        batch.per_token["ref_logp"] = torch.zeros(len(batch.targets), dtype=torch.float64)
        losses.append(preference_loss(batch.per_token["given"], batch, PerPOOptions(kind=kind))[0].item())  # type: ignore[arg-type]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_add_up_to_the_step(kind: str) -> None:
    groups = [text_group([3, 2], [0.0, 1.0]), text_group([1, 4, 2], [0.2, 0.1, 0.7]), text_group([5, 1], [0.4, 0.3])]
    chosen = weighed(groups, kind=kind)
    options = PerPOOptions(kind=kind)  # type: ignore[arg-type]
    one, parts = pack_row(chosen), pack(chosen, 8)
    assert len(parts) == 3
    logp, ref = torch.randn(len(one.targets)), torch.randn(len(one.targets))
    sizes = [len(part.targets) for part in parts]
    one.per_token["ref_logp"] = ref
    total = 0.0
    for part, own, its in zip(parts, logp.split(sizes), ref.split(sizes), strict=True):
        part.per_token["ref_logp"] = its
        total += preference_loss(own, part, options)[0].item()
    assert total == pytest.approx(preference_loss(logp, one, options)[0].item(), rel=1e-5)


def test_lists_that_teach_no_order_are_skipped_and_counted(tiny_folder: Folder) -> None:
    policy = load_policy(tiny_folder("qwen2_5"), device="cpu")
    lists = [
        RankedList(("a", "b"), (0.5, 0.5)),
        RankedList(("a",), (0.5,)),
        RankedList(("a", "b", "c"), (0.5, 0.45, 0.5)),
        RankedList(("a", "bb"), (0.1, 0.9)),
    ]
    records = given(make_records(4), lists)
    prepared = method(records, policy, min_gap=0.2).prepare(records)
    assert [g.record.id for g in prepared.groups if g.record] == ["r3"]
    counts = {k: v for k, v in prepared.metrics.items() if k.startswith("lists/")}
    assert counts == {"lists/used": 1.0, "lists/single": 1.0, "lists/equal": 1.0, "lists/small_gap": 1.0}
    assert {c.scalars["list_weight"] for c in prepared.groups[0].completions} == {1.0}
    assert len(prepared.sampled) == 4


def test_each_list_is_trained_with_its_own_rewards(tiny_folder: Folder) -> None:
    """The authors' released loader uses one fixed item's rewards for every sample."""
    policy = load_policy(tiny_folder("qwen2_5"), device="cpu")
    records = list_records()
    prepared = method(records, policy).prepare(records)
    batch = pack_row(prepared.groups)
    expected = [reward for record in records for reward in record.target["list"].rewards]
    assert batch.per_completion["reward"].tolist() == pytest.approx(expected)
    assert len({tuple(r.target["list"].rewards) for r in records}) == len(records)
    answers = [text for record in records for text in record.target["list"].answers]
    assert [policy.decode(c.token_ids) for c in batch.completions] == answers
    assert all(int(c.token_ids[-1]) in policy.eos_token_ids for c in batch.completions)


def test_rewards_that_are_not_given_come_from_the_target(tiny_folder: Folder) -> None:
    policy = load_policy(tiny_folder("qwen2_5"), device="cpu")
    records = given(make_records(2), [RankedList((TEXT[i:], TEXT[i:-1], "zzz"), None) for i in range(2)])
    prepared = method(records, policy).prepare(records)
    for group in prepared.groups:
        rewards = [c.scalars["reward"] for c in group.completions]
        assert rewards[0] == 1.0
        assert rewards[0] > rewards[1] > 0.9 > 0.1 > rewards[2]


def test_unreadable_answers_of_a_given_list_may_be_its_worst(tiny_folder: Folder) -> None:
    policy = load_policy(tiny_folder("qwen2_5"), device="cpu")
    answers = (TEXT, "zzz", "<think>so", "")  # the last two say nothing
    records = given(make_records(1), [RankedList(answers, None)])
    found = {}
    for unreadable in ("drop", "worst"):
        (group,) = method(records, policy, unreadable=unreadable).prepare(records).groups
        found[unreadable] = [round(c.scalars["reward"], 3) for c in group.completions]
    assert found["worst"] == [*found["drop"][:2], -1.0, -1.0]
    assert min(found["drop"]) == 0.0
    (pair,) = method(records, policy, kind="dpo", unreadable="worst").prepare(records).groups
    assert [c.text for c in pair.completions] == [TEXT, "<think>so"]


def test_lists_about_images_of_another_size_are_refused(tiny_folder: Folder) -> None:
    """Coordinates for one picture size are other positions at another: with wrong pixel limits training must not
    start."""
    policy = load_policy(tiny_folder("qwen2_5"), device="cpu")
    record = list_records(1)[0]
    for size, fits in (((56, 56), True), ((112, 112), False)):
        (given_one,) = given([record], [record.target["list"]._replace(resized=(size,))])
        if fits:
            assert len(method([given_one], policy).prepare([given_one]).groups) == 1
        else:
            with pytest.raises(ValueError, match=r"r0: .*112x112 pixels, this model sees 56x56.*max_pixels"):
                method([given_one], policy).prepare([given_one])


def test_shared_prompt_equals_one_answer_at_a_time(tiny_folder: Folder) -> None:
    """Loss and parameter gradients of lists as prefix-shared groups, and with a repeated prompt for each answer."""
    policy = load_policy(tiny_folder("qwen2_5"), device="cpu", dtype=torch.float64)
    records = list_records(2)
    options = PerPOOptions(beta=0.7)
    prepared = method(records, policy, beta=0.7).prepare(records)
    shared = pack_row(prepared.groups)
    singles = pack_row([replace(g, completions=[c]) for g in prepared.groups for c in g.completions])
    reference = torch.zeros(len(shared.targets), dtype=torch.float64)
    results = []
    for layout in (shared, singles):
        policy.core.zero_grad()
        batch = PackedBatch(**{**vars(shared), "per_token": {"ref_logp": reference}})
        loss, _ = preference_loss(policy.logprob(layout).logp.double(), batch, options)
        loss.backward()
        grads = {n: p.grad.clone() for n, p in policy.core.named_parameters() if p.grad is not None}
        results.append((loss.item(), grads))
    (loss, grads), (other, repeated) = results
    assert shared.input_ids.shape[1] < singles.input_ids.shape[1]
    assert loss == pytest.approx(other, rel=1e-6)
    assert grads.keys() == repeated.keys()
    assert max(g.abs().max() for g in grads.values()) > 0
    for name, grad in grads.items():
        torch.testing.assert_close(grad, repeated[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_training_raises_the_best_answer_over_the_worst(tiny_folder: Folder, tmp_path: Path, kind: str) -> None:
    records = list_records(3)
    recipe = make_recipe(
        tiny_folder("qwen2_5"), tmp_path / kind, method={"kind": kind}, optim__steps=6, optim__token_budget=4096
    )
    train(recipe, records=records, show=False)
    rows = steady_rows(tmp_path / kind)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[0]["lists/used"] == 3.0
    if kind != "sft":
        assert abs(rows[0]["list/margin"]) < 1e-5
        assert rows[-1]["list/margin"] > 0


def brief_policy(folder: Path, **options: Any) -> Policy:
    """A random model whose answers end: a fifth of the characters are end tokens."""
    policy = load_policy(folder, device="cpu", **options)
    policy.eos_token_ids = (*policy.eos_token_ids, *range(0, 256, 5))
    return policy


def test_two_runs_with_one_seed_are_identical(tiny_folder: Folder, tmp_path: Path) -> None:
    folder = tiny_folder("qwen2_5")
    changes: dict[str, Any] = {"method": {"kind": "perpo", "online_every": 2}, "optim__steps": 3}
    for name in ("a", "b"):
        recipe = make_recipe(folder, tmp_path / name, **changes)
        train(recipe, records=make_records(), policy=brief_policy(folder), show=False)
    assert steady_rows(tmp_path / "a")[-1]["grad_norm"] > 0
    assert steady_rows(tmp_path / "a") == steady_rows(tmp_path / "b")


def test_online_lists_are_sampled_every_k_steps(tiny_folder: Folder, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"method": {"kind": "perpo", "online_every": 3}, "optim__steps": 5}
    folder = tiny_folder("qwen2_5")
    recipe = make_recipe(folder, tmp_path, **changes)
    train(recipe, records=make_records(24), policy=brief_policy(folder), show=False)
    rows = steady_rows(tmp_path)
    assert [row.get("lists/resampled") for row in rows] == [9.0, None, None, 9.0, None]
    assert all(row["lists/used"] > 0 for row in rows)


def test_online_lists_keep_unreadable_answers_as_the_worst(tiny_folder: Folder, tmp_path: Path) -> None:
    """A random model's answers are never boxes: without the option nothing is learned, with it nothing is preferred."""
    folder = tiny_folder("qwen2_5")
    records = list(load_data("scenes:grounding?n=6&size=56"))
    kept = {}
    for unreadable in ("drop", "worst"):
        out = tmp_path / unreadable
        recipe = make_recipe(folder, out, method={"kind": "perpo", "unreadable": unreadable}, optim__steps=1)
        train(recipe, records=records, policy=brief_policy(folder), show=False)
        kept[unreadable] = steady_rows(out)[0]
    assert kept["drop"]["lists/answers_kept"] == 0
    assert kept["worst"]["lists/answers_kept"] > 0
    assert kept["worst"]["reward/mean"] == -1
    assert kept["worst"]["lists/used"] == 0  # all are equally bad


def test_a_step_without_any_whole_answer_changes_nothing(tiny_folder: Folder, tmp_path: Path) -> None:
    folder = tiny_folder("qwen2_5")
    policy = load_policy(folder, device="cpu")
    before = policy.head_weight.clone()
    recipe = make_recipe(folder, tmp_path, method={"kind": "perpo"}, optim__steps=1, rollout__max_new_tokens=1)
    summary = train(recipe, records=make_records(), policy=policy, show=False)
    assert summary.last["lists/used"] == 0
    assert summary.last["update/skipped"] == 1
    assert torch.equal(policy.head_weight, before)


def test_a_rank_without_any_whole_answer_keeps_step_with_the_others(tiny_folder: Folder, tmp_path: Path) -> None:
    """If another rank has a micro-batch, this one runs one of weight 0, as the collectives need all ranks."""
    recipe = make_recipe(tiny_folder("qwen2_5"), tmp_path, method={"kind": "perpo"}, rollout__max_new_tokens=1)
    run = Run(recipe, records=make_records())
    run.engine.maximum = lambda value: value + 1  # type: ignore[method-assign]
    before = run.policy.head_weight.clone()
    row, _ = run.step(1)
    assert row["lists/used"] == 0
    assert row["grad_norm"] == 0
    assert torch.equal(run.policy.head_weight, before)


def test_lists_in_some_steps_and_not_in_others(tiny_folder: Folder, tmp_path: Path) -> None:
    """Steps with given lists do not use up the sampled ones; a step with both kinds is refused."""
    folder = tiny_folder("qwen2_5")
    bare = make_records(6)
    ranked = RankedList(("a", "b"), (1.0, 0.0))
    listed = [replace(r, id=f"l{i}", target={**r.target, "list": ranked}) for i, r in enumerate(make_records(2))]
    changes: dict[str, Any] = {"method": {"kind": "perpo", "online_every": 2}, "data__order": "file"}
    changes |= {"data__prompts_per_step": 2, "optim__steps": 4}
    ordered = [*bare[:2], *listed, *bare[2:]]
    recipe = make_recipe(folder, tmp_path / "apart", **changes)
    assert train(recipe, records=ordered, policy=brief_policy(folder), show=False).steps == 4
    mixed = make_recipe(folder, tmp_path / "mixed", **changes)
    with pytest.raises(ValueError, match="l0 has ranked answers and r0 has none"):
        train(mixed, records=[bare[0], listed[0]], policy=brief_policy(folder), show=False)


class Stop(Exception):
    """Ends a run between two steps."""


def test_an_online_run_goes_on_where_it_stopped(tiny_folder: Folder, tmp_path: Path) -> None:
    """If a run stops between two samplings, its checkpoint holds the lists of the coming steps."""
    folder = tiny_folder("qwen2_5")
    changes: dict[str, Any] = {"method": {"kind": "perpo", "online_every": 4}, "optim__steps": 5}
    whole = make_recipe(folder, tmp_path / "whole", **changes)
    train(whole, records=make_records(24), policy=brief_policy(folder), show=False)

    def stop(row: dict[str, Any]) -> None:
        if row["step"] == 3:
            raise Stop

    parts = make_recipe(folder, tmp_path / "parts", **changes)
    with pytest.raises(Stop):
        train(parts, records=make_records(24), policy=brief_policy(folder), on_step=stop, show=False)
    train(parts, records=make_records(24), policy=brief_policy(folder), resume=True, show=False)
    assert steady_rows(tmp_path / "whole") == steady_rows(tmp_path / "parts")
    ends = [keeping.latest_checkpoint(tmp_path / name) for name in ("whole", "parts")]
    states = [json.loads((end / "rank-0.json").read_text()) for end in ends if end is not None]
    assert states[0]["method"]["lists"]
    assert states[0] == states[1]


def test_under_lora_the_reference_keeps_the_first_projector(tiny_folder: Folder, tmp_path: Path) -> None:
    """Modules trained beside the adapters must not change the reference, and are saved with the model."""
    from safetensors.torch import load_file

    folder = tiny_folder("qwen2_5")
    lora = {"rank": 2, "alpha": 4.0, "also_train": ["visual.merger"]}
    groups = [{"match": "visual.merger", "lr": 0.05}]
    recipe = make_recipe(folder, tmp_path, method={"kind": "perpo"}, model__lora=lora, optim__groups=groups)
    policy = load_policy(folder, device="cpu", lora=recipe.model.lora.spec() if recipe.model.lora else None)
    found = parameter_groups(policy.model, recipe.optim)
    assert {g["lr"]: all("visual.merger" in n for n in g["names"]) for g in found if g["lr"] == 0.05} == {0.05: True}
    records = list_records(3)
    batch = pack_row(method(records, policy).prepare(records).groups)
    with policy.reference():
        before = policy.logprob(batch).logp
    summary = train(recipe, records=records, policy=policy, show=False)
    with policy.reference():
        torch.testing.assert_close(policy.logprob(batch).logp, before, rtol=0, atol=0)
    trained = policy.logprob(batch).logp
    assert (trained - before).abs().max() > 1e-3
    assert summary.model is not None
    names = load_file(folder / "model.safetensors")
    saved = load_file(summary.model / "model.safetensors")
    assert names.keys() == saved.keys()
    moved = {n for n in names if not torch.equal(names[n], saved[n])}
    assert any("merger" in n for n in moved)
    assert not any("visual.blocks" in n for n in moved)
    torch.testing.assert_close(load_policy(summary.model, device="cpu").logprob(batch).logp, trained, rtol=0, atol=2e-4)


def test_a_module_that_does_not_exist_is_named(tiny_folder: Folder) -> None:
    with pytest.raises(ValueError, match=r"visual.merge.*near: .*visual\.merger"):
        load_policy(tiny_folder("qwen2_5"), device="cpu", lora={"rank": 2, "also_train": ["visual.merge"]})


@pytest.mark.parametrize("name", ["perpo-grounding-7b", "perpo-ocr-7b"])
def test_shipped_recipes_hold_the_papers_constants(name: str) -> None:
    recipe = load_recipe(name)
    assert method_for(recipe.method) is PerPO
    assert (recipe.method.beta, recipe.method.gamma) == (0.1, 0.5)  # type: ignore[attr-defined]
    assert recipe.model.lora is not None
    assert (recipe.model.lora.rank, recipe.model.lora.alpha, recipe.model.lora.dropout) == (128, 256, 0.05)
    assert recipe.optim.lr == recipe.optim.groups[0].lr == 5e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", ["grounding", "ocr"])
def test_tiny_recipes_take_every_kind(kind: str, task: str) -> None:
    recipe = load_recipe(f"perpo-{task}-tiny", {"method.kind": kind, "data.spec": "lists:some.jsonl"})
    assert recipe.method.kind == kind  # type: ignore[attr-defined]


def test_lists_from_a_file_train_like_lists_in_memory(tiny_folder: Folder, tmp_path: Path) -> None:
    rows = []
    for record in list_records(3):
        record.images[0].save(tmp_path / f"{record.id}.png")  # type: ignore[union-attr]
        answers, rewards, _ = record.target["list"]
        prompt = record.messages[0]["content"][1]["text"]
        row = {"id": record.id, "task": "ocr", "images": [f"{record.id}.png"], "prompt": prompt}
        rows.append(row | {"answers": list(answers), "rewards": list(rewards), "target": {"text": "t"}})
    file = tmp_path / "lists.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes: dict[str, Any] = {"method": {"kind": "perpo"}, "optim__steps": 2}
    folder = tiny_folder("qwen2_5")
    train(make_recipe(folder, tmp_path / "memory", **changes), records=list_records(3), show=False)
    read = load_data(f"lists:{file}")
    train(make_recipe(folder, tmp_path / "file", **changes), records=read, show=False)
    assert steady_rows(tmp_path / "file") == steady_rows(tmp_path / "memory")
