"""Rewards for perception answers, one file per task.

``reward = reward_for("grounding", metric="iou_squared")`` gives a callable: ``reward(answers, record)`` returns named
components, one value per answer, and ``reward.total(components)`` their weighted sum. The same object can be given to
TRL's ``GRPOTrainer(reward_funcs=reward)`` and called as verl calls ``compute_score``; ``grounding_reward``,
``counting_reward``, ``detection_reward``, ``ocr_reward`` and ``trajectory_reward`` are ready-made with the defaults.
"""

from __future__ import annotations

from typing import Any, TypeVar

from fastrl.config.contract import faults
from fastrl.config.registry import Registry
from fastrl.rewards.base import Components, Reward, total, unknown
from fastrl.rewards.counting import CountingReward
from fastrl.rewards.detection import DetectionReward
from fastrl.rewards.grounding import GroundingReward
from fastrl.rewards.ocr import OcrReward
from fastrl.rewards.trajectory import TrajectoryReward

REWARDS: Registry[type[Reward]] = Registry("reward of task")
R = TypeVar("R", bound=type[Reward])


def register(task: str, reward: R) -> R:
    """Register the reward that scores records of ``task``.

    Args:
        task: the value of ``Record.task``.
        reward: a subclass of ``Reward``, a frozen dataclass whose fields are its options. If it sets no ``task``, it
            gets this one.

    Raises:
        TypeError: not such a class, or an attribute or hook is missing, misspelt or of the wrong kind.
        ValueError: another reward has that task.
    """
    found = _faults(reward)
    if found:
        raise TypeError(f"{reward!r}: " + "; ".join(found))
    REWARDS.add(task, reward)
    if not reward.task:
        reward.task = task
    return reward


def _faults(reward: type[Reward]) -> list[str]:
    """Reasons why a class is not a valid reward."""
    if not (isinstance(reward, type) and issubclass(reward, Reward)):
        return faults(reward, Reward)
    found = faults(reward, Reward, own=reward.options())
    undeclared = [name for name in vars(reward).get("__annotations__", ()) if name not in reward.options()]
    undeclared = [name for name in undeclared if name not in Reward.__annotations__]
    if undeclared:
        found.append(f"{', '.join(undeclared)}: options need @dataclass(frozen=True, kw_only=True) on the class")
    if reward.score is Reward.score:
        found.append("score is missing")
    if not reward.parts:
        found.append("parts must name the components that score returns")
    return found


for _reward in (GroundingReward, CountingReward, DetectionReward, OcrReward, TrajectoryReward):
    register(_reward.task, _reward)


def reward_for(task: str, **options: Any) -> Reward:
    """The reward of ``task`` (grounding, counting, detection, ocr, trajectory, or one that was registered).

    ``options`` are fields of its class.

    Raises:
        ValueError: a task, option or value is unknown; the message names the nearest valid one.
    """
    if task not in REWARDS:
        raise ValueError(unknown("task for a reward", task, REWARDS))
    cls = REWARDS[task]
    for name in options:
        if name not in cls.options():
            raise ValueError(f"{task} reward: " + unknown("option", name, cls.options()))
    return cls(**options)


grounding_reward, counting_reward, detection_reward, ocr_reward, trajectory_reward = map(reward_for, list(REWARDS))

__all__ = [
    "REWARDS",
    "Components",
    "CountingReward",
    "DetectionReward",
    "GroundingReward",
    "OcrReward",
    "Reward",
    "TrajectoryReward",
    "counting_reward",
    "detection_reward",
    "grounding_reward",
    "ocr_reward",
    "register",
    "reward_for",
    "total",
    "trajectory_reward",
]
