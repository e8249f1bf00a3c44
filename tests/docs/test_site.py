"""The documentation builds as a site without dead links, and every page is in its navigation."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import fastrl_kernels

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.gate
def test_the_site_builds_strictly_and_shows_the_kernels(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site" / "api" / "kernels.html").read_text(encoding="utf-8")
    for name in fastrl_kernels.__all__:
        public = getattr(fastrl_kernels, name)
        if not inspect.ismodule(public):
            assert f'id="{public.__module__}.{name}"' in page, name
