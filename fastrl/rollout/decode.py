"""The decode loop: rows of all prompts step together; finished rows leave the batch.

The same step runs in one of four modes:

- ``eager``: shapes grow with the keys written so far, and finished rows leave the batch at once.
- ``native`` (default on a CPU): ``eager``, with the layers in one call to C++, and several whole steps in one call if
  the head and the sampler allow it. If the C++ does not support the model, its dtype or its modules: ``eager``.
- ``static``: the batch has one of a few sizes (buckets), buffers keep their size for blocks of steps (``OWN_BLOCK``),
  and a step reads nothing from the host, as a CUDA graph requires. Runs on any device.
- ``graph`` (default on a GPU): ``static``, with the step captured in one CUDA graph per bucket and block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrl.models.decode_layers import DecodeLayers
from fastrl.models.families import family_of
from fastrl.models.native_layers import NativeLayers
from fastrl.rollout.cache import ModelLayers, PromptCache, RowCache, placed
from fastrl.rollout.graphs import GraphRunner
from fastrl.rollout.sampler import Sampling, sample
from fastrl_kernels.decode_step import Angles, Draws, Linear

MODES = ("auto", "eager", "native", "static", "graph")
CHECK_EVERY = 8  # steps between host reads of the number of unfinished rows; each read makes a GPU wait
SMALLEST_BUCKET = 32  # with fewer rows a step is no faster: it is bound by reading the weights
WORTH_RETIRING = 0.85  # without buckets, finished rows leave when at most this part of the rows is unfinished
BATCH = ("rows", "position", "token", "alive")  # a decode's tensors with a number for each row of the batch
STEPS_PER_CALL = 8  # native: between two calls Python handles signals


# (token [R], position [R], cache) → hidden states [R, H]
Layers = Callable[[Tensor, Tensor, RowCache], Tensor]


@dataclass
class Start:
    """The state in which decoding begins: the prompts' keys and values, and the logits of each prompt's next token."""

    cache: PromptCache
    logits: Tensor  # [B, V] of each prompt's last token
    next_position: Tensor  # [B] int64


def decode_mode(mode: str, device: torch.device) -> str:
    """Resolve ``auto``. Raises ``ValueError`` for a mode not in ``MODES``, and for ``graph`` without a GPU."""
    if mode not in MODES:
        raise ValueError(f"decode: expected one of {', '.join(MODES)}, got {mode!r}")
    if mode == "auto":
        return "graph" if device.type == "cuda" else "native"
    if mode == "graph" and device.type != "cuda":
        raise ValueError(
            f"decode: a graph needs a CUDA device, and the policy is on {device}; use auto, native, eager or static"
        )
    return mode


def own_keys(max_new_tokens: int) -> int:
    """Tokens of a row whose keys and values are kept: all of an answer but the last, which no later one attends to."""
    return max(max_new_tokens - 1, 1)


class Decode:
    """B prompts with n rows each. All state lives in buffers changed in place, so that ``step`` may be captured.

    After ``run``, ``tokens`` [B n, T] int64 and ``logp`` [B n, T] float32 hold what was sampled, up to and including
    each row's first EOS. Values after the EOS are undefined.
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
        mode: str = "eager",
    ) -> None:
        device, n, steps = start.logits.device, sampling.n, sampling.max_new_tokens
        size = len(start.logits) * n
        family = family_of(core.config)
        self.head, self.sampling, self.eos, self.suppressed = family.parts(core).head, sampling, eos, suppressed
        self.layers: Layers = _layers(family.decode_layers(core), mode) or ModelLayers(family, core)
        self.static = mode in ("static", "graph")
        self.cache = RowCache(start.cache, n, own_keys(steps), static=self.static)
        # One extra row at the end, which the rows that only fill a bucket read and write.
        self.uniform = None if uniform is None else F.pad(uniform, (0, 0, 0, 1))  # [B n + 1, T] float64
        self.all_tokens = torch.zeros(size + 1, steps, dtype=torch.int64, device=device)
        self.all_logp = torch.zeros(size + 1, steps, dtype=torch.float32, device=device)
        self.filler = size
        self.rows = torch.arange(size, device=device)  # index among the B n rows of each row in the batch
        self.position = start.next_position.repeat_interleave(n)
        self.at = torch.zeros(1, dtype=torch.int64, device=device)  # column of the next token
        self.token = torch.zeros(size, dtype=torch.int64, device=device)
        self.alive = torch.ones(size, dtype=torch.bool, device=device)
        self.first_logits = start.logits
        # Static: what differs between rows, by batch size, at fixed addresses
        self.held: dict[str, dict[int, Tensor]] = {name: {size: getattr(self, name)} for name in BATCH}
        self.runner = GraphRunner(self.step, device) if mode == "graph" else None
        self.native = NativeSteps.of(self, start.next_position)

    @property
    def tokens(self) -> Tensor:
        return self.all_tokens[: self.filler]

    @property
    def logp(self) -> Tensor:
        return self.all_logp[: self.filler]

    def run(self, *, again: bool = False) -> None:
        """Sample every row to its EOS or to ``max_new_tokens``. ``again``: keep graphs for a later ``restart``."""
        try:
            self._run()
        except BaseException:
            self.close()
            raise
        if not again:
            self.close()

    def close(self) -> None:
        """Drop all graphs."""
        self.runner = None  # breaks a reference cycle that would keep the keys and values alive

    def restart(self, start: Start, uniform: Tensor | None) -> bool:
        """Begin again with other prompts whose keys are in the same buffers (``PromptCache.restart``), to replay the
        graphs captured before. False if nothing was changed: buffers have moved, or there are other numbers of rows."""
        size, cache = self.filler, self.cache
        if self.runner is None or cache.moved or len(start.logits) * self.sampling.n != size:
            return False
        if any(key is not cache.prompt_keys[layer] for layer, key in start.cache.keys.items()):
            return False
        cache.restart(start.cache)
        self.rows, self.position, self.token, self.alive = (self.held[name][size] for name in BATCH)
        self.position.copy_(start.next_position.repeat_interleave(self.sampling.n))
        self.token.zero_()
        self.alive.fill_(True)
        self.at.zero_()
        if self.uniform is not None and uniform is not None:
            self.uniform[:-1].copy_(uniform)
        self.first_logits = start.logits
        return True

    def _run(self) -> None:
        self._record(self.first_logits.repeat_interleave(self.sampling.n, 0))
        del self.first_logits
        every = CHECK_EVERY if self.token.is_cuda else 1
        column = 1
        while column < self.sampling.max_new_tokens:
            if (column - 1) % every == 0 and not self._any_left():
                break
            column += self._steps(column)

    def _steps(self, column: int) -> int:
        """Run one step or more, starting with the one that samples ``column``. Returns the number of steps."""
        left, done = self.sampling.max_new_tokens - column, 1
        most = 1 if self.native is None else min(left, STEPS_PER_CALL)
        if self.cache.reserve(self.cache.step + most) and self.runner is not None:
            self.runner.forget()
        if self.native is not None:
            done = self.native.run(self, column, most)
        elif self.runner is not None:
            self.runner.run(len(self.rows), left)
        else:
            self.step()
        self.cache.step += done
        return done

    def step(self) -> None:
        """Feed each row's last token and sample the next one. In place, without host reads; fixed shapes if static."""
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
        """Whether any row is unfinished. Drops finished rows if that makes the batch smaller."""
        alive = self.alive.nonzero()[:, 0]
        size = self._smaller(len(alive))
        if len(alive) and size < len(self.rows):
            self._retire(alive, size)
        return len(alive) > 0

    def _smaller(self, alive: int) -> int:
        """New batch size: the smallest bucket of 2^k rows if static, else ``alive`` if that saves enough."""
        rows = len(self.rows)
        if not self.static:
            return alive if alive <= WORTH_RETIRING * rows else rows
        return min(rows, max(SMALLEST_BUCKET, 1 << max(alive - 1, 0).bit_length()))

    def _retire(self, alive: Tensor, size: int) -> None:
        """Shrink the batch to ``size``: rows ``alive`` move to the front, the rest become finished filler rows."""
        self.cache.keep(alive, size)
        fill = (0, size - len(alive))
        rows = F.pad(self.rows[alive], fill, value=self.filler)
        position, token, living = (F.pad(x[alive], fill) for x in (self.position, self.token, self.alive))
        new = {"rows": rows, "position": position, "token": token, "alive": living}
        if self.static:
            new = {name: placed(self.held[name], size, x) for name, x in new.items()}
        self.rows, self.position, self.token, self.alive = (new[name] for name in BATCH)


def _layers(layers: DecodeLayers | None, mode: str) -> Layers | None:
    """The C++ step of the known layers in native mode, if it supports them, else the layers as they are."""
    return layers if layers is None or mode != "native" else NativeLayers.of(layers) or layers


class NativeSteps:
    """Runs whole steps of a decode in C++: layers, head and sampler."""

    def __init__(self, layers: NativeLayers, head: Linear, cos: Tensor, sin: Tensor) -> None:
        self.layers, self.head, self.cos, self.sin = layers, head, cos, sin

    @classmethod
    def of(cls, decode: Decode, next_position: Tensor) -> NativeSteps | None:
        """None if part of a step has to run in torch: the layers, a head that is not a plain linear layer, top-k or
        top-p sampling, rotary angles that cannot be computed ahead."""
        layers, sampling = decode.layers, decode.sampling
        if not isinstance(layers, NativeLayers) or sampling.truncated or not layers.fixed_angles:
            return None
        head = layers.head(decode.head)
        if head is None:
            return None
        # The answers to a prompt have the same positions, so the table has one line per prompt and step.
        positions = next_position[:, None] + torch.arange(decode.cache.limit, device=next_position.device)
        return cls(layers, head, *layers.angles(positions.flatten()))

    def run(self, decode: Decode, column: int, steps: int) -> int:
        """Run up to ``steps`` steps, fewer if enough rows finish for them to leave the batch. Returns the number."""
        cache, sampling = decode.cache, decode.sampling
        draws = Draws(
            head=self.head,
            temperature=sampling.temperature,
            suppressed=decode.suppressed,
            ends=decode.eos,
            uniform=decode.uniform,
            tokens=decode.all_tokens,
            logp=decode.all_logp,
            line=decode.rows,
            column=column,
            alive=decode.alive,
            stop_at=int(WORTH_RETIRING * len(decode.rows)),
        )
        line = decode.rows // sampling.n * cache.limit + cache.step
        done = self.layers.draw(decode.token, cache, Angles(self.cos, self.sin, line), draws, steps)
        cache.advance(done)
        decode.at += done
        return done
