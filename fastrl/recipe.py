"""Recipes: one YAML file says everything about a run. Unknown keys are errors that name the nearest valid one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fastrl.http import check_url
from fastrl.methods import METHODS, MethodOptions
from fastrl.pictures import MAX_PIXELS

SHIPPED = Path(__file__).parent / "recipes"
# What other trainers call our keys, for whoever comes from there: the nearest spelling would mislead.
KNOWN_ELSEWHERE = {
    "learning_rate": "optim.lr",
    "max_steps": "optim.steps",
    "max_grad_norm": "optim.clip_norm",
    "warmup_ratio": "optim.warmup",
    "warmup_steps": "optim.warmup",
    "lr_scheduler_type": "optim.schedule",
    "num_iterations": "optim.updates_per_batch",
    "num_generations": "rollout.group_size",
    "max_completion_length": "rollout.max_new_tokens",
    "max_tokens": "rollout.max_new_tokens",
    "kl_coef": "method.beta",
    "epsilon": "method.clip_low",
    "epsilon_high": "method.clip_high",
    "reward_weights": "reward.weights",
    "output_dir": "out",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
}


class RecipeError(ValueError):
    """A recipe that cannot be used; the message lists every problem with its dotted path."""


class Section(BaseModel):
    """Base of all recipe sections."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LoraRecipe(Section):
    """Low-rank adapters; only they are trained."""

    rank: int = Field(16, ge=1, le=8192)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: list[str] | str | None = (
        None  # names of linear layers, or one regular expression; none: all language linears
    )
    also_train: list[str] = []  # modules trained whole beside the adapters (visual.merger: the projector)

    def spec(self) -> dict[str, Any]:
        """The mapping ``load_policy(lora=…)`` takes."""
        return self.model_dump(exclude_none=True)


class ModelRecipe(Section):
    path: str  # a Hugging Face folder, or tiny:NAME for a shipped one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on a GPU, float32 on a CPU
    device: str | None = None
    lora: LoraRecipe | None = None
    freeze: list[str] = []  # parameter-name patterns
    gradient_checkpointing: bool = False
    offload_activations: bool = False  # what checkpointing keeps lies on the host until the backward
    liger: bool = False  # RMSNorm, SwiGLU and rotary embedding by liger-kernel; needs a GPU
    min_pixels: int | None = Field(None, ge=1)  # area of a resized image
    max_pixels: int | None = Field(None, ge=1)


class DataRecipe(Section):
    spec: str = Field(min_length=1)  # adapter:path[?key=value&…]
    prompts_per_step: int = Field(8, ge=1)  # on each rank
    order: Literal["shuffle", "file"] = "shuffle"  # shuffled anew each epoch, or as the data lists them (easy to hard)
    seed: int | None = Field(None, ge=0, lt=2**63)  # of the shuffle; none: the run's
    # Count and skip bad rows instead of refusing the data, and records whose pictures cannot be decoded as they come
    skip_bad: bool = False
    max_image_pixels: int = Field(MAX_PIXELS, ge=1)  # width x height of a picture file; a larger one is a bad row
    # Of clips: how many frames the model is shown, and which (uniform, first or random); none: as the spec has it
    frames: int | None = Field(None, ge=1)
    sample: Literal["uniform", "first", "random"] | None = None
    workers: int = Field(2, ge=0)  # threads that preprocess the next step's images meanwhile; 0: none
    blank_images: bool = False  # grey pictures of the same size: what is then learned is learned from the text


class RolloutRecipe(Section):
    group_size: int = Field(8, ge=1)
    max_new_tokens: int = Field(256, ge=1, le=2**20)
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)  # 0: off
    allow_truncated_sampling: bool = False
    decode: Literal["auto", "eager", "static", "graph"] = "auto"  # auto: CUDA graphs on a GPU, eager steps on a CPU
    backend: Literal["local", "vllm"] = "local"  # vllm: on a server that is given the weights (docs/vllm.md)
    server: str | None = None  # of vllm: http://localhost:8000
    shared: str | None = None  # of vllm: folder, by the same path on the server, for weights; none: OUT/rollout
    server_timeout: float = Field(600.0, gt=0)  # of vllm: seconds one prompt's answers, or new weights, may take

    @model_validator(mode="after")
    def _unbiased(self) -> RolloutRecipe:
        if (self.top_p < 1 or self.top_k > 0) and not self.allow_truncated_sampling:
            raise ValueError(
                "top_p < 1 or top_k > 0 samples from another distribution than the one whose log-probs are trained; "
                "set allow_truncated_sampling: true to accept that bias"
            )
        return self

    @model_validator(mode="after")
    def _served(self) -> RolloutRecipe:
        if self.backend == "local" and (self.server is not None or self.shared is not None):
            raise ValueError("server and shared are of backend: vllm, this one is local")
        if self.backend == "vllm":
            if self.server is None:
                raise ValueError("backend: vllm needs server: the address of a running vLLM, http://localhost:8000")
            check_url(self.server, "server", "http://localhost:8000")
        return self


class RewardRecipe(Section):
    options: dict[str, Any] = {}  # of the task's reward
    weights: dict[str, float] = {}  # by component name; a component not named weighs 1


class ParameterGroup(Section):
    match: str = Field(min_length=1)  # a glob over parameter names, or a run of whole parts of them (visual.merger)
    lr: float | None = Field(None, ge=0)
    weight_decay: float | None = Field(None, ge=0)


class OptimRecipe(Section):
    steps: int = Field(ge=1)  # rollout batches; each makes updates_per_batch optimizer updates
    lr: float = Field(1e-6, ge=0, le=100)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)  # on matrices only
    warmup: float = Field(0, ge=0)  # below 1: a fraction of all updates, else their number
    schedule: Literal["constant", "cosine"] = "constant"
    min_lr_ratio: float = Field(0.0, ge=0, le=1)  # where the cosine ends
    clip_norm: float | None = Field(1.0, gt=0)
    updates_per_batch: int = Field(1, ge=1)  # 1: strictly on-policy
    token_budget: int = Field(8192, ge=1)  # tokens of one micro-batch; a group is never split
    # AdamW's states: fp32 beside the weights; 8bit: quarter the bytes; offload: on the host, which then updates
    states: Literal["fp32", "8bit", "offload"] = "fp32"
    gradient_release: bool = (
        False  # update each parameter within the backward and free its gradient; needs no clip_norm
    )
    # Gradients of head and loss made in the forward: 3 matmuls over the vocabulary, not 4; entropy is not measured then
    row_local_head: bool = False
    groups: list[ParameterGroup] = []  # the first that matches a parameter sets its lr and weight decay

    @model_validator(mode="after")
    def _momenta(self) -> OptimRecipe:
        if not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {list(self.betas)}")
        if self.row_local_head and self.updates_per_batch > 1:
            raise ValueError("row_local_head leaves out log-probs that later updates need: set updates_per_batch: 1")
        if self.gradient_release and self.clip_norm is not None:
            raise ValueError("gradient_release updates before the norm of all gradients is known: set clip_norm: null")
        if self.gradient_release and self.states == "offload":
            raise ValueError("gradient_release frees nothing with states: offload, where gradients leave the device")
        return self


class CheckpointRecipe(Section):
    every: int = Field(100, ge=0)  # steps; 0: only at the end
    keep: int = Field(2, ge=1)
    final: bool = True


class LogRecipe(Section):
    every: int = Field(1, ge=1)  # steps between console lines (metrics.jsonl has every step)
    samples_every: int = Field(20, ge=0)  # steps between tables of sample answers; 0: never
    samples: int = Field(4, ge=1)
    tensorboard: bool = True


class EngineRecipe(Section):
    kind: Literal["local", "deepspeed"] = "local"
    zero_stage: Literal[0, 1, 2] = 2
    offload_optimizer: bool = False


MethodSection = Annotated[Union[tuple(m.Options for m in METHODS)], Field(discriminator="kind")]  # noqa: UP007


class Recipe(Section):
    """A whole run."""

    name: str = "run"
    out: str | None = Field(None, min_length=1)  # none: runs/NAME
    seed: int = Field(0, ge=0, lt=2**63)
    method: MethodSection  # type: ignore[valid-type]
    model: ModelRecipe
    data: DataRecipe
    rollout: RolloutRecipe = RolloutRecipe()  # type: ignore[call-arg]
    reward: RewardRecipe = RewardRecipe()
    optim: OptimRecipe
    checkpoint: CheckpointRecipe = CheckpointRecipe()  # type: ignore[call-arg]
    log: LogRecipe = LogRecipe()  # type: ignore[call-arg]
    engine: EngineRecipe = EngineRecipe()

    @model_validator(mode="after")
    def _groups(self) -> Recipe:
        if self.method.kind == "perception-r1" and self.rollout.group_size < 2:
            raise ValueError(
                "rollout.group_size: an answer is compared with the others of its group, so there have to be at least "
                f"2 (got {self.rollout.group_size})"
            )
        return self

    @model_validator(mode="after")
    def _memory(self) -> Recipe:
        if self.model.offload_activations and not self.model.gradient_checkpointing:
            raise ValueError(
                "model.offload_activations moves what checkpointing keeps: set gradient_checkpointing: true"
            )
        if self.engine.kind == "deepspeed" and (self.optim.states != "fp32" or self.optim.gradient_release):
            raise ValueError(
                "optim.states and optim.gradient_release are the local engine's; with engine.kind: deepspeed use "
                "engine.zero_stage and engine.offload_optimizer"
            )
        if self.engine.offload_optimizer and (self.engine.kind == "local" or self.engine.zero_stage == 0):
            raise ValueError(
                "engine.offload_optimizer needs engine.kind: deepspeed and a zero_stage of 1 or 2; "
                "with engine.kind: local use optim.states: offload"
            )
        return self

    @model_validator(mode="after")
    def _rollout(self) -> Recipe:
        if self.rollout.backend == "vllm" and self.engine.kind != "local":
            raise ValueError("rollout.backend: vllm takes its weights from one process: it needs engine.kind: local")
        if self.rollout.backend == "vllm" and self.model.lora is not None and self.model.lora.also_train:
            raise ValueError("rollout.backend: vllm serves adapters alone: leave model.lora.also_train empty")
        return self

    @property
    def scores_groups(self) -> bool:
        """Whether the method learns from groups of answers which, unless the data brings them, the reward scores."""
        return self.method.kind == "perception-r1" or hasattr(self.method, "online_every")

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return Path(self.out) if self.out is not None else Path("runs") / self.name

    @property
    def data_spec(self) -> str:
        """``data.spec`` with what ``data.frames``, ``sample`` and ``max_image_pixels`` say. Raises ``DataError``."""
        from fastrl.data import with_options

        most = self.data.max_image_pixels
        return with_options(
            self.data.spec,
            frames=self.data.frames,
            sample=self.data.sample,
            max_image_pixels=most if most != MAX_PIXELS else None,
        )

    def dump(self) -> str:
        """The resolved recipe as YAML, every key written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Recipe:
    """Read a recipe and apply overrides.

    Args:
        name_or_path: a shipped recipe's name, or a YAML file.
        overrides: ``a.b=c`` strings (the value is YAML), or a mapping from dotted paths to values.

    Raises:
        RecipeError: no such recipe, not YAML, or keys and values that do not fit; all problems in one message.
    """
    path = _find(name_or_path)
    text = path.read_text(encoding="utf-8")
    values = _parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections, got {type(values).__name__}")
    values.setdefault("name", path.stem)
    pairs = overrides.items() if isinstance(overrides, Mapping) else [_split_override(o) for o in overrides]
    for dotted, value in pairs:
        _set(values, dotted, value)
    return build_recipe(values, source=str(path))


def build_recipe(values: Mapping[str, Any], *, source: str = "recipe") -> Recipe:
    """A recipe from plain values. Raises ``RecipeError``: every problem, unknown keys with the nearest valid one."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        problems = [_explain(e, values) for e in error.errors(include_url=False)]
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
        return SHIPPED / f"{name_or_path}.yaml"
    near = difflib.get_close_matches(str(name_or_path), names, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]}?" if near else "."
    raise RecipeError(f"unknown recipe {str(name_or_path)!r}{hint} Shipped: {', '.join(names)}; or give a YAML file")


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-6 is a number (YAML 1.1 reads it as text) and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{source}: not YAML: {error}") from None


def _split_override(override: str) -> tuple[str, Any]:
    dotted, equals, value = override.partition("=")
    if not equals or not dotted.strip():
        raise RecipeError(f"--set takes key=value (optim.lr=1e-6), got {override!r}")
    return dotted.strip(), _parse_yaml(value, f"--set {dotted.strip()}")


def _set(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Put ``value`` at a dotted path, making the mappings on the way."""
    *sections, leaf = dotted.split(".")
    here: Any = values
    for depth, section in enumerate(sections):
        if here.get(section) is None:
            here[section] = {}
        here = here[section]
        if not isinstance(here, dict):
            at = ".".join(sections[: depth + 1])
            raise RecipeError(f"{dotted}: {at} is the value {here!r}, not a section")
    here[leaf] = value


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Section classes inside an annotation (optional, list, union)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


def _key_paths(model: type[BaseModel], kind: str | None, prefix: str = "") -> Iterator[str]:
    """Every dotted path a recipe may have; of the methods' keys, those of ``kind`` (or of all)."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for inner in _models_in(field.annotation):
            if issubclass(inner, MethodOptions) and kind not in (
                None,
                *get_args(inner.model_fields["kind"].annotation),
            ):
                continue
            yield from _key_paths(inner, kind, f"{prefix}{name}.")


def _explain(error: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    """One line for one pydantic error."""
    method = values.get("method")
    kind = method.get("kind") if isinstance(method, Mapping) else None
    known_kinds = [k for m in METHODS for k in get_args(m.Options.model_fields["kind"].annotation)]
    loc = [str(part) for part in error["loc"]]
    if len(loc) > 1 and loc[0] == "method" and loc[1] in known_kinds:
        del loc[1]  # the union's tag is no key
    dotted = ".".join(loc)
    if error["type"] == "extra_forbidden":
        valid = set(_key_paths(Recipe, kind if kind in known_kinds else None))
        return f"{dotted}: unknown key{_nearest(loc, valid)}"
    if error["type"] == "missing":
        return f"{dotted}: missing"
    if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
        near = difflib.get_close_matches(str(kind), known_kinds, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else "."
        return f"{dotted}.kind: unknown method {kind!r}{hint} Known: {', '.join(known_kinds)}"
    given = error.get("input")
    shown = f" (got {given!r})" if isinstance(given, str | int | float | bool | list | None) else ""
    return f"{dotted}: {str(error['msg']).removeprefix('Value error, ')}{shown}"


def _nearest(loc: Sequence[str], valid: Iterable[str]) -> str:
    """``; did you mean …?``: the same name elsewhere, else the nearest of the same section, else all keys here."""
    paths = sorted(valid)
    section = ".".join(part for part in loc[:-1] if not part.isdigit())
    prefix = f"{section}." if section else ""
    siblings = [p for p in paths if p.startswith(prefix) and "." not in p[len(prefix) :]]
    exact = next((p for p in paths if p.rpartition(".")[2] == loc[-1]), KNOWN_ELSEWHERE.get(loc[-1]))
    if exact in paths:  # the right key in the wrong section, or by another trainer's name
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
