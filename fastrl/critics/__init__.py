"""Critics: ``open_critic("rule" | "model:DIR" | "http:URL")`` → an object that scores answers and gives reasons.

- ``rule[?feedback=request|score|reason][&soft=none|auto|MODEL]``: compares the caption's facts with the record's truth;
  with a sentence-embedding model also by soft matching. It is off unless it is asked for: scores of training data do
  not depend on what a machine holds
- ``model:DIR``: the model in any image-text folder, with the rubric prompt
- ``http:URL[?model=NAME&…]``: an OpenAI-compatible chat endpoint (``https:`` too)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from fastrl.critics.base import Case, Critic, CriticError, Critique, Turn
from fastrl.critics.rule import RuleCritic
from fastrl.data.validate import nearest

KINDS = ("rule", "model", "http", "https")

__all__ = ["Case", "Critic", "CriticError", "Critique", "RuleCritic", "Turn", "open_critic"]


def open_critic(spec: str, *, cache: Path | None = None, say: Callable[[str], None] = lambda text: None) -> Critic:
    """The critic that a spec names.

    Args:
        spec: ``kind[:where][?key=value&…]``. Keys of ``rule``: ``feedback``, ``soft``; of ``model``: ``attempts``,
            ``max_new_tokens``; of ``http``: ``model``, ``timeout``, ``retries``, ``concurrency``, ``key_env``.
        cache: folder in which an http critic stores every reply (default ``critic-cache``).
        say: told why ``soft=auto`` is off.

    Raises:
        ValueError: an unknown kind or key, or an invalid value.
    """
    kind, _, rest = spec.partition(":")
    if kind.partition("?")[0] == "rule":
        kind, rest = "rule", spec
    if kind not in KINDS:
        raise ValueError(f"unknown critic {spec!r}{nearest(kind, KINDS)}; a spec is rule, model:DIR or http:URL")
    where, _, query = rest.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    if kind == "rule":
        chosen = _typed(spec, options, {"feedback": str, "soft": str})
        if "soft" in chosen:
            from fastrl.captions.embedding import open_soft

            softly = open_soft(chosen.pop("soft"))
            if softly.note:
                say(softly.note)
            chosen |= {"similarity": softly.similarity, "matching": softly.matching}
        return RuleCritic(**chosen)
    if kind == "model":
        from fastrl.critics.model import ModelCritic
        from fastrl.models.open import open_policy

        typed = _typed(spec, options, {"attempts": int, "max_new_tokens": int})
        return ModelCritic(open_policy(where), **typed)
    from fastrl.critics.http import HttpCritic

    kinds = {"model": str, "timeout": float, "retries": int, "concurrency": int, "key_env": str}
    return HttpCritic(_address(kind, where), cache=cache or Path("critic-cache"), **_typed(spec, options, kinds))


def _address(kind: str, where: str) -> str:
    """``http:URL`` with the URL written out, or the URL itself (``http://host/v1``)."""
    return where if where.startswith(("http://", "https://")) else f"{kind}:{where}"


def _typed(spec: str, options: dict[str, str], kinds: dict[str, type]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in options.items():
        if key not in kinds:
            raise ValueError(f"critic {spec!r}: unknown key {key!r}{nearest(key, kinds)}")
        try:
            found[key] = kinds[key](value)
        except ValueError:
            raise ValueError(f"critic {spec!r}: {key} must be a {kinds[key].__name__}, got {value!r}") from None
    return found
