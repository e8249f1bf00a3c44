"""One token per row through the language model, straight through its layers' own projections.

The projections are the trainer's modules, adapters and all. What lies between them (norms, rotary embedding with cache,
gate) is one launch each here, where the layers' own code takes about thirty; the text behind a prompt has one
position for all three axes of the multimodal rotary embedding, so that it is the plain one.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from fastrl_kernels.decode_layer import add_rms_norm, rope_append, silu_mul


class StepCache(Protocol):
    """Where a decode step keeps keys and values, and attends to them (see ``fastrl.rollout.cache.RowCache``)."""

    at: Tensor  # [1] int64: the slot of the new token

    def own(self, layer: int) -> tuple[Tensor, Tensor]: ...
    def attend(self, layer: int, query: Tensor, scale: float) -> Tensor: ...


class DecodeLayers:
    """What a decode step computes of a Qwen2-VL or Qwen2.5-VL model.

    Args:
        core: the model; its modules are called as they are at each step.
    """

    def __init__(self, core: Any) -> None:
        self.embed, self.model = core.get_input_embeddings(), core.model.language_model

    def __call__(self, token: Tensor, position: Tensor, cache: StepCache) -> Tensor:
        """Hidden states [R, H] for ``token`` [R] at ``position`` [R], whose keys and values go into ``cache``."""
        residual = self.embed(token)
        cos, sin = self._rotation(residual, position)
        new = None
        for index, layer in enumerate(self.model.layers):
            normed = _add_norm(residual, new, layer.input_layernorm)
            new = self._attention(layer.self_attn, index, normed, cos, sin, cache)
            normed = _add_norm(residual, new, layer.post_attention_layernorm)
            mlp = layer.mlp
            new = mlp.down_proj(silu_mul(mlp.gate_proj(normed), mlp.up_proj(normed)))
        return _add_norm(residual, new, self.model.norm)

    def _rotation(self, like: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [R, D/2], in the model's dtype as the layers' own code has them."""
        cos, sin = self.model.rotary_emb(like, position[None, :, None].expand(3, -1, 1))
        if cos.dim() == 4:  # [3, R, 1, D] in older releases of transformers: the axes, all equal here, apart
            cos, sin = cos[0], sin[0]
        half = cos.shape[-1] // 2
        return cos[:, 0, :half].contiguous(), sin[:, 0, :half].contiguous()

    def _attention(
        self, attention: Any, index: int, normed: Tensor, cos: Tensor, sin: Tensor, cache: StepCache
    ) -> Tensor:
        q, k, v = (
            project(normed).view(len(normed), -1, attention.head_dim)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q = rope_append(q, k, v, cos, sin, *cache.own(index), cache.at)
        return attention.o_proj(cache.attend(index, q, attention.scaling).view(len(normed), -1))


def _add_norm(residual: Tensor, new: Tensor | None, norm: Any) -> Tensor:
    return add_rms_norm(residual, new, norm.weight, norm.variance_epsilon)
