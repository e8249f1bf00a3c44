"""A run's logs: cut back to a step, no row lost silently, each write complete or absent."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastrl.run.logs import Appended, cut_rows, read_rows
from fastrl.run.metrics import MetricsLog
from fastrl.run.samples import Sample
from tests.helpers.disk import file_size_limit

BAD = (b"not json", b"[1]", b"null", b"3", b"{}", b'{"step": "1"}', b'{"step": 1.0}', b'{"step": true}', b'{"st')
BAD += (b'{"step": 1e999}', b"[" * 100_000, b'{"step": 1} {"step": 2}', b"\xff\xfe", b"\0\0\0")


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_a_line_that_is_no_row_is_set_aside_and_no_row_is_lost(tmp_path: Path, bad: bytes, place: int) -> None:
    lines = [b'{"step": 1}', b'{"step": 2}', b'{"step": 3}']
    lines.insert(place, bad)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    message = str(cut_rows(path, 2))
    assert [row["step"] for row in read_rows(path)] == [1, 2]
    assert (tmp_path / "metrics.jsonl.bad").read_bytes() == bad + b"\n"
    assert "1 row of steps that are done again cut from metrics.jsonl" in message
    assert f"1 line of metrics.jsonl that cannot be read as a row set aside in {path}.bad" in message
    assert str(cut_rows(path, 2)) == ""
    path.write_bytes(bad)
    cut_rows(path, 2)
    assert (tmp_path / "metrics.jsonl.bad").read_bytes() == 2 * (bad + b"\n")  # all rows that were set aside
    assert read_rows(path) == []


@given(steps=st.lists(st.integers(0, 9), max_size=8), step=st.integers(0, 9), newline=st.booleans())
def test_rows_up_to_the_step_stay_in_their_order(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], step: int, newline: bool
) -> None:
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    path.write_text("\n".join(json.dumps({"step": s}) for s in steps) + ("\n" if newline else ""))
    cut = cut_rows(path, step)
    assert [row["step"] for row in read_rows(path)] == [s for s in steps if s <= step]
    assert (cut.later, cut.unreadable) == (sum(s > step for s in steps), 0)
    assert not cut.bad.exists()


def test_a_log_that_is_not_there(tmp_path: Path) -> None:
    assert str(cut_rows(tmp_path / "metrics.jsonl", 3)) == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "eval.jsonl", "notes.jsonl"])
def test_a_full_disk_names_the_log_and_the_bytes(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to("/dev/full")
    log = MetricsLog(tmp_path)

    def write() -> None:
        log.write({"step": 1})
        log.samples(1, [Sample({}, None)])
        log.evaluation({"step": 1})
        log.note(1, "text")

    with pytest.raises(OSError, match=r"No space left on device \(needs \d\d bytes, [\d,]+ are free\)") as error:
        write()
    assert error.value.filename == str(tmp_path / name)
    log.close()


def test_half_a_piece_is_taken_back(tmp_path: Path) -> None:
    log = Appended(tmp_path / "metrics.jsonl")
    log.write('{"step": 1}\n')
    with file_size_limit(20), pytest.raises(OSError, match=r"metrics\.jsonl"):
        log.write('{"step": 2, "loss": 0.25}\n')
    assert log.path.read_text() == '{"step": 1}\n'
    log.write('{"step": 2}\n')
    assert [row["step"] for row in read_rows(log.path)] == [1, 2]
