"""Whole models on the variable-length path against the dense path, and the choice between the two."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from fastrl.batch import Completion, PackedBatch, PromptGroup, pack_row
from fastrl.data.records import Record
from fastrl.models import Policy, load_policy
from fastrl_kernels import varlen
from tests.helpers.attention import eager_varlen

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def group(policy: Policy, images: list[Image.Image], text: str, lengths: list[int], seed: int) -> PromptGroup:
    generator = torch.Generator().manual_seed(seed)
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
    prompt, _ = policy.encode(Record(f"r{seed}", "qa", tuple(images), ({"role": "user", "content": content},), {}))
    completions = []
    for length in lengths:
        completion = Completion(torch.randint(0, 256, (length,), generator=generator))
        completion.per_token["weight"] = torch.randn(length, generator=generator)
        completions.append(completion)
    return PromptGroup(prompt, completions)


def picture(width: int, height: int, seed: int) -> Image.Image:
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def ragged_batch(policy: Policy) -> PackedBatch:
    """Several images, one image, none; ragged completions, some of length 1 and 0, a group of one."""
    a, b, c = picture(120, 90, 1), picture(60, 112, 2), picture(84, 84, 3)
    return pack_row(
        [
            group(policy, [a, b], "Compare.", [5, 1, 9, 3], 1),
            group(policy, [], "No picture here.", [1, 20, 2], 2),
            group(policy, [c], "Count.", [6], 3),
            group(policy, [b, c, a], "All.", [3, 0, 1], 4),
        ]
    )


def run(policy: Policy, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs and every gradient of their weighted sum."""
    policy.core.zero_grad()
    logp = policy.logprob(batch).logp
    (logp * batch.per_token["weight"]).sum().backward()
    return logp.detach(), {n: p.grad.clone() for n, p in policy.core.named_parameters() if p.grad is not None}


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    scale = max(float(g.double().norm()) for g in want.values())
    for name, gradient in want.items():  # some are zero up to rounding (the key bias): those compare with the whole
        allowed = tolerance * max(float(gradient.double().norm()), 1e-3 * scale)
        assert float((got[name].double() - gradient.double()).norm()) <= allowed, name


@pytest.fixture(params=["qwen2_5", "qwen2"])
def folder(request: pytest.FixtureRequest, tiny_folder: Callable[[str], Path]) -> Path:
    return tiny_folder(request.param)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_variable_length_calls_give_what_the_dense_path_gives(folder, checkpointing: bool, monkeypatch) -> None:
    """Language and vision, outputs and all gradients, with one call per layer: no loop over windows or images."""
    policy = load_policy(folder, device="cpu", gradient_checkpointing=checkpointing)
    batch = ragged_batch(policy)
    want, want_gradients = run(policy, batch)
    calls: list[tuple[bool, int]] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, *rest: Any, **options: Any) -> Tensor:
        calls.append((options["causal"], len(cu_q) - 1))
        return eager_varlen(q, k, v, cu_q, *rest, **options)

    monkeypatch.setattr(varlen, "choose", lambda *_: varlen.Path(spy, "a stand-in"))
    got, gradients = run(policy, batch)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)
    assert_close(gradients, want_gradients, 2e-5)

    times = 2 if checkpointing else 1
    language = [segments for causal, segments in calls if causal]
    vision = [segments for causal, segments in calls if not causal]
    assert language == [4 + 10] * times * len(policy.core.model.language_model.layers)  # prompts, answers of a token
    assert len(vision) == times * len(policy.core.model.visual.blocks)
    if hasattr(policy.core.model.visual.config, "window_size"):
        assert len(set(vision)) == 2  # windows in some layers, whole images in others
    else:
        assert set(vision) == {3}  # each image once per batch


def test_a_text_only_batch_takes_the_variable_length_path(folder, monkeypatch) -> None:
    policy = load_policy(folder, device="cpu")
    batch = pack_row([group(policy, [], "Hello.", [1, 1, 7], 5)])
    want, want_gradients = run(policy, batch)
    monkeypatch.setattr(varlen, "choose", lambda *_: varlen.Path(eager_varlen, "a stand-in"))
    got, gradients = run(policy, batch)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)
    assert_close(gradients, want_gradients, 2e-5)


@pytest.mark.gpu
def test_gpu_a_bfloat16_model_stays_within_its_rounding_of_float32(folder) -> None:
    """The kernel refuses float32, so it runs in bfloat16, against the dense float32 path with the same weights and
    batch."""
    exact, quick = (load_policy(folder, device="cuda", dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    dim = quick.core.config.get_text_config().hidden_size // quick.core.config.get_text_config().num_attention_heads
    call, reason = varlen.choose(quick.device, torch.bfloat16, dim)
    if call is None:
        pytest.skip(reason)
    with torch.no_grad():  # the same weights on both sides
        for p, q in zip(exact.core.parameters(), quick.core.parameters(), strict=True):
            p.copy_(q)
    batch = ragged_batch(exact).to("cuda")
    want, want_gradients = run(exact, batch)
    got, gradients = run(quick, batch)
    assert float((got - want).abs().mean()) < 0.05
    dense = varlen.Path(None, "asked for")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, "choose", lambda *_: dense)
        rounded, rounded_gradients = run(quick, batch)

    def error(of: dict[str, Tensor]) -> float:
        return float(sum((of[n].double() - g.double()).norm() ** 2 for n, g in want_gradients.items()) ** 0.5)

    assert float((got - want).norm()) <= 2 * float((rounded - want).norm())  # no worse than rounding to bfloat16
    assert error(gradients) <= 2 * error(rounded_gradients)
