"""What one step of a recipe works on: prompts, pictures, answers, and how they fall into micro-batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fastrl.batch import Completion, ImageInput, PackedBatch, Prompt, PromptGroup, pack_row
from fastrl.methods import method_for
from fastrl.models.families import Family
from fastrl.recipe import Recipe

TEXT_TOKENS = 128  # of a prompt beside its images: system turn, question, markers
DIALOGUE_TOKENS = 1024  # of a method that trains on ready-made dialogues
PREFILL_TOKENS = 16384  # of the generator's calls over prompts
DEFAULT_PIXELS = 1_000_000  # where neither the recipe nor the model's folder bounds an image


@dataclass(frozen=True)
class Workload:
    """Sizes of a step on one GPU. Answers are all as long as ``answer_tokens``: the most memory and time."""

    prompts: int
    group: int  # answers a prompt
    answer_tokens: int
    text_tokens: int
    images: int  # a prompt
    family: Family
    image: ImageInput  # each of them, without data
    token_budget: int
    samples: bool  # whether answers are sampled here (by a server: elsewhere)
    steps_at_once: int = 1  # whose prompts one rollout serves
    sorts: bool = False  # drawing sorts the whole vocabulary: top-p alone

    @property
    def image_tokens(self) -> int:
        return self.family.tokens(self.image)

    @property
    def prompt_tokens(self) -> int:
        return self.text_tokens + self.images * self.image_tokens

    @property
    def group_tokens(self) -> int:
        return self.prompt_tokens + self.group * self.answer_tokens

    @property
    def groups_per_batch(self) -> int:
        """Groups of a full micro-batch; one where a group alone exceeds the budget."""
        return max(1, min(self.prompts, self.token_budget // self.group_tokens))

    @property
    def micro_batches(self) -> int:
        return math.ceil(self.prompts / self.groups_per_batch)

    @property
    def rows(self) -> int:
        """Answers sampled in a step."""
        return self.prompts * self.group if self.samples else 0

    def fullest_batch(self) -> PackedBatch:
        """The micro-batch with the most tokens the budget allows: what full groups leave is filled with shorter
        answers, as a step with answers of all lengths may bring it about."""
        sizes = self._full_groups
        left = self.token_budget - self.groups_per_batch * self.group_tokens - self.prompt_tokens
        if left >= self.group and self.groups_per_batch < self.prompts:
            sizes.append((min(left // self.group, self.answer_tokens),) * self.group)
        return packed(self.family, self.text_tokens, [self.image] * self.images, sizes)

    def full_batch(self) -> PackedBatch:
        """The micro-batch of as many full groups as the budget allows and nothing else: a step is whole ones of it."""
        return packed(self.family, self.text_tokens, [self.image] * self.images, self._full_groups)

    @property
    def _full_groups(self) -> list[tuple[int, ...]]:
        return [(self.answer_tokens,) * self.group] * self.groups_per_batch

    def prefill_batch(self) -> PackedBatch:
        """The prompts of one prefill call of the rollout, each with one more token."""
        count = max(1, min(self.prompts, PREFILL_TOKENS // self.prompt_tokens))
        return packed(self.family, self.text_tokens, [self.image] * self.images, [(1,)] * count)


def packed(family: Family, text: int, images: Sequence[ImageInput], answers: list[tuple[int, ...]]) -> PackedBatch:
    """A batch of these sizes with nothing in it: pixels on the meta device, token ids that mean nothing.

    Args:
        family: lays the pictures out.
        text: tokens of a prompt beside its images.
        images: pictures of each prompt, without data; in the batch all are different.
        answers: for each group, the tokens of its answers.
    """
    token = family.image_token
    ids = torch.tensor([token] * len(images) + [int(token == 0)] * text, dtype=torch.int64)
    ids, slots, positions = family.lay_out(ids, images)
    groups = []
    for number, lengths in enumerate(answers):
        pictures = tuple(replace(image, key=f"{number}/{i}") for i, image in enumerate(images))
        prompt = Prompt(ids, positions, pictures, slots)
        groups.append(PromptGroup(prompt, [Completion(torch.zeros(n, dtype=torch.int64)) for n in lengths]))
    return pack_row(groups)


def workload_of(
    recipe: Recipe,
    family: Family,
    *,
    image_limit: int | None,
    images: int | None = None,
    image_pixels: int | None = None,
    text_tokens: int = TEXT_TOKENS,
    answer_tokens: int | None = None,
) -> Workload:
    """The step of a recipe.

    Args:
        recipe: read for sizes of rollout, data and micro-batch.
        family: of the model; image_limit: area in pixels that the model's own preprocessor allows.
        images: pictures a prompt (default: the recipe's ``data.frames``, or one).
        image_pixels: area of each after resizing (default: the recipe's largest, else the model's own largest, but at
            most a megapixel).
        text_tokens: of a prompt beside its images.
        answer_tokens: of each answer (default: the longest the recipe allows).

    Raises:
        ValueError: sizes below 1, or an image area above what the recipe allows.
    """
    for name, value, least in (("images", images, 0), ("text tokens", text_tokens, 1), ("answer", answer_tokens, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name}: expected {least} or more, got {value}")
    most = recipe.model.max_pixels or min(image_limit or DEFAULT_PIXELS, DEFAULT_PIXELS)
    if image_pixels is not None and recipe.model.max_pixels is not None and image_pixels > recipe.model.max_pixels:
        raise ValueError(
            f"image pixels: {image_pixels} is over the recipe's model.max_pixels {recipe.model.max_pixels}"
        )
    method = method_for(recipe.method)
    dialogues = recipe.data.spec.startswith("reflection:")
    made = dialogues or recipe.data.spec.startswith("lists:")  # the data brings the answers
    grouped = recipe.scores_groups
    group = recipe.rollout.group_size if grouped else 1
    if made:  # and some baselines learn from one or two of them
        group = method.answers_used(recipe.method, group)
    return Workload(
        prompts=recipe.data.prompts_per_step,
        group=group,
        answer_tokens=answer_tokens
        or (recipe.rollout.max_new_tokens if grouped and not dialogues else DIALOGUE_TOKENS),
        text_tokens=text_tokens,
        images=(recipe.data.frames or 1) if images is None else images,
        family=family,
        image=family.blank(image_pixels or most),
        token_budget=recipe.optim.token_budget,
        samples=grouped and not made and recipe.rollout.backend == "local",
        steps_at_once=method.steps_at_once(recipe.method),
        sorts=recipe.rollout.top_p < 1 and recipe.rollout.top_k == 0,
    )
