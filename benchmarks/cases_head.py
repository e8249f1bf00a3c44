"""The language-model head: log-probs from hidden states, the fused policy loss, and log-probs of given logits.

Floors count the matmuls of the cheapest schedule that does not keep the logits: 1 forward, 4 forward and backward (3
with a frozen head), 3 where the gradient can be made in the forward. A peer that keeps ``[N, V]`` logits needs 3.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.case import Case, Inputs, Run, dtype_for, installed, leaf, with_gradients
from benchmarks.cases_losses import eager_policy_loss
from fastrl_kernels.cross_entropy import cross_entropy, linear_cross_entropy
from fastrl_kernels.linear_logprob import linear_logprob
from fastrl_kernels.linear_policy_loss import linear_policy_loss
from fastrl_kernels.policy_loss import policy_loss
from fastrl_kernels.token_logprob import token_logprob

SHAPES = {  # completions, tokens each, hidden, vocabulary, scratch bytes of ours
    "tiny": (4, 9, 32, 257, 1 << 16),
    "cpu": (8, 32, 256, 32768, 8 << 20),
    "gpu": (64, 256, 2048, 151936, 1 << 30),
}
LOGITS = {"tiny": (7, 129), "cpu": (256, 32768), "gpu": (8192, 151936)}  # rows, vocabulary
SMOOTHED = {"label_smoothing": 0.1, "z_loss": 1e-4}
TRL_COLUMNS = 32768  # the vocabulary tile its trainers use
HAS_TRL = installed("trl")
POLICY = {"beta": 0.04, "kl": "k3", "clip_low": 0.2, "clip_high": 0.28}


def cases(size: str) -> list[Case]:
    """All cases of this file at one of ``SIZES``."""
    return [
        *(_logprob_case(size, kind) for kind in ("forward", "forward+backward", "frozen", "rows")),
        _policy_case(size),
        _cross_entropy_case(size),
        _cross_entropy_of_logits_case(size),
        _logits_case(size, backward=False),
        _logits_case(size, backward=True),
    ]


def _head_inputs(size: str, device: torch.device, *, frozen: bool = False) -> Inputs:
    completions, length, h, v, scratch = SHAPES[size]
    n, dtype = completions * length, dtype_for(size)
    weight = (torch.randn(v, h, device=device) / h**0.5).to(dtype)
    return {
        "hidden": leaf(torch.randn(n, h, device=device).to(dtype)),
        "weight": weight if frozen else leaf(weight),
        "target": torch.randint(v, (n,), device=device),
        "scratch_bytes": scratch,
    }


def _torch_logp(x: Inputs) -> Tensor:
    logits = (x["hidden"] @ x["weight"].T).float()
    return torch.log_softmax(logits, 1).gather(1, x["target"][:, None])[:, 0]


def _trl_logp(x: Inputs) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    apply = ChunkedLogProbFunction.apply
    return apply(x["hidden"], x["weight"], None, x["target"], 1.0, TRL_COLUMNS, None, 1.0, ())[0]


def _our_logp(x: Inputs) -> Tensor:
    options = {"rows": x.get("rows"), "scratch_bytes": x["scratch_bytes"]}
    return linear_logprob(x["hidden"], x["weight"], x["target"], **options).logp


def _liger_nll(x: Inputs) -> tuple[Tensor, ...]:
    """Its mean over rows, which is what the coefficients of the cases it takes part in say."""
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    loss = LigerFusedLinearCrossEntropyFunction.apply(x["hidden"], x["weight"], x["target"])[0]
    return with_gradients(loss, _leaves(x))


def _leaves(x: Inputs) -> list[Tensor]:
    return [x[name] for name in ("hidden", "weight") if x[name].requires_grad]


def _logprob_case(size: str, kind: str) -> Case:
    completions, length, h, v, _ = SHAPES[size]
    n = completions * length
    kept = n - 2 * n // 5  # "rows": two rows in five have gradient 0, as groups of equal reward give

    def make(device: torch.device) -> Inputs:
        x = _head_inputs(size, device, frozen=kind == "frozen")
        x["coefficient"] = torch.full((n,), 1 / n, device=device)
        if kind == "rows":
            x["rows"] = torch.randperm(n, device=device)[:kept].sort().values
            x["coefficient"] = torch.zeros(n, device=device).index_fill_(0, x["rows"], 1 / n)
        return x

    def through(logp: Callable[[Inputs], Tensor]) -> Run:
        def run(x: Inputs) -> tuple[Tensor, ...]:
            if kind == "forward":
                with torch.no_grad():
                    return (logp(x),)
            return with_gradients(-(logp(x) * x["coefficient"]).sum(), _leaves(x))

        return run

    peers: dict[str, Run | None] = {"torch": through(_torch_logp), "trl": through(_trl_logp) if HAS_TRL else None}
    if kind in ("forward+backward", "frozen"):
        peers["liger"] = _liger_nll if installed("liger_kernel", gpu=True) else None
    matmuls = {"forward": 1, "forward+backward": 4, "frozen": 3, "rows": 1 + 3 * kept / n}[kind]
    return Case(
        name=f"linear_logprob/{kind}", op="linear_logprob", shape={"N": n, "H": h, "V": v}, make=make,
        ours=through(_our_logp), peers=peers, flops=2.0 * matmuls * n * h * v, dtype=dtype_for(size),
    )  # fmt: skip


def _policy_case(size: str) -> Case:
    completions, length, h, v, _ = SHAPES[size]
    n = completions * length

    def make(device: torch.device) -> Inputs:
        x = _head_inputs(size, device)
        with torch.no_grad():
            logp = _our_logp(x)
        x["old_logp"] = logp + 0.2 * torch.randn(n, device=device)
        x["ref_logp"] = logp + 0.2 * torch.randn(n, device=device)
        x["advantage"] = torch.randn(completions, device=device)
        x["completion"] = torch.arange(completions, device=device).repeat_interleave(length)
        return x

    def given(x: Inputs) -> dict[str, Tensor]:
        return {"old_logp": x["old_logp"], "ref_logp": x["ref_logp"]}

    def ours(x: Inputs) -> tuple[Tensor, ...]:
        head = (x["hidden"], x["weight"], x["target"], x["advantage"], x["completion"])
        loss = linear_policy_loss(*head, **given(x), **POLICY, scratch_bytes=x["scratch_bytes"]).loss
        return with_gradients(loss, _leaves(x))

    def generic(x: Inputs) -> tuple[Tensor, ...]:
        loss = policy_loss(_our_logp(x), x["advantage"], x["completion"], **given(x), **POLICY).loss
        return with_gradients(loss, _leaves(x))

    def eager(logp: Callable[[Inputs], Tensor], x: Inputs) -> tuple[Tensor, ...]:
        loss = eager_policy_loss(logp(x), x["advantage"][x["completion"]], **given(x), **POLICY)
        return with_gradients(loss, _leaves(x))

    def liger(x: Inputs) -> tuple[Tensor, ...]:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        fused = LigerFusedLinearGRPOLoss(
            beta=POLICY["beta"], epsilon_low=POLICY["clip_low"], epsilon_high=POLICY["clip_high"], loss_type="bnpo",
            compiled=x["hidden"].is_cuda,
        )  # fmt: skip
        shape = (completions, length)
        loss = fused(
            x["hidden"].view(*shape, h), x["weight"], x["target"].view(shape),
            torch.ones(shape, device=x["hidden"].device), x["advantage"],
            ref_per_token_logps=x["ref_logp"].view(shape), old_per_token_logps=x["old_logp"].view(shape),
        )[0]  # fmt: skip
        return with_gradients(loss, _leaves(x))

    peers: dict[str, Run | None] = {
        "fastrl, 4 matmuls": generic,
        "torch": partial(eager, _torch_logp),
        "trl": partial(eager, _trl_logp) if HAS_TRL else None,
        "liger": liger if installed("liger_kernel") else None,
    }
    return Case(
        name="linear_policy_loss/forward+backward", op="linear_policy_loss", shape={"N": n, "H": h, "V": v}, make=make,
        ours=ours, peers=peers, flops=6.0 * n * h * v, dtype=dtype_for(size),
    )  # fmt: skip


def _torch_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    loss = torch.nn.functional.cross_entropy(logits, target, label_smoothing=SMOOTHED["label_smoothing"])
    return loss + SMOOTHED["z_loss"] * logits.logsumexp(1).square().mean()


def _cross_entropy_case(size: str) -> Case:
    completions, length, h, v, _ = SHAPES[size]
    n = completions * length

    def ours(x: Inputs) -> tuple[Tensor, ...]:
        head = {**SMOOTHED, "scratch_bytes": x["scratch_bytes"]}
        return with_gradients(linear_cross_entropy(x["hidden"], x["weight"], x["target"], **head), _leaves(x))

    def eager(x: Inputs) -> tuple[Tensor, ...]:
        logits = (x["hidden"] @ x["weight"].T).float()
        return with_gradients(_torch_cross_entropy(logits, x["target"]), _leaves(x))

    def liger(x: Inputs) -> tuple[Tensor, ...]:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        fused = LigerFusedLinearCrossEntropyLoss(
            label_smoothing=SMOOTHED["label_smoothing"], lse_square_scale=SMOOTHED["z_loss"]
        )
        return with_gradients(fused(x["weight"], x["hidden"], x["target"]), _leaves(x))

    peers: dict[str, Run | None] = {"torch": eager, "liger": liger if installed("liger_kernel", gpu=True) else None}
    return Case(
        name="linear_cross_entropy/forward+backward", op="linear_cross_entropy", shape={"N": n, "H": h, "V": v},
        make=lambda device: _head_inputs(size, device), ours=ours, peers=peers, flops=8.0 * n * h * v,
        dtype=dtype_for(size),
    )  # fmt: skip


def _cross_entropy_of_logits_case(size: str) -> Case:
    n, v = LOGITS[size]
    dtype = dtype_for(size)

    def make(device: torch.device) -> Inputs:
        logits = leaf(torch.randn(n, v, device=device).to(dtype))
        return {"logits": logits, "target": torch.randint(v, (n,), device=device)}

    def ours(x: Inputs) -> tuple[Tensor, ...]:
        return with_gradients(cross_entropy(x["logits"], x["target"], **SMOOTHED), [x["logits"]])

    def eager(x: Inputs) -> tuple[Tensor, ...]:
        return with_gradients(_torch_cross_entropy(x["logits"].float(), x["target"]), [x["logits"]])

    return Case(
        name="cross_entropy/forward+backward", op="cross_entropy", shape={"N": n, "V": v}, make=make, ours=ours,
        peers={"torch": eager}, bytes=float(3 * n * v * dtype.itemsize), dtype=dtype,
    )  # fmt: skip


def _logits_case(size: str, *, backward: bool) -> Case:
    n, v = LOGITS[size]
    dtype = dtype_for(size)

    def make(device: torch.device) -> Inputs:
        source = torch.randn(n, v, device=device).to(dtype)
        return {
            "source": source,
            "logits": leaf(source.clone()),
            "target": torch.randint(v, (n,), device=device),
            "coefficient": torch.randn(n, device=device),
        }

    def finish(x: Inputs, logp: Tensor, entropy: Tensor) -> tuple[Tensor, ...]:
        if not backward:
            return logp.detach(), entropy.detach()
        return with_gradients((logp * x["coefficient"]).sum(), [x["logits"]])

    def ours(x: Inputs) -> tuple[Tensor, ...]:
        found = token_logprob(x["logits"], x["target"], return_entropy=True, inplace_backward=True)
        assert found.entropy is not None
        return finish(x, found.logp, found.entropy)

    def eager(x: Inputs) -> tuple[Tensor, ...]:
        logp = torch.log_softmax(x["logits"].float(), 1)
        return finish(x, logp.gather(1, x["target"][:, None])[:, 0], -(logp.exp() * logp).sum(1))

    def trl(x: Inputs) -> tuple[Tensor, ...]:
        from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

        return finish(x, *selective_log_softmax_and_entropy(x["logits"], x["target"]))

    passes = 3 if backward else 1  # read; read and write
    return Case(
        name=f"token_logprob/{'forward+backward in place' if backward else 'forward with entropy'}",
        op="token_logprob", shape={"N": n, "V": v}, make=make, ours=ours,
        peers={"torch": eager, "trl": trl if installed("trl", gpu=True) else None},
        bytes=float(passes * n * v * dtype.itemsize), dtype=dtype,
        reset=(lambda x: x["logits"].detach().copy_(x["source"])) if backward else None,
    )  # fmt: skip
