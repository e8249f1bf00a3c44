"""Rollouts: answers of a forced length to prompts with a picture, against transformers' ``generate``; decoding alone.

The model has random weights (Qwen2.5-VL-3B's sizes on a GPU). Floors are bytes: in each step all weights of the
language model, each prompt's keys once, and each row's own keys; for cases with prefill, also one pass over the
prompts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Case, Inputs, Run, dtype_for
from fastrl.batch import ImageInput, Prompt
from fastrl.models.attention.prefix import use_prefix_attention
from fastrl.models.attention.switch import attention
from fastrl.models.families import VisionFeatures, family_of
from fastrl.models.policy import keyed_features
from fastrl.models.positions import mrope_positions
from fastrl.plan.configs import config_of
from fastrl.rollout import Generator, Sampling

IMAGE, VIDEO, VISION_START, VISION_END = range(4)  # ids, never sampled; any other id is text


@dataclass(frozen=True)
class Size:
    """The model and the work of one of ``SIZES``."""

    prompts: int
    group: int
    prompt: int  # tokens, picture included
    side: int  # of the picture, in tokens
    answer: int
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vision: tuple[int, int, int, int]  # layers, hidden, intermediate, heads

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def weights(self) -> int:
        """Parameters that a decode step reads: the language model's layers and the head (embeddings: a row each)."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate) + self.vocabulary * self.hidden

    @property
    def key(self) -> int:
        """Numbers kept of one token: keys and values of all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim


def _published(name: str, *work: int) -> Size:
    """The work, by a model of published sizes."""
    config = config_of(name)
    text, vision = config["text_config"], config["vision_config"]
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    tower = tuple(vision[name] for name in ("depth", "hidden_size", "intermediate_size", "num_heads"))
    return Size(*work, *(text[name] for name in names), text["num_key_value_heads"], tower)  # type: ignore[arg-type]


SIZES = {
    "tiny": Size(2, 3, 20, 2, 5, 160, 64, 96, 2, 4, 2, (2, 32, 48, 2)),
    "cpu": Size(2, 8, 300, 16, 24, 3200, 256, 672, 6, 8, 4, (4, 160, 320, 5)),
    "gpu": _published("Qwen/Qwen2.5-VL-3B-Instruct", 8, 8, 1000, 30, 64),
}


def cases(size: str) -> list[Case]:
    """All cases of this file at one of ``SIZES``."""
    return [_greedy_case(size), _sampled_case(size), _decode_case(size)]


class RandomPolicy:
    """The parts of a policy that ``Generator`` uses, around a model that is not loaded from a folder."""

    eos_token_ids: tuple[int, ...] = ()  # answers have the forced length
    suppressed_token_ids = (IMAGE, VIDEO, VISION_START, VISION_END)

    def __init__(self, core: Any) -> None:
        self.core, self.device = core, core.lm_head.weight.device

    def features(self, images: list[ImageInput]) -> dict[str, VisionFeatures]:
        return keyed_features(self.core, images)

    def decode(self, ids: Tensor) -> str:
        return ""


def build(size: Size, device: torch.device, dtype: torch.dtype) -> RandomPolicy:
    """A model of this size with random weights, from torch's current seed."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    depth, width, intermediate, heads = size.vision
    third = size.head_dim // 2 // 8 * 3
    text = {
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [size.head_dim // 2 - 2 * third, third, third],
        },
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 4,
    }
    vision = {
        "depth": depth,
        "hidden_size": width,
        "intermediate_size": intermediate,
        "num_heads": heads,
        "out_hidden_size": size.hidden,
        "window_size": 112,
        "fullatt_block_indexes": list(range(depth // 4 - 1, depth, max(1, depth // 4))) if depth >= 4 else [depth - 1],
    }
    ids = {"image": IMAGE, "video": VIDEO, "vision_start": VISION_START, "vision_end": VISION_END}
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        **{f"{name}_token_id": value for name, value in ids.items()},
    )
    with torch.device(device):
        core = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype)
    core.eval().requires_grad_(False)
    core.generation_config.eos_token_id = None
    family = family_of(core.config)
    use_prefix_attention(family, core)
    family.prepare(core)
    return RandomPolicy(core)


def make_prompts(size: Size) -> list[Prompt]:
    """Prompts of one length with a picture each: random pixels, random text."""
    grid, cells = (1, 2 * size.side, 2 * size.side), size.side**2
    prompts = []
    for number in range(size.prompts):
        ids = torch.randint(5, size.vocabulary, (size.prompt,))
        ids[1], ids[2 : 2 + cells], ids[2 + cells] = VISION_START, IMAGE, VISION_END
        picture = ImageInput(torch.randn(4 * cells, 3 * 2 * 14 * 14), grid, str(number))
        positions = mrope_positions(size.prompt, [(2, cells)], [grid], 2)
        prompts.append(Prompt(ids, positions, (picture,), ((2, cells),)))
    return prompts


@contextmanager
def plain(core: Any) -> Iterator[None]:
    """Make the model use transformers' default attention."""
    try:
        with attention(family_of(core.config), core, language="sdpa", vision="sdpa"):
            yield
    finally:
        core.model.rope_deltas = None


def given(x: Inputs, ids: Tensor | None = None) -> dict[str, Tensor]:
    """The prompts (or rows ``ids`` that begin with them) as transformers takes them."""
    policy, prompts = x["policy"], x["prompts"]
    device = policy.device
    ids = torch.stack([p.token_ids for p in prompts]).to(device) if ids is None else ids
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": torch.cat([p.images[0].pixel_values for p in prompts]).to(device, policy.core.dtype),
        "image_grid_thw": torch.tensor([p.images[0].shape for p in prompts], device=device),
    }


def generate(x: Inputs, size: Size, *, samples: int) -> Tensor:
    """New tokens [prompts x samples, answer] of transformers' ``generate``; greedy for one sample."""
    policy = x["policy"]
    options: dict[str, Any] = {"do_sample": False} if samples == 1 else {"do_sample": True, "top_k": 0, "top_p": 1.0}
    with plain(policy.core), torch.no_grad():
        out = policy.core.generate(
            **given(x),
            **options,
            num_return_sequences=samples,
            max_new_tokens=size.answer,
            min_new_tokens=size.answer,
            suppress_tokens=list(policy.suppressed_token_ids),
        )
    return out[:, size.prompt :].cpu()


def tokens_of(answers: list[list[Any]]) -> Tensor:
    """[rows, answer] int64."""
    return torch.stack([completion.token_ids for group in answers for completion in group])


def uncached(x: Inputs, size: Size) -> Tensor:
    """The most likely token after each prefix of our greedy answers [prompts, answer], by a forward without cache."""
    policy, answers = x["policy"], x["answers"].to(x["policy"].device)
    prompts = torch.stack([p.token_ids for p in x["prompts"]]).to(policy.device)
    with plain(policy.core), torch.no_grad():
        rows = given(x, torch.cat([prompts, answers], 1))
        logits = policy.core(**rows, use_cache=False, logits_to_keep=size.answer + 1).logits[:, :-1]
    return (
        logits.index_fill(-1, torch.tensor(policy.suppressed_token_ids, device=policy.device), -torch.inf)
        .argmax(-1)
        .cpu()
    )


def differing(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> dict[str, Any]:
    """Fraction of tokens that differ."""
    return {"differing_tokens": float((found[0] != expected[0]).double().mean())}


def _maker(size: Size, dtype: torch.dtype, *, session: bool = False) -> Any:
    def make(device: torch.device) -> Inputs:
        x: Inputs = {"policy": build(size, device, dtype), "prompts": make_prompts(size)}
        if session:
            x["sessions"] = {
                mode: Generator(x["policy"], decode=mode).session(x["prompts"]) for mode in ("auto", "static", "eager")
            }
        return x

    return make


def _case(size: str, name: str, rows: int, make: Any, ours: Run, peers: dict[str, Run | None], **more: Any) -> Case:
    """A case of ``rows`` answers. Its floor: a decode step's bytes, once per token but the first."""
    work, dtype = SIZES[size], dtype_for(size)
    keys = work.prompts * work.prompt + rows * work.answer / 2  # read in a step: own keys half full on average
    numbers = (work.answer - 1) * (work.weights + keys * work.key)
    shape = {"prompts": work.prompts, "rows": rows, "prompt": work.prompt, "answer": work.answer, "layers": work.layers}
    return Case(
        name=f"rollout/{name}", op="decode_attention", shape=shape, make=make, ours=ours, peers=peers,
        bytes=float(numbers * dtype.itemsize), dtype=dtype, rounds=7,
        extra={"tokens": rows * work.answer}, **more,
    )  # fmt: skip


def _greedy_case(size: str) -> Case:
    work, dtype = SIZES[size], dtype_for(size)

    def ours(x: Inputs) -> tuple[Tensor, ...]:
        sampling = Sampling(1, work.answer, temperature=0)
        x["answers"] = tokens_of(Generator(x["policy"]).generate(x["prompts"], sampling))
        return (x["answers"],)

    peers: dict[str, Run | None] = {
        "generate": lambda x: (generate(x, work, samples=1),),
        "argmax, uncached": lambda x: (uncached(x, work),),
    }
    return _case(size, "greedy", work.prompts, _maker(work, dtype), ours, peers, compare=differing)


def _sampled_case(size: str) -> Case:
    work, dtype = SIZES[size], dtype_for(size)
    rows = work.prompts * work.group

    def lengths(tokens: Tensor) -> tuple[Tensor, ...]:
        """Compare lengths only, as samples differ between the sides."""
        return ((tokens >= 0).sum(1),)

    def ours(x: Inputs) -> tuple[Tensor, ...]:
        rng = torch.Generator().manual_seed(0)
        return lengths(tokens_of(Generator(x["policy"]).generate(x["prompts"], Sampling(work.group, work.answer), rng)))

    peers: dict[str, Run | None] = {"generate": lambda x: lengths(generate(x, work, samples=work.group))}
    return _case(size, "groups", rows, _maker(work, dtype), ours, peers)


def _decode_case(size: str) -> Case:
    """Prompts are prefilled beforehand: the time of decoding only, in each of our modes."""
    work, dtype = SIZES[size], dtype_for(size)

    def decode(x: Inputs, mode: str) -> tuple[Tensor, ...]:
        rng = torch.Generator().manual_seed(0)
        return (tokens_of(x["sessions"][mode].generate(Sampling(work.group, work.answer), rng)),)

    peers: dict[str, Run | None] = {mode: lambda x, mode=mode: decode(x, mode) for mode in ("static", "eager")}
    make, rows = _maker(work, dtype, session=True), work.prompts * work.group
    return _case(size, "decode only", rows, make, lambda x: decode(x, "auto"), peers, compare=differing)
