"""TRL's GRPOTrainer with the fused head and loss: one more base class, and nothing else about your script changes.

Trains a tiny Qwen2.5-VL that ships with fastrl, on text, for a few steps; set MODEL to yours::

    python examples/trl_grpo.py
"""

from __future__ import annotations

import tempfile

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from fastrl.models.load import load_tokenizer
from fastrl.models.open import resolve_model
from fastrl_kernels.integrations.trl import FusedGRPOMixin

MODEL = str(resolve_model("tiny:language"))  # a folder, or a name on the hub


class Trainer(FusedGRPOMixin, GRPOTrainer):
    """TRL's trainer; log-probs without logits, rows without gradient left out, the loss in one launch."""


def short(completion_ids: list[list[int]], **_: object) -> list[float]:
    """A reward for short answers."""
    return [1.0 - len(ids) / 16 for ids in completion_ids]


def main() -> list[float]:
    """Train five steps; returns their mean rewards."""
    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(
            model=MODEL,
            reward_funcs=short,
            args=GRPOConfig(
                output_dir=out,
                per_device_train_batch_size=8,
                num_generations=8,
                max_completion_length=16,
                max_steps=5,
                learning_rate=1e-4,
                logging_steps=1,
                bf16=False,
                use_cpu=True,
                report_to=[],
                save_strategy="no",
            ),
            train_dataset=Dataset.from_list([{"prompt": "how many circles are there?"}] * 40),
            processing_class=load_tokenizer(MODEL),
        )
        trainer.train()
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    print("mean reward of each step:", ", ".join(f"{reward:.3f}" for reward in rewards))
    return rewards


if __name__ == "__main__":
    main()
