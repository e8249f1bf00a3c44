"""``http:URL``: a critic behind an OpenAI-compatible chat endpoint, such as a served LLaVA-Critic or a GPT-class model.

Requests run in a few threads, each with a timeout. Transient failures (a timeout, a cut connection, 429, 5xx, an
unparsable reply) are retried after a growing pause, or the pause that the server asks for. Every parsed reply is cached
on disk under the hash of its request, so that a resumed build repeats no request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastrl.critics.base import Case, CriticError, Critique
from fastrl.critics.model import critique_of
from fastrl.critics.rubric import Verdict, parse_reply, rubric_prompt
from fastrl.rewards.chat import ChatServer, ServerGone


class HttpCritic:
    """Scores through POST ``URL/chat/completions``.

    Args:
        url: the endpoint's base, such as ``http://localhost:8000/v1`` (with or without ``/chat/completions``).
        options: further arguments of ``fastrl.rewards.chat.ChatServer``: ``model``, ``cache``, ``timeout``,
            ``retries``, ``pause``, ``concurrency``, ``key_env``, ``sleep``.

    Raises:
        ValueError: not an http address, or a number is out of range.
    """

    rules = False

    def __init__(self, url: str, **options: Any) -> None:
        self.server = ChatServer(url, who="the critic", what="cases", **options)

    def score(self, cases: Sequence[Case]) -> list[Critique]:
        """One critique per case, in order. A case whose replies cannot be parsed is not scored.

        Raises:
            CriticError: the server refuses (4xx), or did not answer several consecutive cases, or any case.
        """
        try:
            replies = self.server.ask(cases, lambda case: (rubric_prompt(case), case.record.images), _fault)
        except ServerGone as error:
            raise CriticError(str(error)) from None
        return [
            critique_of(case, reply.text) if reply.text is not None else Critique(None, problem=reply.problem)
            for case, reply in zip(cases, replies, strict=True)
        ]


def _fault(reply: str) -> str | None:
    """Why a reply is no verdict."""
    verdict = parse_reply(reply)
    return None if isinstance(verdict, Verdict) else verdict
