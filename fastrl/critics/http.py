"""``http:URL``: a critic behind an OpenAI-compatible chat endpoint, such as a served LLaVA-Critic or a GPT-class model.

Requests run in a few threads, each with a timeout; what may pass (a timeout, a cut connection, 429, 5xx, a reply that
cannot be read) is tried again after a growing pause, or the pause the server asks for. Every readable reply is kept on
disk under the hash of its request, so that a build that was stopped asks nothing twice.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import json
import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastrl.checkpoint import write_atomically
from fastrl.critics.base import Case, CriticError, Critique
from fastrl.critics.model import critique_of
from fastrl.critics.rubric import Verdict, parse_reply, rubric_prompt

MAX_BYTES = 1 << 20  # of a response that are read
MAX_PAUSE = 60.0  # seconds, whatever a server asks for
TRANSIENT = (408, 409, 425, 429)  # and 5xx
GIVE_UP = 3  # cases in a row that the server could not answer, after all retries: it is gone


class _Passing(Exception):
    """A failure that may pass; ``pause`` seconds if the server named them."""

    def __init__(self, message: str, pause: float | None = None) -> None:
        super().__init__(message)
        self.pause = pause


class HttpCritic:
    """Scores through POST ``URL/chat/completions``.

    Args:
        url: the endpoint's base, such as ``http://localhost:8000/v1`` (with or without ``/chat/completions``).
        model: the served model's name; cache: folder of replies (None: keep none).
        timeout: seconds one request may take to connect, and between two pieces of a response.
        retries: further tries of a case; pause: seconds before the first of them, doubled each time.
        concurrency: requests under way at once; key_env: environment variable with the key (sent if it is set).
        sleep: waits, for tests.

    Raises:
        ValueError: not an http address, or numbers out of range.
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
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError(f"http critic: expected an address such as http://localhost:8000/v1, got {url!r}")
        if timeout <= 0 or retries < 0 or concurrency < 1:
            raise ValueError("http critic: need timeout > 0, retries >= 0 and concurrency >= 1")
        self.url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.model, self.cache = model, cache
        self.timeout, self.retries, self.pause = timeout, retries, pause
        self.concurrency, self._key = concurrency, os.environ.get(key_env)
        self._stopped = threading.Event()
        self._sleep = sleep or self._stopped.wait
        self._lock = threading.Lock()
        self._failures = 0  # in a row
        self._lost = 0  # cases of one call that the server did not answer

    def score(self, cases: Sequence[Case]) -> list[Critique]:
        """One critique per case, in order. Replies that cannot be read leave a case unscored.

        Raises:
            CriticError: the server refuses (4xx), or did not answer several cases in a row, or none at all.
        """
        self._stopped.clear()
        self._failures = self._lost = 0
        with ThreadPoolExecutor(self.concurrency) as pool:
            futures = [pool.submit(self._score, case) for case in cases]
            try:
                critiques = [future.result() for future in futures]
            finally:  # after an error or Ctrl-C: start nothing more, and wait for nothing
                self._stopped.set()
                for future in futures:
                    future.cancel()
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
        problem, unreachable = "", False
        for attempt in range(self.retries + 1):
            if self._stopped.is_set():
                raise CriticError("the critic was stopped")
            wait = self.pause * 2**attempt
            try:
                reply = self._ask(body)
            except _Passing as error:
                problem, unreachable = str(error), True
                wait = error.pause if error.pause is not None else wait
            else:
                verdict, unreachable = parse_reply(reply), False
                if isinstance(verdict, Verdict):
                    self._count(failed=False)
                    if place is not None:
                        place.parent.mkdir(parents=True, exist_ok=True)
                        write_atomically(place, json.dumps({"reply": reply}, ensure_ascii=False))
                    return critique_of(case, reply)
                problem = verdict
            if attempt < self.retries:
                self._sleep(min(wait, MAX_PAUSE))
        self._count(failed=unreachable, problem=problem)
        return Critique(None, problem=problem)

    def _count(self, *, failed: bool, problem: str = "") -> None:
        """Note whether the server answered a case at all; after several in a row that it did not, stop."""
        with self._lock:
            self._failures = self._failures + 1 if failed else 0
            self._lost += failed
            if self._failures >= GIVE_UP:
                self._stopped.set()
                raise CriticError(self._gone(f"{GIVE_UP} cases in a row", problem))

    def _gone(self, what: str, problem: str) -> str:
        times = "once" if not self.retries else f"{self.retries + 1} times"
        return f"the critic at {self.url} did not answer {what}, each tried {times}; last: {problem}"

    def _ask(self, body: bytes) -> str:
        """The text of one reply. Raises ``_Passing`` for what may pass, ``CriticError`` for a refusal."""
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.url, data=body, headers=headers, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                data = response.read(MAX_BYTES + 1)
        except urllib.error.HTTPError as error:
            with error:
                said = error.read(500).decode("utf-8", "replace")
            if error.code in TRANSIENT or error.code >= 500:
                raise _Passing(f"HTTP {error.code}", _retry_after(error.headers.get("Retry-After"))) from None
            shown = said.replace(self._key, "…") if self._key else said
            raise CriticError(f"the critic at {self.url} refused: HTTP {error.code}: {shown[:200]}") from None
        except (OSError, http.client.HTTPException) as error:  # timeouts, cut connections, no such host
            raise _Passing(f"{type(error).__name__}: {error}") from None
        if len(data) > MAX_BYTES:
            raise _Passing(f"a response over {MAX_BYTES} bytes")
        return _reply_text(data)

    def _request(self, case: Case) -> dict[str, Any]:
        images = [{"type": "image_url", "image_url": {"url": _data_url(image)}} for image in case.record.images]
        content = [*images, {"type": "text", "text": rubric_prompt(case)}]
        return {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": content}]}

    def _place(self, body: bytes) -> Path | None:
        if self.cache is None:
            return None
        name = hashlib.sha256(self.url.encode() + b"\0" + body).hexdigest()
        return self.cache / name[:2] / f"{name}.json"


def _kept_reply(place: Path) -> str | None:
    """A reply from the cache; None where the file cannot be read (it is then asked for again)."""
    try:
        reply = json.loads(place.read_text(encoding="utf-8"))["reply"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return reply if isinstance(reply, str) else None


def _reply_text(data: bytes) -> str:
    try:
        text = json.loads(data.decode("utf-8"))["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        raise _Passing(f"a response that is no chat completion: {data[:80]!r}") from None
    if not isinstance(text, str):
        raise _Passing("a chat completion without text")
    return text


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header; dates are not read."""
    return float(value) if value is not None and re.fullmatch(r"\d{1,6}(\.\d+)?", value.strip()) else None


def _data_url(image: Any) -> str:
    """A picture as a data URL: a file's own bytes where browsers know the format, else PNG."""
    kinds = {".jpg": "jpeg", ".jpeg": "jpeg", ".png": "png", ".webp": "webp"}
    if isinstance(image, Path | str) and Path(image).suffix.lower() in kinds:
        kind, data = kinds[Path(image).suffix.lower()], Path(image).read_bytes()
    else:
        from PIL import Image

        picture = image if isinstance(image, Image.Image) else Image.open(image)
        buffer = io.BytesIO()
        picture.convert("RGB").save(buffer, "PNG")
        kind, data = "png", buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
