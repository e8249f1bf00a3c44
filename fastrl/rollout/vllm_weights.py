"""The trainer's weights for vLLM servers, written into a folder that all of them can read.

LoRA: each set of weights is a new adapter, which requests name as their model, so no other weights can answer.
Full weights: the server is paused, which empties its caches, loads the folder in place, and resumes.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor

from fastrl.data.disk import sizes
from fastrl.models.lora import whole_state

T = TypeVar("T")
HEAD = "head.safetensors"  # the head of a model that ties it to its embedding, under its own name
INDEX = "model.safetensors.index.json"


class RolloutError(RuntimeError):
    """The server or its answers cannot be used. The trainer's weights are unchanged."""


class Ranks(Protocol):
    """What rollouts on servers need of a run's processes; an engine has it (see ``fastrl.engine.base``)."""

    rank: int
    world_size: int

    def gather(self, value: T) -> list[T]: ...

    def whole(self, core: Any, state: Callable[[], Mapping[str, Tensor]]) -> Iterator[tuple[str, Tensor]]: ...


class Alone:
    """One process."""

    rank, world_size = 0, 1

    def gather(self, value: T) -> list[T]:
        return [value]

    def whole(self, core: Any, state: Callable[[], Mapping[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        yield from state().items()


class WeightSet(NamedTuple):
    """Weights that were written for servers."""

    name: str  # under LoRA, of the adapter; no other run and no other set has it
    path: Path
    updates: int  # the number of optimizer updates that made them


class WeightsFolder:
    """Writes sets of weights, one at a time.

    Args:
        policy: its weights are written: the adapter under LoRA, else all of them.
        folder: the same path on all machines.
        updates: the number of optimizer updates made so far.
        ranks: the run's processes; the first one writes.

    Raises:
        ValueError: adapters that vLLM does not serve (on the vision tower, or modules trained whole).
    """

    def __init__(self, policy: Any, folder: Path, updates: Callable[[], int], ranks: Ranks) -> None:
        self.adapter = policy.peft is not None
        if self.adapter:
            _check_adapter(policy)
        self.policy, self.folder, self.updates, self.ranks = policy, folder.absolute(), updates, ranks
        self._run = f"fastrl-{secrets.token_hex(4)}"
        self._written = 0

    def write(self) -> WeightSet:
        """Write the present weights. All ranks call this; each weight is whole on one of them at a time, and the first
        rank collects them on the host.

        Raises:
            RolloutError: on the first rank, if the disk refuses them.
        """
        updates = self.updates()
        self._written += 1
        name = f"{self._run}-{updates}-{self._written}"
        written = WeightSet(name, self.folder / name, updates)
        alone = self.ranks.world_size == 1
        kept = {}
        for key, value in self.ranks.whole(self.policy.core, self._state):
            if self.ranks.rank == 0:
                kept[key] = value if alone else value.cpu()
        if self.ranks.rank == 0:
            self._save(written.path, kept)
        return written

    def _state(self) -> dict[str, Tensor]:
        """The weights to push, as this rank has them."""
        state = whole_state(self.policy.core)
        return {key: value for key, value in state.items() if ".lora_" in key} if self.adapter else state

    def _save(self, path: Path, state: dict[str, Tensor]) -> None:
        from safetensors import SafetensorError

        try:
            path.mkdir(parents=True, exist_ok=True)
            if self.adapter:
                self.policy.save_adapter(path, state)
            else:
                tied = _tied_head(self.policy.core, state) if self.policy.ties_head else {}
                self.policy.save(path, {key: value for key, value in state.items() if key not in tied})
                _add_head(path, tied)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(path, ignore_errors=True)
            needed = sizes(path, sum(value.numel() * value.element_size() for value in state.values()))
            raise RolloutError(f"{path}: the weights for the server cannot be written: {error} ({needed})") from None

    def remove(self, written: WeightSet) -> None:
        """Remove a set that no server has to read again."""
        if self.ranks.rank == 0:
            shutil.rmtree(written.path, ignore_errors=True)


def _tied_head(core: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weight of a head that is the embedding's, by the head's name."""
    head, embedding = core.get_output_embeddings(), core.get_input_embeddings()
    names = {module: name for name, module in core.named_modules()}
    name, other = f"{names[head]}.weight", f"{names[embedding]}.weight"
    return {name: state[name if name in state else other]}


def _add_head(path: Path, head: Mapping[str, Tensor]) -> None:
    """Write a tied head in a file of its own. transformers leaves it out, but a server may have a head apart from its
    embedding; one that ties them skips it."""
    from safetensors.torch import save_file

    if not head:
        return
    save_file({name: weight.contiguous() for name, weight in head.items()}, path / HEAD, metadata={"format": "pt"})
    index = path / INDEX
    if index.is_file():  # of several files, only those in the index are read
        listed = json.loads(index.read_text())
        listed["weight_map"] |= dict.fromkeys(head, HEAD)
        index.write_text(json.dumps(listed))


def _check_adapter(policy: Any) -> None:
    """Raise ``ValueError`` unless vLLM can serve the adapter: it must be on the language model's layers only, and no
    module may be trained in full."""
    if not policy.family.served_lora:
        raise ValueError(
            f"rollout.backend vllm: vLLM serves no LoRA adapters for model type {policy.family.model_type}; remove "
            "model.lora, or use rollout.backend: local"
        )
    names: Sequence[str] = [name for name, _ in policy.peft.named_parameters()]
    if any(".modules_to_save." in name for name in names):
        raise ValueError("rollout.backend vllm: only adapters can be served; leave model.lora.also_train empty")
    towers = [name for name in names if ".lora_" in name and policy.family.part_of(name) != "language"]
    if towers:
        raise ValueError(
            f"rollout.backend vllm: only adapters of the language model can be served, and {towers[0]} is not one; "
            "change model.lora.targets"
        )
