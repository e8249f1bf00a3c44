"""Train on a reward of your own, from Python: a function in a file, named in the recipe.

A function is called with all answers of a step and returns a number for each, as TRL's reward functions do. Here it
pays for boxes that are wide; the task's own reward (overlap with the true box, and the form of the answer) is kept. On
the command line: ``--set reward.function=examples/own_reward.py:wide``. Runs on a CPU in less than a minute::

    python examples/own_reward.py
"""

from __future__ import annotations

import tempfile

from fastrl import load_recipe, train
from fastrl.answers import parse_boxes

STEPS = 5


def wide(completions: list[list[dict[str, str]]], **_: object) -> list[float]:
    """1 for an answer whose first box is wider than high, else 0. Further arguments: docs/extend-reward.md."""
    scores = []
    for completion in completions:
        boxes = parse_boxes(completion[0]["content"]).items
        coords = boxes[0].coords if boxes else ()
        scores.append(float(len(coords) == 4 and coords[2] - coords[0] > coords[3] - coords[1]))
    return scores


class Watch:
    """Keeps what each step says of the function's values; any object with such a method is taken."""

    def __init__(self) -> None:
        self.means: list[float] = []

    def on_step(self, row: dict[str, float]) -> None:
        self.means.append(row["reward/wide"])


def main() -> list[float]:
    """Train a few steps; returns the mean of the function's values in each."""
    watch = Watch()
    with tempfile.TemporaryDirectory() as out:
        recipe = load_recipe(
            "perception-r1-grounding-tiny",
            {
                "out": f"{out}/run",
                "reward.function": f"{__file__}:wide",
                "reward.weights.wide": 2.0,
                "optim.steps": STEPS,
                "data.prompts_per_step": 8,
                "rollout.group_size": 6,
                "log.samples_every": 0,
                "checkpoint.final": False,
            },
        )
        train(recipe, callbacks=[watch], show=False)
    print("answers with a wide box, step by step:", ", ".join(f"{mean:.2f}" for mean in watch.means))
    return watch.means


if __name__ == "__main__":
    main()
