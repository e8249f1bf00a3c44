"""The sections of a recipe: every key with its type, default and range. ``Recipe`` combines them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fastrl.config.limits import MAX_IMAGE_PIXELS
from fastrl.config.registry import nearest
from fastrl.http import check_url


class Section(BaseModel):
    """Base of all recipe sections. The docstring below a key says what it means (``fastrl recipes --keys``)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class LoraRecipe(Section):
    """Low-rank adapters; only they are trained."""

    rank: int = Field(16, ge=1, le=8192)
    """Rank of the update of each layer."""
    alpha: float = Field(32.0, gt=0)
    """The update is scaled by alpha ÷ rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """On the input of the adapters, in training alone."""
    targets: list[str] | str | None = None
    """Names of the language model's linear layers, `vision`, `projector` or `language` for all of a part's, or one
    regular expression over full names; none: all linear layers of the language model. Name fewer (`[q_proj, v_proj]`)
    to save memory."""
    also_train: list[str] = []
    """Parts (`projector`, `vision`) or modules, by the last parts of their names, that are trained whole beside the
    adapters."""

    dora: bool = False
    """Weight-decomposed adapters (DoRA, arXiv:2402.09353): the norm of each output's weights is trained too. Somewhat
    better at low ranks, and slower in training."""
    rslora: bool = False
    """Scale the update by alpha ÷ √rank (rsLoRA, arXiv:2312.03732), so that high ranks do not learn more slowly."""

    def spec(self) -> dict[str, Any]:
        """The mapping that ``load_policy(lora=…)`` takes."""
        return self.model_dump(exclude_none=True)


class ModelRecipe(Section):
    path: str
    """A Hugging Face folder, `tiny:NAME` for a shipped model, or a downloaded hub name. `--model` sets it."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the weights. `auto`: bfloat16 on a GPU, float32 on a CPU. With `bfloat16` the optimizer keeps float32
    copies; `float32` on a GPU is for debugging numerics."""
    device: str | None = None
    """As torch names it; none: the first GPU, else the CPU. `cuda:1` picks another GPU, `cpu` runs a small model
    beside a busy one."""
    quantize: Literal["4bit"] | None = None
    """`4bit`: the language model's linear layers as NormalFloat4 (QLoRA), in a quarter of the memory; their adapters
    are trained (`model.lora`). Needs a GPU and bitsandbytes."""
    lora: LoraRecipe | None = None
    """Low-rank adapters: only they are trained, and the base model is the reference, so that no copy of it is
    kept."""
    freeze: list[str] = []
    """What is not trained: `vision`, `projector` or `language` in every family, something within one
    (`vision.blocks.0`), globs over full parameter names, or runs of whole parts of them."""
    gradient_checkpointing: bool = False
    """Recompute each layer's activations in the backward: much less memory, about a third more time."""
    offload_activations: bool = False
    """What checkpointing keeps lies on the host until the backward. For long rows on a GPU that is full; needs
    `model.gradient_checkpointing`."""
    liger: bool = False
    """RMSNorm, SwiGLU and rotary embedding by liger-kernel, where it is installed; needs a GPU."""
    min_pixels: int | None = Field(None, ge=1)
    """Least area of a resized picture; none: the model folder's."""
    max_pixels: int | None = Field(None, ge=1)
    """Largest area of a resized picture; none: the model folder's. The first thing to lower when prompts are too
    long."""


class RewardRecipe(Section):
    options: dict[str, Any] = {}
    """Of the reward of the data's task: `metric`, `threshold`, `format`, …; an unknown one is named with those that
    exist."""
    weights: dict[str, float] = {}
    """By component; one that is not named weighs 1, weight 0 leaves it out."""
    function: list[str] = []
    """Reward functions of your own, `my_rewards.py:score` or `package.module:score`, one or a list: a reward of your
    own."""
    builtin: bool = True
    """`false` leaves the task's own components out: the functions alone score."""
    completions: Literal["conversation", "text"] = "conversation"
    """What the functions are given of each answer."""
    timeout: float | None = Field(600.0, gt=0, le=1e6)
    """Seconds that one call of a function may take."""
    overlong: int | None = Field(None, ge=1)
    """DAPO's soft punishment of long answers: over this many tokens before `rollout.max_new_tokens` a component
    `overlong` falls from 0 to −1. Of Perception-R1."""

    @field_validator("function", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return [] if value is None else [value] if isinstance(value, str) else value


class MixEntry(Section):
    """One data set of a mixture."""

    spec: str = Field(min_length=1)
    """As `data.spec`."""
    adapter: str | None = None
    """As `data.adapter`."""
    name: str | None = Field(None, min_length=1)
    """What metrics and ids call this data set; none: a name made from its spec."""
    weight: float | dict[int, float] = 1.0
    """How often it is drawn: a constant, or `{step: weight}` with straight lines in between."""
    reward: RewardRecipe | None = None
    """A reward section of its own; its keys override the recipe's."""

    @field_validator("weight")
    @classmethod
    def _weights(cls, value: float | dict[int, float]) -> float | dict[int, float]:
        given = value if isinstance(value, dict) else {0: value}
        if not given or min(given) < 0 or min(given.values()) < 0 or not any(given.values()):
            raise ValueError("must be above 0, or {step: weight} with steps and weights of at least 0, not all 0")
        return value


class CurriculumRecipe(Section):
    """From easy to hard: rows are drawn from the easiest part of the data, which grows until it is all of it."""

    by: str = Field(min_length=1)
    """A column of the rows or a key of their truth: a number, or something that has a length."""
    steps: int = Field(ge=1)
    """Steps until all rows are drawn."""
    start: float = Field(0.2, gt=0, le=1)
    """The part to begin with."""


class DataRecipe(Section):
    spec: str = ""
    """`adapter:path?key=value&…`, see data; needed where `data.mix` is not given. `--data` sets it."""
    adapter: str | None = None
    """A function of yours, `my_data.py:rows`, called as `rows(path, **query)` with the spec's path; it yields
    `Record`s."""
    mix: list[MixEntry] = []
    """Several data sets in place of `data.spec`, mixed row by row; see data."""
    mix_by: Literal["row", "task"] = "row"
    """What weights multiply: `row`, the rows of a data set; `task`, nothing: they are the proportions of the data
    sets, whatever their sizes."""
    curriculum: CurriculumRecipe | None = None
    """From easy to hard: rows are drawn from the easiest part of the data, which grows to all of it."""
    shuffle_buffer: int | None = Field(None, ge=1)
    """Rows that are shuffled among each other; none: all. For tables whose pictures do not fit in memory."""
    prompts_per_step: int = Field(8, ge=1)
    """Prompts of a step, on each rank."""
    order: Literal["shuffle", "file"] = "shuffle"
    """`shuffle`: anew each epoch. `file`: as the data lists them, for a curriculum from easy to hard."""
    seed: int | None = Field(None, ge=0, lt=2**63)
    """Of the shuffle; none: the run's. Set it to compare runs with different `seed` on one order of data."""
    skip_bad: bool = False
    """Leave bad rows out and count them, and pass over records whose pictures cannot be decoded when their turn
    comes. Without it all bad rows are reported before anything is trained."""
    max_image_pixels: int = Field(MAX_IMAGE_PIXELS, ge=1)
    """Width × height of a picture file; a larger one is a bad row. Raise it for scans, lower it against pictures that
    decode to gigabytes."""
    identity: Literal["stat", "bytes"] = "stat"
    """How `--resume` sees that a picture file changed: by size and time of last change, or by its bytes, which reads
    all of them. See resuming."""
    frames: int | None = Field(None, ge=1)
    """How many frames of a clip the model is shown; none: as the spec says."""
    sample: Literal["uniform", "first", "random"] | None = None
    """Which frames: evenly spread, the first ones, or random ones; none: as the spec says."""
    workers: int = Field(2, ge=0)
    """Threads that preprocess the pictures of this and the next step meanwhile; `0`: none, for the simplest trace of
    an error."""
    blank_images: bool = False
    """Grey pictures of the same size: what is then learned is learned from the text. `fastrl study` trains with and
    without."""

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
    """Answers to each prompt."""
    max_new_tokens: int = Field(256, ge=1, le=2**20)
    """Longest answer; longer ones are cut and count as not finished."""
    temperature: float = Field(1.0, gt=0)
    """Of sampling, and of the log-probs that are trained."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the smallest set of tokens with this probability; below 1 another distribution than the trained
    one."""
    top_k: int = Field(0, ge=0)
    """Sample from that many tokens; `0`: from all."""
    allow_truncated_sampling: bool = False
    """Accept the bias that `top_p` below 1 or `top_k` above 0 bring: sampled is another distribution than the one
    whose log-probs are trained."""
    decode: Literal["auto", "eager", "static", "graph"] = "auto"
    """`auto`: CUDA graphs on a GPU, eager steps on a CPU. `eager` when a model cannot be captured, `static` for the
    graphs' buffers without a graph (debugging)."""
    backend: Literal["local", "vllm"] = "local"
    """`vllm`: answers come from a vLLM server, which is given the weights."""
    server: str | None = None
    """With `vllm`: its address, `http://localhost:8000`."""
    shared: str | None = None
    """With `vllm`: a folder, under the same path on the server, through which it is given weights; none:
    `OUT/rollout`."""
    server_timeout: float = Field(600.0, gt=0)
    """With `vllm`: seconds that the answers to one prompt, or new weights, may take."""

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
    match: str = Field(min_length=1)
    """`vision`, `projector` or `language` in every family, a glob over parameter names, or a run of whole parts of
    them."""
    lr: float | None = Field(None, ge=0)
    """Of these parameters; none: `optim.lr`. A vision tower usually wants a tenth of the language model's."""
    weight_decay: float | None = Field(None, ge=0)
    """Of these parameters; none: `optim.weight_decay`."""


class OptimRecipe(Section):
    steps: int = Field(ge=1)
    """Rollout batches; each makes `updates_per_batch` optimizer updates."""
    lr: float = Field(1e-6, ge=0, le=100)
    """Learning rate after warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of AdamW: decay of the means of gradients and of their squares."""
    eps: float = Field(1e-8, gt=0)
    """Of AdamW. Raise it (1e-6) where gradients are so small that it decides the size of an update."""
    weight_decay: float = Field(0.0, ge=0)
    """Of AdamW, on matrices only."""
    warmup: float = Field(0, ge=0)
    """Updates over which the rate rises; below 1 a fraction of all."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Of the rate after warm-up."""
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    """Where the cosine ends, as a fraction of `lr`."""
    clip_norm: float | None = Field(1.0, gt=0)
    """Largest norm of all gradients together; `null`: no clipping."""
    updates_per_batch: int = Field(1, ge=1)
    """`1`: strictly on-policy. More: PPO's ratio and clip act from the second on."""
    token_budget: int = Field(8192, ge=1)
    """Tokens of one micro-batch; a group is never split. The result does not depend on it, memory does."""
    states: Literal["fp32", "8bit", "offload"] = "fp32"
    """AdamW's moments: `fp32` beside the weights, `8bit` in a quarter of the bytes, `offload` on the host, which then
    updates."""
    gradient_release: bool = False
    """Update each parameter within the backward and free its gradient; needs `clip_norm: null`. For a full model on
    one GPU."""
    row_local_head: bool = False
    """Gradients of head and loss are made in the forward: 3 products over the vocabulary, not 4. Entropy is then not
    measured; needs `updates_per_batch: 1`."""
    groups: list[ParameterGroup] = []
    """Rates for parts of the model; the first that matches a parameter counts."""

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
    every: int = Field(100, ge=0)
    """Steps; `0`: only at the end."""
    keep: int = Field(2, ge=1)
    """How many of the last stay. Raise it to evaluate along the way; each holds weights and moments."""
    final: bool = True
    """Write one after the last step. `false` for a run that is only measured."""


class EvalRecipe(Section):
    """Evaluation during training, with the protocols of ``fastrl eval``."""

    spec: str = ""
    """Evaluation data, as for `fastrl eval --data`; none: no evaluation during training."""
    adapter: str | None = None
    """As `data.adapter`."""
    every: int = Field(100, ge=1)
    """Steps between evaluations; the last step is always evaluated."""
    at_start: bool = True
    """Also evaluate before the first step, as a baseline."""
    n: int | None = Field(None, ge=1)
    """Number of records to evaluate, from the first; none: all."""
    metric: str | None = Field(None, min_length=1)
    """The metric that selects the best step, without `eval/`; none: the first of the task's protocol."""
    mode: Literal["max", "min"] | None = None
    """Whether the metric is to be maximised or minimised; none: its known direction."""
    samples: int = Field(1, ge=0)
    """Answers per record besides the greedy one, sampled as in training (their means are `eval/sampled/…`); `0`:
    none."""
    max_new_tokens: int | None = Field(None, ge=1, le=2**20)
    """Longest answer in tokens; none: the protocol's. Lower it if answers are short, to save time."""
    batch: int = Field(64, ge=1)
    """Prompts answered at once. Lower it if memory is short."""
    patience: int | None = Field(None, ge=1)
    """Stop after this many consecutive evaluations without improvement; none: never."""
    min_delta: float = Field(0.0, ge=0)
    """A new best must improve on the previous one by more than this."""

    @field_validator("spec", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return "" if value is None else value


LOGGERS = ("tensorboard", "wandb", "trackio")


class LogRecipe(Section):
    every: int = Field(1, ge=1)
    """Steps between lines on the console; `metrics.jsonl` has every step."""
    samples_every: int = Field(20, ge=0)
    """Steps between tables of sample answers (`samples.jsonl`, for `fastrl report`); `0`: never."""
    samples: int = Field(4, ge=1)
    """Answers in such a table."""
    to: list[str] | None = None
    """Loggers besides the run's folder: `tensorboard`, `wandb`, `trackio`, or your own class, `my_logger.py:Logger`;
    none: `tensorboard` if it is installed."""
    project: str | None = Field(None, min_length=1)
    """Project name for wandb and trackio; none: `WANDB_PROJECT`, else `fastrl`."""

    @model_validator(mode="before")
    @classmethod
    def _tensorboard(cls, values: Any) -> Any:
        """Accept ``tensorboard: true`` or ``false`` from older recipes and convert it to ``to``."""
        if not isinstance(values, Mapping) or "tensorboard" not in values:
            return values
        values = dict(values)
        wanted, to = values.pop("tensorboard"), values.get("to")
        if not isinstance(wanted, bool):
            raise ValueError(f"tensorboard must be true or false, got {wanted!r:.40}; log.to replaces it")
        named = [to] if isinstance(to, str) else to
        if not wanted:
            values["to"] = [name for name in named or () if name != "tensorboard"]
        elif named is not None and "tensorboard" not in named:
            values["to"] = ["tensorboard", *named]
        return values

    @field_validator("to", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("to")
    @classmethod
    def _known(cls, value: list[str] | None) -> list[str] | None:
        for name in value or ():
            if name not in LOGGERS and ":" not in name:
                near = nearest(name, LOGGERS)
                hint = f"; did you mean {near}?" if near else ";"
                raise ValueError(f"no logger {name!r}{hint} there are {', '.join(LOGGERS)} and my_logger.py:Logger")
        return list(dict.fromkeys(value)) if value is not None else None


class EngineRecipe(Section):
    kind: Literal["local", "deepspeed"] = "local"
    """`deepspeed`: several processes, see several GPUs."""
    zero_stage: Literal[0, 1, 2] = 2
    """With `deepspeed`: `1` shards optimizer states, `2` gradients too, `0` nothing."""
    offload_optimizer: bool = False
    """With `deepspeed` and stage 1 or 2: moments on the host."""
    timeout: float = Field(1800.0, gt=0, le=1e6)
    """Seconds that a rank waits for the others; then all stop and say for whom. Raise it where one rank's answers may
    take longer."""
