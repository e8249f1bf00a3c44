"""The calls that loggers get from a small run in two parts: it stops after its first step. Imports no torch."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from PIL import Image

from fastrl.run.loggers import Loggers, RunInfo, make_loggers

ROWS = ({"step": 1, "reward/mean": 0.125}, {"step": 2, "reward/mean": 0.25})
SAMPLES: tuple[dict[str, Any], ...] = (
    {"id": "r1", "question": "a | b", "answer": "[1, 2, 30, 40]\x1b[31m", "reward": 0.5, "rewards": {"iou": 0.5}},
    {"id": "r2", "question": "?", "answer": "", "reward": None, "rewards": {}},
)
SIZE = (40, 30)  # of the picture of the first sample; the second has none


def info(folder: Path, step: int = 0) -> RunInfo:
    """What a logger is told first."""
    return RunInfo("words", folder, "birds", {"optim": {"lr": 0.5}}, step)


def write(name: str, out: Path) -> list[str]:
    """Tell the logger ``name`` of the run; returns the messages about failures."""
    out.mkdir(parents=True, exist_ok=True)
    messages: list[str] = []
    pictures = (Image.new("RGB", SIZE, "red"), None)
    for done in (0, 1):
        loggers = Loggers(make_loggers([name]), info(out, done), messages.append)
        loggers.log(done + 1, ROWS[done])
        if not done:
            loggers.samples(1, lambda: [{**row, "picture": p} for row, p in zip(SAMPLES, pictures, strict=True)])
        loggers.log(done + 1, {"step": done + 1, "eval/f1": 0.5, "best": True})
        loggers.close()
        second = int(time.time())
        while not done and int(time.time()) == second:  # wandb names the folder of each part by the second
            time.sleep(0.05)
    return messages


if __name__ == "__main__":
    sys.exit("\n".join(write(sys.argv[1], Path(sys.argv[2]))) or None)
