"""4-bit base weights (QLoRA, arXiv:2305.14314): the language model's linear layers as bitsandbytes' NormalFloat4.

Quantized weights are not trained, so adapters are required. Vision tower, projector, embedding and head keep their
dtype.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from fastrl.models.families import Family

PACKED = 0.5  # bytes per weight
BLOCK = 64  # weights that share a scale
# Scales have 8 bits themselves; blocks of this many share a float32 scale ("double quantization")
SCALE_BLOCK = 256
NEEDS = "model.quantize: 4bit needs "


def check_quantize(device: torch.device | str | None = None) -> None:
    """Check that weights can be quantized on this machine, before any are loaded.

    Args:
        device: the model's device; None: the GPU if available.

    Raises:
        ValueError: the device is not a GPU.
        ImportError: bitsandbytes is not installed.
    """
    kind = torch.device(device).type if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    if kind != "cuda":
        raise ValueError(
            f"{NEEDS}a GPU, and the model is on the {kind}: 4-bit products are CUDA kernels; remove model.quantize, or "
            "set model.device to a GPU"
        )
    _library()


def quantize(core: nn.Module, family: Family) -> int:
    """Replace the language model's linear layers, its head excluded, with 4-bit ones; returns their number.

    The weights are quantized when the model is moved to its device.
    """
    library = _library()
    for name, linear in quantized_layers(core, family):
        layer = library.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=linear.weight.dtype,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        layer.weight = library.nn.Params4bit(
            linear.weight.data,
            requires_grad=False,
            quant_type="nf4",
            compress_statistics=True,
            blocksize=BLOCK,
            module=layer,
        )
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.data, requires_grad=False)
        core.set_submodule(name, layer)
    core.is_loaded_in_4bit = True  # type: ignore[assignment]  # read by peft to choose its 4-bit layers
    return sum(isinstance(module, library.nn.Linear4bit) for module in core.modules())


def quantized_layers(core: nn.Module, family: Family) -> list[tuple[str, nn.Linear]]:
    """Names and modules of the layers to quantize."""
    head = family.parts(core).head
    return [
        (name, module)
        for name, module in core.named_modules()
        if type(module) is nn.Linear
        and module is not head
        and ".lora_" not in name
        and family.part_of(name) == "language"
    ]


def is_quantized(module: Any) -> bool:
    """Whether a module is a 4-bit layer, and not peft's wrapper with the same class name."""
    return type(module).__name__ == "Linear4bit" and isinstance(module, nn.Linear)


def dequantized(module: Any) -> Tensor:
    """The weight [out, in] of a linear layer, in the compute dtype if the layer is a 4-bit one."""
    if not is_quantized(module):
        return module.weight
    weight = module.weight
    return _library().functional.dequantize_4bit(weight.data, weight.quant_state)


def quantized_bytes(numbers: int) -> int:
    """Bytes of a weight with ``numbers`` elements: half a byte each, an 8-bit scale per block, and scales of these."""
    blocks = -(-numbers // BLOCK)
    return math.ceil(numbers * PACKED) + blocks + 4 * (-(-blocks // SCALE_BLOCK))


def _library() -> Any:
    try:
        import bitsandbytes  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            f"{NEEDS}bitsandbytes, which cannot be imported ({error}): pip install bitsandbytes", name="bitsandbytes"
        ) from None
    return bitsandbytes
