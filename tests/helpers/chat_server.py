"""A local chat server that fails in many ways."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

GOOD = '{"score": 8, "reason": "fine"}'


class Server(ThreadingHTTPServer):
    """Answers each request with the next entry of ``script`` (the last one repeats); records the requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[Callable[[Handler], None]] = [good]
        self.seen: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.open = self.most = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:  # cut connections are part of the test
        pass


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append(body)
            self.server.keys.append(self.headers.get("Authorization"))
            self.server.open += 1
            self.server.most = max(self.server.most, self.server.open)
            act = self.server.script.pop(0) if len(self.server.script) > 1 else self.server.script[0]
        self.answered = False
        try:
            act(self)
        finally:
            self.close_count()

    def close_count(self) -> None:
        """Ends a request: called before the reply is sent, as the client may send the next request at once."""
        with self.server.lock:
            self.server.open -= not self.answered
            self.answered = True

    def reply(self, code: int, data: bytes, **headers: str) -> None:
        self.close_count()
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def completion(text: Any) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


def good(h: Handler) -> None:
    h.reply(200, completion(GOOD))


def slow(h: Handler) -> None:
    h.connection.settimeout(60)
    h.connection.recv(1)  # returns when the client has given up


def status(code: int, **headers: str) -> Callable[[Handler], None]:
    return lambda h: h.reply(code, b"secret-key went wrong", **headers)


def broken_json(h: Handler) -> None:
    h.reply(200, b'{"choices": [')


def cut(h: Handler) -> None:
    h.send_response(200)
    h.send_header("Content-Length", "500")
    h.end_headers()
    h.wfile.write(b'{"choices"')


def hang_up(h: Handler) -> None:
    h.connection.close()


def prose(h: Handler) -> None:
    h.reply(200, completion("I would say 8 of 10"))


def no_text(h: Handler) -> None:
    h.reply(200, completion(None))


def flood(h: Handler) -> None:
    h.reply(200, b"x" * (3 << 20))


@contextmanager
def serving() -> Iterator[Server]:
    """A server for the duration of a test."""
    served = Server()
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        served.shutdown()
        served.server_close()
