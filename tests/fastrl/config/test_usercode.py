"""User files and modules: where they are searched, and the errors for those that cannot be used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastrl.config.usercode import UserCodeError, load_function, same_folder, where_it_raised

PRINT = "from fastrl.config.usercode import load_function; print(load_function({!r})())"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


@pytest.mark.parametrize("name", ["with space/mine.py:f", "owned.mine:f", "owned/lazy.py:f", "queue_beside/mine.py:f"])
def test_found_as_the_installed_command_looks_for_it(tmp_path: Path, name: str) -> None:
    for place in ("with space", "owned", "queue_beside"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "helper_of_mine.py").write_text("def one():\n    return 'found'\n")
        (tmp_path / place / "mine.py").write_text("import helper_of_mine\nf = lambda: helper_of_mine.one()\n")
    (tmp_path / "owned/__init__.py").write_text("")
    (tmp_path / "owned/mine.py").write_text("from .helper_of_mine import one as f\n")
    (tmp_path / "owned/lazy.py").write_text("def f():\n    import helper_of_mine\n    return helper_of_mine.one()\n")
    (tmp_path / "queue_beside/queue.py").write_text("raise RuntimeError('hides the standard library')\n")
    (tmp_path / "queue_beside/mine.py").write_text("import queue\nf = lambda: queue.Queue and 'found'\n")
    code = PRINT.format(name)
    command = [sys.executable, "-P", "-c", code]  # -P: without the working folder in sys.path, as installed
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.stdout == "found\n", ran.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(:\n", r"mine.py cannot be run: \S*mine.py:1: SyntaxError"),
        ("\nimport sys\nsys.exit(3)\n", r"mine.py:3: in <module>: SystemExit: 3"),
        ("import json\njson.loads('{')\n", r"mine.py:2: in <module>: JSONDecodeError"),
        ("from .other import f\n", r"mine.py:1: .*relative import.*name it package.module:function"),
        ("import os\nos.chdir('..')\n", r"mine.py cannot be run: changes the working folder to .*; the run's paths"),
        ("g = f = 3\n", r"mine.py has no function 'f'; it has none"),
    ],
)
def test_what_is_wrong_with_a_file(folder: Path, text: str, message: str) -> None:
    (folder / "mine.py").write_text(text)
    with pytest.raises(UserCodeError, match=message):
        load_function("mine.py:f")
    assert Path.cwd() == folder
    (folder / "mine.py").write_text("def f():\n    return 1\n\n# a longer file\n")
    assert load_function("mine.py:f")() == 1  # corrected, in the same process


def test_a_file_is_run_once_and_again_when_it_was_changed(folder: Path) -> None:
    (folder / "mine.py").write_text("calls = []\ndef f():\n    calls.append(1)\n    return len(calls)\n")
    assert [load_function("mine.py:f")(), load_function("mine.py:f")()] == [1, 2]
    (folder / "mine.py").write_text("def f():\n    return 'changed'\n")
    assert load_function("mine.py:f")() == "changed"


def test_a_module_that_ends_the_process_is_an_error(folder: Path) -> None:
    (folder / "ends_the_process.py").write_text("raise SystemExit(0)\n")
    with pytest.raises(UserCodeError, match=r"ends_the_process cannot be imported: .*ends_the_process.py:1: .*SystemE"):
        load_function("ends_the_process:f")


def test_ctrl_c_while_a_file_is_run_is_not_an_error_of_the_file(folder: Path) -> None:
    (folder / "mine.py").write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load_function("mine.py:f")


def test_the_working_folder_is_kept_when_something_else_is_raised(folder: Path) -> None:
    (folder / "sub").mkdir()

    def work() -> None:
        with same_folder():
            os.chdir("sub")
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert Path.cwd() == folder
    assert where_it_raised(KeyError()) == ""


def test_a_working_folder_that_was_removed_is_no_fault_of_the_code(folder: Path) -> None:
    (folder / "gone").mkdir()
    os.chdir(folder / "gone")
    (folder / "gone").rmdir()
    with same_folder():
        pass
    os.chdir(folder)
