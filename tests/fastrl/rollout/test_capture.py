"""The requirements of CUDA graphs for a decode step, checked without a GPU: the step runs on the meta device with
the operators of a GPU. Its tensors have no values, so anything that would wait for the device or copy to it raises
or is recorded."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl.plan.trace import meta_model
from fastrl.recipe import LoraRecipe, ModelRecipe
from fastrl.rollout import Sampling
from fastrl.rollout.cache import rollout_mode
from fastrl_kernels._common import interpreting
from tests.fastrl.conftest import build_config, build_tokenizer
from tests.helpers.decode_steps import Recorded, decode_of

LAUNCHES = {  # of a layer in a decode step; all others are views
    "aten.addmm.default": 3,  # queries, keys, values
    "aten.mm.default": 4,  # output, gate, up, down
    "fastrl.add_rms_norm.default": 2,
    "fastrl.rope_append.default": 1,
    "fastrl.decode_attention.default": 1,
    "fastrl.gated_mul.default": 1,
}
pytestmark = pytest.mark.skipif(interpreting(), reason="tensors on the meta device hold nothing to interpret")


@pytest.fixture(autouse=True)
def gpu_path(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("decode_layer", "decode_attention"):
        monkeypatch.setattr(sys.modules[f"fastrl_kernels.{name}"], "use_triton", lambda *_: True)


def model_of(style: str, layers: int, lora: int | None = None) -> Any:
    config = build_config(style, build_tokenizer(), num_hidden_layers=layers, vocab_size=3000).to_dict()
    adapter = None if lora is None else LoraRecipe(rank=lora)  # type: ignore[call-arg]
    return meta_model(config, ModelRecipe(path="", lora=adapter), torch.bfloat16)


@pytest.mark.parametrize("sampling", [Sampling(4, 6), Sampling(4, 6, 0.7, 0.9, 50), Sampling(1, 6, temperature=0)])
@pytest.mark.parametrize(("style", "lora"), [("qwen2_5", None), ("qwen2", None), ("qwen2_5", 4)])
def test_a_captured_step_reads_nothing_on_the_host_and_copies_nothing_to_the_device(
    style: str, lora: int | None, sampling: Sampling
) -> None:
    core = model_of(style, 2, lora)
    with rollout_mode(core):
        decode = decode_of(core, sampling)
        held = [dict(vars(holder)) for holder in (decode, decode.cache)]
        with Recorded() as recorded:
            decode.step()
        assert recorded.elsewhere == []
        with pytest.raises((RuntimeError, NotImplementedError)):  # tests the check itself: this one reads a value
            decode._any_left()
    for holder, before in zip((decode, decode.cache), held, strict=True):  # a graph replays on the same addresses
        for name, x in vars(holder).items():
            assert not isinstance(x, Tensor) or x is before[name], name


def test_a_layer_is_twelve_operators() -> None:
    counts = []
    for layers in (5, 3):
        core = model_of("qwen2_5", layers)
        with rollout_mode(core):
            decode = decode_of(core, Sampling(4, 6))
            with Recorded() as recorded:
                decode.step()
        counts.append(recorded.calls)
    more, less = counts
    assert more - less == Counter({name: 2 * count for name, count in LAUNCHES.items()})


def test_what_a_capture_forbids_is_noticed() -> None:
    x = torch.empty(3, device="meta")
    with pytest.raises(RuntimeError, match="meta"):
        x.sum().item()
    with Recorded() as recorded:
        x.sum()
        torch.empty(3).sum()
    assert recorded.elsewhere == ["aten.empty.memory_format", "aten.sum.default"]
