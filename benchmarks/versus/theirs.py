"""TRL's side of a comparison: ``GRPOTrainer.train()`` itself, with fastrl's steps run from a callback.

The trainer can alternate between two forms of its model: as shipped, and with the vision tower's patches embedded by a
product of matrices instead of a convolution, as a user who knows of it would have them (and as fastrl does).
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PrinterCallback, TrainerCallback

from benchmarks.versus.measure import Phases, Recorder, static_bytes
from benchmarks.versus.model import load_processor
from benchmarks.versus.ours import LORA
from benchmarks.versus.work import Work, never_sampled
from fastrl.data.records import Record
from fastrl.models.lora import LANGUAGE_LINEARS
from fastrl.rewards import ocr_reward

Turn = Callable[[str], None]


class Trl:
    """A GRPOTrainer over the same records, set up for a fair comparison (see ``vs_trl``)."""

    name = "trl"

    def __init__(
        self,
        folder: Path,
        work: Work,
        rows: int,
        records: Sequence[Record],
        *,
        train: str,
        device: torch.device,
        mixin: type | None = None,
        both: bool = False,
        **changes: Any,
    ) -> None:
        """``rows``: answers per micro-batch; ``mixin``: base before the trainer; ``changes``: to ``GRPOConfig``.

        ``both``: every step is followed by one on the same records with patches embedded by a product of matrices,
        which ``matmul`` records.
        """
        from trl import GRPOTrainer

        trainer: Any = GRPOTrainer if mixin is None else type("Trainer", (mixin, GRPOTrainer), {})
        _quiet()
        self._folder = tempfile.TemporaryDirectory()
        phases = Phases(device)
        self.recorder = Recorder(device, phases)
        self.matmul = Recorder(device, phases) if both else None
        processor = load_processor(folder)
        processor.phases = phases
        arguments = _arguments(self._folder.name, work, rows, device, processor.tokenizer, changes)
        self.trainer: Any = trainer(
            model=_model(folder, bfloat16=arguments.bf16 and train == "lora"),
            reward_funcs=ocr_reward,
            args=arguments,
            train_dataset=_dataset(_twice(records, work.prompts) if both else records),
            processing_class=processor,
            peft_config=_adapters(train),
        )
        self.trainer.remove_callback(PrinterCallback)
        for method, phase in (
            ("_tokenize_prompts", "preprocess"),
            ("_generate_single_turn", "generate"),
            ("_calculate_rewards", "reward"),
            ("compute_loss", "forward"),
            ("_clip_grad_norm", "optimizer"),
        ):
            phases.wrap(self.trainer, method, phase)
        phases.wrap(self.trainer.accelerator, "backward", "backward")

    def run(self, kinds: Sequence[str], turn: Turn | None = None) -> None:
        """Run a step for each of ``kinds`` and call ``turn(kind)`` after each."""
        steps = []
        for kind in kinds:
            steps.append(_Step(kind, self.recorder, turn=turn if self.matmul is None else None))
            if self.matmul is not None:
                form = partial(by_matmul, _patch_embedding(self.trainer.model))
                steps.append(_Step(kind, self.matmul, form, turn))
        self.trainer.args.max_steps = len(steps)
        self.trainer.add_callback(_Turns(steps))
        self.trainer.train()

    @property
    def static_bytes(self) -> int:
        """Bytes that persist between steps."""
        optimizer = self.trainer.optimizer
        return static_bytes(self.trainer.model, [getattr(optimizer, "optimizer", optimizer)])


@contextmanager
def _as_shipped() -> Iterator[None]:
    yield


@contextmanager
def by_matmul(embed: nn.Module) -> Iterator[None]:
    """The convolution of ``embed``, whose stride is its kernel, computed as one product of matrices in the block."""

    def forward(hidden_states: Tensor) -> Tensor:
        proj: Any = embed.proj
        return F.linear(hidden_states.to(proj.weight.dtype), proj.weight.flatten(1), proj.bias)

    embed.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del embed.forward


def _patch_embedding(model: nn.Module) -> nn.Module:
    return next(module for name, module in model.named_modules() if name.endswith("patch_embed"))


def _twice(records: Sequence[Record], prompts: int) -> list[Record]:
    """Each step's records two times, for a step of each form."""
    steps = [records[i : i + prompts] for i in range(0, len(records), prompts)]
    return [record for step in steps for record in (*step, *step)]


@dataclass(frozen=True)
class _Step:
    """A step of the trainer: of which kind, who records it, in which form of the model, and what follows it."""

    kind: str
    recorder: Recorder
    form: Callable[[], AbstractContextManager[None]] = _as_shipped
    turn: Turn | None = None


class _Turns(TrainerCallback):
    """Measures each step of a trainer from the end of the previous one, then runs a step of the other side."""

    def __init__(self, steps: Sequence[_Step]) -> None:
        self.steps = list(steps)
        self._open = ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._begin(self.steps[0])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps[state.global_step].recorder.phases.enter("optimizer")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps[state.global_step].recorder.phases.leave()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._open.close()
        done = self.steps[state.global_step - 1]
        if done.turn is not None:
            done.turn(done.kind)
        if state.global_step < len(self.steps):
            self._begin(self.steps[state.global_step])

    def _begin(self, step: _Step) -> None:
        self._open.enter_context(step.form())
        self._open.enter_context(step.recorder.measure(step.kind))


def _model(folder: Path, *, bfloat16: bool) -> Any:
    """The model. Trained weights are float32 (autocast casts them); a base under adapters may be bfloat16."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.bfloat16 if bfloat16 else torch.float32, attn_implementation="sdpa", local_files_only=True
    )


def _arguments(out: str, work: Work, rows: int, device: torch.device, tokenizer: Any, changes: dict[str, Any]) -> Any:
    from trl import GRPOConfig

    gpu = device.type == "cuda"
    values: dict[str, Any] = {
        "output_dir": out,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": work.rows // rows,
        "steps_per_generation": work.rows // rows,
        "num_generations": work.group,
        "max_completion_length": work.answer,
        "generation_kwargs": {"suppress_tokens": never_sampled(tokenizer)},
        "max_steps": 1,
        "loss_type": "grpo",
        "beta": 0.0,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused" if gpu else "adamw_torch",
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "bf16": gpu,
        "use_cpu": not gpu,
        _checkpointing(GRPOConfig): gpu,
        "disable_dropout": True,
        "shuffle_dataset": False,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return GRPOConfig(**values | changes)


def colocated(work: Work, tokenizer: Any) -> dict[str, Any]:
    """Changes to ``GRPOConfig`` that let vLLM sample in the trainer's process, answers of the forced length."""
    banned = dict.fromkeys(never_sampled(tokenizer), -100.0)
    return {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": 0.3,
        "vllm_max_model_length": work.prompt + work.answer,
        "generation_kwargs": {"logit_bias": banned, "ignore_eos": True, "min_tokens": work.answer},
    }


def _checkpointing(config: Any) -> str:
    """The key for recomputing layers, which differs between versions."""
    return "activation_checkpointing" if hasattr(config, "activation_checkpointing") else "gradient_checkpointing"


def _adapters(train: str) -> Any:
    if train != "lora":
        return None
    from peft import LoraConfig

    targets = rf".*language_model\..*\.({'|'.join(LANGUAGE_LINEARS)})"
    return LoraConfig(r=LORA["rank"], lora_alpha=LORA["alpha"], lora_dropout=0.0, target_modules=targets)


def _dataset(records: Sequence[Record]) -> Any:
    """Rows as in TRL's documentation: a conversation, its picture (read from its file on access), the ground truth."""
    from datasets import Dataset, Image

    rows = []
    for record in records:
        question = next(part["text"] for part in record.messages[0]["content"] if part["type"] == "text")
        row = {"prompt": [{"role": "user", "content": question}], "text": record.target["text"]}
        rows.append(row | ({"image": str(record.images[0])} if record.images else {}))
    data = Dataset.from_list(rows)
    return data.cast_column("image", Image()) if records[0].images else data


def _quiet() -> None:
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
