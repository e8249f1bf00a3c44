"""Shared by rollout tests: records of every kind, transformers' own generation, the trainer's log-probs."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from fastrl.batch import Completion, Prompt, PromptGroup, pack
from fastrl.data.records import Record

STYLES = ("qwen2_5", "qwen2")


def picture(width: int, height: int, seed: int) -> Image.Image:
    rng = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=rng, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def record(name: str, text: str, images: tuple[Image.Image, ...] = ()) -> Record:
    content = [{"type": "image"}] * len(images) + [{"type": "text", "text": text}]
    return Record(name, "qa", images, ({"role": "user", "content": content},), {})


def make_records() -> list[Record]:
    """Text only, one image, two images, an image used twice; lengths differ."""
    first, second = picture(84, 56, 1), picture(56, 112, 2)
    return [
        record("a", "where is the red circle?", (first,)),
        record("b", "hi"),
        record("c", "what is left of it", (first, second)),
        record("d", "count", (second,)),
        record("e", "how many squares are there in all of this?", (picture(112, 112, 3),)),
    ]


def encode(policy, records=None) -> list[Prompt]:
    return [policy.encode(r)[0] for r in (records or make_records())]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def reference_generate(policy, prompt: Prompt, steps: int) -> Tensor:
    """New tokens [T] of transformers' own greedy ``generate``."""
    ids = prompt.token_ids[None].to(policy.device)
    given = {}
    if prompt.images:
        given = {
            "pixel_values": torch.cat([image.pixel_values for image in prompt.images]).to(policy.device),
            "image_grid_thw": torch.tensor([image.shape for image in prompt.images], device=policy.device),
            "mm_token_type_ids": (ids == policy.core.config.image_token_id).int(),
        }
    out = policy.core.eval().generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **given,
        max_new_tokens=steps,
        do_sample=False,
        suppress_tokens=list(policy.suppressed_token_ids),
    )
    return out[0, ids.shape[1] :]


def teacher_forced(policy, prompt: Prompt, completion: Completion, temperature: float = 1.0) -> Tensor:
    """Log-probs [T] of a completion by the trainer's packed forward."""
    batch = pack([PromptGroup(prompt, [completion])], 100_000)[0].to(policy.device)
    with torch.no_grad():
        return policy.logprob(batch, temperature=temperature).logp


def same(a: list[list[Completion]], b: list[list[Completion]]) -> bool:
    return all(
        torch.equal(x.token_ids, y.token_ids) and x.finished == y.finished
        for left, right in zip(a, b, strict=True)
        for x, y in zip(left, right, strict=True)
    )


def force(policy, token: int, bonus: float):
    """Adds a bonus to the logit of ``token``."""
    bias = torch.zeros(policy.core.lm_head.weight.shape[0])
    bias[token] = bonus
    return policy.core.lm_head.register_forward_hook(lambda _m, _a, out: out + bias)
