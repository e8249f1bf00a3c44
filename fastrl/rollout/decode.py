"""The decode loop: rows of all prompts step together; finished rows retire."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrl.rollout.cache import PromptCache, RowCache, forward
from fastrl.rollout.sampler import Sampling, sample

GPU_CHECK_EVERY = 8  # steps between host reads of "how many rows are alive"


@dataclass
class Start:
    """Where decoding begins: the prompts' keys and values and what follows each."""

    cache: PromptCache
    logits: Tensor  # [B, V] of each prompt's last token
    next_position: Tensor  # [B] int64


class Decode:
    """B prompts with n rows each. All state lives in fixed buffers changed in place, so that ``step`` may be captured.

    After ``run``, ``tokens`` [B n, T] and ``logp`` [B n, T] hold what was sampled, up to and including a row's first
    EOS; what lies behind it is undefined.
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
        cuda_graph: bool = False,
        static: bool | None = None,
    ) -> None:
        device, n, steps = start.logits.device, sampling.n, sampling.max_new_tokens
        size = len(start.logits) * n
        self.core, self.sampling, self.eos, self.suppressed = core, sampling, eos, suppressed
        self.uniform = uniform  # [B n, T] float64
        self.cuda_graph = cuda_graph and device.type == "cuda"
        static = device.type == "cuda" if static is None else static
        self.cache = RowCache(start.cache, n, max(steps - 1, 1), device, static=static)
        self.tokens = torch.zeros(size, steps, dtype=torch.int64, device=device)
        self.logp = torch.zeros(size, steps, dtype=torch.float32, device=device)
        self.rows = torch.arange(size, device=device)  # which of the B n rows each row of the batch is
        self.position = start.next_position.repeat_interleave(n)
        self.at = torch.zeros(1, dtype=torch.int64, device=device)  # column the next token goes to
        self.token = torch.zeros(size, dtype=torch.int64, device=device)
        self.alive = torch.ones(size, dtype=torch.bool, device=device)
        self.first_logits = start.logits

    def run(self) -> None:
        """Sample every row to its EOS or to ``max_new_tokens``."""
        self._record(self.first_logits.repeat_interleave(self.sampling.n, 0))
        del self.first_logits
        replay: Callable[[], None] | None = None
        every = GPU_CHECK_EVERY if self.token.is_cuda else 1
        for column in range(1, self.sampling.max_new_tokens):
            if (column - 1) % every == 0:
                alive = self.alive.nonzero()[:, 0]
                if len(alive) == 0:
                    return
                if self._worth_retiring(len(alive)):
                    self._retire(alive)
                    replay = None  # other shapes: a new graph
            if replay is not None:
                replay()
            else:
                self.step()  # with graphs: also the warm-up run that a capture needs
                if self.cuda_graph and self.sampling.max_new_tokens - column > 2 * every:
                    replay = _capture(self.step)
            self.cache.step += 1

    def step(self) -> None:
        """Feed each row's last token, sample its next one. Fixed shapes, in place, no host reads."""
        embeds = self.core.get_input_embeddings()(self.token)[:, None]
        positions = (self.position + self.cache.at)[None, :, None].expand(3, -1, 1)
        hidden = forward(self.core, embeds, positions, self.cache)
        self.cache.advance()
        self._record(self.core.lm_head(hidden[:, 0]))

    def _record(self, logits: Tensor) -> None:
        column = self.at.expand_as(self.rows)
        uniform = None if self.uniform is None else self.uniform[self.rows, column]
        token, logp = sample(logits, self.sampling, uniform, self.suppressed)
        self.tokens.index_put_((self.rows, column), token)
        self.logp.index_put_((self.rows, column), logp)
        self.alive &= (token[:, None] != self.eos).all(-1)
        self.token.copy_(token)
        self.at += 1

    def _worth_retiring(self, alive: int) -> bool:
        """Copying what stays costs about a step; graphs are made anew, so there rows retire by halves."""
        rows = len(self.rows)
        return alive <= rows // 2 if self.cuda_graph else alive <= 0.85 * rows

    def _retire(self, alive: Tensor) -> None:
        self.cache.keep(alive)
        self.rows, self.position, self.token = self.rows[alive], self.position[alive], self.token[alive]
        self.alive = self.alive[alive]


def _capture(step: Callable[[], None]) -> Callable[[], None]:
    """``step`` as a CUDA graph. Capturing runs nothing; ``step`` must have run once with the present shapes."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
