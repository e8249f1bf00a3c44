"""Adapted layers: peft's results in every family, float64 truth in bfloat16, one product per stack, and the bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastrl.models import Policy, load_policy
from fastrl.models.adapted import _Adapted, use_stacked
from fastrl.models.families import FAMILIES, family_of
from fastrl.plan.trace import meta_model, trace_batch
from fastrl.plan.workload import packed
from fastrl.recipe import LoraRecipe, ModelRecipe
from fastrl_kernels._common import interpreting
from tests.helpers.families import BUILDS, build_family
from tests.helpers.groups import picture_batch

Folder = Callable[[str], Path]


def adapted(folder: Path, **options: Any) -> Policy:
    """A policy with adapters that change its output."""
    torch.manual_seed(0)
    policy = load_policy(folder, device="cpu", **options)
    with torch.no_grad():
        for name, parameter in policy.core.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, dtype=torch.float64))
    return policy


def layers(core: nn.Module) -> list[Any]:
    return [module for module in core.modules() if hasattr(module, "fastrl_shared")]


@contextmanager
def peft_forward(core: nn.Module) -> Iterator[None]:
    """In a block, the adapted layers run peft's own code."""
    switched = layers(core)
    held = [vars(module).pop("forward") for module in switched]
    try:
        yield
    finally:
        for module, forward in zip(switched, held, strict=True):
            module.forward = forward


def run(policy: Policy) -> tuple[Tensor, dict[str, Tensor]]:
    policy.core.zero_grad()
    torch.manual_seed(3)  # of dropout
    logp = policy.logprob(picture_batch(policy)).logp
    (logp * torch.linspace(-1, 2, len(logp))).sum().backward()
    return logp.detach(), {n: p.grad.clone() for n, p in policy.core.named_parameters() if p.grad is not None}


def assert_pefts(policy: Policy, within: float) -> None:
    assert layers(policy.core)
    got = run(policy)
    with peft_forward(policy.core):
        want = run(policy)
    torch.testing.assert_close(got[0], want[0], rtol=within, atol=within)
    assert got[1].keys() == want[1].keys()
    scale = max(float(g.norm()) for g in want[1].values())
    assert scale > 0
    for name, gradient in want[1].items():
        allowed = 2 * within * max(float(gradient.norm()), 1e-3 * scale)
        assert float((got[1][name] - gradient).norm()) <= allowed, name


OPTIONS: list[dict[str, Any]] = [
    {"lora": {"rank": 4}},
    {"lora": {"rank": 4, "rslora": True}, "gradient_checkpointing": True},
    {"lora": {"rank": 4, "dropout": 0.3}},
    {"lora": {"rank": 4, "targets": ["v_proj", "q_proj", "up_proj"], "also_train": ["projector"]}},
    {"lora": {"rank": 4, "targets": ["language", "vision"]}, "freeze": ["language.layers.0"]},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_values_and_gradients_are_pefts_in_float64(tiny_folder: Folder, options: dict[str, Any]) -> None:
    assert_pefts(adapted(tiny_folder("qwen2_5"), dtype=torch.float64, **options), 1e-12)


def test_float32_is_as_close_to_float64_as_peft(tiny_folder: Folder) -> None:
    """Log-probs differ by at most 1e-6 of their size; the gradient's error is that of peft's code or less."""
    policy = adapted(tiny_folder("qwen2_5"), lora={"rank": 4})
    ours = run(policy)
    with peft_forward(policy.core):
        theirs = run(policy)
        truth = run(double(policy))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-6)
    errors = [
        sum(float((g - truth[1][name]).square().sum()) for name, g in found[1].items()) for found in (ours, theirs)
    ]
    assert errors[0] <= 2 * errors[1]


def double(policy: Policy) -> Policy:
    policy.core.double()
    return policy


FAMILY_NAMES = [
    pytest.param(n, marks=[] if n in ("qwen3_vl", "internvl") else pytest.mark.gate) for n in sorted(BUILDS)
]


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_every_family_computes_what_peft_does(tmp_path: Path, model_type: str) -> None:
    folder = build_family(tmp_path, model_type)
    experts = model_type.endswith("moe")  # torch's grouped products take no float64
    dtype, within = (torch.float32, 2e-5) if experts else (torch.float64, 1e-10)
    assert_pefts(adapted(folder, dtype=dtype, lora={"rank": 2, "targets": ["language"]}), within)


def test_two_runs_give_the_same_bits(tiny_folder: Folder) -> None:
    policy = adapted(tiny_folder("qwen2_5"), lora={"rank": 4, "dropout": 0.1}, dtype=torch.bfloat16)
    first, second = run(policy), run(policy)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(gradient, second[1][name]) for name, gradient in first[1].items())


class Attention(nn.Module):
    """Three layers of one input, as peft wraps them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.q_proj, self.k_proj = nn.Linear(96, 64, dtype=dtype), nn.Linear(96, 16, dtype=dtype)
        self.v_proj = nn.Linear(96, 16, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


def wrapped(dtype: torch.dtype, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj"], **options)
    model: Any = get_peft_model(Attention(dtype), config).base_model.model  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def truth(model: Any, x: Tensor, grads: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients (of the input, and of each layer's A and B) in float64."""
    x = x.detach().double().requires_grad_()
    outputs, weights = [], []
    for module in (model.q_proj, model.k_proj, model.v_proj):
        base = module.get_base_layer()
        low, high = (
            part["default"].weight.detach().double().requires_grad_() for part in (module.lora_A, module.lora_B)
        )
        out = x @ base.weight.detach().double().t() + module.scaling["default"] * ((x @ low.t()) @ high.t())
        outputs.append(out if base.bias is None else out + base.bias.detach().double())
        weights += [low, high]
    wanted = torch.autograd.grad(outputs, [x, *weights], [g.double() for g in grads])
    return [out.detach() for out in outputs], list(wanted)


def test_bfloat16_products_over_float32_masters_are_as_close_to_float64_as_pefts() -> None:
    model = wrapped(torch.bfloat16)
    use_stacked(model)
    x = torch.randn(40, 96, dtype=torch.bfloat16, requires_grad=True)
    adapters = [
        part["default"].weight for m in (model.q_proj, model.k_proj, model.v_proj) for part in (m.lora_A, m.lora_B)
    ]
    assert {a.dtype for a in adapters} == {torch.float32}

    def errors() -> list[float]:
        outputs = model(x)
        grads = [torch.randn(o.shape, generator=torch.Generator().manual_seed(2)).to(o.dtype) for o in outputs]
        got = [*outputs, *torch.autograd.grad(outputs, [x, *adapters], grads)]
        assert {g.dtype for g in got[4:]} == {torch.float32}
        want = [t for found in truth(model, x, grads) for t in found]
        return [float((g.double() - w).norm() / w.norm()) for g, w in zip(got, want, strict=True)]

    ours = errors()
    with peft_forward(model):
        theirs = errors()
    assert all(error < 2**-7 for error in ours)  # rounding once is up to 2^-9; a product of rounded factors more
    assert max(ours[:4]) < 2 * max(theirs[:4])  # outputs and the gradient of the input


@pytest.mark.parametrize("given", [False, True])
def test_the_function_has_the_gradients_of_its_formula(given: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = randn(2, 3, 5).requires_grad_()
    weights, biases = [randn(4, 5), randn(6, 5)], [randn(4), None]
    bases = [randn(2, 3, 4).requires_grad_(), randn(2, 3, 6).requires_grad_()]
    lows, highs = [[randn(*s).requires_grad_() for s in shapes] for shapes in (((2, 5), (3, 5)), ((4, 2), (6, 3)))]

    def call(x: Tensor, *rest: Tensor) -> Any:
        parts = list(zip(rest[::3], rest[1::3], rest[2::3], strict=True))
        each = [
            (None, None, base, a, b) if given else (w, bias, None, a, b)
            for (base, a, b), w, bias in zip(parts, weights, biases, strict=True)
        ]
        return _Adapted.apply(x, (0.5, 2.0), torch.float64, *(t for one in each for t in one))

    def formula(x: Tensor, *rest: Tensor) -> list[Tensor]:
        found = []
        for i, scale in enumerate((0.5, 2.0)):
            base, low, high = rest[3 * i : 3 * i + 3]
            plain = base if given else torch.nn.functional.linear(x, weights[i], biases[i])
            found.append(plain + scale * (x @ low.t()) @ high.t())
        return found

    inputs = (x, *(t for three in zip(bases, lows, highs, strict=True) for t in three))
    torch.testing.assert_close(call(*inputs), tuple(formula(*inputs)), rtol=1e-12, atol=1e-12)
    if not given:  # the bases are not read
        inputs = (x, *(t.detach() if i % 3 == 0 else t for i, t in enumerate(inputs[1:])))
    torch.autograd.gradcheck(call, inputs)


class Products(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func._overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(interpreting(), reason="the interpreted kernel takes the updates")
def test_layers_of_one_input_share_a_product_with_a() -> None:
    model = wrapped(torch.float32)
    assert use_stacked(model) == 3
    x = torch.randn(5, 96)
    with torch.no_grad(), Products() as products:
        model(x)
    # One product with all A; per layer W (with a bias: addmm) and B.
    assert products.calls["mm"] == 1 + 1
    assert products.calls["addmm"] == 2 + 3
    again = Products()
    with torch.no_grad(), again:
        model(x + 1)
    assert again.calls["copy_"] == again.calls["cat"] == 0  # the stack was kept


@pytest.mark.interpreter
def test_a_stack_is_one_launch_in_a_decode_step() -> None:
    model = wrapped(torch.float32)
    use_stacked(model)
    for rows, launches in ((5, 1), (600, 0)):
        x = torch.randn(rows, 96)
        with torch.no_grad(), Products() as products:
            got = model(x)
        with torch.no_grad(), peft_forward(model):
            torch.testing.assert_close(got, model(x), rtol=1e-5, atol=1e-5)
        assert products.calls["lora_update"] == launches


@pytest.mark.parametrize("grad", [False, True])
def test_any_order_of_calls_with_any_inputs_gives_each_layer_its_own_output(grad: bool) -> None:
    model = wrapped(torch.float32)
    use_stacked(model)
    first, second = torch.randn(2, 5, 96)
    calls = [("v_proj", first), ("q_proj", first), ("q_proj", first), ("k_proj", second), ("k_proj", first)]
    calls += [("q_proj", second), ("v_proj", second), ("v_proj", second)]
    with peft_forward(model):
        want = [getattr(model, name)(x) for name, x in calls]
    with torch.set_grad_enabled(grad):
        got = [getattr(model, name)(x) for name, x in calls]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert all(out.requires_grad == grad for out in got)


def test_what_is_kept_follows_the_weights_and_the_input() -> None:
    model = wrapped(torch.bfloat16)
    use_stacked(model)
    x = torch.randn(5, 96, dtype=torch.bfloat16)
    with torch.no_grad():
        before = model(x)
        model.k_proj.lora_B["default"].weight.add_(1.0)  # as an optimizer does
        after = model(x)
        assert torch.equal(before[0], after[0])
        assert not torch.equal(before[1], after[1])
        model.q_proj(x)
        x.mul_(2)  # the two outputs that wait are of the old numbers
        changed = model.k_proj(x)
        with peft_forward(model):
            torch.testing.assert_close(changed, model.k_proj(x), rtol=2**-6, atol=2**-4)


def test_a_stack_keeps_its_addresses_and_follows_the_weights() -> None:
    """A graph that was captured before a training pass is replayed after it."""
    model = wrapped(torch.bfloat16)
    use_stacked(model)
    x = torch.randn(5, 96, dtype=torch.bfloat16)
    group = model.q_proj.fastrl_shared

    def addresses() -> list[int]:
        with torch.no_grad():
            model(x)
        return [t.data_ptr() for t in (group._held[1].low, *group._held[1].highs)]

    first = addresses()
    sum(out.sum() for out in model(x)).backward()
    weight = model.k_proj.lora_A["default"].weight
    weight.data.mul_(2.0)  # as an engine that hides it from the version counter
    assert addresses() == first
    assert torch.equal(group._held[1].low[8:16], weight.to(torch.bfloat16))


def test_an_adapter_that_is_off_merged_or_under_autocast_runs_pefts_code() -> None:
    model = wrapped(torch.float32)
    use_stacked(model)
    x = torch.randn(5, 96)
    on = model(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x)[0].dtype == torch.bfloat16
    model.q_proj.enable_adapters(False)
    assert torch.equal(model.q_proj(x), model.q_proj.get_base_layer()(x))
    model.q_proj.enable_adapters(True)
    model.q_proj.merge()
    torch.testing.assert_close(model.q_proj(x), on, rtol=1e-5, atol=1e-5)


def test_dora_keeps_its_own_forward(tiny_folder: Folder) -> None:
    assert layers(adapted(tiny_folder("qwen2_5"), lora={"rank": 4, "dora": True}).core) == []


# What is saved, counted: benchmarks/NOTES.md

NINTH = {  # Qwen2.5-VL-3B with a ninth of its layers and of its vocabulary
    "text_config": {"num_hidden_layers": 4, "vocab_size": 16896},
    "vision_config": {"depth": 4, "fullatt_block_indexes": [3]},
}
QWEN = "Qwen/Qwen2.5-VL-3B-Instruct"


def moved(change: dict[str, Any], **options: Any) -> float:
    """Bytes that a micro-batch's operators without FLOPs move: a prompt of 1,000 tokens, 961 of them of a picture, and
    8 answers of 64, as on a GPU."""
    config = next(family.published[QWEN] for family in FAMILIES.values() if QWEN in family.published)
    parts = {key: {**config[key], **values} for key, values in change.items()}
    core = meta_model({**config, **parts}, ModelRecipe(path=QWEN, **options), torch.bfloat16)
    family = family_of(core.config)
    traced = trace_batch(core, packed(family, 39, [family.blank((14 * 62) ** 2)], [(64,) * 8]), gpu=True)
    return traced.vision_traffic + traced.forward_traffic + traced.backward_traffic


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_move_no_more_than_full_weights_with_a_frozen_tower(checkpointing: bool) -> None:
    """Also beside full training of the language model alone, where no gradient goes through the tower either."""
    options: dict[str, Any] = {"gradient_checkpointing": checkpointing}
    spec = LoraRecipe(rank=16)  # type: ignore[call-arg]
    adapters, full = moved(NINTH, lora=spec, **options), moved(NINTH, **options)
    frozen = moved(NINTH, freeze=["vision", "projector"], **options)
    assert adapters <= 0.5 * full
    assert adapters <= 0.9 * frozen


@pytest.mark.gate
@pytest.mark.parametrize(("checkpointing", "share"), [(False, 0.42), (True, 0.44)])
def test_a_published_models_micro_batch(checkpointing: bool, share: float) -> None:
    options: dict[str, Any] = {"gradient_checkpointing": checkpointing}
    spec = LoraRecipe(rank=16)  # type: ignore[call-arg]
    assert moved({}, lora=spec, **options) <= share * moved({}, **options)
