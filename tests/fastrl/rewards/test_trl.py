"""A fastrl reward passed to TRL's ``GRPOTrainer``: real training steps with a tiny text model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastrl.rewards import grounding_reward, reward_for

pytest.importorskip("trl")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<pad>", "<eos>", *'[]{}",: _abdegox0123456789']
    raw = Tokenizer(models.WordLevel({c: i for i, c in enumerate(letters)}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def tiny_model(tokenizer: Any) -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    size = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 128}
    end = {"bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **size, **end))


def test_grpo_trainer_takes_fastrl_rewards_as_they_are(tmp_path: Path, tokenizer: Any) -> None:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    rows = [{"prompt": "box a: ", "box": [0.0, 0.0, 9.0, float(i)], "id": i} for i in range(1, 5)]
    seen: list[dict[str, Any]] = []
    counting = reward_for("counting", score_by="count", format="none")

    def watched(**call: Any) -> list[float]:
        values = grounding_reward(**call)
        seen.append({"values": values, "completions": call["completions"], "box": call["box"]})
        return values

    arguments = GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=8,
        max_steps=2,
        logging_steps=1,
        beta=0.0,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=tiny_model(tokenizer),
        reward_funcs=[
            grounding_reward,
            watched,
            lambda **call: counting(**{**call, "boxes": [[]] * len(call["prompts"])}),
        ],
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    logged = [row for row in trainer.state.log_history if "reward" in row]
    assert len(logged) == 2
    for row, call in zip(logged, seen, strict=True):
        assert row["rewards/grounding_reward/mean"] == pytest.approx(sum(call["values"]) / 4)
        assert {"grounding/iou", "grounding/format"} <= set(row)
        assert len(call["completions"]) == len(call["box"]) == 4
