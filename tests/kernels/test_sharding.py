"""Sharded heads in two gloo processes: results and gradients equal the unsharded call. The checks are in
``tests/helpers/sharded_worker.py``."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parents[1] / "helpers" / "sharded_worker.py"
pytestmark = pytest.mark.gate

ROWS, HEADS = ("R", "S(0)", "S(1)"), ("R", "S(0)")
NAMES = [f"dtensors, hidden {rows}, head {head}" for rows in ROWS for head in HEADS]
NAMES += [
    node.name
    for node in ast.parse(WORKER.read_text()).body
    if isinstance(node, ast.FunctionDef) and any(getattr(d, "id", "") == "check" for d in node.decorator_list)
]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("ranks")
    ranks = [subprocess.Popen([sys.executable, str(WORKER), str(rank), str(folder)]) for rank in (0, 1)]
    try:
        for process in ranks:
            process.wait(timeout=300)
    finally:
        for process in ranks:
            process.kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_every_check_ran(outcome: list[dict[str, str]]) -> None:
    assert set(outcome[0]) == set(outcome[1]) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_two_processes(name: str, outcome: list[dict[str, str]]) -> None:
    for rank, found in enumerate(outcome):
        assert found.get(name, "did not run") == "", f"rank {rank}: {found.get(name)}"
