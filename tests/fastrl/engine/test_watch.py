"""A rank that is frozen, slow or gone: the others stop after engine.timeout and name the rank they waited for."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fastrl.engine.watch import EXIT, Watch
from fastrl.run import keeping
from tests.helpers.gloo import start


class Rank:
    """A watch that records the end of the process instead of ending it."""

    def __init__(self, folder: Path, rank: int, world_size: int = 2, timeout: float = 0.4) -> None:
        self.messages: list[str] = []
        self.over = threading.Event()
        self.watch = Watch(folder, rank, world_size, timeout, stop=self.stop)

    def stop(self, text: str) -> None:
        self.messages.append(text)
        self.over.set()

    def wait(self, what: str = "a barrier") -> None:
        """As in a collective that no rank completes."""
        with self.watch.waiting(what):
            assert self.over.wait(60)


def test_whoever_waits_too_long_names_the_rank_that_has_not_come(tmp_path: Path) -> None:
    ranks = [Rank(tmp_path, rank, 3) for rank in range(3)]
    for rank in ranks:
        with rank.watch.waiting("an update"):
            pass
    waiting = [threading.Thread(target=rank.wait) for rank in (ranks[0], ranks[2])]
    for thread in waiting:
        thread.start()
    for thread in waiting:
        thread.join()
    for rank, number in ((ranks[0], 0), (ranks[2], 2)):
        (message,) = rank.messages
        assert message.startswith(f"rank {number} waited ")
        assert "in a barrier for rank 1 (alive, has not come; last an update)" in message
    assert ranks[1].messages == []
    for rank in ranks:
        rank.watch.close()
    assert not list(tmp_path.iterdir())


def test_a_rank_without_a_sign_of_life_is_said_to_have_none(tmp_path: Path) -> None:
    (tmp_path / "rank-1.json").write_text('[7, 3, "an update"]')  # further ahead than this rank, and then silent
    (tmp_path / "rank-2.json").write_text("{broken")
    first = Rank(tmp_path, 0, 3)
    first.wait()
    assert "rank 2 (frozen or gone" in first.messages[0]
    (tmp_path / "rank-2.json").write_text('[9, 3, "an update"]')
    second = Rank(tmp_path, 0, 3)
    second.wait()
    assert "rank 1 (frozen or gone: no sign of life" in second.messages[0]
    assert "rank 2 (frozen or gone" in second.messages[0]


def test_a_rank_that_ends_with_an_error_ends_those_that_wait_for_it(tmp_path: Path) -> None:
    ranks = [Rank(tmp_path, rank, timeout=20.0) for rank in range(2)]
    for rank in ranks:
        with rank.watch.waiting("an update"):
            pass
    began = time.monotonic()
    ranks[1].watch.abandon("step 3: r2.png: gone")
    ranks[0].wait()
    assert time.monotonic() - began < 20.0  # before the timeout
    assert ranks[0].messages == ["rank 0 waited in a barrier for rank 1, which ended with: step 3: r2.png: gone"]
    assert ranks[1].messages == []


def test_an_error_that_all_ranks_have_is_each_ranks_own(tmp_path: Path) -> None:
    """It came out of a wait that both have entered."""
    ranks = [Rank(tmp_path, rank, timeout=4.0) for rank in range(2)]
    with ranks[0].watch.waiting("an update"):
        with ranks[1].watch.waiting("an update"):
            pass
        ranks[1].watch.abandon("not finite")
        time.sleep(1.5)  # three looks
    assert ranks[0].messages == []
    ranks[0].watch.close()
    ranks[1].watch.forget()
    assert not list(tmp_path.iterdir())


def test_work_may_take_as_long_as_it_likes_and_so_may_many_short_waits(tmp_path: Path) -> None:
    rank = Rank(tmp_path, 0, timeout=0.3)
    until = time.monotonic() + 1.0
    while time.monotonic() < until:
        with rank.watch.waiting("an update"):
            time.sleep(0.05)
        time.sleep(0.05)
    time.sleep(0.5)
    assert rank.messages == []
    rank.watch.close()


def test_one_process_watches_nothing(tmp_path: Path) -> None:
    watch = Watch(tmp_path, 0, 1, 0.05)
    with watch.waiting("a barrier"):
        time.sleep(0.2)
    watch.close()
    assert not list(tmp_path.iterdir())


RUN = """
import os, signal, sys
from pathlib import Path
import fastrl.trainer
from fastrl.engine.ranks import leave
from fastrl.trainer import train
from tests.helpers.gloo import GlooEngine
from tests.helpers.training import make_records, make_recipe

model, out, timeout, how = sys.argv[1:5]
fastrl.trainer.make_engine = GlooEngine
engine = {"kind": "deepspeed", "timeout": float(timeout)}  # as every engine of several processes
changes = {"data__prompts_per_step": 1, "checkpoint__every": 1, "optim__steps": 3}
recipe = make_recipe(Path(model), Path(out), engine=engine, **changes)

def freeze(row):
    if os.environ["RANK"] == "1" and row["step"] == 2 and how != "whole":
        os.kill(os.getpid(), signal.SIGSTOP if how == "frozen" else signal.SIGKILL)

try:
    train(recipe, records=make_records(), resume=how == "whole", on_step=freeze, show=False)
except RuntimeError as error:
    assert type(error).__module__.startswith("fastrl"), error  # which the command makes one line
    print(f"error: {error}", file=sys.stderr)
    leave(1)
"""


MEET = """
import os, signal, sys
from pathlib import Path
import torch, torch.distributed as dist
from fastrl.engine.ranks import LostRank, Ranks, leave
from fastrl.engine.watch import Watch

out, timeout, how = sys.argv[1:4]
dist.init_process_group("gloo")
ranks = Ranks(Watch(Path(out), dist.get_rank(), 2, float(timeout)), torch.device("cpu"))
assert ranks.gather(ranks.rank) == [0, 1]
assert (ranks.average(ranks.rank), ranks.maximum(ranks.rank)) == (0.5, 1.0)
if ranks.rank == 1:
    os.kill(os.getpid(), signal.SIGSTOP if how == "frozen" else signal.SIGKILL)
try:
    ranks.barrier()
except LostRank as error:
    print(f"error: {error}", file=sys.stderr)
    leave(1)
"""


@pytest.mark.parametrize(("how", "code"), [("frozen", EXIT), ("killed", 1)])
def test_a_process_that_is_frozen_or_gone_is_named(tmp_path: Path, how: str, code: int) -> None:
    first, second = start(MEET, tmp_path, tmp_path / "ranks", 3 if how == "frozen" else 600, how)
    try:
        _, message = first.communicate(timeout=300)
    finally:
        os.kill(second.pid, signal.SIGKILL)
        second.communicate()
    assert first.returncode == code, message
    if how == "frozen":
        assert "in a barrier for rank 1 (" in message
        assert "stopping (engine.timeout). Go on with --resume" in message
    else:
        assert "error: rank 0 lost another in a barrier" in message


@pytest.mark.gate
def test_a_run_of_two_processes_stops_for_a_frozen_one_and_goes_on_later(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    first, second = start(RUN, tmp_path, tiny_folder("qwen2_5"), out, 20, "frozen")
    try:
        _, message = first.communicate(timeout=300)
    finally:
        os.kill(second.pid, signal.SIGKILL)
        second.communicate()
    assert first.returncode == EXIT, message
    assert "error: rank 0 waited 2" in message
    assert "for rank 1 (" in message
    assert "stopping (engine.timeout). Go on with --resume" in message
    assert [path.name for path in keeping.list_checkpoints(out)] == ["step-00000001"]
    for process in start(RUN, tmp_path, tiny_folder("qwen2_5"), out, 600, "whole"):
        _, message = process.communicate(timeout=300)
        assert process.returncode == 0, message
    assert keeping.list_checkpoints(out)[-1].name == "step-00000003"
    assert not list((out / ".ranks").iterdir())


@pytest.mark.gate
def test_a_process_that_is_gone_is_one_line(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    first, second = start(RUN, tmp_path, tiny_folder("qwen2_5"), tmp_path / "run", 600, "killed")
    _, message = first.communicate(timeout=300)
    second.communicate()
    assert first.returncode == 1, message
    assert "error: rank 0 lost another in " in message
    assert "Traceback" not in message
