"""The C++ paths: used where they were built, distinguished from other builds, threaded, without the GIL."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from fastrl_kernels import _native
from fastrl_kernels.detection_reward import detection_reward, detection_reward_reference
from fastrl_kernels.linear_assignment import linear_assignment, linear_assignment_reference

REPO = Path(__file__).resolve().parents[2]
needs_native = pytest.mark.skipif(_native.library() is None, reason=str(_native.why_not()))


@pytest.fixture
def fresh_load(monkeypatch: pytest.MonkeyPatch):
    """The loader's cache is empty before and after the test."""
    caches = (_native.library, _native.why_not, _native._load)
    for cache in caches:
        cache.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    for cache in caches:
        cache.cache_clear()


def test_missing_extension_takes_the_eager_path(fresh_load: pytest.MonkeyPatch) -> None:
    fresh_load.setattr(_native.importlib.util, "find_spec", lambda name: None)
    assert _native.library() is None
    assert "not built" in str(_native.why_not())
    cost = torch.rand(3, 4, 5)
    assert torch.equal(linear_assignment(cost).match, linear_assignment_reference(cost).match)
    boxes, count = torch.rand(2, 3, 4), torch.tensor([3, 2])
    want = detection_reward_reference(boxes, boxes, count, count)
    assert torch.equal(detection_reward(boxes, boxes, count, count).quality, want.quality)
    with pytest.raises(RuntimeError, match="fastrl_linear_assignment: the extension was not built"):
        _native.linear_assignment(cost, None, None, False)


@needs_native
def test_other_version_is_refused(fresh_load: pytest.MonkeyPatch) -> None:
    fresh_load.setattr(_native, "ABI_VERSION", _native.ABI_VERSION + 1)
    assert _native.library() is None
    assert "rebuild" in str(_native.why_not())


def test_unloadable_extension_says_why(fresh_load: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "_C.so"
    broken.write_bytes(b"not a library")
    spec = type("Spec", (), {"origin": str(broken)})
    fresh_load.setattr(_native.importlib.util, "find_spec", lambda name: spec)
    assert _native.library() is None
    assert "_C.so cannot be loaded" in str(_native.why_not())


@needs_native
def test_thread_count_changes_nothing() -> None:
    cost = torch.rand(700, 20, 24)  # enough work for several threads
    boxes = torch.rand(400, 40, 4).sort(-1).values[..., [0, 1, 2, 3]]
    counts = torch.randint(0, 41, (400,))
    before = torch.get_num_threads()
    outs = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            outs.append((*linear_assignment(cost), *detection_reward(boxes, boxes.flip(0), counts, counts.flip(0))))
    finally:
        torch.set_num_threads(before)
    for other in outs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outs[0], other, strict=True))


@needs_native
def test_other_python_threads_run_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread is forced to release the GIL here, so another one runs only if the call itself releases it."""
    calls: list[tuple[str, tuple[object, ...]]] = []
    monkeypatch.setattr(_native, "_call", lambda name, *arguments: calls.append((name, arguments)))
    cost = torch.rand(1, 200, 200, dtype=torch.float64)
    results = _native.linear_assignment(cost, None, None, False)  # alive: the arguments point into them
    ((name, arguments),) = calls
    solve = getattr(_native.library(), name)
    ticks, started, done = 0, threading.Event(), threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not done.is_set():
            ticks += 1
            started.set()
            time.sleep(0)

    interval = sys.getswitchinterval()
    ticker = threading.Thread(target=tick)
    ticker.start()
    try:
        started.wait()
        sys.setswitchinterval(1e6)
        before, calls_left = ticks, 5000
        while ticks == before and calls_left:
            assert solve(*arguments) == 0
            calls_left -= 1
    finally:
        sys.setswitchinterval(interval)
        done.set()
        ticker.join()
    assert calls_left > 0
    assert results[2].tolist() == [0]


@needs_native
def test_usable_after_fork_with_threads() -> None:
    code = (
        "import os, torch\n"
        "from fastrl_kernels.linear_assignment import linear_assignment\n"
        "torch.set_num_threads(4)\n"
        "cost = torch.rand(600, 24, 24)\n"
        "want = linear_assignment(cost).match\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    os._exit(0 if torch.equal(linear_assignment(cost).match, want) else 1)\n"
        "assert os.waitpid(pid, 0)[1] == 0\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=600)


@needs_native
def test_extension_is_an_importable_module_with_plain_c_functions() -> None:
    import fastrl_kernels._C as module

    assert module.__file__ is not None
    assert ctypes.CDLL(module.__file__).fastrl_abi_version() == _native.ABI_VERSION


@pytest.mark.skipif(not (REPO / "setup.py").is_file(), reason="not a source tree")
def test_build_without_a_compiler_goes_on_and_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)]
    environment = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++", "PATH": "/nonexistent", "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "the native extension was NOT built" in done.stdout
    assert "slower eager path" in done.stdout
    assert not list(tmp_path.rglob("*.so"))
