"""Prompts that rollout and update share: one pass through the model, whose graph is kept until the update's backward.

The rollout needs a prompt's keys, values and last hidden state, the update the same with their gradient. So the pass
runs as in training (:func:`keep_prompt`), and a forward over the answers alone reads what it left
(:func:`answer_states`). What is kept is cut off from its graph: gradients of all answers, of any number of
micro-batches, add up in it, and one more backward (:meth:`KeptPrompts.rest`) carries them through the prompts' layers
and the vision tower. With the weights unchanged in between, log-probs and gradients are those of one forward over
prompts and answers, up to rounding. Under checkpointing a pass keeps only its layers' inputs, keys and values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastrl.batch import ImageInput, PackedBatch, Prompt
from fastrl.models.families import Placed, VisionFeatures, family_of
from fastrl.models.vision import unique_images
from fastrl.segments import AnswerRows, Segments, Span


def obstacle(core: Any) -> str | None:
    """Why a model's prompts cannot be kept; None: they can."""
    text = core.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        return f"the model has text layers of kind {', '.join(sorted(kinds))}, whose state would have to be kept too"
    drops = [module.p for module in core.modules() if isinstance(module, nn.Dropout)]
    if getattr(text, "attention_dropout", 0.0) or any(drops):
        return "the model has dropout: sampling uses none, so the passes differ"
    return None


class KeptPrompt:
    """One prompt: by layer its ``keys`` and ``values`` [1, Hkv, P, D], and ``last`` [hidden], its last hidden state.

    They are leaves of the graph, which collect the answers' gradients; ``made`` are the same numbers with the graph of
    the pass that made them.
    """

    def __init__(self, keys: Mapping[int, Tensor], values: Mapping[int, Tensor], last: Tensor) -> None:
        self.made = (*keys.values(), *values.values(), last)
        self.keys = {layer: _leaf(key) for layer, key in keys.items()}
        self.values = {layer: _leaf(value) for layer, value in values.items()}
        self.last = _leaf(last)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """In the order of ``made``."""
        return (*self.keys.values(), *self.values.values(), self.last)


def _leaf(made: Tensor) -> Tensor:
    return made.detach().requires_grad_(made.requires_grad)


class KeptPrompts:
    """The kept prompts of a step."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[Prompt, KeptPrompt]] = {}  # by id: while held, no other prompt gets it

    def __len__(self) -> int:
        return len(self._held)

    def add(self, prompt: Prompt, kept: KeptPrompt) -> None:
        """Keep a prompt until ``clear``."""
        self._held[id(prompt)] = prompt, kept

    def of(self, prompts: Iterable[Prompt]) -> list[KeptPrompt]:
        """What was kept of these prompts. Raises ``KeyError`` for a prompt that was not."""
        return [self._held[id(prompt)][1] for prompt in prompts]

    def only(self, prompts: Iterable[Prompt]) -> None:
        """Drop the graphs of all other prompts, such as those of groups without different rewards."""
        wanted = {id(prompt) for prompt in prompts}
        self._held = {key: held for key, held in self._held.items() if key in wanted}

    def clear(self) -> None:
        """Drop all."""
        self._held = {}

    def rest(self) -> Tensor | None:
        """A scalar 0 whose backward is the rest of the answers': through the passes that made the prompts. None: no
        gradient reached them.

        To be called once, after the backward of all answers; drops all. One backward serves all prompts, because they
        may share pictures.
        """
        pairs = [
            (made, leaf.grad)
            for _, kept in self._held.values()
            for made, leaf in zip(kept.made, kept.leaves, strict=True)
            if leaf.grad is not None
        ]
        self.clear()
        if not pairs:
            return None
        return _Continued.apply([grad for _, grad in pairs], *(made for made, _ in pairs))  # type: ignore[no-any-return]


class _Continued(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grads: list[Tensor], *made: Tensor) -> Tensor:
        ctx.grads = grads
        return torch.zeros((), device=made[0].device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grads, ctx.grads = ctx.grads, []
        return None, *(known * grad.to(known.dtype) for known in grads)


class _Recorder:
    """The ``fastrl_keep`` of a prompt's pass."""

    def __init__(self) -> None:
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.open = True

    def put(self, layer: int, key: Tensor, value: Tensor) -> None:
        if self.open:  # a checkpoint that recomputes the layer calls again
            self.keys[layer], self.values[layer] = key, value

    def close(self, last: Tensor) -> KeptPrompt:
        """Hand over what was recorded. Checkpoints refer to this object, so it must not refer to their graph."""
        kept = KeptPrompt(self.keys, self.values, last)
        self.open, self.keys, self.values = False, {}, {}
        return kept


@torch.enable_grad()
def trained_features(core: Any, images: Sequence[ImageInput]) -> dict[str, VisionFeatures]:
    """Vision features by image key as in training: with their graph, unless the tower is frozen."""
    core.train()
    unique = unique_images(images)
    found = family_of(core.config).features(core, unique) if unique else []
    return {image.key: feature for image, feature in zip(unique, found, strict=True)}


@torch.enable_grad()
def keep_prompt(core: Any, prompt: Prompt, features: Mapping[str, VisionFeatures], device: torch.device) -> KeptPrompt:
    """One training forward over a prompt.

    Args:
        core: the model, on ``device``; set to training mode (checkpointing, if it is on).
        prompt: on the host.
        features: vision features by image key, with their graph if the tower is trained.
    """
    core.train()
    length = len(prompt.token_ids)
    placed = None
    if prompt.images:
        rows = [torch.arange(start, start + count) for start, count in prompt.image_slots]
        placed = Placed(torch.cat(rows).to(device), tuple(features[image.key] for image in prompt.images))
    recorder = _Recorder()
    hidden = family_of(core.config).hidden(
        core,
        core.get_input_embeddings()(prompt.token_ids.to(device)[None]),
        prompt.positions.to(device)[:, None],
        placed,
        fastrl_segments=Segments((Span(0, length, ()),), device),
        fastrl_keep=recorder,
    )
    return recorder.close(hidden[0, -1].clone())  # a view would hold the whole row


class _Answers:
    """The ``fastrl_answers`` of the answers' pass."""

    def __init__(self, rows: AnswerRows, prompts: Sequence[KeptPrompt]) -> None:
        self.rows, self._prompts = rows, [(kept.keys, kept.values) for kept in prompts]

    def prompts(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        return [(keys[layer], values[layer]) for keys, values in self._prompts]


def answer_states(core: Any, batch: PackedBatch, prompts: Sequence[KeptPrompt]) -> Tensor:
    """Hidden states [N, hidden] of ``core`` at the batch's prediction rows, computing none of the prompts.

    Args:
        core: the model, with the weights that the prompts were kept with.
        batch: on the model's device.
        prompts: what was kept of each group's prompt.
    """
    if len(prompts) != batch.n_groups:
        raise ValueError(f"prompts: expected one for each of {batch.n_groups} groups, got {len(prompts)}")
    rows = batch.segments.answers
    states = [torch.stack([kept.last for kept in prompts])]
    if rows.length:
        embeds = core.get_input_embeddings()(batch.input_ids.index_select(1, rows.rows))
        positions = batch.positions.index_select(2, rows.rows)
        answers = _Answers(rows, prompts)
        states.append(family_of(core.config).hidden(core, embeds, positions, fastrl_answers=answers)[0])
    return torch.cat(states).index_select(0, rows.predict)
