"""``model:DIR``: an image-text model as critic, with the rubric prompt; replies are parsed strictly and retried."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from fastrl.critics.base import Case, Critique
from fastrl.critics.feedback import rng_for, scored_feedback
from fastrl.critics.rubric import Verdict, parse_reply, rubric_prompt
from fastrl.data.records import question

if TYPE_CHECKING:
    from fastrl.data.records import Record
    from fastrl.models.load import Policy


class ModelCritic:
    """Scores with a policy folder's model: greedy first, then sampled, until a reply can be parsed.

    Args:
        policy: the critic's model.
        attempts: largest number of replies; a case without a parsable reply is not scored.
        max_new_tokens: longest reply.
        temperature: of the replies after the first.
        portion: number of cases answered together.
    """

    rules = False

    def __init__(
        self,
        policy: Policy,
        *,
        attempts: int = 3,
        max_new_tokens: int = 256,
        temperature: float = 0.7,
        portion: int = 32,
    ) -> None:
        if attempts < 1:
            raise ValueError(f"model critic: attempts must be 1 or more, got {attempts}")
        self.policy, self.attempts, self.portion = policy, attempts, portion
        self.max_new_tokens, self.temperature = max_new_tokens, temperature

    def score(self, cases: Sequence[Case]) -> list[Critique]:
        """One critique per case, without a score if no reply could be parsed."""
        out: list[Critique] = []
        for start in range(0, len(cases), self.portion):
            out += self._portion(cases[start : start + self.portion])
        return out

    def _portion(self, cases: Sequence[Case]) -> list[Critique]:
        from fastrl.rollout import Generator, Sampling

        prompts = [self.policy.encode(_prompt(case))[0] for case in cases]
        generator = Generator(self.policy)
        found: dict[int, Critique] = {}
        left = list(range(len(cases)))
        for attempt in range(self.attempts):
            sampling = Sampling(1, self.max_new_tokens, self.temperature if attempt else 0.0)
            rng = torch.Generator().manual_seed(attempt)
            replies = generator.generate([prompts[i] for i in left], sampling, rng)
            for i, (reply,) in zip(left, replies, strict=True):
                found[i] = critique_of(cases[i], reply.text)
            left = [i for i in left if found[i].score is None]
            if not left:
                break
        return [found[i] for i in range(len(cases))]


def critique_of(case: Case, reply: str) -> Critique:
    """A model's reply as a critique, without a score if it cannot be parsed."""
    verdict = parse_reply(reply)
    if not isinstance(verdict, Verdict):
        return Critique(None, problem=verdict)
    rng = rng_for(case.record.id, len(case.history), case.answer)
    return Critique(verdict.score, scored_feedback(verdict.score, verdict.reason, rng))


def _prompt(case: Case) -> Record:
    """A record with the critic's prompt about the case's pictures."""
    asked = question("critic", images=len(case.record.images), prompt=rubric_prompt(case))
    return replace(case.record, messages=asked)
