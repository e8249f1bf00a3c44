"""Turns validation errors of a recipe into one line each: dotted path, problem, and the nearest valid key."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, get_args

from pydantic import BaseModel

SHOWN = 80  # characters of a wrong value
# Other trainers' names for our keys (the table of docs/coming-from.md): for these, suggesting the key of the nearest
# spelling would mislead. With a dot: the end of a path.
KNOWN_ELSEWHERE: Mapping[str, str] = MappingProxyType(
    {
        "learning_rate": "optim.lr",
        "lr_warmup_ratio": "optim.warmup",
        "lr_warmup_steps": "optim.warmup",
        "max_steps": "optim.steps",
        "total_training_steps": "optim.steps",
        "ppo_epochs": "optim.updates_per_batch",
        "gradient_accumulation_steps": "optim.token_budget",
        "ppo_micro_batch_size_per_gpu": "optim.token_budget",
        "micro_batch_size_per_device_for_update": "optim.token_budget",
        "grad_clip": "optim.clip_norm",
        "train_batch_size": "data.prompts_per_step",
        "rollout_batch_size": "data.prompts_per_step",
        "per_device_train_batch_size": "data.prompts_per_step",
        "steps_per_generation": "data.prompts_per_step",
        "max_grad_norm": "optim.clip_norm",
        "warmup_ratio": "optim.warmup",
        "warmup_steps": "optim.warmup",
        "lr_scheduler_type": "optim.schedule",
        "num_iterations": "optim.updates_per_batch",
        "num_generations": "rollout.group_size",
        "rollout.n": "rollout.group_size",
        "max_completion_length": "rollout.max_new_tokens",
        "max_response_length": "rollout.max_new_tokens",
        "max_tokens": "rollout.max_new_tokens",
        "rollout.name": "rollout.backend",
        "use_vllm": "rollout.backend",
        "vllm_mode": "rollout.backend",
        "kl_coef": "method.beta",
        "kl_loss_coef": "method.beta",
        "clip_ratio_low": "method.clip_low",
        "clip_ratio_high": "method.clip_high",
        "clip_ratio_c": "method.dual_clip",
        "clip_ratio_dual": "method.dual_clip",
        "delta": "method.dual_clip",
        "scale_rewards": "method.scale",
        "norm_adv_by_std_in_grpo": "method.scale",
        "mask_truncated_completions": "method.mask_truncated",
        "reward_funcs": "reward.function",
        "epsilon": "method.clip_low",
        "epsilon_high": "method.clip_high",
        "reward_weights": "reward.weights",
        "output_dir": "out",
        "default_local_dir": "out",
        "save_checkpoint_path": "out",
        "save_steps": "checkpoint.every",
        "save_freq": "checkpoint.every",
        "save_limit": "checkpoint.keep",
        "r": "model.lora.rank",
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


def each_key(errors: Iterable[Mapping[str, Any]], valid: Collection[str]) -> Iterator[Mapping[str, Any]]:
    """pydantic's errors, an unknown section (of another trainer) as one error for each key in it; one that is a section
    of ours misspelt as it is."""
    for error in errors:
        *above, name = [str(part) for part in error["loc"]] or [""]
        prefix = "".join(f"{part}." for part in above)
        siblings = {path[len(prefix) :].split(".")[0] for path in valid if path.startswith(prefix)}
        near = difflib.get_close_matches(name, sorted(siblings), n=1, cutoff=0.75)
        if error["type"] != "extra_forbidden" or near:
            yield error
        else:
            for path, value in _leaves(error.get("input")):
                yield {**error, "loc": (*error["loc"], *path), "input": value}


def _leaves(value: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The values in nested mappings, with their paths."""
    if not isinstance(value, Mapping) or not value:
        yield (), value
        return
    for key, inner in value.items():
        for path, leaf in _leaves(inner):
            yield (str(key), *path), leaf


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
    ends = [".".join(loc[i:]) for i in range(len(loc))]  # from the whole path to its last part
    known = [end if end in paths else KNOWN_ELSEWHERE.get(end) for end in ends[:-1]]
    same = next((p for p in paths if p.rpartition(".")[2] == loc[-1]), KNOWN_ELSEWHERE.get(loc[-1]))
    exact = next((key for key in [*known, same] if key in paths), None)
    if exact is not None:  # a valid key in the wrong section, or another trainer's name for one
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
