"""The gated delta rule by its definition, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.models.attention.delta_rule import EPS


def recurrence(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, rate: Tensor, memory: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition: S ← a S + b k (v − (a S)ᵀk)ᵀ, out = Sᵀq."""
    query, key = (x / (x.square().sum(-1, keepdim=True) + EPS).sqrt() for x in (query, key))
    query = query / query.shape[-1] ** 0.5
    out = []
    for t in range(query.shape[1]):
        memory = memory * decay[:, t, :, None, None].exp()
        change = (value[:, t] - torch.einsum("bhij,bhi->bhj", memory, key[:, t])) * rate[:, t, :, None]
        memory = memory + torch.einsum("bhi,bhj->bhij", key[:, t], change)
        out.append(torch.einsum("bhij,bhi->bhj", memory, query[:, t]))
    return torch.stack(out, 1), memory
