"""Heads whose weight is split over processes, as with FSDP2 or tensor parallelism; as DTensors or plain shards.

``linear_logprob`` with DTensors is implemented here. Its behaviour depends on the hidden states:

- **Plain hidden states, DTensor weight** (an FSDP2 parameter outside its module's forward): each rank has its own rows.
  The weight is gathered for the call; its gradient is the mean over the ranks, as for any other FSDP2 parameter (which
  is also correct if all ranks hold the same rows).
- **DTensor hidden states**: values and gradients are those of the global tensors. Rows may be sharded (the weight's
  gradient is then a sum over ranks). A weight sharded over the vocabulary along a mesh dimension that does not shard
  the rows is not moved: each rank computes the statistics of its slice, and one all-gather of two numbers per row and
  one per target gives the result. Any other placement is redistributed to one of these.

With the log-sum-exp ``l_r``, entropy ``H_r`` and target log-prob within shard r, ``l = log sum_r exp(l_r)`` and
``p_r = exp(l_r - l)``:

    logp = logp_r + (l_r - l)  (r: the target's shard),      H = sum_r p_r (H_r - log p_r)

The gradient of a shard needs ``l`` and ``H`` only, and is computed by the unsharded backward; that of the hidden states
is the sum over shards (an all-reduce of [N, H] in the backward, as in every tensor-parallel layer).

``vocab_parallel_logprob`` is the same for plain shards and a process group (Megatron). Importing this module also
registers sharding rules for the library's other row-wise operators.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from fastrl_kernels._common import check, check_shape
from fastrl_kernels._linear_logprob_driver import accumulator_dtype
from fastrl_kernels.linear_logprob import HeadOptions, autocast_pair, linear_logprob
from fastrl_kernels.token_logprob import LogProb, check_targets, flat_rows, row_temperature

__all__ = ["sharded_linear_logprob", "vocab_parallel_logprob"]

_IGNORED = -100  # ignore_index of local targets, independent of the caller's
_OTHERS_TARGET = 0  # placeholder in the forward for a target that another shard holds; its result is not used


class _VocabParallel(torch.autograd.Function):
    """(logp, entropy) over all shards, from this rank's shard; ``options``: the operator's non-tensor arguments."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        local: Tensor,  # [N] or [N, K] row of a target in this shard, -1 if another shard holds it, or _IGNORED
        temperature: Tensor | None,
        rows: Tensor | None,
        group: Any,
        reduce_hidden: bool,
        options: tuple[float, float, float | None, bool, bool, int],
    ) -> tuple[Tensor, Tensor]:
        value, lora_scale, softcap, return_entropy, skip_zero_rows, scratch = options
        kind = accumulator_dtype(hidden.dtype)
        targets = _columns(local)
        lines = 2 + targets.shape[1]  # lse, entropy, logp of each target
        mine = torch.zeros((lines, len(local)), dtype=kind, device=hidden.device)
        if weight.shape[0]:
            at = local.masked_fill(local == -1, _OTHERS_TARGET)
            logp, entropy, lse, _ = torch.ops.fastrl.linear_logprob(
                hidden, weight, at, bias, temperature, lora_a, lora_b, None, value, lora_scale, softcap, _IGNORED,
                return_entropy, skip_zero_rows, scratch,
            )  # fmt: skip
            mine[0], mine[2:] = lse, _columns(logp).T
            if return_entropy:
                mine[1] = entropy
            mine[2:].masked_fill_(targets.T == -1, math.nan)
        else:
            mine[0], mine[2:] = -math.inf, math.nan
        logp, entropy, lse = _merge(_all_gather(mine, group), targets.T == _IGNORED)
        logp = logp.T.reshape(local.shape)
        if not return_entropy:
            entropy = entropy.new_zeros(0)
        ctx.save_for_backward(hidden, weight, bias, lora_a, lora_b, local, temperature, rows, logp, entropy, lse)
        ctx.group, ctx.reduce_hidden, ctx.options = group, reduce_hidden, options
        ctx.set_materialize_grads(False)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> Any:  # type: ignore[override]
        hidden, weight, bias, lora_a, lora_b, local, temperature, rows, logp, entropy, lse = ctx.saved_tensors
        value, lora_scale, softcap, return_entropy, skip_zero_rows, scratch = ctx.options
        needs = list(ctx.needs_input_grad[:5])
        grads: list[Tensor | None] = [None] * 5
        if not return_entropy:
            grad_entropy = None
        if grad_logp is not None or grad_entropy is not None:
            if weight.shape[0]:
                elsewhere = weight.shape[0]  # an index outside this shard
                made = torch.ops.fastrl.linear_logprob_backward(
                    grad_logp, grad_entropy, hidden, weight, local.masked_fill(local == -1, elsewhere), bias,
                    temperature, lora_a, lora_b, rows, logp, entropy if return_entropy else None, lse, value,
                    lora_scale, softcap, _IGNORED, skip_zero_rows, scratch, needs,
                )  # fmt: skip
            else:
                sources = zip((hidden, weight, bias, lora_a, lora_b), needs, strict=True)
                made = [torch.zeros_like(source) for source, needed in sources if needed]
            found = iter(made)
            grads = [next(found) if needed else None for needed in needs]
            if ctx.reduce_hidden:
                for grad in (grads[0], grads[3]):  # gradients with a part from every shard
                    if grad is not None:
                        dist.all_reduce(grad, group=ctx.group)
        return *grads, *[None] * 6


def _all_gather(mine: Tensor, group: Any) -> Tensor:
    """[W, ...] from [...] of each rank."""
    out = mine.new_empty((dist.get_world_size(group), *mine.shape))
    dist.all_gather(list(out.unbind()), mine.contiguous(), group=group)
    return out


def _columns(target: Tensor) -> Tensor:
    """[N, K] of [N, K] or [N]."""
    return target if target.dim() > 1 else target[:, None]


def _merge(shards: Tensor, ignored: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logp [K, N], entropy and lse [N] of the whole from each shard's lse, entropy and logp (NaN: that target is not
    here) [W, 2 + K, N]; ``ignored`` [K, N]."""
    lse, entropy, logp = shards[:, 0], shards[:, 1], shards[:, 2:]
    top, best = lse.max(0)
    behind = (lse - top).exp()
    rest = behind.scatter(0, best[None], 0).sum(0)  # mass of the other shards relative to the largest
    total = top + rest.log1p()
    # l_r - l, exact even if one shard holds nearly all of the mass
    log_fraction = (
        torch.where(torch.arange(len(lse), device=lse.device)[:, None] == best, 0.0, lse - top) - rest.log1p()
    )
    held = ~logp.isnan()
    chosen = torch.where(held, logp + log_fraction[:, None], 0.0).sum(0)
    chosen = torch.where(held.any(0), chosen, math.nan)  # a target in no shard, or NaN itself
    mass = log_fraction.exp()
    mixed = torch.where(mass > 0, mass * (entropy - log_fraction), 0.0).sum(0)
    nothing = ignored.all(0)
    return chosen.masked_fill(ignored, 0), mixed.masked_fill(nothing, 0), total.masked_fill(nothing, 0)


def vocab_parallel_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    group: Any = None,
    first: int | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = -100,
    return_entropy: bool = False,
    rows: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    reduce_hidden: bool = True,
    skip_zero_rows: bool = False,
    scratch_bytes: int = 1 << 30,
) -> LogProb:
    """``linear_logprob`` of a head whose vocabulary is split over the processes of ``group``, in order of their ranks.

    All processes of the group must call it with the same rows. The forward all-gathers two numbers per row and one per
    target.

    Args:
        hidden: [N, H], or [B, T, H] with ``target`` [B, T], the same on every process.
        weight: [V / W, H], this process's slice of the head. It may be empty.
        target: [N] int64 or int32, of the whole vocabulary, or [N, K] (``[B, T, K]``), several ids a row. One that no
            slice holds (and is not ``ignore_index``) raises on a CPU and gives NaN on a GPU.
        group: the process group; None: the default one.
        first: token id of the slice's first row. Default: computed for slices of equal length.
        bias, lora: this process's slice of the bias, and of LoRA's B; LoRA's A is not sliced.
        reduce_hidden: sum the gradients of ``hidden`` and LoRA's A over the group, so that they are complete on each
            process. False: each process has its slice's part, to be summed later (as Megatron's layers do).
        temperature, softcap, ignore_index, return_entropy, rows, skip_zero_rows, scratch_bytes: as ``linear_logprob``.

    Returns:
        ``LogProb(logp like target, entropy [N] | None)``, the same on every process.
    """
    shape, batch = target.shape, hidden.shape[:-1]
    hidden, target, temperature = flat_rows("hidden", hidden, target, temperature)
    hidden, weight = autocast_pair(hidden, weight)
    check_shape("weight", weight, (None, hidden.shape[1]))
    check_targets(target, hidden.shape[0])
    check(weight.dtype == hidden.dtype, f"weight: expected {hidden.dtype} as hidden, got {weight.dtype}")
    held = weight.shape[0]
    start = dist.get_rank(group) * held if first is None else first
    local = torch.where((target >= start) & (target < start + held), target - start, -1)
    if ignore_index is not None:
        local = local.masked_fill(target == ignore_index, _IGNORED)
    per_row, value = row_temperature(temperature, target)
    lora_a, lora_b, lora_scale = (None, None, 1.0) if lora is None else lora
    options = (value, float(lora_scale), None if softcap is None else float(softcap))
    logp, entropy = _VocabParallel.apply(
        hidden, weight, bias, lora_a, lora_b, local, per_row, rows, group, reduce_hidden,
        (*options, return_entropy, skip_zero_rows, scratch_bytes),
    )  # fmt: skip
    if target.device.type == "cpu":
        lost = torch.zeros_like(local)
        lost[local != -1] = 1
        dist.all_reduce(lost, group=group)
        if bool((lost == 0).any()):
            at = (lost == 0).nonzero()[0].tolist()
            raise ValueError(f"target: row {at[0]} is {int(target[*at])}, which no slice of the vocabulary holds")
    return LogProb(logp.view(shape), entropy.view(batch) if return_entropy else None)


def sharded_linear_logprob(hidden: Tensor, weight: Tensor, target: Tensor, **options: Any) -> LogProb:
    """``linear_logprob`` where ``hidden`` or ``weight`` is a DTensor; see the top of this file.

    Returns:
        Plain tensors for plain ``hidden``; for a DTensor, DTensors with the same placement of rows.

    Raises:
        ValueError: tensors are on different meshes, or ``rows`` is given with sharded rows.
    """
    o = HeadOptions(**options)
    if isinstance(hidden, DTensor):
        return _Global(hidden, weight).call(target, o)
    lora = None if o.lora is None else (_gathered(o.lora[0]), _gathered(o.lora[1]), o.lora[2])
    o = o._replace(bias=_gathered(o.bias), lora=lora)
    return linear_logprob(hidden, _gathered(weight), target, **o._asdict())


class _Global:
    """A call on global tensors: chooses placements and calls the local operator."""

    def __init__(self, hidden: DTensor, weight: Tensor) -> None:
        self.mesh, self.hidden, self.weight = hidden.device_mesh, hidden, weight
        placements = weight.placements if isinstance(weight, DTensor) else (Replicate(),) * self.mesh.ndim
        check(not isinstance(weight, DTensor) or weight.device_mesh == self.mesh, "weight: not on the mesh of hidden")
        # per mesh dimension: sharded rows stay sharded
        self.rows: list[Placement] = [Shard(0) if p.is_shard(0) else Replicate() for p in hidden.placements]
        split = [d for d, p in enumerate(placements) if p.is_shard(0) and not self.rows[d].is_shard()]
        self.split = split[-1] if split else None  # the dimension over which the vocabulary stays split
        self.whole: list[Placement] = [Replicate()] * self.mesh.ndim
        self.vocabulary = list(self.whole)
        if self.split is not None:
            self.vocabulary[self.split] = Shard(0)

    def call(self, target: Tensor, options: HeadOptions) -> LogProb:
        check_shape("target", target, (self.hidden.shape[0], *[None] * (target.dim() > 1)))
        shards_rows = any(p.is_shard() for p in self.rows)
        check(options.rows is None or not shards_rows, "rows: not supported with rows that are sharded over processes")
        lora, temperature = options.lora, options.temperature
        if lora is not None:
            lora = (self._local(lora[0], self.whole, "a"), self._local(lora[1], self.vocabulary, "v"), lora[2])
        if isinstance(temperature, Tensor):
            temperature = self._local(temperature, self.rows if temperature.ndim else self.whole, "rows")
        tensors = (
            self._local(self.hidden, self.rows, "hidden"),
            self._local(self.weight, self.vocabulary, "v"),
            self._local(target, self.rows, "rows"),
        )
        bias, rows = self._local(options.bias, self.vocabulary, "v"), self._local(options.rows, self.whole, "rows")
        local = options._replace(bias=bias, lora=lora, temperature=temperature, rows=rows)._asdict()
        if self.split is None:
            out = linear_logprob(*tensors, **local)
        else:
            group, rank = self.mesh.get_group(self.split), self.mesh.get_local_rank(self.split)
            first = min(rank * -(-self.weight.shape[0] // self.mesh.size(self.split)), self.weight.shape[0])
            out = vocab_parallel_logprob(*tensors, group=group, first=first, reduce_hidden=False, **local)
        made = [None if x is None else DTensor.from_local(x, self.mesh, self.rows, run_check=False) for x in out]
        return LogProb(*made)  # type: ignore[arg-type]

    def _local(self, tensor: Tensor | None, placements: list[Placement], kind: str) -> Any:
        """This rank's part of a tensor with these placements; a plain tensor is assumed to be equal on all ranks.

        Its gradient consists of parts to be summed along mesh dimensions that depend on ``kind``: hidden states get a
        part from every slice of the vocabulary, a slice of the vocabulary from every shard of the rows, LoRA's A from
        both.
        """
        if tensor is None:
            return None
        if not isinstance(tensor, DTensor):
            tensor = DTensor.from_local(tensor, self.mesh, self.whole, run_check=False)
        check(tensor.device_mesh == self.mesh, "all DTensors of a call must be on the same mesh")
        summed = set()
        if kind in ("hidden", "a") and self.split is not None:
            summed.add(self.split)
        if kind in ("v", "a"):
            summed |= {d for d, p in enumerate(self.rows) if p.is_shard()}
        grads = [Partial() if d in summed else p for d, p in enumerate(placements)]
        return tensor.redistribute(self.mesh, placements).to_local(grad_placements=grads)


class _Gather(torch.autograd.Function):
    """A DTensor as one plain tensor; the gradient is the mean over the mesh, in the DTensor's placement."""

    @staticmethod
    def forward(ctx: Any, sharded: DTensor) -> Tensor:
        ctx.mesh, ctx.placements = sharded.device_mesh, sharded.placements
        return sharded.full_tensor()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        parts = DTensor.from_local(grad / ctx.mesh.size(), ctx.mesh, [Partial()] * ctx.mesh.ndim, run_check=False)
        return parts.redistribute(ctx.mesh, ctx.placements)


def _gathered(tensor: Tensor | None) -> Any:
    return _Gather.apply(tensor) if isinstance(tensor, DTensor) else tensor


def _register(operator: Any, *, rows: bool) -> None:
    """Sharding rules of an operator: everything replicated, and with ``rows`` all but class weights sharded by rows."""

    names = [argument.name for argument in operator._schema.arguments]

    @register_sharding(operator)
    def _(*args: Any, **kwargs: Any) -> list[Any]:
        results = len(operator._schema.returns)
        kinds: list[type[Placement]] = [Replicate, Shard] if rows else [Replicate]
        found = []
        for kind in kinds:
            placed = Shard(0) if kind is Shard else Replicate()
            given = [
                (Replicate() if name == "class_weight" else placed) if hasattr(arg, "tensor_meta") else None
                for name, arg in zip(names, args, strict=False)
            ]
            found.append(([placed] * results, given))
        return found


_register(torch.ops.fastrl.token_logprob.default, rows=True)
_register(torch.ops.fastrl.token_logprob_backward.default, rows=True)
_register(torch.ops.fastrl.listwise_loss.default, rows=True)
_register(torch.ops.fastrl.policy_loss.default, rows=False)
_register(torch.ops.fastrl.unlikelihood_loss.default, rows=False)
_register(torch.ops.fastrl.group_advantage.default, rows=False)
