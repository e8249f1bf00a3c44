"""The activations of transformers' layers and their derivatives, for Triton kernels and in torch.

``gelu`` is x Phi(x) by the error function, ``gelu_tanh`` its approximation x s(2 c (x + 0.044715 x^3)) with
c = sqrt(2 / pi) and the logistic function s (Hendrycks and Gimpel, arXiv 1606.08415), ``quick_gelu`` x s(1.702 x),
``silu`` x s(x). All four are x times a gate u(x), so that the derivative is u + x u'.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrl_kernels._numerics import sigmoid
from fastrl_kernels._triton import tl, triton

_BLOCKS = 256  # of rows, at most, whose bias gradients are summed apart
_LEAST_ROWS = 16  # of a block

KINDS = ("silu", "gelu", "gelu_tanh", "quick_gelu")


@triton.jit
def activation(x, KIND: tl.constexpr):
    """Of float32 numbers."""
    if KIND == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        return x * sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
    elif KIND == "quick_gelu":
        return x * sigmoid(1.702 * x)
    else:
        return x * sigmoid(x)


@triton.jit
def activation_slope(x, KIND: tl.constexpr):
    """The derivative, of float32 numbers."""
    if KIND == "gelu":
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif KIND == "gelu_tanh":
        u = sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
        # far out, where x^3 would overflow, 1 - u or u is 0 before
        near = tl.minimum(tl.maximum(x, -20.0), 20.0)
        return u + near * u * (1.0 - u) * 1.5957691216057308 * (1.0 + 0.134145 * near * near)
    elif KIND == "quick_gelu":
        u = sigmoid(1.702 * x)
        return u + 1.702 * x * u * (1.0 - u)
    else:
        u = sigmoid(x)
        return u + x * u * (1.0 - u)


def activate(x: Tensor, kind: str) -> Tensor:
    """Any dtype, by differentiable operators of torch."""
    if kind == "silu":
        return F.silu(x)
    if kind == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


def check_kind(kind: str) -> None:
    """Raise ``ValueError`` unless ``kind`` is one of ``KINDS``."""
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")


def column_block_rows(rows: int) -> int:
    """Rows of a block: few enough for many programs, and no more than ``_BLOCKS`` blocks."""
    return max(_LEAST_ROWS, -(-rows // _BLOCKS))


def column_blocks(rows: int) -> int:
    """Blocks of ``column_block_rows`` rows."""
    return -(-rows // column_block_rows(rows))
