"""verl's registry and log-prob functions against its own ``core_algos``. verl pins its own stack, so it is no extra of
fastrl: these run where it is installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl_kernels.integrations import verl as ours

core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")
workers = pytest.importorskip("verl.workers.config")


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """verl's registry is restored after each test."""
    from verl.utils import torch_functional
    from verl.utils.experimental.torch_functional import FusedLinearForPPO
    from verl.utils.kernel import linear_cross_entropy

    for owner, names in (
        (torch_functional, ("logprobs_from_logits_flash_attn", "logprobs_from_logits_v2")),
        (FusedLinearForPPO, ("forward",)),
        (linear_cross_entropy, ("linear_cross_entropy",)),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, getattr(owner, name))
    monkeypatch.setattr(core_algos, "POLICY_LOSS_REGISTRY", dict(core_algos.POLICY_LOSS_REGISTRY))


def config(**changes: Any) -> Any:
    made = workers.ActorConfig(
        strategy="fsdp", rollout_n=4, ppo_micro_batch_size_per_gpu=1, ppo_mini_batch_size=4, **changes
    )
    return made


def batch() -> dict[str, Tensor]:
    rows, length = 5, 9
    mask = (torch.arange(length) < torch.tensor([9, 3, 0, 1, 7])[:, None]).float()
    return {
        "old_log_prob": -2 * torch.rand(rows, length),
        "log_prob": -2 * torch.rand(rows, length),
        "advantages": torch.randn(rows, length),  # of each token, as GAE has them
        "response_mask": mask,
    }


MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
CHANGES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "asymmetric": {"clip_ratio_low": 0.1, "clip_ratio_high": 0.3},
    "dual clip, other tau": {"clip_ratio_c": 1.5, "tau_pos": 0.7, "tau_neg": 1.3},
}


@pytest.mark.parametrize("name", ours.LOSSES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("weighted", [False, True])
def test_losses_are_verls(name: str, mode: str, change: str, weighted: bool) -> None:
    ours.register()
    mine = core_algos.get_policy_loss_fn("fastrl" if name == "vanilla" else f"fastrl_{name}")
    theirs = core_algos.get_policy_loss_fn(name)
    assert mine is not theirs
    inputs, options = batch(), config(**CHANGES[change])
    options.global_batch_info.update({"dp_size": 2, "batch_num_tokens": 31, "global_batch_size": 7})
    if mode != "token-mean":
        options.global_batch_info["loss_scale_factor"] = 12
    weights = torch.rand(5, 9) + 0.5 if weighted else None
    found = []
    for function in (mine, theirs):
        logp = inputs["log_prob"].clone().requires_grad_()
        call = inputs | {"log_prob": logp, "loss_agg_mode": mode, "config": options, "rollout_is_weights": weights}
        loss, metrics = function(**call)
        loss.backward()
        found.append((loss.detach(), logp.grad, metrics))
    torch.testing.assert_close(found[0][:2], found[1][:2], rtol=1e-5, atol=1e-7)
    assert found[0][2] == pytest.approx(found[1][2], abs=1e-6)
    assert name == "sapo" or found[1][2]["actor/pg_clipfrac"] > 0


def test_replace_takes_verls_own_names() -> None:
    theirs = core_algos.get_policy_loss_fn("vanilla")
    ours.register(heads=False)
    assert core_algos.get_policy_loss_fn("vanilla") is theirs
    ours.register(replace=True, heads=False)
    assert core_algos.get_policy_loss_fn("vanilla") is ours.vanilla_loss
    assert core_algos.get_policy_loss_fn("gspo") is ours.gspo_loss


@pytest.mark.parametrize("shape", [(7,), (2, 5)])
def test_log_probs_from_logits(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    from verl.utils import torch_functional
    from verl.utils.torch_functional import logprobs_from_logits  # as verl's workers import it

    logits, labels = torch.randn(*shape, 31, dtype=torch.float32), torch.randint(31, shape)
    theirs = torch_functional.logprobs_from_logits_naive(logits, labels)
    ours.register()
    calls, kernel = [], ours.token_logprob
    monkeypatch.setattr(ours, "token_logprob", lambda *args, **options: calls.append(1) or kernel(*args, **options))
    mine = logits.clone().requires_grad_()
    found = logprobs_from_logits(mine, labels)
    assert calls == [1]
    torch.testing.assert_close(found, theirs)
    found.sum().backward()
    plain = logits.clone().requires_grad_()
    torch_functional.logprobs_from_logits_naive(plain, labels).sum().backward()
    torch.testing.assert_close(mine.grad, plain.grad)


@pytest.mark.parametrize("backend", ["torch", "liger", "triton"])
def test_fused_heads(backend: str) -> None:
    """Against verl's torch backend before it is replaced; its Triton kernel needs a GPU."""
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    hidden, weight, labels = torch.randn(1, 6, 16), torch.randn(40, 16), torch.randint(40, (1, 6))
    sides = []
    for registered in (False, True):
        if registered:
            ours.register()
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if backend == "triton" and registered:
            from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

            logp, entropy = linear_cross_entropy(h, w, labels, 0.7, "none")
            assert logp.shape == (6,)
        else:
            head = FusedLinearForPPO(impl_backend=backend if registered and backend != "triton" else "torch")
            logp, entropy = head(h, w, labels, 0.7)
            assert logp.shape == labels.shape
        (logp.sum() + 0.3 * entropy.sum()).backward()
        sides.append((logp.detach().flatten(), entropy.detach().flatten(), h.grad, w.grad))
    torch.testing.assert_close(sides[1], sides[0], rtol=1e-5, atol=1e-5)


def test_reductions() -> None:
    hidden, weight, labels = torch.randn(6, 16), torch.randn(40, 16), torch.randint(40, (6,))
    each, _ = ours.linear_cross_entropy(hidden, weight, labels)
    for name in ("sum", "mean"):
        torch.testing.assert_close(
            ours.linear_cross_entropy(hidden, weight, labels, 1.0, name)[0], getattr(each, name)()
        )
    with pytest.raises(ValueError, match="reduction: expected none, sum or mean, got 'max'"):
        ours.linear_cross_entropy(hidden, weight, labels, 1.0, "max")
