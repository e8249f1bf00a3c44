"""The trainer's weights on a vLLM server: written into a folder that both can read, then loaded on request over HTTP.

LoRA: each set of weights is a new adapter, which requests name as their model, so no other weights can answer.
Full weights: the server is paused, which empties its caches, loads the folder in place, and resumes.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastrl.data.disk import sizes
from fastrl.http import Refused, TransientError


class RolloutError(RuntimeError):
    """The server or its answers cannot be used. The trainer's weights are unchanged."""


class ServerWeights:
    """Tracks which weights a server has, and pushes the current ones.

    Args:
        policy: its weights are pushed: the adapter under LoRA, else all of them.
        url: the server's address.
        call: sends one request: ``call(path, body)`` is a POST, ``call(path, None)`` a GET. Returns the reply, parsed
            if it is JSON.
        folder: where weights are written, one set at a time: the same path on both machines.
        updates: the number of optimizer updates made so far; weights are pushed when it has changed.

    Raises:
        ValueError: adapters that vLLM does not serve (on the vision tower, or modules trained whole).
    """

    def __init__(
        self,
        policy: Any,
        url: str,
        call: Callable[[str, dict[str, Any] | None], Any],
        *,
        folder: Path,
        updates: Callable[[], int],
    ) -> None:
        if policy.peft is not None:
            _check_adapter(policy)
        self.policy, self.url, self._call = policy, url, call
        self.folder, self._updates = folder.absolute(), updates
        self.model = ""  # the server's name for its base model; known after the first sync
        self.name = ""  # name of the weights it was given; under LoRA, of the adapter
        self._run = f"fastrl-{secrets.token_hex(4)}"  # makes names that no other run uses
        self._pushes = 0
        self._held: int | None = None  # number of updates at the last push; None: the server may have any weights

    @property
    def adapter(self) -> bool:
        return self.policy.peft is not None

    @property
    def asked_for(self) -> str:
        """The model name that requests must give."""
        return self.name if self.adapter else self.model

    def mark_stale(self) -> None:
        """Note that the server may no longer have the pushed weights: the next :meth:`sync` pushes them again."""
        self._held = None

    def sync(self) -> None:
        """Push the current weights unless the server is known to have them.

        Raises:
            TransientError: a transient error; the weights do not count as pushed.
            RolloutError: there is no vLLM server, or it serves several models, or it refuses the weights.
        """
        updates = self._updates()
        if self._held == updates:
            return
        self._held = None
        self._find_model()
        self._pushes += 1
        name, old = f"{self._run}-{updates}-{self._pushes}", self.name
        path = self.folder / name
        try:
            self._push(name, path)
        except TransientError as error:
            shutil.rmtree(path, ignore_errors=True)
            raise type(error)(f"pushing the weights after {updates} updates: {error}", error.pause) from None
        except Refused as error:
            shutil.rmtree(path, ignore_errors=True)
            raise RolloutError(f"pushing the weights after {updates} updates: {error}. {self._advice}") from None
        self._held, self.name = updates, name
        if old:
            self._drop(old)

    def close(self) -> None:
        """Remove what was written for the server, and its adapter."""
        if self.name:
            self._drop(self.name)
        self._held, self.name = None, ""

    def _push(self, name: str, path: Path) -> None:
        self._write(path)
        if self.adapter:
            self._call("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)})
            return
        self._call("/pause?mode=wait", {})
        # If this fails the server stays paused: it may hold a mixture of old and new weights.
        self._call("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(path)}})
        self._call("/resume", {})

    def _write(self, path: Path) -> None:
        from safetensors import SafetensorError

        weights = [p for p in self.policy.core.parameters() if p.requires_grad or not self.adapter]
        try:
            path.mkdir(parents=True, exist_ok=True)
            if self.adapter:
                self.policy.peft.save_pretrained(path)
            else:
                self.policy.save(path)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(path, ignore_errors=True)
            needed = sizes(path, sum(p.numel() * p.element_size() for p in weights))
            raise RolloutError(f"{path}: the weights for the server cannot be written: {error} ({needed})") from None

    def _drop(self, name: str) -> None:
        """Remove weights that are no longer requested; errors are ignored."""
        if self.adapter:
            with suppress(TransientError, Refused):
                self._call("/v1/unload_lora_adapter", {"lora_name": name})
        shutil.rmtree(self.folder / name, ignore_errors=True)

    @property
    def _advice(self) -> str:
        needed = "VLLM_SERVER_DEV_MODE=1"
        if self.adapter:
            needed = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, --enable-lora and a --max-lora-rank that is high enough"
        return f"The server needs {needed}, and to see the folder {self.folder} (rollout.shared)"

    def _find_model(self) -> None:
        """The name of the one base model that the server serves."""
        if self.model:
            return
        try:
            listed = self._call("/v1/models", None)
            names = [str(model["id"]) for model in listed["data"] if not model.get("parent")]
        except Refused as error:
            raise RolloutError(f"no vLLM server at {self.url}: {error}") from None
        except (TypeError, KeyError, AttributeError):
            raise RolloutError(f"no vLLM server at {self.url}: /v1/models lists no models") from None
        if len(names) != 1:
            served = ", ".join(names) or "nothing"
            raise RolloutError(f"the vLLM server at {self.url} serves {served}: expected one base model")
        self.model = names[0]


def _check_adapter(policy: Any) -> None:
    """Raise ``ValueError`` unless vLLM can serve the adapter: it must be on the language model's layers only, and no
    module may be trained in full."""
    if not policy.family.served_lora:
        raise ValueError(
            f"rollout.backend vllm: vLLM serves no LoRA adapters for model type {policy.family.model_type}; remove "
            "model.lora, or use rollout.backend: local"
        )
    names = [name for name, _ in policy.peft.named_parameters()]
    if any(".modules_to_save." in name for name in names):
        raise ValueError("rollout.backend vllm: only adapters can be served; leave model.lora.also_train empty")
    towers = [name for name in names if ".lora_" in name and policy.family.part_of(name) != "language"]
    if towers:
        raise ValueError(
            f"rollout.backend vllm: only adapters of the language model can be served, and {towers[0]} is not one; "
            "change model.lora.targets"
        )
