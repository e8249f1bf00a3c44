"""Count bytes and floating-point operations of code that runs on the meta device, without computing anything.

The model's own forward and backward run on tensors without data; every storage is counted when it is created and freed,
as an allocator would see it. Temporary allocations inside operators are added from the formulas next to the operators
(``fastrl_kernels._counting``). Attention has no meta kernel, so it is replaced by stand-ins that save the same tensors
for the backward.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastrl.models.attention import prefix as prefix_attention
from fastrl.models.attention.switch import attention, register
from fastrl.models.families import family_of
from fastrl.models.flops import flop_counter, segment_attention_flops
from fastrl.models.fused import fused
from fastrl.plan.traffic import traffic
from fastrl_kernels._counting import Scratch, flops_of, named_arguments, scratch, scratch_of
from fastrl_kernels.prefix_attention import gathered_attention

GROUPED = getattr(torch.ops.aten._grouped_mm, "default", None) if hasattr(torch.ops.aten, "_grouped_mm") else None
CPU_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
GPU = "fastrl_plan_prefix", "fastrl_plan_flash_vision"  # attention of the language model and of the vision tower
CPU = "fastrl_plan_cpu_prefix", "fastrl_plan_cpu_flash_vision"


class Ledger(TorchDispatchMode):
    """Counts, while active, the bytes of live meta tensors and the FLOPs of all calls.

    Args:
        known: existing tensors, which are not counted.
        gpu: count as on a GPU (variable-length attention, the operators' Triton path), otherwise as on a CPU.

    ``head_scratch`` is the largest allocation of an operator with its own memory budget, ``attention_flops`` the part
    of ``flops`` that is proportional to queries times keys. ``traffic`` is the bytes read and written by operators
    without FLOPs: those of products are hidden behind their arithmetic.
    """

    def __init__(self, known: Iterable[Tensor], *, gpu: bool) -> None:
        super().__init__()
        self.gpu = gpu
        self.live = 0
        self.peak = 0
        self.head_scratch = 0
        self.flops = self.attention_flops = self.traffic = 0
        self._formulas = flop_counter().flop_registry  # the counter itself would keep tensors alive
        self._storages: dict[int, Any] = {}
        self._known = {id_of(t): t.untyped_storage() for t in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = _grouped_mm(**named_arguments(func, args, kwargs)) if func is GROUPED else func(*args, **kwargs)
        formula = self._formulas.get(func._overloadpacket)
        if formula is None:
            self.traffic += traffic(func, args, kwargs, out)
        else:
            done = formula(*args, **kwargs, out_val=out)
            self.flops += done
            self.attention_flops += done if func._overloadpacket in ATTENTION else 0
        for leaf in out if isinstance(out, tuple | list) else (out,):
            if isinstance(leaf, Tensor) and leaf.is_meta:
                self._see(leaf)
        inside = scratch(func, args, kwargs, triton=self.gpu)
        self.head_scratch = max(self.head_scratch, inside.bounded)
        self.transient(sum(inside))
        return out

    def transient(self, size: int) -> None:
        """Record a temporary allocation of ``size`` bytes."""
        self.peak = max(self.peak, self.live + size)

    def _see(self, tensor: Tensor) -> None:
        key = id_of(tensor)
        if key in self._storages or key in self._known:
            return
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)

        def gone(_: Any) -> None:
            del self._storages[key]
            self.live -= size

        self._storages[key] = weakref.ref(storage, gone)


def _grouped_mm(*, mat2: Tensor, offs: Tensor | None, **named: Any) -> Tensor:
    """Grouped products of experts without data; torch's meta kernel only accepts bfloat16."""
    a: Tensor = named["self"]
    rows, columns = a.shape[-2], mat2.shape[-1]
    if a.dim() == mat2.dim() == 2:  # groups lie along the reduced dimension
        assert offs is not None
        return a.new_empty(len(offs), rows, columns)
    return a.new_empty(rows, columns) if a.dim() == 2 or mat2.dim() == 2 else a.new_empty(len(a), rows, columns)


def id_of(tensor: Tensor) -> int:
    """Identifier of a tensor's storage, unique while it is alive."""
    return tensor.untyped_storage()._cdata


@torch.library.custom_op("fastrl::planned_attention", mutates_args=())
def _planned_attention(q: Tensor, k: Tensor, v: Tensor, flops: int) -> tuple[Tensor, Tensor]:
    """Stand-in for flash attention: q [..., D] of all query heads, k and v of the key heads → out like q, lse [...]."""
    raise NotImplementedError("planned attention only runs on the meta device")


@_planned_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, flops: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("fastrl::planned_attention_backward", mutates_args=())
def _planned_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, flops: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    raise NotImplementedError("planned attention only runs on the meta device")


@_planned_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, flops: int
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


ATTENTION = {torch.ops.fastrl.planned_attention, torch.ops.fastrl.planned_attention_backward, CPU_FLASH}


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.flops = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor, _: Any) -> Any:
    return *_planned_backward(grad.contiguous(), *ctx.saved_tensors, ctx.flops), None


_planned_attention.register_autograd(_differentiate, setup_context=_keep)


@flops_of(torch.ops.fastrl.planned_attention)
def _(*, flops: int, **_: Any) -> int:
    return flops


@flops_of(torch.ops.fastrl.planned_attention_backward)
def _(*, flops: int, **_: Any) -> int:
    return flops * 5 // 2  # five products instead of two, as torch counts


@scratch_of(torch.ops.fastrl.planned_attention_backward)
def _(*, q: Tensor, **_: Any) -> Scratch:
    return Scratch(beside=torch.float32.itemsize * q.numel())  # the gradient of q is accumulated in float32


@cache
def _register() -> None:
    register(**dict(zip(GPU, (_language_attention, _vision_attention), strict=True)))
    real = prefix_attention.language_attention, prefix_attention.vision_attention
    register(**{name: _on_cpu(function) for name, function in zip(CPU, real, strict=True)})


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an attention function to use the CPU's scaled-dot-product attention. The mode is entered in each call, as
    recomputation in a checkpoint does not see modes that were entered around the backward."""

    def attend(*args: Any, **kwargs: Any) -> Any:
        with CpuAttention():
            return function(*args, **kwargs)

    return attend


def _language_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    segments, answers, keep = kwargs.get("fastrl_segments"), kwargs.get("fastrl_answers"), kwargs.get("fastrl_keep")
    if answers is not None:
        rows = answers.rows
        lengths = [(n, s.prompt + n) for s, own in zip(rows.spans, rows.lengths, strict=True) for n in own]
    else:
        assert segments is not None
        lengths = [
            (n, k)
            for s in segments.spans
            for n, k in [(s.prompt, s.prompt), *((c, s.prompt + c) for c in s.completions)]
        ]
    _, heads, _, dim = query.shape
    flops = segment_attention_flops(lengths, heads, dim)

    def call(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
        return _planned_attention(q, k, v, flops)[0]

    scale = kwargs.get("scaling")
    if answers is not None:
        return prefix_attention.answer_attention(query, key, value, answers, module.layer_idx, call, scale=scale), None
    assert segments is not None
    if keep is not None:
        keep.put(module.layer_idx, key, value)
    row = prefix_attention.packed_row(query, key, value, segments.length)
    return gathered_attention(*row, segments.varlen, call, scale=scale)[None], None


def _vision_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    cu = kwargs.get("cu_seq_lens_q")
    batch, heads, length, dim = query.shape
    if cu is None:  # equal images: [B, H, L, D]
        flops = segment_attention_flops([(length, length)] * batch, heads, dim)
        q, k, v = (x.transpose(1, 2).reshape(-1, heads, dim) for x in (query, key, value))
        return _planned_attention(q, k, v, flops)[0].view(batch, length, heads, dim), None
    flops = segment_attention_flops([(n, n) for n in (cu[1:] - cu[:-1]).tolist()], heads, dim)
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    return _planned_attention(q, k, v, flops)[0][None], None


class CpuAttention(TorchFunctionMode):
    """Runs scaled-dot-product attention on the meta device through the CPU's flash operator; torch would choose the
    plain product there, which stores scores that the CPU's does not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or not args[0].is_meta:
            return func(*args, **kwargs)
        query, key, value, *_ = args
        mask = kwargs.get("attn_mask")
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), -torch.inf)
        return CPU_FLASH(
            query, key, value, 0.0, kwargs.get("is_causal", False), attn_mask=mask, scale=kwargs.get("scale")
        )[0]


class GpuAttention(TorchFunctionMode):
    """Counts scaled-dot-product attention on the meta device as a GPU's flash attention."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention or not args[0].is_meta:
            return func(*args, **(kwargs or {}))
        query, key, value, *_ = args
        batch, heads, length, dim = query.shape
        flops = segment_attention_flops([(length, key.shape[2])] * batch, heads, dim)
        return _planned_attention(query, key, value, flops)[0]


@contextmanager
def planned_attention(core: Any, *, gpu: bool) -> Iterator[None]:
    """In a block, count a meta model as on a GPU (variable-length attention, fused pointwise layers) or as on a CPU."""
    _register()
    language, vision = GPU if gpu else CPU
    with (
        attention(family_of(core.config), core, language=language, vision=vision),
        fused(core) if gpu else nullcontext(),
    ):
        yield
