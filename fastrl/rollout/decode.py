"""The decode loop: rows of all prompts step together; finished rows retire.

Three ways of running one and the same step:

- ``eager``: shapes follow the keys written so far, and finished rows leave at once. The way of a CPU.
- ``static``: buffers at full size; the batch is one of a few sizes (buckets), and nothing about a step comes from the
  host, as a graph needs. Runs anywhere.
- ``graph``: ``static``, its step captured in a CUDA graph per bucket. The way of a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrl.models.families import family_of
from fastrl.rollout.cache import ModelLayers, PromptCache, RowCache
from fastrl.rollout.graphs import GraphRunner
from fastrl.rollout.sampler import Sampling, sample

WAYS = ("auto", "eager", "static", "graph")
CHECK_EVERY = 8  # steps between host reads of "how many rows are alive", where a read makes a GPU wait
SMALLEST_BUCKET = 32  # with fewer rows a step is no faster: it reads all weights


# (token [R], position [R], cache) → hidden states [R, H]
Layers = Callable[[Tensor, Tensor, RowCache], Tensor]


@dataclass
class Start:
    """Where decoding begins: the prompts' keys and values and what follows each."""

    cache: PromptCache
    logits: Tensor  # [B, V] of each prompt's last token
    next_position: Tensor  # [B] int64


def way_for(asked: str, device: torch.device) -> str:
    """One of ``WAYS`` other than ``auto``. Raises ``ValueError`` for an unknown one, and for a graph without a GPU."""
    if asked not in WAYS:
        raise ValueError(f"decode: expected one of {', '.join(WAYS)}, got {asked!r}")
    if asked == "auto":
        return "graph" if device.type == "cuda" else "eager"
    if asked == "graph" and device.type != "cuda":
        raise ValueError(
            f"decode: a graph needs a CUDA device, and the policy is on {device}; use auto, eager or static"
        )
    return asked


class Decode:
    """B prompts with n rows each. All state lives in buffers changed in place, so that ``step`` may be captured.

    After ``run``, ``tokens`` [B n, T] int64 and ``logp`` [B n, T] float32 hold what was sampled, up to and including a
    row's first EOS; what lies behind it is undefined.
    """

    def __init__(
        self,
        core: Any,
        start: Start,
        sampling: Sampling,
        uniform: Tensor | None,
        *,
        eos: Tensor,
        suppressed: Tensor,
        way: str = "eager",
    ) -> None:
        device, n, steps = start.logits.device, sampling.n, sampling.max_new_tokens
        size = len(start.logits) * n
        family = family_of(core.config)
        self.head, self.sampling, self.eos, self.suppressed = family.parts(core).head, sampling, eos, suppressed
        self.layers: Layers = family.decode_layers(core) or ModelLayers(family, core)
        self.static = way != "eager"
        self.cache = RowCache(start.cache, n, max(steps - 1, 1), static=self.static)
        # One line more than there are rows: rows that only fill a bucket read and write there.
        self.uniform = None if uniform is None else F.pad(uniform, (0, 0, 0, 1))  # [B n + 1, T] float64
        self.all_tokens = torch.zeros(size + 1, steps, dtype=torch.int64, device=device)
        self.all_logp = torch.zeros(size + 1, steps, dtype=torch.float32, device=device)
        self.filler = size
        self.rows = torch.arange(size, device=device)  # which of the B n rows each row of the batch is
        self.position = start.next_position.repeat_interleave(n)
        self.at = torch.zeros(1, dtype=torch.int64, device=device)  # column the next token goes to
        self.token = torch.zeros(size, dtype=torch.int64, device=device)
        self.alive = torch.ones(size, dtype=torch.bool, device=device)
        self.first_logits = start.logits
        self.runner = GraphRunner(self.step, device) if way == "graph" else None

    @property
    def tokens(self) -> Tensor:
        return self.all_tokens[: self.filler]

    @property
    def logp(self) -> Tensor:
        return self.all_logp[: self.filler]

    def run(self) -> None:
        """Sample every row to its EOS or to ``max_new_tokens``."""
        try:
            self._run()
        finally:
            self.runner = None  # it holds this object, and so the keys

    def _run(self) -> None:
        self._record(self.first_logits.repeat_interleave(self.sampling.n, 0))
        del self.first_logits
        every = CHECK_EVERY if self.token.is_cuda else 1
        for column in range(1, self.sampling.max_new_tokens):
            if (column - 1) % every == 0 and not self._any_left():
                break
            if self.runner is not None:
                self.runner.run(len(self.rows), self.sampling.max_new_tokens - column)
            else:
                self.step()
            self.cache.step += 1

    def step(self) -> None:
        """Feed each row's last token, sample its next one. Fixed shapes if static, in place, no host reads."""
        hidden = self.layers(self.token, self.position + self.cache.at, self.cache)
        self.cache.advance()
        self._record(self.head(hidden))

    def _record(self, logits: Tensor) -> None:
        column = self.at.expand_as(self.rows)
        uniform = None
        if self.uniform is not None:
            uniform = self.uniform.index_select(0, self.rows).gather(1, column[:, None])[:, 0]
        token, logp = sample(logits, self.sampling, uniform, self.suppressed)
        self.all_tokens.index_put_((self.rows, column), token)
        self.all_logp.index_put_((self.rows, column), logp)
        self.alive &= (token[:, None] != self.eos).all(-1)
        self.token.copy_(token)
        self.at += 1

    def _any_left(self) -> bool:
        """Whether any row is alive; finished ones retire where the batch gets smaller for it."""
        alive = self.alive.nonzero()[:, 0]
        size = self._smaller(len(alive))
        if len(alive) and size < len(self.rows):
            self._retire(alive, size)
        return len(alive) > 0

    def _smaller(self, alive: int) -> int:
        """Size of the batch from here on: a bucket of 2^k rows if static, else what is alive where the copy pays."""
        rows = len(self.rows)
        if not self.static:
            return alive if alive <= 0.85 * rows else rows
        return min(rows, max(SMALLEST_BUCKET, 1 << max(alive - 1, 0).bit_length()))

    def _retire(self, alive: Tensor, size: int) -> None:
        """Rows ``alive`` move to the front of a batch of ``size``; the rest of it are fillers, finished already."""
        self.cache.keep(alive, size)
        fill = (0, size - len(alive))
        rows = F.pad(self.rows[alive], fill, value=self.filler)
        position, token, living = (F.pad(x[alive], fill) for x in (self.position, self.token, self.alive))
        self.rows, self.position, self.token, self.alive = rows, position, token, living
