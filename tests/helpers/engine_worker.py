"""Whole runs with given answers, on one process or several: ``engine_worker.py FOLDER`` reads ``FOLDER/runs.json``.

Answers are random tokens that depend on the prompt alone, so that runs of any number of ranks learn from the same. One
record's answers are all equal: nothing is learned from them, and a rank may have no others.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

import fastrl.trainer
from fastrl.batch import Completion, Prompt
from fastrl.data.records import Record
from fastrl.engine import make_engine
from fastrl.engine.ranks import leave
from fastrl.rollout import Generator, Sampling
from fastrl.trainer import train
from tests.helpers.training import TEXT, make_recipe, make_records

EQUAL = (1, 3)  # records whose answers are all equal
TEXT_ONLY = 2  # a record without a picture


def records() -> list[Record]:
    """Pictures of two sizes, one record without any, two with equal answers."""
    made = make_records(8)
    words = ({"role": "user", "content": [{"type": "text", "text": "Write letters."}]},)
    made[TEXT_ONLY] = Record(id="t", task="ocr", images=(), messages=words, target={"text": TEXT})
    return made


def answers(generator: Any, prompts: Sequence[Prompt], sampling: Sampling, *_: Any) -> list[list[Completion]]:
    """Random answers of 1 to 7 tokens to each prompt."""
    policy = generator.policy
    vision = [image for prompt in prompts for image in prompt.images]
    if vision:
        policy.features(vision)  # as a rollout does, before any micro-batch
    equal = [policy.encode(made)[0].token_ids for i, made in enumerate(records()) if i in EQUAL]
    return [
        _answers(policy, prompt, sampling.n, any(torch.equal(prompt.token_ids, e) for e in equal)) for prompt in prompts
    ]


def _answers(policy: Any, prompt: Prompt, count: int, same: bool) -> list[Completion]:
    rng = torch.Generator().manual_seed(int((prompt.token_ids * torch.arange(1, len(prompt.token_ids) + 1)).sum()))
    found = []
    for _ in range(count):
        length = int(torch.randint(1, 7, (), generator=rng))
        ids = torch.cat([torch.randint(32, 122, (length,), generator=rng), torch.tensor([policy.end_of_turn_id])])
        found.append(Completion(ids, text=policy.decode(ids), finished=True))
    return [found[0]] * count if same else found


def gradients(engine: Any) -> dict[str, Tensor]:
    """Whole gradients by name, as the update will read them."""
    if hasattr(engine, "_engine"):  # DeepSpeed's
        zero = engine._engine.optimizer
        return {name: zero.get_fp32_grad_for_param(p).clone() for name, p in engine._trained.items()}
    held = getattr(engine, "_sharded", None) or engine._masters
    found = {name: p.grad for name, p in held.items() if p.grad is not None}
    return {n: (g.full_tensor() if isinstance(g, DTensor) else g).detach().clone() for n, g in found.items()}


@contextmanager
def given_answers(kept: list[dict[str, Tensor]]) -> Iterator[None]:
    """Runs inside get the answers above, and add the gradients of each update to ``kept``."""

    def recording(*arguments: Any, **options: Any) -> Any:
        engine = make_engine(*arguments, **options)
        update: Callable[[], Any] = engine.step

        def step() -> Any:
            kept.append(gradients(engine))
            return update()

        engine.step = step  # type: ignore[method-assign]
        return engine

    before = fastrl.trainer.make_engine, Generator.generate
    fastrl.trainer.make_engine, Generator.generate = recording, answers  # type: ignore[assignment]
    try:
        yield
    finally:
        fastrl.trainer.make_engine, Generator.generate = before


def run(folder: Path, name: str, changes: Mapping[str, Any], *, model: str, resume: bool = False) -> None:
    """One run into ``folder/name``, on as many ranks as there are; 4 prompts a step."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    kept: list[dict[str, Tensor]] = []
    plain = {"data__order": "file", "data__prompts_per_step": 4 // ranks, "optim__steps": 5, "optim__eps": 1e-5}
    recipe = make_recipe(Path(model), folder / name, **{**plain, **changes})
    with given_answers(kept):
        train(recipe, records=records(), resume=resume, show=False)
    if ranks == 1 or dist.get_rank() == 0:
        flat = {f"{step}.{key}": value for step, found in enumerate(kept) for key, value in found.items()}
        save_file({key: value.contiguous() for key, value in flat.items()}, folder / name / "gradients.safetensors")


def main() -> None:
    folder = Path(sys.argv[1])
    faulthandler.enable()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found: dict[str, str] = {}
    for each in json.loads((folder / "runs.json").read_text()):
        try:
            run(folder, **each)
            found[each["name"]] = ""
        except Exception:
            found[each["name"]] = traceback.format_exc()
            break  # the other ranks may wait in it
    (folder / f"found-{os.environ['RANK']}.json").write_text(json.dumps(found))
    leave(int(any(found.values())))


if __name__ == "__main__":
    main()
