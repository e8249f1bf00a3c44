"""The one training loop: records → groups → packed batches → log-probs → loss → update. Read :func:`Run.step` first."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastrl.batch import Completion, PackedBatch, PromptGroup, pack, pack_row
from fastrl.data.blank import BlankImages
from fastrl.data.disk import require_space
from fastrl.data.mixture import Curriculum, MixturePlan, parts_of
from fastrl.data.pictures import PictureError
from fastrl.data.records import Dataset, Record
from fastrl.data.sound_stream import SoundStream
from fastrl.data.stream import RecordStream
from fastrl.engine import make_engine
from fastrl.engine.base import Engine, NonFiniteError, StepInfo
from fastrl.evaluate.during import Evaluation, EvaluationError, held_out
from fastrl.methods import Clock, Context, Method, Prepared, make_method
from fastrl.methods.rollouts import RecipeRewards, functions_of
from fastrl.recipe import Recipe, load_records
from fastrl.rewards.checked import RewardError
from fastrl.run import checkpoint
from fastrl.run.callbacks import Callbacks
from fastrl.run.checkpoint import RunState
from fastrl.run.folder import begin_run, offer_earlier, open_run_folder
from fastrl.run.integrity import Damaged
from fastrl.run.keeping import BEST, folder_of, keep_best, kept, rotate, watch_rewards
from fastrl.run.loggers import RunInfo, make_loggers
from fastrl.run.metrics import (
    Meter,
    MetricsLog,
    NoLog,
    group_metrics,
    over_ranks,
    sampler_gap,
    source_metrics,
    work_metrics,
)
from fastrl.run.outlets import Outlets
from fastrl.run.profiling import profiled
from fastrl.run.progress import Progress
from fastrl.run.samples import Sample, sample_table
from fastrl.run.signals import stop_signals

if TYPE_CHECKING:
    from fastrl.data.validate import Problem
    from fastrl.models.families import VisionFeatures
    from fastrl.models.load import Policy
    from fastrl.rewards.functions import Functions


BROKEN = (
    "Nothing of this step was kept: go on from the last checkpoint with --resume --skip-bad, which passes over such "
    "records, or mend the file; fastrl data SPEC --deep finds them all beforehand"
)


class TrainingError(RuntimeError):
    """Training stopped because going on would spoil the weights; they are those of the last good update."""


@dataclass
class Summary:
    """How a run ended."""

    out: Path
    steps: int  # the last step done
    seconds: float  # of this call, set-up and checkpoints included
    interrupted: bool  # stopped before its last step by Ctrl-C, SIGTERM or a callback's StopRun, after saving
    checkpoint: Path | None  # the newest one
    last: dict[str, Any] = field(default_factory=dict)  # the last row of metrics
    best: Path | None = None  # the checkpoint of the best evaluation
    stopped_early: bool = False  # as evaluations did not get better (eval.patience)

    @property
    def model(self) -> Path | None:
        """Hugging Face folder of the trained model."""
        return self.checkpoint / "model" if self.checkpoint is not None else None


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    from_step: int | None = None,
    accept_changed_data: bool = False,
    records: Sequence[Record] | None = None,
    eval_records: Sequence[Record] | None = None,
    policy: Policy | None = None,
    callbacks: Iterable[object] = (),
    on_step: Callable[[dict[str, Any]], None] | None = None,
    show: bool = True,
    profile: bool = False,
) -> Summary:
    """Train as a recipe says.

    Args:
        recipe: the whole run.
        resume: go on from the last checkpoint in the recipe's folder (from the beginning where there is none yet).
        from_step: with ``resume``, go on from the checkpoint of that step; later ones are set aside.
        accept_changed_data: with ``resume``, go on though the data is not what the run began with.
        records: the data, where it is not to be loaded from ``recipe.data.spec``.
        eval_records: what is evaluated on while training, where it is not to be loaded from ``recipe.eval.spec``.
        policy: the model, where it is not to be loaded from ``recipe.model``; it is trained in place.
        callbacks: objects with any of ``on_step(row)``, ``on_samples(rows)``, ``on_checkpoint(path)`` and
            ``on_eval(row)`` (``fastrl.run.callbacks.Callback``), called on the first rank. ``StopRun`` raised in one
            saves and ends the run.
        on_step: called with each step's row of metrics, after it is written, on every rank; may raise ``StopRun`` too.
        show: progress on stderr.
        profile: write ``trace.json`` of a few steps into the recipe's folder (see ``fastrl.run.profiling``).

    Raises:
        CheckpointError: the folder holds a run and ``resume`` is off, another process trains in it, a checkpoint is
            damaged, or could not be written.
        TrainingError: a loss or gradient that is not finite, a reward that is no usable number, or an evaluation that
            could not be made; the message has the step and the records.
        TypeError: a callback without a hook, or with a misspelt one.
        ValueError: recipe, data and model do not fit each other.
    """
    start = time.monotonic()
    out = recipe.folder
    if not resume and (from_step is not None or accept_changed_data):
        raise ValueError("from_step and accept_changed_data (--from-step, --accept-changed-data) go with resume")
    writes = _is_first_rank(recipe)  # the other ranks of a distributed run write nothing but their part of checkpoints
    listeners = Callbacks(callbacks if writes else ())
    listeners.add(on_step=on_step)
    loggers = make_loggers(recipe.log.to) if writes else {}
    with ExitStack() as stack:
        if writes:
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(checkpoint.lock_run(out))
        saved, notes = open_run_folder(recipe, resume=resume, writes=writes, from_step=from_step)
        run = Run(recipe, records=records, eval_records=eval_records, policy=policy)
        stack.callback(run.policy.preprocessor.close)
        stack.callback(run.context.close)
        done = 0
        if saved is not None:
            done, more = run.load(saved, accept_changed_data)
            notes += more
        if done < recipe.optim.steps:
            run.check_space()
        if writes:  # only now: whatever is wrong was said, and the folder is as it was
            notes += begin_run(recipe, done)
            notes += run.resume_best() if done else []
        steps, every = recipe.optim.steps, recipe.log.every
        progress = stack.enter_context(Progress(steps, done=done, every=every, show=show and writes))
        about = RunInfo(out.resolve().name, out, recipe.log.project, recipe.model_dump(mode="json"), done)
        log = MetricsLog(out, loggers, about, progress.note) if writes else NoLog()
        stack.callback(log.close)
        told = Outlets(log, progress, listeners)
        for text in (run.skipped, run.evaluation.skipped, *notes):
            told.note(done, text)
        stop = stack.enter_context(stop_signals(progress.note))
        traced = stack.enter_context(profiled(out, steps=steps - done, enabled=profile and writes))

        def asked() -> bool:
            """Whether somebody asked the run to stop: every rank stops after the same step."""
            return run.engine.maximum(float(stop.is_set() or told.reason is not None)) > 0

        row: dict[str, Any] = {}
        stopping = False
        if run.evaluation.due(done):  # before the first step; or a stop had come before it was done
            if run.evaluate(done, told) and writes:
                keep_best(out, done)
            stopping = asked()
        while done < steps and not stopping and not run.evaluation.over:
            done += 1
            back = run.bookmark()
            try:
                row, samples = run.step(done)
            except TrainingError as error:
                if back is None or done == 1 or not isinstance(error.__cause__, RewardError):
                    raise
                back()
                run.save(done - 1, told)
                raise TrainingError(f"{error}. Step {done - 1} was saved: go on from it with --resume") from error
            traced()
            for problem in run.broken_pictures():
                told.say(f"passed over {problem}")
            told.step(row, samples)
            stopping = asked()
            better = False
            if run.evaluation.due(done) and not stopping:  # else it is done when the run goes on
                better = run.evaluate(done, told)
                stopping = asked()
            if run.saves_after(done) or stopping or better or run.evaluation.over:
                saved = run.save(done, told)
                told.checkpoint(saved)
                stopping = stopping or asked()
        early = run.evaluation.over and done < steps
        told.note(done, run.evaluation.verdict(done))
        interrupted = stopping and done < steps and not early
        if interrupted:
            why = f" ({told.reason})" if told.reason is not None else ""
            told.say(f"stopped after step {done}{why}; go on with --resume")
        run.engine.close()
    seconds = time.monotonic() - start
    return Summary(out, done, seconds, interrupted, saved, row, run.best_checkpoint, early)


class Run:
    """Model, data, method and engine of a run, and what one step does with them."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        records: Sequence[Record] | None = None,
        eval_records: Sequence[Record] | None = None,
        policy: Policy | None = None,
    ) -> None:
        self.recipe = recipe
        self.clock = Clock()
        self._equal = False  # whether in a step since the last save all groups had equal rewards
        functions = functions_of(recipe.reward, recipe.mix_rewards) if recipe.scores_groups else None
        # First: bad rows are reported at once
        data = records if records is not None else _load_records(recipe, functions)
        self.skipped = data.summary if isinstance(data, Dataset) else ""  # rows that no record was made of
        measured = held_out(recipe, eval_records, functions)
        if recipe.data.blank_images:
            data = BlankImages(data)
        _use_own_device(recipe)
        _seed(recipe.seed)
        self.policy = policy if policy is not None else load_model(recipe)
        if self.policy.device.type == "cuda":  # whose events, random state and memory are read from here on
            torch.cuda.set_device(self.policy.device)
        self.engine: Engine = make_engine(
            self.policy.model,
            recipe.optim,
            recipe.engine,
            recipe.folder / ".ranks",
            alias=self.policy.family.alias,
        )
        make_stream = SoundStream if recipe.data.skip_bad else RecordStream
        seed = recipe.seed if recipe.data.seed is None else recipe.data.seed
        self.stream = make_stream(
            data,
            seed=seed,
            order=recipe.data.order,
            buffer=recipe.data.shuffle_buffer,
            plan=_plan(recipe, data, seed, self.engine.world_size),
            rank=self.engine.rank,
            world_size=self.engine.world_size,
            pictures=recipe.data.identity,
        )
        if functions is not None:
            self._try(functions)
        _seed(recipe.seed + self.engine.rank)  # the steps draw the same numbers however much loading drew
        rng = torch.Generator().manual_seed(recipe.seed + self.engine.rank)
        self.context = Context(
            policy=self.policy,
            stream=self.stream,
            rng=rng,
            rollout=recipe.rollout,
            reward=recipe.reward,
            rewards=recipe.mix_rewards,
            functions=functions,
            clock=self.clock,
            average=self.engine.average,
            updates=lambda: self.engine.updates,
            folder=recipe.folder,
            features=None if self.policy.trains_vision else {},
        )
        self.method: Method = make_method(recipe.method, self.context)
        self.reads_reference = self.method.reads_reference(recipe.method)
        if self.reads_reference and recipe.model.lora is None:
            self.policy.make_reference()
        self.evaluation = Evaluation(recipe, measured, self.context, self.engine)
        base = checkpoint.fingerprint(self.policy.core)
        self.state = RunState(self.policy, self.engine, self.stream, rng, self.method, base, self.evaluation)

    def load(self, saved: Path, accept_changed_data: bool) -> checkpoint.Loaded:
        """Go to where a checkpoint was written."""
        try:
            return checkpoint.load_checkpoint(
                saved,
                self.state,
                accept_changed_data=accept_changed_data,
                accept_gone_rows=self.recipe.data.skip_bad,
            )
        except Damaged as error:
            raise offer_earlier(self.recipe.folder, saved, error) from None

    def evaluate(self, number: int, told: Outlets) -> bool:
        """Measure the weights after a step; whether they are the best so far. Where that cannot be done, the step is
        saved before ``TrainingError`` says so: the evaluation is made when the run goes on."""
        try:
            found = self.evaluation.measure(number)
        except EvaluationError as error:
            if not number:
                raise TrainingError(str(error)) from error
            self.save(number, told)
            raise TrainingError(f"{error}. Step {number} was saved: go on from it with --resume") from error
        told.evaluation(found.row, found.short, found.text)
        return found.better

    def saves_after(self, number: int) -> bool:
        """Whether a step is followed by a checkpoint, whatever else happened."""
        settings = self.recipe.checkpoint
        last = number == self.recipe.optim.steps and settings.final
        return last or (settings.every > 0 and number % settings.every == 0)

    def save(self, number: int, told: Outlets) -> Path:
        """Write the checkpoint of a step, after the log's rows; keep it where it is the best. Returns its folder."""
        out, first, count = self.recipe.folder, self.engine.rank == 0, self.recipe.checkpoint.keep
        self.check_weights(number)
        told.log.sync()
        with self.clock.phase("checkpoint"):
            if first and not folder_of(out, number).exists():
                told.note(number, watch_rewards(out, self._equal))
            self._equal = False
            saved = checkpoint.save_checkpoint(out, number, self.state, keep=count)
            if first and self.evaluation.best.step == number:
                keep_best(out, number)
                rotate(out, count)
        return saved

    def resume_best(self) -> list[str]:
        """After a checkpoint was loaded: keep the one that was the best then. Returns what a user should know."""
        if self.evaluation.held_out is None:
            return []
        return [self.evaluation.note, keep_best(self.recipe.folder, self.evaluation.best.step)]

    @property
    def best_checkpoint(self) -> Path | None:
        """The checkpoint of the best evaluation, if it is there."""
        step = kept(self.recipe.folder).get(BEST) if self.evaluation.held_out is not None else None
        return folder_of(self.recipe.folder, step) if step is not None else None

    def bookmark(self) -> Callable[[], None] | None:
        """What takes back a step that a function of the user's own broke off; None: there is none, or several ranks."""
        functions = self.context.functions
        alone = self.engine.world_size == 1
        return checkpoint.bookmark(self.state) if alone and functions is not None and functions.any else None

    def _try(self, functions: Functions) -> None:
        """Try the user's own reward functions on the first record that is to come."""
        for record in self.stream.peek(1) if functions.any else ():
            if "list" not in record.target:
                functions.try_out(record, self.policy.encode)

    def check_space(self) -> None:
        """Raise ``OSError`` where the disk has no room for the first checkpoint: no step is done in vain."""
        settings = self.recipe.checkpoint
        if settings.every or settings.final or self.evaluation.held_out is not None:
            require_space(self.recipe.folder / "checkpoints", checkpoint.bytes_needed(self.state))

    def step(self, number: int) -> tuple[dict[str, Any], list[Sample]]:
        """One rollout batch and its updates. Returns the row of metrics and, when one is due, a table of samples."""
        recipe, method, meter = self.recipe, self.method, Meter()
        if self.context.features is not None:
            self.context.features.clear()
        with self.clock.phase("data"):
            records = self.stream.take(recipe.data.prompts_per_step)
            self._prefetch(records, more=number < recipe.optim.steps)
        try:
            prepared = method.prepare(records)
        except RewardError as error:
            raise TrainingError(f"step {number}: {error}") from error
        except FloatingPointError as error:  # the sampler met logits that are not finite
            names = ", ".join(record.id for record in records[:20])
            raise TrainingError(f"step {number}: {error}. Records of the step: {names}") from None
        except ValueError as error:
            if not isinstance(error.__cause__, PictureError):
                raise
            raise TrainingError(f"step {number}: {error}. {BROKEN}") from None
        with self.clock.phase("pack"):
            batches = self._pack(prepared, records)
            self._drop_features(batches)
        if self.reads_reference:
            with self.clock.phase("reference"):
                self._score_reference(batches)
        info, losses = None, []
        for update in range(recipe.optim.updates_per_batch):
            loss, info = self._update(number, batches, meter, first=update == 0)
            losses.append(loss)
        row = {
            "step": number,
            "loss": sum(losses) / len(losses),
            **meter.read(),
            **self._counts(prepared, batches, info),
        }
        every = recipe.log.samples_every
        table = sample_table(prepared.sampled, recipe.log.samples) if every and (number - 1) % every == 0 else []
        row |= work_metrics(prepared.sampled, self.clock.read())
        row = over_ranks(self.engine.gather(row))
        self._equal |= row.get("reward/group_std") == 0.0  # no group has anything to learn from
        return row, table

    def broken_pictures(self) -> list[Problem]:
        """What was passed over since the last call because its pictures cannot be decoded."""
        if not isinstance(self.stream, SoundStream):
            return []
        said, self.stream.said = self.stream.said, []
        return said

    def check_weights(self, number: int) -> None:
        """Raise ``TrainingError`` where a trained weight is not finite: no good checkpoint may be replaced by it."""
        trained = [(n, p.detach()) for n, p in self.policy.core.named_parameters() if p.requires_grad and p.numel()]
        largest = torch.stack([p.abs().max().float() for _, p in trained])
        bad = [name for (name, _), good in zip(trained, largest.isfinite().tolist(), strict=True) if not good]
        if bad:
            raise TrainingError(
                f"step {number}: weights that are not finite ({', '.join(bad[:3])}{', …' if len(bad) > 3 else ''}); "
                "nothing was saved, the last checkpoint stays as it is (is optim.lr too large?)"
            )

    def _prefetch(self, records: Sequence[Record], *, more: bool) -> None:
        """Begin on this step's images, and on those of the next one, which are then done while this one samples."""
        data = self.recipe.data
        if not data.workers:
            return
        coming: Sequence[Record] = []
        if more:
            with suppress(OSError, ValueError):  # raised again, with its place, when the record's turn comes
                coming = self.stream.peek(data.prompts_per_step)
        for record in (*records, *coming):
            self.policy.preprocessor.prefetch(record.images, data.workers, among=len(record.images))

    def _pack(self, prepared: Prepared, records: Sequence[Record]) -> list[_Batch]:
        """Groups as micro-batches; every rank gets the same number, the surplus with weight 0."""
        groups = prepared.groups
        batches = [_Batch(b) for b in pack(groups, self.recipe.optim.token_budget)]
        offset = 0
        for batch in batches:
            batch.groups = groups[offset : offset + batch.packed.n_groups]
            offset += batch.packed.n_groups
        missing = int(self.engine.maximum(len(batches))) - len(batches)
        if missing:
            any_group = next(iter((*groups, *prepared.sampled)), None)
            prompt = any_group.prompt if any_group is not None else self.policy.encode(records[0])[0]
            nothing = Completion(torch.tensor([self.policy.end_of_turn_id]))  # any token does: its loss weighs 0
            spare = pack_row([PromptGroup(prompt, [nothing])])
            batches += [_Batch(spare, scale=0.0) for _ in range(missing)]
        return batches

    def _drop_features(self, batches: Sequence[_Batch]) -> None:
        """Of shared vision features keep what the coming passes read: groups may have been dropped, or be of later
        steps."""
        features = self.context.features
        if features:
            used = {image.key for batch in batches for image in batch.packed.images}
            for key in features.keys() - used:
                del features[key]

    def _score_reference(self, batches: Sequence[_Batch]) -> None:
        """Log-probs under the reference, once per step (skipped where the method brought them)."""
        with self.policy.reference():
            for batch in batches:
                if batch.scale and "ref_logp" not in batch.packed.per_token:
                    packed = batch.packed.to(self.policy.device)
                    features = self._vision(packed)
                    result = self.policy.logprob(packed, temperature=self.method.temperature, features=features)
                    batch.packed.per_token["ref_logp"] = result.logp

    def _vision(self, packed: PackedBatch) -> dict[str, VisionFeatures] | None:
        """Vision features that the step's passes share, the rollout among them; None: each pass computes its own."""
        features = self.context.features
        if features is None or not packed.images:
            return None
        missing = [image for image in packed.images if image.key not in features]
        if missing:
            with torch.no_grad(), self.clock.phase("vision"):
                features.update(self.policy.features(missing))
        return features

    def _update(
        self, number: int, batches: Sequence[_Batch], meter: Meter, *, first: bool
    ) -> tuple[float, StepInfo | None]:
        """One optimizer update over all micro-batches. With nothing to learn from, the weights stay as they are."""
        if not batches:
            return 0.0, None
        optim = self.recipe.optim
        keep_old = first and optim.updates_per_batch > 1
        losses = []
        for index, batch in enumerate(batches):
            with self.engine.gathered():
                with self.clock.phase("forward"):
                    packed = batch.packed.to(self.policy.device)
                    loss, metrics, logp = self._loss(batch, packed)
                try:
                    with self.clock.phase("backward"):
                        self.engine.backward(loss * batch.scale, last=index == len(batches) - 1)
                except NonFiniteError as error:
                    raise TrainingError(_not_finite(str(error), number, [batch])) from None
            losses.append(loss.detach())
            if batch.scale:
                gap = sampler_gap(logp, packed) if first and logp is not None else {}
                meter.add(metrics | gap, len(packed.targets))
            if keep_old and logp is not None:  # the weights have not moved since the rollout: these are the old ones
                batch.packed.per_token["old_logp"] = logp.detach()
        total = torch.stack(losses).double().cpu()
        bad = [b for b, finite in zip(batches, total.isfinite().tolist(), strict=True) if not finite]
        if bad:
            raise TrainingError(_not_finite("the loss is not a finite number", number, bad))
        try:
            with self.clock.phase("optimizer"):
                info = self.engine.step()
        except NonFiniteError as error:
            raise TrainingError(_not_finite(str(error), number, batches, changed=optim.gradient_release)) from None
        return float((total * torch.tensor([b.scale for b in batches], dtype=torch.float64)).sum()), info

    def _loss(self, batch: _Batch, packed: PackedBatch) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """Loss, metrics and log-probs of a micro-batch (None where it only keeps ranks in step)."""
        features = self._vision(packed)
        if not batch.scale:  # without the method, whose coefficients it does not have
            return self.policy.logprob(packed, features=features).logp.sum(), {}, None
        rows = self.method.rows(batch.packed)  # of the batch on the host: no wait for the device
        rows = rows.to(packed.device) if rows is not None else None
        if self.recipe.optim.row_local_head:
            hidden, weight = self.policy.hidden(packed, features=features), self.policy.head_weight
            head = {"head_grad": self.engine.gradient_of(weight), "grad_scale": batch.scale}
            assert self.method.row_local_loss is not None  # the recipe saw to it
            return self.method.row_local_loss(hidden, weight, packed, rows, **head)
        result = self.policy.logprob(
            packed,
            temperature=self.method.temperature,
            return_entropy=self.method.needs_entropy,
            rows=rows,
            features=features,
        )
        loss, metrics = self.method.loss(result.logp, result.entropy, packed)
        return loss, metrics, result.logp

    def _counts(self, prepared: Prepared, batches: Sequence[_Batch], info: StepInfo | None) -> dict[str, Any]:
        """Reward, advantage and length metrics, what was consumed, and the optimizer's numbers."""
        return {
            **group_metrics(prepared.sampled),
            **source_metrics(prepared.sampled),
            **prepared.metrics,
            "grad_norm": info.grad_norm if info is not None else 0.0,
            "lr": info.lr if info is not None else 0.0,
            "update/skipped": 0.0 if info is not None else 1.0,
            "update/micro_batches": float(len(batches)),
            "update/tokens": float(sum(b.packed.input_ids.shape[1] for b in batches)),
            "data/consumed": self.stream.consumed,
            "data/epoch": self.stream.epochs,
            **({"data/broken": float(self.stream.broken)} if isinstance(self.stream, SoundStream) else {}),
        }


@dataclass
class _Batch:
    """A micro-batch and the groups it holds."""

    packed: PackedBatch
    groups: list[PromptGroup] = field(default_factory=list)
    scale: float = 1.0  # 0: only here to keep ranks in step


def load_model(recipe: Recipe) -> Policy:
    """The policy a recipe names."""
    from fastrl.models.open import open_policy

    model = recipe.model
    return open_policy(
        model.path,
        dtype=None if model.dtype == "auto" else getattr(torch, model.dtype),
        device=model.device,
        lora=model.lora.spec() if model.lora is not None else None,
        freeze=model.freeze,
        gradient_checkpointing=model.gradient_checkpointing,
        offload_activations=model.offload_activations,
        liger=model.liger,
        min_pixels=model.min_pixels,
        max_pixels=model.max_pixels,
    )


def _load_records(recipe: Recipe, functions: Functions | None) -> Sequence[Record]:
    if functions is None:
        return load_records(recipe)
    rewards = RecipeRewards(recipe.reward, recipe.mix_rewards, functions=functions)
    return load_records(recipe, misfit=rewards.misfit)


def _plan(recipe: Recipe, data: Sequence[Record], seed: int, world_size: int) -> Callable[[int], list[int]] | None:
    """The draws of a mixture, or of one data set under a curriculum; None: the data's own order is all there is."""
    settings = recipe.data
    if not settings.mix and settings.curriculum is None:
        return None
    found = settings.curriculum
    made = MixturePlan(
        parts_of(data),
        seed=seed,
        step=settings.prompts_per_step * world_size,
        by=settings.mix_by,
        order=settings.order,
        buffer=settings.shuffle_buffer,
        curriculum=Curriculum(found.by, found.steps, found.start) if found is not None else None,
    )
    return made.epoch


def _seed(seed: int) -> None:
    import random

    import numpy as np

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _is_first_rank(recipe: Recipe) -> bool:
    return recipe.engine.kind == "local" or os.environ.get("RANK", "0") == "0"  # as its launcher sets it


def _use_own_device(recipe: Recipe) -> None:
    if recipe.engine.kind == "deepspeed" and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))  # as its launcher sets it


def _not_finite(what: str, step: int, batches: Sequence[_Batch], *, changed: bool = False) -> str:
    names = [g.record.id if g.record is not None else "?" for b in batches for g in b.groups]
    shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    weights = "The weights were changed: go on from the last checkpoint" if changed else "The weights were not changed"
    return f"step {step}: {what}. {weights}. Records of the batch: {shown}"
