"""Model configs: of a Hugging Face folder (``config.json`` alone will do), a shipped model, or a published one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastrl.models.open import resolve_model
from fastrl.models.policy import STYLES

_IMAGE = {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}


def _text(hidden: int, inner: int, layers: int, heads: int, kv: int, vocabulary: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocabulary,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }


def _qwen2(text: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    vision = {"depth": 32, "embed_dim": 1280, "hidden_size": text["hidden_size"], "num_heads": 16, "mlp_ratio": 4}
    return {
        "model_type": "qwen2_vl",
        "text_config": text,
        "vision_config": vision | _IMAGE,
        "tie_word_embeddings": tied,
    }


def _qwen2_5(text: dict[str, Any], *, tied: bool, inner: int = 3420) -> dict[str, Any]:
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": inner, "num_heads": 16}
    vision |= {"out_hidden_size": text["hidden_size"], "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]}
    return {
        "model_type": "qwen2_5_vl",
        "text_config": text,
        "vision_config": vision | _IMAGE,
        "tie_word_embeddings": tied,
    }


# Sizes as in the config.json each model is published with.
PUBLISHED = {
    "Qwen/Qwen2-VL-2B-Instruct": _qwen2(_text(1536, 8960, 28, 12, 2, 151936), tied=True),
    "Qwen/Qwen2-VL-7B-Instruct": _qwen2(_text(3584, 18944, 28, 28, 4, 152064), tied=False),
    "Qwen/Qwen2.5-VL-3B-Instruct": _qwen2_5(_text(2048, 11008, 36, 16, 2, 151936), tied=True),
    "Qwen/Qwen2.5-VL-7B-Instruct": _qwen2_5(_text(3584, 18944, 28, 28, 4, 152064), tied=False),
    "Qwen/Qwen2.5-VL-32B-Instruct": _qwen2_5(_text(5120, 27648, 64, 40, 8, 152064), tied=False, inner=3456),
}


def config_of(path: str) -> dict[str, Any]:
    """A model's config as plain values.

    Args:
        path: a folder with a ``config.json``, ``tiny:NAME``, or the name of a published model (downloaded or not).

    Raises:
        FileNotFoundError: no such folder and no published model of that name.
        ValueError: a model type that is not supported.
    """
    file = _folder(path) / "config.json"
    if file.is_file():
        values = json.loads(file.read_text(encoding="utf-8"))
    elif str(path) in PUBLISHED:
        values = PUBLISHED[str(path)]
    else:
        raise FileNotFoundError(
            f"no config for model {path!r}: give a folder with its config.json (--model DIR), or one of "
            f"{', '.join(PUBLISHED)}"
        )
    kind = values.get("model_type")
    if kind not in STYLES:
        raise ValueError(f"{path}: model type {kind!r} is not supported; supported: {', '.join(sorted(STYLES))}")
    return values


def image_limit(path: str) -> int | None:
    """Largest image area in pixels that a folder's own preprocessor allows; None where there is none to read."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        file = _folder(path) / name
        if file.is_file():
            values = json.loads(file.read_text(encoding="utf-8"))
            values = values.get("image_processor", values)
            found = values.get("max_pixels") or (values.get("size") or {}).get("longest_edge")
            return int(found) if found else None
    return None


def _folder(path: str | Path) -> Path:
    """The model's folder, or ``path`` itself where there is none: a published name needs no folder."""
    try:
        return resolve_model(path)
    except FileNotFoundError:
        return Path(path)


def is_published(path: str | Path) -> bool:
    """Whether the config comes from the table of this module."""
    return str(path) in PUBLISHED and not Path(path).is_dir()
