"""Turns validation errors of a recipe into one line each: dotted path, problem, and the nearest valid key."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, get_args

from pydantic import BaseModel

SHOWN = 80  # characters of a wrong value
# Other trainers' names for our keys: for these, suggesting the key of the nearest spelling would mislead.
KNOWN_ELSEWHERE: Mapping[str, str] = MappingProxyType(
    {
        "learning_rate": "optim.lr",
        "max_steps": "optim.steps",
        "max_grad_norm": "optim.clip_norm",
        "warmup_ratio": "optim.warmup",
        "warmup_steps": "optim.warmup",
        "lr_scheduler_type": "optim.schedule",
        "num_iterations": "optim.updates_per_batch",
        "num_generations": "rollout.group_size",
        "rollout.n": "rollout.group_size",
        "max_completion_length": "rollout.max_new_tokens",
        "max_tokens": "rollout.max_new_tokens",
        "kl_coef": "method.beta",
        "epsilon": "method.clip_low",
        "epsilon_high": "method.clip_high",
        "reward_weights": "reward.weights",
        "output_dir": "out",
        "save_steps": "checkpoint.every",
        "lora_r": "model.lora.rank",
        "lora_rank": "model.lora.rank",
        "lora_alpha": "model.lora.alpha",
        "lora_dropout": "model.lora.dropout",
        "use_dora": "model.lora.dora",
        "use_rslora": "model.lora.rslora",
        "load_in_4bit": "model.quantize",
        "save_total_limit": "checkpoint.keep",
        "eval_steps": "eval.every",
        "eval_on_start": "eval.at_start",
        "test_freq": "eval.every",
        "val_freq": "eval.every",
        "val_before_train": "eval.at_start",
        "metric_for_best_model": "eval.metric",
        "greater_is_better": "eval.mode",
        "early_stopping_patience": "eval.patience",
        "report_to": "log.to",
        "logger": "log.to",
    }
)


def explain(error: Mapping[str, Any], valid: Iterable[str]) -> str:
    """One line for one of pydantic's errors; ``valid``: every dotted path the recipe may have."""
    loc = [str(part) for part in error["loc"]]
    dotted = ".".join(loc)
    if error["type"] == "extra_forbidden":
        return f"{dotted}: unknown key{_nearest(loc, valid)}"
    if error["type"] == "missing":
        return f"{dotted}: missing"
    given = error.get("input")
    shown = ""
    if isinstance(given, str | int | float | bool | list | None):
        text = repr(given)
        shown = f" (got {text if len(text) <= SHOWN else text[:SHOWN] + '…'})"
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{dotted}: {message}{shown}" if dotted else f"{message}{shown}"


def key_paths(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted path of a section's keys."""
    for name, field in section.model_fields.items():
        yield prefix + name
        for inner in sections_in(field.annotation):
            yield from key_paths(inner, f"{prefix}{name}.")


def sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Section classes inside an annotation (optional, list, union)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from sections_in(part)


def _nearest(loc: Sequence[str], valid: Iterable[str]) -> str:
    """``; did you mean …?`` with the same key in another section, else the most similar key of the same section, else
    the most similar key of another section; or the section's keys."""
    paths = sorted(valid)
    section = ".".join(part for part in loc[:-1] if not part.isdigit())
    prefix = f"{section}." if section else ""
    siblings = [p for p in paths if p.startswith(prefix) and "." not in p[len(prefix) :]]
    same = next((p for p in paths if p.rpartition(".")[2] == loc[-1]), KNOWN_ELSEWHERE.get(loc[-1]))
    exact = KNOWN_ELSEWHERE.get(prefix + loc[-1], same)
    if exact in paths:  # a valid key in the wrong section, or another trainer's name for one
        return f"; did you mean {exact}?"
    near = difflib.get_close_matches(loc[-1], [p[len(prefix) :] for p in siblings], n=1, cutoff=0.6)
    if near:
        return f"; did you mean {prefix}{near[0]}?"
    elsewhere = difflib.get_close_matches(loc[-1], sorted({p.rpartition(".")[2] for p in paths}), n=1, cutoff=0.75)
    if elsewhere:
        return f"; did you mean {next(p for p in paths if p.rpartition('.')[2] == elsewhere[0])}?"
    keys = [p[len(prefix) :] for p in siblings]
    near = difflib.get_close_matches(loc[-1], keys, n=1, cutoff=0.0)
    return f"; did you mean {prefix}{near[0]}? Keys here: {', '.join(keys)}" if near else ""
