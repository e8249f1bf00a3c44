"""The sections of a recipe: every key with its type, default and range. ``Recipe`` combines them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fastrl.config.limits import MAX_IMAGE_PIXELS
from fastrl.http import check_url


class Section(BaseModel):
    """Base of all recipe sections."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LoraRecipe(Section):
    """Low-rank adapters; only they are trained."""

    rank: int = Field(16, ge=1, le=8192)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    # Names of the language model's linear layers, parts (vision, projector, language), or one regular expression;
    # None: all linear layers of the language model
    targets: list[str] | str | None = None
    also_train: list[str] = []  # parts (projector) or modules that are trained in full in addition to the adapters

    def spec(self) -> dict[str, Any]:
        """The mapping that ``load_policy(lora=…)`` takes."""
        return self.model_dump(exclude_none=True)


class ModelRecipe(Section):
    path: str  # a Hugging Face folder, tiny:NAME for a shipped one, or a downloaded hub name
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on a GPU, float32 on a CPU
    device: str | None = None
    lora: LoraRecipe | None = None
    freeze: list[str] = []  # parts (vision, projector, language) or parameter-name patterns
    gradient_checkpointing: bool = False
    offload_activations: bool = False  # keep checkpointed activations on the host until the backward
    liger: bool = False  # RMSNorm, SwiGLU and rotary embedding by liger-kernel; needs a GPU
    min_pixels: int | None = Field(None, ge=1)  # area of a resized image, in pixels
    max_pixels: int | None = Field(None, ge=1)


class RewardRecipe(Section):
    options: dict[str, Any] = {}  # options of the task's reward
    weights: dict[str, float] = {}  # by name of a component or user function; 1 for those not named
    # User functions: my_rewards.py:score or package.module:score, one or a list, called like TRL's reward functions
    # (docs/extend-reward.md)
    function: list[str] = []
    builtin: bool = True  # add the task's own components; false: score with the functions only
    completions: Literal["conversation", "text"] = "conversation"  # the form in which functions get answers
    timeout: float | None = Field(600.0, gt=0, le=1e6)  # seconds allowed for one call of a function
    # DAPO's soft overlong punishment: in the last this many tokens before rollout.max_new_tokens, the component
    # "overlong" falls from 0 to -1
    overlong: int | None = Field(None, ge=1)

    @field_validator("function", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return [] if value is None else [value] if isinstance(value, str) else value


class MixEntry(Section):
    """One data set of a mixture."""

    spec: str = Field(min_length=1)  # as data.spec
    adapter: str | None = None  # as data.adapter
    name: str | None = Field(None, min_length=1)  # in metrics and ids; None: derived from the spec
    weight: float | dict[int, float] = 1.0  # constant, or by step with linear interpolation
    reward: RewardRecipe | None = None  # overrides keys of the recipe's reward section

    @field_validator("weight")
    @classmethod
    def _weights(cls, value: float | dict[int, float]) -> float | dict[int, float]:
        given = value if isinstance(value, dict) else {0: value}
        if not given or min(given) < 0 or min(given.values()) < 0 or not any(given.values()):
            raise ValueError("must be above 0, or {step: weight} with steps and weights of at least 0, not all 0")
        return value


class CurriculumRecipe(Section):
    """From easy to hard: rows are drawn from the easiest part of the data, which grows until it is all of it."""

    by: str = Field(min_length=1)  # a column of the rows or a key of their truth: a number, or something with a length
    steps: int = Field(ge=1)  # after which rows are drawn from all of the data
    start: float = Field(0.2, gt=0, le=1)  # the fraction of the data to begin with


class DataRecipe(Section):
    spec: str = ""  # adapter:path[?key=value&…]
    adapter: str | None = None  # my_data.py:rows, called as rows(path, **query) with spec's path; yields Records
    mix: list[MixEntry] = []  # several data sets, instead of spec
    # row: an entry's weight multiplies its number of rows; task: weights are proportions of tasks, whatever their sizes
    mix_by: Literal["row", "task"] = "row"
    curriculum: CurriculumRecipe | None = None
    # Number of rows shuffled together; None: all. For tables whose pictures do not fit in memory
    shuffle_buffer: int | None = Field(None, ge=1)
    prompts_per_step: int = Field(8, ge=1)  # on each rank
    order: Literal["shuffle", "file"] = "shuffle"  # shuffled anew each epoch, or in the data's order (easy to hard)
    seed: int | None = Field(None, ge=0, lt=2**63)  # of the shuffle; None: the run's
    # Skip and count bad rows instead of refusing the data, and skip records whose pictures turn out to be undecodable
    skip_bad: bool = False
    max_image_pixels: int = Field(MAX_IMAGE_PIXELS, ge=1)  # width x height of a picture file; a larger one is a bad row
    # How --resume detects changed picture files. stat: by size and modification time; bytes: by reading all of them
    identity: Literal["stat", "bytes"] = "stat"
    # Number of frames of a clip shown to the model, and their choice (uniform, first or random); None: as in the spec
    frames: int | None = Field(None, ge=1)
    sample: Literal["uniform", "first", "random"] | None = None
    workers: int = Field(2, ge=0)  # threads that preprocess the next step's images in the background; 0: none
    blank_images: bool = False  # replace pictures by grey ones of the same size, to measure learning from text only

    @field_validator("spec", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return "" if value is None else value  # --set data.spec= and data.spec: null give None

    @model_validator(mode="after")
    def _one_source(self) -> DataRecipe:
        if bool(self.spec) == bool(self.mix):
            raise ValueError("give either spec (one data set) or mix (several)")
        if self.mix and self.adapter is not None:
            raise ValueError("adapter is only read with spec; in a mix, set it for each entry")
        names = [name for name in (entry.name for entry in self.mix) if name is not None]
        if len(set(names)) < len(names):
            raise ValueError(f"two entries of mix have the same name: {', '.join(names)}")
        return self


class RolloutRecipe(Section):
    group_size: int = Field(8, ge=1)
    max_new_tokens: int = Field(256, ge=1, le=2**20)
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)  # 0: off
    allow_truncated_sampling: bool = False
    decode: Literal["auto", "eager", "static", "graph"] = "auto"  # auto: CUDA graphs on a GPU, eager steps on a CPU
    backend: Literal["local", "vllm"] = "local"  # vllm: sample on a server that gets the weights (docs/vllm.md)
    server: str | None = None  # vllm: its address, http://localhost:8000
    shared: str | None = None  # vllm: folder for weights, at the same path on the server; None: OUT/rollout
    server_timeout: float = Field(600.0, gt=0)  # vllm: seconds allowed for a prompt's answers or for new weights

    @model_validator(mode="after")
    def _unbiased(self) -> RolloutRecipe:
        if (self.top_p < 1 or self.top_k > 0) and not self.allow_truncated_sampling:
            raise ValueError(
                "top_p < 1 or top_k > 0 samples from a different distribution than the one whose log-probs are "
                "trained; set allow_truncated_sampling: true to accept that bias"
            )
        return self

    @model_validator(mode="after")
    def _served(self) -> RolloutRecipe:
        if self.backend == "local" and (self.server is not None or self.shared is not None):
            raise ValueError("rollout.server and rollout.shared need rollout.backend: vllm (backend is local)")
        if self.backend == "vllm":
            if self.server is None:
                raise ValueError("backend: vllm needs server: the address of a running vLLM, http://localhost:8000")
            check_url(self.server, "server", "http://localhost:8000")
        return self


class ParameterGroup(Section):
    # A part (projector), a glob over parameter names, or consecutive components of a name (layers.0)
    match: str = Field(min_length=1)
    lr: float | None = Field(None, ge=0)
    weight_decay: float | None = Field(None, ge=0)


class OptimRecipe(Section):
    steps: int = Field(ge=1)  # rollout batches; each makes updates_per_batch optimizer updates
    lr: float = Field(1e-6, ge=0, le=100)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)  # on matrices only
    warmup: float = Field(0, ge=0)  # below 1: a fraction of all updates; else a number of updates
    schedule: Literal["constant", "cosine"] = "constant"
    min_lr_ratio: float = Field(0.0, ge=0, le=1)  # final value of the cosine, as a fraction of lr
    clip_norm: float | None = Field(1.0, gt=0)
    updates_per_batch: int = Field(1, ge=1)  # 1: strictly on-policy
    token_budget: int = Field(8192, ge=1)  # tokens of one micro-batch; a group is never split
    # AdamW's states. fp32: on the device; 8bit: a quarter of the bytes; offload: on the host, which does the update
    states: Literal["fp32", "8bit", "offload"] = "fp32"
    # Update each parameter within the backward and free its gradient; needs clip_norm: null
    gradient_release: bool = False
    # Compute gradients of head and loss in the forward: 3 matmuls over the vocabulary instead of 4, but no entropy
    row_local_head: bool = False
    groups: list[ParameterGroup] = []  # the first group that matches a parameter sets its lr and weight decay

    @model_validator(mode="after")
    def _momenta(self) -> OptimRecipe:
        if not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {list(self.betas)}")
        if self.row_local_head and self.updates_per_batch > 1:
            raise ValueError("row_local_head skips log-probs that later updates need: set updates_per_batch: 1")
        if self.gradient_release and self.clip_norm is not None:
            raise ValueError("gradient_release updates before the norm of all gradients is known: set clip_norm: null")
        if self.gradient_release and self.states == "offload":
            raise ValueError("gradient_release frees nothing with states: offload, which moves gradients to the host")
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
    timeout: float = Field(1800.0, gt=0, le=1e6)  # deepspeed: seconds a rank waits for the others before all stop
