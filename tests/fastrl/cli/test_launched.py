"""Two processes under torchrun: an error of one while it sets up ends both, and is shown."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.gloo import REPO

# Each rank in a folder of its own, so that one may lack a file.
SCRIPT = """
import os, sys
from fastrl.cli.main import main
os.chdir(os.environ["RANK"])
sys.argv = ["fastrl", *sys.argv[1:]]
main()
"""
REWARD = "def score(completions, **columns):\n    return [float(len(text)) for text in completions]\n"
SETTINGS = {
    "reward.function": "mine.py:score",
    "reward.completions": "text",
    "engine.kind": "fsdp2",
    "optim.states": "fp32",
    "optim.steps": 1,
    "data.spec": "scenes:counting?n=64&seed=1&difficulty=2&size=84",
    "data.prompts_per_step": 2,
    "rollout.group_size": 2,
    "rollout.max_new_tokens": 4,
}


@pytest.mark.gate
@pytest.mark.parametrize("having", [(0, 1), (0,), (1,)])
def test_an_error_while_one_rank_sets_up_ends_all(tmp_path: Path, having: tuple[int, ...]) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        if rank in having:
            (tmp_path / str(rank) / "mine.py").write_text(REWARD)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)),
        *(str(tmp_path / "script.py"), "train", "perception-r1-counting-tiny", "--out", str(tmp_path / "run")),
        *(part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}")),
    ]
    path = os.pathsep.join([str(REPO), str(REPO / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,  # a rank that is not told waits for engine.timeout, half an hour
    )
    ended = (tmp_path / "run" / "checkpoints").is_dir()
    if len(having) == 2:
        assert done.returncode == 0, done.stderr[-3000:]
        assert ended
    else:
        assert done.returncode == 1
        assert not ended
        assert "error: reward.function" in done.stderr
        assert "mine.py" in done.stderr
