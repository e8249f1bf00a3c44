"""One of two processes of ``test_sharding.py``: every check against the unsharded computation, its outcome to a file.

Run as ``python sharded_worker.py RANK FOLDER``; writes ``FOLDER/RANK.json``: name of the check → "" or what went wrong.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from fastrl_kernels import (
    group_advantage,
    linear_logprob,
    listwise_loss,
    policy_loss,
    token_logprob,
    unlikelihood_loss,
)
from fastrl_kernels.sharding import vocab_parallel_logprob

ROWS, SIZE = 10, 6
CHECKS: dict[str, Callable[[DeviceMesh], None]] = {}


def check(function: Callable[[DeviceMesh], None]) -> Callable[[DeviceMesh], None]:
    CHECKS[function.__name__] = function
    return function


def inputs(vocabulary: int = 31, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(seed)
    target = torch.randint(vocabulary, (ROWS,), generator=rng)
    target[3] = -100
    made = {
        "hidden": torch.randn(ROWS, SIZE, generator=rng),
        "weight": torch.randn(vocabulary, SIZE, generator=rng),
        "bias": torch.randn(vocabulary, generator=rng),
        "a": torch.randn(2, SIZE, generator=rng),
        "b": torch.randn(vocabulary, 2, generator=rng),
        "g": torch.randn(ROWS, generator=rng),
        "h": torch.randn(ROWS, generator=rng),
    }
    return {name: value.to(dtype) for name, value in made.items()} | {"target": target}


OPTIONS: dict[str, Any] = {"temperature": 0.7, "softcap": 3.0, "return_entropy": True}


def unsharded(data: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """Results and gradients of the plain call."""
    leaves = {name: data[name].clone().requires_grad_() for name in ("hidden", "weight", "bias", "a", "b")}
    out = linear_logprob(
        leaves["hidden"], leaves["weight"], data["target"], bias=leaves["bias"], lora=(leaves["a"], leaves["b"], 0.5),
        **options,
    )  # fmt: skip
    ((out.logp * data["g"]).sum() + (out.entropy * data["h"]).sum()).backward()
    return {"logp": out.logp, "entropy": out.entropy} | {name: leaf.grad for name, leaf in leaves.items()}


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], near: float = 1e-5) -> None:
    for name, value in expected.items():
        mine = full(found[name]).to(value.dtype)
        torch.testing.assert_close(mine, value, rtol=near, atol=near, msg=lambda m, n=name: f"{n}: {m}")


def of_dtensors(
    mesh: DeviceMesh, data: dict[str, Any], placed: Any, vocabulary: Any, /, **options: Any
) -> dict[str, Tensor]:
    """The call with hidden states and head placed so, and everything's gradient."""
    places = {"hidden": placed, "weight": vocabulary, "bias": vocabulary, "a": Replicate(), "b": vocabulary}
    leaves = {n: distribute_tensor(data[n], mesh, [p]).requires_grad_() for n, p in places.items()}
    target = distribute_tensor(data["target"], mesh, [placed if placed.is_shard(0) else Replicate()])
    out = linear_logprob(
        leaves["hidden"], leaves["weight"], target, bias=leaves["bias"], lora=(leaves["a"], leaves["b"], 0.5), **options
    )
    assert isinstance(out.logp, DTensor)
    g, h = (distribute_tensor(data[n], mesh, out.logp.placements) for n in ("g", "h"))
    ((out.logp * g).sum() + (out.entropy * h).sum()).backward()
    for name, leaf in leaves.items():
        assert leaf.grad.placements == leaf.placements or leaf.grad.placements[0].is_partial(), name
    return {"logp": out.logp, "entropy": out.entropy} | {name: leaf.grad for name, leaf in leaves.items()}


for _rows in (Replicate(), Shard(0), Shard(1)):
    for _vocabulary in (Replicate(), Shard(0)):

        def _one(mesh: DeviceMesh, rows: Any = _rows, vocabulary: Any = _vocabulary) -> None:
            for size, dtype in ((31, torch.float32), (8, torch.float64), (1, torch.float64), (64, torch.float32)):
                data = inputs(size, dtype)
                compare(of_dtensors(mesh, data, rows, vocabulary, **OPTIONS), unsharded(data, **OPTIONS))

        CHECKS[f"dtensors, hidden {_rows}, head {_vocabulary}"] = _one


@check
def head_sharded_along_the_hidden_size(mesh: DeviceMesh) -> None:
    data = inputs()
    hidden = distribute_tensor(data["hidden"], mesh, [Shard(1)]).requires_grad_()
    weight = distribute_tensor(data["weight"], mesh, [Shard(1)]).requires_grad_()
    out = linear_logprob(hidden, weight, data["target"])  # a plain target is everybody's
    plain = linear_logprob(data["hidden"], data["weight"], data["target"])
    compare({"logp": out.logp}, {"logp": plain.logp})


@check
def only_what_needs_a_gradient_has_one(mesh: DeviceMesh) -> None:
    data = inputs()
    hidden = distribute_tensor(data["hidden"], mesh, [Replicate()]).requires_grad_()
    weight = distribute_tensor(data["weight"], mesh, [Shard(0)])
    linear_logprob(hidden, weight, data["target"]).logp.sum().backward()
    h = data["hidden"].clone().requires_grad_()
    linear_logprob(h, data["weight"], data["target"]).logp.sum().backward()
    compare({"hidden": hidden.grad}, {"hidden": h.grad})


@check
def partial_hidden_states(mesh: DeviceMesh) -> None:
    """As a row-parallel layer leaves them."""
    data = inputs()
    part = data["hidden"] / 2
    hidden = DTensor.from_local(part, mesh, [Partial()], run_check=False)
    weight = distribute_tensor(data["weight"], mesh, [Shard(0)])
    out = linear_logprob(hidden, weight, data["target"], return_entropy=True)
    plain = linear_logprob(data["hidden"], data["weight"], data["target"], return_entropy=True)
    compare({"logp": out.logp, "entropy": out.entropy}, {"logp": plain.logp, "entropy": plain.entropy})


@check
def extreme_logits(mesh: DeviceMesh) -> None:
    """One token with all the mass, in each of the shards; slices that are forbidden altogether."""
    for winner in (0, 30):
        data = inputs(dtype=torch.float64)
        data["bias"][winner] += 80
        data["bias"][8:12] = -torch.inf
        data["bias"][16:] = -torch.inf if winner == 0 else data["bias"][16:]
        data["target"][:3] = winner
        data["target"][4:] = winner
        expected = unsharded(data, return_entropy=True)
        compare(of_dtensors(mesh, data, Replicate(), Shard(0), return_entropy=True), expected)
        single = {n: v.float() if v.is_floating_point() else v for n, v in data.items()}
        found = of_dtensors(mesh, single, Replicate(), Shard(0), return_entropy=True)
        compare(found, expected, near=2e-5)


@check
def rows_and_temperatures(mesh: DeviceMesh) -> None:
    data = inputs()
    temperature = 0.5 + torch.rand(ROWS, generator=torch.Generator().manual_seed(2))
    options: dict[str, Any] = {"return_entropy": True, "temperature": temperature, "rows": torch.tensor([0, 2, 3, 7])}
    compare(of_dtensors(mesh, data, Replicate(), Shard(0), **options), unsharded(data, **options))
    del options["rows"]
    compare(of_dtensors(mesh, data, Shard(0), Shard(0), **options), unsharded(data, **options))


@check
def plain_shards_and_a_group(mesh: DeviceMesh) -> None:
    """Megatron's form, with slices of unequal length; one of them empty."""
    rank = dist.get_rank()
    for cut in (20, 31, 0):
        data = inputs(31)
        part = slice(0, cut) if rank == 0 else slice(cut, 31)
        leaves = {n: data[n].clone().requires_grad_() for n in ("hidden", "a")}
        leaves |= {n: data[n][part].clone().requires_grad_() for n in ("weight", "bias", "b")}
        out = vocab_parallel_logprob(
            leaves["hidden"], leaves["weight"], data["target"], first=part.start, bias=leaves["bias"],
            lora=(leaves["a"], leaves["b"], 0.5), **OPTIONS,
        )  # fmt: skip
        ((out.logp * data["g"]).sum() + (out.entropy * data["h"]).sum()).backward()
        expected = unsharded(data, **OPTIONS)
        found = {n: leaf.grad for n, leaf in leaves.items()} | {"logp": out.logp, "entropy": out.entropy}
        compare(found, expected | {n: expected[n][part] for n in ("weight", "bias", "b")})


@check
def several_targets_a_row(mesh: DeviceMesh) -> None:
    """In different slices, repeated, ignored; rows of batches; a slice without rows."""
    rank, data = dist.get_rank(), inputs()
    target = torch.randint(31, (ROWS, 3), generator=torch.Generator().manual_seed(5))
    target[0], target[1, ::2], target[2] = 7, -100, -100
    data |= {"target": target, "g": torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(6))}
    expected = unsharded(data, **OPTIONS)
    for rows in (Replicate(), Shard(0)):
        compare(of_dtensors(mesh, data, rows, Shard(0), **OPTIONS), expected)
    for cut in (20, 31):
        part = slice(0, cut) if rank == 0 else slice(cut, 31)
        leaves = {n: data[n].clone().requires_grad_() for n in ("hidden", "a")}
        leaves |= {n: data[n][part].clone().requires_grad_() for n in ("weight", "bias", "b")}
        out = vocab_parallel_logprob(
            leaves["hidden"].view(2, 5, SIZE), leaves["weight"], target.view(2, 5, 3).int(), first=part.start,
            bias=leaves["bias"], lora=(leaves["a"], leaves["b"], 0.5), **OPTIONS,
        )  # fmt: skip
        logp, entropy = out.logp.view(ROWS, 3), out.entropy.view(ROWS)
        ((logp * data["g"]).sum() + (entropy * data["h"]).sum()).backward()
        found = {n: leaf.grad for n, leaf in leaves.items()} | {"logp": logp, "entropy": entropy}
        compare(found, expected | {n: expected[n][part] for n in ("weight", "bias", "b")})
    target[4, 1] = 31
    with pytest.raises(ValueError, match="target: row 4 is 31, which no slice"):
        vocab_parallel_logprob(data["hidden"], data["weight"][part], target, first=part.start)


@check
def megatron_sums_later(mesh: DeviceMesh) -> None:
    data, rank = inputs(32), dist.get_rank()
    hidden = data["hidden"].clone().requires_grad_()
    weight = data["weight"][16 * rank : 16 * (rank + 1)]  # equal slices need no ``first``
    vocab_parallel_logprob(hidden, weight, data["target"], reduce_hidden=False).logp.sum().backward()
    total = hidden.grad.clone()
    dist.all_reduce(total)
    plain = data["hidden"].clone().requires_grad_()
    linear_logprob(plain, data["weight"], data["target"]).logp.sum().backward()
    compare({"hidden": total}, {"hidden": plain.grad})
    assert not torch.allclose(hidden.grad, plain.grad)


@check
def verl_with_a_group(mesh: DeviceMesh) -> None:
    from fastrl_kernels.integrations.verl import linear_cross_entropy

    data, rank = inputs(32), dist.get_rank()
    weight = data["weight"][16 * rank : 16 * (rank + 1)]
    target = data["target"].clamp(min=0)
    logp, entropy = linear_cross_entropy(data["hidden"], weight, target, 0.8, "none", dist.group.WORLD)
    plain = linear_logprob(data["hidden"], data["weight"], target, temperature=0.8, return_entropy=True)
    compare({"logp": logp, "entropy": entropy}, {"logp": plain.logp, "entropy": plain.entropy})


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.body, self.head = nn.Linear(5, SIZE), nn.Linear(SIZE, 31)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).tanh()


@check
def fsdp2_head_outside_its_forward(mesh: DeviceMesh) -> None:
    """Each rank its own rows, the head read as a sharded parameter: the gradients of one process with all rows."""
    rng = torch.Generator().manual_seed(1)
    x, target = torch.randn(2, ROWS, 5, generator=rng), torch.randint(31, (2, ROWS), generator=rng)
    plain = Model()
    losses = [
        -linear_logprob(plain(x[r]), plain.head.weight, target[r], bias=plain.head.bias).logp.mean() for r in (0, 1)
    ]
    (sum(losses) / 2).backward()
    sharded = Model()
    for module in (sharded.body, sharded.head):
        fully_shard(module, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    rank = dist.get_rank()
    weight = sharded.head.weight
    assert isinstance(weight, DTensor)
    out = linear_logprob(sharded(x[rank]), sharded.head.weight, target[rank], bias=sharded.head.bias)
    assert not isinstance(out.logp, DTensor)
    loss = -out.logp.mean()
    torch.testing.assert_close(loss, losses[rank])
    loss.backward()
    for (name, parameter), other in zip(sharded.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad.full_tensor(), other.grad, rtol=1e-5, atol=1e-6, msg=name)
    optimizer = torch.optim.SGD(sharded.parameters(), lr=0.1)
    optimizer.step()  # the gradients are where an optimizer looks for them
    moved = plain.head.weight.detach() - 0.1 * plain.head.weight.grad
    torch.testing.assert_close(sharded.head.weight.full_tensor(), moved, rtol=1e-5, atol=1e-6)


@check
def other_operators_have_rules(mesh: DeviceMesh) -> None:
    data = inputs()
    logits = data["hidden"] @ data["weight"].T
    for placement in (Shard(0), Replicate(), Shard(1)):
        given = distribute_tensor(logits, mesh, [placement]).requires_grad_()
        target = distribute_tensor(data["target"], mesh, [Replicate()])
        out = token_logprob(given, target, return_entropy=True)
        plain = logits.clone().requires_grad_()
        expected = token_logprob(plain, data["target"], return_entropy=True)
        compare({"logp": out.logp, "h": out.entropy}, {"logp": expected.logp, "h": expected.entropy})
        out.logp.sum().backward()
        expected.logp.sum().backward()
        compare({"grad": given.grad}, {"grad": plain.grad})
    logp = distribute_tensor(data["g"], mesh, [Shard(0)]).requires_grad_()
    whole = [distribute_tensor(x, mesh, [Replicate()]) for x in (torch.tensor([1.0, -1.0]), torch.arange(ROWS) % 2)]
    weight = distribute_tensor(torch.full((ROWS,), 0.1), mesh, [Shard(0)])
    found = policy_loss(logp, *whole, weight=weight)
    plain = data["g"].clone().requires_grad_()
    expected = policy_loss(plain, torch.tensor([1.0, -1.0]), torch.arange(ROWS) % 2, weight=torch.full((ROWS,), 0.1))
    found.loss.backward()
    expected.loss.backward()
    compare({"loss": found.loss, "grad": logp.grad}, {"loss": expected.loss, "grad": plain.grad})


@check
def lists_unlikelihood_and_groups(mesh: DeviceMesh) -> None:
    rng = torch.Generator().manual_seed(4)
    score, reward = torch.randn(6, 5, generator=rng), torch.randn(6, 5, generator=rng)
    for function, args in (
        (listwise_loss, (score, reward)),
        (unlikelihood_loss, (-score.flatten().abs() - 0.1, reward.flatten().sigmoid())),
    ):
        leaves = [args[0].clone().requires_grad_(), distribute_tensor(args[0], mesh, [Shard(0)]).requires_grad_()]
        out = [function(leaves[0], args[1]), function(leaves[1], distribute_tensor(args[1], mesh, [Shard(0)]))]
        for loss in out:
            loss.sum().backward()
        compare({"loss": out[1], "grad": leaves[1].grad}, {"loss": out[0], "grad": leaves[0].grad})
    sharded = distribute_tensor(reward.flatten()[:8], mesh, [Shard(0)])
    compare(group_advantage(sharded, 4)._asdict(), group_advantage(reward.flatten()[:8], 4)._asdict())


@check
def what_cannot_be_is_said(mesh: DeviceMesh) -> None:
    data = inputs()
    sharded = distribute_tensor(data["hidden"], mesh, [Shard(0)])
    weight = distribute_tensor(data["weight"], mesh, [Shard(0)])
    for call, message in (
        (lambda: linear_logprob(sharded, weight, data["target"], rows=torch.tensor([1])), "rows: not supported"),
        (lambda: linear_logprob(sharded, weight, data["target"][:4]), "target: expected"),
        (lambda: linear_logprob(
            distribute_tensor(data["hidden"], mesh, [Replicate()]), weight, data["target"] + 31), "which no slice"),
        (lambda: vocab_parallel_logprob(data["hidden"], data["weight"][:, :2], data["target"]), "weight: expected"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for name, function in CHECKS.items():
        try:
            function(mesh)
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
        (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
