"""``VllmGenerator``: samples completions on vLLM servers that receive the trainer's weights; same calls as
``Generator``.

``vllm_weights`` writes the weights, ``vllm_server`` has a server load them, ``vllm_requests`` turns prompts into
requests and replies into completions. ``docs/vllm.md`` explains how to start the servers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from fastrl.batch import Completion, Prompt
from fastrl.clock import Clock
from fastrl.http import Refused, ResponseTimeout, Stopped, TransientError, Transport, check_url
from fastrl.rollout.generator import copy_completion
from fastrl.rollout.sampler import Sampling
from fastrl.rollout.vllm_requests import chat_request, choices_of, completions_of, tokens_of
from fastrl.rollout.vllm_server import Server, least_busy
from fastrl.rollout.vllm_weights import Alone, Ranks, RolloutError, WeightSet, WeightsFolder

MAX_BYTES = 1 << 28  # largest reply, in bytes; a token with its log-prob takes about 100
MISSING = 404  # the status for an adapter that a server does not have


class Asked(NamedTuple):
    """A prompt and its request, without the model's name."""

    prompt: Prompt
    request: dict[str, Any]


class Result(NamedTuple):
    """Who was asked, and the answers or why there are none."""

    server: Server | None
    answers: list[Completion]
    error: TransientError | None = None


class VllmGenerator:
    """Samples completions from the policy's current weights, on one or several vLLM servers.

    Args:
        policy: its weights are pushed to the servers, and its tokenizer decodes the replies.
        server: address of the server, with or without ``/v1``; or those of several, which serve the same folder and
            between which prompts are spread, each to the one with the fewest requests in flight.
        folder: where weights are written for the servers to read: the same path on all machines.
        updates: the number of optimizer updates made so far; weights are pushed when it has changed.
        timeout: seconds for one request: all completions of a prompt, or one loading of weights. A request that takes
            longer is not retried: its server is not used again, and if it was the last one the run ends.
        retries: further attempts after other, transient errors.
        concurrency: requests in flight at a server, from all ranks together (it batches them).
        clock: records the time of the phases ``sync`` (weights) and ``decode``.
        sleep: waits between attempts, for tests.
        ranks: the run's processes, each of which makes one of these. The first one pushes the weights.

    Attributes:
        notes: what happened to servers since the last :meth:`take_notes`.

    Raises:
        ValueError: not an http address, one twice, numbers out of range, or adapters that vLLM does not serve.
    """

    def __init__(
        self,
        policy: Any,
        server: str | Sequence[str],
        *,
        folder: Path,
        updates: Callable[[], int],
        timeout: float = 600.0,
        retries: int = 4,
        concurrency: int = 64,
        clock: Clock | None = None,
        sleep: Callable[[float], object] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        urls = server_urls(server)
        self.policy = policy
        self.phase = clock.phase if clock is not None else nullcontext
        self.ranks: Ranks = ranks if ranks is not None else Alone()
        self.weights = WeightsFolder(policy, folder, updates, self.ranks)
        self._updates = updates
        self._transport = Transport(
            "the vLLM server",
            timeout=timeout,
            retries=retries,
            pause=1.0,
            concurrency=max(len(urls), concurrency * len(urls) // self.ranks.world_size),
            max_bytes=MAX_BYTES,
            key_env="VLLM_API_KEY",
            retry_timeouts=False,
            sleep=sleep,
        )
        place = str(self.weights.folder)
        self.servers = [Server(url, self._transport, adapter=self.weights.adapter, folder=place) for url in urls]
        self.notes: list[str] = []
        self._set: WeightSet | None = None  # the weights that were pushed last
        self._lock = threading.Lock()

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, rng: torch.Generator | None = None
    ) -> list[list[Completion]]:
        """Sample ``sampling.n`` completions of each prompt; see ``Generator.generate``.

        One seed per prompt is drawn from ``rng``. Equal seeds give equal tokens only if the server's arithmetic does
        not depend on what else is in its batch.

        Returns:
            The same as ``Generator.generate``. Suppressed tokens get a bias of −100, so they are practically never
            drawn. ``sampler`` is the server's address and ``sampler_logp`` its log-probs. At temperature 1 and for
            greedy completions they are over the full vocabulary, before bias and truncation, like the trainer's. At
            other temperatures vLLM reports either the log-probs at temperature 1 or those of the distribution it drew
            from. The latter are used here: they leave out suppressed tokens (and those that top_p or top_k cut off), so
            they are slightly above the trainer's. The metric for the sampler gap shows this and any other difference in
            what vLLM computes.

        Raises:
            ValueError: a prompt has no messages, or a server would tokenise it differently; or ``rng`` is missing.
            RolloutError: there is no server, or it refused the weights, tokenised a prompt differently, reports
                log-probs of the wrong kind, or returned unusable answers.
        """
        seeds = _seeds(len(prompts), sampling, rng)
        asked = [
            Asked(prompt, chat_request(self.policy, prompt, sampling, seed))
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        if not asked:
            return []
        self.sync()
        found: dict[int, list[Completion]] = {}
        try:
            self._transport.retrying(lambda: self._round(asked, found, sampling))
        except (TransientError, Refused, Stopped) as error:
            raise self._explained(error) from None
        rows = [found[i] for i in range(len(asked))]
        if sampling.greedy:  # the API refuses n > 1 at temperature 0, where all completions are equal
            return [[copy_completion(row) for _ in range(sampling.n)] for (row,) in rows]
        return rows

    def sync(self) -> None:
        """Push the current weights, unless the servers were given them. With several ranks, all of them call this
        after every update, before any of them generates.

        Raises:
            RolloutError: on every rank, if no server has taken them.
        """
        old = self._set
        if old is not None and old.updates == self._updates():
            return
        with self.phase("sync"):
            error, self._set = "", None
            try:
                self._set = self.weights.write()
                if self.ranks.rank == 0:
                    self._transport.retrying(self._load)
            except (RolloutError, TransientError, Refused, Stopped) as failure:
                error = str(self._explained(failure))
            state = [(server.model, server.holds, server.frozen) for server in self.servers]
            error, self._set, state = self.ranks.gather((error, self._set, state))[0]
        if error:
            self._drop(self._set)
            self._set = old
            raise RolloutError(error)
        for server, (model, holds, frozen) in zip(self.servers, state, strict=True):
            server.model, server.holds, server.frozen = model, holds, frozen
        self._drop(old)

    def take_notes(self) -> list[str]:
        """What happened to servers since the last call."""
        taken, self.notes = self.notes, []
        return taken

    def session(self, prompts: Prompt | Sequence[Prompt]) -> NoReturn:
        """Raises ``RolloutError``: the server does not keep a dialogue's keys and values between turns."""
        raise RolloutError("rollout.backend: vllm has no sessions (dialogues in turns); use rollout.backend: local")

    def close(self) -> None:
        """Remove what was written for the servers, and their adapter."""
        self._drop(self._set)
        self._set = None

    def _drop(self, written: WeightSet | None) -> None:
        if written is not None and self.ranks.rank == 0:
            for server in self.servers:
                if server.holds:  # it can be reached
                    server.unload(written)
                if server.holds == written.name:
                    server.holds = ""
            self.weights.remove(written)

    def _load(self) -> list[Server]:
        """The servers that have the present weights, given to those that may have others. Raises ``TransientError`` if
        there are none."""
        wanted = self._set
        assert wanted is not None

        def one(server: Server) -> TransientError | None:
            if server.frozen:
                return ResponseTimeout(f"{server.url} took longer than {self._transport.timeout:g} seconds before")
            try:
                server.load(wanted)
            except TransientError as error:
                self._left_out(server, error)
                return error
            self._back(server)
            return None

        errors = self._transport.map(one, self.servers)
        ready = [server for server, error in zip(self.servers, errors, strict=True) if error is None]
        if not ready:
            raise self._first(errors)
        return ready

    def _round(self, asked: Sequence[Asked], found: dict[int, list[Completion]], sampling: Sampling) -> None:
        """Ask all prompts that have no answers in ``found``, once each. Raises ``TransientError`` if some are left.

        Full weights: an error may mean that a server was started again with the weights of its own folder. All that it
        answered in this round is discarded, and it gets the weights again. Under LoRA each answer names its weights.
        """
        with self.phase("sync"):
            ready = self._load()
        with self.phase("decode"):
            out: set[str] = set()  # servers that had an error in this round
            left = [i for i in range(len(asked)) if i not in found]
            drawn = not sampling.greedy and sampling.temperature != 1
            failures = [e for server in ready if (e := self._probed(server, asked[left[0]], drawn, out)) is not None]

            def one(place: int) -> Result:
                return self._ask(ready, asked[place], sampling, out)

            results = self._transport.map(one, left) if len(out) < len(ready) else []
        for place, (server, answers, error) in zip(left, results, strict=False):
            if error is not None:
                failures.append(error)
            elif server is not None and (self.weights.adapter or server.url not in out):
                found[place] = answers
        if len(found) < len(asked):
            raise self._first(failures)

    def _ask(self, ready: Sequence[Server], asked: Asked, sampling: Sampling, out: set[str]) -> Result:
        """One prompt's answers from the least busy server."""
        with self._lock:
            able = [server for server in ready if server.url not in out]
            if not able and self.weights.adapter:  # busy for a moment, or gone: each request finds out
                able = [server for server in ready if server.holds and not server.frozen]
            if not able:
                return Result(None, [], TransientError("no server is left"))
            server = least_busy(able, self.ranks.rank)
            server.asked += 1
        try:
            choices = self._chat(server, asked.prompt, asked.request)
            return Result(server, completions_of(self.policy, server.url, choices, sampling))
        except TransientError as error:
            self._failed(server, error, out)
            return Result(server, [], error)
        finally:
            with self._lock:
                server.asked -= 1

    def _failed(self, server: Server, error: TransientError, out: set[str]) -> None:
        with self._lock:
            out.add(server.url)
            if not self.weights.adapter:
                server.holds = ""
            self._left_out(server, error)

    def _left_out(self, server: Server, error: TransientError) -> None:
        if isinstance(error, ResponseTimeout):
            server.frozen = True
        if len(self.servers) > 1 and not server.trouble:
            rest = "not used again" if server.frozen else "its prompts go to the others until it takes weights again"
            self.notes.append(f"the vLLM server at {server.url}: {error}; {rest}")
            server.trouble = True

    def _back(self, server: Server) -> None:
        if server.trouble:
            server.trouble = False
            self.notes.append(f"the vLLM server at {server.url} has the weights again")

    def _chat(self, server: Server, prompt: Prompt, request: dict[str, Any]) -> list[dict[str, Any]]:
        """The choices of one reply (see ``choices_of``)."""
        name, wanted = server.asked_for, self._set
        assert wanted is not None
        # The salt keeps the server from reusing a prefix that it cached with other weights.
        body = {"model": name, "cache_salt": wanted.name, **request}
        try:
            reply = server.call("/v1/chat/completions", body)
        except Refused as error:
            if self.weights.adapter and error.status == MISSING:  # started again: it gets the adapter once more
                server.holds = ""
                raise TransientError(str(error)) from None
            raise
        return choices_of(self.policy, prompt, reply, url=server.url, base=server.model, name=name, count=request["n"])

    def _probed(self, server: Server, asked: Asked, drawn: bool, out: set[str]) -> TransientError | None:
        """Check once which log-probs a server reports. A suppressed token is made the only allowed one: its log-prob is
        0 in the distribution that is sampled from, and very low in the model's."""
        if drawn in server.probed:
            return None
        (only, *_) = self.policy.suppressed_token_ids
        probe = asked.request | {"n": 1, "max_completion_tokens": 1, "allowed_token_ids": [only], "logit_bias": {}}
        try:
            ids, (logp, *_) = tokens_of(self._chat(server, asked.prompt, probe)[0])
        except TransientError as error:
            self._failed(server, error, out)
            return error
        if ids != [only]:
            raise RolloutError(f"the vLLM server at {server.url} drew tokens {ids} where only {only} was allowed")
        if (logp > -1e-6) != drawn:
            got, needed = ("raw", "processed") if drawn else ("processed", "raw")
            raise RolloutError(
                f"the vLLM server at {server.url} reports {got} log-probs; at temperature {probe['temperature']} they "
                f"must be {needed}: start it with --logprobs-mode {needed}_logprobs"
            )
        server.probed.add(drawn)
        return None

    def _first(self, errors: Sequence[TransientError | None]) -> TransientError:
        """The error to report: one that another attempt may pass, if there is one or a server that was not frozen."""
        found = [error for error in errors if error is not None]
        error = next((error for error in found if not isinstance(error, ResponseTimeout)), found[0])
        return error if all(server.frozen for server in self.servers) else TransientError(str(error), error.pause)

    def _explained(self, error: Exception) -> RolloutError:
        """The error that ends the run."""
        several = len(self.servers) > 1
        who = f"the vLLM server{'s' if several else ''} at {', '.join(server.url for server in self.servers)}"
        if isinstance(error, ResponseTimeout):
            return RolloutError(f"waited for {who}: {error}. Is it frozen? If not, raise rollout.server_timeout")
        if isinstance(error, TransientError):
            return RolloutError(f"{who} did not answer, tried {self._transport.times}; last: {error}")
        return RolloutError(str(error))


def server_urls(server: str | Sequence[str]) -> list[str]:
    """The addresses of servers without ``/v1``. Raises ``ValueError`` if one is no http address, or given twice."""
    given = [server] if isinstance(server, str) else list(server)
    urls = [check_url(url, "vLLM server", "http://localhost:8000").removesuffix("/v1").rstrip("/") for url in given]
    if not urls or len(set(urls)) < len(urls):
        raise ValueError(f"vLLM servers: expected one or more different addresses, got {', '.join(given) or 'none'}")
    return urls


def _seeds(prompts: int, sampling: Sampling, rng: torch.Generator | None) -> list[int | None]:
    if sampling.greedy:
        return [None] * prompts
    if rng is None:
        raise ValueError("rng: a torch.Generator is needed unless the temperature is 0")
    return torch.randint(0, 2**31, (prompts,), generator=rng, device=rng.device).tolist()
