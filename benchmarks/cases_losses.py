"""Losses and decoding: group advantages with the policy loss, listwise ranking, unlikelihood, shared-prompt attention,
and the operations of a decoder layer between its matrix products.

Peers in eager torch are written from the formulas, like in trainers without kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.case import Case, Inputs, dtype_for, installed, leaf, with_gradients
from fastrl_kernels.decode_attention import decode_attention
from fastrl_kernels.decode_layer import add_rms_norm, rope_append
from fastrl_kernels.gated import silu_mul
from fastrl_kernels.group_advantage import group_advantage
from fastrl_kernels.listwise_loss import listwise_loss
from fastrl_kernels.policy_loss import policy_loss
from fastrl_kernels.token_logprob import token_logprob
from fastrl_kernels.token_weights import token_weights
from fastrl_kernels.unlikelihood_loss import unlikelihood_loss


def cases(size: str) -> list[Case]:
    """All cases of this file at one of ``SIZES``."""
    return [
        _policy_case(size),
        _listwise_case(size, "perpo"),
        _listwise_case(size, "listmle"),
        _unlikelihood_case(size),
        _decode_case(size),
        _layer_case(size),
    ]


def eager_policy_loss(
    logp: Tensor, advantage: Tensor, *, old_logp: Tensor, ref_logp: Tensor, beta: float, kl: str, clip_low: float,
    clip_high: float, weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """GRPO's clipped loss with the k3 penalty over rows ``[N]``, one torch op after another."""
    assert kl == "k3"
    ratio = torch.exp(logp - old_logp)
    clipped = torch.clamp(ratio, 1 - clip_low, 1 + clip_high)
    gap = ref_logp - logp
    rows = -torch.min(ratio * advantage, clipped * advantage) + beta * (torch.exp(gap) - gap - 1)
    return rows.mean() if weight is None else (rows * weight).sum()


def _policy_case(size: str) -> Case:
    groups, members, length = {"tiny": (3, 4, 5), "cpu": (64, 8, 32), "gpu": (64, 8, 32)}[size]
    rows = groups * members * length
    options = {"beta": 0.04, "kl": "k3", "clip_low": 0.2, "clip_high": 0.28}

    def make(device: torch.device) -> Inputs:
        logp = -torch.rand(rows, device=device)
        completions = torch.arange(groups * members, device=device)
        return {
            "logp": leaf(logp),
            "old_logp": logp + 0.2 * torch.randn(rows, device=device),
            "ref_logp": logp + 0.2 * torch.randn(rows, device=device),
            "rewards": torch.rand(groups * members, device=device),
            "completion": completions.repeat_interleave(length),
        }

    def given(x: Inputs) -> dict[str, Tensor]:
        return {"old_logp": x["old_logp"], "ref_logp": x["ref_logp"]}

    def ours(x: Inputs) -> tuple[Tensor, ...]:
        advantage = group_advantage(x["rewards"], members).advantage
        weight = token_weights(x["completion"], aggregate="sequence", n_completions=groups * members)
        loss = policy_loss(x["logp"], advantage, x["completion"], weight=weight, **given(x), **options).loss
        return with_gradients(loss, [x["logp"]])

    def eager(x: Inputs) -> tuple[Tensor, ...]:
        rewards = x["rewards"].view(groups, members)
        advantage = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
        counts = torch.zeros_like(advantage).index_add_(0, x["completion"], torch.ones_like(x["logp"].detach()))
        weight = (1 / counts / counts.shape[0])[x["completion"]]
        loss = eager_policy_loss(x["logp"], advantage[x["completion"]], weight=weight, **given(x), **options)
        return with_gradients(loss, [x["logp"]])

    return Case(
        name="group_advantage+policy_loss/forward+backward", op="group_advantage+policy_loss+token_weights",
        shape={"groups": groups, "members": members, "tokens": rows}, make=make, ours=ours, peers={"eager": eager},
        bytes=float(rows * (3 * 4 + 8 + 4) + groups * members * 8), graph=True,
    )  # fmt: skip


def _listwise_case(size: str, kind: str) -> Case:
    lists, items = {"tiny": (3, 5), "cpu": (256, 32), "gpu": (1024, 64)}[size]
    beta, gamma = 0.1, 0.5

    def make(device: torch.device) -> Inputs:
        return {
            "score": leaf(10 * torch.randn(lists, items, device=device)),
            "reward": torch.rand(lists, items, device=device),
        }

    def ours(x: Inputs) -> tuple[Tensor, ...]:
        loss = listwise_loss(x["score"], x["reward"], kind=kind, beta=beta, gamma=gamma)
        return with_gradients(loss.mean(), [x["score"]])

    def pairwise(x: Inputs) -> tuple[Tensor, ...]:
        gap = x["reward"][:, :, None] - x["reward"][:, None, :]
        weight = torch.where(gap > 0, gap.abs() ** gamma, 0.0)
        weight = weight / weight.sum((1, 2), keepdim=True)
        margin = beta * (x["score"][:, :, None] - x["score"][:, None, :])
        return with_gradients((weight * F.softplus(-margin)).sum((1, 2)).mean(), [x["score"]])

    def sorted_scan(x: Inputs) -> tuple[Tensor, ...]:
        order = x["reward"].argsort(dim=1, descending=True, stable=True)
        s = beta * x["score"].gather(1, order)
        suffix = s.flip(1).logcumsumexp(1).flip(1)
        return with_gradients((suffix - s).sum(1).mean(), [x["score"]])

    peers = {"eager pairs": pairwise} if kind == "perpo" else {"sort + logcumsumexp": sorted_scan}
    return Case(
        name=f"listwise_loss/{kind}", op="listwise_loss", shape={"lists": lists, "items": items}, make=make, ours=ours,
        peers=dict(peers), bytes=float(lists * items * 12), graph=True,
    )  # fmt: skip


def _unlikelihood_case(size: str) -> Case:
    n, v = {"tiny": (7, 129), "cpu": (256, 32768), "gpu": (8192, 151936)}[size]
    alpha, dtype = 10.0, dtype_for(size)

    def make(device: torch.device) -> Inputs:
        return {
            "logits": leaf(torch.randn(n, v, device=device).to(dtype)),
            "target": torch.randint(v, (n,), device=device),
            "sigma": torch.rand(n, device=device),
        }

    def ours(x: Inputs) -> tuple[Tensor, ...]:
        logp = token_logprob(x["logits"], x["target"]).logp
        return with_gradients(unlikelihood_loss(logp, x["sigma"], alpha=alpha), [x["logits"]])

    def naive(x: Inputs) -> tuple[Tensor, ...]:
        logp = torch.log_softmax(x["logits"].float(), 1).gather(1, x["target"][:, None])[:, 0]
        rows = x["sigma"] * logp + alpha * (1 - x["sigma"]) * torch.log(1 - logp.exp())
        return with_gradients(-rows.mean(), [x["logits"]])

    return Case(
        name="unlikelihood_loss/from logits", op="unlikelihood_loss+token_logprob", shape={"N": n, "V": v}, make=make,
        ours=ours, peers={"naive torch": naive}, bytes=float(3 * n * v * dtype.itemsize), dtype=dtype,
    )  # fmt: skip


def _decode_case(size: str) -> Case:
    groups, members, prompt, own, heads, kv_heads, d = {
        "tiny": (2, 3, 7, 4, 4, 2, 16),
        "cpu": (2, 8, 1200, 32, 16, 2, 128),
        "gpu": (32, 8, 1200, 64, 16, 2, 128),
    }[size]
    rows, dtype = groups * members, dtype_for(size)

    def make(device: torch.device) -> Inputs:
        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device).to(dtype)

        x: Inputs = {"q": random(rows, heads, d)}
        for name in ("k", "v"):
            x[f"prefix_{name}"] = random(groups, kv_heads, prompt, d)
            x[f"own_{name}"] = random(rows, kv_heads, own, d)
            repeated = x[f"prefix_{name}"].repeat_interleave(members, 0)
            x[f"full_{name}"] = torch.cat((repeated, x[f"own_{name}"]), 2)  # the cache other stacks keep
        return x

    def ours(x: Inputs) -> tuple[Tensor, ...]:
        return (decode_attention(x["q"], x["prefix_k"], x["prefix_v"], x["own_k"], x["own_v"]),)

    def sdpa(x: Inputs) -> tuple[Tensor, ...]:
        out = F.scaled_dot_product_attention(x["q"][:, :, None], x["full_k"], x["full_v"], enable_gqa=True)
        return (out[:, :, 0],)

    keys = groups * prompt + rows * own
    return Case(
        name="decode_attention/one token", op="decode_attention",
        shape={
            "groups": groups, "members": members, "prompt": prompt, "own": own, "Hq": heads, "Hkv": kv_heads, "D": d,
        },
        make=make, ours=ours, peers={"sdpa, repeated keys": sdpa},
        bytes=float((2 * keys * kv_heads * d + 2 * rows * heads * d) * dtype.itemsize), dtype=dtype, graph=True,
    )  # fmt: skip


def _layer_case(size: str) -> Case:
    """Everything but the products and the attention of one layer in a decode step: two norms, rotary embedding, cache,
    gate. Peers: the layers' own code in transformers, and liger's kernels in its place."""
    rows, hidden, inner, heads, kv_heads, d, slots = {
        "tiny": (3, 16, 24, 4, 2, 4, 5),
        "cpu": (64, 256, 672, 8, 4, 32, 24),
        "gpu": (64, 2048, 11008, 16, 2, 128, 256),
    }[size]
    dtype, eps = dtype_for(size), 1e-6

    def make(device: torch.device) -> Inputs:
        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device).to(dtype)

        angle = torch.randn(rows, d // 2, device=device)
        x: Inputs = {"cos": angle.cos().to(dtype), "sin": angle.sin().to(dtype)}
        x |= {name: random(rows, hidden) for name in ("residual", "attended", "fed")}
        x |= {"weight": random(hidden), "q": random(rows, heads, d)}
        x |= {name: random(rows, kv_heads, d) for name in ("k", "v")}
        x |= {name: random(rows, kv_heads, slots, d) for name in ("keys", "values")}
        x |= {name: random(rows, inner) for name in ("gate", "up")}
        return x | {"at": torch.full((1,), slots // 2, device=device), "before": x["residual"].clone()}

    def ours(x: Inputs) -> tuple[Tensor, ...]:
        first = add_rms_norm(x["residual"], x["fed"], x["weight"], eps)
        q = rope_append(*(x[name] for name in ("q", "k", "v", "cos", "sin", "keys", "values", "at")))
        second = add_rms_norm(x["residual"], x["attended"], x["weight"], eps)
        return first, q, second, silu_mul(x["gate"], x["up"])

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

    def halves(x: Inputs) -> tuple[Tensor, Tensor]:
        return torch.cat((x["cos"], x["cos"]), -1)[:, None], torch.cat((x["sin"], x["sin"]), -1)[:, None]

    def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    def append(x: Inputs, k: Tensor) -> None:
        x["keys"].index_copy_(2, x["at"], k[:, :, None])
        x["values"].index_copy_(2, x["at"], x["v"][:, :, None])

    def eager(x: Inputs) -> tuple[Tensor, ...]:
        residual = x["residual"] + x["fed"]
        first = norm(residual, x["weight"])
        cos, sin = halves(x)
        q, k = turn(x["q"], cos, sin), turn(x["k"], cos, sin)
        append(x, k)
        return first, q, norm(residual + x["attended"], x["weight"]), F.silu(x["gate"]) * x["up"]

    def liger(x: Inputs) -> tuple[Tensor, ...]:
        from liger_kernel.transformers.functional import liger_rms_norm, liger_rope, liger_swiglu

        residual = x["residual"] + x["fed"]
        first = liger_rms_norm(residual, x["weight"], eps, in_place=False)
        q, k = (y[:, :, 0] for y in liger_rope(x["q"][:, :, None], x["k"][:, :, None], *halves(x)))
        append(x, k)
        second = liger_rms_norm(residual + x["attended"], x["weight"], eps, in_place=False)
        return first, q, second, liger_swiglu(x["gate"], x["up"])

    numbers = rows * (7 * hidden + 2 * heads * d + 4 * kv_heads * d + 3 * inner + 2 * d) + 2 * hidden
    return Case(
        name="decode_layer/between products", op="add_rms_norm+rope_append+silu_mul",
        shape={"rows": rows, "hidden": hidden, "inner": inner, "Hq": heads, "Hkv": kv_heads, "D": d},
        make=make, ours=ours,
        peers={"eager": eager, "liger": liger if installed("liger_kernel", gpu=True) else None},
        bytes=float(numbers * dtype.itemsize), dtype=dtype, graph=True,
        reset=lambda x: x["residual"].copy_(x["before"]),
    )  # fmt: skip
