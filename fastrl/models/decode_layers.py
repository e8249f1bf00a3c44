"""One token per row through the language model, by calling its layers' projections directly.

The projections are the trainer's own modules, adapters included. The operations between them (norms, rotary embedding
with the cache write, gate) are one launch each here, against about thirty in the layers' own code. Text after a prompt
has the same position on all axes of a multimodal rotary embedding, which therefore reduces to the ordinary one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from fastrl_kernels.decode_layer import add_rms_norm, rope_append
from fastrl_kernels.gated import silu_mul

if TYPE_CHECKING:
    from fastrl.models.families import Parts

# The children of a text layer and of its modules that this step computes. Layers with others are not supported.
LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
HEAD_NORMS = {"q_norm", "k_norm"}  # of each head's queries and keys, before they are rotated
MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
UNUSED = {"rotary_emb"}  # attention modules of older transformers releases have their own; the model's is used


class StepCache(Protocol):
    """Where a decode step keeps keys and values, and attends to them (see ``fastrl.rollout.cache.RowCache``)."""

    at: Tensor  # [1] int64: the slot of the new token

    def own(self, layer: int) -> tuple[Tensor, Tensor]: ...
    def attend(self, layer: int, query: Tensor, scale: float) -> Tensor: ...


class DecodeLayers:
    """A decode step through Llama-like layers: RMSNorms, rotary attention, gated SiLU.

    Args:
        parts: the model's parts; their modules are looked up anew at each step.
        axes: number of position axes of the rotary embedding (1: no axis dimension).
    """

    def __init__(self, parts: Parts, axes: int) -> None:
        self.embed, self.model, self.axes = parts.embedding, parts.language, axes

    @classmethod
    def of(cls, parts: Parts, axes: int) -> DecodeLayers | None:
        """The step for a model whose layers consist of known modules only, else None."""
        language: Any = parts.language
        return cls(parts, axes) if all(_known(layer) for layer in language.layers) else None

    def __call__(self, token: Tensor, position: Tensor, cache: StepCache) -> Tensor:
        """Hidden states [R, H] for ``token`` [R] at ``position`` [R], whose keys and values go into ``cache``."""
        language: Any = self.model
        residual = self.embed(token)
        cos, sin = self.rotation(residual, position)
        new = None
        for index, layer in enumerate(language.layers):
            normed = _add_norm(residual, new, layer.input_layernorm)
            new = self._attention(layer.self_attn, index, normed, cos, sin, cache)
            normed = _add_norm(residual, new, layer.post_attention_layernorm)
            mlp = layer.mlp
            new = mlp.down_proj(silu_mul(mlp.gate_proj(normed), mlp.up_proj(normed)))
        return _add_norm(residual, new, language.norm)

    def rotation(self, like: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [R, D/2] in the model's dtype, like those of the layers' own code."""
        language: Any = self.model
        place = position[:, None] if self.axes == 1 else position[None, :, None].expand(self.axes, -1, 1)
        cos, sin = language.rotary_emb(like, place)
        if cos.dim() == 4:  # [3, R, 1, D] in older transformers releases: one per axis, all equal here
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
        set(attention) - UNUSED in (ATTENTION, ATTENTION | HEAD_NORMS)
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
