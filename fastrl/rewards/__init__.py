"""Rewards for perception answers, one file per task.

``reward = reward_for("grounding", metric="iou_squared")`` gives a callable: ``reward(answers, record)`` returns named
components, one value per answer, and ``reward.total(components)`` their weighted sum. The same object can be given to
TRL's ``GRPOTrainer(reward_funcs=reward)`` and called as verl calls ``compute_score``; ``grounding_reward``,
``counting_reward``, ``detection_reward``, ``ocr_reward`` and ``trajectory_reward`` are ready-made with the defaults.
"""

from __future__ import annotations

from typing import Any

from fastrl.rewards.base import Components, Reward, total, unknown
from fastrl.rewards.counting import CountingReward
from fastrl.rewards.detection import DetectionReward
from fastrl.rewards.grounding import GroundingReward
from fastrl.rewards.ocr import OcrReward
from fastrl.rewards.trajectory import TrajectoryReward

REWARDS: dict[str, type[Reward]] = {
    cls.task: cls for cls in (GroundingReward, CountingReward, DetectionReward, OcrReward, TrajectoryReward)
}


def reward_for(task: str, **options: Any) -> Reward:
    """The reward of ``task`` (grounding, counting, detection, ocr, trajectory) with ``options`` (its class's fields).

    Raises:
        ValueError: an unknown task, option or value of an option; the message names the nearest valid one.
    """
    if task not in REWARDS:
        raise ValueError(unknown("task for a reward", task, REWARDS))
    cls = REWARDS[task]
    for name in options:
        if name not in cls.options():
            raise ValueError(f"{task} reward: " + unknown("option", name, cls.options()))
    return cls(**options)


grounding_reward, counting_reward, detection_reward, ocr_reward, trajectory_reward = map(reward_for, REWARDS)

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
    "reward_for",
    "total",
    "trajectory_reward",
]
