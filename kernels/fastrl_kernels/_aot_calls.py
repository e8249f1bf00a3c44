"""Calls of the public API at realistic sizes, for ``aot``; a new kernel needs its calls here.

A size affects the compiled code by being 1, by its divisibility by 16 and through launch configurations, so each group
has sizes of every kind. Sizes without effect (rows of a batch, the hidden size) are small, as the matmuls run on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from fastrl_kernels._activations import KINDS as ACTIVATIONS
from fastrl_kernels.bias_activation import bias_activation
from fastrl_kernels.cross_entropy import cross_entropy, linear_cross_entropy
from fastrl_kernels.decode_attention import decode_attention
from fastrl_kernels.decode_layer import add_rms_norm, rope_append
from fastrl_kernels.detection_reward import detection_reward
from fastrl_kernels.gated import gelu_mul, silu_mul
from fastrl_kernels.group_advantage import group_advantage
from fastrl_kernels.linear_assignment import linear_assignment
from fastrl_kernels.linear_logprob import linear_logprob
from fastrl_kernels.linear_policy_loss import linear_policy_loss
from fastrl_kernels.listwise_loss import listwise_loss
from fastrl_kernels.lora import lora_update
from fastrl_kernels.pairwise_iou import KINDS, pairwise_iou
from fastrl_kernels.policy_loss import policy_loss
from fastrl_kernels.prefix_attention import prefix_attention
from fastrl_kernels.rms_norm import residual_rms_norm, rms_norm
from fastrl_kernels.rope import qkv_rope, rope
from fastrl_kernels.token_logprob import token_logprob
from fastrl_kernels.unlikelihood_loss import unlikelihood_loss

QWEN, LLAMA, GPT2 = 151936, 128256, 50257
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def _linear_logprob() -> None:
    features = list(product((False, True), (None, 30.0), (False, True)))  # bias, softcap, entropy
    points = [(QWEN, BF16, *chosen) for chosen in features]
    points += [(v, BF16, False, None, True) for v in (LLAMA, GPT2, 2000, 200)]
    points += [(v, dtype, False, None, True) for v in (QWEN, GPT2) for dtype in (FP16, FP32)]
    for (vocabulary, dtype, bias, softcap, entropy), rows in [(points[1], 1), *((point, 24) for point in points)]:
        hidden = torch.zeros(rows, 16, dtype=dtype, requires_grad=True)
        weight = torch.zeros(vocabulary, 16, dtype=dtype, requires_grad=True)
        given = torch.zeros(vocabulary, dtype=dtype, requires_grad=True) if bias else None
        target = torch.zeros(rows, dtype=torch.int64)
        budgets = (1 << 30, 1 << 20) if rows > 1 and vocabulary >= GPT2 else (1 << 30,)
        for budget in budgets:  # the whole vocabulary as one tile, and in slabs
            options = {"bias": given, "softcap": softcap, "return_entropy": entropy, "scratch_bytes": budget}
            out = linear_logprob(hidden, weight, target, temperature=0.7, **options)
            (out.logp.sum() + (0 if out.entropy is None else out.entropy.sum())).backward()


def _token_logprob() -> None:
    points = [(v, BF16, 3) for v in (QWEN, LLAMA, GPT2, 2000, 200)] + [(QWEN, BF16, 1)]
    points += [(v, dtype, 3) for v in (QWEN, GPT2) for dtype in (FP16, FP32)]
    for vocabulary, dtype, rows in points:
        for entropy, extra in product((False, True), (0, 1)):  # extra: a row stride that is not the width
            logits = torch.zeros(rows, vocabulary + extra, dtype=dtype)[:, :vocabulary].requires_grad_()
            out = token_logprob(logits, torch.zeros(rows, dtype=torch.int64), return_entropy=entropy)
            (out.logp.sum() + (0 if out.entropy is None else out.entropy.sum())).backward()

    for vocabulary, dtype, several in [*product((QWEN, GPT2, 200), (BF16,), (4, 64)), (QWEN, FP32, 20)]:
        for entropy in (False, True):
            logits = torch.zeros(3, vocabulary, dtype=dtype, requires_grad=True)
            out = token_logprob(logits, torch.zeros(3, several, dtype=torch.int64), return_entropy=entropy)
            (out.logp.sum() + (0 if out.entropy is None else out.entropy.sum())).backward()


def _cross_entropy() -> None:
    points = [(v, BF16) for v in (QWEN, GPT2, 2000, 200)] + [(QWEN, FP32), (GPT2, FP16)]
    for (vocabulary, dtype), smoothing, weighted in product(points, (0.0, 0.1), (False, True)):
        logits, target = torch.zeros(3, vocabulary, dtype=dtype, requires_grad=True), torch.zeros(3, dtype=torch.int64)
        weight = torch.ones(vocabulary) if weighted else None
        cross_entropy(logits, target, weight, label_smoothing=smoothing, z_loss=1e-4).backward()


def _linear_cross_entropy() -> None:
    for vocabulary, (bias, softcap), weighted in product((QWEN, GPT2), ((False, None), (True, 30.0)), (False, True)):
        hidden = torch.zeros(24, 16, dtype=BF16, requires_grad=True)
        head = torch.zeros(vocabulary, 16, dtype=BF16, requires_grad=True)
        given = torch.zeros(vocabulary, dtype=BF16, requires_grad=True) if bias else None
        options = {"label_smoothing": 0.1, "z_loss": 1e-4, "bias": given, "softcap": softcap}
        weight = torch.ones(vocabulary) if weighted else None
        linear_cross_entropy(hidden, head, torch.zeros(24, dtype=torch.int64), weight, **options).backward()


def _policy_calls() -> list[dict[str, Any]]:
    return [
        {"old_logp": False, "ref_logp": False},
        {},
        {"dual_clip": 3.0, "beta": 0.04},
        {"beta": torch.tensor(0.04), "kl": "k1"},
        {"beta": 0.04, "kl": "k2", "importance": "truncate"},
        {"loss": "cispo", "importance": "mask"},
        {"loss": "sapo"},
    ]


def _policy_loss() -> None:
    sequence = {"ratio": "sequence", "importance": "truncate", "importance_level": "sequence"}
    calls = [*_policy_calls(), {"ratio": "sequence"}, sequence, sequence | {"loss": "sapo", "old_logp": False}]
    for options, (n, c, dtype) in product(calls, ((4096, 64, FP32), (1003, 7, BF16), (1, 1, FP32))):
        logp = torch.zeros(n, dtype=dtype, requires_grad=True)
        given: dict[str, Any] = {name: logp.detach() for name in ("old_logp", "ref_logp") if options.get(name, True)}
        if "importance" in options:
            given["sampler_logp"] = logp.detach()
        chosen = {name: value for name, value in options.items() if value is not False}
        ids = torch.zeros(n, dtype=torch.int64 if dtype == FP32 else torch.int32)
        policy_loss(logp, torch.zeros(c), ids, weight=torch.zeros(n), **given, **chosen).loss.backward()


def _linear_policy_loss() -> None:
    for options, vocabulary in product(_policy_calls(), (QWEN, GPT2)):
        hidden = torch.zeros(24, 16, dtype=BF16, requires_grad=True)
        weight = torch.zeros(vocabulary, 16, dtype=BF16, requires_grad=True)
        ids, logp = torch.zeros(24, dtype=torch.int64), torch.zeros(24)
        given: dict[str, Any] = {name: logp for name in ("old_logp", "ref_logp") if options.get(name, True)}
        if "importance" in options:
            given["sampler_logp"] = logp
        chosen = {name: value for name, value in options.items() if value is not False}
        linear_policy_loss(hidden, weight, ids, torch.zeros(4), ids, **given, **chosen).loss.backward()


def _listwise_loss() -> None:
    for kind, k, masked in product(("perpo", "listmle"), (1, 4, 16, 20, 64, 100, 256, 1000, 1024), (False, True)):
        mask = torch.ones(2, k, dtype=torch.bool) if masked else None
        listwise_loss(torch.zeros(2, k, requires_grad=True), torch.zeros(2, k), mask=mask, kind=kind).sum().backward()


def _unlikelihood_loss() -> None:
    for n, weighted, dtype in product((1, 1003, 4096), (False, True), (FP32, BF16)):
        weight = torch.zeros(n) if weighted else None
        unlikelihood_loss(torch.zeros(n, dtype=dtype, requires_grad=True), torch.zeros(n), weight=weight).backward()


def _group_advantage() -> None:
    baselines = (("mean", "std"), ("leave_one_out", "none"))
    for (baseline, scale), (r, size), k in product(baselines, ((512, 8), (96, 6), (32, 16), (1, 1)), (1, 3)):
        weights, rewards = torch.ones(k), torch.zeros(r, k)
        options = {"weights": weights, "baseline": baseline, "scale": scale}
        group_advantage(rewards, size, **options)
        group_advantage(rewards, torch.zeros(r, dtype=torch.int64), n_groups=r // size, **options)
    group_advantage(torch.zeros(512), 8)


def _pairwise_iou() -> None:
    sizes = ((300, 20, FP32), (320, 48, FP32), (300, 20, BF16), (16, 16, BF16), (100, 1, FP32), (1, 17, FP32))
    for kind, reduce, (n, m, dtype) in product(KINDS, (None, "max"), sizes):
        a, b = torch.zeros(2, n, 4, dtype=dtype), torch.zeros(2, m, 4, dtype=dtype)
        pairwise_iou(a.requires_grad_(), b.requires_grad_(), kind=kind, reduce=reduce).sum().backward()
    pairwise_iou(torch.zeros(16, 4), torch.zeros(16, 4))


def _linear_assignment() -> None:
    sizes = [(1, 1), (20, 5), (64, 64), (100, 20), (256, 20), (300, 48), (512, 48), (900, 30), (2048, 100), (4096, 16)]
    for (n, m), turned, dtype in product(sizes, (False, True), (FP32, BF16)):
        cost = torch.zeros(2, m, n, dtype=dtype).mT if turned else torch.zeros(2, n, m, dtype=dtype)
        linear_assignment(cost)
        counts = torch.full((2,), min(n, m))
        linear_assignment(cost, n_rows=counts, n_cols=counts, maximize=True)
    linear_assignment(torch.zeros(1, 300, 20))


def _detection_reward() -> None:
    points, boxes = (("point", 2),), (("iou", 4), ("point", 2))
    for n in (1, 32, 50, 100, 256, 300, 900, 1024, 2000):
        for (metric, size), matching, labelled in product(boxes, ("optimal", "sequence"), (False, True)):
            if matching == "sequence" and (metric, size) in points and labelled:
                continue
            for m, dtype in ((n, FP32), (20, BF16)):
                counts, label = torch.full((2,), n), torch.zeros(2, n, dtype=torch.int64)
                named: dict[str, Any] = {"pred_label": label, "gt_label": label[:, :1].expand(2, m)} if labelled else {}
                pred, gt = torch.zeros(2, n, size, dtype=dtype), torch.zeros(2, m, size, dtype=dtype)
                detection_reward(pred, gt, counts, counts, metric=metric, matching=matching, scale=1414.0, **named)


def _decode_attention() -> None:
    heads = ((16, 2, 128), (28, 4, 128), (12, 2, 128), (16, 16, 80), (8, 2, 256), (32, 8, 64), (40, 8, 128))
    shapes = [(head, BF16, 64, 8) for head in heads] + [(heads[0], BF16, *x) for x in ((8, 1), (7, 7), (1, 1))]
    shapes += [(head, dtype, 64, 8) for head in (heads[2], heads[4]) for dtype in (FP16, FP32)]
    for (hq, hkv, d), dtype, rows, groups in shapes:

        def cache(count: int, keys: int, hkv: int = hkv, d: int = d, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(count, hkv, keys, d, dtype=dtype)

        for prompt, own in ((1200, 256), (1003, 33)):
            prefix, mine, q = cache(groups, prompt), cache(rows, own), torch.empty(rows, hq, d, dtype=dtype)
            decode_attention(q, prefix, prefix, mine, mine)


def _add_rms_norm() -> None:
    hiddens = (1536, 2048, 3584, 5120, 896)
    for hidden, dtype, added in product(hiddens, (BF16, FP32), (True, False)):
        x = torch.zeros(64, hidden, dtype=dtype)
        add_rms_norm(x.clone(), x if added else None, torch.ones(hidden, dtype=dtype), 1e-6)


def _rope_append() -> None:
    for (hq, hkv, d), dtype, rows in product(((16, 2, 128), (12, 2, 80), (1, 1, 64)), (BF16, FP16, FP32), (1, 64)):
        q, k = torch.zeros(rows, hq, d, dtype=dtype), torch.zeros(rows, hkv, d, dtype=dtype)
        angle, cache = torch.zeros(rows, d // 2), torch.zeros(rows, hkv, 33, d, dtype=dtype)
        rope_append(q, k, k, angle, angle, cache, cache.clone(), torch.zeros(1, dtype=torch.int64))


def _lora_update() -> None:
    stacks = ((2048, (2048, 256, 256)), (2048, (11008, 11008)), (11008, (2048,)), (1001, (130,)))
    points = [(stack, BF16, 16, rows) for stack in stacks for rows in (1, 64)]
    points += [(stack, BF16, rank, 64) for stack in (stacks[0], stacks[3]) for rank in (10, 32, 64, 128)]
    points += [
        (stack, dtype, rank, 64) for stack in (stacks[0], stacks[3]) for dtype in (FP16, FP32) for rank in (16, 64)
    ]
    for (width, sizes), dtype, rank, rows in points:
        highs = [torch.zeros(size, rank, dtype=dtype) for size in sizes]
        outputs = [torch.zeros(rows, size, dtype=dtype) for size in sizes]
        low = torch.zeros(len(sizes) * rank, width, dtype=dtype)
        lora_update(torch.zeros(rows, width, dtype=dtype), low, highs, outputs, 2.0)


def _backward(*outputs: Tensor) -> None:
    torch.autograd.backward(outputs, [torch.zeros_like(out) for out in outputs])


NORMS = [*product((2048, 3584, 8192, 130), (BF16, FP32)), (128, FP16), (5120, FP16)]


def _rms_norm() -> None:
    for (hidden, dtype), trained in product(NORMS, (True, False)):
        x, weight = torch.zeros(20, hidden, dtype=dtype, requires_grad=True), torch.ones(hidden, dtype=dtype)
        _backward(rms_norm(x, weight.requires_grad_(trained)))


def _residual_rms_norm() -> None:
    for (hidden, dtype), trained, added in product(NORMS, (True, False), (True, False)):
        x, weight = torch.zeros(20, hidden, dtype=dtype, requires_grad=True), torch.ones(hidden, dtype=dtype)
        _backward(*residual_rms_norm(x, x.detach() if added else None, weight.requires_grad_(trained)))


def _silu_mul() -> None:
    for size, dtype, biased in product((11008, 3420, 1001), (BF16, FP16, FP32), (False, True)):
        gate, up, *biases = (torch.zeros(*n, size, dtype=dtype, requires_grad=True) for n in ((40,), (40,), (), ()))
        _backward(silu_mul(gate, up, **(dict(zip(("gate_bias", "up_bias"), biases, strict=True)) if biased else {})))


def _gelu_mul() -> None:
    for size, dtype, approximate in product((16384, 1001), (BF16, FP32), ("none", "tanh")):
        gate, up, bias, other = (torch.zeros(*n, size, dtype=dtype, requires_grad=True) for n in ((3,), (3,), (), ()))
        _backward(gelu_mul(gate, up, approximate=approximate))
        _backward(gelu_mul(gate, up, gate_bias=bias, up_bias=other, approximate=approximate))


def _bias_activation() -> None:
    for columns, dtype, kind, biased in product((5120, 1001), (BF16, FP32), ACTIVATIONS, (0, 1, 2)):
        x = torch.zeros(40, columns, dtype=dtype, requires_grad=True)
        bias = torch.zeros(columns, dtype=dtype, requires_grad=biased > 1) if biased else None
        _backward(bias_activation(x, bias, kind=kind))


def _rope() -> None:
    shapes = ((16, 2, 128, 128), (28, 4, 128, 128), (12, 2, 128, 64), (32, 8, 64, 64), (16, 16, 80, 80), (4, 1, 96, 66))
    for (hq, hk, d, turned), dtype, sections in product(shapes, (BF16, FP32), (False, True)):
        q, k = (torch.zeros(1, 5, h, d, dtype=dtype, requires_grad=True) for h in (hq, hk))
        angles = torch.zeros(*((3,) if sections else ()), 1, 5, turned, dtype=dtype)
        owned = (8, 12, turned // 2 - 20) if sections else None
        _backward(*rope(q.transpose(1, 2), k.transpose(1, 2), angles, angles, sections=owned))


def _prefix_attention() -> None:
    row = partial(prefix_attention, prompt_lengths=[9], completion_lengths=[2, 3], group_of_completion=[0, 0])
    for (hk, d), dtype in product(((2, 128), (8, 128), (16, 256), (3, 80), (1, 33)), (BF16, FP16, FP32)):
        q, k, v = (torch.zeros(14, h, d, dtype=dtype, requires_grad=True) for h in (2 * hk, hk, hk))
        _backward(row(q, k, v))
    joint = torch.zeros(14, 3, 2, 64, dtype=BF16, requires_grad=True)  # of one projection
    _backward(row(*joint.unbind(1)))


def _qkv_rope() -> None:
    for (heads, d), dtype in product(((16, 80), (16, 72), (12, 64)), (BF16, FP16, FP32)):
        qkv, angles = torch.zeros(5, 3, heads, d, dtype=dtype, requires_grad=True), torch.zeros(5, d)
        _backward(*qkv_rope(qkv, angles, angles))


CALLS: dict[str, Callable[[], None]] = {
    "linear_logprob": _linear_logprob,
    "token_logprob": _token_logprob,
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
    "policy_loss": _policy_loss,
    "linear_policy_loss": _linear_policy_loss,
    "listwise_loss": _listwise_loss,
    "unlikelihood_loss": _unlikelihood_loss,
    "group_advantage": _group_advantage,
    "pairwise_iou": _pairwise_iou,
    "linear_assignment": _linear_assignment,
    "detection_reward": _detection_reward,
    "decode_attention": _decode_attention,
    "add_rms_norm": _add_rms_norm,
    "rope_append": _rope_append,
    "lora_update": _lora_update,
    "silu_mul": _silu_mul,
    "gelu_mul": _gelu_mul,
    "rms_norm": _rms_norm,
    "residual_rms_norm": _residual_rms_norm,
    "bias_activation": _bias_activation,
    "prefix_attention": _prefix_attention,
    "rope": _rope,
    "qkv_rope": _qkv_rope,
}
