"""Checks of the families' contract: a policy and transformers' own model from the same folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fastrl.batch import Completion, Prompt, PromptGroup, pack_row
from fastrl.models import Policy, load_policy
from fastrl.rollout import Generator, Sampling
from tests.helpers.families import BUILDS, Oracle
from tests.helpers.rollouts import picture, record

QUESTIONS: dict[int, tuple[str, tuple[Image.Image, ...]]] = {
    0: ("How many squares?", ()),
    1: ("Where is it?", (picture(84, 56, 1),)),
    2: ("What is left of it?", (picture(84, 60, 1), picture(56, 112, 2))),
}
STEPS = 6


@dataclass
class Pair:
    """A policy, and transformers' own model of the same folder."""

    folder: Path
    policy: Policy
    oracle: Oracle
    tolerance: float

    def asked(self, images: int) -> tuple[Prompt, str, tuple[Image.Image, ...]]:
        """A prompt with this number of pictures, its rendered text, and the pictures."""
        text, pictures = QUESTIONS[images]
        one = record("q", text, pictures)
        rendered = "".join(piece for piece, _ in self.policy.encoder._pieces(one, True))
        return self.policy.encode(one)[0], rendered, pictures

    def group(self, images: int) -> PromptGroup:
        """A prompt with random answers of several lengths."""
        rng = torch.Generator().manual_seed(images)
        lengths = (4, 1, 7)
        answers = [Completion(torch.randint(0, 256, (n,), generator=rng)) for n in lengths]
        for answer in answers:
            answer.per_token["weight"] = torch.randn(len(answer.token_ids), generator=rng)
        return PromptGroup(self.asked(images)[0], answers)


def pair_of(folder: Path, model_type: str) -> Pair:
    return Pair(folder, load_policy(folder, device="cpu"), Oracle(folder, model_type), BUILDS[model_type].tolerance)


def check_logp(pair: Pair) -> None:
    """Log-probs of one packed row with 0, 1 and 2 pictures are those of a plain forward for each answer."""
    groups = [pair.group(images) for images in QUESTIONS]
    with torch.no_grad():
        got = pair.policy.logprob(pack_row(groups)).logp
        want = torch.cat(oracle_logps(pair, groups))
    torch.testing.assert_close(got, want, rtol=pair.tolerance, atol=pair.tolerance)


def check_gradients(pair: Pair) -> None:
    """Every parameter's gradient is that of the layout in which each answer has prompt and pictures of its own."""
    groups = [pair.group(images) for images in QUESTIONS]
    batch = pack_row(groups)
    pair.policy.core.zero_grad()
    (pair.policy.logprob(batch).logp * batch.per_token["weight"]).sum().backward()
    pair.oracle.model.zero_grad()
    (torch.cat(oracle_logps(pair, groups)) * batch.per_token["weight"]).sum().backward()
    got, want = gradients(pair.policy.core), gradients(pair.oracle.model)
    idle = [name for name, _ in pair.policy.core.named_parameters() if name not in want]
    known = BUILDS[pair.policy.family.model_type].idle
    assert all(any(part in name for part in known) for name in idle), f"no gradient at all: {idle}"
    scale = max(float(gradient.norm()) for gradient in want.values())
    for name, gradient in want.items():
        assert name in got, f"{name}: no gradient"
        # Some gradients are zero up to rounding (a key's bias: softmax ignores it); those compare with the whole.
        allowed = 10 * pair.tolerance * max(float(gradient.norm()), 1e-3 * scale)
        assert float((got[name] - gradient).norm()) <= allowed, name


def check_greedy(pair: Pair, decode: str = "eager") -> None:
    """Greedy answers are ``generate``'s, token for token."""
    asked = [pair.asked(images) for images in QUESTIONS]
    generator = Generator(pair.policy, decode=decode)
    found = generator.generate([prompt for prompt, *_ in asked], Sampling(1, STEPS, temperature=0))
    for (_, rendered, pictures), (answer,) in zip(asked, found, strict=True):
        with torch.no_grad():
            want = pair.oracle.generate(rendered, pictures, STEPS, pair.policy.suppressed_token_ids)
        assert answer.token_ids.tolist() == want.tolist()


def check_sampler(pair: Pair, decode: str = "eager") -> None:
    """Log-probs that the sampler reports are those that the trainer computes of the same answers."""
    prompts = [pair.asked(images)[0] for images in QUESTIONS]
    rng = torch.Generator().manual_seed(0)
    answers = Generator(pair.policy, decode=decode).generate(prompts, Sampling(3, STEPS), rng)
    batch = pack_row([PromptGroup(p, a) for p, a in zip(prompts, answers, strict=True)])
    with torch.no_grad():
        logp = pair.policy.logprob(batch).logp
    torch.testing.assert_close(batch.per_token["sampler_logp"], logp, rtol=0, atol=pair.tolerance)


def oracle_logps(pair: Pair, groups: Sequence[PromptGroup]) -> list[Tensor]:
    asked = {len(group.prompt.images): pair.asked(len(group.prompt.images)) for group in groups}
    found = []
    for group in groups:
        _, rendered, pictures = asked[len(group.prompt.images)]
        found += [pair.oracle.logp(rendered, pictures, answer.token_ids) for answer in group.completions]
    return found


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
