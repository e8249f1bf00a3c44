"""liger-kernel's layers: the right modules are replaced, per instance, and compute what transformers' own compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastrl.data.records import Record
from fastrl.models import Policy, load_policy
from fastrl.models.layer_kinds import MERGED, THREE_AXES, with_global
from fastrl.models.liger import _replacement, drop_liger, use_liger
from fastrl.rollout import Generator, Sampling
from fastrl.run.setup import load_model
from tests.helpers.groups import picture_batch
from tests.helpers.training import make_recipe


@pytest.fixture(params=["qwen2_5", "qwen2"])
def folder(request: pytest.FixtureRequest, tiny_folder: Callable[[str], Path]) -> Path:
    return tiny_folder(request.param)


def run(policy: Policy) -> tuple[Tensor, dict[str, Tensor]]:
    policy.core.zero_grad()
    logp = policy.logprob(picture_batch(policy).to(policy.device)).logp
    logp.sum().backward()
    return logp.detach(), {n: p.grad.clone() for n, p in policy.core.named_parameters() if p.grad is not None}


def assert_parity(policy: Policy, tolerance: float) -> None:
    """Log-probs and all gradients, with and without liger."""
    want, want_gradients = run(policy)
    done = use_liger(policy.core)
    assert set(done) == {"rms_norm", "swiglu", "rope"}
    got, gradients = run(policy)
    changed = [name for name, gradient in want_gradients.items() if not torch.equal(gradients[name], gradient)]
    assert changed, "the same bits: nothing was switched"
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    assert gradients.keys() == want_gradients.keys()
    scale = max(float(g.norm()) for g in want_gradients.values())
    for name, gradient in want_gradients.items():
        allowed = tolerance * max(float(gradient.norm()), 1e-3 * scale)
        assert float((gradients[name] - gradient).norm()) <= allowed, name
    drop_liger(policy.core)
    assert torch.equal(run(policy)[0], want)


@pytest.fixture
def as_compiled(monkeypatch) -> None:
    """Features that the interpreter lacks: a compiled kernel sees scalars as float32, and has device library
    functions."""
    from liger_kernel.ops import rms_norm
    from triton.runtime import interpreter

    language, real = interpreter.tl, interpreter._implicit_cvt

    def convert(value: Any) -> Any:
        if type(value) is not float:
            return real(value)
        return language.tensor(
            interpreter.TensorHandle(np.array([value], np.float32), language.float32), language.float32
        )

    monkeypatch.setattr(interpreter, "_implicit_cvt", convert)
    monkeypatch.setattr(rms_norm, "rsqrt", lambda x: language.rsqrt(x))


@pytest.mark.gate
@pytest.mark.interpreter
def test_interpreted_kernels_give_the_log_probs_and_gradients_of_transformers(folder: Path, as_compiled) -> None:
    pytest.importorskip("liger_kernel")
    assert_parity(load_policy(folder, device="cpu"), 2e-4)


@pytest.mark.gpu
def test_gpu_kernels_give_the_log_probs_and_gradients_of_transformers(folder: Path) -> None:
    pytest.importorskip("liger_kernel")
    assert_parity(load_policy(folder, device="cuda", dtype=torch.float32), 1e-3)


@pytest.mark.gpu
def test_gpu_rollouts_run_on_them_in_graphs(folder: Path) -> None:
    pytest.importorskip("liger_kernel")
    plain, switched = (load_policy(folder, device="cuda", dtype=torch.float32, liger=on) for on in (False, True))
    content = [{"type": "text", "text": "Hi"}]
    prompts = [plain.encode(Record("r", "qa", (), ({"role": "user", "content": content},), {}))[0]]
    ((want,),), ((got,),) = (Generator(p).generate(prompts, Sampling(1, 24, temperature=0)) for p in (plain, switched))
    assert torch.equal(got.token_ids, want.token_ids)


def kinds(core: nn.Module) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, module in core.named_modules():
        kind, _ = _replacement(module)
        if kind is not None:
            found.setdefault(kind, []).append(name)
    return found


def test_the_layers_found_are_all_of_their_kind_and_no_others(folder: Path) -> None:
    core = load_policy(folder, device="cpu").core
    layers, language = len(core.model.language_model.layers), "model.language_model"
    found = kinds(core)
    norms = [name for name, module in core.named_modules() if type(module).__name__.endswith("RMSNorm")]
    assert found["rms_norm"] == norms
    assert f"{language}.norm" in norms
    assert found["rope"] == [f"{language}.layers.{i}.self_attn" for i in range(layers)]
    gated = [name for name, module in core.named_modules() if hasattr(module, "gate_proj")]
    assert found["swiglu"] == gated
    assert {f"{language}.layers.{i}.mlp" for i in range(layers)} <= set(gated)


def test_layers_are_found_under_lora_too(tiny_folder: Callable[[str], Path]) -> None:
    plain = load_policy(tiny_folder("qwen2_5"), device="cpu").core
    adapted = load_policy(tiny_folder("qwen2_5"), device="cpu", lora={"rank": 2, "also_train": ["visual.merger"]}).core
    assert {k: len(v) for k, v in kinds(adapted).items()} == {
        kind: len(names) + (kind == "rms_norm")  # peft keeps the merger's first weights beside those it trains
        for kind, names in kinds(plain).items()
    }


def test_only_instances_change_and_all_is_put_back(folder: Path, monkeypatch) -> None:
    """Another model in the process keeps its code, as do the classes and transformers' modules."""
    pytest.importorskip("liger_kernel")
    monkeypatch.setattr("fastrl_kernels._common.interpreting", lambda: True)  # says the kernels would run; none does
    core, other = load_policy(folder, device="cpu").core, load_policy(folder, device="cpu").core
    attention = core.model.language_model.layers[0].self_attn
    classes = {type(m): type(m).forward for m in core.modules()}
    rotary = type(attention).forward.__globals__[MERGED]
    done = use_liger(core)
    switched = [m for m in core.modules() if "forward" in m.__dict__ and _replacement(m)[0]]
    assert len(switched) == sum(done.values()) == sum(map(len, kinds(core).values()))
    assert attention.forward.__func__.__globals__[MERGED] is not rotary
    assert type(attention).forward.__globals__[MERGED] is rotary
    assert all(type(m).forward is classes[type(m)] for m in core.modules())
    assert not any("forward" in m.__dict__ for m in other.model.language_model.modules())
    drop_liger(core)
    assert not any("forward" in m.__dict__ for m in core.model.language_model.modules())
    assert "forward" in core.model.visual.patch_embed.__dict__  # not supported by liger: unchanged


def test_both_names_of_the_rotary_function_are_replaced() -> None:
    """Versions of transformers whose layers merge the three axes themselves use another name."""
    for name in (MERGED, THREE_AXES):
        scope: dict[str, Any] = {name: lambda *_: "theirs"}
        exec(f"def forward(self, *given): return {name}(*given)", scope)
        changed = with_global(scope["forward"], name, lambda *_: "ours")
        assert (scope["forward"](None), changed(None)) == ("theirs", "ours")
        assert changed.__name__ == "forward"


def test_it_is_refused_without_a_gpu_and_where_there_is_nothing_to_switch(folder: Path, monkeypatch) -> None:
    with pytest.raises(ValueError, match=r"model\.liger: liger's kernels need a GPU, and the model is on cpu"):
        load_policy(folder, device="cpu", liger=True)
    monkeypatch.setattr("fastrl_kernels._common.interpreting", lambda: True)
    if pytest.importorskip("liger_kernel"):
        with pytest.raises(ValueError, match="found no RMSNorm, SwiGLU or rotary layer in Linear"):
            use_liger(nn.Linear(2, 2))


def test_one_recipe_key_switches_it(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = make_recipe(tiny_folder("qwen2_5"), tmp_path, model__liger=True)
    with pytest.raises(ValueError, match=r"model\.liger: liger's kernels need a GPU"):
        load_model(recipe)
