"""Counting the floating-point operations of a step: torch's counter with formulas for what it does not know.

torch's counter sees neither CPU attention nor custom operators. The formulas here follow its convention: a
multiply-add is two operations, softmax and masks cost nothing, and causal attention counts in full.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

Shape = torch.Size


def flop_counter() -> FlopCounterMode:
    """A context manager that counts everything a policy does; read ``get_total_flops()`` or ``get_flop_counts()``."""
    import fastrl_kernels.decode_attention
    import fastrl_kernels.linear_logprob  # noqa: F401  registers the operators

    aten, fastrl = torch.ops.aten, torch.ops.fastrl
    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: _attention,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
            fastrl.decode_attention: _decode_attention,
            fastrl.linear_logprob: _head,
            fastrl.linear_logprob_backward: _head_backward,
        },
    )


def segment_attention_flops(lengths: Iterable[tuple[int, int]], heads: int, dim: int) -> int:
    """Both products of attention over segments of (queries, keys) each, causal or not, with ``heads`` query heads."""
    return sum(
        sdpa_flop_count((1, heads, queries, dim), (1, heads, keys, dim), (1, heads, keys, dim))
        for queries, keys in lengths
    )


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


def _decode_attention(query: Shape, prefix_k: Shape, _prefix_v: Shape, own_k: Shape, *_: Any, **__: Any) -> int:
    """Two products of every row with its prompt's keys and its own, padding counted."""
    rows, heads, width = query
    return 4 * rows * heads * width * (prefix_k[2] + own_k[2])


def _head(
    hidden: Shape, weight: Shape, target: Shape, bias: Any, temperature: Any, lora_a: Shape | None, *_: Any, **__: Any
) -> int:
    """logits = hidden Wᵀ, and the low-rank part where there is one."""
    n, width = hidden
    rank = lora_a[0] if lora_a is not None else 0
    return 2 * n * (width * weight[0] + rank * (width + weight[0]))


def _head_backward(grad_logp: Any, grad_entropy: Any, hidden: Shape, weight: Shape, *rest: Any, **__: Any) -> int:
    """The logits again, the gradient of hidden, and the weight's where it is needed, all over the chosen rows."""
    _target, _bias, _temperature, lora_a, _lora_b, rows = rest[:6]
    needs = rest[-1]
    n = rows[0] if rows is not None else hidden[0]
    rank = lora_a[0] if lora_a is not None else 0
    product = 2 * n * hidden[1] * weight[0]
    low_rank = 2 * n * rank * (hidden[1] + weight[0])
    times = 1 + int(needs[0]) + int(needs[1])
    return times * product + (1 + int(needs[0]) + int(any(needs[3:]))) * low_rank
