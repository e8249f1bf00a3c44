"""Groups with random completions, for forwards that are compared with each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image

from fastrl.batch import Completion, PackedBatch, PromptGroup, pack_row
from fastrl.data.records import Record
from fastrl.models import Policy


def picture(width: int, height: int, seed: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def record(name: str, images: Sequence[Image.Image], text: str) -> Record:
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
    return Record(name, "qa", tuple(images), ({"role": "user", "content": content},), {})


def group(policy: Policy, images: Sequence[Image.Image], text: str, lengths: Sequence[int], seed: int) -> PromptGroup:
    """A group with random completions of these lengths over the text vocabulary, and a random weight per token."""
    generator = torch.Generator().manual_seed(seed)
    prompt, _ = policy.encode(record(f"r{seed}", images, text))
    completions = []
    for length in lengths:
        completion = Completion(torch.randint(0, 256, (length,), generator=generator))
        completion.per_token["weight"] = torch.randn(length, generator=generator)
        completions.append(completion)
    return PromptGroup(prompt, completions)


def picture_batch(policy: Policy) -> PackedBatch:
    """One prompt with a picture, and two answers."""
    prompt, _ = policy.encode(record("r", [Image.radial_gradient("L").resize((84, 56))], "Hi"))
    return pack_row([PromptGroup(prompt, [Completion(torch.tensor(ids)) for ids in ([5, 9, 40], [7])])])
