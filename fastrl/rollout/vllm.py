"""``VllmGenerator``: samples completions on a vLLM server that receives the trainer's weights; same calls as
``Generator``.

Written against vLLM's documented HTTP API and tested against a server that imitates it; not run against vLLM itself.
``docs/vllm.md`` explains how to start the server.

A prompt is sent as a chat completion request: its messages, and each image as a PNG of its resized pixels, whose size
the server's preprocessing does not change. The server applies the chat template and tokenises by itself, so every reply
is checked: the prompt ids it reports must equal ours. ``vllm_weights`` transfers the weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch

from fastrl.batch import Completion, Prompt
from fastrl.clock import Clock
from fastrl.data.pictures import data_url
from fastrl.http import Refused, ResponseTimeout, Stopped, TransientError, Transport, check_url
from fastrl.rollout.generator import copy_completion, rows_per_prompt
from fastrl.rollout.sampler import Sampling
from fastrl.rollout.vllm_weights import RolloutError, ServerWeights

MAX_BYTES = 1 << 28  # largest reply, in bytes; a token with its log-prob takes about 100
FORBID = -100.0  # the lowest bias the API accepts: multiplies a token's odds by e^-100


class VllmGenerator:
    """Samples completions from the policy's current weights, on a vLLM server.

    Args:
        policy: its weights are pushed to the server, and its tokenizer decodes the replies.
        server: address of the server, with or without ``/v1``.
        folder: where weights are written for the server to read: the same path on both machines.
        updates: the number of optimizer updates made so far; weights are pushed when it has changed.
        timeout: seconds for one request: all completions of a prompt, or one loading of weights. A request that takes
            longer ends the run and is not retried.
        retries: further attempts after other, transient errors.
        concurrency: requests in flight at once (the server batches them).
        clock: records the time of the phases ``sync`` (weights) and ``decode``.
        sleep: waits between attempts, for tests.

    Raises:
        ValueError: not an http address, numbers out of range, or adapters that vLLM does not serve.
    """

    def __init__(
        self,
        policy: Any,
        server: str,
        *,
        folder: Path,
        updates: Callable[[], int],
        timeout: float = 600.0,
        retries: int = 4,
        concurrency: int = 64,
        clock: Clock | None = None,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        self.url = check_url(server, "vLLM server", "http://localhost:8000").removesuffix("/v1").rstrip("/")
        self.policy = policy
        self.phase = clock.phase if clock is not None else nullcontext
        self.weights = ServerWeights(policy, self.url, self._call, folder=folder, updates=updates)
        self._transport = Transport(
            "the vLLM server",
            timeout=timeout,
            retries=retries,
            pause=1.0,
            concurrency=concurrency,
            max_bytes=MAX_BYTES,
            key_env="VLLM_API_KEY",
            retry_timeouts=False,
            sleep=sleep,
        )
        self._probed: set[bool] = set()  # kinds of log-probs that the server has been checked to report

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, rng: torch.Generator | None = None
    ) -> list[list[Completion]]:
        """Sample ``sampling.n`` completions of each prompt; see ``Generator.generate``.

        One seed per prompt is drawn from ``rng``. Equal seeds give equal tokens only if the server's arithmetic does
        not depend on what else is in its batch.

        Returns:
            The same as ``Generator.generate``. Suppressed tokens get a bias of −100, so they are practically never
            drawn. ``sampler_logp`` is the server's. At temperature 1 and for greedy completions it is over the full
            vocabulary, before bias and truncation, like the trainer's. At other temperatures vLLM reports either the
            log-probs at temperature 1 or those of the distribution it drew from. The latter are used here: they leave
            out suppressed tokens (and those that top_p or top_k cut off), so they are slightly above the trainer's. The
            metric for the sampler gap shows this and any other difference in what vLLM computes.

        Raises:
            ValueError: a prompt has no messages, or a server would tokenise it differently; or ``rng`` is missing.
            RolloutError: there is no server, or it refused the weights, tokenised a prompt differently, reports
                log-probs of the wrong kind, or returned unusable answers.
        """
        seeds = _seeds(len(prompts), sampling, rng)
        asked = [(prompt, self._request(prompt, sampling, seed)) for prompt, seed in zip(prompts, seeds, strict=True)]
        if not asked:
            return []
        again = self._transport.retrying
        try:
            if self.weights.adapter:  # each answer names its weights, so failed requests can be retried one by one
                again(self._sync)
                rows = self._ask(asked, sampling, again)
            else:
                rows = again(lambda: self._attempt(asked, sampling))
        except ResponseTimeout as error:
            raise RolloutError(
                f"waited for the vLLM server at {self.url}: {error}. Is it frozen? If not, raise rollout.server_timeout"
            ) from None
        except TransientError as error:
            raise RolloutError(
                f"the vLLM server at {self.url} did not answer, tried {self._transport.times}; last: {error}"
            ) from None
        except (Refused, Stopped) as error:
            raise RolloutError(str(error)) from None
        if sampling.greedy:  # the API refuses n > 1 at temperature 0, where all completions are equal
            return [[copy_completion(row) for _ in range(sampling.n)] for (row,) in rows]
        return rows

    def session(self, prompts: Prompt | Sequence[Prompt]) -> NoReturn:
        """Raises ``RolloutError``: the server does not keep a dialogue's keys and values between turns."""
        raise RolloutError("rollout.backend: vllm has no sessions (dialogues in turns); use rollout.backend: local")

    def close(self) -> None:
        """Remove the weights that were written for the server."""
        self.weights.close()

    def _sync(self) -> None:
        with self.phase("sync"):
            self.weights.sync()

    def _attempt(self, asked: Sequence[tuple[Prompt, dict[str, Any]]], sampling: Sampling) -> list[list[Completion]]:
        """Push the full weights, then request all answers. An error may mean that the server was restarted with the
        weights of its own folder: all answers are discarded, and the next attempt pushes the weights again."""
        self._sync()
        try:
            return self._ask(asked, sampling, lambda work: work())
        except TransientError:
            self.weights.mark_stale()
            raise

    def _ask(
        self,
        asked: Sequence[tuple[Prompt, dict[str, Any]]],
        sampling: Sampling,
        again: Callable[[Callable[[], Any]], Any],
    ) -> list[list[Completion]]:
        def one(item: tuple[Prompt, dict[str, Any]]) -> list[Completion]:
            return again(lambda: self._answers(self._chat(*item), sampling))

        with self.phase("decode"):
            drawn = not sampling.greedy and sampling.temperature != 1
            if drawn not in self._probed:
                again(lambda: self._probe(*asked[0], drawn))
            return self._transport.map(one, asked)

    def _request(self, prompt: Prompt, sampling: Sampling, seed: int | None) -> dict[str, Any]:
        """A chat completion request without its model. It sets everything that a model folder's generation config could
        change on the server (penalties, truncation, stop tokens)."""
        generate, add_bos = self._rendering(prompt)
        images = iter(prompt.images)

        def content(parts: str | Sequence[dict[str, Any]]) -> str | list[dict[str, Any]]:
            if isinstance(parts, str):
                return parts
            return [
                {"type": "image_url", "image_url": {"url": data_url(self.policy.preprocessor.picture(next(images)))}}
                if part["type"] == "image"
                else part
                for part in parts
            ]

        options = dict(self.policy.family.template_options)
        return {
            **({"chat_template_kwargs": options} if options else {}),
            "messages": [{**message, "content": content(message["content"])} for message in prompt.messages],
            "add_generation_prompt": generate,
            "add_special_tokens": add_bos,
            "n": rows_per_prompt(sampling),
            "max_completion_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": seed,
            "ignore_eos": True,  # the server's idea of EOS; the policy's follow
            "stop_token_ids": list(self.policy.eos_token_ids),
            "logit_bias": {str(token): FORBID for token in self.policy.suppressed_token_ids},
            "logprobs": True,
            "top_logprobs": 0,
            "return_token_ids": True,
        }

    def _rendering(self, prompt: Prompt) -> tuple[bool, bool]:
        """Whether the server must add a generation prompt, and whether its tokenizer must add a BOS token that the chat
        template does not write.

        Raises:
            ValueError: a server would not tokenise the prompt as the policy does: it has no messages, it has more
                images than vLLM accepts for this family, or the chat template alone renders it differently.
        """
        family, tokenizer = self.policy.family, self.policy.tokenizer
        if not prompt.messages:
            raise ValueError("a prompt without messages cannot be sent to a vLLM server: encode it from a record")
        limit = family.served_images
        if limit is not None and len(prompt.images) > limit:
            raise ValueError(
                f"rollout.backend vllm: a prompt has {len(prompt.images)} images; for model type {family.model_type} "
                f"at most {limit} can be sent to a vLLM server; use rollout.backend: local"
            )
        generate = prompt.messages[-1]["role"] != "assistant"
        text = tokenizer.apply_chat_template(
            list(prompt.messages), tokenize=False, add_generation_prompt=generate, **family.template_options
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        add_bos = family.lacks_bos(tokenizer, ids)
        ids = torch.tensor([tokenizer.bos_token_id] * add_bos + ids, dtype=torch.int64)
        if not torch.equal(family.lay_out(ids, prompt.images).ids, prompt.token_ids):
            raise ValueError(
                f"rollout.backend vllm: the chat template of this {family.model_type} model renders a prompt "
                "differently from the trainer, which keeps each assistant turn as it was generated, end-of-turn token "
                "included; use rollout.backend: local for dialogues"
            )
        return generate, add_bos

    def _chat(self, prompt: Prompt, request: dict[str, Any]) -> list[dict[str, Any]]:
        """The choices of one reply, ordered by index, checked to come from the requested weights and our prompt ids."""
        # The salt keeps the server from reusing a prefix that it cached with other weights.
        name = self.weights.asked_for
        reply = self._call("/v1/chat/completions", {"model": name, "cache_salt": self.weights.name, **request})
        try:
            choices = sorted(reply["choices"], key=lambda choice: choice["index"])
            read, model = reply.get("prompt_token_ids"), reply.get("model")
        except (TypeError, KeyError, AttributeError):
            raise TransientError(f"a response that is not a chat completion: {str(reply)[:80]!r}") from None
        problem = ""
        if model != name:
            problem = f"answered with {model!r}, not with the requested weights, {name!r}"
        elif not isinstance(read, list):
            problem = "returns no token ids: it is too old to support return_token_ids"
        elif read != prompt.token_ids.tolist():
            problem = self._misread(read, prompt)
        elif len(choices) != request["n"]:
            problem = f"gave {len(choices)} answers where {request['n']} were requested"
        if problem:
            raise RolloutError(f"the vLLM server at {self.url} {problem}")
        return choices

    def _answers(self, choices: Sequence[dict[str, Any]], sampling: Sampling) -> list[Completion]:
        """Completions of a reply's choices; the text is decoded here from the token ids."""
        policy, found = self.policy, []
        for choice in choices:
            ids, logps = _tokens(choice)
            if choice.get("finish_reason") == "abort":
                raise TransientError("the server gave up an answer midway")
            ends = [token in policy.eos_token_ids for token in ids]
            problem = ""
            if any(ends[:-1]) or len(ids) > sampling.max_new_tokens:
                problem = "goes on after its end of turn, or after max_new_tokens"
            elif not ends[-1] and len(ids) < sampling.max_new_tokens:
                problem = f"ends after {len(ids)} tokens without an end of turn"
            elif forbidden := set(ids) & set(policy.suppressed_token_ids):
                problem = f"contains tokens that logit_bias forbids: {sorted(forbidden)}"
            elif not all(math.isfinite(value) and -1000 < value < 1e-3 for value in logps):  # vLLM sends -inf as -9999
                problem = "has log-probs that are not finite (have the weights diverged?)"
            if problem:
                raise RolloutError(f"the vLLM server at {self.url}: an answer {problem}")
            tokens = torch.tensor(ids, dtype=torch.int64)
            logp = torch.tensor(logps, dtype=torch.float32)
            found.append(Completion(tokens, text=policy.decode(tokens), finished=ends[-1], sampler_logp=logp))
        return found

    def _probe(self, prompt: Prompt, request: dict[str, Any], drawn: bool) -> None:
        """Check which log-probs the server reports. A suppressed token is made the only allowed one: its log-prob is 0
        in the distribution that is sampled from, and very low in the model's."""
        (only, *_) = self.policy.suppressed_token_ids
        probe = request | {"n": 1, "max_completion_tokens": 1, "allowed_token_ids": [only], "logit_bias": {}}
        ids, (logp, *_) = _tokens(self._chat(prompt, probe)[0])
        if ids != [only]:
            raise RolloutError(f"the vLLM server at {self.url} drew tokens {ids} where only {only} was allowed")
        if (logp > -1e-6) != drawn:
            got, needed = ("raw", "processed") if drawn else ("processed", "raw")
            raise RolloutError(
                f"the vLLM server at {self.url} reports {got} log-probs; at temperature {request['temperature']} they "
                f"must be {needed}: start it with --logprobs-mode {needed}_logprobs"
            )
        self._probed.add(drawn)

    def _misread(self, read: list[int], prompt: Prompt) -> str:
        ours, image = prompt.token_ids.tolist(), self.policy.family.image_token
        at = next((i for i, (a, b) in enumerate(zip(read, ours, strict=False)) if a != b), min(len(read), len(ours)))

        def shown(ids: list[int]) -> str:
            near = ids[max(0, at - 2) : at + 6]
            return f"{near} {self.policy.tokenizer.decode(near)!r}"

        return (
            f"(it serves {self.weights.model}) reads a prompt as {len(read)} tokens, {read.count(image)} of images; "
            f"this policy reads it as {len(ours)} tokens, {ours.count(image)} of images. From token {at} on, the "
            f"server: {shown(read)}, this policy: {shown(ours)}. The server must serve the folder that the policy was "
            "loaded from, with the same tokenizer, chat template and image limits"
        )

    def _call(self, path: str, body: dict[str, Any] | None) -> Any:
        """The reply parsed as JSON, or as text if it is not JSON (control endpoints reply with a line, or nothing)."""
        reply = self._transport.send(self.url + path, None if body is None else json.dumps(body).encode())
        try:
            return json.loads(reply)
        except (ValueError, RecursionError):
            return reply.decode("utf-8", "replace")


def _tokens(choice: dict[str, Any]) -> tuple[list[int], list[float]]:
    """Token ids and log-probs of a choice. Raises ``TransientError`` if any is missing."""
    try:
        ids = [int(token) for token in choice["token_ids"]]
        logps = [float(entry["logprob"]) for entry in choice["logprobs"]["content"]]
    except (TypeError, KeyError, ValueError):
        ids, logps = [], []
    if not ids or len(ids) != len(logps):
        raise TransientError(f"an answer without a log-prob for each of its token ids: {str(choice)[:80]!r}")
    return ids, logps


def _seeds(prompts: int, sampling: Sampling, rng: torch.Generator | None) -> list[int | None]:
    if sampling.greedy:
        return [None] * prompts
    if rng is None:
        raise ValueError("rng: a torch.Generator is needed unless the temperature is 0")
    return torch.randint(0, 2**31, (prompts,), generator=rng, device=rng.device).tolist()
