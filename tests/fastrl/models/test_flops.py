"""Shared parts are computed once, shown by counting operations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import flop_registry

from fastrl.batch import Completion, PromptGroup, pack_row
from fastrl.data.records import Record
from fastrl.models import Policy, load_policy
from fastrl.models.flops import flop_counter
from fastrl_kernels.decode_attention import decode_attention_reference

PROMPT, COMPLETION, GROUP = 300, 24, 8


def group_of(
    policy: Policy, image: bool, prompt: int = PROMPT, completion: int = COMPLETION, size: int = GROUP
) -> PromptGroup:
    """One prompt of exactly ``prompt`` tokens (100 of them an image) and ``size`` completions."""
    images = (Image.radial_gradient("L").resize((280, 280)),) if image else ()
    content = [{"type": "image"}] * len(images)

    def encode(padding: int):
        text = {"type": "text", "text": "x" * padding}
        return policy.encode(Record("r", "qa", images, ({"role": "user", "content": [*content, text]},), {}))[0]

    encoded = encode(1 + prompt - len(encode(1).token_ids))
    assert len(encoded.token_ids) == prompt
    return PromptGroup(encoded, [Completion(torch.randint(0, 256, (completion,))) for _ in range(size)])


def shared_flops(policy: Policy, group: PromptGroup) -> int:
    batch = pack_row([group])
    with flop_counter() as counter:
        policy.logprob(batch).logp.mean().backward()
    return counter.get_total_flops()


def repeated_flops(model: torch.nn.Module, group: PromptGroup) -> int:
    """The same step in plain transformers: each completion with prompt and pixels, logits of the completion only."""
    prompt = group.prompt
    kinds = torch.zeros(1, len(prompt.token_ids) + len(group.completions[0].token_ids), dtype=torch.int32)
    inputs = {}
    for start, length in prompt.image_slots:
        kinds[:, start : start + length] = 1
    if prompt.images:
        inputs["pixel_values"] = torch.cat([image.pixel_values for image in prompt.images])
        inputs["image_grid_thw"] = torch.tensor([image.shape for image in prompt.images])
    with flop_counter() as counter:
        for completion in group.completions:
            ids = torch.cat([prompt.token_ids, completion.token_ids])[None]
            rows = torch.arange(len(prompt.token_ids) - 1, ids.shape[1] - 1)
            logits = model(
                input_ids=ids, mm_token_type_ids=kinds, use_cache=False, logits_to_keep=rows, **inputs
            ).logits
            logits.log_softmax(-1)[0].gather(1, completion.token_ids[:, None]).mean().backward()
    return counter.get_total_flops()


@pytest.fixture(params=["qwen2_5", "qwen2"])
def folder(request: pytest.FixtureRequest, tiny_folder: Callable[[str], Path]) -> Path:
    return tiny_folder(request.param)


@pytest.mark.parametrize("image", [True, False], ids=["image", "text"])
def test_a_shared_step_costs_at_most_a_quarter_of_the_repeated_one(folder: Path, image: bool) -> None:
    from transformers import AutoModelForImageTextToText

    policy = load_policy(folder, device="cpu", max_pixels=280 * 280)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    group = group_of(policy, image)
    shared, repeated = shared_flops(policy, group), repeated_flops(model, group)
    assert shared <= 0.25 * repeated, f"{shared / repeated:.3f} of the repeated layout"


def test_the_formulas_count_every_product_of_a_step(tiny_folder: Callable[[str], Path]) -> None:
    """A text-only step against a manual count from the config: linear layers, attention and head."""
    policy = load_policy(tiny_folder("qwen2"), device="cpu")
    group = group_of(policy, image=False, prompt=100, completion=5, size=3)
    config = policy.core.config.text_config
    hidden, inner, layers, vocabulary = (
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.vocab_size,
    )
    kv = hidden * config.num_key_value_heads // config.num_attention_heads
    rows, n = 100 + 3 * 5, 3 * 5
    linear = rows * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner)
    scores = (100 * 100 + 3 * 5 * 105) * hidden
    forward = 2 * layers * (linear + 2 * scores)
    backward = 2 * layers * (2 * linear + 5 * scores)
    head = 2 * n * hidden * vocabulary * (1 + 3)
    rotary = 2 * 3 * rows * (hidden // config.num_attention_heads) // 2  # a product in older releases of transformers
    assert shared_flops(policy, group) - (forward + backward + head) in (0, rotary)


def test_no_mask_of_the_whole_row_is_ever_made(tiny_folder: Callable[[str], Path]) -> None:
    """Attention of two groups costs twice that of one: hidden keys cost nothing."""
    policy = load_policy(tiny_folder("qwen2"), device="cpu")
    group = group_of(policy, image=False, prompt=80, completion=4, size=2)
    one = shared_flops(policy, group)
    with flop_counter() as counter:
        policy.logprob(pack_row([group, group])).logp.mean().backward()
    assert counter.get_total_flops() == 2 * one


def test_rows_without_gradient_are_left_out_of_the_heads_backward(tiny_folder: Callable[[str], Path]) -> None:
    policy = load_policy(tiny_folder("qwen2"), device="cpu")
    batch = pack_row([group_of(policy, image=False, prompt=80, completion=4, size=2)])
    counts = []
    for rows in (None, torch.tensor([1, 5])):
        with flop_counter() as counter:
            policy.logprob(batch, rows=rows).logp[[1, 5]].sum().backward()
        counts.append(counter.get_total_flops())
    hidden, vocabulary = policy.head_weight.shape[::-1]
    assert counts[0] - counts[1] == (8 - 2) * 2 * hidden * vocabulary * 3


def test_decode_attention_counts_as_its_eager_twin() -> None:
    rows, heads, width = 6, 4, 8
    shapes = ((rows, heads, width), (2, 2, 11, width), (2, 2, 11, width), (rows, 2, 3, width), (rows, 2, 3, width))
    tensors = [torch.randn(shape) for shape in shapes]
    with flop_counter() as counter:
        decode_attention_reference(*tensors)
    formula = flop_registry[torch.ops.fastrl.decode_attention]
    assert formula(*tensors, out_val=None) == counter.get_total_flops() > 0
