"""Recipes: one YAML file describes a whole run. An unknown key is an error that names the nearest valid one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from fastrl.config.keys import Key, keys_of
from fastrl.config.limits import MAX_IMAGE_PIXELS
from fastrl.config.problems import each_key, explain, key_paths, sections_in
from fastrl.config.reader import RecipeError, override, read_values
from fastrl.config.registry import nearest
from fastrl.config.sections import (
    CheckpointRecipe,
    DataRecipe,
    EngineRecipe,
    EvalRecipe,
    LogRecipe,
    LoraRecipe,
    ModelRecipe,
    OptimRecipe,
    ParameterGroup,
    RewardRecipe,
    RolloutRecipe,
    Section,
)
from fastrl.config.shipped import shipped_path, shipped_recipes
from fastrl.data import load_data, own_spec, with_options, with_reading
from fastrl.data.mixture import MixtureEntry, entry_names, load_mixture
from fastrl.data.prompts import suffixed
from fastrl.data.records import Record
from fastrl.methods import METHODS, MethodOptions, method_for

__all__ = [
    "CheckpointRecipe",
    "DataRecipe",
    "EngineRecipe",
    "EvalRecipe",
    "LogRecipe",
    "LoraRecipe",
    "ModelRecipe",
    "OptimRecipe",
    "ParameterGroup",
    "Recipe",
    "RecipeError",
    "RewardRecipe",
    "RolloutRecipe",
    "Section",
    "build_recipe",
    "differences",
    "key_tables",
    "load_recipe",
    "shipped_recipes",
]


def _options_of(value: Any) -> Any:
    """The options of the method that ``kind`` names, validated by that method's class."""
    if isinstance(value, MethodOptions) or not isinstance(value, Mapping):
        return value
    kind = value.get("kind")
    if isinstance(kind, str) and kind in METHODS:
        return METHODS[kind].Options.model_validate(value)
    near = nearest(kind, METHODS)
    hint = f"; did you mean {near}?" if near else "."
    message = f"unknown method {kind!r}{hint} Known: {', '.join(METHODS)}"
    fault = PydanticCustomError("unknown_method", message.replace("{", "(").replace("}", ")"))  # type: ignore[arg-type]
    raise ValidationError.from_exception_data("method", [{"type": fault, "loc": ("kind",), "input": {}}])


class Recipe(Section):
    """The description of a whole run."""

    name: str = "run"
    """Name of the run folder if `out` is not set. `load_recipe` fills in the file's name."""
    out: str | None = Field(None, min_length=1)
    """The run folder; none: `runs/NAME`. `--out DIR` sets it."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of data order, sampling and all other random numbers. Run a recipe with several seeds to see how much
    results vary."""
    method: Annotated[SerializeAsAny[MethodOptions], BeforeValidator(_options_of)]
    model: ModelRecipe
    data: DataRecipe
    rollout: RolloutRecipe = RolloutRecipe()  # type: ignore[call-arg]
    reward: RewardRecipe = RewardRecipe()  # type: ignore[call-arg]
    optim: OptimRecipe
    checkpoint: CheckpointRecipe = CheckpointRecipe()  # type: ignore[call-arg]
    eval: EvalRecipe = EvalRecipe()  # type: ignore[call-arg]
    log: LogRecipe = LogRecipe()  # type: ignore[call-arg]
    engine: EngineRecipe = EngineRecipe()  # type: ignore[call-arg]

    @model_validator(mode="after")
    def _groups(self) -> Recipe:
        least = method_for(self.method).least_group
        for name, size in (("size", self.rollout.group_size), ("schedule", min(self.rollout.group_sizes))):
            if size < least:
                raise ValueError(
                    f"rollout.group_{name}: the method compares the answers of a group, so it must be at least "
                    f"{least} (got {size})"
                )
        return self

    @model_validator(mode="after")
    def _overlong(self) -> Recipe:
        sections = [self.reward, *(entry.reward for entry in self.data.mix if entry.reward is not None)]
        given = [section.overlong for section in sections if section.overlong is not None]
        if given and not method_for(self.method).adds_overlong:
            able = ", ".join(kind for kind, method in METHODS.items() if method.adds_overlong)
            raise ValueError(f"reward.overlong is only read with method.kind: {able} (got {self.method.kind})")
        if given and max(given) > self.rollout.max_new_tokens:
            raise ValueError(
                f"reward.overlong: {max(given)} must not exceed rollout.max_new_tokens, {self.rollout.max_new_tokens}"
            )
        return self

    @model_validator(mode="after")
    def _row_local(self) -> Recipe:
        obstacle = method_for(self.method).row_local_obstacle(self.method) if self.optim.row_local_head else None
        if obstacle is not None:
            raise ValueError(f"optim.row_local_head: true makes gradients row by row, and {obstacle}")
        return self

    @model_validator(mode="after")
    def _kept(self) -> Recipe:
        obstacle = self.keep_obstacle if self.rollout.keep_prompts == "on" else None
        if obstacle is not None:
            raise ValueError(f"rollout.keep_prompts: on trains from the rollout's passes, but {obstacle}")
        return self

    @model_validator(mode="after")
    def _merged(self) -> Recipe:
        obstacle = self.merge_obstacle if self.rollout.merge_lora == "on" else None
        if obstacle is not None:
            raise ValueError(f"rollout.merge_lora: on samples with merged weights, but {obstacle}")
        return self

    @model_validator(mode="after")
    def _memory(self) -> Recipe:
        if self.model.checkpointed_layers is not None and not self.model.gradient_checkpointing:
            raise ValueError(
                "model.checkpointed_layers says how many layers model.gradient_checkpointing is for: set that to true, "
                "products or auto"
            )
        if self.model.offload_activations and not self.model.gradient_checkpointing:
            raise ValueError(
                "model.offload_activations moves the activations that checkpointing keeps: set "
                "model.gradient_checkpointing: true"
            )
        kind = self.engine.kind
        if kind != "local" and (self.optim.states != "fp32" or self.optim.gradient_release):
            also = "engine.zero_stage and " if kind == "deepspeed" else ""
            raise ValueError(
                f"optim.states and optim.gradient_release need engine.kind: local; with engine.kind: {kind} set "
                f"optim.states: fp32 and optim.gradient_release: false, and use {also}engine.offload_optimizer"
            )
        if self.engine.reduce_gradients == "last" and kind != "fsdp2":
            raise ValueError("engine.reduce_gradients: last needs engine.kind: fsdp2")
        whole = kind == "deepspeed" and self.engine.zero_stage == 0
        if self.engine.offload_optimizer and (kind == "local" or whole):
            raise ValueError(
                "engine.offload_optimizer needs engine.kind: fsdp2, or deepspeed and a zero_stage of 1 to 3; "
                "with engine.kind: local use optim.states: offload"
            )
        return self

    @model_validator(mode="after")
    def _adapters(self) -> Recipe:
        model, served = self.model, self.rollout.backend == "vllm"
        if model.quantize is not None and model.lora is None:
            raise ValueError("model.quantize: 4-bit weights cannot be trained: set model.lora, whose adapters are")
        if model.quantize is not None and served:
            raise ValueError(
                "model.quantize: a vLLM server samples with unquantized weights; set rollout.backend: local"
            )
        if model.quantize is not None and self.engine.kind != "local":
            raise ValueError("model.quantize needs engine.kind: local")
        if model.quantize is not None and model.device is not None and model.device.startswith("cpu"):
            raise ValueError("model.quantize: 4bit needs a GPU, and model.device is cpu")
        if model.lora is not None and model.lora.dora and served:
            raise ValueError("model.lora.dora: vLLM does not serve such adapters; set rollout.backend: local")
        return self

    @model_validator(mode="after")
    def _rollout(self) -> Recipe:
        if self.rollout.backend == "vllm" and self.model.lora is not None and self.model.lora.also_train:
            raise ValueError("rollout.backend: vllm can only serve adapters: leave model.lora.also_train empty")
        return self

    @model_validator(mode="after")
    def _scored(self) -> Recipe:
        sections = [self.reward, *(entry.reward for entry in self.data.mix if entry.reward is not None)]
        named = [n for n in ("function", "judge") if any(getattr(section, n) for section in sections)]
        if named and not self.scores_groups:
            raise ValueError(f"reward.{named[0]}: method.kind: {self.method.kind} scores no answers")
        return self

    @property
    def scores_groups(self) -> bool:
        """Whether the method learns from groups of answers that the reward scores (unless the data has scores)."""
        return method_for(self.method).samples

    @property
    def keep_obstacle(self) -> str | None:
        """Why an update cannot train from the passes that the rollout made of its prompts, naming the key; None: the
        recipe permits it."""
        lora = self.model.lora
        obstacles = (
            (
                not method_for(self.method).keeps_prompts,
                f"method.kind: {self.method.kind} trains on given or older answers",
            ),
            (self.rollout.backend != "local", f"rollout.backend: {self.rollout.backend} samples in another process"),
            (self.optim.updates_per_batch > 1, "optim.updates_per_batch is above 1: later updates have other weights"),
            (self.engine.kind != "local", f"engine.kind: {self.engine.kind} reduces gradients batch by batch"),
            (self.optim.gradient_release, "optim.gradient_release updates weights before the prompts' backward"),
            (lora is not None and lora.dropout > 0, "model.lora.dropout: sampling uses none, so the passes differ"),
        )
        return next((reason for found, reason in obstacles if found), None)

    @property
    def merge_obstacle(self) -> str | None:
        """Why rollouts cannot sample with merged adapters, naming the key; None: the recipe permits it."""
        obstacles = (
            (self.model.lora is None, "without model.lora there are no adapters"),
            (self.rollout.backend != "local", f"rollout.backend: {self.rollout.backend} gets separate adapters"),
            (self.model.quantize is not None, "model.quantize: sums would have to be quantized again"),
            (
                self.engine.shards_weights,
                f"engine.kind: {self.engine.kind} holds whole weights only for the time of a rollout",
            ),
        )
        return next((reason for found, reason in obstacles if found), None)

    @property
    def folder(self) -> Path:
        """The folder the run writes to."""
        return Path(self.out) if self.out is not None else Path("runs") / self.name

    @property
    def data_spec(self) -> str:
        """``data.spec`` with ``data.frames``, ``sample`` and ``max_image_pixels`` added. Raises ``DataError``."""
        return self._spec(self.data.spec, self.data.adapter)

    @property
    def mix(self) -> list[MixtureEntry]:
        """The entries of ``data.mix`` with their names and complete specs. Raises ``DataError``."""
        specs = [self._spec(entry.spec, entry.adapter) for entry in self.data.mix]
        names = entry_names([(entry.name, spec) for entry, spec in zip(self.data.mix, specs, strict=True)])
        return [
            MixtureEntry(name, spec, entry.weight)
            for name, spec, entry in zip(names, specs, self.data.mix, strict=True)
        ]

    @property
    def mix_rewards(self) -> dict[str, RewardRecipe]:
        """The reward section of each entry of ``data.mix`` by name: the recipe's, overridden by the entry's keys."""
        rewards = {}
        for found, entry in zip(self.mix, self.data.mix, strict=True):
            own = entry.reward
            changes = {key: getattr(own, key) for key in own.model_fields_set} if own is not None else {}
            rewards[found.name] = self.reward.model_copy(update=changes)
        return rewards

    @property
    def eval_spec(self) -> str:
        """``eval.spec`` with ``max_image_pixels`` added; of clips it says itself which frames. Raises ``DataError``."""
        return self._read(own_spec(self.eval.adapter, self.eval.spec))

    def _spec(self, spec: str, adapter: str | None) -> str:
        return self._read(with_options(own_spec(adapter, spec), frames=self.data.frames, sample=self.data.sample))

    def _read(self, spec: str) -> str:
        most = self.data.max_image_pixels
        return spec if most == MAX_IMAGE_PIXELS else with_reading(spec, max_image_pixels=most)

    def dump(self) -> str:
        """The resolved recipe as YAML, every key written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_records(
    recipe: Recipe, *, skip_bad: bool | None = None, misfit: Callable[[Record], str | None] | None = None
) -> Sequence[Record]:
    """The records of a recipe's data or mixture. Raises ``DataError``.

    ``skip_bad`` None: the recipe's value; ``misfit``: see ``fastrl.data.load_data``.
    """
    skip = recipe.data.skip_bad if skip_bad is None else skip_bad
    if recipe.data.mix:
        return load_mixture(recipe.mix, skip_bad=skip, misfit=misfit, suffix=recipe.data.suffix)
    spec = recipe.data_spec
    return suffixed(load_data(spec, skip_bad=skip, misfit=misfit), recipe.data.suffix, spec)


def key_tables() -> dict[str, list[Key]]:
    """Every key of a recipe by section: ``The run`` (those of no section), then each section's name, then one
    ``method: CLASS`` for each method that is registered."""
    tables = {"The run": list(keys_of(Recipe, deep=False))}
    for name, field in Recipe.model_fields.items():
        inner = [section for section in sections_in(field.annotation) if not issubclass(section, MethodOptions)]
        if inner:
            tables[name] = list(keys_of(inner[0], f"{name}."))
    methods = dict.fromkeys(METHODS.values())  # one may have several kinds
    return tables | {f"method: {m.__name__}": list(keys_of(m.Options, "method.")) for m in methods}


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Recipe:
    """Read a recipe and apply overrides.

    Args:
        name_or_path: a shipped recipe's name, or a YAML file.
        overrides: ``a.b=c`` strings (the value is YAML), or a mapping from dotted paths to values.

    Raises:
        RecipeError: the recipe does not exist, is not YAML, or has invalid keys or values; one message lists them all.
    """
    path = _find(name_or_path)
    values = read_values(path)
    values.setdefault("name", path.stem)
    override(values, overrides)
    return build_recipe(values, source=str(path))


def build_recipe(values: Mapping[str, Any], *, source: str = "recipe") -> Recipe:
    """A recipe from plain values. Raises ``RecipeError``: every problem, and the nearest valid key for unknown ones."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        valid = _valid_paths(values)
        problems = [explain(e, valid) for e in each_key(error.errors(include_url=False), valid)]
        raise RecipeError(f"{source}:\n" + "\n".join(f"  {p}" for p in problems)) from None


def differences(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """Dotted path → (old value, new value) of every key that differs."""
    a, b = dict(_flatten(old.model_dump(mode="json"))), dict(_flatten(new.model_dump(mode="json")))
    return {key: (a.get(key), b.get(key)) for key in [*a, *(k for k in b if k not in a)] if a.get(key) != b.get(key)}


def _find(name_or_path: str | Path) -> Path:
    path = Path(name_or_path)
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise RecipeError(f"recipe file not found: {path}")
    names = shipped_recipes()
    if str(name_or_path) in names:
        return shipped_path(str(name_or_path))
    near = nearest(name_or_path, names)
    hint = f"; did you mean {near}?" if near else "."
    raise RecipeError(f"unknown recipe {str(name_or_path)!r}{hint} Shipped: {', '.join(names)}; or give a YAML file")


def _valid_paths(values: Any) -> set[str]:
    """Every dotted path a recipe may have, with the keys of the method it names (or of all methods)."""
    method = values.get("method") if isinstance(values, Mapping) else None
    kind = method.get("kind") if isinstance(method, Mapping) else None
    chosen = [METHODS[kind]] if isinstance(kind, str) and kind in METHODS else METHODS.values()
    return {*key_paths(Recipe), *(path for m in chosen for path in key_paths(m.Options, "method."))}


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
