"""Rollouts with merged adapters: the tokens of separate ones, a plain step's kernels, and a run that resumes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrl.models import Policy, load_policy
from fastrl.models.families import FAMILIES
from fastrl.models.kept import KeptPrompts
from fastrl.models.merged import Merged
from fastrl.models.native_layers import NativeLayers
from fastrl.plan.trace import meta_model
from fastrl.recipe import LoraRecipe, ModelRecipe
from fastrl.rollout import Generator, Sampling
from fastrl.rollout.decode import Decode
from fastrl.rollout.generator import sampling_mode
from fastrl.trainer import train
from fastrl_kernels._common import interpreting
from tests.helpers.decode_steps import Recorded, decode_of
from tests.helpers.rollouts import encode, make_records, rng
from tests.helpers.training import make_recipe, steady_rows
from tests.helpers.training import make_records as training_records

Folder = Callable[[str], Path]


def adapted(folder: Path, **options: Any) -> Policy:
    torch.manual_seed(0)
    policy = load_policy(folder, device="cpu", **{"lora": {"rank": 4}, **options})
    with torch.no_grad():
        for name, parameter in policy.core.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    return policy


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_the_tokens_are_those_of_separate_adapters(tiny_folder: Folder, dora: bool, kept: bool) -> None:
    policy = adapted(tiny_folder("qwen2_5"), lora={"rank": 4, "dora": dora})
    prompts, sampling = encode(policy, make_records()), Sampling(3, 10)
    separate = Generator(policy).generate(prompts, sampling, rng())
    keep = KeptPrompts() if kept else None
    generator = Generator(policy, merge=True, max_rows=6)  # several chunks
    merged = generator.generate(prompts, sampling, rng(), keep=keep)
    for one, other in zip((c for g in separate for c in g), (c for g in merged for c in g), strict=True):
        assert torch.equal(one.token_ids, other.token_ids)
        torch.testing.assert_close(one.sampler_logp, other.sampler_logp, rtol=1e-4, atol=1e-4)
    assert keep is None or len(keep) == len(prompts)


def test_a_copy_is_made_once_per_rollout_and_decodes_in_cpp(
    tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = adapted(tiny_folder("qwen2_5"))
    made, layers = [], []
    begin = Decode.run

    def run(self: Decode, **options: Any) -> None:
        layers.append(type(self.layers))
        begin(self, **options)

    monkeypatch.setattr("fastrl.rollout.generator.Merged", lambda core: made.append(Merged(core)) or made[-1])
    monkeypatch.setattr(Decode, "run", run)
    prompts = encode(policy, make_records())
    Generator(policy, merge=True, max_rows=6).generate(prompts, Sampling(3, 4), rng())
    assert len(made) == 1
    assert len(layers) > 1
    if not interpreting():
        assert set(layers) == {NativeLayers}
    layers.clear()
    Generator(policy).generate(prompts, Sampling(3, 4), rng())
    assert (len(made), NativeLayers in layers) == (1, False)


def test_a_session_goes_on_with_merged_weights(tiny_folder: Folder) -> None:
    policy = adapted(tiny_folder("qwen2_5"))
    prompts = encode(policy, make_records()[:2])
    said = []
    for merge in (False, True):
        session = Generator(policy, merge=merge).session(prompts)
        session.extend([policy.encode_text("again")] * 2)
        said.append([c.token_ids for group in session.generate(Sampling(2, 6), rng()) for c in group])
    assert all(torch.equal(a, b) for a, b in zip(*said, strict=True))


FEW = {"text_config": {"num_hidden_layers": 4, "vocab_size": 16896}, "vision_config": {"depth": 1}}
QWEN = "Qwen/Qwen2.5-VL-3B-Instruct"


def operators(monkeypatch: pytest.MonkeyPatch, *, lora: bool, merge: bool, layers: int) -> int:
    """Operators of one decode step of Qwen2.5-VL-3B with so many layers that are not views, as on a GPU."""
    for name in ("fastrl_kernels.decode_layer", "fastrl_kernels.decode_attention", "fastrl_kernels.lora"):
        monkeypatch.setattr(sys.modules[name], "use_triton", lambda *_: True)
    monkeypatch.setattr("fastrl.models.adapted.use_triton", lambda *_: True)
    config = next(family.published[QWEN] for family in FAMILIES.values() if QWEN in family.published)
    parts = {key: {**config[key], **values} for key, values in FEW.items()}
    parts["text_config"]["num_hidden_layers"] = layers
    spec = LoraRecipe(rank=16) if lora else None  # type: ignore[call-arg]
    core = meta_model({**config, **parts}, ModelRecipe(path=QWEN, lora=spec), torch.bfloat16)  # type: ignore[call-arg]
    with sampling_mode(core, Merged(core) if merge else None):
        decode = decode_of(core, Sampling(8, 64))
        decode.step()  # what a decode prepares once
        with Recorded() as recorded:
            decode.step()
    return sum(recorded.calls.values())


@pytest.mark.skipif(interpreting(), reason="tensors on the meta device hold nothing to interpret")
def test_a_step_with_merged_weights_is_the_plain_step(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = operators(monkeypatch, lora=False, merge=False, layers=4)
    assert operators(monkeypatch, lora=True, merge=True, layers=4) <= 1.02 * plain
    assert operators(monkeypatch, lora=True, merge=False, layers=4) > plain


@pytest.mark.skipif(interpreting(), reason="tensors on the meta device hold nothing to interpret")
def test_separate_adapters_take_one_launch_for_each_of_a_layers_four_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, stacks = 12, 4
    for layers in (2, 4):
        plain = operators(monkeypatch, lora=False, merge=False, layers=layers)
        assert operators(monkeypatch, lora=True, merge=False, layers=layers) == plain + stacks * layers
        rest = plain - layer * layers
    assert rest + (layer + stacks) * 36 <= 1.30 * (rest + layer * 36)  # the whole model


def test_a_run_samples_merged_and_resumes_bit_for_bit(tiny_folder: Folder, tmp_path: Path, capsys: Any) -> None:
    folder, records = tiny_folder("qwen2_5"), training_records()
    changes: dict[str, Any] = {"model__lora": {"rank": 2}, "model__dtype": "bfloat16", "optim__lr": 1e-2}
    changes |= {"optim__steps": 2, "rollout__decode": "eager"}
    for out in ("whole", "parts"):
        if out == "parts":
            train(make_recipe(folder, tmp_path / out, **{**changes, "optim__steps": 1}), records=records, show=False)
        train(make_recipe(folder, tmp_path / out, **changes), records=records, show=out == "whole", resume=True)
    assert "rollouts sample with merged adapters: the merged copy takes" in capsys.readouterr().err
    assert steady_rows(tmp_path / "whole") == steady_rows(tmp_path / "parts")
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        both = [(tmp_path / out / name).read_bytes() for out in ("whole", "parts")]
        assert both[0] == both[1]
