"""Metrics of a step from its groups and micro-batches, written to ``metrics.jsonl`` and to loggers."""

from __future__ import annotations

import json
import math
import resource
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastrl.run.loggers import Loggers, RunInfo
from fastrl.run.logs import Appended
from fastrl.run.samples import Sample, with_picture

if TYPE_CHECKING:
    from fastrl.batch import PackedBatch, PromptGroup

# Rows of two runs of one recipe are equal except for keys that begin with these.
VOLATILE = ("time/", "speed/", "memory/")


class Meter:
    """Metrics of micro-batches → one number each for the step. Values stay on the device until :meth:`read`.

    A key that ends in ``max`` is reduced by maximum, every other one by its mean weighted by tokens.
    """

    def __init__(self) -> None:
        self._values: dict[str, list[tuple[Tensor, int]]] = {}

    def add(self, metrics: Mapping[str, Tensor], tokens: int) -> None:
        """Add metrics of a micro-batch (0-d tensors) with ``tokens`` tokens."""
        if tokens:
            for key, value in metrics.items():
                self._values.setdefault(key, []).append((value.detach().double(), tokens))

    def read(self) -> dict[str, float]:
        """One number per key, with a single synchronisation."""
        reduced = {}
        for key, pairs in self._values.items():
            values = torch.stack([value for value, _ in pairs])
            if key.endswith("max"):
                reduced[key] = values.max()
            else:
                weights = values.new_tensor([tokens for _, tokens in pairs])
                reduced[key] = (values * weights).sum() / weights.sum()
        if not reduced:
            return {}
        return dict(zip(reduced, torch.stack(list(reduced.values())).tolist(), strict=True))


def sampler_gap(logp: Tensor, batch: PackedBatch) -> dict[str, Tensor]:
    """The difference of the trainer's and the sampler's log-probs for the same tokens: mean and largest |Δ|, and mean
    ratio.

    Tokens whose log-prob is +inf were not evaluated and do not count. Empty if the batch has no sampler log-probs. Both
    are over the full vocabulary at the sampling temperature, so with equal weights they differ only by rounding; a
    larger difference means that rollout and training compute different models.
    """
    sampler = batch.per_token.get("sampler_logp")
    if sampler is None or sampler.numel() == 0:
        return {}
    known = ~logp.isposinf()
    delta = torch.where(known, logp.detach().float() - sampler, 0.0)
    count = known.sum().clamp(min=1)
    return {
        "sampler/gap_mean": delta.abs().sum() / count,
        "sampler/gap_max": delta.abs().max(),
        "sampler/ratio_mean": 1 + delta.expm1().sum() / count,
    }


def group_metrics(groups: Sequence[PromptGroup]) -> dict[str, float]:
    """Rewards, advantages and lengths of a step's groups, from their completions.

    ``reward/mean`` and one ``reward/NAME`` per component, ``reward/group_std`` (mean over groups of several answers:
    one alone has no spread), ``advantage/*``, ``completion/length_*`` in tokens, ``completion/truncated`` (fraction cut
    at max_new_tokens). Keys for which the completions have no values are left out.
    """
    completions = [c for g in groups for c in g.completions]
    if not completions:
        return {}
    metrics: dict[str, float] = {}
    rewards = [c.scalars["reward"] for c in completions if "reward" in c.scalars]
    if rewards:
        metrics |= {"reward/mean": statistics.fmean(rewards), "reward/min": min(rewards), "reward/max": max(rewards)}
        metrics["reward/std"] = statistics.pstdev(rewards)
        spreads = [statistics.pstdev([c.scalars["reward"] for c in g.completions]) for g in groups if _comparable(g)]
        metrics |= {"reward/group_std": statistics.fmean(spreads)} if spreads else {}
    components: dict[str, list[float]] = {}
    for completion in completions:
        for name, value in completion.rewards.items():
            components.setdefault(name, []).append(value)
    metrics |= {f"reward/{name}": statistics.fmean(values) for name, values in sorted(components.items())}
    advantages = [c.scalars["advantage"] for c in completions if "advantage" in c.scalars]
    if advantages:
        metrics |= {
            "advantage/mean": statistics.fmean(advantages),
            "advantage/abs_mean": statistics.fmean(abs(a) for a in advantages),
            "advantage/std": statistics.pstdev(advantages),
            "advantage/min": min(advantages),
            "advantage/max": max(advantages),
        }
    lengths = [len(c.token_ids) for c in completions]
    metrics |= {
        "completion/length_mean": statistics.fmean(lengths),
        "completion/length_min": float(min(lengths)),
        "completion/length_max": float(max(lengths)),
        "completion/truncated": statistics.fmean(0.0 if c.finished else 1.0 for c in completions),
    }
    return metrics


def source_metrics(groups: Sequence[PromptGroup]) -> dict[str, float]:
    """``source/NAME/`` metrics of each part of a mixture: ``prompts`` of the step, and rewards and
    ``completion/truncated`` as in ``group_metrics``. Empty if the data is not a mixture."""
    parts: dict[str, list[PromptGroup]] = {}
    for group in groups:
        if group.record is not None and group.record.origin:
            parts.setdefault(group.record.origin, []).append(group)
    found: dict[str, float] = {}
    for name, members in sorted(parts.items()):
        kept = {k: v for k, v in group_metrics(members).items() if k.startswith("reward/") or k.endswith("truncated")}
        found |= {f"source/{name}/{key}": value for key, value in {"prompts": float(len(members)), **kept}.items()}
    return found


def work_metrics(groups: Sequence[PromptGroup], seconds: Mapping[str, float]) -> dict[str, float]:
    """Phase times in seconds, throughput of the whole step, and memory in GiB."""
    total = sum(seconds.values())
    answers = sum(len(c.token_ids) for g in groups for c in g.completions)
    tokens = answers + sum(len(g.prompt.token_ids) for g in groups)
    images = sum(len(g.prompt.images) for g in groups)
    metrics = {f"time/{name}": value for name, value in seconds.items()} | {"time/step": total}
    if total > 0:
        metrics |= {"speed/tokens_per_s": tokens / total, "speed/images_per_s": images / total}
    rollout = sum(seconds.get(name, 0.0) for name in ("vision", "prefill", "decode"))
    if seconds.get("decode", 0) > 0:
        metrics["speed/rollout_tokens_per_s"] = answers / rollout
    return metrics | memory()


def over_ranks(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Combine the metrics of all ranks: the sum for throughputs, the maximum for times and memory, otherwise the mean
    over the ranks that have the key (``…max`` and ``…min``: maximum and minimum)."""
    reduced: dict[str, float] = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        values = [row[key] for row in rows if key in row]
        if key.startswith(("time/", "memory/")) or key.endswith("max"):
            reduced[key] = max(values)
        elif key.endswith("min"):
            reduced[key] = min(values)
        elif key.startswith("speed/"):
            reduced[key] = sum(values)
        else:  # equal values are kept unchanged, so that integers stay integers
            reduced[key] = values[0] if len(set(values)) == 1 else statistics.fmean(values)
    return reduced


def memory() -> dict[str, float]:
    """Resident memory of this process now and at its peak, and the GPU allocator's peak, in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    found = {"memory/rss_peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
    try:
        import psutil
    except ImportError:
        pass
    else:
        found["memory/rss_gb"] = psutil.Process().memory_info().rss / 2**30
    if torch.cuda.is_initialized():
        found["memory/cuda_peak_gb"] = torch.cuda.max_memory_allocated() / 2**30
    return found


class MetricsLog:
    """``OUT/metrics.jsonl`` (one row per step), ``OUT/samples.jsonl``, ``OUT/eval.jsonl`` (one row per evaluation),
    ``OUT/notes.jsonl`` (events of the run, such as a resume with changed data), and the loggers of ``log.to``.

    Rows are written atomically. If one cannot be written, an ``OSError`` names the file; an error of a logger is only
    reported and noted.

    Args:
        out: the run's folder.
        loggers: of ``make_loggers``.
        run: information about the run for the loggers; required if there are any.
        say: shows a line to the user.
    """

    def __init__(
        self,
        out: Path,
        loggers: Mapping[str, Any] | None = None,
        run: RunInfo | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._rows = Appended(out / "metrics.jsonl")
        self._samples = Appended(out / "samples.jsonl")
        self._evaluations = Appended(out / "eval.jsonl")
        self._notes = Appended(out / "notes.jsonl")
        self._files = (self._rows, self._samples, self._evaluations, self._notes)
        self._step = run.step if run is not None else 0  # the last logged step

        def tell(text: str) -> None:
            say(text)
            self.note(self._step, text)

        self._loggers = Loggers(loggers, run, tell) if loggers and run is not None else None

    def write(self, row: Mapping[str, Any]) -> None:
        """Write one row; non-finite numbers become null, as JSON cannot represent them."""
        self._rows.write(_json_line(row))
        self._log(row)

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Write the row of an evaluation."""
        self._evaluations.write(_json_line(row))
        self._log(row)

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Write sample answers of a step."""
        self._samples.write("".join(_json_line({"step": step, **sample.row}) for sample in samples))
        if self._loggers is not None:
            self._loggers.samples(step, lambda: [with_picture(sample) for sample in samples])

    def note(self, step: int, text: str) -> None:
        """Write a note about the run after ``step``."""
        self._notes.write(_json_line({"step": step, "note": text}))

    def sync(self) -> None:
        """Flush to disk (before a checkpoint, so that the log has all steps of the checkpoint)."""
        for file in self._files:
            file.sync()

    def close(self) -> None:
        if self._loggers is not None:
            self._loggers.close()
        for file in self._files:
            file.close()

    def _log(self, row: Mapping[str, Any]) -> None:
        self._step = row["step"]
        if self._loggers is not None:
            self._loggers.log(self._step, row)


class NoLog:
    """The log of a rank that writes none."""

    def write(self, row: Mapping[str, Any]) -> None: ...

    def evaluation(self, row: Mapping[str, Any]) -> None: ...

    def samples(self, step: int, samples: Sequence[Sample]) -> None: ...

    def note(self, step: int, text: str) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


def _comparable(group: PromptGroup) -> bool:
    return len(group.completions) > 1 and all("reward" in c.scalars for c in group.completions)


def _json_line(row: Mapping[str, Any]) -> str:
    return json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate cannot be written
    return value
