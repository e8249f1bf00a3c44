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
    """Rank of each layer's update."""
    alpha: float = Field(32.0, gt=0)
    """The update is scaled by alpha ÷ rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout probability on the input of the adapters; only in training."""
    targets: list[str] | str | None = None
    """Layers with adapters: names of the language model's linear layers, `vision`, `projector` or `language` for all
    layers of a part, or one regular expression over full names; none: all linear layers of the language model. Name
    fewer (`[q_proj, v_proj]`) to save memory."""
    also_train: list[str] = []
    """Parts (`projector`, `vision`) or modules, by the last parts of their names, that are trained in full besides the
    adapters."""

    dora: bool = False
    """Weight-decomposed adapters (DoRA, arXiv:2402.09353): also train the norm of each output's weights. Somewhat
    better at low ranks, and slower."""
    rslora: bool = False
    """Scale the update by alpha ÷ √rank (rsLoRA, arXiv:2312.03732), so that high ranks do not learn more slowly."""

    def spec(self) -> dict[str, Any]:
        """The mapping that ``load_policy(lora=…)`` takes."""
        return self.model_dump(exclude_none=True)


class ModelRecipe(Section):
    path: str
    """A Hugging Face folder, `tiny:NAME` for a shipped model, or a downloaded hub name. `--model` sets it."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights. `auto`: bfloat16 on a GPU, float32 on a CPU. With `bfloat16` the optimizer keeps float32
    copies; `float32` on a GPU is for debugging numerics."""
    device: str | None = None
    """Device, as named by torch; none: the first GPU, or the CPU if there is none. `cuda:1` selects another GPU, `cpu`
    suits a small model while the GPU is busy."""
    quantize: Literal["4bit"] | None = None
    """`4bit`: store the language model's linear layers as NormalFloat4 (QLoRA), in a quarter of the memory, and train
    their adapters (`model.lora`). Needs a GPU and bitsandbytes."""
    lora: LoraRecipe | None = None
    """Low-rank adapters. Only they are trained, and the base model serves as the reference, so no copy of it is
    needed."""
    freeze: list[str] = []
    """Parameters that are not trained: `vision`, `projector` or `language` (in every family), a module within one
    (`vision.blocks.0`), a glob over full parameter names, or consecutive parts of a name."""
    gradient_checkpointing: bool | Literal["products", "auto"] = False
    """Recompute each layer's activations in the backward: much less memory, about a third more time. `products`: keep
    the results of matrix products and attention, and recompute only what lies between. `auto`: the first with which the
    planned step fits on the GPU of `false`, `products`, and `true` for a quarter, half, three quarters or all of the
    layers; on a CPU `false`."""
    checkpointed_layers: int | None = Field(None, ge=0)
    """Number of the language model's layers, the first ones, that `model.gradient_checkpointing` applies to; the
    others keep everything. None: all (or what `auto` chooses). To the vision tower's it always applies."""
    offload_activations: bool = False
    """Keep the inputs saved by checkpointing on the host until the backward. For long rows that do not fit on the GPU;
    needs `model.gradient_checkpointing`."""
    liger: bool = False
    """Use liger-kernel's RMSNorm, SwiGLU and rotary embedding instead of fastrl's own. Needs a GPU and liger-kernel."""
    min_pixels: int | None = Field(None, ge=1)
    """Least area of a resized picture in pixels; none: the model folder's."""
    max_pixels: int | None = Field(None, ge=1)
    """Largest area of a resized picture in pixels; none: the model folder's. Lower it first if prompts are too long."""

    @field_validator("gradient_checkpointing", mode="before")
    @classmethod
    def _kind(cls, value: Any) -> Any:
        if not isinstance(value, bool) and value not in ("products", "auto"):
            raise ValueError("expected true, false, products or auto")
        return value


class JudgeRecipe(Section):
    """A model behind an OpenAI-compatible server that scores answers."""

    url: str
    """The server's address, `http://localhost:8000/v1`."""
    model: str = "default"
    """Name under which the server knows the model."""
    rubric: str | None = Field(None, min_length=1)
    """What is scored, as text or as a `.txt` or `.md` file; none: how well the answer does what the question asks."""
    scale: float = Field(10.0, gt=0, le=1e6)
    """Largest score the judge may give; the reward is the score divided by it."""
    weight: float = 1.0
    """Weight of the component `judge`, unless `reward.weights` names it."""
    pictures: bool = True
    """Send the record's pictures; `false` for a judge that reads text only."""
    reference: bool = True
    """Show the judge the record's truth."""
    cache: str | None = "judge-cache"
    """Folder of replies by the content of their request, so that none is asked for twice; `null`: none is kept."""
    retries: int = Field(4, ge=0, le=100)
    """Further attempts after a timeout, an error of the server, or a reply without a score."""
    concurrency: int = Field(4, ge=1, le=1024)
    """Requests in flight at once."""
    timeout: float = Field(60.0, gt=0, le=1e6)
    """Seconds for one whole request."""
    key_env: str = "OPENAI_API_KEY"
    """Environment variable with the server's key, sent if it is set."""

    @field_validator("url")
    @classmethod
    def _address(cls, value: str) -> str:
        return check_url(value, "url", "http://localhost:8000/v1")


class RewardRecipe(Section):
    options: dict[str, Any] = {}
    """Options of the task's reward: `metric`, `threshold`, `format`, …; the error for an unknown one lists those that
    exist."""
    weights: dict[str, float] = {}
    """Weights by component; the default is 1, and 0 removes a component."""
    function: list[str] = []
    """Your own reward functions, `my_rewards.py:score` or `package.module:score`, one or a list; see a reward of your
    own."""
    builtin: bool = True
    """`false`: use only your functions, without the task's own components."""
    completions: Literal["conversation", "text"] = "conversation"
    """The form in which functions receive each answer."""
    timeout: float | None = Field(600.0, gt=0, le=1e6)
    """Time limit in seconds for one call of a function."""
    overlong: int | None = Field(None, ge=1)
    """DAPO's soft penalty for long answers: over the last so many tokens before `rollout.max_new_tokens`, a component
    `overlong` falls from 0 to −1. Only for Perception-R1."""

    judge: JudgeRecipe | None = None
    """A model that scores answers, added as the component `judge`: a reward of your own from a server."""

    @field_validator("function", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return [] if value is None else [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_weight(self) -> RewardRecipe:
        if self.judge is not None and "weight" in self.judge.model_fields_set and "judge" in self.weights:
            raise ValueError("give the judge's weight in one place: judge.weight or weights.judge")
        return self


class MixEntry(Section):
    """One data set of a mixture."""

    spec: str = Field(min_length=1)
    """Like `data.spec`."""
    adapter: str | None = None
    """Like `data.adapter`."""
    name: str | None = Field(None, min_length=1)
    """Name of this data set in metrics and ids; none: derived from its spec."""
    weight: float | dict[int, float] = 1.0
    """Sampling weight: a constant, or `{step: weight}` with linear interpolation."""
    reward: RewardRecipe | None = None
    """A reward section for this data set; its keys override the recipe's."""

    @field_validator("weight")
    @classmethod
    def _weights(cls, value: float | dict[int, float]) -> float | dict[int, float]:
        given = value if isinstance(value, dict) else {0: value}
        if not given or min(given) < 0 or min(given.values()) < 0 or not any(given.values()):
            raise ValueError("must be above 0, or {step: weight} with steps and weights of at least 0, not all 0")
        return value


class CurriculumRecipe(Section):
    """Curriculum from easy to hard: rows are drawn from the easiest part of the data, which grows to all of it."""

    by: str = Field(min_length=1)
    """Difficulty: a column of the rows or a key of their truth, either a number or a value with a length."""
    steps: int = Field(ge=1)
    """Steps until all rows are drawn."""
    start: float = Field(0.2, gt=0, le=1)
    """Fraction of the data at the first step."""
    scores: str | None = Field(None, min_length=1)
    """A file of `fastrl score`: `by` is then a number of its lines, such as `difficulty`, found by the records' ids."""


class DataRecipe(Section):
    spec: str = ""
    """`adapter:path?key=value&…`, see data; required unless `data.mix` is given. `--data` sets it."""
    adapter: str | None = None
    """Your own function, `my_data.py:rows`, called as `rows(path, **query)` with the spec's path; it yields
    `Record`s."""
    mix: list[MixEntry] = []
    """Several data sets instead of `data.spec`, mixed row by row; see data."""
    mix_by: Literal["row", "task"] = "row"
    """`row`: weights are multiplied by the number of rows of a data set; `task`: weights are the proportions of the
    data sets, regardless of their sizes."""
    curriculum: CurriculumRecipe | None = None
    """Curriculum from easy to hard: rows are drawn from the easiest part of the data, which grows to all of it."""
    shuffle_buffer: int | None = Field(None, ge=1)
    """Number of rows that are shuffled together; none: all. For tables whose pictures do not fit in memory."""
    prompts_per_step: int = Field(8, ge=1)
    """Prompts per step and rank."""
    order: Literal["shuffle", "file"] = "shuffle"
    """`shuffle`: a new order in each epoch. `file`: the order of the data, for a curriculum from easy to hard."""
    seed: int | None = Field(None, ge=0, lt=2**63)
    """Seed of the shuffle; none: the run's. Set it to compare runs with different `seed` on the same order of data."""
    skip_bad: bool = False
    """Skip and count bad rows, and records whose pictures turn out to be broken during training. Otherwise, all bad
    rows are reported before training starts."""
    max_image_pixels: int = Field(MAX_IMAGE_PIXELS, ge=1)
    """Largest width × height of a picture file; a larger picture makes a bad row. Raise it for scans, lower it to
    protect against pictures that decode to gigabytes."""
    identity: Literal["stat", "bytes"] = "stat"
    """How `--resume` detects that a picture file has changed: by size and modification time, or by its bytes, which
    reads all files. See resuming."""
    frames: int | None = Field(None, ge=1)
    """Number of frames of a clip that the model sees; none: given by the spec."""
    sample: Literal["uniform", "first", "random"] | None = None
    """Which frames: evenly spaced, the first ones, or random ones; none: given by the spec."""
    workers: int = Field(2, ge=0)
    """Threads that preprocess the pictures of this and the next step in the background; `0`: none, for simpler
    tracebacks."""
    suffix: str | None = Field(None, min_length=1)
    """Text added to every question after a blank, and to those of `eval.spec`, such as a request to think first."""
    blank_images: bool = False
    """Replace pictures by grey ones of the same size, so that the model can only learn from the text. `fastrl study
    blind` trains with and without."""

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
    """Answers per prompt."""
    group_schedule: dict[int, int] = {}
    """Other numbers of answers from some step on, `{step: answers}`, with `group_size` before the first of them: larger
    groups for the harder prompts of a curriculum."""
    max_new_tokens: int = Field(256, ge=1, le=2**20)
    """Longest answer in tokens; longer ones are truncated and count as not finished."""
    temperature: float = Field(1.0, gt=0)
    """Temperature of sampling and of the trained log-probs."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the smallest set of tokens with this probability. Below 1, the distribution differs from the trained
    one."""
    top_k: int = Field(0, ge=0)
    """Sample from this many most likely tokens; `0`: from all."""
    allow_truncated_sampling: bool = False
    """Accept the bias of `top_p` below 1 or `top_k` above 0: answers are sampled from a different distribution than the
    one whose log-probs are trained."""
    decode: Literal["auto", "eager", "native", "static", "graph"] = "auto"
    """`auto`: `graph` (CUDA graphs) on a GPU, `native` (steps in C++) on a CPU. Use `eager` if a model cannot be
    captured, and `static` for the graphs' buffers without a graph (debugging)."""
    keep_prompts: Literal["auto", "on", "off"] = "auto"
    """Compute each prompt and its pictures once: the update trains from the rollout's pass over them. `auto`: if that
    is exact, prompts have at least 256 tokens and memory allows it; `on`: always, with an error if it would not be
    exact; `off`: the update computes them again."""
    merge_lora: Literal["auto", "on", "off"] = "auto"
    """Sample with the adapters merged into a copy of the weights, which makes a token as fast as without adapters.
    `auto`: if memory allows it; `on`: always; `off`: with separate adapters. In bfloat16 the merged numbers are rounded
    (at random, so that small updates count), which the sampler's log-probs show."""
    backend: Literal["local", "vllm"] = "local"
    """`vllm`: a vLLM server samples the answers and receives the weights. `local`: the training process samples."""
    server: str | list[str] | None = None
    """With `vllm`: the server's address, such as `http://localhost:8000`; or a list of several, among which prompts are
    spread."""
    shared: str | None = None
    """With `vllm`: a folder for transferring weights, which has the same path on the server; none: `OUT/rollout`."""
    server_timeout: float = Field(600.0, gt=0)
    """With `vllm`: time limit in seconds for the answers to one prompt, or for loading new weights."""
    server_gap: float = Field(0.05, gt=0)
    """With `vllm`: largest difference between a server's log-probs and the trainer's, as a mean over a step's tokens.
    Above it the run stops before it updates: the server samples with other weights."""

    def group_at(self, step: int) -> int:
        """Answers per prompt of a step (steps count from 0)."""
        begun = [start for start in self.group_schedule if start <= step]
        return self.group_schedule[max(begun)] if begun else self.group_size

    @property
    def group_sizes(self) -> list[int]:
        """All numbers of answers per prompt that occur."""
        return [*([] if 0 in self.group_schedule else [self.group_size]), *self.group_schedule.values()]

    @field_validator("group_schedule")
    @classmethod
    def _steps(cls, value: dict[int, int]) -> dict[int, int]:
        if value and (min(value) < 0 or min(value.values()) < 1):
            raise ValueError("must be {step: answers} with steps from 0 and at least one answer")
        return value

    @field_validator("keep_prompts", "merge_lora", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value  # YAML reads on and off so

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
            urls = [self.server] if isinstance(self.server, str) else self.server
            for url in urls:
                check_url(url, "server", "http://localhost:8000")
            if not urls or len(set(urls)) < len(urls):
                raise ValueError("server: expected one or more different addresses")
        return self


class ParameterGroup(Section):
    match: str = Field(min_length=1)
    """Parameters of the group: `vision`, `projector` or `language` (in every family), a glob over parameter names, or
    consecutive parts of a name."""
    lr: float | None = Field(None, ge=0)
    """Learning rate of these parameters; none: `optim.lr`. A vision tower usually needs a tenth of the language
    model's."""
    weight_decay: float | None = Field(None, ge=0)
    """Weight decay of these parameters; none: `optim.weight_decay`."""


class OptimRecipe(Section):
    steps: int = Field(ge=1)
    """Number of rollout batches; each is used for `updates_per_batch` optimizer updates."""
    lr: float = Field(1e-6, ge=0, le=100)
    """Learning rate after warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the means of gradients and of squared gradients."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon. Raise it (1e-6) if gradients are so small that it determines the size of updates."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's weight decay, on matrices only."""
    warmup: float = Field(0, ge=0)
    """Updates of linear warm-up; below 1, a fraction of all updates."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Schedule of the learning rate after warm-up."""
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    """Final learning rate of the cosine, as a fraction of `lr`."""
    clip_norm: float | None = Field(1.0, gt=0)
    """Largest total norm of the gradients; `null`: no clipping."""
    updates_per_batch: int = Field(1, ge=1)
    """Updates per rollout batch. `1`: strictly on-policy. More: PPO's ratio and clip take effect from the second update
    on."""
    token_budget: int = Field(8192, ge=1)
    """Tokens per micro-batch; a group is never split. It affects memory, not the result."""
    states: Literal["fp32", "8bit", "offload"] = "fp32"
    """AdamW's moments: `fp32` next to the weights, `8bit` in a quarter of the bytes, or `offload` on the host, which
    then computes the updates."""
    gradient_release: bool = False
    """Update each parameter during the backward and free its gradient. For training a full model on one GPU; needs
    `clip_norm: null`."""
    row_local_head: bool = False
    """Compute gradients of head and loss in the forward, with 3 products over the vocabulary instead of 4. Entropy is
    then not measured; needs `updates_per_batch: 1`."""
    groups: list[ParameterGroup] = []
    """Learning rates and weight decays for parts of the model; the first group that matches a parameter applies."""

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
    """Steps between checkpoints; `0`: only at the end."""
    keep: int = Field(2, ge=1)
    """Number of most recent checkpoints to keep. Raise it to evaluate intermediate ones; each contains weights and
    moments."""
    final: bool = True
    """Write a checkpoint after the last step. `false` for a run whose weights are not needed."""


class EvalRecipe(Section):
    """Evaluation during training, with the protocols of ``fastrl eval``."""

    spec: str = ""
    """Evaluation data, as for `fastrl eval --data`; none: no evaluation during training."""
    adapter: str | None = None
    """Like `data.adapter`."""
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
    soft: str = Field("auto", min_length=1)
    """Soft matching of captions, as `fastrl eval --soft`: `none`, a sentence-embedding model (a folder or a downloaded
    hub name), or `auto`: CAPTURE's model if it is on this machine, for reference captions alone."""
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

    @field_validator("soft", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return "none" if value is None else value


LOGGERS = ("tensorboard", "wandb", "trackio")


class LogRecipe(Section):
    every: int = Field(1, ge=1)
    """Steps between lines on the console; `metrics.jsonl` has every step."""
    samples_every: int = Field(20, ge=0)
    """Steps between tables of sample answers (`samples.jsonl`, for `fastrl report`); `0`: never."""
    samples: int = Field(4, ge=1)
    """Answers per table."""
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
    kind: Literal["local", "deepspeed", "fsdp2"] = "local"
    """`fsdp2` (torch's own) and `deepspeed`: train with several processes, see several GPUs. `local`: one process."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """With `deepspeed`: `1` shards optimizer states, `2` also gradients, `3` also weights, `0` nothing."""
    offload_optimizer: bool = False
    """With `deepspeed` and stage 1 or 2: keep moments on the host. With `fsdp2` or stage 3: also the shards of all
    weights."""
    reduce_gradients: Literal["each", "last"] = "each"
    """With `fsdp2`: sum the gradients over ranks in `each` micro-batch, or in the `last` of an update, which exchanges
    less and keeps 4 bytes of gradient for every trained weight on every rank until then."""
    timeout: float = Field(1800.0, gt=0, le=1e6)
    """Seconds that a rank waits for the others before all stop with an error that names the missing rank. Raise it if
    one rank's answers may take longer."""

    @property
    def shards_weights(self) -> bool:
        """Whether each rank has a part of the weights only."""
        return self.kind == "fsdp2" or (self.kind == "deepspeed" and self.zero_stage == 3)
