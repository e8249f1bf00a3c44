"""fastrl's side of a comparison: the trainer's own run, one step at a time."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from benchmarks.versus.measure import Phases, Recorder, static_bytes
from benchmarks.versus.work import Work, never_sampled
from fastrl.data.records import Record
from fastrl.engine.local import LocalEngine
from fastrl.recipe import Recipe, build_recipe
from fastrl.rollout import Generator
from fastrl.trainer import Run

LORA = {"rank": 16, "alpha": 32.0}
# Phases of the trainer's clock → compared phases. An update without backward and optimizer is the forward.
PHASE_OF = {
    "encode": "preprocess",
    "preprocess": "preprocess",
    "vision": "generate",
    "prefill": "generate",
    "decode": "generate",
    "rollout": "generate",
    "reward": "reward",
    "update": "forward",
    "forward": "forward",
    "backward": "backward",
    "optimizer": "optimizer",
}


def recipe(
    folder: Path, work: Work, rows: int, *, train: str, device: torch.device, dtype: str | None = None
) -> Recipe:
    """GRPO as both sides run it (see ``vs_trl``); ``dtype`` of the weights, by default the device's usual one."""
    gpu = device.type == "cuda"
    return build_recipe(
        {
            "method": {"kind": "perception-r1", "beta": 0.0},
            "model": {
                "path": str(folder),
                "device": str(device),
                "dtype": dtype or ("bfloat16" if gpu else "float32"),
                "gradient_checkpointing": gpu,
                "lora": LORA if train == "lora" else None,
            },
            "data": {"spec": "given", "prompts_per_step": work.prompts, "order": "file"},
            "rollout": {"group_size": work.group, "max_new_tokens": work.answer},
            "optim": {"steps": 10**6, "lr": 1e-6, "token_budget": work.budget(rows)},
        }
    )


class Fastrl:
    """A :class:`fastrl.trainer.Run` whose answers all have the forced length."""

    name = "fastrl"

    def __init__(
        self,
        folder: Path,
        work: Work,
        rows: int,
        records: Sequence[Record],
        *,
        train: str,
        device: torch.device,
        dtype: str | None = None,
    ) -> None:
        """``rows``: answers per micro-batch; ``train``: full or lora."""
        self.run = Run(recipe(folder, work, rows, train=train, device=device, dtype=dtype), records=records)
        policy = self.run.policy
        policy.suppressed_token_ids = tuple(never_sampled(policy.tokenizer))
        phases = Phases(device)
        self.recorder = Recorder(device, phases)
        self.gaps: list[dict[str, float]] = []  # difference of sampler and trainer, for every step
        self._clock(phases)
        phases.wrap(self.run.engine, "backward", "backward")
        phases.wrap(self.run.engine, "step", "optimizer")
        self._steps = 0

    def step(self, kind: str) -> None:
        """One optimizer step, including rollouts, of which ``kind`` is measured."""
        self._steps += 1
        generator = self.run.context.generator
        assert isinstance(generator, Generator)
        mode = generator.decode
        if kind == "count" and mode == "graph":
            generator.decode = "static"  # the same computation; operations replayed by a graph cannot be counted
        with self.recorder.measure(kind):
            row, _ = self.run.step(self._steps)
        generator.decode = mode
        self.gaps.append({key: value for key, value in row.items() if key.startswith("sampler/")})

    @property
    def static_bytes(self) -> int:
        """Bytes that persist between steps."""
        engine = self.run.engine
        assert isinstance(engine, LocalEngine)
        return static_bytes(self.run.policy.model, engine._optimizers)

    def _clock(self, phases: Phases) -> None:
        def phase(name: str) -> AbstractContextManager[None]:
            return phases.phase(PHASE_OF.get(name, "other"))

        clock: Any = self.run.clock
        clock.phase = phase
