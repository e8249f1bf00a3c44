"""The loop on a random model: its logs, weights that must not change, and independence of the split into batches."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fastrl.clock import PHASES
from fastrl.data import DataError, Dataset, Problem
from fastrl.methods import PerceptionR1
from fastrl.models import Policy
from fastrl.recipe import load_recipe
from fastrl.rewards import OcrReward
from fastrl.run import checkpoint
from fastrl.run.integrity import CheckpointError
from fastrl.run.logs import read_rows
from fastrl.run.metrics import Meter, MetricsLog
from fastrl.run.progress import Progress, printable
from fastrl.run.samples import Sample
from fastrl.run.setup import load_model
from fastrl.trainer import Run, TrainingError, train
from tests.helpers.training import make_recipe, make_records, steady_rows

Folder = Callable[[str], Path]


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.policy.model.named_parameters()}


def test_a_run_says_what_it_skipped(tiny_folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = Dataset(make_records(), left_out=[Problem("a.jsonl:3", "no object", "null box")])
    train(make_recipe(tiny_folder("qwen2_5"), tmp_path, optim__steps=1), records=data)
    assert "skipped 1 of 7 rows: no object 1" in capsys.readouterr().err


def test_the_log_is_of_all_ranks(tiny_folder: Folder, tmp_path: Path) -> None:
    run = Run(make_recipe(tiny_folder("qwen2_5"), tmp_path), records=make_records())
    own: list[dict[str, Any]] = []

    def gather(row: dict[str, Any]) -> list[dict[str, Any]]:
        own.append(row)
        return [row, {**row, "reward/mean": row["reward/mean"] + 1}]

    run.engine.gather = gather  # type: ignore[method-assign]
    row, _ = run.step(1)
    assert row["reward/mean"] == pytest.approx(own[0]["reward/mean"] + 0.5)
    assert row["step"] == 1


@pytest.mark.parametrize("kind", ["perception-r1", "perpo", "dpo"])
def test_rows_that_the_reward_cannot_score_are_bad_before_any_work(tmp_path: Path, kind: str) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    rows = [{"image": "a.png", "label": "cat", "count": 1, "points": p} for p in ([{"x": 1, "y": 2}], None)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"method": {"kind": kind}, "data__spec": f"pixmo:{tmp_path / 'p.jsonl'}"}
    with pytest.raises(DataError, match=r"p\.jsonl:2: .*has only a count"):
        train(make_recipe(tmp_path / "no model", tmp_path / "out", **changes), show=False)


def test_run_writes_all_it_promises(tiny_folder: Folder, tmp_path: Path) -> None:
    recipe = make_recipe(tiny_folder("qwen2_5"), tmp_path, optim__steps=3, method__beta=0.02, log__tensorboard=True)
    summary = train(recipe, records=make_records(), show=False)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    needed = (
        *(
            "loss",
            "reward/mean",
            "reward/text",
            "reward/group_std",
            "advantage/std",
            "kl",
            "entropy",
            "grad_norm",
            "lr",
        ),
        *("clip/low", "clip/high", "ratio/mean", "sampler/gap_mean", "sampler/gap_max", "sampler/ratio_mean"),
        *("completion/length_mean", "completion/truncated", "groups/zero_variance", "data/consumed", "data/epoch"),
        *("speed/tokens_per_s", "speed/images_per_s", "memory/rss_peak_gb"),
        *(f"time/{phase}" for phase in (*PHASES, "data", "pack", "reference", "step")),
    )
    for row in rows:
        assert [key for key in needed if key not in row] == []
        assert all(isinstance(v, int | float) for v in row.values())
    assert rows[-1]["data/consumed"] == 9
    assert summary.steps == 3
    assert summary.last["step"] == 3
    assert summary.model is not None
    assert (summary.model / "config.json").is_file()
    assert (tmp_path / "model" / "config.json").is_file()
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert list((tmp_path / "tensorboard").iterdir())
    samples = read_rows(tmp_path / "samples.jsonl")
    assert {row["step"] for row in samples} == {1, 3}
    assert {"id", "question", "truth", "answer", "reward", "rewards"} <= set(samples[0])
    assert samples[0]["question"].startswith("Read ")
    assert samples[0]["truth"].endswith("0123456789 (),.:;-")
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)  # the policy still equals its reference
    assert rows[-1]["kl"] > 1e-6


def test_training_moves_towards_what_is_rewarded(
    tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def score_short(self: PerceptionR1, groups: Any) -> None:
        for group in groups:
            for completion in group.completions:
                completion.scalars["reward"] = float(len(set(completion.token_ids.tolist())) <= 4)
                completion.rewards = {"few": completion.scalars["reward"]}

    monkeypatch.setattr(PerceptionR1, "_score", score_short)
    recipe = make_recipe(
        tiny_folder("qwen2_5"),
        tmp_path,
        optim__steps=12,
        optim__lr=3e-3,
        optim__token_budget=4096,
        rollout__max_new_tokens=5,
        rollout__group_size=8,
        data__prompts_per_step=6,
        checkpoint__every=0,
        checkpoint__final=False,
    )
    train(recipe, records=make_records(), show=False)
    rewards = [row["reward/mean"] for row in read_rows(tmp_path / "metrics.jsonl")]
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.3
    assert not any((tmp_path / "checkpoints").iterdir())


def test_sampler_and_trainer_agree_and_every_step_says_so(tiny_folder: Folder, tmp_path: Path) -> None:
    recipe = make_recipe(tiny_folder("qwen2_5"), tmp_path, optim__steps=2, rollout__temperature=0.7)
    train(recipe, records=make_records(), show=False)
    for row in read_rows(tmp_path / "metrics.jsonl"):
        assert row["sampler/gap_max"] < 1e-4
        assert row["sampler/ratio_mean"] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("aggregate", ["sequence", "token", "constant"])
def test_micro_batch_size_does_not_change_the_gradient(tiny_folder: Folder, tmp_path: Path, aggregate: str) -> None:
    gradients, counts = [], []
    for budget in (64, 100_000):
        recipe = make_recipe(
            tiny_folder("qwen2_5"), tmp_path, optim__token_budget=budget, method__aggregate=aggregate, method__beta=0.1
        )
        run = Run(recipe, records=make_records())
        captured: dict[str, torch.Tensor] = {}
        step = run.engine.step

        def capture(run: Run = run, captured: dict[str, torch.Tensor] = captured, step: Any = step) -> Any:
            captured |= {n: p.grad.clone() for n, p in run.policy.model.named_parameters() if p.grad is not None}
            return step()

        run.engine.step = capture  # type: ignore[method-assign]
        row, _ = run.step(1)
        gradients.append(captured)
        counts.append(row["update/micro_batches"])
    assert counts == [3.0, 1.0]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(
            gradient, gradients[1][name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_all_truncated_and_masked_changes_nothing(tiny_folder: Folder, tmp_path: Path) -> None:
    recipe = make_recipe(
        tiny_folder("qwen2_5"),
        tmp_path,
        rollout__max_new_tokens=1,
        method__mask_truncated=True,
        method__beta=0.04,
        optim__weight_decay=0.1,
    )
    run = Run(recipe, records=make_records())
    before = weights(run)
    row, _ = run.step(1)
    assert row["completion/truncated"] == 1.0
    assert (row["loss"], row["grad_norm"], row["update/skipped"]) == (0.0, 0.0, 1.0)
    assert all(torch.equal(before[name], p) for name, p in run.policy.model.named_parameters())


def test_all_zero_variance_changes_nothing(
    tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flat(self: PerceptionR1, groups: Any) -> None:
        for group in groups:
            for completion in group.completions:
                completion.scalars["reward"], completion.rewards = 0.25, {"text": 0.25}

    monkeypatch.setattr(PerceptionR1, "_score", flat)
    recipe = make_recipe(tiny_folder("qwen2_5"), tmp_path, optim__weight_decay=0.1)
    run = Run(recipe, records=make_records())
    before = weights(run)
    row, _ = run.step(1)
    assert (row["loss"], row["reward/mean"], row["groups/zero_variance"], row["update/skipped"]) == (
        0.0,
        0.25,
        3.0,
        1.0,
    )
    assert all(torch.equal(before[name], p) for name, p in run.policy.model.named_parameters())


def test_a_run_says_that_no_rewards_differ_and_what_its_loss_means(
    tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flat(self: PerceptionR1, groups: Any) -> None:
        for group in groups:
            for completion in group.completions:
                completion.scalars["reward"], completion.rewards = 0.25, {"text": 0.25}

    monkeypatch.setattr(PerceptionR1, "_score", flat)
    train(make_recipe(tiny_folder("qwen2_5"), tmp_path, optim__steps=3), records=make_records())
    message = capsys.readouterr().err
    assert message.count("steps 1 to 3: the rewards of every group were equal (mean reward 0.25)") == 1
    assert message.count("in all 3 steps, no group had different rewards") == 1
    assert message.count("About the loss: with one update per batch") == 1
    notes = read_rows(tmp_path / "notes.jsonl")
    assert any("the rewards of every group were equal" in note["note"] for note in notes)


def test_loss_that_is_not_finite_stops_before_the_weights_change(
    tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(tiny_folder("qwen2_5"), tmp_path, optim__token_budget=64)
    run = Run(recipe, records=make_records())
    run.step(1)
    before = weights(run)
    loss = run.method.loss
    poisoned: list[str] = []

    def poison(logp: torch.Tensor, entropy: Any, batch: Any) -> Any:
        value, metrics = loss(logp, entropy, batch)
        if poisoned:
            return value, metrics
        poisoned.append("yes")
        return value * float("nan"), metrics

    monkeypatch.setattr(run.method, "loss", poison)
    with pytest.raises(TrainingError, match=r"step 2: the loss is not a finite number.*Records of the batch: r\d$"):
        run.step(2)
    assert all(torch.equal(before[name], p) for name, p in run.policy.model.named_parameters())


def test_weights_that_are_not_finite_stop_in_the_rollout(tiny_folder: Folder, tmp_path: Path) -> None:
    run = Run(make_recipe(tiny_folder("qwen2_5"), tmp_path), records=make_records())
    with torch.no_grad():
        run.policy.core.lm_head.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"step 1: .*finite.* Records of the step: r\d, r\d, r\d"):
        run.step(1)


def test_a_fault_of_a_reward_names_step_record_and_component(
    tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(make_recipe(tiny_folder("qwen2_5"), tmp_path), records=make_records())
    monkeypatch.setattr(OcrReward, "score", lambda self, answers, records: {"text": [float("nan")] * len(answers)})
    named = r"step 1: ocr_reward: record 'r\d'.*answer .*: component 'text' is nan"
    with pytest.raises(TrainingError, match=named):
        run.step(1)


def test_gradient_that_is_not_finite_names_the_step(tiny_folder: Folder, tmp_path: Path) -> None:
    run = Run(make_recipe(tiny_folder("qwen2_5"), tmp_path), records=make_records())
    run.policy.core.lm_head.weight.register_hook(lambda g: g * float("inf"))
    with pytest.raises(TrainingError, match=r"step 1: the gradient norm is (nan|inf).*r\d, r\d, r\d"):
        run.step(1)


def test_every_component_is_logged_and_rewards_see_the_whole_record(
    tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fastrl.rewards

    calls: list[tuple[int, str]] = []

    class Mine:
        def score(self, answers: list[str], records: list[Any]) -> dict[str, list[float]]:
            calls.append((len(answers), records[0].target["text"][:3]))
            return {"length": [len(a) / 10 for a in answers], "flag": [float(i % 2) for i in range(len(answers))]}

        def total(self, components: dict[str, list[float]]) -> list[float]:
            return [a + 2 * b for a, b in zip(components["length"], components["flag"], strict=True)]

        def diagnose(self, answers: list[str], records: list[Any]) -> dict[str, list[int]]:
            return {}

    monkeypatch.setattr(fastrl.rewards, "reward_for", lambda task, **options: Mine())
    row, _ = Run(make_recipe(tiny_folder("qwen2_5"), tmp_path), records=make_records()).step(1)
    assert len(calls) == 1  # one batched call for the 12 answers
    assert calls[0][0] == 12
    assert row["reward/flag"] == 0.5
    assert row["reward/mean"] == pytest.approx(row["reward/length"] + 1.0)


def test_reference_of_lora_and_of_frozen_copy_and_none(tiny_folder: Folder, tmp_path: Path) -> None:
    folder = tiny_folder("qwen2_5")
    full = Run(make_recipe(folder, tmp_path, method__beta=0.1), records=make_records())
    with full.policy.reference():
        pass
    lora = Run(make_recipe(folder, tmp_path, method__beta=0.1, model__lora={"rank": 2}), records=make_records())
    assert lora.policy._reference_core is None
    assert lora.context.features == {}  # no part of the tower is trained
    assert full.context.features is None
    none = Run(make_recipe(folder, tmp_path, method__beta=0.0), records=make_records())
    with pytest.raises(RuntimeError, match="no reference: call make_reference"), none.policy.reference():
        pass


def test_a_frozen_tower_sees_each_picture_once_a_step_and_no_number_changes(
    tiny_folder: Folder, tmp_path: Path
) -> None:
    """Rollout, reference and both updates share the tower's features; if it is trained, every pass computes its own."""
    rows, seen = [], []
    for shared in (True, False):
        recipe = make_recipe(
            tiny_folder("qwen2_5"), tmp_path, method__beta=0.1, model__lora={"rank": 2}, optim__updates_per_batch=2
        )
        run = Run(recipe, records=make_records())
        assert run.context.features == {}
        if not shared:
            run.context.features = None
        patches: list[int] = []
        run.policy.core.model.visual.register_forward_pre_hook(lambda _m, a, p=patches: p.append(len(a[0])))
        rows.append([{k: v for k, v in run.step(n)[0].items() if "/" not in k or k == "reward/mean"} for n in (1, 2)])
        seen.append(sum(patches))
    for once, again in zip(*rows, strict=True):
        assert once == pytest.approx(again, rel=1e-5)
    assert seen[1] == 4 * seen[0]


@pytest.mark.parametrize("prompts", [2, 5])
def test_features_no_coming_pass_reads_are_dropped(tiny_folder: Folder, tmp_path: Path, prompts: int) -> None:
    """Groups without a gradient leave the step; their pictures' features are freed before the backward."""
    changes = {"method": {"kind": "perception-r1", "beta": 0.0, "zero_variance": "drop"}, "model__freeze": ["visual"]}
    recipe = make_recipe(tiny_folder("qwen2_5"), tmp_path, data__prompts_per_step=prompts, **changes)
    run = Run(recipe, records=make_records())
    prepare, kept = run.method.prepare, []

    def first_only(records: Any) -> Any:
        prepared = prepare(records)
        kept.append(prepared.groups[0].prompt.images[0].key)
        return replace(prepared, groups=prepared.groups[:1])

    run.method.prepare = first_only  # type: ignore[method-assign]
    run.step(1)
    assert run.context.features is not None
    assert set(run.context.features) == set(kept)


def test_new_adapters_depend_on_the_recipes_seed_alone(tiny_folder: Folder, tmp_path: Path) -> None:
    """Even if the model is loaded before the run, after other random numbers were drawn."""
    recipe = make_recipe(tiny_folder("qwen2_5"), tmp_path, model__lora={"rank": 2}, seed=5)

    def adapters(policy: Policy) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in policy.model.named_parameters() if "lora_A" in name}

    alone = adapters(Run(recipe, records=make_records()).policy)
    torch.rand(3)
    given = adapters(Run(recipe, records=make_records(), policy=load_model(recipe)).policy)
    assert alone
    assert all(torch.equal(alone[name], given[name]) for name in alone)
    other = adapters(load_model(recipe.model_copy(update={"seed": 6})))
    assert not any(torch.equal(alone[name], other[name]) for name in alone)


def test_weights_that_are_not_finite_are_not_saved(tiny_folder: Folder, tmp_path: Path) -> None:
    recipe = make_recipe(tiny_folder("qwen2_5"), tmp_path, optim__steps=2, checkpoint__every=1)
    policy = load_model(recipe)

    def spoil(row: dict[str, Any]) -> None:
        if row["step"] == 2:
            policy.head_weight.data[0, 0] = torch.nan

    with pytest.raises(TrainingError, match=r"step 2: weights are not finite \(.*\); nothing was saved"):
        train(recipe, records=make_records(), policy=policy, on_step=spoil, show=False)
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step-00000001"]


def test_ctrl_c_saves_and_stops_and_a_second_stops_at_once(tiny_folder: Folder, tmp_path: Path) -> None:
    recipe = make_recipe(tiny_folder("qwen2_5"), tmp_path, optim__steps=5, checkpoint__every=0)

    def interrupt(row: dict[str, Any]) -> None:
        if row["step"] == 2:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    summary = train(recipe, records=make_records(), on_step=interrupt, show=False)
    assert (summary.interrupted, summary.steps) == (True, 2)
    assert summary.checkpoint is not None
    assert summary.checkpoint.name == "step-00000002"
    assert signal.getsignal(signal.SIGINT) is before

    def twice(row: dict[str, Any]) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(recipe, records=make_records(), resume=True, on_step=twice, show=False)


def test_folder_with_a_run_is_not_written_over(tiny_folder: Folder, tmp_path: Path) -> None:
    recipe = make_recipe(tiny_folder("qwen2_5"), tmp_path, optim__steps=1)
    train(recipe, records=make_records(), show=False)
    with pytest.raises(CheckpointError, match="--resume"):
        train(recipe, records=make_records(), show=False)
    assert len(steady_rows(tmp_path)) == 1


def test_model_that_is_not_there_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model folder not found.*no/such"):
        train(make_recipe(Path("no/such"), tmp_path), records=make_records(), show=False)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_progress_shows_hostile_text_harmlessly(stream: type[io.StringIO]) -> None:
    out = stream()
    with Progress(2, stream=out) as progress:
        progress.step({"step": 1, "loss": 0.5, "reward/mean": 0.25, "time/step": 1.0})
        hostile = "\x1b]0;x\x07[bold]b"
        sample = {"id": "a", "question": "why", "truth": "because", "answer": hostile, "reward": 0.5}
        progress.samples(1, [{**sample, "rewards": {"text": 0.5}}])
        progress.note("[red]done")
        progress.step({"step": 2, "loss": 0.25, "reward/mean": 0.5, "time/step": 1.0})
    text = out.getvalue()
    assert "\x1b]0;" not in text
    assert "[bold]b" in text
    assert "[red]done" in text
    assert "0.25" in text
    assert "why" in text
    assert "because" in text
    if stream is io.StringIO:
        assert "\x1b" not in text
        assert text.splitlines()[0].startswith("step 1/2  loss 0.5  reward 0.25  1.00 s/step  ETA ")


def test_progress_can_be_silent_and_sparse() -> None:
    out = io.StringIO()
    with Progress(5, every=2, stream=out) as progress:
        for step in range(1, 6):
            progress.step({"step": step})
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["2/5", "4/5", "5/5"]
    out = io.StringIO()
    with Progress(1, stream=out, show=False) as progress:
        progress.step({"step": 1})
        progress.note("x")
    assert out.getvalue() == ""


def test_printable_cuts_and_escapes() -> None:
    assert printable("a\nb\x00", 20) == "a\\nb\\x00"
    assert printable("x" * 50, 10) == "x" * 9 + "…"


def test_log_writes_json_whatever_the_numbers(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.write({"step": 1, "a": float("nan"), "b": float("inf"), "c": 1})
    log.samples(1, [Sample({"answer": "\ud800 lone"}, None)])
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "a": None, "b": None, "c": 1}
    assert json.loads((tmp_path / "samples.jsonl").read_text())["answer"] == "? lone"


def test_meter_weighs_means_by_tokens_and_takes_the_largest() -> None:
    meter = Meter()
    meter.add({"kl": torch.tensor(1.0), "ratio/max": torch.tensor(2.0)}, 1)
    meter.add({"kl": torch.tensor(5.0), "ratio/max": torch.tensor(1.5)}, 3)
    meter.add({"kl": torch.tensor(99.0)}, 0)
    assert meter.read() == {"kl": 4.0, "ratio/max": 2.0}
    assert Meter().read() == {}
