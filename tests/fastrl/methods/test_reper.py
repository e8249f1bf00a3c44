"""RePer: the loss against its formula in float64, tokens with gradient, special cases, and packed against single
turns."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from fastrl.batch import Completion, PackedBatch, Prompt, PromptGroup, pack, pack_row
from fastrl.data import load_data
from fastrl.data.records import Record, question
from fastrl.data.reflection import SpokenTurn, dialogue_messages
from fastrl.methods.base import Clock
from fastrl.methods.perpo import PerPO, PerPOOptions
from fastrl.methods.reper import RePer, RePerOptions, reflective_loss, set_turn_weights
from fastrl.models.load import Policy, load_policy
from fastrl.recipe import RewardRecipe, load_recipe
from tests.helpers.training import make_recipe, steady_rows


def make(**options: Any) -> RePerOptions:
    return RePerOptions(**options)


def dialogue_group(lengths: Sequence[int], scores: Sequence[float]) -> PromptGroup:
    """A text prompt with turns of these lengths, and two tokens of feedback between them."""
    turn, sigma = [], []
    for number, (length, score) in enumerate(zip(lengths, scores, strict=True)):
        turn += ([-1] * 2 if number else []) + [number] * length
        sigma += ([0.0] * 2 if number else []) + [score] * length
    completion = Completion(torch.arange(len(turn)))
    completion.per_token = {
        "turn": torch.tensor(turn),
        "mask": (torch.tensor(turn) >= 0).float(),
        "sigma": torch.tensor(sigma),
    }
    prompt = Prompt(token_ids=torch.arange(3), positions=torch.arange(3).expand(3, 3))
    return PromptGroup(prompt, [completion])


def step_groups(options: RePerOptions) -> list[PromptGroup]:
    groups = [
        dialogue_group([3, 1, 4], [0.1, 0.5, 0.95]),
        dialogue_group([2], [1.0]),
        dialogue_group([5, 2], [0.0, 0.7]),
    ]
    set_turn_weights(groups, options)
    return groups


def formula(logp: Tensor, batch: PackedBatch, options: RePerOptions) -> Tensor:
    """Equation 2 as printed: float64, loops over dialogues, turns and tokens."""
    total, tokens = logp.new_zeros(()), 0
    for d in range(len(batch.completions)):
        mine = batch.completion_of_token == d
        turns = sorted(set(batch.per_token["turn"][mine].tolist()) - {-1})
        of_dialogue = logp.new_zeros(())
        for t in turns:
            chosen = mine & (batch.per_token["turn"] == t)
            sigma = batch.per_token["sigma"][chosen][0].double()
            whole = {"sequence": logp[chosen].sum()[None], "mean": logp[chosen].mean()[None]}
            rows = whole.get(options.level, logp[chosen])
            value = sigma * rows + options.alpha * (1 - sigma) * torch.log1p(-rows.exp())
            if options.level == "sequence":
                of_dialogue = of_dialogue + value.sum() / (int(chosen.sum()) if options.aggregate == "turn" else 1)
            elif options.level == "mean":  # stands for each of its tokens
                of_dialogue = of_dialogue + value.sum() * (1 if options.aggregate == "turn" else int(chosen.sum()))
            else:
                of_dialogue = of_dialogue + (value.mean() if options.aggregate == "turn" else value.sum())
            tokens += int(chosen.sum())
        total = total + (of_dialogue / len(turns) if options.aggregate == "turn" else of_dialogue)
    return -total / (tokens if options.aggregate == "token" else len(batch.completions))


@pytest.mark.parametrize("aggregate", ["turn", "token", "sum"])
@pytest.mark.parametrize("level", ["token", "sequence", "mean"])
@pytest.mark.parametrize("alpha", [0.0, 1.0, 10.0])
def test_loss_and_gradient_follow_the_formula(aggregate: Any, level: Any, alpha: float) -> None:
    options = make(alpha=alpha, aggregate=aggregate, level=level)
    batch = pack_row(step_groups(options))
    logp = -torch.rand(len(batch.targets), generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 3 - 1e-2
    ours, theirs = logp.clone().requires_grad_(), logp.clone().requires_grad_()
    loss, _ = reflective_loss(ours, batch, options)
    expected = formula(theirs, batch, options)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-9)


def test_question_and_feedback_get_no_gradient() -> None:
    options = make()
    batch = pack_row(step_groups(options))
    logp = (-torch.rand(len(batch.targets)) * 3).requires_grad_()
    loss, _ = reflective_loss(logp, batch, options)
    loss.backward()
    assert logp.grad is not None
    outside = batch.per_token["turn"] < 0
    assert outside.sum() == 6
    assert (logp.grad[outside] == 0).all()
    assert (logp.grad[~outside] != 0).sum() >= (~outside).sum() - 1
    method = RePer(options, SimpleNamespace())  # type: ignore[arg-type]
    rows = method.rows(batch)
    assert rows is not None
    assert sorted(rows.tolist()) == (~outside).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("level", ["token", "sequence", "mean"])
def test_alpha_zero_is_weighted_likelihood_and_sigma_one_is_sft(level: Any) -> None:
    for options, ones in ((make(alpha=0.0, level=level), False), (make(alpha=10.0, level=level), True)):
        batch = pack_row(step_groups(options))
        if ones:
            batch.per_token["sigma"] = (batch.per_token["turn"] >= 0).float()
        logp = (-torch.rand(len(batch.targets), dtype=torch.float64) * 3).requires_grad_()
        loss, _ = reflective_loss(logp, batch, options)
        (gradient,) = torch.autograd.grad(loss, logp)
        pull = batch.per_token["weight"] * batch.per_token["sigma"]
        torch.testing.assert_close(loss, -(pull.double() * logp.detach()).sum(), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(gradient, -pull.double(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("aggregate", ["turn", "token", "sum"])
def test_the_reductions_are_exact(aggregate: Any) -> None:
    """alpha = 0 is likelihood weighted by the score; sigma = 1 is supervised fine-tuning for any alpha. Gradients
    are equal bit for bit, losses up to the order of the sum."""
    generator = torch.Generator().manual_seed(1)
    for options, ones in ((make(alpha=0.0, aggregate=aggregate), False), (make(aggregate=aggregate), True)):
        batch = pack_row(step_groups(options))
        if ones:
            batch.per_token["sigma"] = (batch.per_token["turn"] >= 0).float()
        weight, sigma = batch.per_token["weight"], batch.per_token["sigma"]
        logp = (-torch.rand(len(batch.targets), generator=generator) * 5).requires_grad_()
        loss, _ = reflective_loss(logp, batch, options)
        loss.backward()
        assert torch.equal(logp.grad, -(weight * sigma))  # type: ignore[arg-type]
        assert loss.item() == pytest.approx(-(weight * sigma * logp.detach()).double().sum().item(), rel=1e-6)
        answers = batch.per_token["turn"] >= 0
        if ones and aggregate == "token":
            assert loss.item() == pytest.approx(-logp[answers].mean().item(), rel=1e-6)


@pytest.mark.parametrize("value", [0.0, -1e-7, -1e-3, -90.0, -3e4])
def test_probabilities_of_zero_and_one_in_bf16_stay_finite(value: float) -> None:
    options = make()
    batch = pack_row([dialogue_group([4, 4], [0.0, 1.0])])
    batch.per_token["weight"] = batch.per_token["mask"] / 8
    logp = torch.full((len(batch.targets),), value, dtype=torch.bfloat16, requires_grad=True)
    loss, _ = reflective_loss(logp, batch, options)
    loss.backward()
    assert loss.isfinite()
    assert logp.grad is not None
    assert logp.grad.isfinite().all()


def test_the_sequence_reading_pushes_nothing_down() -> None:
    """As the docstring says: for some length of an answer, log(1 − π) has no slope left."""
    logp = torch.full((20,), -1.0, requires_grad=True)
    slopes = {}
    for level in ("token", "sequence"):
        options = make(level=level)
        group = dialogue_group([20], [0.0])
        set_turn_weights([group], options)
        loss, _ = reflective_loss(logp, pack_row([group]), options)
        slopes[level] = torch.autograd.grad(loss, logp)[0].abs().sum().item()
    assert slopes["sequence"] < 1e-6 * slopes["token"]


def test_the_split_into_batches_changes_nothing() -> None:
    options = make()
    groups = step_groups(options)
    whole = pack_row(groups)
    logp = -torch.rand(len(whole.targets), dtype=torch.float64)
    expected, _ = reflective_loss(logp, whole, options)
    parts, at = [], 0
    for batch in pack(groups, 12):
        n = len(batch.targets)
        parts.append(reflective_loss(logp[at : at + n], batch, options)[0])
        at += n
    assert len(parts) == 3
    torch.testing.assert_close(torch.stack(parts).sum(), expected)


TURNS = (
    SpokenTurn("A red circle.", 0.2, "Could you generate a better one?"),
    SpokenTurn("A red square.", 0.5, "Please try again."),
    SpokenTurn("A blue square.", 0.95),
)


def dialogue_record(name: str = "d", turns: Sequence[SpokenTurn] = TURNS) -> Record:
    image = Image.new("RGB", (56, 56), (200, 30, 30))
    return Record(name, "caption", (image,), question("caption", prompt="Describe."), {"dialogue": tuple(turns)})


def context(policy: Policy) -> Any:
    return SimpleNamespace(
        policy=policy, clock=Clock(), average=float, reward=RewardRecipe(), rewards={}, functions=None
    )


def test_packed_dialogue_equals_turn_by_turn(tiny_folder: Callable[[str], Path]) -> None:
    policy = load_policy(tiny_folder("qwen2_5"), dtype=torch.float32)
    record = dialogue_record()
    prepared = RePer(make(), context(policy)).prepare([record])
    (batch,) = pack(prepared.groups, 4096)
    with torch.no_grad():
        packed = policy.logprob(batch).logp
        for number, turn in enumerate(TURNS):
            message = dialogue_messages(record.messages, TURNS[:number])
            prompt, _ = policy.encode(replace(record, messages=message))
            single = pack_row([PromptGroup(prompt, [Completion(policy.encode_text(turn.answer))])])
            chosen = batch.per_token["turn"] == number
            torch.testing.assert_close(policy.logprob(single).logp, packed[chosen], rtol=1e-4, atol=1e-4)
            sigma = batch.per_token["sigma"][chosen]
            torch.testing.assert_close(sigma, torch.full_like(sigma, turn.score))


def test_packed_loss_and_gradient_equal_turn_by_turn(tiny_folder: Callable[[str], Path]) -> None:
    policy, options = load_policy(tiny_folder("qwen2_5"), dtype=torch.float32), make(alpha=10.0)
    record = dialogue_record()
    parameters = [p for p in policy.core.model.language_model.parameters() if p.requires_grad]
    (batch,) = pack(RePer(options, context(policy)).prepare([record]).groups, 4096)
    packed, _ = reflective_loss(policy.logprob(batch).logp, batch, options)
    expected = torch.autograd.grad(packed, parameters)
    total, apart = 0.0, [torch.zeros_like(p) for p in parameters]
    for number, turn in enumerate(TURNS):
        messages = dialogue_messages(record.messages, TURNS[:number])
        prompt, _ = policy.encode(replace(record, messages=messages))
        answer = policy.encode_text(turn.answer)
        flat = torch.full((len(answer),), 1.0)
        own = {"turn": 0 * flat.long(), "sigma": turn.score * flat, "weight": flat / len(answer) / len(TURNS)}
        single = pack_row([PromptGroup(prompt, [Completion(answer, per_token=own)])])
        loss, _ = reflective_loss(policy.logprob(single).logp, single, options)
        total += loss.item()
        for sum_, gradient in zip(apart, torch.autograd.grad(loss, parameters), strict=True):
            sum_ += gradient
    assert packed.item() == pytest.approx(total, rel=1e-5)
    for ours, theirs in zip(expected, apart, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_options_choose_turns_and_sigma(tiny_folder: Callable[[str], Path]) -> None:
    policy = load_policy(tiny_folder("qwen2_5"), dtype=torch.float32)
    last = RePer(make(turns="last", sigma="one"), context(policy)).prepare([dialogue_record()])
    (completion,) = last.groups[0].completions
    live = completion.per_token["weight"] > 0
    assert set(completion.per_token["turn"][live].tolist()) == {2}
    assert set(completion.per_token["sigma"][live].tolist()) == {1.0}
    best = RePer(make(sigma="best"), context(policy)).prepare([dialogue_record()]).groups[0].completions[0]
    sigma = [float(best.per_token["sigma"][best.per_token["turn"] == n].mean()) for n in range(3)]
    assert sigma == pytest.approx([0.2 / 0.95, 0.5 / 0.95, 1.0])
    with pytest.raises(ValueError, match="reflection:FILE"):
        RePer(make(), context(policy)).prepare([replace(dialogue_record(), target={})])


def write_dialogues(folder: Path, n: int = 6) -> Path:
    rows = []
    for i in range(n):
        Image.new("RGB", (56, 56), (40 * i % 256, 90, 200)).save(folder / f"{i}.png")
        turns = [{"answer": t.answer, "score": t.score, "feedback": t.feedback} for t in TURNS[-1 - i % 3 :]]
        candidates = [{"answer": t.answer, "score": t.score} for t in TURNS]
        rows.append(
            {"id": f"d{i}", "images": [f"{i}.png"], "question": "Describe.", "turns": turns, "candidates": candidates}
        )
    file = folder / "dialogues.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return file


@pytest.mark.parametrize("kind", ["reper", "sft", "dpo", "lipo"])
def test_the_same_file_trains_the_method_and_its_baselines(
    tiny_folder: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    from fastrl.trainer import train

    spec = f"reflection:{write_dialogues(tmp_path)}"
    recipe = make_recipe(
        tiny_folder("qwen2_5"), tmp_path / kind, method={"kind": kind}, data__spec=spec, optim__steps=6, optim__lr=3e-3
    )
    train(recipe, show=False)
    rows = steady_rows(tmp_path / kind)
    assert len(rows) == 6
    assert all(row["grad_norm"] > 0 for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_baselines_read_all_candidates(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    records = load_data(f"reflection:{write_dialogues(tmp_path, 1)}")
    method = PerPO(
        PerPOOptions.model_validate({"kind": "dpo"}), context(load_policy(tiny_folder("qwen2_5"), dtype=torch.float32))
    )
    (group,) = method.prepare(records).groups  # its dialogue has a single turn
    assert [c.scalars["reward"] for c in group.completions] == [0.95, 0.2]


@pytest.mark.parametrize("size", ["7b", "13b"])
def test_the_shipped_recipes_hold_the_papers_constants(size: str) -> None:
    recipe = load_recipe(f"reper-caption-{size}")
    method = recipe.method
    assert isinstance(method, RePerOptions)
    assert (method.alpha, method.level, method.turns, method.sigma) == (10.0, "token", "all", "score")
    assert (recipe.data.prompts_per_step, recipe.optim.schedule, recipe.optim.warmup) == (8, "cosine", 0.03)
    assert recipe.model.freeze == ["vision", "projector"]
    assert (recipe.optim.lr == 1e-6) == (recipe.model.lora is None)  # the paper's rate is for the whole LLM
    assert recipe.optim.steps * recipe.data.prompts_per_step == pytest.approx(3649 + 2621 + 3795, abs=8)  # one epoch


@pytest.mark.parametrize("size", ["tiny", "7b", "13b"])
def test_baselines_and_the_sweep_of_alpha_are_one_key_away(size: str) -> None:
    for kind in ("sft", "dpo", "lipo"):
        assert load_recipe(f"reper-caption-{size}", [f"method={{kind: {kind}}}"]).method.kind == kind
    swept = [load_recipe(f"reper-caption-{size}", [f"method.alpha={alpha}"]).method for alpha in range(0, 11, 2)]
    assert [method.alpha for method in swept if isinstance(method, RePerOptions)] == [0, 2, 4, 6, 8, 10]
