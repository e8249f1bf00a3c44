"""One token per row through the language model, straight through its layers' own projections.

The projections are the trainer's modules, adapters and all. What lies between them (norms, rotary embedding with cache,
gate) is one launch each here, where the layers' own code takes about thirty; the text behind a prompt has one
position for all axes of a multimodal rotary embedding, so that it is the plain one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from fastrl_kernels.decode_layer import add_rms_norm, rope_append, silu_mul

if TYPE_CHECKING:
    from fastrl.models.families import Parts

# Children of a text layer and of what it holds. Whatever else a layer has, this step would leave out.
LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
HEAD_NORMS = {"q_norm", "k_norm"}  # of each head's queries and keys, before they are rotated
MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
UNSEEN = {"rotary_emb"}  # kept by attention modules of older releases of transformers; the model's own is used


class StepCache(Protocol):
    """Where a decode step keeps keys and values, and attends to them (see ``fastrl.rollout.cache.RowCache``)."""

    at: Tensor  # [1] int64: the slot of the new token

    def own(self, layer: int) -> tuple[Tensor, Tensor]: ...
    def attend(self, layer: int, query: Tensor, scale: float) -> Tensor: ...


class DecodeLayers:
    """What a decode step computes of layers like Llama's: RMSNorms, rotary attention, gated SiLU.

    Args:
        parts: of the model; its modules are called as they are at each step.
        axes: rows of positions that its rotary embedding takes (1: none of their own).
    """

    def __init__(self, parts: Parts, axes: int) -> None:
        self.embed, self.model, self.axes = parts.embedding, parts.language, axes

    @classmethod
    def of(cls, parts: Parts, axes: int) -> DecodeLayers | None:
        """The step of a model whose layers are made of known modules alone, else None."""
        language: Any = parts.language
        return cls(parts, axes) if all(_known(layer) for layer in language.layers) else None

    def __call__(self, token: Tensor, position: Tensor, cache: StepCache) -> Tensor:
        """Hidden states [R, H] for ``token`` [R] at ``position`` [R], whose keys and values go into ``cache``."""
        language: Any = self.model
        residual = self.embed(token)
        cos, sin = self._rotation(residual, position)
        new = None
        for index, layer in enumerate(language.layers):
            normed = _add_norm(residual, new, layer.input_layernorm)
            new = self._attention(layer.self_attn, index, normed, cos, sin, cache)
            normed = _add_norm(residual, new, layer.post_attention_layernorm)
            mlp = layer.mlp
            new = mlp.down_proj(silu_mul(mlp.gate_proj(normed), mlp.up_proj(normed)))
        return _add_norm(residual, new, language.norm)

    def _rotation(self, like: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [R, D/2], in the model's dtype as the layers' own code has them."""
        language: Any = self.model
        place = position[:, None] if self.axes == 1 else position[None, :, None].expand(self.axes, -1, 1)
        cos, sin = language.rotary_emb(like, place)
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
        if hasattr(attention, "q_norm"):
            q, k = _head_norm(q, attention.q_norm), _head_norm(k, attention.k_norm)
        q = rope_append(q, k, v, cos, sin, *cache.own(index), cache.at)
        return attention.o_proj(cache.attend(index, q, attention.scaling).view(len(normed), -1))


def _known(layer: nn.Module) -> bool:
    named: dict[str, Any] = dict(layer.named_children())
    if set(named) != LAYER:
        return False
    attention, mlp = (dict(named[name].named_children()) for name in ("self_attn", "mlp"))
    norms = (named["input_layernorm"], named["post_attention_layernorm"])
    return (
        set(attention) - UNSEEN in (ATTENTION, ATTENTION | HEAD_NORMS)
        and all(hasattr(attention[norm], "variance_epsilon") for norm in HEAD_NORMS & set(attention))
        and set(mlp) == MLP
        and type(mlp["act_fn"]).__name__ in ("SiLU", "SiLUActivation")
        and all(hasattr(norm, "variance_epsilon") for norm in norms)
    )


def _head_norm(heads: Tensor, norm: Any) -> Tensor:
    """[R, heads, D], each head normed."""
    return _add_norm(heads.reshape(-1, heads.shape[-1]), None, norm).view(heads.shape)


def _add_norm(residual: Tensor, new: Tensor | None, norm: Any) -> Tensor:
    return add_rms_norm(residual, new, norm.weight, norm.variance_epsilon)
