"""RePer's demo: scene captions in three turns of reflection, on the same held-out scenes before and after training.

The policy captions scenes at eight temperatures, the rule critic scores them against the scenes' truth, dialogues from
bad to good train the policy; then it reflects on scenes it has not seen, with feedback that asks for a better
caption and
tells nothing of the truth.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastrl.build.reper import BuildOptions, build_dialogues
from fastrl.critics import RuleCritic
from fastrl.data import load_data
from fastrl.demo.claims import Claim, falls, rises
from fastrl.evaluate.caption import evaluate_caption
from fastrl.recipe import load_recipe
from fastrl.reflect import reflect
from fastrl.rewards.base import unknown
from fastrl.trainer import load_model, train

if TYPE_CHECKING:
    from fastrl.data.records import Record
    from fastrl.models.load import Policy

HELD_OUT_SEED = 1_000_003
CLAIM = Claim(
    "the third turn's score rises and fewer of its captions state something false, on every seed",
    (rises(by=1e-9), falls("false_captions_")),
)
PICTURES, HELD_OUT, TURNS, MAX_NEW_TOKENS = 512, 256, 3, 64


def run(
    *,
    task: str | None,
    out: Path,
    seed: int,
    say: Callable[[str], None],
    held_out: int = HELD_OUT,
    pictures: int = PICTURES,
    steps: int | None = None,
) -> dict[str, Any]:
    """Measure, build dialogues, train, measure again; writes ``dialogues.jsonl`` and a run folder in ``out``.

    ``before`` and ``after`` are mean scores of the third turn; ``false_captions_*`` the shares of third-turn captions
    that state something false.

    Raises:
        ValueError: an unknown task.
    """
    if task not in (None, "caption"):
        raise ValueError(unknown("demo task", str(task), ("caption",)))
    started = time.perf_counter()
    dialogues = out / "dialogues.jsonl"
    changes: dict[str, Any] = {"out": str(out / "run"), "seed": seed, "data.spec": f"reflection:{dialogues}"}
    if steps is not None:
        changes["optim.steps"] = steps
    recipe = load_recipe("reper-caption-tiny", changes)
    policy = load_model(recipe)
    records = load_data(f"scenes:caption?n={held_out}&seed={HELD_OUT_SEED}&difficulty=2")
    say(f"reflecting on {held_out} held-out scenes before training …")
    before = measure(policy, records)
    say(f"captioning {pictures} scenes at eight temperatures …")
    spec = f"scenes:caption?n={pictures}&seed={seed + 1}&difficulty=2"
    options = BuildOptions(recipe.model.path, spec, "rule", max_new_tokens=MAX_NEW_TOKENS, seed=seed)
    built = build_dialogues(options, dialogues, policy=policy, critic=RuleCritic())
    say(f"training {recipe.optim.steps} steps on {built['kept']} dialogues …")
    train(recipe, policy=policy)
    say("reflecting on the same scenes again …")
    after = measure(policy, records)
    result: dict[str, Any] = {
        "method": "reper",
        "task": "caption",
        "metric": "score",
        "before": before[-1]["score"],
        "after": after[-1]["score"],
        "greedy_before": before[0]["score"],
        "greedy_after": after[0]["score"],
        "false_captions_before": before[-1]["false_captions"],
        "false_captions_after": after[-1]["false_captions"],
        "chair_i_before": before[-1]["chair_i"],
        "chair_i_after": after[-1]["chair_i"],
        "turns_before": before,
        "turns_after": after,
        "dialogues": built["kept"],
        "held_out": held_out,
        "steps": recipe.optim.steps,
        "seed": seed,
        "seconds": time.perf_counter() - started,
        "out": str(out),
    }
    print_table(result)
    return result


def measure(policy: Policy, records: Sequence[Record]) -> list[dict[str, float]]:
    """Caption metrics of each turn of greedy reflection."""
    found = reflect(policy, RuleCritic(), records, turns=TURNS, max_new_tokens=MAX_NEW_TOKENS, portion=128)
    return [evaluate_caption(records, [r.turns[turn].answer for r in found]) for turn in range(TURNS)]


def print_table(result: dict[str, Any]) -> None:
    """The before/after table, on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"reper: {result['held_out']} held-out scenes, greedy captions in {TURNS} turns of reflection")
    for column in ("turn", "score before", "after", "false captions before", "after", "CHAIR-i before", "after"):
        table.add_column(column, justify="right")
    for number, (old, new) in enumerate(zip(result["turns_before"], result["turns_after"], strict=True), start=1):
        pairs = [(old[name], new[name]) for name in ("score", "false_captions", "chair_i")]
        table.add_row(str(number), *(f"{value:.3f}" for pair in pairs for value in pair))
    Console(width=110).print(table)
    print(f"{result['seconds']:.0f} s; dialogues and curves in {result['out']}")
