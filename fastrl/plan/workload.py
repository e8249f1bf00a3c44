"""Sizes of one step of a recipe: prompts, pictures, answers, and their division into micro-batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from fastrl.batch import Completion, ImageInput, PackedBatch, Prompt, PromptGroup, pack_row
from fastrl.data import brings, own_spec
from fastrl.methods import method_for
from fastrl.methods.rollouts import sampling_of
from fastrl.models.families import Family
from fastrl.recipe import Recipe
from fastrl.rollout import Sampling
from fastrl.rollout.generator import rows_per_prompt
from fastrl.rollout.limits import Limits

TEXT_TOKENS = 128  # of a prompt without its images: system turn, question, markers
DIALOGUE_TOKENS = 1024  # of a dialogue, for methods that train on given dialogues
DEFAULT_PIXELS = 1_000_000  # if neither the recipe nor the model's folder limits an image


@dataclass(frozen=True)
class Workload:
    """Sizes of a step on one GPU. All answers have ``answer_tokens`` tokens, which takes the most memory and time."""

    prompts: int
    group: int  # answers per prompt
    answer_tokens: int
    text_tokens: int
    images: int  # per prompt
    family: Family
    image: ImageInput  # each of the images, without data
    token_budget: int
    sampling: Sampling | None  # None: answers are given or sampled by a server
    steps_at_once: int = 1  # steps whose prompts one rollout samples
    limits: Limits = field(default_factory=Limits)  # the generator's limits

    @property
    def image_tokens(self) -> int:
        return self.family.tokens(self.image)

    @property
    def prompt_tokens(self) -> int:
        return self.text_tokens + self.images * len(self.family.expansion(self.image))

    @property
    def group_tokens(self) -> int:
        return self.prompt_tokens + self.group * self.answer_tokens

    @property
    def groups_per_batch(self) -> int:
        """Groups of a full micro-batch; one if a single group exceeds the budget."""
        return max(1, min(self.prompts, self.token_budget // self.group_tokens))

    @property
    def micro_batches(self) -> int:
        return math.ceil(self.prompts / self.groups_per_batch)

    @property
    def samples(self) -> bool:
        """Whether this process samples answers."""
        return self.sampling is not None

    @property
    def prompts_at_once(self) -> int:
        """Prompts whose answers are decoded together."""
        if self.sampling is None:
            return 0
        lengths = [self.prompt_tokens] * (self.prompts * self.steps_at_once)
        return len(self.limits.chunks(lengths, rows_per_prompt(self.sampling))[0])

    @property
    def rows(self) -> int:
        """Answers sampled in a step."""
        return self.prompts * self.group if self.samples else 0

    def fullest_groups(self) -> list[PromptGroup]:
        """The micro-batch with the most tokens within the budget: full groups, plus a group of shorter answers in the
        remaining tokens, as may occur in a step with answers of different lengths."""
        sizes = self._full_groups
        left = self.token_budget - self.groups_per_batch * self.group_tokens - self.prompt_tokens
        if left >= self.group and self.groups_per_batch < self.prompts:
            sizes.append((min(left // self.group, self.answer_tokens),) * self.group)
        return blank_groups(self.family, self.text_tokens, [self.image] * self.images, sizes)

    def full_groups(self) -> list[PromptGroup]:
        """The micro-batch of as many full groups as the budget allows; a step consists of these."""
        return blank_groups(self.family, self.text_tokens, [self.image] * self.images, self._full_groups)

    @property
    def _full_groups(self) -> list[tuple[int, ...]]:
        return [(self.answer_tokens,) * self.group] * self.groups_per_batch

    def prompt(self) -> Prompt:
        """One of the prompts."""
        return blank_prompts(self.family, self.text_tokens, [self.image] * self.images, 1)[0]

    def chunk(self) -> list[Prompt]:
        """The prompts that the rollout answers together."""
        return blank_prompts(self.family, self.text_tokens, [self.image] * self.images, self.prompts_at_once)


def blank_prompts(family: Family, text: int, images: Sequence[ImageInput], count: int) -> list[Prompt]:
    """``count`` prompts of these sizes (see :func:`packed`) without content."""
    token = family.image_token
    ids = torch.tensor([token] * len(images) + [int(token == 0)] * text, dtype=torch.int64)
    ids, slots, positions = family.lay_out(ids, images)
    return [
        Prompt(ids, positions, tuple(replace(image, key=f"{n}/{i}") for i, image in enumerate(images)), slots)
        for n in range(count)
    ]


def packed(family: Family, text: int, images: Sequence[ImageInput], answers: list[tuple[int, ...]]) -> PackedBatch:
    """``blank_groups`` as one batch."""
    return pack_row(blank_groups(family, text, images, answers))


def blank_groups(
    family: Family, text: int, images: Sequence[ImageInput], answers: list[tuple[int, ...]]
) -> list[PromptGroup]:
    """Groups of these sizes without content: pixels on the meta device, arbitrary token ids.

    Args:
        family: lays out the pictures.
        text: tokens of a prompt without its images.
        images: pictures of each prompt, without data; they count as different pictures in the batch.
        answers: for each group, the lengths of its answers in tokens.
    """
    made = [[Completion(torch.zeros(n, dtype=torch.int64)) for n in lengths] for lengths in answers]
    prompts = blank_prompts(family, text, images, len(made))
    return [PromptGroup(prompt, some) for prompt, some in zip(prompts, made, strict=True)]


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
    """The sizes of a recipe's step.

    Args:
        recipe: gives the sizes of rollout, data and micro-batch.
        family: of the model.
        image_limit: area in pixels that the model's own preprocessor allows.
        images: pictures per prompt (default: the recipe's ``data.frames``, or one).
        image_pixels: area of each after resizing (default: the recipe's largest, else the model's own largest, but at
            most a megapixel).
        text_tokens: of a prompt without its images.
        answer_tokens: of each answer (default: the longest the recipe allows).

    Raises:
        ValueError: a size is below 1, or the image area exceeds the recipe's limit.
    """
    for name, value, least in (("images", images, 0), ("text tokens", text_tokens, 1), ("answer", answer_tokens, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name}: expected {least} or more, got {value}")
    most = recipe.model.max_pixels or min(image_limit or DEFAULT_PIXELS, DEFAULT_PIXELS)
    if image_pixels is not None and recipe.model.max_pixels is not None and image_pixels > recipe.model.max_pixels:
        raise ValueError(
            f"image pixels: {image_pixels} exceeds the recipe's model.max_pixels {recipe.model.max_pixels}"
        )
    method = method_for(recipe.method)
    sources = [recipe.data, *recipe.data.mix]
    brought = {brings(own_spec(source.adapter, source.spec)) for source in sources if source.spec}
    dialogues, given = brought == {"dialogues"}, None not in brought
    grouped = recipe.scores_groups
    group = max(recipe.rollout.group_sizes) if grouped else 1  # the largest needs the most
    if given:  # some baselines train on only one or two of the answers in the data
        group = method.answers_used(recipe.method, group)
    sampled = grouped and not given and recipe.rollout.backend == "local"
    count = (recipe.data.frames or 1) if images is None else images
    return Workload(
        prompts=recipe.data.prompts_per_step,
        group=group,
        answer_tokens=answer_tokens
        or (recipe.rollout.max_new_tokens if grouped and not dialogues else DIALOGUE_TOKENS),
        text_tokens=text_tokens,
        images=count,
        family=family,
        image=family.blank_among(image_pixels or most, count),
        token_budget=recipe.optim.token_budget,
        sampling=sampling_of(recipe.rollout) if sampled else None,
        steps_at_once=method.steps_at_once(recipe.method),
    )
