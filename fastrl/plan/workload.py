"""What one step of a recipe works on: prompts, pictures, answers, and how they fall into micro-batches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fastrl.batch import Completion, ImageInput, PackedBatch, Prompt, PromptGroup, pack_row
from fastrl.methods import method_for
from fastrl.models.positions import image_tokens, mrope_positions
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
    grid: tuple[int, int, int]  # of each, in patches
    merge: int
    token_budget: int
    samples: bool  # whether answers are sampled here (by a server: elsewhere)
    steps_at_once: int = 1  # whose prompts one rollout serves
    sorts: bool = False  # drawing sorts the whole vocabulary: top-p alone

    @property
    def image_tokens(self) -> int:
        return image_tokens(self.grid, self.merge)

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
        return packed(self.text_tokens, self.images, self.grid, self.merge, sizes)

    def full_batch(self) -> PackedBatch:
        """The micro-batch of as many full groups as the budget allows and nothing else: a step is whole ones of it."""
        return packed(self.text_tokens, self.images, self.grid, self.merge, self._full_groups)

    @property
    def _full_groups(self) -> list[tuple[int, ...]]:
        return [(self.answer_tokens,) * self.group] * self.groups_per_batch

    def prefill_batch(self) -> PackedBatch:
        """The prompts of one prefill call of the rollout, each with one more token."""
        count = max(1, min(self.prompts, PREFILL_TOKENS // self.prompt_tokens))
        return packed(self.text_tokens, self.images, self.grid, self.merge, [(1,)] * count)


def packed(
    text: int, images: int, grid: tuple[int, int, int], merge: int, answers: list[tuple[int, ...]]
) -> PackedBatch:
    """A batch of these sizes with nothing in it: pixels on the meta device, token ids 0.

    Args:
        text: tokens of a prompt beside its images.
        images: pictures of each prompt, all different.
        grid: patches (t, h, w) of each; merge: patches to a token along one side.
        answers: for each group, the tokens of its answers.
    """
    run = image_tokens(grid, merge)
    slots = tuple((i * run, run) for i in range(images))
    length = text + images * run
    positions = mrope_positions(length, slots, [grid] * images, merge)
    patch = torch.empty(math.prod(grid), 0, device="meta")
    groups = []
    for number, lengths in enumerate(answers):
        pictures = tuple(ImageInput(patch, grid, f"{number}/{i}") for i in range(images))
        prompt = Prompt(torch.zeros(length, dtype=torch.int64), positions, pictures, slots)
        groups.append(PromptGroup(prompt, [Completion(torch.zeros(n, dtype=torch.int64)) for n in lengths]))
    return pack_row(groups)


def workload_of(
    recipe: Recipe,
    vision: dict,
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
        vision: the model's vision config; image_limit: area in pixels that the model's own preprocessor allows.
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
    unit = int(vision["patch_size"]) * int(vision["spatial_merge_size"])
    side = max(1, math.isqrt(image_pixels or most) // unit) * int(vision["spatial_merge_size"])
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
        grid=(1, side, side),
        merge=int(vision["spatial_merge_size"]),
        token_budget=recipe.optim.token_budget,
        samples=grouped and not made and recipe.rollout.backend == "local",
        steps_at_once=method.steps_at_once(recipe.method),
        sorts=recipe.rollout.top_p < 1 and recipe.rollout.top_k == 0,
    )
