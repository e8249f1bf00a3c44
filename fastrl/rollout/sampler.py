"""How a token is drawn from logits, and the log-prob the sampler reports for it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_PLAIN = 1024  # the largest vocabulary that is drawn from in one step
_BLOCK = 128  # tokens per block where drawing takes two steps (divides the size of Qwen's vocabulary)
_BELOW_ONE = 1 - 2**-53  # the largest number below 1


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled.

    Attributes:
        n: completions per prompt (the group size).
        max_new_tokens: length, EOS included, at which a completion is cut off.
        temperature: divides the logits; 0 is greedy.
        top_p: keep the most likely tokens up to this total probability (after ``top_k``); 1 keeps all.
        top_k: keep this many most likely tokens; 0 keeps all.

    Raises:
        ValueError: a value outside its range.
    """

    n: int
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n: expected 1 or more completions per prompt, got {self.n}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected 1 or more, got {self.max_new_tokens}")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature: expected 0 (greedy) or a positive number, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected more than 0 and at most 1, got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k: expected 0 (all) or more, got {self.top_k}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def truncated(self) -> bool:
        """Whether top-k or top-p cuts tokens off. The reported log-probs are still those of the full vocabulary, and so
        not those of the distribution that was sampled from."""
        return not self.greedy and (self.top_p < 1 or self.top_k > 0)


class Sampled(NamedTuple):
    token: Tensor  # [R] int64
    logp: Tensor  # [R] float32, over the full vocabulary


def sample(logits: Tensor, sampling: Sampling, uniform: Tensor | None, suppressed: Tensor) -> Sampled:
    """Draw one token per row.

    A row's token is the inverse of its cumulative distribution at its one uniform number, so the draw depends only on
    the row's own logits and number. Shapes are fixed and nothing is read on the host: may be captured in a CUDA graph.

    Args:
        logits: [R, V], any floating dtype.
        sampling: temperature and truncation; ``n`` and ``max_new_tokens`` are not used.
        uniform: [R] float64 in [0, 1). Not needed (None) for greedy sampling.
        suppressed: [S] int64, ids that are never drawn.

    Returns:
        Tokens, and their log-probs over the full vocabulary before suppression and truncation, at the sampling
        temperature (greedy: at temperature 1).
    """
    scores = logits.to(torch.float32, copy=True)
    if sampling.temperature not in (0, 1):
        scores /= sampling.temperature
    held = scores.index_select(-1, suppressed).logsumexp(-1)
    scores.index_fill_(-1, suppressed, -torch.inf)
    if sampling.greedy:
        token = scores.argmax(-1, keepdim=True)
        rest = scores.logsumexp(-1)
    else:
        if uniform is None:
            raise ValueError("uniform: needed unless the temperature is 0")
        weight = scores.softmax(-1)
        token = (_truncated(scores, sampling, uniform) if sampling.truncated else _draw(weight, uniform))[:, None]
        # The drawn token's probability gives the log-sum-exp over the allowed tokens without another pass over them.
        rest = (scores.gather(-1, token) - weight.gather(-1, token).log())[:, 0]
    return Sampled(token[:, 0], scores.gather(-1, token)[:, 0] - torch.logaddexp(rest, held))


def _truncated(scores: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """Top-k, then top-p among the rest: a token stays if the more likely ones sum to less than ``top_p``."""
    vocabulary = scores.shape[-1]
    if 0 < sampling.top_k < vocabulary:
        ordered, ids = scores.topk(sampling.top_k, dim=-1)
    else:
        ordered, ids = scores.sort(dim=-1, descending=True)
    weight = ordered.softmax(-1)
    if sampling.top_p < 1:
        before = weight.cumsum(-1) - weight
        weight = weight.masked_fill(before >= sampling.top_p, 0.0)
    return ids.gather(-1, _draw(weight, uniform)[:, None])[:, 0]


def _draw(weight: Tensor, uniform: Tensor) -> Tensor:
    """Index [R] drawn with these weights [R, V] (not necessarily normalised), one uniform number [R] each.

    From a large vocabulary it draws in two steps: first a block of tokens, then a token of the block. This inverts the
    same distribution, but scans one block per row instead of scanning (and storing, in float64) every token.
    """
    rows, vocabulary = weight.shape
    if vocabulary <= _PLAIN:
        return _invert(weight, uniform)[0]
    short = -vocabulary % _BLOCK
    blocks = (F.pad(weight, (0, short)) if short else weight).view(rows, -1, _BLOCK)
    block, rest = _invert(blocks.sum(-1), uniform)
    inside = blocks.gather(1, block[:, None, None].expand(-1, 1, _BLOCK))[:, 0]
    index = block * _BLOCK + _invert(inside, rest)[0]
    return index.clamp_(max=vocabulary - 1)  # NaN weights give any index; the caller sees them in the log-prob


def _invert(weight: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Index [R] at which the cumulative distribution of ``weight`` [R, V] passes ``uniform`` [R], and the position of
    ``uniform`` within that index's own interval, in [0, 1)."""
    cumulative = weight.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1]
    point = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, point[:, None], right=True).clamp_(max=weight.shape[-1] - 1)
    if weight.is_cuda:  # a parallel sum may rise by a rounding error at a token of weight 0
        index = torch.where(weight.gather(-1, index) > 0, index, weight.argmax(-1, keepdim=True))
    before = F.pad(cumulative, (1, 0)).gather(-1, index)
    rest = (point[:, None] - before) / weight.gather(-1, index).double()
    return index[:, 0], rest[:, 0].clamp_(0.0, _BELOW_ONE)
