"""Reference attention, written out: a softmax under a mask, and the contract of a variable-length kernel."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor


def copy_nothing(patch: pytest.MonkeyPatch) -> None:
    """Small blocks, too, compute the scores with their prompt's keys apart instead of copying these."""
    patch.setattr(importlib.import_module("fastrl_kernels.prefix_attention"), "_LEAST_SAVED", 0)


def truth(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    ratio = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(ratio, 1), value.repeat_interleave(ratio, 1)
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~mask, -math.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def eager_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **options: Any
) -> Tensor:
    """The contract of a variable-length kernel: each segment by itself, causal, aligned at the bottom right; and its
    requirements for arguments, which eager torch would not check."""
    for x, heads in ((q, q.shape[1]), (k, k.shape[1]), (v, k.shape[1])):
        assert x.ndim == 3
        assert x.shape[1:] == (heads, q.shape[2])
        assert x.stride(-1) == 1
    assert len(k) == len(v)
    assert q.shape[1] % k.shape[1] == 0
    for cu in (cu_q, cu_k):
        assert cu.dtype == torch.int32
        assert cu.is_contiguous()
        assert cu.device == q.device
        assert cu[0] == 0
        assert bool((cu[1:] >= cu[:-1]).all())
    assert len(cu_q) == len(cu_k)
    assert set(options) == {"scale", "causal"}
    out = []
    for n in range(len(cu_q) - 1):
        rows, keys = slice(int(cu_q[n]), int(cu_q[n + 1])), slice(int(cu_k[n]), int(cu_k[n + 1]))
        n_q, n_k = rows.stop - rows.start, keys.stop - keys.start
        assert n_q <= max_q
        assert n_k <= max_k
        mask = torch.ones(n_q, n_k, dtype=torch.bool)
        if options["causal"]:
            mask = mask.tril(diagonal=n_k - n_q)
        segment = (x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys]))
        out.append(truth(*segment, mask, options["scale"])[0])
    assert int(cu_q[-1]) == len(q)
    assert int(cu_k[-1]) == len(k)
    return torch.cat(out)
