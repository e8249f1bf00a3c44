"""Before any timing: from the same sampled tokens, both trainers must compute the same gradient."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from benchmarks.versus.ours import Fastrl
from benchmarks.versus.theirs import Trl
from benchmarks.versus.work import Work, make_records
from fastrl.batch import pack
from fastrl.data.records import Record

COSINE, NORM = 0.9999, 1e-3  # at least; at most |norm ratio - 1|


class GradientMismatch(AssertionError):
    """The two sides compute different gradients, so their times are not comparable."""


def compare(folder: Path, work: Work, pictures: Path, *, train: str, device: torch.device) -> dict[str, Any]:
    """Cosine and norm ratio (fastrl over TRL) of one step's gradient over all trained parameters, in float32.

    Both start from the same folder and records. fastrl samples; TRL uses these tokens instead of generating and does
    everything else itself: chat template, pixels, rewards, advantages, micro-batches, loss.

    Raises:
        GradientMismatch: prompts, rewards or gradients differ.
    """
    from fastrl.models.load import load_tokenizer

    records = make_records(work, work.prompts, pictures, load_tokenizer(folder))
    ours = Fastrl(folder, work, work.group, records, train=train, device=device, dtype="float32")
    unclipped = {"max_grad_norm": 0.0, "bf16": False}
    theirs = Trl(folder, work, work.group, records, train=train, device=device, **unclipped)
    _same_adapters(ours, theirs)
    groups, mine = _ours(ours, records)
    answers = [c.token_ids.tolist() for group in groups for c in group.completions]
    seen, other = _theirs(theirs, answers)
    _expect_equal(
        "prompt tokens", seen["prompts"], [g.prompt.token_ids.tolist() for g in groups for _ in g.completions]
    )
    rewards = [c.scalars["reward"] for group in groups for c in group.completions]
    if not torch.allclose(torch.tensor(seen["rewards"]), torch.tensor(rewards), atol=1e-6):
        raise GradientMismatch(f"rewards differ: fastrl {rewards}, TRL {seen['rewards']}")
    found = agreement(mine, other)
    if found["cosine"] < COSINE or abs(found["norm_ratio"] - 1) > NORM:
        raise GradientMismatch(f"gradients differ: {found}")
    return {"train": train, "work": work.name, "tokens": sum(map(len, answers)), **found}


def agreement(mine: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Any]:
    """Cosine, norm ratio, number of values, and the parameter with the largest relative error.

    Raises:
        GradientMismatch: the parameter names differ.
    """
    _expect_equal("trained parameters", sorted(mine), sorted(other))
    dot, a, b = (math.fsum(_dot(x, y) for x, y in _pairs(mine, other, which)) for which in ("ab", "aa", "bb"))
    errors = {name: float((mine[name] - other[name]).norm() / other[name].norm().clamp(min=1e-30)) for name in mine}
    worst = max(errors, key=errors.__getitem__)
    return {
        "cosine": dot / math.sqrt(a * b) if a * b > 0 else 0.0,
        "norm_ratio": math.sqrt(a / b) if b > 0 else math.inf,
        "values": sum(g.numel() for g in mine.values()),
        "worst_parameter": worst,
        "worst_relative_error": errors[worst],
    }


def _pairs(mine: dict[str, Tensor], other: dict[str, Tensor], which: str) -> Iterable[tuple[Tensor, Tensor]]:
    sides = {"a": mine, "b": other}
    return ((sides[which[0]][name], sides[which[1]][name]) for name in mine)


def _dot(x: Tensor, y: Tensor) -> float:
    return float(x.double().flatten() @ y.double().flatten())


def _same_adapters(ours: Fastrl, theirs: Trl) -> None:
    """Set both sides' adapters to the same random values. (The second factor starts at 0, so the first would have no
    gradient.)"""
    source = dict(ours.run.policy.model.named_parameters())
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.trainer.model.named_parameters():
            if ".lora_" in name:
                if ".lora_B." in name:
                    source[name].copy_(0.02 * torch.randn(parameter.shape, generator=rng))
                parameter.copy_(source[name])


def _ours(side: Fastrl, records: list[Record]) -> tuple[list[Any], dict[str, Tensor]]:
    run = side.run
    groups = run.method.prepare(records).sampled
    for batch in pack(groups, run.recipe.optim.token_budget):
        packed = batch.to(run.policy.device)
        result = run.policy.logprob(packed, return_entropy=True, rows=run.method.rows(batch))
        run.method.loss(result.logp, result.entropy, packed)[0].backward()
    return groups, _gradients(run.policy.model)


def _theirs(side: Trl, answers: list[list[int]]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    trainer, seen = side.trainer, {}
    gradients: dict[str, Tensor] = {}
    calculate = trainer._calculate_rewards

    def generate(prompt_ids: list[list[int]], *_: Any, **__: Any) -> tuple[list[list[int]], None]:
        seen["prompts"] = [list(ids) for ids in prompt_ids]
        return answers, None

    def rewards(*arguments: Any, **named: Any) -> Tensor:
        found = calculate(*arguments, **named)
        seen["rewards"] = found[:, 0].tolist()
        return found

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            gradients.update(_gradients(trainer.model))

    trainer._generate_single_turn, trainer._calculate_rewards = generate, rewards
    trainer.add_callback(Keep())
    side.run(["warm"])
    return seen, gradients


def _gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach().float().cpu().clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def _expect_equal(what: str, theirs: Any, ours: Any) -> None:
    if theirs != ours:
        raise GradientMismatch(f"{what} differ: fastrl {str(ours)[:200]}, TRL {str(theirs)[:200]}")
