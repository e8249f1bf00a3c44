"""Scalar functions that keep their relative accuracy where the textbook form cancels, for use inside Triton kernels.

Only +, *, / and one ``exp`` or ``log``: no libdevice, so the interpreter runs them too. All take and return fp32.
The torch twins use ``torch.expm1`` and ``torch.log1p`` in float64 instead.
"""

from __future__ import annotations

from fastrl_kernels._triton import tl, triton


@triton.jit
def log1p_unit(z):
    """log(1 + z) for z in [-0.5, 1], relative error ~1e-7: 2 atanh(z / (2 + z)), whose argument stays within 1/3."""
    s = z / (2.0 + z)
    q = s * s
    series = 1.0 / 17.0
    series = series * q + 1.0 / 15.0
    series = series * q + 1.0 / 13.0
    series = series * q + 1.0 / 11.0
    series = series * q + 1.0 / 9.0
    series = series * q + 1.0 / 7.0
    series = series * q + 1.0 / 5.0
    series = series * q + 1.0 / 3.0
    return 2.0 * s * (1.0 + q * series)


@triton.jit
def expm1_tail(x):
    """exp(x) - 1 - x for |x| <= 0.7 by its series, x^2 * (1/2 + x/6 + ...), relative error ~1e-7."""
    series = 1.0 / 479001600.0
    series = series * x + 1.0 / 39916800.0
    series = series * x + 1.0 / 3628800.0
    series = series * x + 1.0 / 362880.0
    series = series * x + 1.0 / 40320.0
    series = series * x + 1.0 / 5040.0
    series = series * x + 1.0 / 720.0
    series = series * x + 1.0 / 120.0
    series = series * x + 1.0 / 24.0
    series = series * x + 1.0 / 6.0
    series = series * x + 0.5
    return x * x * series


@triton.jit
def softplus(x):
    """log(1 + exp(x)) without overflow; exact to rounding for large |x|."""
    return tl.maximum(x, 0.0) + log1p_unit(tl.exp(-tl.abs(x)))


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), relative accuracy at both ends."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)
