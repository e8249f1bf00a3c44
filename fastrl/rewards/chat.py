"""Client of an OpenAI-compatible chat endpoint that judges answers: concurrent requests, usable replies cached on disk.

What may pass (a timeout, a cut connection, 429, 5xx, a reply that is not usable) is tried again after a growing pause,
or the pause that the server asks for. Replies are stored under the hash of their request, so that work that was stopped
repeats none.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from fastrl.data.files import write_atomically
from fastrl.data.pictures import AnyPicture, data_url
from fastrl.http import Refused, Stopped, TransientError, Transport, check_url

MAX_BYTES = 1 << 20  # of a response that are read
GIVE_UP = 3  # consecutive requests without an answer, after all retries, from which the server counts as gone

T = TypeVar("T")


class ServerGone(RuntimeError):
    """The server refuses requests or does not answer."""


class Unusable(TransientError):
    """The server answered, but not with what was asked for."""


class Reply(NamedTuple):
    """The text of a usable reply; None with the ``problem`` of the last attempt if there was none."""

    text: str | None
    problem: str = ""


class ChatServer:
    """POST ``URL/chat/completions``.

    Args:
        url: the endpoint's base, such as ``http://localhost:8000/v1`` (with or without ``/chat/completions``).
        who: what messages call the server, such as ``the judge``; what: and its requests, such as ``answers``.
        model: the served model's name.
        cache: folder for replies (None: not stored).
        timeout: seconds for one whole request.
        retries: further attempts of a request.
        pause: seconds before the first retry, doubled each time.
        concurrency: requests in flight at once.
        key_env: environment variable with the key (sent if it is set).
        sleep: waits, for tests.

    Raises:
        ValueError: not an http address, or a number is out of range.
    """

    def __init__(
        self,
        url: str,
        *,
        who: str,
        what: str,
        model: str = "default",
        cache: Path | None = None,
        timeout: float = 60.0,
        retries: int = 4,
        pause: float = 1.0,
        concurrency: int = 4,
        key_env: str = "OPENAI_API_KEY",
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        base = check_url(url, who.removeprefix("the "), "http://localhost:8000/v1")
        self.url = base.removesuffix("/chat/completions") + "/chat/completions"
        self.who, self.what, self.model, self.cache = who, what, model, cache
        self.transport = Transport(
            who,
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
        self._lost = 0  # requests of a call that the server did not answer

    def ask(
        self,
        items: Sequence[T],
        prompt: Callable[[T], tuple[str, Iterable[AnyPicture]]],
        unusable: Callable[[str], str | None],
    ) -> list[Reply]:
        """One reply per item, in order.

        Args:
            items: what is asked about.
            prompt: the text and the pictures of an item's request; called in several threads.
            unusable: why a reply is of no use; None if it is.

        Raises:
            ServerGone: the server refuses (4xx), or did not answer several consecutive requests, or any.
        """
        self._failures = self._lost = 0
        try:
            replies = self.transport.map(lambda item: self._one(*prompt(item), unusable), items)
        except (Refused, Stopped) as error:
            raise ServerGone(str(error)) from None
        if items and self._lost == len(items):
            raise ServerGone(self._gone(f"any of {len(items)} {self.what}", replies[-1].problem))
        return replies

    def _one(self, text: str, pictures: Iterable[AnyPicture], unusable: Callable[[str], str | None]) -> Reply:
        images = [{"type": "image_url", "image_url": {"url": data_url(picture)}} for picture in pictures]
        messages = [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]
        request = {"model": self.model, "temperature": 0, "messages": messages}
        body = json.dumps(request, ensure_ascii=False, sort_keys=True).encode("utf-8", "replace")
        place = self._place(body)
        kept = _kept_reply(place) if place is not None else None
        if kept is not None and unusable(kept) is None:
            return Reply(kept)
        try:
            reply = self.transport.retrying(lambda: self._attempt(body, unusable))
        except TransientError as error:
            self._count(failed=not isinstance(error, Unusable), problem=str(error))
            return Reply(None, str(error))
        self._count(failed=False)
        if place is not None:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(place, json.dumps({"reply": reply}, ensure_ascii=False))
        return Reply(reply)

    def _attempt(self, body: bytes, unusable: Callable[[str], str | None]) -> str:
        reply = _reply_text(self.transport.send(self.url, body))
        problem = unusable(reply)
        if problem is not None:
            raise Unusable(problem)
        return reply

    def _count(self, *, failed: bool, problem: str = "") -> None:
        """Count whether the server answered a request; raise after several consecutive failures."""
        with self._lock:
            self._failures = self._failures + 1 if failed else 0
            self._lost += failed
            if self._failures >= GIVE_UP:
                self.transport.stop()
                raise ServerGone(self._gone(f"{GIVE_UP} {self.what} in a row", problem))

    def _gone(self, what: str, problem: str) -> str:
        return f"{self.who} at {self.url} did not answer {what}, each tried {self.transport.times}; last: {problem}"

    def _place(self, body: bytes) -> Path | None:
        if self.cache is None:
            return None
        name = hashlib.sha256(self.url.encode() + b"\0" + body).hexdigest()
        return self.cache / name[:2] / f"{name}.json"


def _kept_reply(place: Path) -> str | None:
    """A reply from the cache; None if there is none, or the file cannot be read (the request is then repeated)."""
    try:
        reply: Any = json.loads(place.read_text(encoding="utf-8"))["reply"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return reply if isinstance(reply, str) else None


def _reply_text(data: bytes) -> str:
    try:
        text = json.loads(data.decode("utf-8"))["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        raise TransientError(f"a response that is not a chat completion: {data[:80]!r}") from None
    if not isinstance(text, str):
        raise TransientError("a chat completion without text")
    return text
