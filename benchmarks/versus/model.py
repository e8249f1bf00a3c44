"""A randomly initialised Qwen2.5-VL as a Hugging Face folder, and the processor that TRL needs for it."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor

from benchmarks.versus.measure import Phases

SMALL_VOCABULARY = 3200  # of the model with 6.9 M parameters
SIZES = ("small", "3b")


class StillProcessor(Qwen2_5_VLProcessor):
    """Tokenizer and image processor without the video part (which needs torchvision). Its time counts as preprocess."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        super().__init__(image_processor, tokenizer, None, chat_template=chat_template)
        self.phases: Phases | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.phases.phase("preprocess") if self.phases is not None else nullcontext():
            return super().__call__(*args, **kwargs)


def load_processor(folder: Path) -> StillProcessor:
    """The folder's processor, padding prompts on the left as TRL's generation needs."""
    from fastrl.models.families.qwen2_vl import load_image_processor
    from fastrl.models.load import load_tokenizer

    tokenizer = load_tokenizer(folder)
    tokenizer.padding_side = "left"
    return StillProcessor(load_image_processor(folder), tokenizer, chat_template=tokenizer.chat_template)


def build_folder(size: str, folder: Path, device: torch.device, *, vocabulary: int | None = None) -> Path:
    """Write a model of one of ``SIZES`` with weights from seed 0, unless the folder already contains one.

    ``vocabulary``: its words, by default 3,200 or those of the released model.
    """
    from transformers import Qwen2_5_VLForConditionalGeneration

    from fastrl.models.families.qwen2_vl import load_image_processor
    from fastrl.models.open import resolve_model
    from fastrl.models.policy import quiet_progress

    if size not in SIZES:
        raise ValueError(f"size: expected one of {', '.join(SIZES)}, got {size!r}")
    if (folder / "model.safetensors.index.json").is_file() or (folder / "model.safetensors").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(vocabulary or (SMALL_VOCABULARY if size == "small" else 151936), folder)
    config = small_config(tokenizer) if size == "small" else config_3b(tokenizer)
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=_dtype(size))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    with quiet_progress():
        model.save_pretrained(folder)
    processor = load_image_processor(resolve_model("tiny:perception"), min_pixels=56 * 56, max_pixels=28 * 28 * 4096)
    processor.save_pretrained(folder)
    return folder


def _dtype(size: str) -> torch.dtype:
    return torch.float32 if size == "small" else torch.bfloat16


def _tokenizer(vocabulary: int, folder: Path) -> Any:
    """The shipped tokenizer plus dummy tokens, so that every id a model can sample has a text."""
    from fastrl.models.load import load_tokenizer
    from fastrl.models.open import resolve_model

    load_tokenizer(resolve_model("tiny:perception")).save_pretrained(folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    words = content["model"]["vocab"]
    words |= {f"Ġfill{number}": number for number in range(len(words), vocabulary)}
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    tokenizer = load_tokenizer(folder)
    assert len(tokenizer) == vocabulary
    return tokenizer


def small_config(tokenizer: Any) -> Any:
    """6.9 M parameters: 6 layers of width 256, a vision tower of 4 layers of width 160."""
    from fastrl.toy.teach.architectures import qwen_config

    return qwen_config(tokenizer, hidden=256, layers=6, vision_hidden=160, vision_layers=4)


def config_3b(tokenizer: Any) -> Any:
    """The sizes of Qwen2.5-VL-3B, with the special ids of ``tokenizer``."""
    from fastrl.plan.configs import config_of
    from fastrl.toy.teach.architectures import qwen_config

    published = config_of("Qwen/Qwen2.5-VL-3B-Instruct")
    layers, depth = published["text_config"]["num_hidden_layers"], published["vision_config"]["depth"]
    config = qwen_config(tokenizer, layers=layers, vision_layers=depth)
    for section in ("text_config", "vision_config"):
        for name, value in published[section].items():
            if name != "vocab_size":  # given by the tokenizer
                setattr(getattr(config, section), name, value)
    config.text_config.max_position_embeddings = 32768
    return config
