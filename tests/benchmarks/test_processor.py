"""Processor time: contestants take turns, and the printed ratios are those of the rounds."""

from __future__ import annotations

import time

import pytest

from benchmarks.processor import clock, line, main


def test_ratios_are_of_each_round() -> None:
    printed = line("case", "peer", [1e-3, 2e-3, 4e-3], [2e-3, 2e-3, 2e-3])
    assert printed == "| case | peer | 2.000 | 2.000 | 1.00 | 0.75 to 1.50 | 0.50 to 2.00 |"


def test_clock_is_of_the_thread_only_where_it_alone_computes() -> None:
    assert clock(1) is time.thread_time
    assert clock(2) is time.process_time


def test_prints_a_row_per_peer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "listwise", "--size", "tiny", "--rounds", "2"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert sum(row.startswith("| listwise_loss/") for row in rows) == 2


def test_unknown_case_is_refused() -> None:
    with pytest.raises(SystemExit):
        main(["--only", "nothing of this name"])
