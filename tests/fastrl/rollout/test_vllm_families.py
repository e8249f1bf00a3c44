"""Requests to a vLLM server, for every family: the released processor turns them into the trainer's ids and pixels."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fastrl.models import Policy, load_policy
from fastrl.rollout import Sampling, VllmGenerator
from fastrl.rollout.vllm_requests import chat_request
from tests.helpers.families import BUILDS, Oracle, build_family
from tests.helpers.rollouts import picture, record

PICTURES = (picture(84, 60, 1), picture(56, 112, 2))


@pytest.fixture(scope="module", params=sorted(BUILDS))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, build_family(tmp_path_factory.mktemp(request.param), request.param)


def served(request: dict[str, Any], oracle: Oracle) -> dict[str, Any]:
    """Ids and pixels as a server makes them: it decodes the images, renders the messages with the folder's chat
    template and runs the released processor, which adds a BOS token only on request."""
    pictures, messages = [], []
    for message in request["messages"]:
        content = message["content"]
        if not isinstance(content, str):
            parts = []
            for part in content:
                if part["type"] == "image_url":
                    data = base64.b64decode(part["image_url"]["url"].partition("base64,")[2])
                    pictures.append(Image.open(io.BytesIO(data)).convert("RGB"))
                    part = {"type": "image"}
                parts.append(part)
            content = parts
        messages.append({**message, "content": content})
    generate = request["add_generation_prompt"]
    options = request.get("chat_template_kwargs", {})
    text = oracle.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate, **options)
    return oracle.inputs(text, pictures, add_special_tokens=request["add_special_tokens"])


def test_every_family_sends_the_right_prompt_and_pictures(family: tuple[str, Path], tmp_path: Path) -> None:
    model_type, folder = family
    policy, oracle = load_policy(folder, device="cpu"), Oracle(folder, model_type)
    most = policy.family.served_images
    for count in (0, 1, 2):
        prompt, _ = policy.encode(record("q", "What is left of it?", PICTURES[:count]))
        if most is not None and count > most:
            with pytest.raises(
                ValueError, match=rf"{count} images; for model type {model_type} at most {most} can be sent"
            ):
                chat_request(policy, prompt, Sampling(1, 4), 0)
            continue
        read = served(chat_request(policy, prompt, Sampling(1, 4), 0), oracle)
        assert read["input_ids"][0].tolist() == prompt.token_ids.tolist()
        if count:
            ours = torch.cat([image.pixel_values.flatten() for image in prompt.images])
            assert torch.equal(real_pixels(read, prompt, policy), ours)


def real_pixels(read: dict[str, Any], prompt: Any, policy: Policy) -> torch.Tensor:
    """A processor's pixels, one image after another, without the padding of a batch."""
    pixels = read["pixel_values"].float()
    if pixels.ndim < 5:
        return pixels.flatten()
    rows = pixels if len(pixels) == len(prompt.images) else pixels[0][:, None]
    counts = [len(image.pixel_values) for image in prompt.images]
    return torch.cat([row[:n].flatten() for row, n in zip(rows, counts, strict=True)])


def test_a_dialogue_that_the_template_renders_differently_is_refused_before_it_is_sent(
    family: tuple[str, Path], tmp_path: Path
) -> None:
    model_type, folder = family
    policy, oracle = load_policy(folder, device="cpu"), Oracle(folder, model_type)
    first = record("q", "Where is it?")
    printed = [{"role": "assistant", "content": "There."}, {"role": "user", "content": "And now?"}]
    dialogue = type(first)("q", "qa", (), (*first.messages, *printed), {})
    prompt, _ = policy.encode(dialogue)
    # Released templates of LLaVA close assistant turns in another form than answers end, Qwen3.5's drops thoughts.
    if model_type.startswith(("llava", "qwen3_5")):
        with pytest.raises(ValueError, match=r"use rollout\.backend: local for dialogues"):
            chat_request(policy, prompt, Sampling(1, 4), 0)
        return
    request = chat_request(policy, prompt, Sampling(1, 4), 0)
    assert served(request, oracle)["input_ids"][0].tolist() == prompt.token_ids.tolist()


def test_a_bos_token_is_requested_unless_the_template_writes_it(
    tmp_path: Path, make_folder: Callable[[str], Path]
) -> None:
    policy = load_policy(make_folder("llava"), device="cpu")
    prompt, _ = policy.encode(record("q", "Hi"))
    assert chat_request(policy, prompt, Sampling(1, 4), 0)["add_special_tokens"]
    policy.tokenizer.chat_template = "{{ bos_token }}" + policy.tokenizer.chat_template
    again, _ = policy.encode(record("q", "Hi"))
    assert again.token_ids.tolist() == prompt.token_ids.tolist()
    assert not chat_request(policy, again, Sampling(1, 4), 0)["add_special_tokens"]


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[[str], Path]:
    return lambda model_type: build_family(tmp_path / model_type, model_type)


def test_adapters_that_are_not_served_are_refused(make_folder: Callable[[str], Path], tmp_path: Path) -> None:
    policy = load_policy(make_folder("llava_onevision"), device="cpu", lora={"rank": 2})
    with pytest.raises(ValueError, match="vLLM serves no LoRA adapters for model type llava_onevision"):
        VllmGenerator(policy, "http://127.0.0.1:9", folder=tmp_path, updates=int)
