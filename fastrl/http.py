"""HTTP requests to a server that may be slow, busy, gone or hostile: one deadline for a whole request, retries with
growing pauses, bounded concurrency and size, and no redirects (which would send the key to another server).
"""

from __future__ import annotations

import http.client
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import TypeVar
from urllib.parse import urlsplit

MAX_PAUSE = 60.0  # longest pause in seconds, even if a server asks for more
LONGEST = 1e6  # longest timeout in seconds; system calls do not accept much more
TRANSIENT = (408, 409, 425, 429)  # and 5xx
PIECE = 1 << 16  # bytes read at a time

A = TypeVar("A")
T = TypeVar("T")


class TransientError(RuntimeError):
    """A transient failure (a timeout, a cut connection, 429, 5xx); ``pause``: seconds, if the server gives them."""

    def __init__(self, message: str, pause: float | None = None) -> None:
        super().__init__(message)
        self.pause = pause


class ResponseTimeout(TransientError):
    """No complete response within the timeout."""


class Refused(RuntimeError):
    """The server refused the request (4xx) or redirected it (3xx): retrying would not help. ``status``: of HTTP."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class Stopped(RuntimeError):
    """The work that a request belongs to was stopped."""


class Transport:
    """The connection of one client to its server.

    Args:
        who: name of the server in messages, such as ``the critic``.
        timeout: seconds for one request, from the lookup of the server's name to the last byte of its response.
        retries: further attempts of a request.
        pause: seconds before the first retry, doubled each time.
        retry_timeouts: also retry requests that exceed ``timeout``.
        concurrency: requests in flight at once.
        max_bytes: largest response.
        key_env: environment variable with the key (sent if it is set, never shown).
        sleep: waits, for tests.

    Raises:
        ValueError: a number is out of range.
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
        retry_timeouts: bool = True,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        if not 0 < timeout <= LONGEST or retries < 0 or concurrency < 1:
            raise ValueError(
                f"{who}: expected a timeout above 0 and up to {LONGEST:g} seconds, retries >= 0 and concurrency >= 1"
            )
        self.who, self.timeout, self.retries, self.pause = who, timeout, retries, pause
        self.retry_timeouts = retry_timeouts
        self.concurrency, self.max_bytes, self._key = concurrency, max_bytes, os.environ.get(key_env)
        self._stopped = threading.Event()
        self._sleep = sleep or self._stopped.wait

    def send(self, url: str, body: bytes | None = None) -> bytes:
        """One request, a POST of JSON or (no ``body``) a GET; the response's bytes.

        The request runs in its own thread, which is abandoned at the deadline: neither a slow server nor name lookup
        can block the caller longer.

        Raises:
            ResponseTimeout: the response was not complete within ``timeout`` seconds.
            TransientError: any other transient failure, including a response that is too long.
            Refused: a redirect, or another HTTP status from 400; the message has the beginning of the response.
        """
        until = time.monotonic() + self.timeout
        done: Future[bytes] = Future()

        def work() -> None:
            try:
                done.set_result(self._exchange(url, body, until))
            except BaseException as error:  # raised again in the waiting thread
                done.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        try:
            return done.result(self.timeout)
        except TimeoutError:
            raise self._timed_out() from None

    def _exchange(self, url: str, body: bytes | None, until: float) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(url, data=body, headers=headers, method="GET" if body is None else "POST")
        try:
            with _opener().open(request, timeout=self.timeout) as response:
                data, missing = self._read(response, until)
        except urllib.error.HTTPError as error:
            with error:
                reply = error.read(500).decode("utf-8", "replace")
            if 300 <= error.code < 400:
                where = self._shown(str(error.headers.get("Location")))
                raise Refused(
                    f"{self.who} at {url} answered with a redirect (HTTP {error.code}) to {where}; redirects are "
                    "not followed: give the final address",
                    error.code,
                ) from None
            shown = self._shown(reply)
            if error.code in TRANSIENT or error.code >= 500:
                after = _retry_after(error.headers.get("Retry-After"))
                raise TransientError(f"HTTP {error.code}: {shown}", after) from None
            raise Refused(f"{self.who} at {url} refused: HTTP {error.code}: {shown}", error.code) from None
        except (OSError, http.client.HTTPException) as error:  # timeouts, cut connections, no such host
            if time.monotonic() >= until:
                raise self._timed_out() from None
            raise TransientError(f"{type(error).__name__}: {error}") from None
        if len(data) > self.max_bytes:
            raise TransientError(f"a response over {self.max_bytes} bytes")
        if missing:
            raise TransientError(f"a truncated response: {missing} bytes are missing")
        return data

    def _read(self, response: http.client.HTTPResponse, until: float) -> tuple[bytes, int]:
        """The body, read up to slightly more than ``max_bytes``, and the number of missing bytes."""
        length, data = response.length, bytearray()
        while len(data) <= self.max_bytes and (length is None or len(data) < length):
            if time.monotonic() >= until:
                raise self._timed_out()
            piece = response.read1(PIECE)  # returns the bytes received so far
            if not piece:
                break
            data += piece
        return bytes(data), 0 if length is None else max(0, length - len(data))

    def _timed_out(self) -> ResponseTimeout:
        return ResponseTimeout(f"no complete response within {self.timeout:g} seconds")

    def _shown(self, text: str) -> str:
        return (text.replace(self._key, "…") if self._key else text)[:200]

    def retrying(self, attempt: Callable[[], T]) -> T:
        """Call ``attempt()``, and again after a pause if it raises ``TransientError``; raises the last such failure."""
        for number in range(self.retries + 1):
            if self._stopped.is_set():
                raise Stopped(f"{self.who} was stopped")
            try:
                return attempt()
            except TransientError as error:
                if number == self.retries or (isinstance(error, ResponseTimeout) and not self.retry_timeouts):
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
                finally:  # after an error or Ctrl-C: start nothing more, and do not wait for pauses
                    self._stopped.set()
                    for future in futures:
                        future.cancel()
                return [future.result() for future in futures]
        finally:
            self._stopped.clear()

    def stop(self) -> None:
        """End the current :meth:`map`: no request is retried."""
        self._stopped.set()

    @property
    def times(self) -> str:
        """The number of attempts in words."""
        return "once" if not self.retries else f"{self.retries + 1} times"


def _opener() -> urllib.request.OpenerDirector:
    """An opener for http and https only, through the system's proxy if any; redirects are errors."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.HTTPDefaultErrorHandler,
    ):
        opener.add_handler(handler())
    return opener


def check_url(url: str, what: str, example: str) -> str:
    """``url`` without a trailing slash. Raises ``ValueError`` if it is not an http address."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError(f"{what}: expected an address such as {example}, got {url!r}")
    return url.rstrip("/")


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header; dates are ignored."""
    return float(value) if value is not None and re.fullmatch(r"\d{1,6}(\.\d+)?", value.strip()) else None
