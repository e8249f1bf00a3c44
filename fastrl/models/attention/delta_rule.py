"""The gated delta rule (arXiv:2412.06464) with a given initial state, and the short convolution before it.

A head keeps a memory S [Dk, Dv]. A token with query q, key k (both of length 1, q scaled by 1/√Dk), value v, decay
a = exp(log_decay) and rate b changes and reads it:

    S ← a S;   S ← S + b k (v − Sᵀk)ᵀ;   out = Sᵀq

``delta_rule`` computes chunks of tokens by matrix products (arXiv:2406.06484 §3): within a chunk, with A_t the product
of decays up to t, the changes u_t = b_t (v_t − Sᵀk_t) solve the unit lower triangular system

    u_t + Σ_{s<t} b_t (A_t / A_s) (k_t · k_s) u_s  =  b_t v_t − b_t A_t S₀ᵀk_t

so that out_t = A_t S₀ᵀq_t + Σ_{s≤t} (A_t / A_s) (q_t · k_s) u_s, and the next chunk starts with
S = A_n S₀ + Σ_s (A_n / A_s) k_s u_sᵀ. A token with decay 1 and rate 0 (padding) changes nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
EPS = 1e-6  # below the squared length of queries and keys


class DeltaState(NamedTuple):
    """What a layer of B texts carries from one token to the next."""

    window: Tensor  # [B, K - 1, C]: the convolution's latest inputs, the oldest first
    memory: Tensor  # [B, H, Dk, Dv] float32 or wider

    @property
    def row_bytes(self) -> int:
        """Of one text."""
        return sum(part[0].numel() * part.element_size() for part in self)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor) -> Tensor:
    """Causal convolution of each channel: x [B, T, C] behind ``window`` [B, K - 1, C], weight [C, K] → [B, T, C]."""
    whole = torch.cat([window.to(x.dtype), x], 1).transpose(1, 2)
    return F.conv1d(whole, weight[:, None], bias, groups=len(weight)).transpose(1, 2)


def next_window(x: Tensor, window: Tensor, length: Tensor | None) -> Tensor:
    """The window [B, K - 1, C] behind the first ``length`` [B] tokens of x [B, T, C] (None: all)."""
    whole, size = torch.cat([window.to(x.dtype), x], 1), window.shape[1]
    if length is None:
        return whole[:, x.shape[1] :]
    index = length[:, None] + torch.arange(size, device=x.device)
    return whole.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


def delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    rate: Tensor,
    memory: Tensor,
    *,
    chunk: int = CHUNK,
    final: bool = True,
) -> tuple[Tensor, Tensor]:
    """The rule over T tokens, differentiable in all tensors.

    Args:
        query, key: [B, T, H, Dk], of any length. value: [B, T, H, Dv].
        log_decay, rate: [B, T, H]; ``log_decay`` ≤ 0.
        memory: [B, H, Dk, Dv] before the first token; its dtype (float32 or wider) is computed in.
        chunk: tokens per matrix product.
        final: compute the memory after the last token.

    Returns:
        [B, T, H, Dv] and the last memory (if not ``final``: that before the last chunk), both in memory's dtype.
    """
    length = query.shape[1]
    size = min(chunk, length)
    pad = -length % size

    def chunks(x: Tensor) -> Tensor:  # [B, T, H, …] → [B, H, chunks, size, …]
        x = x.transpose(1, 2).to(memory.dtype)
        return F.pad(x, (*(0, 0) * (x.dim() - 3), 0, pad)).unflatten(2, (-1, size))

    q, k = _unit(chunks(query)) * query.shape[-1] ** -0.5, _unit(chunks(key))
    v, b = chunks(value), chunks(rate)[..., None]
    total = chunks(log_decay).cumsum(-1)[..., None]  # logarithm of A_t
    later = torch.ones(size, size, dtype=torch.bool, device=query.device).triu(1)
    between = (total - total.transpose(-1, -2)).masked_fill(later, -torch.inf).exp()  # A_t / A_s
    system = (k * b) @ k.transpose(-1, -2) * between
    sides = torch.cat([v * b, k * b * total.exp()], -1)
    solved = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
    own, read = solved.split([v.shape[-1], k.shape[-1]], -1)
    weight = q @ k.transpose(-1, -2) * between
    q, last = q * total.exp(), total[..., -1:, :]
    k, kept = (k * (last - total).exp()).transpose(-1, -2), last.exp()
    out = []
    # Unbound at once: the backward of an index per chunk would fill and add the whole tensor for each.
    parts = [x.unbind(2) for x in (q, k, own, read, weight, kept)]
    for n, (q_n, k_n, own_n, read_n, weight_n, kept_n) in enumerate(zip(*parts, strict=True), 1):
        change = own_n - read_n @ memory
        out.append(q_n @ memory + weight_n @ change)
        if final or n < len(parts[0]):
            memory = memory * kept_n + k_n @ change
    return torch.cat(out, 2)[:, :, :length].transpose(1, 2), memory


def delta_step(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, rate: Tensor, memory: Tensor) -> Tensor:
    """The rule for one token, without gradients; ``memory`` [B, H, Dk, Dv] is changed in place.

    Args:
        query, key: [B, H, Dk]. value: [B, H, Dv]. log_decay, rate: [B, H].

    Returns:
        [B, H, Dv] in memory's dtype.
    """
    q, k, v, b = (x.to(memory.dtype) for x in (query, key, value, rate))
    q, k = _unit(q) * q.shape[-1] ** -0.5, _unit(k)
    memory *= log_decay.to(memory.dtype).exp()[..., None, None]
    change = (v - (k[:, :, None] @ memory)[:, :, 0]) * b[..., None]
    memory.flatten(0, 1).baddbmm_(k.flatten(0, 1)[:, :, None], change.flatten(0, 1)[:, None])
    return (q[:, :, None] @ memory)[:, :, 0]


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPS)
