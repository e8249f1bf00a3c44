"""The training loop: records → groups → packed batches → log-probs → loss → update. Read :func:`Run.step` first."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import torch

from fastrl.data.blank import BlankImages
from fastrl.data.decodable_stream import DecodableStream
from fastrl.data.disk import require_space
from fastrl.data.mixture import summary_of
from fastrl.data.pictures import PictureError
from fastrl.data.records import Record
from fastrl.engine import make_engine
from fastrl.engine.base import Engine, Shardable, StepInfo
from fastrl.evaluate.during import Evaluation, EvaluationError, held_out
from fastrl.methods import Clock, Context, Method, Prepared, make_method, method_for
from fastrl.methods.rollouts import functions_of
from fastrl.models.kept import KeptPrompts
from fastrl.models.quantize import check_quantize
from fastrl.plan.running import checkpointing_note, choose_checkpointing, choose_keep, choose_merge
from fastrl.recipe import Recipe
from fastrl.rewards.checked import RewardError
from fastrl.run import checkpoint
from fastrl.run.arguments import check_arguments
from fastrl.run.callbacks import Callbacks
from fastrl.run.checkpoint import RunState
from fastrl.run.folder import begin_run, nothing_left, offer_earlier, open_run_folder
from fastrl.run.integrity import Damaged
from fastrl.run.keeping import BEST, folder_of, keep_best, kept, rotate, watch_rewards
from fastrl.run.loggers import RunInfo, make_loggers
from fastrl.run.metrics import (
    Meter,
    MetricsLog,
    NoLog,
    group_metrics,
    over_ranks,
    source_metrics,
    work_metrics,
)
from fastrl.run.outlets import Outlets
from fastrl.run.profiling import profiled
from fastrl.run.progress import Progress
from fastrl.run.samples import Sample, sample_table
from fastrl.run.setup import (
    check_tasks,
    is_first_rank,
    load_model,
    make_stream,
    ranks_of,
    scorable_records,
    seed_generators,
    use_own_device,
)
from fastrl.run.signals import stop_signals
from fastrl.run.updates import MicroBatch, TrainingError, Updates
from fastrl.run.variance import EqualRewards
from fastrl.run.work import RecordWork, costs_of

if TYPE_CHECKING:
    from fastrl.data.validate import Problem
    from fastrl.models.load import Policy
    from fastrl.rewards.functions import Functions


BROKEN = (
    "This step was discarded: continue from the last checkpoint with --resume --skip-bad, which skips such records, or "
    "repair the file; fastrl data SPEC --deep finds all of them beforehand"
)


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
    stopped_early: bool = False  # because evaluations did not improve (eval.patience)

    @property
    def model(self) -> Path | None:
        """Hugging Face folder of the trained model."""
        return self.checkpoint / "model" if self.checkpoint is not None else None

    @property
    def adapter(self) -> Path | None:
        """peft folder of the trained adapters; None without ``model.lora``."""
        found = self.checkpoint / "adapter" if self.checkpoint is not None else None
        return found if found is not None and found.is_dir() else None


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
        resume: continue from the last checkpoint in the recipe's folder (from the beginning if there is none yet).
        from_step: with ``resume``, continue from the checkpoint of that step; later ones are set aside.
        accept_changed_data: with ``resume``, continue even if the data has changed since the run started.
        records: the data, instead of loading ``recipe.data.spec``.
        eval_records: the data of evaluations during training, instead of loading ``recipe.eval.spec``.
        policy: the model, instead of loading ``recipe.model``; it is trained in place.
        callbacks: objects with any of ``on_step(row)``, ``on_samples(rows)``, ``on_checkpoint(path)`` and
            ``on_eval(row)`` (``fastrl.run.callbacks.Callback``), called on the first rank. ``StopRun`` raised in one
            saves and ends the run.
        on_step: called with each step's row of metrics, after it is written, on every rank; may raise ``StopRun`` too.
        show: progress on stderr.
        profile: write ``trace.json`` of a few steps into the recipe's folder (see ``fastrl.run.profiling``).

    Raises:
        CheckpointError: the folder contains a run and ``resume`` is off, another process trains in it, or a checkpoint
            is damaged or could not be written.
        TrainingError: a loss or gradient is not finite, a reward is invalid, or an evaluation failed; the message has
            the step and the records.
        TypeError: an argument has the wrong type, or a callback has no hook or a misspelt one.
        ValueError: recipe, data and model do not match.
    """
    start = time.monotonic()
    check_arguments(recipe, policy, records=records, eval_records=eval_records)
    out, steps = recipe.folder, recipe.optim.steps
    if not resume and (from_step is not None or accept_changed_data):
        raise ValueError("from_step and accept_changed_data (--from-step, --accept-changed-data) need resume")
    writes = is_first_rank(recipe)  # the other ranks only write their parts of checkpoints
    listeners = Callbacks(callbacks if writes else ())
    listeners.add(on_step=on_step)
    loggers = make_loggers(recipe.log.to) if writes else {}
    with ExitStack() as stack:
        if writes:
            stack.enter_context(nothing_left(out))
            stack.enter_context(checkpoint.lock_run(out))
        saved, notes = open_run_folder(recipe, resume=resume, writes=writes, from_step=from_step)
        run = Run(recipe, records=records, eval_records=eval_records, policy=policy)
        stack.callback(run.policy.preprocessor.close)
        stack.callback(run.context.close)
        done = 0
        if saved is not None:
            done, more = run.load(saved, accept_changed_data)
            notes += more
        if done < steps:
            run.check_space()
        if writes:  # only now, so that errors found so far leave the folder unchanged
            notes += begin_run(recipe, done)
            notes += run.resume_best() if done else []
        progress = stack.enter_context(Progress(steps, done=done, every=recipe.log.every, show=show and writes))
        about = RunInfo(out.resolve().name, out, recipe.log.project, recipe.model_dump(mode="json"), done)
        log = MetricsLog(out, loggers, about, progress.note) if writes else NoLog()
        stack.callback(log.close)
        outlets = Outlets(log, progress, listeners)
        for text in (run.skipped, run.evaluation.skipped, run.evaluation.matching, *run.choices, *notes):
            outlets.note(done, text)
        if remark := run.method.loss_note(recipe.method, recipe.optim.updates_per_batch):
            outlets.say(remark)
        stop = stack.enter_context(stop_signals(progress.note))
        traced = stack.enter_context(profiled(out, steps=steps - done, enabled=profile and writes))
        loop = Loop(run, outlets, stop, traced, done=done, saved=saved, writes=writes)
        try:
            loop.run_steps()
        except Exception as error:
            run.engine.abandon(str(error) or type(error).__name__)
            raise
        run.engine.close()
    return loop.summary(time.monotonic() - start)


class Loop:
    """The steps of a run and what lies between them: evaluations, checkpoints and the decision to stop."""

    def __init__(
        self,
        run: Run,
        outlets: Outlets,
        stop: Event,
        traced: Callable[[], None],
        *,
        done: int,
        saved: Path | None,
        writes: bool,
    ) -> None:
        self.run, self.outlets, self.done, self.saved = run, outlets, done, saved
        self.steps = run.recipe.optim.steps
        self._stop, self._traced, self._writes = stop, traced, writes
        self._variance = EqualRewards(done, self.steps)
        self._stopping = False
        self._row: dict[str, Any] = {}

    def run_steps(self) -> None:
        """All steps that are left, until the last, a request to stop, or evaluations that no longer improve."""
        run, outlets = self.run, self.outlets
        if run.evaluation.due(self.done):  # before the first step, or left over from an interrupted run
            if run.evaluate(self.done, outlets) and self._writes:
                keep_best(run.recipe.folder, self.done)
            self._stopping = self._stop_requested()
        while self.done < self.steps and not self._stopping and not run.evaluation.over:
            self.done += 1
            self._step()
            self._evaluate_and_save()
        outlets.note(self.done, self._variance.end(self.done))
        outlets.note(self.done, run.evaluation.verdict(self.done))
        if self._interrupted:
            why = f" ({outlets.reason})" if outlets.reason is not None else ""
            outlets.say(f"stopped after step {self.done}{why}; continue with --resume")

    def summary(self, seconds: float) -> Summary:
        """How the run ended; ``seconds``: how long it took."""
        run, out = self.run, self.run.recipe.folder
        ended = self._interrupted, self.saved, self._row, run.best_checkpoint, self._stopped_early
        return Summary(out, self.done, seconds, *ended)

    def _step(self) -> None:
        """One step. If the user's reward function fails, the previous step is saved before the error is raised."""
        run, outlets, number = self.run, self.outlets, self.done
        back = run.bookmark()
        try:
            self._row, samples = run.step(number)
        except TrainingError as error:
            if back is None or number == 1 or not isinstance(error.__cause__, RewardError):
                raise
            back()
            run.save(number - 1, outlets)
            raise TrainingError(f"{error}. Step {number - 1} was saved: continue from it with --resume") from error
        self._traced()
        for problem in run.broken_pictures():
            outlets.say(f"skipped {problem}")
        for text in run.context.notes():
            outlets.say(text)
        outlets.step(self._row, samples)
        outlets.note(number, self._variance.step(self._row))

    def _evaluate_and_save(self) -> None:
        run, better = self.run, False
        self._stopping = self._stop_requested()
        if run.evaluation.due(self.done) and not self._stopping:  # otherwise it follows when the run is resumed
            better = run.evaluate(self.done, self.outlets)
            self._stopping = self._stop_requested()
        if run.saves_after(self.done) or self._stopping or better or run.evaluation.over:
            self.saved = run.save(self.done, self.outlets)
            self.outlets.checkpoint(self.saved)
            self._stopping = self._stopping or self._stop_requested()

    def _stop_requested(self) -> bool:
        """Whether the run is to stop after this step, agreed between all ranks."""
        return self.run.engine.maximum(float(self._stop.is_set() or self.outlets.reason is not None)) > 0

    @property
    def _stopped_early(self) -> bool:
        return self.run.evaluation.over and self.done < self.steps

    @property
    def _interrupted(self) -> bool:
        return self._stopping and self.done < self.steps and not self._stopped_early


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
        self._equal = False  # whether all groups had equal rewards in a step since the last save
        if recipe.model.quantize is not None and policy is None:
            check_quantize(recipe.model.device)  # before loading data and model
        functions = functions_of(recipe.reward, recipe.mix_rewards) if recipe.scores_groups else None
        # First: bad rows are reported at once
        data = records if records is not None else scorable_records(recipe, functions)
        self.skipped = summary_of(data)
        measured = held_out(recipe, eval_records, functions)
        if functions is not None:
            check_tasks(recipe, data, functions)
        if recipe.data.blank_images:
            data = BlankImages(data)
        use_own_device(recipe)
        self.policy = policy if policy is not None else load_model(recipe)
        if self.policy.device.type == "cuda":  # its events, random state and memory are used below
            torch.cuda.set_device(self.policy.device)
        base = checkpoint.fingerprint(self.policy.core)
        self.reads_reference = method_for(recipe.method).reads_reference(recipe.method)
        if self.reads_reference and recipe.model.lora is None:
            self.policy.make_reference()
        self.planned = choose_checkpointing(recipe, self.policy, ranks=ranks_of(recipe))
        work = RecordWork(self.policy, costs_of(self.planned, self.policy))  # before the engine shards the weights
        self.engine: Engine = make_engine(
            self.policy.model,
            recipe.optim,
            recipe.engine,
            recipe.folder / ".ranks",
            alias=self.policy.family.alias,
            cores=[Shardable(core, self.policy.family.layers(core)) for core in self.policy.cores],
        )
        self.stream = make_stream(
            recipe,
            data,
            rank=self.engine.rank,
            world_size=self.engine.world_size,
            work=work,
        )
        if functions is not None:
            self._try(functions)
        self.keeping = choose_keep(self.planned, self.policy)
        self.merging = choose_merge(self.planned, self.policy, self.keeping)
        seed_generators(recipe.seed + self.engine.rank)  # so that random numbers in the steps do not depend on loading
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
            average=self._average,
            ranks=self.engine,
            updates=lambda: self.engine.updates,
            folder=recipe.folder,
            features=None if self.policy.trains_vision else {},
            kept=KeptPrompts() if self.keeping.on else None,
            merge=self.merging.on,
        )
        self.method: Method = make_method(recipe.method, self.context)
        self.updates = Updates(recipe.optim, self.context, self.engine, self.method)
        self.evaluation = Evaluation(recipe, measured, self.context, self.engine)
        self.state = RunState(self.policy, self.engine, self.stream, rng, self.method, base, self.evaluation)

    def _average(self, value: float) -> float:
        """Mean over ranks. Here a step's ranks meet for the first time, so its time is that of waiting for the
        slowest."""
        if self.engine.world_size == 1:
            return value
        with self.clock.phase("wait"):
            return self.engine.average(value)

    def load(self, saved: Path, accept_changed_data: bool) -> checkpoint.Loaded:
        """Restore a checkpoint."""
        try:
            return checkpoint.load_checkpoint(
                saved,
                self.state,
                accept_changed_data=accept_changed_data,
                accept_gone_rows=self.recipe.data.skip_bad,
            )
        except Damaged as error:
            raise offer_earlier(self.recipe.folder, saved, error) from None

    def evaluate(self, number: int, outlets: Outlets) -> bool:
        """Evaluate the weights after a step; return whether they are the best so far. If this fails, the step is saved
        and ``TrainingError`` raised; the evaluation is repeated when the run is resumed."""
        try:
            with self._weights_of_rollouts():
                found = self.evaluation.measure(number)
        except EvaluationError as error:
            if not number:
                raise TrainingError(str(error)) from error
            self.save(number, outlets)
            raise TrainingError(f"{error}. Step {number} was saved: continue from it with --resume") from error
        outlets.evaluation(found.row, found.short, found.text)
        return found.better

    def saves_after(self, number: int) -> bool:
        """Whether the schedule requires a checkpoint after a step."""
        settings = self.recipe.checkpoint
        last = number == self.recipe.optim.steps and settings.final
        return last or (settings.every > 0 and number % settings.every == 0)

    def save(self, number: int, outlets: Outlets) -> Path:
        """Sync the log, then write the checkpoint of a step; keep it if it is the best. Returns its folder."""
        out, first, count = self.recipe.folder, self.engine.rank == 0, self.recipe.checkpoint.keep
        outlets.log.sync()
        with self.clock.phase("checkpoint"), self.engine.gathered(self.policy.core):
            self.check_weights(number)
            if first and not folder_of(out, number).exists():
                outlets.note(number, watch_rewards(out, self._equal))
            self._equal = False
            saved = checkpoint.save_checkpoint(out, number, self.state, keep=count)
            if first and self.evaluation.best.step == number:
                keep_best(out, number)
                rotate(out, count)
        return saved

    def resume_best(self) -> list[str]:
        """After loading a checkpoint, keep the one that was the best at that time. Returns messages for the user."""
        if self.evaluation.held_out is None:
            return []
        return [self.evaluation.note, keep_best(self.recipe.folder, self.evaluation.best.step)]

    @property
    def choices(self) -> list[str]:
        """What was decided by memory, and why."""
        found = [checkpointing_note(self.recipe, self.planned)]
        if self.method.samples:
            found += [self.keeping.note, *([self.merging.note] if self.recipe.model.lora is not None else [])]
        return found

    @property
    def best_checkpoint(self) -> Path | None:
        """The checkpoint of the best evaluation, if it exists."""
        step = kept(self.recipe.folder).get(BEST) if self.evaluation.held_out is not None else None
        return folder_of(self.recipe.folder, step) if step is not None else None

    def bookmark(self) -> Callable[[], None] | None:
        """A function that undoes a step aborted by a user function; None if there is no such function, or with several
        ranks."""
        functions = self.context.functions
        alone = self.engine.world_size == 1
        return checkpoint.bookmark(self.state) if alone and functions is not None and functions.any else None

    def _try(self, functions: Functions) -> None:
        """Call the user's reward functions for the first record of the stream."""
        for record in self.stream.peek(1) if functions.any else ():
            if "list" not in record.target:
                functions.try_out(record, self.policy.encode)

    def check_space(self) -> None:
        """Raise ``OSError`` if the disk has no room for the first checkpoint, before any step is computed."""
        settings = self.recipe.checkpoint
        if settings.every or settings.final or self.evaluation.held_out is not None:
            with self.engine.gathered(self.policy.core):  # to see how large the exported model is
                needed = checkpoint.bytes_needed(self.state)
            require_space(self.recipe.folder / "checkpoints", needed)

    def step(self, number: int) -> tuple[dict[str, Any], list[Sample]]:
        """One rollout batch and its updates. Returns the row of metrics and, if one is due, a table of samples."""
        recipe, method, meter = self.recipe, self.method, Meter()
        self.context.step = number - 1
        if self.context.features is not None:
            self.context.features.clear()
        self.context.keep_only(())
        with self.clock.phase("data"):
            records = self.stream.take(recipe.data.prompts_per_step)
            self._prefetch(records, more=number < recipe.optim.steps)
        self.context.sync()
        try:
            with self._weights_of_rollouts():
                prepared = method.prepare(records)
        except RewardError as error:
            raise TrainingError(f"step {number}: {error}") from error
        except FloatingPointError as error:  # non-finite logits in the sampler
            names = ", ".join(record.id for record in records[:20])
            raise TrainingError(f"step {number}: {error}. Records of the step: {names}") from None
        except ValueError as error:
            if not isinstance(error.__cause__, PictureError):
                raise
            raise TrainingError(f"step {number}: {error}. {BROKEN}") from None
        with self.clock.phase("pack"):
            batches = self.updates.pack(prepared, records)
            self.context.keep_only(prepared.groups)
        if self.reads_reference:
            with self.clock.phase("reference"):
                self.updates.score_reference(batches)
        info, losses = None, []
        for update in range(recipe.optim.updates_per_batch):
            loss, info = self.updates.make(number, batches, meter, first=update == 0)
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
        self._equal |= row.get("reward/group_std") == 0.0  # no group has different rewards to learn from
        return row, table

    def _weights_of_rollouts(self) -> AbstractContextManager[None]:
        """Whole weights for sampling in this process; a server has its own."""
        served = self.recipe.rollout.backend == "vllm"
        return nullcontext() if served else self.engine.gathered(self.policy.core)

    def broken_pictures(self) -> list[Problem]:
        """Records skipped since the last call because their pictures cannot be decoded."""
        if not isinstance(self.stream, DecodableStream):
            return []
        problems, self.stream.unreported = self.stream.unreported, []
        return problems

    def check_weights(self, number: int) -> None:
        """Raise ``TrainingError`` if a trained weight is not finite, so that no good checkpoint is replaced."""
        trained = [(n, p.detach()) for n, p in self.policy.core.named_parameters() if p.requires_grad and p.numel()]
        largest = torch.stack([p.abs().max().float() for _, p in trained])
        bad = [name for (name, _), good in zip(trained, largest.isfinite().tolist(), strict=True) if not good]
        if bad:
            raise TrainingError(
                f"step {number}: weights are not finite ({', '.join(bad[:3])}{', …' if len(bad) > 3 else ''}); "
                "nothing was saved, and the last checkpoint is unchanged (is optim.lr too large?)"
            )

    def _prefetch(self, records: Sequence[Record], *, more: bool) -> None:
        """Start preprocessing this step's images, and those of the next step, which run while this one samples."""
        data = self.recipe.data
        if not data.workers:
            return
        coming: Sequence[Record] = []
        if more:
            with suppress(OSError, ValueError):  # raised again, with its location, when the record is used
                coming = self.stream.peek(data.prompts_per_step)
        for record in (*records, *coming):
            self.policy.preprocessor.prefetch(record.images, data.workers, among=len(record.images))

    def _counts(self, prepared: Prepared, batches: Sequence[MicroBatch], info: StepInfo | None) -> dict[str, Any]:
        """Metrics of rewards, advantages, lengths, consumed data and the optimizer."""
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
            **({"data/broken": float(self.stream.broken)} if isinstance(self.stream, DecodableStream) else {}),
        }
