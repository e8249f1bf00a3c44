"""What a recipe names, opened for a run: its records and their order, its model, its seeds and its device."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastrl.data.balance import Balance
from fastrl.data.decodable_stream import DecodableStream
from fastrl.data.difficulty import read_scores
from fastrl.data.mixture import Curriculum, Mixture, MixturePlan, listed, parts_of
from fastrl.data.records import Record
from fastrl.data.stream import RecordStream
from fastrl.methods import method_for
from fastrl.methods.rollouts import RecipeRewards
from fastrl.recipe import Recipe, load_records

if TYPE_CHECKING:
    from fastrl.models.load import Policy
    from fastrl.rewards.functions import Functions


def scorable_records(recipe: Recipe, functions: Functions | None) -> Sequence[Record]:
    """The recipe's records; a row that its rewards cannot score or its method cannot learn is a bad row. Raises
    ``DataError``."""
    method = method_for(recipe.method)
    if functions is None:
        return load_records(recipe, misfit=lambda record: method.misfit(recipe.method, record))
    rewards = RecipeRewards(recipe.reward, recipe.mix_rewards, functions=functions)
    return load_records(recipe, misfit=lambda r: method.misfit(recipe.method, r) or rewards.misfit(r))


def check_tasks(recipe: Recipe, data: Sequence[Record], functions: Functions) -> None:
    """Raise ``ValueError`` if the recipe's reward does not match the data's task, before a model is loaded."""
    rewards = RecipeRewards(recipe.reward, recipe.mix_rewards, functions=functions)
    parts = map(data.part_of, range(len(data.parts))) if isinstance(data, Mixture) else [range(len(data))]
    firsts = [data[part[0]] for part in parts if part]
    rewards.check([record for record in firsts if "list" not in record.target])


def make_stream(
    recipe: Recipe,
    data: Sequence[Record],
    *,
    rank: int,
    world_size: int,
    work: Callable[[Record], float] | None = None,
) -> RecordStream:
    """The records in the order in which a rank takes them; ``work``: of one, by which ranks share those of a step."""
    make = DecodableStream if recipe.data.skip_bad else RecordStream
    seed = recipe.seed if recipe.data.seed is None else recipe.data.seed
    count = recipe.data.prompts_per_step
    return make(
        data,
        seed=seed,
        order=recipe.data.order,
        buffer=recipe.data.shuffle_buffer,
        plan=_plan(recipe, data, seed, world_size),
        rank=rank,
        world_size=world_size,
        pictures=recipe.data.identity,
        balance=Balance(count, work) if work is not None and count > 1 and listed(data) else None,
    )


def _plan(recipe: Recipe, data: Sequence[Record], seed: int, world_size: int) -> Callable[[int], list[int]] | None:
    """The draws of a mixture, or of one data set with a curriculum; None: records are drawn in the data's order."""
    settings = recipe.data
    if not settings.mix and settings.curriculum is None:
        return None
    found, curriculum = settings.curriculum, None
    if found is not None:
        scores = read_scores(Path(found.scores), found.by) if found.scores is not None else None
        curriculum = Curriculum(found.by, found.steps, found.start, scores)
    made = MixturePlan(
        parts_of(data),
        seed=seed,
        step=settings.prompts_per_step * world_size,
        by=settings.mix_by,
        order=settings.order,
        buffer=settings.shuffle_buffer,
        curriculum=curriculum,
    )
    return made.epoch


def load_model(recipe: Recipe) -> Policy:
    """The policy that a recipe names. Seeds the global generators: new adapters depend on ``recipe.seed`` alone."""
    from fastrl.models.open import open_policy

    seed_generators(recipe.seed)
    model = recipe.model
    return open_policy(
        model.path,
        dtype=None if model.dtype == "auto" else getattr(torch, model.dtype),
        device=model.device,
        lora=model.lora.spec() if model.lora is not None else None,
        freeze=model.freeze,
        gradient_checkpointing=model.gradient_checkpointing if model.gradient_checkpointing != "auto" else False,
        checkpointed_layers=model.checkpointed_layers,
        offload_activations=model.offload_activations,
        liger=model.liger,
        quantize=model.quantize,
        min_pixels=model.min_pixels,
        max_pixels=model.max_pixels,
    )


def seed_generators(seed: int) -> None:
    """Seed the global generators of Python, numpy and torch."""
    import random

    import numpy as np

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def is_first_rank(recipe: Recipe) -> bool:
    """Whether this process writes the run's files."""
    return recipe.engine.kind == "local" or os.environ.get("RANK", "0") == "0"  # set by the launcher


def ranks_of(recipe: Recipe) -> int:
    """Data-parallel processes of the run."""
    return 1 if recipe.engine.kind == "local" else int(os.environ.get("WORLD_SIZE", "1"))  # set by the launcher


def use_own_device(recipe: Recipe) -> None:
    """Make the GPU that the launcher gave this process its current one."""
    if recipe.engine.kind != "local" and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))  # set by the launcher
