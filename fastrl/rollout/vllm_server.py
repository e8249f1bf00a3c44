"""One vLLM server: its address, which of the trainer's weights it has, and how it is given others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from fastrl.http import Refused, TransientError, Transport
from fastrl.rollout.vllm_weights import RolloutError, WeightSet

LOADED = "already been loaded"  # vLLM's answer (400) to an adapter's name that it has


class Server:
    """A vLLM server.

    Attributes:
        url: its address, without ``/v1``.
        model: its name for its base model; known after the first load.
        holds: name of the set of weights that it has; empty: it may have any.
        frozen: a request to it ran into the timeout, so it is not asked again.
        asked: the requests to it that are in flight.
        trouble: its last error was reported, and it has taken no weights since.
        probed: kinds of log-probs that it has been checked to report.
    """

    def __init__(self, url: str, transport: Transport, *, adapter: bool, folder: str) -> None:
        self.url, self._transport, self._adapter, self._folder = url, transport, adapter, folder
        self.model = self.holds = ""
        self.frozen = self.trouble = False
        self.asked = 0
        self.probed: set[bool] = set()

    @property
    def asked_for(self) -> str:
        """The model name that requests must give."""
        return self.holds if self._adapter else self.model

    def load(self, wanted: WeightSet) -> None:
        """Load weights, unless it has them.

        Raises:
            TransientError: a transient error; it may have any weights.
            RolloutError: there is no vLLM server, or it serves several models, or it refuses the weights.
        """
        if self.holds == wanted.name:
            return
        self.holds = ""
        if not self.model:
            self.model = self._base_model()
        try:
            self._load(wanted)
        except TransientError as error:
            what = f"pushing the weights after {wanted.updates} updates: {error}"
            raise type(error)(what, error.pause) from None
        except Refused as error:
            raise RolloutError(f"pushing the weights after {wanted.updates} updates: {error}. {self._advice}") from None
        self.holds = wanted.name

    def unload(self, written: WeightSet) -> None:
        """Drop an adapter that is no longer requested; errors are ignored."""
        if self._adapter and not self.frozen:
            with suppress(TransientError, Refused):
                self.call("/v1/unload_lora_adapter", {"lora_name": written.name})

    def call(self, path: str, body: dict[str, Any] | None) -> Any:
        """The reply to one request, a POST or (no ``body``) a GET: parsed as JSON, or as text if it is not JSON
        (control endpoints reply with a line, or nothing)."""
        reply = self._transport.send(self.url + path, None if body is None else json.dumps(body).encode())
        try:
            return json.loads(reply)
        except (ValueError, RecursionError):
            return reply.decode("utf-8", "replace")

    def _load(self, wanted: WeightSet) -> None:
        if self._adapter:
            try:
                self.call("/v1/load_lora_adapter", {"lora_name": wanted.name, "lora_path": str(wanted.path)})
            except Refused as error:  # the reply to an earlier request was lost, or another rank has loaded it
                if LOADED not in str(error):
                    raise
            return
        self.call("/pause?mode=wait", {})
        # If this fails the server stays paused: it may hold a mixture of old and new weights.
        self.call("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(wanted.path)}})
        self.call("/resume", {})

    @property
    def _advice(self) -> str:
        needed = "VLLM_SERVER_DEV_MODE=1"
        if self._adapter:
            needed = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, --enable-lora and a --max-lora-rank that is high enough"
        return f"The server needs {needed}, and to see the folder {self._folder} (rollout.shared)"

    def _base_model(self) -> str:
        """The name of the one base model that the server serves."""
        try:
            listed = self.call("/v1/models", None)
            names = [str(model["id"]) for model in listed["data"] if not model.get("parent")]
        except Refused as error:
            raise RolloutError(f"no vLLM server at {self.url}: {error}") from None
        except (TypeError, KeyError, AttributeError):
            raise RolloutError(f"no vLLM server at {self.url}: /v1/models lists no models") from None
        if len(names) != 1:
            served = ", ".join(names) or "nothing"
            raise RolloutError(f"the vLLM server at {self.url} serves {served}: expected one base model")
        return names[0]


def least_busy(servers: Sequence[Server], first: int) -> Server:
    """The server with the fewest requests in flight; of several, the first from place ``first`` on."""
    order = range(first, first + len(servers))
    return min((servers[place % len(servers)] for place in order), key=lambda server: server.asked)
