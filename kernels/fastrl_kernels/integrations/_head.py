"""Computes a transformers model's head with ``linear_logprob``, including the logit transforms of its config.

    logits = softcap tanh(scale (hidden W^T + bias) / softcap) / temperature          (each if the config has it)

``linear_logprob`` has no scale, but ``softcap / scale`` and ``temperature / scale`` have the same effect.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastrl_kernels._common import KERNEL_FLOATS
from fastrl_kernels.linear_logprob import LogProb, linear_logprob

# Config names of the factor on the logits; the last two divide (except in HyperCLOVA X, which multiplies).
_FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
_DIVISORS = ("logits_scaling",)
IGNORED = -100  # the label of a token without loss


class Logits(NamedTuple):
    """The transform of ``hidden W^T + bias`` before the softmax."""

    scale: float
    softcap: float | None

    @classmethod
    def of(cls, config: Any) -> Logits:
        """Read from a model's config.

        Raises:
            ValueError: a scale that is not positive.
        """
        text = config.get_text_config()
        scale = next((value for name in _FACTORS if (value := getattr(text, name, None)) is not None), None)
        divisor = next((value for name in _DIVISORS if (value := getattr(text, name, None)) is not None), None)
        if scale is None:
            scale = 1.0
            if divisor is not None:
                scale = divisor if text.model_type == "hyperclovax" else 1 / divisor
        if not scale > 0:
            raise ValueError(f"{text.model_type}: the fused head needs a positive factor on the logits, got {scale}")
        return cls(float(scale), getattr(text, "final_logit_softcapping", None))


def named_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of ``model.forward`` by parameter name."""
    return dict(zip(list(inspect.signature(type(model).forward).parameters)[1:], args, strict=False)) | kwargs


def backbone_output(model: Any, named: dict[str, Any]) -> Any:
    """The backbone's output for the arguments of the whole model; arguments of the head are not passed on."""
    head_only = {"labels", "shift_labels", "num_items_in_batch", "logits_to_keep", "ignore_index", "return_dict"}
    passed = {name: value for name, value in named.items() if name not in head_only}
    return model.base_model(**passed | {"use_cache": False})  # looked up on each call: FSDP and PEFT replace modules


def score(
    head: nn.Linear,
    hidden: Tensor,
    labels: Tensor,
    logits: Logits,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
    skip_zero_rows: bool = True,
) -> LogProb:
    """Log-probs (and entropy) of ``labels`` [...] under ``head`` applied to ``hidden`` [..., H], of labels' shape.

    Rows labelled -100 are left out of every matmul and are 0. Finding them costs one device synchronisation, as does
    ``skip_zero_rows`` in the backward.
    """
    weight, bias = head.weight, head.bias
    flat = labels.to(weight.device).flatten()
    rows = (flat != IGNORED).nonzero()[:, 0]
    out = linear_logprob(
        hidden.to(weight.device).flatten(0, -2).index_select(0, rows),
        weight,
        flat.index_select(0, rows),
        bias=bias,
        temperature=temperature / logits.scale,
        softcap=None if logits.softcap is None else logits.softcap / logits.scale,
        return_entropy=return_entropy,
        skip_zero_rows=skip_zero_rows,
    )

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(flat.shape).index_copy(0, rows, values).view(labels.shape)

    return LogProb(spread(out.logp), None if out.entropy is None else spread(out.entropy))


def replace_forward(model: nn.Module, forward: Callable[..., Any]) -> None:
    """Make ``model(...)`` call ``forward``, with the signature of the class's forward, which generation inspects."""

    @functools.wraps(type(model).forward)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    model.forward = types.MethodType(method, model)


def plain_head(model: Any) -> nn.Linear | None:
    """The output embedding if it is a plain linear layer of torch (or FSDP2), neither quantised nor with an adapter."""
    head = model.get_output_embeddings()
    is_plain = isinstance(head, nn.Linear) and head.weight.dtype in KERNEL_FLOATS
    return head if is_plain and type(head).forward is nn.Linear.forward else None
