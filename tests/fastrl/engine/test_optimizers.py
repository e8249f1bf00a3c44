"""Memory-saving recipe keys: 8-bit and offloaded states, gradient release, offloaded activations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastrl.batch import Completion, PackedBatch, Prompt, PromptGroup, pack_row
from fastrl.engine.base import NonFiniteError
from fastrl.engine.local import LocalEngine
from fastrl.engine.optimizers import BLOCK, AdamW8bit, decode, encode
from fastrl.models import load_policy, offload
from fastrl.recipe import OptimRecipe, RecipeError
from fastrl.trainer import Run, TrainingError, train
from tests.helpers.planned import counted_peak
from tests.helpers.training import make_recipe, make_records


def optim(**values: Any) -> OptimRecipe:
    return OptimRecipe(**({"steps": 50, "lr": 1e-2, "clip_norm": None} | values))


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 5)).to(dtype)


def losses(net: nn.Module, engine: LocalEngine, steps: int = 40, micro: int = 1) -> list[float]:
    """Losses of a regression trained by ``engine``."""
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 6, generator=rng), torch.randn(64, 5, generator=rng)
    found = []
    for _ in range(steps):
        total = 0.0
        for number, (a, b) in enumerate(zip(x.chunk(micro), y.chunk(micro), strict=True)):
            loss = (net(a.to(next(net.parameters()).dtype)).float() - b).square().mean() / micro
            engine.backward(loss, last=number == micro - 1)
            total += float(loss.detach())
        engine.step()
        found.append(total)
    return found


def trained(dtype: torch.dtype = torch.float32, steps: int = 6, micro: int = 1, **values: Any) -> list[Tensor]:
    net = model(dtype)
    losses(net, LocalEngine(net, optim(weight_decay=0.1, **values)), steps, micro)
    return [p.detach() for p in net.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("micro", [1, 4])
@pytest.mark.parametrize("changes", [{"states": "offload"}, {"gradient_release": True}], ids=["offload", "release"])
def test_the_same_weights_to_the_bit(changes: dict[str, Any], micro: int, dtype: torch.dtype) -> None:
    plain, other = trained(dtype, micro=micro), trained(dtype, micro=micro, **changes)
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


def test_release_reports_the_norm_of_all_gradients() -> None:
    norms = []
    for release in (False, True):
        net = model()
        engine = LocalEngine(net, optim(gradient_release=release))
        engine.backward(sum((p.square().sum() for p in net.parameters()), torch.zeros(())))
        assert release == all(p.grad is None for p in net.parameters())  # freed during the backward
        norms.append(engine.step().grad_norm)
    assert norms[0] == pytest.approx(norms[1])


def test_release_never_holds_all_gradients() -> None:
    peaks = []
    for release in (False, True):
        net = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(8)))
        engine = LocalEngine(net, optim(gradient_release=release))

        def step(net: nn.Module = net, engine: LocalEngine = engine) -> None:
            engine.backward(net(torch.ones(1, 256)).sum())
            engine.step()

        step()  # creates the moments
        peaks.append(counted_peak(step))
    one = 4 * 256 * 256
    assert peaks[0] > 8 * one
    assert peaks[1] < 5 * one  # one or two gradients, and AdamW's temporaries for one


def test_release_stops_at_a_loss_that_is_not_finite_before_it_changes_anything() -> None:
    net = model()
    before = [p.detach().clone() for p in net.parameters()]
    engine = LocalEngine(net, optim(gradient_release=True))
    with pytest.raises(NonFiniteError):
        engine.backward(net(torch.full((1, 6), torch.nan)).sum())
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_offloaded_states_and_gradients_leave_nothing_beside_the_weights() -> None:
    net = model(torch.bfloat16)
    engine = LocalEngine(net, optim(states="offload"))
    losses(net, engine, 1)
    engine.backward(net(torch.ones(1, 6, dtype=torch.bfloat16)).float().sum())
    assert all(p.grad is None for p in net.parameters())
    assert all(m.device.type == "cpu" and m.grad is not None for m in engine._masters.values())
    assert engine.gradient_of(next(net.parameters())) is None


def test_8bit_states_take_two_bytes_and_train_as_well() -> None:
    plain, small = model(), model()
    engine = LocalEngine(small, optim(states="8bit"))
    ours, theirs = losses(small, engine), losses(plain, LocalEngine(plain, optim()))
    assert ours[-1] < 0.75 * ours[0]
    assert ours[-1] == pytest.approx(theirs[-1], rel=0.1)
    wide = nn.Linear(256, 256, bias=False)
    engine = LocalEngine(wide, optim(states="8bit"))
    engine.backward(wide(torch.ones(1, 256)).sum())
    engine.step()
    state = next(iter(engine._optimizers[0].state.values()))
    assert sum(v.numel() * v.element_size() for v in state.values()) <= 2.05 * wide.weight.numel()


@pytest.mark.parametrize("n", [1, 255, 256, 1000])
def test_first_8bit_update_is_adamws(n: int) -> None:
    """All states are zero before it, so nothing was rounded yet."""
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, n)) for _ in range(2))
    for parameter, kind in ((ours, AdamW8bit), (theirs, torch.optim.AdamW)):
        parameter.grad = torch.linspace(2, -3, n)
        kind([parameter], lr=0.1, weight_decay=0.01).step()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_rounding_keeps_the_mean_and_no_second_moment_becomes_zero(dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(0)
    value = torch.logspace(-9, 0, BLOCK).view(1, -1)
    if dtype == torch.int8:
        value = value * torch.tensor([1.0, -1.0]).repeat(BLOCK // 2)
    rounds = torch.stack([decode(*encode(value, dtype, rng)) for _ in range(400)])
    kept = value.abs() > 1e-5
    torch.testing.assert_close(rounds.mean(0)[kept], value[kept], rtol=0.1, atol=0)
    if dtype == torch.uint8:
        assert bool((rounds > 0).all())
    assert bool((decode(*encode(torch.zeros(2, BLOCK), dtype, rng)) == 0).all())


def test_loading_other_states_is_an_error(tmp_path: Path) -> None:
    net = model()
    engine = LocalEngine(net, optim())
    losses(net, engine, 1)
    engine.save(tmp_path)
    with pytest.raises(ValueError, match=r"optim\.states"):
        LocalEngine(model(), optim(states="8bit")).load(tmp_path)


def batch_of(length: int) -> PackedBatch:
    positions = torch.arange(length).expand(3, -1)
    prompt = Prompt(torch.arange(length) % 200, positions)
    return pack_row([PromptGroup(prompt, [Completion(torch.arange(9)), Completion(torch.arange(5))])])


def test_offloaded_activations_give_the_same_gradients(
    tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "SMALLEST", 1)
    moved: list[int] = []
    to_host = offload.to_host

    def counted(tensor: Tensor) -> Any:
        held = to_host(tensor)
        moved.append(not isinstance(held, Tensor))
        return held

    monkeypatch.setattr(offload, "to_host", counted)
    gradients = []
    for offloaded in (False, True):
        policy = load_policy(
            tiny_folder("qwen2_5"), device="cpu", gradient_checkpointing=True, offload_activations=offloaded
        )
        policy.logprob(batch_of(40)).logp.sum().backward()
        gradients.append([p.grad for p in policy.core.parameters()])
        assert sum(moved) == (policy.core.config.text_config.num_hidden_layers if offloaded else 0)
    assert all(a is b or torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"optim__gradient_release": True}, "clip_norm: null"),
        ({"optim__gradient_release": True, "optim__clip_norm": None, "optim__states": "offload"}, "frees nothing"),
        ({"model__offload_activations": True}, "gradient_checkpointing"),
        ({"optim__states": "8bit", "engine__kind": "deepspeed"}, "engine.offload_optimizer"),
        ({"engine__offload_optimizer": True}, "optim.states: offload"),
        (
            {"engine__kind": "deepspeed", "engine__zero_stage": 0, "engine__offload_optimizer": True},
            "zero_stage of 1 to 3",
        ),
        ({"optim__states": "4bit"}, "optim.states"),
    ],
)
def test_keys_that_do_not_go_together_are_named(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        make_recipe(tmp_path, tmp_path, **changes)


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_a_copy_of_the_reference_is_kept_without_lora_alone(
    tiny_folder: Callable[[str], Path], tmp_path: Path, lora: dict[str, int] | None
) -> None:
    recipe = make_recipe(tiny_folder("qwen2_5"), tmp_path, method__beta=0.04, model__lora=lora)
    assert (Run(recipe, records=make_records()).policy._reference_core is None) == (lora is not None)


def test_a_run_with_release_stops_at_a_bad_gradient(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = make_recipe(tiny_folder("qwen2_5"), tmp_path, optim__gradient_release=True, optim__clip_norm=None)
    policy = load_policy(recipe.model.path, device="cpu")
    real = policy.logprob

    def spoiled(*args: Any, **kwargs: Any) -> Any:
        found = real(*args, **kwargs)
        return found._replace(logp=found.logp * torch.nan)

    policy.logprob = spoiled  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="continue from the last checkpoint"):
        train(recipe, records=make_records(), policy=policy, show=False)
