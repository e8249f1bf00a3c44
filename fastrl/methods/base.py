"""What a training method is: the class the trainer calls, what it is handed, and what it hands back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
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
    from fastrl.models.load import Policy
    from fastrl.rewards.functions import Functions
    from fastrl.rollout import Generator
    from fastrl.rollout.vllm import VllmGenerator


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

    ``stream`` is the data position of the run (a method that resamples draws from it), ``rng`` the sampler's generator,
    and ``average`` the mean of a number over data-parallel ranks (the number itself with one rank). ``updates`` is the
    number of optimizer updates made, and ``folder`` where the run writes: a rollout server is given weights by them.
    ``features`` holds vision features by image key that all passes of a step may share, as nothing of the tower is
    trained; None: each pass computes its own. ``rewards`` are the reward sections of a mixture's parts, by name;
    ``functions`` the user's own of all these sections, None: made when they are needed.
    """

    policy: Policy
    stream: RecordStream
    rng: torch.Generator
    rollout: RolloutRecipe
    reward: RewardRecipe
    clock: Clock = field(default_factory=Clock)
    average: Callable[[float], float] = _one_rank
    updates: Callable[[], int] = _no_updates
    folder: Path = Path()
    features: dict[str, VisionFeatures] | None = None
    rewards: Mapping[str, RewardRecipe] = field(default_factory=dict)
    functions: Functions | None = None

    @cached_property
    def generator(self) -> Generator | VllmGenerator:
        """What samples answers, by ``rollout.backend``; made when it is first asked for."""
        rollout = self.rollout
        if rollout.backend == "local":
            from fastrl.rollout import Generator

            return Generator(self.policy, clock=self.clock, decode=rollout.decode, features=self.features)
        from fastrl.rollout.vllm import VllmGenerator

        assert rollout.server is not None  # the recipe saw to it
        return VllmGenerator(
            self.policy,
            rollout.server,
            folder=Path(rollout.shared) if rollout.shared is not None else self.folder / "rollout",
            updates=self.updates,
            timeout=rollout.server_timeout,
            clock=self.clock,
        )

    def close(self) -> None:
        """Remove what a rollout server was given, if there was one."""
        if "generator" in self.__dict__:  # made when it was first asked for
            self.generator.close()


@dataclass
class Prepared:
    """A step's work, before packing.

    ``groups`` carry gradient; ``sampled`` are all groups the step drew, which is what reward and length metrics
    describe (dropping groups must not flatter them). ``metrics`` are the method's own counts.
    """

    groups: list[PromptGroup]
    sampled: list[PromptGroup]
    metrics: dict[str, float] = field(default_factory=dict)


class Method(ABC):
    """One training method: the trainer's loop calls these and nothing else, and what is optional has its default here.

    A subclass names its ``Options`` and implements :meth:`prepare` and :meth:`loss`; helpers of its own begin with an
    underscore, so that a misspelt hook is an error at registration (``fastrl.methods.register``).
    """

    Options: ClassVar[type[MethodOptions]]
    samples: ClassVar[bool] = False  # unless the data brings answers, samples groups of them, which the reward scores
    least_group: ClassVar[int] = 1  # answers to a prompt that it can learn from
    needs_entropy: ClassVar[bool] = False  # the loss is handed the entropy of the predicted rows
    adds_overlong: ClassVar[bool] = False  # adds the recipe's ``reward.overlong`` to the rewards
    temperature: float = 1.0  # of the log-probs the loss is made of
    # (hidden [N, H], head weight [V, H], batch, rows, **head) → loss, metrics, log-probs: :meth:`loss` from hidden
    # states, gradients made in the forward (optim.row_local_head); None: the method has no such form
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
        """Steps that one sampling serves."""
        return 1

    @classmethod
    def answers_used(cls, options: Any, given: int) -> int:
        """How many of the ``given`` answers to a prompt the loss reads."""
        return given

    @abstractmethod
    def prepare(self, records: Sequence[Record]) -> Prepared:
        """Rollouts, rewards and advantages, or ready-made lists and dialogues, as groups with their coefficients."""

    @abstractmethod
    def loss(self, logp: Tensor, entropy: Tensor | None, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Pure: the loss of one micro-batch and scalar metrics.

        Losses of the micro-batches of a step add up to the step's loss: coefficients are normalised over the whole
        step. A metric ending in ``max`` is reduced by maximum, every other one by its mean over predicted tokens.
        """

    def rows(self, batch: PackedBatch) -> Tensor | None:
        """Indices of predicted rows whose coefficient is not zero (None: all); the rest skip the head's backward.

        ``batch`` is on the host, so looking at its values waits for nothing.
        """
        return None

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to hold for the next step beside model, optimizer and data position: JSON values."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state` that was not empty."""
        raise NotImplementedError(f"{type(self).__name__} keeps no state")


def set_token_weights(
    groups: Sequence[PromptGroup],
    *,
    aggregate: str,
    live: Callable[[PromptGroup, int], bool] | None = None,
    length: float | None = None,
    average: Callable[[float], float] = _one_rank,
) -> int:
    """Write ``per_token["weight"]`` of every completion, normalised over all of ``groups`` together; return the live
    tokens.

    Args:
        groups: all groups of one optimizer step, so that the split into micro-batches changes nothing.
        aggregate: ``sequence``, ``token`` or ``constant`` (see ``fastrl_kernels.token_weights``).
        live: whether completion i of a group counts (default: all). A dead completion weighs 0 and is not in the
            denominator.
        length: for ``constant``, the tokens every completion counts as, whatever its length (arXiv:2503.20783).
        average: mean over ranks; gradients are averaged over ranks, so dividing by the mean denominator divides by the
            global one.

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
