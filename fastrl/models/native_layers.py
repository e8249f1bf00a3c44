"""``DecodeLayers`` on a CPU by the library's C++ decode step: the layers in one call, or whole steps with the sampler.

It reads the weights of the trainer's modules where they lie, and calls none of them. So it takes only what it can see
through: plain linear layers, embeddings and norms in float32 with nothing hooked into them. Unmerged adapters,
quantised or sharded weights, other dtypes and devices decode through ``DecodeLayers``.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastrl.models.decode_layers import DecodeLayers
from fastrl.models.layer_kinds import untouched
from fastrl_kernels.decode_step import Angles, DecodeStep, Draws, Keys, Layer, Linear, Norm, unfit

_MOVING = ("dynamic", "longrope")  # rotary embeddings whose angles depend on the longest text of the call


class NativeCache(Protocol):
    """Keys and values by layer (see ``fastrl.rollout.cache.RowCache``)."""

    prompt_keys: dict[int, Tensor]
    prompt_values: dict[int, Tensor]
    keys: dict[int, Tensor]
    values: dict[int, Tensor]
    offsets: Tensor
    prompt_length: Tensor
    step: int


class NativeLayers:
    """The decode step of ``layers`` in C++. Made by :meth:`of`, for as long as the weights stay where they are."""

    def __init__(self, layers: DecodeLayers, step: DecodeStep) -> None:
        self.layers, self.native = layers, step

    @classmethod
    def of(cls, layers: DecodeLayers) -> NativeLayers | None:
        """None where the model, or torch's state, is not one that the C++ step computes the same for."""
        model: Any = layers.model
        if not untouched(layers.embed, nn.Embedding) or layers.embed.max_norm is not None:
            return None
        found = [_layer(layer) for layer in model.layers]
        weights = [layer for layer in found if layer is not None]
        if len(weights) < len(found) or not weights:
            return None
        dim = model.layers[0].self_attn.head_dim
        heads = {"query_heads": len(weights[0].query.weight) // dim, "key_heads": len(weights[0].key.weight) // dim}
        parts = (layers.embed.weight, weights, _norm(model.norm))
        return None if unfit(*parts, **heads) is not None else cls(layers, DecodeStep(*parts, **heads))

    def __call__(self, token: Tensor, position: Tensor, cache: NativeCache) -> Tensor:
        """Hidden states [R, H] for ``token`` [R] at ``position`` [R], whose keys and values go into ``cache``."""
        angles = Angles(*self.angles(position), torch.arange(len(token), device=token.device))
        return self.native.hidden(token, _keys(cache), angles)

    def angles(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [R, D/2] of the rotary embedding at ``position`` [R]."""
        return self.layers.rotation(self.layers.embed.weight, position)

    @property
    def fixed_angles(self) -> bool:
        """Whether a position's angles are the same in every call, so that they may be computed ahead."""
        model: Any = self.layers.model
        kind = getattr(model.rotary_emb, "rope_type", None)
        return isinstance(kind, str) and not any(moving in kind for moving in _MOVING)

    def head(self, module: nn.Module) -> Linear | None:
        """The head's weights, if whole steps can go through it."""
        linear = _linear(module)
        return linear if linear is not None and self.native.takes_head(linear) else None

    def draw(self, token: Tensor, cache: NativeCache, angles: Angles, draws: Draws, steps: int) -> int:
        """Whole steps: see ``DecodeStep.draw``."""
        return self.native.draw(token, _keys(cache), angles, draws, steps)


def _keys(cache: NativeCache) -> Keys:
    """The buffers of a cache in the order of the layers."""
    prompt_keys, prompt_values, own_keys, own_values = (
        [buffers[layer] for layer in range(len(buffers))]
        for buffers in (cache.prompt_keys, cache.prompt_values, cache.keys, cache.values)
    )
    return Keys(prompt_keys, prompt_values, own_keys, own_values, cache.offsets, cache.prompt_length, cache.step)


def _layer(layer: Any) -> Layer | None:
    attention, mlp = layer.self_attn, layer.mlp
    modules = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    modules = (*modules, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    linears = [linear for module in modules if (linear := _linear(module)) is not None]
    if len(linears) < len(modules):
        return None
    query, key, value, output, gate, up, down = linears
    normed = hasattr(attention, "q_norm")
    return Layer(
        before_attention=_norm(layer.input_layernorm),
        query=query,
        key=key,
        value=value,
        output=output,
        before_gate=_norm(layer.post_attention_layernorm),
        gate=gate,
        up=up,
        down=down,
        scale=attention.scaling,
        query_norm=_norm(attention.q_norm) if normed else None,
        key_norm=_norm(attention.k_norm) if normed else None,
    )


def _norm(norm: Any) -> Norm:
    return Norm(norm.weight, norm.variance_epsilon)


def _linear(module: nn.Module) -> Linear | None:
    return Linear(module.weight, module.bias) if untouched(module, nn.Linear) else None  # type: ignore[arg-type]
