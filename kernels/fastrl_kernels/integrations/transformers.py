"""Patches a transformers model so that its training loss does not materialise the logits::

    from fastrl_kernels.integrations.transformers import patch

    model = AutoModelForCausalLM.from_pretrained(...)
    patch(model)
    model(input_ids=ids, labels=ids).loss.backward()  # the same loss and gradients, without [tokens, vocabulary]

In training mode and with labels, ``model(...)`` returns its loss with ``logits=None``; in evaluation, without labels
and in ``generate`` it is unchanged. Patch before wrapping (DDP, FSDP, PEFT); ``Trainer`` needs no other change.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastrl_kernels.integrations._head import (
    IGNORED,
    Logits,
    backbone_output,
    named_arguments,
    plain_head,
    replace_forward,
    score,
)

_PROBE = 3  # tokens


def patch(model: Any, *, verify: bool = True) -> Any:
    """Give a causal language model (or an MLLM) a fused head and cross-entropy; returns ``model`` itself.

    The loss is the same as transformers': the mean over the labels that are not -100, or their sum divided by
    ``num_items_in_batch``; ``shift_labels`` are used as given. The model's own forward is used if the fused head does
    not support a case: a head that is quantised or has an adapter, a router loss, another ``ignore_index``,
    ``logits_to_keep``.

    Args:
        verify: compute the loss of three tokens with and without the patch, and raise if they differ: a model may
            transform its logits in a way that its config does not describe. Skipped on the meta device.

    Raises:
        ValueError: not a causal language model with a linear head, or the fused loss differs from the model's.
    """
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{name}: is an encoder-decoder; the fused head needs a causal language model")
    if plain_head(model) is None:
        raise ValueError(f"{name}: its output embedding is not a plain linear layer")
    if model.base_model is model:
        raise ValueError(f"{name}: no backbone below the head (base_model_prefix={model.base_model_prefix!r})")
    before, logits, text = model.forward, Logits.of(model.config), model.config.get_text_config()

    def forward(*args: Any, **kwargs: Any) -> Any:
        head, named = plain_head(model), named_arguments(model, args, kwargs)
        labels = [named.get("labels"), named.get("shift_labels")]
        unlabelled = not any(isinstance(value, Tensor) for value in labels)
        if head is None or not model.training or unlabelled or _unsupported(text, named):
            return before(*args, **kwargs)
        output = backbone_output(model, named)
        return _result(output, _loss(head, output.last_hidden_state, logits, named.get("num_items_in_batch"), *labels))

    replace_forward(model, forward)
    if verify and not any(p.is_meta for p in model.parameters()):
        try:
            _verify(model, before)
        except BaseException:
            model.forward = before
            raise
    return model


def _unsupported(config: Any, kwargs: dict[str, Any]) -> bool:
    """Whether arguments change the loss or the result in a way that the fused head does not support."""
    routed = kwargs.get("output_router_logits")
    if routed is None:
        routed = getattr(config, "output_router_logits", False)
    as_tuple = kwargs.get("return_dict") is False
    kept = kwargs.get("logits_to_keep", 0)
    kept = isinstance(kept, Tensor) or kept != 0
    return bool(routed or as_tuple or kept or kwargs.get("ignore_index", IGNORED) != IGNORED)


def _loss(
    head: nn.Linear,
    hidden: Tensor,
    logits: Logits,
    num_items: Tensor | int | None,
    labels: Tensor | None,
    shift_labels: Tensor | None,
) -> Tensor:
    if shift_labels is None:
        assert labels is not None
        shift_labels = F.pad(labels, (0, 1), value=IGNORED)[..., 1:]
    logp = score(head, hidden, shift_labels, logits, skip_zero_rows=False).logp
    count = (shift_labels != IGNORED).sum() if num_items is None else num_items
    if isinstance(count, Tensor):
        count = count.to(logp.device)
    return -logp.sum() / count  # without any label NaN, like cross_entropy


def _result(output: Any, loss: Tensor) -> Any:
    from transformers.modeling_outputs import CausalLMOutputWithPast

    return CausalLMOutputWithPast(
        loss=loss,  # type: ignore[arg-type]
        hidden_states=getattr(output, "hidden_states", None),
        attentions=getattr(output, "attentions", None),
    )


def _words(config: Any) -> list[int]:
    """Ids of ordinary tokens (no image placeholders)."""
    text = config.get_text_config()
    special = {value for name, value in (config.to_dict() | text.to_dict()).items() if name.endswith(("_id", "_index"))}
    return [token for token in range(text.vocab_size) if token not in special][-_PROBE:]


@torch.no_grad()
def _verify(model: Any, before: Any) -> None:
    """Compare the loss of three tokens with and without the patch, with dropout off; restores the mode."""
    was_training = [(module, module.training) for module in model.modules()]
    ids = torch.tensor([_words(model.config)], device=model.device)
    try:
        model.eval()
        theirs = before(input_ids=ids, labels=ids).loss
        model.training = True  # on the outermost module only, so that dropout stays off
        ours = model(input_ids=ids, labels=ids).loss
    finally:
        for module, training in was_training:
            module.training = training
    near = 1e-4 if theirs.dtype == torch.float32 and model.dtype == torch.float32 else 0.02
    if not torch.allclose(ours.float(), theirs.float(), rtol=near, atol=near):
        raise ValueError(
            f"{type(model).__name__}: its own loss of {_PROBE} tokens is {theirs.item():.6f}, the fused head's "
            f"{ours.item():.6f}: the model transforms its logits in a way that its config does not describe"
        )
