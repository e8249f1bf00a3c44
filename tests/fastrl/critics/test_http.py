"""The HTTP critic against a local server with many kinds of failures."""

from __future__ import annotations

import contextlib
import json
import select
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastrl.critics import Case, CriticError
from fastrl.critics.http import HttpCritic
from fastrl.data import load_data
from fastrl.evaluate.reflect import reflect
from fastrl.models.load import load_policy
from tests.helpers.chat_server import (
    Handler,
    Server,
    broken_json,
    completion,
    cut,
    flood,
    good,
    hang_up,
    no_text,
    prose,
    serving,
    slow,
    status,
)

RECORD = load_data("scenes:caption?n=1&seed=4")[0]


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as served:
        yield served


def critic(server: Server, pauses: list[float] | None = None, **options: Any) -> HttpCritic:
    kept = pauses if pauses is not None else []
    return HttpCritic(server.url, **{"timeout": 60.0, "retries": 2, "sleep": kept.append, **options})


def case(answer: str = "A dog.") -> Case:
    return Case(RECORD, answer)


@pytest.mark.parametrize(
    "trouble",
    [slow, status(500), status(503), status(429), status(408), broken_json, cut, hang_up, prose, no_text, flood],
    ids=["slow", "500", "503", "429", "408", "broken json", "cut", "hang up", "prose", "no text", "flood"],
)
def test_trouble_that_passes_costs_a_retry(server: Server, trouble: Callable[[Handler], None]) -> None:
    server.script = [trouble, good]
    pauses: list[float] = []
    (critique,) = critic(server, pauses, timeout=2.0 if trouble is slow else 60.0).score([case()])
    assert critique.score == 0.8
    assert "fine" in critique.feedback
    assert len(server.seen) == 2
    assert pauses == [1.0]


def test_pauses_double_and_a_server_may_name_its_own(server: Server) -> None:
    server.script = [status(500), status(429, Retry_After="7"), status(429, Retry_After="99999"), status(500), good]
    pauses: list[float] = []
    assert critic(server, pauses, retries=4).score([case()])[0].score == 0.8
    assert pauses == [1.0, 7.0, 60.0, 8.0]


def test_a_reply_that_stays_unreadable_leaves_the_case_unscored(server: Server) -> None:
    server.script = [prose]
    found = critic(server, concurrency=1).score([case(f"{i}") for i in range(5)])
    assert [critique.score for critique in found] == [None] * 5
    assert all("not a JSON object" in critique.problem for critique in found)
    assert len(server.seen) == 15


def test_a_refusal_is_an_error_at_once_and_never_shows_the_key(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret-key")
    server.script = [status(401)]
    with pytest.raises(CriticError, match="refused: HTTP 401") as error:
        critic(server, key_env="JUDGE_KEY").score([case()])
    assert "secret-key" not in str(error.value)
    assert server.keys == ["Bearer secret-key"]


def test_a_server_that_is_gone_stops_the_work(server: Server) -> None:
    server.script = [status(500)]
    with pytest.raises(CriticError, match="did not answer 3 cases in a row"):
        critic(server, concurrency=1, retries=1).score([case(f"{i}") for i in range(50)])
    assert len(server.seen) == 6


@pytest.mark.parametrize("trouble", [status(500), cut, status(403)], ids=["500", "cut", "refused"])
def test_reflection_on_a_server_that_dies_midway_ends_with_the_best_answer(
    server: Server, trouble: Callable[[Handler], None], tiny_folder: Callable[[str], Path]
) -> None:
    def fair(h: Handler) -> None:
        h.reply(200, completion('{"score": 3, "reason": "dull"}'))

    server.script = [good, fair, trouble]
    policy = load_policy(tiny_folder("qwen2_5"))
    (found,) = reflect(policy, critic(server, retries=1), [RECORD], turns=3, max_new_tokens=6)
    assert [turn.score for turn in found.turns] == [0.8, 0.3, None]
    assert found.error.startswith(f"the critic failed at turn 3: the critic at {server.url}")
    assert found.answer == found.turns[0].answer


def test_nothing_listens() -> None:
    lonely = HttpCritic("http://127.0.0.1:9/v1", retries=0, concurrency=1, timeout=0.5, sleep=lambda _: None)
    with pytest.raises(CriticError, match="did not answer"):
        lonely.score([case(f"{i}") for i in range(3)])


def test_one_case_in_trouble_does_not_hurt_the_others_and_order_is_kept(server: Server) -> None:
    def by_answer(h: Handler) -> None:
        text = h.server.seen[-1]["messages"][0]["content"][-1]["text"]
        h.reply(200, completion(json.dumps({"score": int(text.split("number ")[1][0]), "reason": ""})))

    server.script = [by_answer]
    found = critic(server, concurrency=1).score([case(f"number {i}") for i in range(8)])
    assert [critique.score for critique in found] == [i / 10 for i in range(8)]


def test_concurrency_is_bounded(server: Server) -> None:
    meeting = threading.Barrier(3, timeout=60)  # no reply before three requests are in flight

    def together(h: Handler) -> None:
        meeting.wait()
        time.sleep(0.05)  # long enough for a fourth request to arrive
        good(h)

    server.script = [together]
    found = critic(server, concurrency=3, retries=0).score([case(f"{i}") for i in range(12)])
    assert all(critique.score == 0.8 for critique in found)
    assert server.most == 3


def test_replies_are_kept_on_disk(server: Server, tmp_path: Path) -> None:
    first = critic(server, cache=tmp_path).score([case(), case("A cat.")])
    again = critic(server, cache=tmp_path).score([case(), case("A cat.")])
    assert again == first
    assert len(server.seen) == 2
    for file in tmp_path.rglob("*.json"):
        file.write_text("{broken")
    assert critic(server, cache=tmp_path).score([case()]) == first[:1]
    assert len(server.seen) == 3
    critic(server, cache=tmp_path, model="other").score([case()])
    assert len(server.seen) == 4  # another model is a different request


def test_the_request_carries_the_picture_and_the_prompt(server: Server) -> None:
    critic(server, model="judge").score([case()])
    (sent,) = server.seen
    image, text = sent["messages"][0]["content"]
    assert sent["model"] == "judge"
    assert image["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
    assert "A dog." in text["text"]


@pytest.mark.parametrize("code", [300, 301, 302, 303, 305, 307, 308, 399])
@pytest.mark.parametrize("scheme", ["http", "https", "ftp", "file", ""])
def test_no_redirect_is_followed_and_the_key_goes_nowhere(
    server: Server, monkeypatch: pytest.MonkeyPatch, code: int, scheme: str
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret-key")
    elsewhere = Server()  # it listens, but must receive nothing
    elsewhere.timeout = 0.0
    port = elsewhere.server_address[1]
    target = f"{scheme}://127.0.0.1:{port}/v1/secret-key" if scheme else "/v1/other"
    server.script = [status(code, Location=target)]
    with pytest.raises(
        CriticError, match=rf"answered with a redirect \(HTTP {code}\) to .*redirects are not followed"
    ) as error:
        critic(server, key_env="JUDGE_KEY").score([case()])
    assert "secret-key" not in str(error.value)
    assert len(server.seen) == 1
    assert not select.select([elsewhere.socket], [], [], 0)[0]
    elsewhere.server_close()


def drip_body(h: Handler) -> None:
    h.send_response(200)
    h.send_header("Content-Length", "100000")
    h.end_headers()
    drip(h, b"x")


def drip_chunks(h: Handler) -> None:
    h.protocol_version = "HTTP/1.1"
    h.send_response(200)
    h.send_header("Transfer-Encoding", "chunked")
    h.end_headers()
    drip(h, b"1\r\nx\r\n")


def drip_headers(h: Handler) -> None:
    h.wfile.write(b"HTTP/1.0 200 OK\r\nX-Long: ")
    drip(h, b"x")


def drip(h: Handler, piece: bytes) -> None:
    """Sends a byte every 20 ms while the client listens (20 s at most), so that no single read times out."""
    with contextlib.suppress(OSError):
        for _ in range(1000):
            h.wfile.write(piece)
            time.sleep(0.02)


@pytest.mark.parametrize("trouble", [drip_body, drip_chunks, drip_headers])
def test_a_dripping_server_holds_nobody_longer_than_the_timeout(
    server: Server, trouble: Callable[[Handler], None]
) -> None:
    server.script = [trouble, good]
    pauses: list[float] = []
    (critique,) = critic(server, pauses, timeout=0.5).score([case()])
    assert critique.score == 0.8  # of the second attempt
    assert pauses == [1.0]
    server.script = [trouble]
    with pytest.raises(CriticError, match=r"last: no complete response within 0.3 seconds"):
        critic(server, timeout=0.3, retries=0).score([case()])
