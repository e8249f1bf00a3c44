"""The small models: ordinary folders, below the size limit."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastrl.data.scenes import scene_record
from fastrl.models.load import load_policy
from fastrl.models.open import WEIGHTS, resolve_model
from fastrl.toy.teach.build import scene_answer

SHIPPED = sorted(p.name for p in WEIGHTS.iterdir())


def size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def test_all_shipped_models_stay_under_14_and_a_half_megabytes() -> None:
    assert SHIPPED == ["language", "llava", "perception", "video", "video-narrow"]
    assert size(WEIGHTS) <= 14_500_000
    assert size(WEIGHTS / "video-narrow") <= 1_500_000
    assert size(WEIGHTS / "llava") <= 3_000_000


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_is_an_ordinary_folder(name: str) -> None:
    from transformers import AutoConfig, LlavaForConditionalGeneration, Qwen2_5_VLForConditionalGeneration

    config = AutoConfig.from_pretrained(WEIGHTS / name)
    assert config.model_type == ("llava" if name == "llava" else "qwen2_5_vl")
    kind = LlavaForConditionalGeneration if name == "llava" else Qwen2_5_VLForConditionalGeneration
    assert isinstance(load_policy(resolve_model(f"tiny:{name}")).core, kind)


def test_an_unknown_name_lists_the_shipped_ones() -> None:
    with pytest.raises(FileNotFoundError, match="hf download some/folder"):
        resolve_model("some/folder")
    with pytest.raises(ValueError, match="tiny:perception"):
        resolve_model("tiny:huge")


@pytest.mark.parametrize("name", ["perception", "llava"])
def test_a_box_answer_costs_few_tokens(name: str) -> None:
    policy = load_policy(resolve_model(f"tiny:{name}"))
    tokenizer = policy.tokenizer
    for index in range(20):
        record = scene_record("grounding", index, seed=0)
        text = policy.family.turn(scene_answer(record, type(policy.family)), "")
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(ids) == 6
        assert tokenizer.decode(ids) == text
