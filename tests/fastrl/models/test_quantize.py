"""4-bit base weights: refused without a GPU or the library; if it is installed, they are trained on its CPU path,
with the device check disabled."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastrl.models import Policy, load_policy
from fastrl.models.families import family_of
from fastrl.models.load import read_config
from fastrl.models.quantize import check_quantize, dequantized, is_quantized, quantized_bytes, quantized_layers
from fastrl.recipe import RecipeError
from fastrl.rollout import Generator, Sampling
from fastrl.trainer import train
from tests.helpers.training import make_recipe, make_records, steady_rows

Folder = Callable[[str], Path]
LORA = {"rank": 2, "dropout": 0.1}


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allows quantization on a CPU, which bitsandbytes supports but slowly."""
    pytest.importorskip("bitsandbytes")
    # Otherwise it packs weights for AVX-512 in place, which is irreversible and not possible for every width
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    for place in ("fastrl.models.load.check_quantize", "fastrl.trainer.check_quantize"):
        monkeypatch.setattr(place, lambda device: None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu")])
def test_it_needs_a_gpu(device: Any) -> None:
    with pytest.raises(ValueError, match=r"model\.quantize: 4bit needs a GPU, and the model is on the cpu"):
        check_quantize(device)


def test_it_needs_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match="needs bitsandbytes, which cannot be imported"):
        check_quantize("cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_run_is_refused_before_data_and_model_are_loaded(tmp_path: Path) -> None:
    changes = {"model__quantize": "4bit", "model__lora": LORA, "model__device": None}
    recipe = make_recipe(Path("no/such"), tmp_path / "run", **changes)
    with pytest.raises(ValueError, match="needs a GPU"):
        train(recipe, show=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__lora": None}, "4-bit weights cannot be trained"),
        ({"model__device": "cpu"}, "needs a GPU"),
        ({"rollout__backend": "vllm", "rollout__server": "http://localhost:8000"}, "samples with unquantized weights"),
        ({"engine__kind": "deepspeed"}, "needs engine.kind: local"),
        ({"model__quantize": "8bit"}, "4bit"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_recipe(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    common = {"model__quantize": "4bit", "model__lora": LORA, "model__device": None}
    with pytest.raises(RecipeError, match=message):
        make_recipe(Path("x"), tmp_path, **{**common, **changes})


def test_it_is_for_the_language_models_layers(tiny_folder: Folder) -> None:
    folder = tiny_folder("qwen2")  # whose head is not tied to the embedding
    family = family_of(read_config(folder), folder)
    core = family.load(folder, torch.float32)
    names = [name for name, _ in quantized_layers(core, family)]
    assert len(names) == 2 * 7
    assert all("language_model" in name for name in names)
    assert not any("lm_head" in name or "visual" in name for name in names)


def quantized_policy(folder: Path) -> Policy:
    policy = load_policy(folder, device="cpu", lora=LORA, quantize="4bit")
    with torch.no_grad():
        for name, parameter in policy.core.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
    return policy


def test_what_is_trained_sampled_and_saved(tiny_folder: Folder, tmp_path: Path, on_cpu: None) -> None:
    folder = tiny_folder("qwen2_5")
    policy, plain = quantized_policy(folder), load_policy(folder, device="cpu")
    layers = [module for module in policy.core.modules() if is_quantized(module)]
    assert policy.quantized
    assert not plain.quantized
    assert len(layers) == 2 * 7
    assert all(".lora_" in name for name, p in policy.core.named_parameters() if p.requires_grad)
    prompt, _ = policy.encode(make_records(1)[0])
    (answers,) = Generator(policy).generate([prompt], Sampling(2, 6), torch.Generator().manual_seed(0))
    policy.save(tmp_path / "merged")
    policy.save_adapter(tmp_path / "adapter")
    size = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert size == pytest.approx(policy.saved_bytes, rel=0.1)
    merged = load_policy(tmp_path / "merged", device="cpu")
    from fastrl.batch import PromptGroup, pack_row

    batch = pack_row([PromptGroup(prompt, answers)])
    with torch.no_grad():
        own, after = policy.logprob(batch).logp, merged.logprob(batch).logp
    assert (own - batch.per_token["sampler_logp"]).abs().max() < 1e-5
    assert (own - after).abs().max() < 1e-4
    named = dict(plain.core.named_modules())
    for name, module in policy.core.named_modules():
        if is_quantized(module):
            exact = named[name.removeprefix("base_model.model.").replace(".base_layer", "")].weight
            assert (dequantized(module) - exact).norm() <= 0.3 * exact.norm()  # so few scales are rounded coarsely


def test_a_run_resumes_bit_for_bit(tiny_folder: Folder, tmp_path: Path, on_cpu: None) -> None:
    folder, records = tiny_folder("qwen2_5"), make_records()

    def run(out: str, steps: int) -> None:
        changes = {"model__lora": LORA, "method__beta": 0.05, "optim__lr": 1e-2, "optim__steps": steps}
        recipe = make_recipe(folder, tmp_path / out, model__quantize="4bit", model__device=None, **changes)
        train(recipe, records=records, show=False, resume=True)

    run("whole", 2)
    run("parts", 1)
    run("parts", 2)
    assert steady_rows(tmp_path / "whole") == steady_rows(tmp_path / "parts")
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


@pytest.mark.parametrize("shape", [(64, 64), (128, 96), (1536, 2048)])
def test_the_planned_bytes_are_those_held(shape: tuple[int, int]) -> None:
    library = pytest.importorskip("bitsandbytes")
    linear = nn.Linear(*shape, bias=False)
    weight = library.nn.Params4bit(
        linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, blocksize=64
    ).to("cpu")
    state = weight.quant_state
    held = [weight, state.absmax, state.state2.absmax]
    assert sum(t.numel() * t.element_size() for t in held) == quantized_bytes(shape[0] * shape[1])
