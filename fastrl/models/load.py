"""Load a Hugging Face folder of any supported family as a ``Policy``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastrl.models.checkpointing import Kind, use_checkpointing
from fastrl.models.families import family_of
from fastrl.models.fused import fuses, use_fused
from fastrl.models.liger import use_liger
from fastrl.models.lora import Lora
from fastrl.models.lora import freeze as freeze_parameters
from fastrl.models.open import resolve_model
from fastrl.models.policy import Policy
from fastrl.models.quantize import check_quantize
from fastrl.models.quantize import quantize as quantize_layers
from fastrl.models.weights import reading


def load_policy(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    lora: Lora | Mapping[str, Any] | None = None,
    freeze: Sequence[str] = (),
    gradient_checkpointing: Kind = False,
    checkpointed_layers: int | None = None,
    offload_activations: bool = False,
    liger: bool = False,
    quantize: str | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> Policy:
    """Load a policy.

    Args:
        folder: local Hugging Face folder (config, safetensors, tokenizer with chat template, preprocessor config),
            ``tiny:NAME``, or the hub name of a downloaded model (see ``fastrl.models.open.resolve_model``).
        dtype: of the weights; default bfloat16 on a GPU, float32 on a CPU.
        device: default the GPU if there is one.
        lora: fields of ``Lora``; if given, only the adapters are trained.
        freeze: parameter-name patterns whose gradient is turned off (see ``fastrl.models.lora.freeze``).
        gradient_checkpointing: recompute each layer in the backward; ``products``: all but products and attention (see
            ``fastrl.models.checkpointing``).
        checkpointed_layers: of the language model, the first ones; None: all.
        offload_activations: with checkpointing, keep the layers' inputs on the host (see ``fastrl.models.offload``).
        liger: compute RMSNorm, SwiGLU and rotary embedding with liger-kernel (see ``fastrl.models.liger``) instead of
            this library's own kernels, which a GPU takes by default (see ``fastrl.models.fused``).
        quantize: ``4bit``: the language model's linear layers, under adapters (see ``fastrl.models.quantize``).
        min_pixels, max_pixels: limits of a resized image's area, in pixels; default those of the folder.

    Raises:
        FileNotFoundError: the folder or its config does not exist.
        ValueError: the model type is not supported, a file cannot be read, weights are missing or of another shape,
            the tokenizer has no chat template, a pattern or field is unknown, the device does not exist, ``liger`` or
            ``quantize`` is set without a GPU, or ``quantize`` without ``lora``.
        ImportError: ``liger`` is set and liger-kernel is not installed, or ``quantize`` and bitsandbytes.
    """
    given, folder = folder, resolve_model(folder)
    family = family_of(read_config(folder), folder)
    device = _device(device)
    dtype = dtype if dtype is not None else default_dtype(device)
    if quantize is not None:
        check_quantize(device)
        if lora is None:
            raise ValueError("model.quantize: 4-bit weights cannot be trained: set model.lora, whose adapters are")
    tokenizer = load_tokenizer(folder)
    preprocessor = family.preprocessor(folder, min_pixels=min_pixels, max_pixels=max_pixels)
    core = family.load(folder, dtype)
    if quantize is not None:
        quantize_layers(core, family)
    policy = Policy(core.to(device), tokenizer, preprocessor, lora=lora)
    if policy.peft is not None:  # for users who load only the adapters
        hub = not str(given).startswith("tiny:") and not Path(given).is_dir()
        policy.peft.peft_config["default"].base_model_name_or_path = str(given) if hub else str(folder.resolve())
    freeze_parameters(policy.core, freeze, policy.family.alias)
    if liger:
        use_liger(policy.core)
    elif fuses(device):
        use_fused(policy.core)
    layers = policy.family.layers(policy.core)
    use_checkpointing(
        policy.core, gradient_checkpointing, layers=layers, count=checkpointed_layers, offload=offload_activations
    )
    return policy


def default_dtype(device: torch.device) -> torch.dtype:
    """The weights' dtype on ``device``, if none is given."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def load_tokenizer(folder: str | Path) -> Any:
    """The folder's tokenizer, with a chat template that places images (the tokenizer's, else the processor's)."""
    from transformers import AutoTokenizer

    folder = Path(folder)
    with reading(folder, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for template in (tokenizer.chat_template, *_processor_templates(folder)):
        if isinstance(template, str) and "image" in template:
            tokenizer.chat_template = template
            return tokenizer
    raise ValueError(f"{folder}: no chat template that places images (tokenizer_config.json, chat_template.jinja)")


def read_config(folder: str | Path) -> dict[str, Any]:
    """The values of a model folder's ``config.json``.

    Raises:
        FileNotFoundError: the folder or its config does not exist.
        ValueError: the config cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"model folder not found: {folder}")
    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{folder} is not a Hugging Face model folder: no config.json")
    with reading(folder, "config.json"):
        return dict(json.loads(config.read_text(encoding="utf-8")))


def _device(name: str | torch.device | None) -> torch.device:
    """The named device, by default the GPU if there is one. Raises ``ValueError`` if it does not exist."""
    try:
        device = torch.device(name if name is not None else "cuda" if torch.cuda.is_available() else "cpu")
    except RuntimeError:
        raise ValueError(f"model.device: expected a device such as cpu, cuda or cuda:1, got {name!r}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"model.device: {device} does not exist ({torch.cuda.device_count()} CUDA devices)")
    return device


def _processor_templates(folder: Path) -> list[str]:
    """Chat templates in files of their own: the current file name, and the one that older processors wrote."""
    jinja, old = folder / "chat_template.jinja", folder / "chat_template.json"
    found = [jinja.read_text()] if jinja.is_file() else []
    return [*found, json.loads(old.read_text())["chat_template"]] if old.is_file() else found
