"""The loss kernels on a GPU: correct, deterministic, and without synchronisation."""

from __future__ import annotations

import pytest
import torch

from fastrl_kernels.group_advantage import group_advantage, group_advantage_reference
from fastrl_kernels.listwise_loss import listwise_loss, listwise_loss_reference
from fastrl_kernels.policy_loss import policy_loss, policy_loss_reference
from fastrl_kernels.unlikelihood_loss import unlikelihood_loss, unlikelihood_loss_reference

pytestmark = pytest.mark.gpu


def _cases():
    n, c = 16411, 131
    logp = -3 * torch.rand(n)
    old, ref = logp + 0.3 * torch.randn(n), logp + 0.3 * torch.randn(n)
    ids, advantage = torch.randint(0, c, (n,)), torch.randn(c)
    policy = {"old_logp": old, "ref_logp": ref, "beta": 0.04, "aggregate": "sequence"}
    yield "token", policy_loss, policy_loss_reference, (logp, advantage, ids), policy
    yield "sequence", policy_loss, policy_loss_reference, (logp, advantage, ids), policy | {"ratio": "sequence"}
    weight = torch.rand(n) * (torch.arange(n) % 3 > 0) / n
    yield "unlikelihood", unlikelihood_loss, unlikelihood_loss_reference, (logp, torch.rand(n)), {"weight": weight}
    for k in (5, 20, 64, 200, 1024):
        lists = (torch.randn(33, k) * 5, torch.randint(0, 9, (33, k)) / 8)
        for kind in ("perpo", "listmle"):
            options = {"kind": kind, "mask": torch.rand(33, k) > 0.2}
            yield f"{kind}-{k}", listwise_loss, listwise_loss_reference, lists, options


def _to(device: str, value, exact: bool = False):
    if not isinstance(value, torch.Tensor):
        return value
    value = value.to(device)
    return value.double() if exact and value.is_floating_point() else value


def _value_and_grad(function, args, options):
    first = args[0].detach().clone().requires_grad_()
    out = function(first, *args[1:], **options)
    loss = out if isinstance(out, torch.Tensor) else out.loss
    upstream = torch.linspace(1, 2, loss.numel(), device=loss.device, dtype=loss.dtype).view(loss.shape)
    return loss.detach(), torch.autograd.grad(loss, first, upstream)[0]


CASES = list(_cases())


@pytest.mark.parametrize(
    ("function", "reference", "args", "options"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_loss_kernels(function, reference, args, options):
    given = [_to("cuda", a) for a in args], {k: _to("cuda", v) for k, v in options.items()}
    exact = [_to("cpu", a, True) for a in args], {k: _to("cpu", v, True) for k, v in options.items()}
    first = _value_and_grad(function, *given)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = _value_and_grad(function, *given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    want = _value_and_grad(reference, *exact)
    torch.testing.assert_close(first[0].cpu().double(), want[0], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(first[1].cpu().double(), want[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_group_advantage_kernel(baseline):
    rewards, ids = torch.randint(0, 5, (2049, 3)) / 4, torch.randint(-1, 97, (2049,))
    weights = torch.tensor([1.0, 0.5, 0.25])
    want = group_advantage_reference(rewards.double(), ids, n_groups=100, weights=weights.double(), baseline=baseline)
    rewards, ids, weights = rewards.cuda(), ids.cuda(), weights.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = group_advantage(rewards, ids, n_groups=100, weights=weights, baseline=baseline)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got.constant.cpu(), want.constant)
    torch.testing.assert_close(got.advantage.cpu().double(), want.advantage, rtol=1e-4, atol=1e-5)
