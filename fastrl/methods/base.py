"""The interface of a training method: the class the trainer calls, its input and its output."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fastrl.clock import Clock
from fastrl.config.sections import Section
from fastrl_kernels.token_weights import token_weights

if TYPE_CHECKING:
    from fastrl.batch import PackedBatch, PromptGroup
    from fastrl.config.sections import RewardRecipe, RolloutRecipe
    from fastrl.data.records import Record
    from fastrl.data.stream import RecordStream
    from fastrl.models.families import VisionFeatures
    from fastrl.models.kept import KeptPrompts
    from fastrl.models.load import Policy
    from fastrl.rewards.functions import Functions
    from fastrl.rollout import Generator
    from fastrl.rollout.vllm import VllmGenerator
    from fastrl.rollout.vllm_weights import Ranks


class MethodOptions(Section):
    """Base of every method's options: a subclass narrows ``kind`` to a ``Literal`` and adds its own keys."""

    kind: str


def _one_rank(value: float) -> float:
    return value


def _no_updates() -> int:
    return 0


@dataclass
class Context:
    """What a method may use while it prepares a step.

    ``stream`` is the run's data stream (a method that resamples draws from it), ``rng`` the sampler's generator, and
    ``average`` computes the mean of a number over data-parallel ranks (with one rank, the number itself), which share
    rollout servers through ``ranks`` (None: there is one). ``updates`` returns the number of optimizer updates made;
    with ``folder``, where the run writes, it tells a rollout server which weights to load. ``features`` holds vision
    features by image key, shared by all passes of a step if the vision tower is frozen; None: each pass computes its
    own. ``rewards`` are the reward sections of a mixture's parts, by name; ``functions`` the user functions of all
    these sections, None: loaded when needed. ``kept`` gets the passes over sampled prompts from which the update
    trains; None: it computes the prompts again. ``step`` is the number of steps done before this one. ``merge``:
    rollouts and evaluations sample with adapters merged into a copy of the weights.
    """

    policy: Policy
    stream: RecordStream
    rng: torch.Generator
    rollout: RolloutRecipe
    reward: RewardRecipe
    clock: Clock = field(default_factory=Clock)
    average: Callable[[float], float] = _one_rank
    ranks: Ranks | None = None
    updates: Callable[[], int] = _no_updates
    folder: Path = Path()
    features: dict[str, VisionFeatures] | None = None
    rewards: Mapping[str, RewardRecipe] = field(default_factory=dict)
    functions: Functions | None = None
    kept: KeptPrompts | None = None
    step: int = 0
    merge: bool = False

    def keep_only(self, groups: Iterable[PromptGroup]) -> None:
        """Free what the rollout kept of all other prompts: they are not trained."""
        if self.kept is not None:
            self.kept.only(group.prompt for group in groups)

    @cached_property
    def generator(self) -> Generator | VllmGenerator:
        """The generator that ``rollout.backend`` names, created on first use."""
        rollout = self.rollout
        if rollout.backend == "local":
            from fastrl.rollout import Generator

            options = {"decode": rollout.decode, "features": self.features, "merge": self.merge}
            return Generator(self.policy, clock=self.clock, **options)
        from fastrl.rollout.vllm import VllmGenerator

        assert rollout.server is not None  # checked by the recipe
        return VllmGenerator(
            self.policy,
            rollout.server,
            folder=Path(rollout.shared) if rollout.shared is not None else self.folder / "rollout",
            updates=self.updates,
            timeout=rollout.server_timeout,
            clock=self.clock,
            ranks=self.ranks,
        )

    def sync(self) -> None:
        """Push the weights to the rollout servers, if there are any and they have older ones. All ranks call it."""
        if self.rollout.backend == "vllm":
            self.generator.sync()

    def notes(self) -> list[str]:
        """What happened to rollout servers since the last call."""
        return self.generator.take_notes() if self.rollout.backend == "vllm" else []

    def close(self) -> None:
        """Close the generator, which removes weights written for a rollout server."""
        if "generator" in self.__dict__:  # it was created
            self.generator.close()


@dataclass
class Prepared:
    """A step's work, before packing.

    ``groups`` carry gradient; ``sampled`` are all groups of the step, from which reward and length metrics are computed
    (so that dropping groups does not improve them). ``metrics`` are the method's own counts.
    """

    groups: list[PromptGroup]
    sampled: list[PromptGroup]
    metrics: dict[str, float] = field(default_factory=dict)


class Method(ABC):
    """One training method. The trainer calls nothing but these hooks; optional ones have a default here.

    A subclass names its ``Options`` and implements :meth:`prepare` and :meth:`loss`. Names of its helpers must begin
    with an underscore: any other unknown name is an error at registration (``fastrl.methods.register``), which catches
    misspelt hooks.
    """

    Options: ClassVar[type[MethodOptions]]
    samples: ClassVar[bool] = False  # samples groups of answers and scores them, unless the data has answers
    least_group: ClassVar[int] = 1  # smallest number of answers to a prompt that it can learn from
    needs_entropy: ClassVar[bool] = False  # whether the loss gets the entropy of the predicted rows
    keeps_prompts: ClassVar[bool] = False  # whether each step trains on the very prompts of its ``sample_groups``
    adds_overlong: ClassVar[bool] = False  # whether it adds the recipe's ``reward.overlong`` to the rewards
    temperature: float = 1.0  # of the log-probs that the loss gets
    # (hidden [N, H], head weight [V, H], batch, rows, **head) → loss, metrics, log-probs: :meth:`loss` from hidden
    # states, with gradients computed in the forward (optim.row_local_head); None: not supported
    row_local_loss: Callable[..., tuple[Tensor, dict[str, Tensor], Tensor]] | None = None

    def __init__(self, options: Any, context: Context) -> None:
        self.options = options
        self.context = context

    @classmethod
    def reads_reference(cls, options: Any) -> bool:
        """Whether the loss reads ``batch.per_token["ref_logp"]``."""
        return False

    @classmethod
    def row_local_obstacle(cls, options: Any) -> str | None:
        """Why :attr:`row_local_loss` cannot compute the loss of these options, naming their keys; None: it can."""
        return None if cls.row_local_loss is not None else f"method.kind: {options.kind} has no row-local loss"

    @classmethod
    def steps_at_once(cls, options: Any) -> int:
        """Number of steps whose answers are sampled at once."""
        return 1

    @classmethod
    def answers_used(cls, options: Any, given: int) -> int:
        """How many of the ``given`` answers to a prompt the loss reads."""
        return given

    @classmethod
    def misfit(cls, options: Any, record: Record) -> str | None:
        """Why a record of the data cannot be trained on, which makes it a bad row; None: it can."""
        return None

    @classmethod
    def loss_note(cls, options: Any, updates: int) -> str:
        """A note on how to read the logged loss if each batch is used for ``updates`` updates, or ""."""
        return ""

    @abstractmethod
    def prepare(self, records: Sequence[Record]) -> Prepared:
        """Groups with their loss coefficients, from rollouts and rewards or from given lists and dialogues."""

    @abstractmethod
    def loss(self, logp: Tensor, entropy: Tensor | None, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one micro-batch and scalar metrics. A pure function.

        Coefficients are normalised over the whole step, so the losses of its micro-batches add up to the step's loss.
        A metric ending in ``max`` is reduced by maximum, every other one by its mean over predicted tokens.
        """

    def rows(self, batch: PackedBatch) -> Tensor | None:
        """Indices of predicted rows whose coefficient is not zero (None: all); the others skip the head's backward.

        ``batch`` is on the host, so reading its values does not synchronise a device.
        """
        return None

    def state(self) -> dict[str, Any]:
        """State for a checkpoint, besides model, optimizer and data position, as JSON values."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore a :meth:`state` that was not empty."""
        raise NotImplementedError(f"{type(self).__name__} has no state to restore")


def set_token_weights(
    groups: Sequence[PromptGroup],
    *,
    aggregate: str,
    live: Callable[[PromptGroup, int], bool] | None = None,
    length: float | None = None,
    average: Callable[[float], float] = _one_rank,
) -> int:
    """Write ``per_token["weight"]`` of every completion, normalised over all ``groups``; return the number of live
    tokens.

    Args:
        groups: all groups of one optimizer step, so that the split into micro-batches does not matter.
        aggregate: ``sequence``, ``token`` or ``constant`` (see ``fastrl_kernels.token_weights``).
        live: whether completion i of a group counts (default: all). The others get weight 0 and do not count in the
            denominator.
        length: for ``constant``, the divisor of every completion instead of its own length (arXiv:2503.20783).
        average: mean over ranks. Gradients are averaged over ranks, so dividing by the mean denominator amounts to
            dividing by the global one.

    Raises:
        ValueError: ``constant`` without ``length``.
    """
    if aggregate == "constant" and length is None:
        raise ValueError('aggregate "constant" needs length: the number of tokens every completion counts as')
    answers = [(g, i, c) for g in groups for i, c in enumerate(g.completions)]
    alive = [len(c.token_ids) > 0 and (live is None or live(g, i)) for g, i, c in answers]
    lengths = torch.tensor([len(c.token_ids) for _, _, c in answers], dtype=torch.int64)
    tokens = int((lengths * torch.tensor(alive, dtype=torch.int64)).sum()) if answers else 0
    count = {"sequence": sum(alive), "token": tokens, "constant": sum(alive) * (length or 0.0)}[aggregate]
    normalizer = average(float(count))
    owner = torch.repeat_interleave(torch.arange(len(answers)), lengths)
    mask = torch.tensor(alive, dtype=torch.bool)[owner]
    if normalizer > 0:
        weight = token_weights(owner, aggregate=aggregate, mask=mask, normalizer=normalizer).float()  # type: ignore[arg-type]
    else:
        weight = torch.zeros(len(owner))
    for (_, _, completion), part in zip(answers, weight.split(lengths.tolist()), strict=True):
        completion.per_token["weight"] = part
    return tokens


def likelihood_loss(logp: Tensor, weight: Tensor) -> Tensor:
    """Supervised fine-tuning: −Σ weight · log π.

    Args:
        logp: [N] log-probs of answer tokens.
        weight: [N], normalised over the optimizer step (:func:`set_token_weights`).
    """
    return -(weight * logp).sum()
