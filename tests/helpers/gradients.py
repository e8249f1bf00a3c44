"""Outputs with gradients as one list of tensors, and the same computation with several numbers of threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def outputs_of(result: Any) -> list[Tensor]:
    """A function's tensors, one or several."""
    return list(result) if isinstance(result, tuple) else [result]


def outputs_and_gradients(
    function: Callable[..., Any], inputs: Sequence[Tensor], upstream: Sequence[Tensor]
) -> list[Tensor]:
    """Outputs, then the gradient of every input for these upstream gradients, one for each output."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outs = outputs_of(function(*leaves))
    given = [u.to(o.dtype) for u, o in zip(upstream, outs, strict=True)]
    return [*(x.detach() for x in outs), *torch.autograd.grad(outs, leaves, given)]


def same_bits_with_threads(counts: Sequence[int], compute: Callable[[], Sequence[Tensor]]) -> bool:
    """Whether ``compute`` gives the same bits with each of these numbers of torch's threads."""
    before, found = torch.get_num_threads(), []
    try:
        for threads in counts:
            torch.set_num_threads(threads)
            found.append(compute())
    finally:
        torch.set_num_threads(before)
    first, *others = found
    return all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
