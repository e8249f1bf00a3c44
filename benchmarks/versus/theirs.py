"""TRL's side of a comparison: ``GRPOTrainer.train()`` itself, with fastrl's steps run from a callback."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
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
        **changes: Any,
    ) -> None:
        """``rows``: answers per micro-batch; ``mixin``: base before the trainer; ``changes``: to ``GRPOConfig``."""
        from trl import GRPOTrainer

        trainer: Any = GRPOTrainer if mixin is None else type("Trainer", (mixin, GRPOTrainer), {})
        _quiet()
        self._folder = tempfile.TemporaryDirectory()
        phases = Phases(device)
        self.recorder = Recorder(device, phases)
        processor = load_processor(folder)
        processor.phases = phases
        arguments = _arguments(self._folder.name, work, rows, device, processor.tokenizer, changes)
        self.trainer: Any = trainer(
            model=_model(folder, bfloat16=arguments.bf16 and train == "lora"),
            reward_funcs=ocr_reward,
            args=arguments,
            train_dataset=_dataset(records),
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
        self.trainer.args.max_steps = len(kinds)
        self.trainer.add_callback(_Turns(self.recorder, kinds, turn))
        self.trainer.train()

    @property
    def static_bytes(self) -> int:
        """Bytes that persist between steps."""
        optimizer = self.trainer.optimizer
        return static_bytes(self.trainer.model, [getattr(optimizer, "optimizer", optimizer)])


class _Turns(TrainerCallback):
    """Measures each step of a trainer from the end of the previous one, then runs a step of the other side."""

    def __init__(self, recorder: Recorder, kinds: Sequence[str], turn: Turn | None) -> None:
        self.recorder, self.turn = recorder, turn
        self.kinds = list(kinds)
        self._step = ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._step.enter_context(self.recorder.measure(self.kinds[0]))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.recorder.phases.enter("optimizer")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.recorder.phases.leave()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._step.close()
        if self.turn is not None:
            self.turn(self.kinds[state.global_step - 1])
        if state.global_step < len(self.kinds):
            self._step.enter_context(self.recorder.measure(self.kinds[state.global_step]))


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
