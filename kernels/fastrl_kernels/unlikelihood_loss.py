"""Reflective unlikelihood per token, from the log-prob alone: raises good targets, lowers bad ones.

With ``l = log p`` of the target token, ``sigma`` in [0, 1] the normalised reward of its turn and weight ``w``:

    loss = -sum_i w_i [ sigma_i l_i + alpha (1 - sigma_i) log(1 - exp(l_i)) ]          (RePer, arXiv 2504.07165 eq. 2)

``alpha = 0`` is reward-weighted likelihood, ``sigma = 1`` ordinary supervised fine-tuning. Gradient:

    dloss/dl = -w [ sigma - alpha (1 - sigma) p / (1 - p) ],   p / (1 - p) = 1 / expm1(-l)

``log(1 - exp(l))`` is ``log(-expm1(l))`` for ``l > -ln 2`` and ``log1p(-exp(l))`` below, so neither end cancels. The
slope ``p / (1 - p)`` is unbounded as p goes to 1; above ``p = 1 - 1e-6`` the function is continued along its tangent,
so the slope is at most ``(1 - 1e-6) / 1e-6`` (about 1e6). It is not cut to 0 there, since such a token is the most
confident mistake, and the gradient of the logits, slope x (1 - p), is at most 1. Tokens of weight 0 are skipped.

Why it is fast: no ``[N, V]`` tensor, one launch that reads three vectors and writes the gradient and one partial sum
per block, one sum of the partials in a fixed order. No atomics, no host read, bitwise reproducible.
"""

from __future__ import annotations

import math
from typing import Any, Optional

import torch
from torch import Tensor

from fastrl_kernels._common import (
    FLOATS,
    check_dtype,
    check_number,
    check_same_device,
    check_shape,
    launch,
    refuse_forward_mode,
    use_triton,
)
from fastrl_kernels._numerics import expm1_tail, log1p_unit
from fastrl_kernels._triton import tl, triton
from fastrl_kernels.token_weights import MASKS

MAX_P = 1.0 - 1e-6
MAX_LOGP = math.log1p(-1e-6)
MAX_SLOPE = MAX_P / 1e-6
_BLOCK = 256


@triton.jit
def unlikelihood_kernel(
    logp_ptr,  # [n]
    sigma_ptr,  # [n]
    weight_ptr,  # [n] or None: 1 / n
    dlogp_ptr,  # [n] fp32 out
    partials_ptr,  # [blocks] fp32 out
    n,
    alpha,
    BLOCK: tl.constexpr,
):
    alpha = tl.cast(alpha, tl.float32)
    block = tl.program_id(0).to(tl.int64)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    inside = rows < n
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + rows, mask=inside, other=0.0).to(tl.float32)
    else:
        weight = tl.where(inside, 1.0 / tl.cast(n, tl.float32), 0.0)
    live = weight != 0
    logp = tl.load(logp_ptr + rows, mask=live, other=-1.0).to(tl.float32)
    sigma = tl.load(sigma_ptr + rows, mask=live, other=0.0).to(tl.float32)
    capped = tl.where(logp > -1.0000005000003e-06, -1.0000005000003e-06, logp)  # not a minimum: NaN stays NaN
    p = tl.exp(capped)
    near = capped > -0.6931471805599453
    x = tl.where(near, capped, -0.5)
    one_minus = tl.where(near, -(x + expm1_tail(x)), 1.0 - p)  # 1 - p without cancellation
    slope = p / one_minus
    far = log1p_unit(-tl.where(near, 0.5, p))
    value = tl.where(near, tl.log(one_minus), far) - slope * tl.where(logp > capped, logp - capped, 0.0)
    against = alpha * (1.0 - sigma)
    # a factor of 0, either alpha (1 - sigma) or sigma, must not multiply an infinite log-prob
    pull = tl.where(sigma != 0, sigma * logp, 0.0)
    push = tl.where(against != 0, against * value, 0.0)
    tl.store(dlogp_ptr + rows, tl.where(live, -weight * (sigma - against * slope), 0.0), mask=inside)
    tl.store(partials_ptr + block, tl.sum(tl.where(live, -weight * (pull + push), 0.0)))


@torch.library.custom_op("fastrl::unlikelihood_loss", mutates_args=())
def _unlikelihood_op(
    logp: Tensor,
    sigma: Tensor,
    weight: Optional[Tensor],  # noqa: UP045 (the schema parser of older torch wants typing.Optional)
    alpha: float,
) -> tuple[Tensor, Tensor]:
    n = logp.shape[0]
    if not use_triton(logp) or logp.dtype == torch.float64 or n == 0:
        return _eager(logp, sigma, weight, alpha)
    blocks = -(-n // _BLOCK)
    dlogp = torch.empty(n, dtype=torch.float32, device=logp.device)
    partials = torch.empty(blocks, dtype=torch.float32, device=logp.device)
    given = None if weight is None else weight.contiguous()
    launch(unlikelihood_kernel, blocks)(
        logp.contiguous(), sigma.contiguous(), given, dlogp, partials, n, alpha, BLOCK=_BLOCK, num_warps=1
    )
    return partials.sum(), dlogp


@_unlikelihood_op.register_fake
def _(logp: Tensor, sigma: Tensor, weight: Tensor | None, alpha: float) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if logp.dtype == torch.float64 else torch.float32
    return logp.new_empty((), dtype=dtype), logp.new_empty(logp.shape, dtype=dtype)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.alpha = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *tensors)


def _backward(ctx: Any, grad_loss: Tensor, grad_dlogp: Any) -> Any:
    dlogp, logp, sigma, weight = ctx.saved_tensors
    if torch.is_grad_enabled():  # for a second derivative, compute the same value with differentiable torch operators
        dlogp = _eager(logp, sigma, weight, ctx.alpha)[1]
    return (dlogp * grad_loss).to(logp.dtype), None, None, None


_unlikelihood_op.register_autograd(_backward, setup_context=_setup)


def unlikelihood_loss(
    logp: Tensor,
    sigma: Tensor,
    *,
    alpha: float = 10.0,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Reflective unlikelihood over tokens; formula, gradient and bounds at the top of this file.

    Args:
        logp: ``[N]`` log-probs of the target tokens, or padded, ``[B, L]``, as all vectors then (fp32, bf16, fp16;
            float64 runs eagerly). Derivatives of every order.
        sigma: ``[N]`` in [0, 1], the reward of the token's turn over its maximum. Constant.
        alpha: weight of the unlikelihood term, >= 0.
        weight: ``[N]`` constants, 0 = masked, for instance from ``token_weights``. Default: the mean over rows.
        mask: like ``logp``, bool or integer; rows of 0 are masked too, and may hold NaN.

    Returns:
        0-d loss, fp32 (float64 in, float64 out). No row, or all of weight 0: 0. A NaN in a live row gives NaN.

    Raises:
        ValueError, TypeError: wrong shape, dtype, device or ``alpha``.
    """
    logp, sigma, weight = _flat(logp, sigma, weight, mask, alpha)
    refuse_forward_mode("unlikelihood_loss", logp)
    return _unlikelihood_op(logp, sigma, weight, float(alpha))[0]


def unlikelihood_loss_reference(
    logp: Tensor,
    sigma: Tensor,
    *,
    alpha: float = 10.0,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """``unlikelihood_loss`` in plain torch on any device: float64 inside, float64 out for float64 in."""
    logp, sigma, weight = _flat(logp, sigma, weight, mask, alpha)
    return _eager(logp, sigma, weight, alpha)[0]


def _eager(logp: Tensor, sigma: Tensor, weight: Tensor | None, alpha: float) -> tuple[Tensor, Tensor]:
    out = torch.float64 if logp.dtype == torch.float64 else torch.float32
    n = logp.shape[0]
    w = torch.full_like(logp, 1 / max(n, 1), dtype=torch.float64) if weight is None else weight.double()
    live = w != 0
    value, s = torch.where(live, logp.double(), -1.0), torch.where(live, sigma.double(), 0.0)
    capped = value.clamp(max=MAX_LOGP)
    near = capped > -math.log(2)
    small = torch.where(near, capped, -1.0)
    slope = 1 / torch.expm1(-capped)  # its own derivative is 0 on the tangent
    log1mexp = torch.where(near, torch.log(-torch.expm1(small)), torch.log1p(-torch.exp(capped)))
    log1mexp = log1mexp - slope.detach() * torch.where(value > capped, value - capped, 0.0)
    against = alpha * (1 - s)
    pull = torch.where(s != 0, s * value, 0.0)
    push = torch.where(against != 0, against * log1mexp, 0.0)
    loss = torch.where(live, -w * (pull + push), 0.0).sum()
    dlogp = torch.where(live, -w * (s - against * slope), 0.0)
    return loss.to(out), dlogp.to(out)


def _flat(
    logp: Tensor, sigma: Tensor, weight: Tensor | None, mask: Tensor | None, alpha: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Checked, as vectors of [N], the mask as weights."""
    check_shape("logp", logp, (None, None) if logp.dim() == 2 else (None,))
    check_dtype("logp", logp, FLOATS)
    for name, tensor, allowed in (("sigma", sigma, FLOATS), ("weight", weight, FLOATS), ("mask", mask, MASKS)):
        if tensor is not None:
            check_shape(name, tensor, tuple(logp.shape))
            check_dtype(name, tensor, allowed)
    check_same_device(logp=logp, sigma=sigma, weight=weight, mask=mask)
    check_number("alpha", alpha, alpha >= 0, ">= 0")
    if mask is not None:
        kept = mask != 0
        wide = torch.float64 if logp.dtype == torch.float64 else torch.float32
        weight = kept.to(wide) / kept.sum().clamp(min=1) if weight is None else weight.masked_fill(~kept, 0)
    return logp.reshape(-1), sigma.reshape(-1), None if weight is None else weight.reshape(-1)
