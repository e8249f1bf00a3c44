"""A transformers model whose training loss never makes the logits: one call, and nothing else about the model changes::

    from fastrl_kernels.integrations.transformers import patch

    model = AutoModelForCausalLM.from_pretrained(...)
    patch(model)
    model(input_ids=ids, labels=ids).loss.backward()  # the same loss and gradients, without [tokens, vocabulary]

In training mode and with labels, ``model(...)`` returns its loss with ``logits=None``; in evaluation, without labels
and in ``generate`` it is the model it was. Patch before wrapping (DDP, FSDP, PEFT); ``Trainer`` needs nothing more.
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

    The loss is transformers' own: mean over the labels that are not -100, or their sum over ``num_items_in_batch``;
    ``shift_labels`` are taken as they are. What a fused head cannot do goes the model's own way: a head that is
    quantised or carries an adapter, a router loss, another ``ignore_index``, ``logits_to_keep``.

    Args:
        verify: run three tokens through the model both ways, and refuse where the losses differ: a model may do
            something to its logits that its config does not say. Skipped on the meta device.

    Raises:
        ValueError: no causal language model with a linear head, or a loss that is not the model's own.
    """
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{name}: an encoder-decoder; only causal language models have a fused head")
    if plain_head(model) is None:
        raise ValueError(f"{name}: its output embedding is not a plain linear layer")
    if model.base_model is model:
        raise ValueError(f"{name}: no backbone below the head (base_model_prefix={model.base_model_prefix!r})")
    before, logits, text = model.forward, Logits.of(model.config), model.config.get_text_config()

    def forward(*args: Any, **kwargs: Any) -> Any:
        head, named = plain_head(model), named_arguments(model, args, kwargs)
        labels = [named.get("labels"), named.get("shift_labels")]
        unlabelled = not any(isinstance(value, Tensor) for value in labels)
        if head is None or not model.training or unlabelled or _goes_its_own_way(text, named):
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


def _goes_its_own_way(config: Any, kwargs: dict[str, Any]) -> bool:
    """Arguments that change what the loss or the result is."""
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
    return -logp.sum() / count  # no label at all: NaN, as cross_entropy has it


def _result(output: Any, loss: Tensor) -> Any:
    from transformers.modeling_outputs import CausalLMOutputWithPast

    return CausalLMOutputWithPast(
        loss=loss,  # type: ignore[arg-type]
        hidden_states=getattr(output, "hidden_states", None),
        attentions=getattr(output, "attentions", None),
    )


def _words(config: Any) -> list[int]:
    """Token ids that mean nothing to the model but themselves (no placeholder of a picture)."""
    text = config.get_text_config()
    special = {value for name, value in (config.to_dict() | text.to_dict()).items() if name.endswith(("_id", "_index"))}
    return [token for token in range(text.vocab_size) if token not in special][-_PROBE:]


@torch.no_grad()
def _verify(model: Any, before: Any) -> None:
    """The loss of three tokens, both ways; dropout off, the mode put back."""
    was_training = [(module, module.training) for module in model.modules()]
    ids = torch.tensor([_words(model.config)], device=model.device)
    try:
        model.eval()
        theirs = before(input_ids=ids, labels=ids).loss
        model.training = True  # of the outermost module alone: layers drop nothing
        ours = model(input_ids=ids, labels=ids).loss
    finally:
        for module, training in was_training:
            module.training = training
    near = 1e-4 if theirs.dtype == torch.float32 and model.dtype == torch.float32 else 0.02
    if not torch.allclose(ours.float(), theirs.float(), rtol=near, atol=near):
        raise ValueError(
            f"{type(model).__name__}: its own loss of {_PROBE} tokens is {theirs.item():.6f}, the fused head's "
            f"{ours.item():.6f}: it changes its logits in a way that its config does not say"
        )
