"""Calls of the whole public API at small sizes, to be run through compiled kernels and through their float64 twins.

A case computes with ``k.<function>`` (the library's, or the twin) on tensors made by ``real`` (in the case's dtype, or
the same numbers in float64) and returns every tensor that has to agree, gradients and tensors written in place too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastrl_kernels
from fastrl_kernels import reference

Outputs = list[Tensor]


class Case(NamedTuple):
    """One call; ``kernels`` are the compiled functions that it launches."""

    name: str
    run: Callable[[Any, Callable[[Tensor], Tensor]], Outputs]
    dtype: torch.dtype
    kernels: frozenset[str]
    dot: bool = False  # has a matrix product: interpreted from its sm_80 code only
    fast: bool = False  # part of make test


class Twins:
    """The reference functions under the library's names."""

    def __getattr__(self, name: str) -> Any:
        return getattr(reference, f"{name}_reference")


def outcomes(case: Case) -> tuple[Outputs, Callable[[], Outputs]]:
    """The twin's results in float64, and the call that gives the library's."""
    torch.manual_seed(0)
    want = case.run(Twins(), lambda x: x.to(case.dtype).double())

    def ours() -> Outputs:
        torch.manual_seed(0)
        return case.run(fastrl_kernels, lambda x: x.to(case.dtype))

    return want, ours


def cases() -> Iterator[Case]:
    yield from _boxes()
    yield from _assignments()
    yield from _detections()
    yield from _losses()
    yield from _lists()
    yield from _heads()
    yield from _decoding()
    yield from _adapters()
    yield from _pointwise()
    yield from _prefixes()


def _box(*shape: int) -> Tensor:
    corner = torch.rand(*shape, 2) * 80
    return torch.cat([corner, corner + 1 + torch.rand(*shape, 2) * 60], -1)


def _grads(loss: Tensor, *inputs: Tensor) -> Outputs:
    return list(torch.autograd.grad(loss, inputs))


# ---- boxes -----------------------------------------------------------------------------------------------------------


def _boxes() -> Iterator[Case]:
    for kind in ("iou", "giou", "diou", "ciou"):
        for n, m in ((37, 19), (32, 80)):

            def table(k: Any, real: Any, kind: str = kind, n: int = n, m: int = m) -> Outputs:
                a, b = real(_box(2, n)).requires_grad_(), real(_box(2, m)).requires_grad_()
                counts = {"n_a": torch.tensor([n, n - 5]), "n_b": torch.tensor([m - 3, m])}
                out = k.pairwise_iou(a, b, kind=kind, **counts)
                return [out, *_grads((out * real(torch.randn(out.shape))).sum(), a, b)]

            def top(k: Any, real: Any, kind: str = kind, n: int = n, m: int = m) -> Outputs:
                a, b = real(_box(n)).requires_grad_(), real(_box(m)).requires_grad_()
                out = k.pairwise_iou(a, b, kind=kind, reduce="max")
                return [out, *_grads((out * real(torch.randn(out.shape))).sum(), a, b)]

            fast = (kind, n) == ("ciou", 37)
            names = frozenset(["_iou_kernel", "_iou_backward_kernel"])
            yield Case(f"pairwise_iou/{kind}/{n}x{m}", table, torch.float32, names, fast=fast)
            names = frozenset(["_iou_max_kernel", "_iou_backward_kernel"])
            yield Case(f"pairwise_iou/{kind}/max/{n}x{m}", top, torch.float32, names, fast=fast)
    yield Case("pairwise_iou/bf16", _plain_table, torch.bfloat16, frozenset(["_iou_kernel"]))
    yield Case("pairwise_iou/unaligned", _unaligned_table, torch.float32, frozenset(["_iou_kernel"]))


def _plain_table(k: Any, real: Any) -> Outputs:
    return [k.pairwise_iou(real(_box(3, 17)), real(_box(3, 40)), kind="giou")]


def _unaligned_table(k: Any, real: Any) -> Outputs:
    """Boxes that start at no multiple of 16 bytes, so a box is no word."""
    flat = torch.cat([torch.zeros(1), _box(40).flatten()])
    return [k.pairwise_iou(real(flat)[1:].view(10, 4, 4), real(_box(10, 3)))]


# ---- assignment and detection ----------------------------------------------------------------------------------------


def _assignments() -> Iterator[Case]:
    names = frozenset(["_assignment_kernel"])
    sizes = [(3, 5, 7), (4, 33, 21), (3, 16, 64), (2, 90, 128), (1, 300, 40), (1, 700, 12), (1, 9, 1500), (1, 3000, 6)]
    for problems, n, m in sizes:

        def solve(k: Any, real: Any, problems: int = problems, n: int = n, m: int = m) -> Outputs:
            out = k.linear_assignment(real(torch.rand(problems, n, m)))
            return list(out)

        def ragged(k: Any, real: Any, problems: int = problems, n: int = n, m: int = m) -> Outputs:
            cost = real(torch.rand(problems, m, n)).transpose(1, 2)
            cost[0, 0] = -torch.inf  # forbidden
            rows, cols = torch.randint(1, n + 1, (problems,)), torch.randint(0, m + 1, (problems,))
            return list(k.linear_assignment(cost, n_rows=rows, n_cols=cols, maximize=True))

        fast = (n, m) == (33, 21)
        yield Case(f"linear_assignment/{problems}x{n}x{m}", solve, torch.float32, names, fast=fast)
        if n * m < 20000:
            yield Case(f"linear_assignment/{problems}x{n}x{m}/ragged", ragged, torch.float32, names, fast=fast)


def _detections() -> Iterator[Case]:
    names = frozenset(["_detection_kernel"])
    for metric in ("iou", "point"):
        for matching in ("optimal", "sequence"):
            for problems, n, m in ((5, 7, 9), (4, 33, 16), (2, 130, 40), (1, 300, 9), (1, 1100, 5), (1, 2000, 3)):

                def score(
                    k: Any, real: Any, metric: str = metric, matching: str = matching, shape: Any = (problems, n, m)
                ) -> Outputs:
                    problems, n, m = shape
                    gt = _box(problems, m)
                    pred = _box(problems, n)
                    near = min(n, m) - 1
                    pred[:, :near] = gt[:, :near] + torch.randn(problems, near, 4)
                    width = 4 if metric == "iou" else 2
                    counts = [torch.randint(0, x + 1, (problems,)) for x in (n, m)]
                    counts[0][0], counts[1][0] = n, m
                    labels = [torch.randint(0, 2, (problems, x)) for x in (n, m)]
                    items = [real(x[..., :width].contiguous()) for x in (pred, gt)]
                    named = {"metric": metric, "matching": matching, "scale": 1.0 if metric == "iou" else 90.0}
                    if problems % 2:
                        named |= {"pred_label": labels[0], "gt_label": labels[1]}
                    out = k.detection_reward(*items, *counts, **named)
                    inside = torch.arange(n) < counts[0][:, None]
                    return [out.match, torch.where(inside, out.quality, 0.0), *out[2:]]

                fast = (metric, matching, n) == ("iou", "optimal", 33)
                name = f"detection_reward/{metric}/{matching}/{problems}x{n}x{m}"
                yield Case(name, score, torch.float32, names, fast=fast)


# ---- losses ----------------------------------------------------------------------------------------------------------


def _policy_inputs(real: Any, n: int, c: int) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    logp = -3 * torch.rand(n)
    old, ref = logp + 0.3 * torch.randn(n), logp + 0.3 * torch.randn(n)
    ids, advantage = torch.randint(-1, c, (n,)), torch.randn(c)
    weight = torch.rand(n) * (torch.arange(n) % 3 > 0) / n
    named = {"old_logp": real(old), "ref_logp": real(ref), "weight": weight.to(real(weight).dtype)}
    return real(logp).requires_grad_(), real(advantage), ids, named


def _losses() -> Iterator[Case]:
    rows, totals = "policy_rows_kernel", "policy_totals_kernel"
    for name, options in {
        "plain": {},
        "k3": {"beta": 0.04},
        "k1+dual": {"beta": 0.1, "kl": "k1", "dual_clip": 1.5},
        "k2": {"beta": 0.1, "kl": "k2"},
        "k1+k2 slope": {"beta": 0.1, "kl": "k1", "kl_gradient": "k2"},
        "sequence": {"ratio": "sequence", "beta": 0.04},
        "cispo": {"loss": "cispo", "beta": 0.04},
        "sapo": {"loss": "sapo", "kl": "k2"},
        "truncate": {"importance": "truncate", "importance_cap": 1.1},
        "sequence mask": {"importance": "mask", "importance_level": "sequence", "importance_cap": 1.02},
    }.items():
        for n, c in ((300, 7), (512, 16), (1, 1)):

            def policy(k: Any, real: Any, options: Any = options, n: int = n, c: int = c) -> Outputs:
                logp, advantage, ids, named = _policy_inputs(real, n, c)
                if not options:
                    named.pop("ref_logp")
                if "importance" in options:
                    named["sampler_logp"] = named["old_logp"] + real(0.1 * torch.randn(n))
                out = k.policy_loss(logp, advantage, ids, **named, **options)
                return [*out, *_grads(out.loss * 1.7, logp)]

            used = frozenset({rows, totals} | ({"sequence_sums_kernel"} if "sequence" in name else set()))
            fast = (name, n) in (("k3", 300), ("sequence", 300))
            yield Case(f"policy_loss/{name}/{n}", policy, torch.float32, used, fast=fast)
    for n in (1, 300, 512):

        def unlikelihood(k: Any, real: Any, n: int = n) -> Outputs:
            logp, weight = real(-(torch.rand(n) ** 3) * 4).requires_grad_(), torch.rand(n) / n
            loss = k.unlikelihood_loss(logp, real(torch.rand(n)), weight=weight.to(logp.dtype))
            return [loss, *_grads(loss * 0.7, logp)]

        names = frozenset(["unlikelihood_kernel"])
        yield Case(f"unlikelihood_loss/{n}", unlikelihood, torch.float32, names, fast=n == 300)
    names = frozenset(["group_advantage_kernel"])
    for baseline in ("mean", "leave_one_out"):
        for scale in ("std", "none"):

            def equal(k: Any, real: Any, baseline: str = baseline, scale: str = scale) -> Outputs:
                rewards = real(torch.randint(0, 5, (24 * 3,)) / 4)
                out = k.group_advantage(rewards, 3, baseline=baseline, scale=scale)
                return [x.double() for x in out]

            def by_id(k: Any, real: Any, baseline: str = baseline, scale: str = scale) -> Outputs:
                rewards, ids = real(torch.randint(0, 5, (301, 2)) / 4), torch.randint(-1, 9, (301,))
                weights = real(torch.tensor([1.0, 0.5]))
                out = k.group_advantage(rewards, ids, n_groups=10, weights=weights, baseline=baseline, scale=scale)
                return [x.double() for x in out]

            fast = (baseline, scale) == ("leave_one_out", "std")
            yield Case(f"group_advantage/equal/{baseline}/{scale}", equal, torch.float32, names, fast=fast)
            yield Case(f"group_advantage/ids/{baseline}/{scale}", by_id, torch.float32, names, fast=fast)


def _lists() -> Iterator[Case]:
    names = frozenset(["listwise_kernel"])
    for kind in ("perpo", "listmle"):
        for items in (2, 5, 20, 64, 200, 700, 1024):

            def lists(k: Any, real: Any, kind: str = kind, items: int = items) -> Outputs:
                score = real(torch.randn(3, items) * 5).requires_grad_()
                reward = real(torch.randint(0, 9, (3, items)) / 8)
                mask = torch.rand(3, items) > 0.2 if items > 2 else None
                loss = k.listwise_loss(score, reward, kind=kind, mask=mask)
                return [loss, *_grads((loss * torch.tensor([1.0, -2.0, 0.5])).sum(), score)]

            yield Case(f"listwise_loss/{kind}/{items}", lists, torch.float32, names, fast=items == 20)


# ---- the head --------------------------------------------------------------------------------------------------------


def _heads() -> Iterator[Case]:
    names = frozenset(["linear_logprob_fold_kernel", "linear_logprob_gradient_kernel"])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for width in (1, 100, 257, 1031, 2048, 4096 + 9, 8192):

            def tokens(k: Any, real: Any, width: int = width) -> Outputs:
                logits, target = real(torch.randn(4, width) * 3).requires_grad_(), torch.randint(width, (4,))
                target[1] = -100
                out = k.token_logprob(logits, target, temperature=0.8, return_entropy=True)
                loss = (out.logp * torch.tensor([1.0, 2.0, 0.0, -1.0])).sum() + 0.1 * out.entropy[:2].sum()
                return [out.logp, out.entropy, *_grads(loss, logits)]

            fast = (dtype, width) == (torch.bfloat16, 1031)
            yield Case(f"token_logprob/{str(dtype)[6:]}/{width}", tokens, dtype, names, fast=fast)
    for dtype, width, several in product((torch.float32, torch.bfloat16), (100, 1031, 4096 + 9), (0, 3, 40)):

        def classes(k: Any, real: Any, width: int = width, several: int = several) -> Outputs:
            logits, weight = real(torch.randn(4, width) * 3).requires_grad_(), torch.rand(width)
            target = torch.randint(width, (4, several) if several else (4,))
            target[1] = -100
            if not several:
                options = {"label_smoothing": 0.1, "z_loss": 0.01, "reduction": "none"}
                loss = k.cross_entropy(logits, target, weight.to(logits.dtype), **options)
                plain = k.cross_entropy(logits, target, **options)
                return [loss, plain, *_grads(loss[:3].sum(), logits), *_grads(plain[1:].sum(), logits)]
            target[2] = target[2, 0]
            out = k.token_logprob(logits, target, temperature=0.8, return_entropy=True)
            loss = (out.logp * torch.randn(4, several)).sum() + 0.1 * out.entropy[:2].sum()
            return [out.logp, out.entropy, *_grads(loss, logits)]

        fast = (dtype, width) == (torch.bfloat16, 1031)
        name = f"token_logprob/{several} targets" if several else "cross_entropy"
        yield Case(f"{name}/{str(dtype)[6:]}/{width}", classes, dtype, names, fast=fast)
    for options in ({}, {"softcap": 5.0}, {"bias": True}, {"softcap": 5.0, "bias": True, "entropy": True}):

        def head(k: Any, real: Any, options: Any = options) -> Outputs:
            hidden, weight = real(torch.randn(5, 16)).requires_grad_(), real(torch.randn(1100, 16) / 2).requires_grad_()
            target = torch.randint(1100, (5,))
            target[2] = -100
            named: dict[str, Any] = {"bias": real(torch.randn(1100))} if "bias" in options else {}
            if "softcap" in options:
                named["softcap"] = options["softcap"]
            out = k.linear_logprob(
                hidden, weight, target, return_entropy="entropy" in options, scratch_bytes=20000, **named
            )
            loss = (out.logp * torch.arange(5)).sum() + (0 if out.entropy is None else out.entropy.sum())
            return [*(x for x in out if x is not None), *_grads(loss, hidden, weight)]

        yield Case(
            f"linear_logprob/{'+'.join(options) or 'plain'}", head, torch.float32, names, fast=len(options) in (0, 3)
        )

    for options in ({}, {"softcap": 5.0}):

        def smoothed(k: Any, real: Any, options: Any = options) -> Outputs:
            hidden, weight = real(torch.randn(5, 16)).requires_grad_(), real(torch.randn(1100, 16) / 2).requires_grad_()
            target, classes = torch.randint(1100, (5,)), real(torch.rand(1100))
            target[2] = -100
            named = {"label_smoothing": 0.2, "z_loss": 0.01, "scratch_bytes": 20000, **options}
            loss = k.linear_cross_entropy(hidden, weight, target, classes, **named)
            return [loss, *_grads(loss, hidden, weight)]

        def several(k: Any, real: Any, options: Any = options) -> Outputs:
            hidden, weight = real(torch.randn(5, 16)).requires_grad_(), real(torch.randn(1100, 16) / 2).requires_grad_()
            target = torch.randint(1100, (5, 6))
            target[2], target[:, 4] = -100, target[:, 1]
            out = k.linear_logprob(hidden, weight, target, scratch_bytes=20000, **options)
            return [out.logp, *_grads((out.logp * torch.randn(5, 6)).sum(), hidden, weight)]

        yield Case(f"linear_cross_entropy/{'+'.join(options) or 'plain'}", smoothed, torch.float32, names)
        yield Case(f"linear_logprob/6 targets/{'+'.join(options) or 'plain'}", several, torch.float32, names)

    def fused(k: Any, real: Any) -> Outputs:
        hidden, weight = real(torch.randn(40, 16)).requires_grad_(), real(torch.randn(300, 16) / 2).requires_grad_()
        _, advantage, ids, named = _policy_inputs(real, 40, 3)
        target = torch.randint(300, (40,))
        named["ref_logp"], named["old_logp"] = named["ref_logp"] - 4, named["old_logp"] - 4
        out = k.linear_policy_loss(hidden, weight, target, advantage, ids, beta=0.04, **named)
        return [out.loss, out.kl, out.logp, *_grads(out.loss, hidden, weight)]

    names = names | {"policy_rows_kernel", "policy_totals_kernel"}
    yield Case("linear_policy_loss", fused, torch.float32, names)


# ---- decoding --------------------------------------------------------------------------------------------------------


def _decoding() -> Iterator[Case]:
    names = frozenset(["_decode_split_kernel", "_decode_merge_kernel"])
    for dtype, heads, group, width in (
        (torch.float32, 2, 1, 32),
        (torch.float32, 2, 2, 256),
        (torch.float32, 1, 8, 128),
        (torch.bfloat16, 2, 7, 128),
        (torch.bfloat16, 1, 4, 256),
        (torch.bfloat16, 2, 1, 80),
        (torch.float16, 1, 6, 64),
    ):

        def attend(k: Any, real: Any, heads: int = heads, group: int = group, width: int = width) -> Outputs:
            rows, prompts, prompt, own = 7, 2, 150, 70
            q = real(torch.randn(rows, heads * group, width))
            pk, pv = (real(torch.randn(prompts, heads, prompt, width)) for _ in range(2))
            ok, ov = (real(torch.randn(rows, heads, own, width)) for _ in range(2))
            named = {
                "row_offsets": torch.tensor([0, 4, 6], dtype=torch.int32),
                "prefix_len": torch.tensor([prompt, 131], dtype=torch.int32),
                "own_len": torch.randint(0, own + 1, (rows,), dtype=torch.int32),
            }
            return [k.decode_attention(q, pk, pv, ok, ov, **named)]

        name = f"decode_attention/{str(dtype)[6:]}/{heads}x{group}x{width}"
        yield Case(name, attend, dtype, names, dot=True, fast=name.endswith(("bfloat16/2x1x80", "/2x1x32")))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for width in (24, 100, 1536):

            def norm(k: Any, real: Any, width: int = width) -> Outputs:
                residual, x, weight = real(torch.randn(5, width)), real(torch.randn(5, width)), real(torch.randn(width))
                first = k.add_rms_norm(residual, None, weight, 1e-6)
                return [first, k.add_rms_norm(residual, x, weight, 1e-6), residual]

            fast = (dtype, width) == (torch.bfloat16, 100)
            names = frozenset(["rms_norm_kernel"])
            yield Case(f"add_rms_norm/{str(dtype)[6:]}/{width}", norm, dtype, names, fast=fast)

        for width in (12, 128):

            def rope(k: Any, real: Any, width: int = width) -> Outputs:
                q, key, v = (real(torch.randn(3, h, width)) for h in (4, 2, 2))
                angle = torch.randn(3, width // 2)
                keys, values = (real(torch.zeros(3, 2, 5, width)) for _ in range(2))
                out = k.rope_append(q, key, v, real(angle.cos()), real(angle.sin()), keys, values, torch.tensor([3]))
                return [out, keys, values]

            names = frozenset(["_rope_append_kernel"])
            yield Case(f"rope_append/{str(dtype)[6:]}/{width}", rope, dtype, names, fast=fast_rope(dtype, width))


def fast_rope(dtype: torch.dtype, width: int) -> bool:
    return (dtype, width) == (torch.bfloat16, 12)


# ---- pointwise -------------------------------------------------------------------------------------------------------


def _differentiated(call: Callable[..., Any], inputs: list[Tensor], real: Any) -> Outputs:
    leaves = [x.detach().requires_grad_() for x in inputs]
    result = call(*leaves)
    out = list(result) if isinstance(result, tuple) else [result]
    upstream = [real(torch.randn(x.shape)) for x in out]
    return [*out, *torch.autograd.grad(out, leaves, upstream)]


def _adapters() -> Iterator[Case]:
    for dtype, (rows, width, rank, sizes) in product(
        (torch.float32, torch.bfloat16, torch.float16),
        ((5, 150, 10, (130, 9)), (20, 64, 16, (128, 16, 16)), (3, 37, 64, (7,))),
    ):

        def update(
            k: Any, real: Any, rows: int = rows, width: int = width, rank: int = rank, sizes: tuple[int, ...] = sizes
        ) -> Outputs:
            x, low = real(torch.randn(rows, width)), real(torch.randn(len(sizes) * rank, width) / width**0.5)
            highs, outputs = (
                [real(torch.randn(*n)) for n in shapes]
                for shapes in ([(size, rank) for size in sizes], [(rows, size) for size in sizes])
            )
            k.lora_update(x, low, highs, outputs, 0.5)
            return outputs

        name = f"lora_update/{str(dtype)[6:]}/{rows}x{width}x{rank}"
        names = frozenset(["_lora_update_kernel"])
        yield Case(name, update, dtype, names, dot=True, fast=name.endswith("bfloat16/5x150x10"))


def _pointwise() -> Iterator[Case]:
    for dtype, width in product((torch.float32, torch.bfloat16, torch.float16), (24, 130, 1536)):
        short = str(dtype)[6:]

        def norms(k: Any, real: Any, width: int = width) -> Outputs:
            residual, x, weight = real(torch.randn(9, width)), real(torch.randn(9, width)), real(torch.randn(width))
            alone = _differentiated(k.rms_norm, [x, weight], real)
            forked = _differentiated(lambda a, w: k.residual_rms_norm(a, None, w), [x, weight], real)
            return [*alone, *forked, *_differentiated(k.residual_rms_norm, [residual, x, weight], real)]

        names = frozenset(["rms_norm_kernel", "rms_norm_backward_kernel"])
        yield Case(f"rms_norm/{short}/{width}", norms, dtype, names, fast=(short, width) == ("bfloat16", 130))

        def gates(k: Any, real: Any, width: int = width) -> Outputs:
            gate, up, a, b = (real(torch.randn(*n, width)) for n in ((17,), (17,), (), ()))
            exact = _differentiated(k.gelu_mul, [gate, up], real)
            near = _differentiated(lambda x, y: k.gelu_mul(x, y, approximate="tanh"), [gate, up], real)
            biased = _differentiated(
                lambda x, y, a, b: k.silu_mul(x, y, gate_bias=a, up_bias=b), [gate, up, a, b], real
            )
            return [*exact, *near, *biased]

        names = frozenset(["gated_kernel", "gated_backward_kernel"])
        yield Case(f"gated_mul/{short}/{width}", gates, dtype, names, fast=(short, width) == ("float16", 24))

        def activations(k: Any, real: Any, width: int = width) -> Outputs:
            x, bias = real(torch.randn(17, width)), real(torch.randn(width))
            quick = _differentiated(lambda x, b: k.bias_activation(x, b, kind="quick_gelu"), [x, bias], real)
            return [*quick, *_differentiated(lambda x: k.bias_activation(x, kind="gelu"), [x], real)]

        names = frozenset(["bias_activation_kernel", "bias_activation_backward_kernel"])
        yield Case(
            f"bias_activation/{short}/{width}", activations, dtype, names, fast=(short, width) == ("float32", 24)
        )
    for dtype, (hq, hk, dim, turned) in product(
        (torch.float32, torch.bfloat16, torch.float16), ((4, 2, 12, 12), (16, 2, 128, 128), (3, 1, 96, 66))
    ):

        def ropes(k: Any, real: Any, hq: int = hq, hk: int = hk, dim: int = dim, turned: int = turned) -> Outputs:
            q, key = (real(torch.randn(2, h, 5, dim)) for h in (hq, hk))
            plain = [real(x) for x in torch.randn(2, 1, 5, turned).unbind()]
            axes = [real(x) for x in torch.randn(2, 3, 2, 5, turned).unbind()]
            sections = (1, 2, turned // 2 - 3)
            three = _differentiated(lambda q, key: k.rope(q, key, *axes, sections=sections), [q, key], real)
            joint = _differentiated(
                lambda x: k.qkv_rope(x, *(a[0] for a in plain)), [real(torch.randn(5, 3, hq, dim))], real
            )
            return [*_differentiated(lambda q, key: k.rope(q, key, *plain), [q, key], real), *three, *joint]

        name = f"rope/{str(dtype)[6:]}/{hq}x{dim}"
        yield Case(name, ropes, dtype, frozenset(["rope_kernel"]), fast=name == "rope/bfloat16/4x12")


# ---- prefix-shared attention -----------------------------------------------------------------------------------------


def _prefixes() -> Iterator[Case]:
    names = frozenset(["gather_rows_kernel", "sum_copies_kernel"])
    for dtype, (hq, hk, dim) in product(
        (torch.float32, torch.bfloat16, torch.float16), ((2, 1, 33), (4, 2, 128), (6, 6, 80), (8, 8, 160))
    ):

        def attend(k: Any, real: Any, hq: int = hq, hk: int = hk, dim: int = dim) -> Outputs:
            row = {"prompt_lengths": [9, 1], "completion_lengths": [2, 3, 1], "group_of_completion": [0, 0, 1]}
            q, key, v = (real(torch.randn(16, h, dim)) for h in (hq, hk, hk))
            joint = real(torch.randn(16, 3, hk, dim))  # whose rows lie apart
            apart = _differentiated(lambda x: k.prefix_attention(*x.unbind(1), **row), [joint], real)
            return [*_differentiated(lambda *x: k.prefix_attention(*x, **row), [q, key, v], real), *apart]

        name = f"prefix_attention/{str(dtype)[6:]}/{hq}x{hk}x{dim}"
        yield Case(name, attend, dtype, names, fast=name.endswith("bfloat16/2x1x33"))
