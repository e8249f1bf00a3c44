"""Attention maps: the attention of a dialogue's answer tokens on its image tokens, per turn.

RePer's analysis (arXiv:2504.07165): a model that reflects well attends more to the image with every turn. A token's
attention on the image is that of the row that predicts it, the mean over heads and layers of

    mass = Σ_{image tokens j} softmax_j( q · k_j / √d + mask )                                   in [0, 1]

The paper does not say which layers it uses; all that attend are reported (``by_layer``; recurrent layers do not), and
``mass`` is their mean. Fused attention never materialises these probabilities, so this is another pass over the
finished dialogue with transformers' eager attention. That adds its mask to the scores: a boolean mask would be added as
0 and 1 and hide nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastrl.batch import ImageInput, PromptGroup, pack_row
from fastrl.models.attention.switch import attention, register
from fastrl.models.policy import packed_states

if TYPE_CHECKING:
    from fastrl.data.records import Record
    from fastrl.models.families import Family
    from fastrl.models.policy import Policy

ATTENTION = "fastrl_eager"
SHOWN = 8  # pictures drawn at most

# Draws each picture with its map of every turn into a file, such as fastrl.report.figures.heat_maps
HeatMaps = Callable[[Sequence[tuple[Any, Sequence[Tensor]]], Path], None]


@dataclass(frozen=True)
class TurnAttention:
    """One turn's attention on the images, the mean over its answer's tokens (end of turn included) and all heads."""

    mass: float  # sum over all image tokens, mean over layers
    by_layer: tuple[float, ...]
    maps: tuple[Tensor, ...]  # per image [rows, columns] float32, one cell per image token, mean over layers

    def row(self) -> dict[str, Any]:
        """For JSON; the sum of all maps is ``mass``."""
        return {"mass": self.mass, "by_layer": list(self.by_layer), "maps": [m.tolist() for m in self.maps]}


def read_attention(policy: Policy, record: Record) -> list[TurnAttention]:
    """The attention of each assistant turn of ``record.messages`` on the record's images.

    One forward over the dialogue with its answers. Peak memory is one layer's [heads, L, L] probabilities.

    Raises:
        EncodeError: the dialogue does not end with the assistant, or has images after its first turn.
        ValueError: the record has no images.
    """
    prompt, completion, _ = policy.encode_dialogue(record)
    if not prompt.images:
        raise ValueError(f"{record.source or record.id}: has no image, so there is no attention on images to read")
    batch = pack_row([PromptGroup(prompt, [completion])]).to(policy.device)
    turn = batch.per_token["turn"]
    probe = _Probe(columns=batch.image_rows, rows=[batch.predict_rows[turn == n] for n in range(int(turn.max()) + 1)])
    with _eager(policy), torch.no_grad():
        packed_states(policy.core, batch, fastrl_probe=probe)
    family, images = policy.family, prompt.images
    lengths = [family.tokens(image) for image in images]
    return [_summed(torch.stack(layers).cpu(), lengths, images, family) for layers in zip(*probe.found, strict=True)]


def save_attention(
    dialogues: Sequence[tuple[Record, Sequence[TurnAttention]]],
    folder: Path,
    *,
    draw: HeatMaps | None = None,
    shown: int = SHOWN,
) -> dict[str, Any]:
    """Write ``attention.json`` (the mean mass of each turn, and every dialogue's numbers) and, if ``draw`` is given,
    ``attention.png`` with the heat maps of the first ``shown`` records.

    Returns:
        ``{"turns": …, "mean_mass": [per turn], "dialogues": n}``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    most = max((len(turns) for _, turns in dialogues), default=0)
    of_turn = [[turns[n].mass for _, turns in dialogues if len(turns) > n] for n in range(most)]
    summary = {"turns": most, "mean_mass": [sum(m) / len(m) for m in of_turn], "dialogues": len(dialogues)}
    rows = [{"id": record.id, "turns": [turn.row() for turn in turns]} for record, turns in dialogues]
    text = json.dumps({**summary, "records": rows}, ensure_ascii=False)
    (folder / "attention.json").write_text(text, encoding="utf-8")
    if dialogues and draw is not None:
        pictures = [
            (record.images[n], [turn.maps[n] for turn in turns])
            for record, turns in dialogues[:shown]
            for n in range(len(record.images))
        ]
        draw(pictures, folder / "attention.png")
    return summary


@dataclass
class _Probe:
    """Passed through the forward to collect the requested rows of the probabilities, by layer and turn."""

    columns: Tensor  # indices of the image tokens
    rows: list[Tensor]  # indices of the predicting rows of each turn
    found: list[list[Tensor]] = field(default_factory=list)  # by layer, by turn: [image tokens] float32

    def mask(self, query: Tensor) -> Tensor:
        """The additive causal mask [1, 1, L, L] for the scores of ``query`` [1, heads, L, D]."""
        length = query.shape[2]
        hidden = torch.full((length, length), torch.finfo(query.dtype).min, dtype=query.dtype, device=query.device)
        return hidden.triu(1)[None, None]

    def add(self, weights: Tensor) -> None:
        """Collect from one layer's probabilities [1, heads, L, L]."""
        seen = weights[0].float().mean(0)[:, self.columns]
        self.found.append([seen[rows].mean(0) for rows in self.rows])


def _summed(layers: Tensor, lengths: list[int], images: Sequence[ImageInput], family: Family) -> TurnAttention:
    """[layers, image tokens] → mass, mass by layer and one map per image."""
    parts = layers.mean(0).split(lengths)
    maps = tuple(family.heat(image, part) for image, part in zip(images, parts, strict=True))
    by_layer = layers.sum(1)
    return TurnAttention(float(by_layer.mean()), tuple(by_layer.tolist()), maps)


@contextmanager
def _eager(policy: Policy) -> Iterator[None]:
    """Make the language model attend through ``fastrl_eager``, without dropout."""
    register(**{ATTENTION: _attention})
    training = policy.core.training
    policy.core.eval()
    try:
        with attention(policy.family, policy.core, language=ATTENTION):
            yield
    finally:
        policy.core.train(training)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    from transformers.models.qwen2_vl.modeling_qwen2_vl import eager_attention_forward

    probe: _Probe = kwargs["fastrl_probe"]
    mask = probe.mask(query)
    out, weights = eager_attention_forward(module, query, key, value, mask, scaling=kwargs["scaling"])
    probe.add(weights)
    return out, None
