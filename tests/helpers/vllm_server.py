"""A local server with the part of vLLM's HTTP API that fastrl uses, over its own tiny model. It renders, tokenises
and preprocesses requests, loads weights from disk on request, and answers with them, so answers with the trainer's
log-probs can only come from the pushed weights."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fastrl.batch import Completion, Prompt, PromptGroup, pack_row
from fastrl.data.records import Record
from fastrl.models.load import load_policy
from fastrl.rollout import Generator, Sampling

Act = Callable[["Handler", dict[str, Any]], bool]  # True: it has answered (or hung up) in place of the server


class VllmServer(ThreadingHTTPServer):
    """``script`` is processed first, one entry per request; ``mode`` is vLLM's --logprobs-mode."""

    daemon_threads = True
    working = threading.Lock()  # of all servers: transformers loads one model at a time

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.base = load_policy(folder)
        self.origin = folder
        self.adapters: dict[str, Any] = {}
        self.models = ["tiny"]
        self.mode, self.paused = "raw_logprobs", False
        self.keeps = ""  # what stays as it is when new weights are loaded: "all", or "head"
        self.script: list[Act] = []
        self.change: Callable[[dict[str, Any]], object] = lambda reply: None  # changes a reply before it is sent
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def asked(self, path: str) -> list[dict[str, Any]]:
        return [body for called, body in self.calls if called == path]

    def restart(self) -> None:
        """As a process that was killed and started again: its first weights, no adapters."""
        self.base, self.adapters, self.paused = load_policy(self.origin), {}, False

    def handle_error(self, request: Any, client_address: Any) -> None:  # cut connections are part of the tests
        pass


class Handler(BaseHTTPRequestHandler):
    server: VllmServer

    def do_GET(self) -> None:
        self.serve({})

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.serve(json.loads(self.rfile.read(length) or b"{}"))

    def serve(self, body: dict[str, Any]) -> None:
        server = self.server
        with server.lock:
            server.calls.append((self.path, body))
            act = server.script.pop(0) if server.script else None
        if act is not None and act(self, body):
            return
        with server.working:
            routes = {
                "/v1/models": self.models,
                "/v1/chat/completions": self.chat,
                "/v1/load_lora_adapter": self.load_adapter,
                "/v1/unload_lora_adapter": self.unload_adapter,
                "/pause?mode=wait": self.pause,
                "/collective_rpc": self.rpc,
                "/resume": self.resume,
            }
            routes.get(self.path, lambda _: self.reply(404, {"detail": "Not Found"}))(body)

    def models(self, body: dict[str, Any]) -> None:
        listed: list[dict[str, Any]] = [{"id": name, "parent": None} for name in self.server.models]
        listed += [{"id": name, "parent": "tiny"} for name in self.server.adapters]
        self.reply(200, {"object": "list", "data": listed})

    def load_adapter(self, body: dict[str, Any]) -> None:
        from peft import PeftModel

        if body["lora_name"] in self.server.adapters:
            return self.reply(400, {"error": {"message": "has already been loaded"}})
        if not (Path(body["lora_path"]) / "adapter_config.json").is_file():
            return self.reply(404, {"error": {"message": "No adapter found"}})
        policy = load_policy(self.server.origin)
        if self.server.keeps != "all":
            PeftModel.from_pretrained(policy.core, body["lora_path"]).eval()
        self.server.adapters[body["lora_name"]] = policy
        return self.reply(200, "Success")

    def unload_adapter(self, body: dict[str, Any]) -> None:
        found = self.server.adapters.pop(body["lora_name"], None)
        self.reply(200 if found is not None else 404, "Success")

    def pause(self, body: dict[str, Any]) -> None:
        self.server.paused = True
        self.reply(200, {"status": "paused"})

    def rpc(self, body: dict[str, Any]) -> None:
        assert self.server.paused, "weights changed while requests may run"
        assert body["method"] == "reload_weights"
        path, old = Path(body["kwargs"]["weights_path"]), self.server.base
        if self.server.keeps != "all":
            self.server.base = load_policy(path)
        if self.server.keeps == "head":
            self.server.base.core.set_output_embeddings(old.core.get_output_embeddings())
        self.reply(200, {"results": [None]})

    def resume(self, body: dict[str, Any]) -> None:
        self.server.paused = False
        self.reply(200, {"status": "resumed"})

    def chat(self, body: dict[str, Any]) -> None:
        server = self.server
        if server.paused:
            return self.reply(503, "paused")
        policy = {**dict.fromkeys(server.models, server.base), **server.adapters}.get(body["model"])
        if policy is None:
            return self.reply(404, {"error": {"message": f"The model `{body['model']}` does not exist."}})
        prompt, _ = policy.encode(_record(body["messages"]))
        if allowed := body.get("allowed_token_ids"):
            logp = 0.0 if server.mode == "processed_logprobs" else -7.0
            answers = [([allowed[0]], [logp], "length")]
        else:
            sampling = Sampling(
                body["n"], body["max_completion_tokens"], body["temperature"], body["top_p"], body["top_k"]
            )
            rng = None if body["seed"] is None else torch.Generator().manual_seed(body["seed"])
            ((*rows,),) = Generator(policy).generate([prompt], sampling, rng)
            answers = [
                (r.token_ids.tolist(), self.logprobs(policy, prompt, r, sampling), "stop" if r.finished else "length")
                for r in rows
            ]
        reply = {
            "object": "chat.completion",
            "model": body["model"],
            "prompt_token_ids": prompt.token_ids.tolist(),
            "choices": [
                {
                    "index": n,
                    "finish_reason": why,
                    "token_ids": ids,
                    "message": {"role": "assistant", "content": "not read"},
                    "logprobs": {"content": [{"token": "not read", "logprob": value} for value in logps]},
                }
                for n, (ids, logps, why) in reversed(list(enumerate(answers)))
            ],
        }
        if not body.get("allowed_token_ids"):
            server.change(reply)
        return self.reply(200, reply)

    def logprobs(self, policy: Any, prompt: Prompt, answer: Completion, sampling: Sampling) -> list[float]:
        """Those of the model, or of the distribution that was drawn from."""
        if self.server.mode != "processed_logprobs":
            assert answer.sampler_logp is not None
            return answer.sampler_logp.tolist()
        with torch.no_grad():
            hidden = policy.hidden(pack_row([PromptGroup(prompt, [answer])]))
            logits = (hidden @ policy.head_weight.T).float()
        logits[:, list(policy.suppressed_token_ids)] -= 100
        ordered, tokens = (logits / sampling.temperature).log_softmax(-1).sort(-1, descending=True)
        if sampling.top_k:
            ordered[:, sampling.top_k :] = -torch.inf
        before = ordered.log_softmax(-1).exp().cumsum(-1).roll(1, -1)  # the probability of all that are more likely
        before[:, 0] = 0
        drawn_from = ordered.masked_fill(before >= sampling.top_p, -torch.inf).log_softmax(-1)
        return drawn_from[tokens == answer.token_ids[:, None]].tolist()

    def reply(self, code: int, value: Any) -> None:
        data = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _record(messages: list[dict[str, Any]]) -> Record:
    """The content of a request's messages, with the pictures decoded from their data URLs."""
    images, plain = [], []
    for message in messages:
        parts = message["content"]
        if not isinstance(parts, str):
            for n, part in enumerate(parts):
                if part["type"] == "image_url":
                    data = base64.b64decode(part["image_url"]["url"].partition("base64,")[2])
                    images.append(Image.open(io.BytesIO(data)).convert("RGB"))
                    parts = [*parts[:n], {"type": "image"}, *parts[n + 1 :]]
        plain.append({"role": message["role"], "content": parts})
    return Record("sent", "qa", tuple(images), tuple(plain), {})
