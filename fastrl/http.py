"""Requests to a server that may be slow, busy or gone: timeouts, retries with growing pauses, bounded concurrency."""

from __future__ import annotations

import base64
import http.client
import io
import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

MAX_PAUSE = 60.0  # seconds, whatever a server asks for
LONGEST = 1e6  # seconds of a timeout; the system's clock takes no more than some such number
TRANSIENT = (408, 409, 425, 429)  # and 5xx

A = TypeVar("A")
T = TypeVar("T")


class Passing(RuntimeError):
    """A failure that may pass (a timeout, a cut connection, 429, 5xx); ``pause`` seconds if the server named them."""

    def __init__(self, message: str, pause: float | None = None) -> None:
        super().__init__(message)
        self.pause = pause


class Refused(RuntimeError):
    """The server understood and said no (4xx): asking again changes nothing."""


class Stopped(RuntimeError):
    """The work a request belonged to has ended."""


class Transport:
    """How one client talks to its server.

    Args:
        who: what the server is called in messages, such as ``the critic``.
        timeout: seconds one request may take to connect, and between two pieces of a response.
        retries: further tries of a request; pause: seconds before the first of them, doubled each time.
        concurrency: requests under way at once; max_bytes: of a response that are read.
        key_env: environment variable with the key (sent if it is set, never shown).
        sleep: waits, for tests.

    Raises:
        ValueError: numbers out of range.
    """

    def __init__(
        self,
        who: str,
        *,
        timeout: float,
        retries: int,
        pause: float,
        concurrency: int,
        max_bytes: int,
        key_env: str,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        if not 0 < timeout <= LONGEST or retries < 0 or concurrency < 1:
            raise ValueError(
                f"{who}: need a timeout above 0 and up to {LONGEST:g} seconds, retries >= 0 and concurrency >= 1"
            )
        self.who, self.timeout, self.retries, self.pause = who, timeout, retries, pause
        self.concurrency, self.max_bytes, self._key = concurrency, max_bytes, os.environ.get(key_env)
        self._stopped = threading.Event()
        self._sleep = sleep or self._stopped.wait

    def send(self, url: str, body: bytes | None = None) -> bytes:
        """One request, a POST of JSON or (no ``body``) a GET; the response's bytes.

        Raises:
            Passing: what may pass, too long a response among it.
            Refused: any other HTTP status from 400; the message has the first of what the server said.
        """
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(url, data=body, headers=headers, method="GET" if body is None else "POST")
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                data = response.read(self.max_bytes + 1)
                missing = response.length if len(data) <= self.max_bytes else 0  # reading up to a size raises for none
        except urllib.error.HTTPError as error:
            with error:
                said = error.read(500).decode("utf-8", "replace")
            shown = (said.replace(self._key, "…") if self._key else said)[:200]
            if error.code in TRANSIENT or error.code >= 500:
                after = _retry_after(error.headers.get("Retry-After"))
                raise Passing(f"HTTP {error.code}: {shown}", after) from None
            raise Refused(f"{self.who} at {url} refused: HTTP {error.code}: {shown}") from None
        except (OSError, http.client.HTTPException) as error:  # timeouts, cut connections, no such host
            raise Passing(f"{type(error).__name__}: {error}") from None
        if missing:
            raise Passing(f"a response that was cut: {missing} bytes are missing")
        if len(data) > self.max_bytes:
            raise Passing(f"a response over {self.max_bytes} bytes")
        return data

    def retrying(self, attempt: Callable[[], T]) -> T:
        """``attempt()``, again after a pause where it raises ``Passing``; the last such failure is raised."""
        for number in range(self.retries + 1):
            if self._stopped.is_set():
                raise Stopped(f"{self.who} was stopped")
            try:
                return attempt()
            except Passing as error:
                if number == self.retries:
                    raise
                pause = error.pause if error.pause is not None else self.pause * 2**number
                self._sleep(min(pause, MAX_PAUSE))
        raise AssertionError("unreachable")

    def map(self, work: Callable[[A], T], items: Iterable[A]) -> list[T]:
        """``work`` on each item in a few threads, results in order. The first failure stops the rest and is raised."""
        self._stopped.clear()
        try:
            with ThreadPoolExecutor(self.concurrency) as pool:
                futures = [pool.submit(work, item) for item in items]
                try:
                    wait(futures, return_when=FIRST_EXCEPTION)
                    found = [error for future in futures if future.done() and (error := future.exception())]
                    for error in (*(e for e in found if not isinstance(e, Stopped)), *found):
                        raise error
                finally:  # after an error or Ctrl-C: start nothing more, and wait for no pause
                    self._stopped.set()
                    for future in futures:
                        future.cancel()
                return [future.result() for future in futures]
        finally:
            self._stopped.clear()

    def stop(self) -> None:
        """End the present :meth:`map`: no request is tried again."""
        self._stopped.set()

    @property
    def times(self) -> str:
        """How often a request is tried, in words."""
        return "once" if not self.retries else f"{self.retries + 1} times"


def check_url(url: str, what: str, example: str) -> str:
    """``url`` without a last slash. Raises ``ValueError`` if it is no http address."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError(f"{what}: expected an address such as {example}, got {url!r}")
    return url.rstrip("/")


def data_url(image: Any) -> str:
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


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header; dates are not read."""
    return float(value) if value is not None and re.fullmatch(r"\d{1,6}(\.\d+)?", value.strip()) else None
