"""Shared fixtures: where the real data is, which markers run here, one seed per test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

REPO = Path(__file__).resolve().parent.parent

# Examples must not depend on how busy the machine is: no deadlines, and the same examples in every run. For new ones:
# pytest --hypothesis-profile=explore
settings.register_profile("same", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("explore", settings.get_profile("same"), derandomize=False, max_examples=2000)
settings.load_profile("same")


def _data_dir() -> Path | None:
    named = os.environ.get("FASTRL_DATA")
    for candidate in [Path(named)] if named else [REPO.parent / "shared" / "data"]:
        if (candidate / "coco" / "instances.json").is_file():
            return candidate
    return None


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data: ``FASTRL_DATA`` or ``../shared/data``. Without it tests skip; they fail if CI needs
    it."""
    found = _data_dir()
    if found is None:
        message = "real data not found: set FASTRL_DATA to its folder"
        if os.environ.get("FASTRL_REQUIRE_DATA") == "1":
            pytest.fail(message)
        pytest.skip(message)
    return found


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # one of several parallel processes: one core each
        torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "gate" not in config.option.markexpr:
        long = [item for item in items if "gate" in item.keywords]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if "gate" not in item.keywords]
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if ("interpreter" in item.keywords) != interpreting:
            reason = "needs TRITON_INTERPRET=1" if not interpreting else "not an interpreter test"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
