"""Perception-R1: the loss against its formula in float64, normalisation over the step, zero-variance groups, counts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl.batch import PackedBatch, PromptGroup, pack, pack_row
from fastrl.data.records import Record
from fastrl.data.stream import RecordStream
from fastrl.methods.base import Context, set_token_weights
from fastrl.methods.perception_r1 import PerceptionR1, PerceptionR1Options, grpo_loss
from fastrl.recipe import RewardRecipe, RolloutRecipe
from fastrl.rewards.checked import RewardError
from tests.helpers.scripted import FLAT, MIXED, scored, scripted, text_group


def step_groups(aggregate: str, length: float | None = None) -> list[PromptGroup]:
    groups = [text_group([3, 1, 4], [1.0, -0.5, 0.0]), text_group([2], [-2.0]), text_group([5, 2], [0.7, -0.7])]
    set_token_weights(groups, aggregate=aggregate, length=length)
    return groups


def formula(logp: Tensor, batch: PackedBatch, options: PerceptionR1Options, aggregate: str) -> Tensor:
    """The loss as in the papers: float64, a loop over completions."""
    rows, sequences, tokens = logp.new_zeros(()), 0, 0
    owner = batch.completion_of_token
    for index in range(len(batch.completions)):
        chosen = owner == index
        advantage = batch.per_completion["advantage"][index].double()
        difference = logp[chosen] - batch.per_token["old_logp"][chosen].double()
        if options.ratio == "sequence":
            difference = difference.mean().expand(len(difference))
        ratio = difference.exp()
        clipped = ratio.clamp(1 - options.clip_low, 1 + options.clip_high)
        loss = -torch.minimum(ratio * advantage, clipped * advantage)
        if options.beta:
            d = batch.per_token["ref_logp"][chosen].double() - logp[chosen]
            kl = {"k1": -d, "k2": d**2 / 2, "k3": d.exp() - d - 1}[options.kl]
            loss = loss + options.beta * kl
        rows = rows + (loss.mean() if aggregate == "sequence" else loss.sum())
        sequences, tokens = sequences + 1, tokens + len(loss)
    return rows / {"sequence": sequences, "token": tokens, "constant": 7.0 * sequences}[aggregate]


@pytest.mark.parametrize("aggregate", ["sequence", "token", "constant"])
@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.0},
        {"beta": 0.04, "kl": "k3"},
        {"beta": 0.5, "kl": "k1", "clip_high": 0.05, "clip_low": 0.3},
        {"beta": 0.1, "kl": "k2", "ratio": "sequence", "clip_low": 0.02, "clip_high": 0.02},
    ],
)
def test_loss_and_gradient_follow_the_formula(options: dict[str, Any], aggregate: str) -> None:
    chosen = PerceptionR1Options(**options)
    batch = pack_row(step_groups(aggregate, 7.0 if aggregate == "constant" else None))
    n = len(batch.targets)
    generator = torch.Generator().manual_seed(3)
    logp = -torch.rand(n, generator=generator, dtype=torch.float64) * 3
    batch.per_token["old_logp"] = logp + 0.3 * torch.randn(n, generator=generator, dtype=torch.float64)
    batch.per_token["ref_logp"] = logp + 0.3 * torch.randn(n, generator=generator, dtype=torch.float64)
    ours, theirs = logp.clone().requires_grad_(), logp.clone().requires_grad_()
    loss, metrics = grpo_loss(ours, None, batch, chosen)
    expected = formula(theirs, batch, chosen, aggregate)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-7)
    assert {"kl", "clip/low", "clip/high", "ratio/mean", "ratio/max"} <= set(metrics)
    assert not any(v.requires_grad for v in metrics.values())


def test_first_update_without_old_logp_is_strictly_on_policy() -> None:
    batch = pack_row(step_groups("token"))
    logp = torch.randn(len(batch.targets), requires_grad=True)
    loss, metrics = grpo_loss(logp, None, batch, PerceptionR1Options(beta=0.0))
    loss.backward()
    weight, advantage = batch.per_token["weight"], batch.per_completion["advantage"][batch.completion_of_token]
    torch.testing.assert_close(logp.grad, -weight * advantage)
    assert metrics["ratio/mean"] == 1.0


@pytest.mark.parametrize("aggregate", ["sequence", "token", "constant"])
def test_losses_of_micro_batches_add_up_to_the_step(aggregate: str) -> None:
    options = PerceptionR1Options(beta=0.0)
    groups = step_groups(aggregate, 7.0)
    one = pack_row(groups)
    logp = torch.randn(len(one.targets), dtype=torch.float64)
    whole, _ = grpo_loss(logp, None, one, options)
    parts = pack(groups, 8)
    assert len(parts) == 3
    pieces = logp.split([len(p.targets) for p in parts])
    total = sum(grpo_loss(piece, None, part, options)[0] for piece, part in zip(pieces, parts, strict=True))
    torch.testing.assert_close(total, whole)


def test_average_over_ranks_replaces_the_denominator() -> None:
    groups = [text_group([2, 2], [1.0, 1.0])]
    set_token_weights(groups, aggregate="sequence", average=lambda count: (count + 6) / 2)  # the other rank has 6
    assert groups[0].completions[0].per_token["weight"].tolist() == [1 / 8, 1 / 8]


def test_truncated_answers_leave_numerator_and_denominator() -> None:
    groups = [text_group([2, 4], [1.0, -1.0], finished=[True, False])]
    live = set_token_weights(groups, aggregate="token", live=lambda g, i: g.completions[i].finished)
    assert live == 2
    assert [c.per_token["weight"].tolist() for c in groups[0].completions] == [[0.5, 0.5], [0.0] * 4]


def test_nothing_live_weighs_nothing() -> None:
    groups = [text_group([2, 4], [1.0, -1.0])]
    assert set_token_weights(groups, aggregate="sequence", live=lambda g, i: False) == 0
    assert all(bool((c.per_token["weight"] == 0).all()) for c in groups[0].completions)
    assert set_token_weights([], aggregate="sequence") == 0


def test_constant_needs_a_length() -> None:
    with pytest.raises(ValueError, match="length"):
        set_token_weights([text_group([1], [1.0])], aggregate="constant")
    with pytest.raises(ValueError, match="constant_length"):
        PerceptionR1Options(constant_length=5)


def test_keep_leaves_flat_groups_in_the_denominator_and_out_of_the_work() -> None:
    method = scripted({"a": FLAT, "b": MIXED}, beta=0.0)
    prepared = method.prepare(method.context.stream.take(2))
    assert [g.record.id for g in prepared.groups if g.record] == ["b"]
    assert prepared.groups[0].completions[0].per_token["weight"].tolist() == [1 / 8] * 2
    assert (prepared.metrics["groups/zero_variance"], prepared.metrics["groups/kept"]) == (1.0, 2.0)


def test_keep_trains_flat_groups_on_the_kl_term() -> None:
    method = scripted({"a": FLAT, "b": MIXED}, beta=0.1)
    prepared = method.prepare(method.context.stream.take(2))
    assert len(prepared.groups) == 2
    assert method.reads_reference(method.options)


def test_drop_takes_flat_groups_out_of_the_denominator() -> None:
    method = scripted({"a": FLAT, "b": MIXED}, beta=0.1, zero_variance="drop")
    prepared = method.prepare(method.context.stream.take(2))
    assert [g.record.id for g in prepared.groups if g.record] == ["b"]
    assert prepared.groups[0].completions[0].per_token["weight"].tolist() == [1 / 4] * 2


def test_resampling_fills_the_step_and_counts_everything() -> None:
    rewards = {"a": FLAT, "b": MIXED, "c": FLAT, "d": [0.2, 0.4]}
    method = scripted(rewards, zero_variance="resample", max_resample=3)
    prepared = method.prepare(method.context.stream.take(2))
    assert [g.record.id for g in prepared.groups if g.record] == ["b", "d"]
    counts = {k.removeprefix("groups/"): v for k, v in prepared.metrics.items()}
    assert counts == {"sampled": 4.0, "zero_variance": 2.0, "kept": 2.0, "resample_rounds": 2.0}
    assert method.context.stream.consumed == 4
    from fastrl.run.metrics import group_metrics

    assert group_metrics(prepared.sampled)["reward/mean"] == pytest.approx((2 + 1 + 2 + 0.6) / 8)  # not only the kept


def test_resampling_is_bounded() -> None:
    method = scripted({"a": FLAT, "b": FLAT, "c": FLAT}, zero_variance="resample", max_resample=2)
    prepared = method.prepare(method.context.stream.take(2))
    assert prepared.groups == []
    assert prepared.metrics["groups/resample_rounds"] == 2.0
    assert method.context.stream.consumed == 6


def test_equal_rewards_are_flat_whatever_their_rounding() -> None:
    method = scripted({"a": [0.1 + 0.2] * 3, "b": [1e-3] * 3}, beta=0.0)
    assert method.prepare(method.context.stream.take(2)).groups == []


def test_rows_are_those_with_a_coefficient() -> None:
    batch = pack_row(step_groups("token"))
    context = scripted({"a": FLAT}).context
    with_kl = PerceptionR1(PerceptionR1Options(beta=0.1), context)
    assert with_kl.rows(batch) is None
    without = PerceptionR1(PerceptionR1Options(beta=0.0), context)
    rows = without.rows(batch)
    assert rows is not None
    expected = (batch.per_completion["advantage"][batch.completion_of_token] != 0).nonzero().squeeze(-1)
    assert torch.equal(rows, expected)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"scale": "none"}, [-0.5, 0.5]),
        ({"scale": "none", "baseline": "leave_one_out"}, [-1.0, 1.0]),
        ({"scale": "std", "eps": 0.0}, [-(0.5**0.5), 0.5**0.5]),
        ({"scale": "std", "eps": 0.0, "unbiased": False}, [-1.0, 1.0]),
    ],
)
def test_advantage_options(options: dict[str, Any], expected: list[float]) -> None:
    method = scripted({"a": MIXED}, **options)
    prepared = method.prepare(method.context.stream.take(1))
    assert [c.scalars["advantage"] for c in prepared.groups[0].completions] == pytest.approx(expected)


def test_a_reward_that_does_not_fit_the_data_is_said_before_anything_is_sampled() -> None:
    record = Record(id="a", task="grounding", images=(), messages=(), target={})
    context = Context(
        policy=SimpleNamespace(encode=None),  # type: ignore[arg-type]  # called, it would raise another error
        stream=RecordStream([record]),
        rng=torch.Generator(),
        rollout=RolloutRecipe(max_new_tokens=10),  # type: ignore[call-arg]
        reward=RewardRecipe(options={"score_by": "matched"}),
    )
    with pytest.raises(ValueError, match=r"take a grounding recipe .*score_by"):
        PerceptionR1(PerceptionR1Options(), context).prepare([record])


def test_metrics_say_what_of_the_answers_was_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [
        '[{"bbox_2d": [0, 0, 10, 10], "class_id": 1}, {"bbox_2d": [1, 2]}]',
        '[{"bbox_2d": [0, 0, 10, 10], "class": "cow"}]',
        "no box",
        '[{"bbox_2d": [0, 0, 10, 10], "Class": "Cat"}]',
    ]
    method, groups = scored(answers)
    monkeypatch.setattr(method, "_sample", lambda records: groups)
    metrics = method.prepare([groups[0].record]).metrics  # type: ignore[list-item]
    text = {name: value for name, value in metrics.items() if name.startswith("answers/")}
    assert text == {f"answers/{n}": 0.25 for n in ("unparsable", "dropped", "unlabelled", "unknown_label")}
    assert [c.rewards["class"] for c in groups[0].completions] == [0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, float("nan")], r"record 'r1' \(d.jsonl:3\), answer 'b': component 'iou' is nan"),
        ([1.0, 1e300], "component 'iou' is 1e\\+300: .*advantages overflow or vanish"),
        ([1.0, "high"], "component 'iou' must be a number, got str 'high'"),
        ([1.0, None], "every component \\(iou\\) is None"),
        ([1.0], "component 'iou': 1 values for 2 answers"),
    ],
)
def test_a_rewards_fault_stops_the_step_by_name(
    monkeypatch: pytest.MonkeyPatch, values: list[Any], message: str
) -> None:
    method, groups = scored(["a", "b"], "grounding")
    reward = method._rewards.of("grounding")
    monkeypatch.setattr(type(reward), "score", lambda self, answers, records: {"iou": values[: len(answers)]})
    with pytest.raises(RewardError, match=message):
        method._score(groups)
