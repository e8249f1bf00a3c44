"""The distribution: a wheel and an sdist build, hold what they must, and the wheel works outside the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.gate  # two builds and two installs

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheel and sdist, built from a copy of what a clone would hold (a build writes beside its sources)."""
    work = tmp_path_factory.mktemp("package")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=REPO,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        source = REPO / name
        if name and source.is_file():
            target = work / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(work / "dist"), str(work / "source")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return work / "dist"


def test_the_wheel_holds_recipes_weights_and_both_packages(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"fastrl/trainer.py", "fastrl_kernels/policy_loss.py"} <= names
    assert "fastrl/recipes/perception-r1-grounding-tiny.yaml" in names
    assert {"fastrl/py.typed", "fastrl_kernels/py.typed"} <= names
    assert "fastrl/toy/weights/perception/model.safetensors" in names
    assert not [n for n in names if n.startswith(("tests/", "kernels/", "benchmarks/", "csrc/"))]


def test_the_sdist_holds_the_c_sources(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {n.partition("/")[2] for n in archive.getnames()}
    assert [n for n in names if n.startswith("csrc/") and n.endswith(".cpp")]
    assert {"kernels/fastrl_kernels/policy_loss.py", "setup.py", "pyproject.toml"} <= names


def test_the_wheel_works_outside_the_repository(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    site = tmp_path / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(wheel),
    ]
    assert subprocess.run(install, capture_output=True, text=True).returncode == 0
    code = (
        "import sys, torch, fastrl_kernels as k, fastrl; "
        "from fastrl.models.open import resolve_model; from fastrl.recipe import shipped_recipes; "
        "assert fastrl.__file__.startswith(sys.argv[1]) and k.__file__.startswith(sys.argv[1]); "
        "assert resolve_model('tiny:perception').is_dir() and shipped_recipes(); "
        "assert k.group_advantage(torch.tensor([0.0, 1.0]), 2).advantage.tolist()[1] > 0"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(site)], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr


def test_the_base_install_needs_torch_triton_and_numpy_alone(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (n for n in archive.namelist() if n.endswith("METADATA"))
        lines = archive.read(metadata).decode().splitlines()
    needed = {
        line.split(":", 1)[1].strip() for line in lines if line.startswith("Requires-Dist") and "extra ==" not in line
    }
    assert {n.split(">")[0].strip() for n in needed} == {"torch", "triton", "numpy"}


def test_an_index_would_take_both_archives(built: Path) -> None:
    archives = [str(path) for path in sorted(built.iterdir())]
    done = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *archives], capture_output=True, text=True
    )
    assert len(archives) == 2
    assert done.returncode == 0, done.stdout + done.stderr
