"""``http:URL``: a critic behind an OpenAI-compatible chat endpoint, such as a served LLaVA-Critic or a GPT-class model.

Requests run in a few threads, each with a timeout. Transient failures (a timeout, a cut connection, 429, 5xx, an
unparsable reply) are retried after a growing pause, or the pause that the server asks for. Every parsed reply is cached
on disk under the hash of its request, so that a resumed build repeats no request.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastrl.critics.base import Case, CriticError, Critique
from fastrl.critics.model import critique_of
from fastrl.critics.rubric import Verdict, parse_reply, rubric_prompt
from fastrl.data.files import write_atomically
from fastrl.data.pictures import data_url
from fastrl.http import Passing, Refused, Stopped, Transport, check_url

MAX_BYTES = 1 << 20  # largest response
GIVE_UP = 3  # consecutive cases without an answer, after all retries, from which the server counts as gone


class _Unreadable(Passing):
    """The server answered, but not with a verdict."""


class HttpCritic:
    """Scores through POST ``URL/chat/completions``.

    Args:
        url: the endpoint's base, such as ``http://localhost:8000/v1`` (with or without ``/chat/completions``).
        model: the served model's name.
        cache: folder for replies (None: not stored).
        timeout: seconds for one whole request.
        retries: further attempts of a case.
        pause: seconds before the first retry, doubled each time.
        concurrency: requests in flight at once.
        key_env: environment variable with the key (sent if it is set).
        sleep: waits, for tests.

    Raises:
        ValueError: not an http address, or a number is out of range.
    """

    rules = False

    def __init__(
        self,
        url: str,
        *,
        model: str = "default",
        cache: Path | None = None,
        timeout: float = 60.0,
        retries: int = 4,
        pause: float = 1.0,
        concurrency: int = 4,
        key_env: str = "OPENAI_API_KEY",
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        base = check_url(url, "http critic", "http://localhost:8000/v1")
        self.url = base.removesuffix("/chat/completions") + "/chat/completions"
        self.model, self.cache = model, cache
        self.transport = Transport(
            "the critic",
            timeout=timeout,
            retries=retries,
            pause=pause,
            concurrency=concurrency,
            max_bytes=MAX_BYTES,
            key_env=key_env,
            sleep=sleep,
        )
        self._lock = threading.Lock()
        self._failures = 0  # consecutive ones
        self._lost = 0  # cases of a call that the server did not answer

    def score(self, cases: Sequence[Case]) -> list[Critique]:
        """One critique per case, in order. A case whose replies cannot be parsed is not scored.

        Raises:
            CriticError: the server refuses (4xx), or did not answer several consecutive cases, or any case.
        """
        self._failures = self._lost = 0
        try:
            critiques = self.transport.map(self._score, cases)
        except (Refused, Stopped) as error:
            raise CriticError(str(error)) from None
        if cases and self._lost == len(cases):
            raise CriticError(self._gone(f"any of {len(cases)} cases", critiques[-1].problem))
        return critiques

    def _score(self, case: Case) -> Critique:
        body = json.dumps(self._request(case), ensure_ascii=False, sort_keys=True).encode()
        place = self._place(body)
        if place is not None and place.is_file():
            kept = _kept_reply(place)
            if kept is not None:
                return critique_of(case, kept)
        try:
            reply = self.transport.retrying(lambda: self._ask(body))
        except Passing as error:
            self._count(failed=not isinstance(error, _Unreadable), problem=str(error))
            return Critique(None, problem=str(error))
        self._count(failed=False)
        if place is not None:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(place, json.dumps({"reply": reply}, ensure_ascii=False))
        return critique_of(case, reply)

    def _count(self, *, failed: bool, problem: str = "") -> None:
        """Count whether the server answered a case; raise after several consecutive failures."""
        with self._lock:
            self._failures = self._failures + 1 if failed else 0
            self._lost += failed
            if self._failures >= GIVE_UP:
                self.transport.stop()
                raise CriticError(self._gone(f"{GIVE_UP} cases in a row", problem))

    def _gone(self, what: str, problem: str) -> str:
        return f"the critic at {self.url} did not answer {what}, each tried {self.transport.times}; last: {problem}"

    def _ask(self, body: bytes) -> str:
        """The text of one reply with a verdict. Raises ``Passing`` for transient failures, otherwise ``Refused``."""
        reply = _reply_text(self.transport.send(self.url, body))
        verdict = parse_reply(reply)
        if not isinstance(verdict, Verdict):
            raise _Unreadable(verdict)
        return reply

    def _request(self, case: Case) -> dict[str, Any]:
        images = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in case.record.images]
        content = [*images, {"type": "text", "text": rubric_prompt(case)}]
        return {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": content}]}

    def _place(self, body: bytes) -> Path | None:
        if self.cache is None:
            return None
        name = hashlib.sha256(self.url.encode() + b"\0" + body).hexdigest()
        return self.cache / name[:2] / f"{name}.json"


def _kept_reply(place: Path) -> str | None:
    """A reply from the cache; None if the file cannot be read (the request is then repeated)."""
    try:
        reply = json.loads(place.read_text(encoding="utf-8"))["reply"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return reply if isinstance(reply, str) else None


def _reply_text(data: bytes) -> str:
    try:
        text = json.loads(data.decode("utf-8"))["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        raise Passing(f"a response that is not a chat completion: {data[:80]!r}") from None
    if not isinstance(text, str):
        raise Passing("a chat completion without text")
    return text
