"""Fixtures that the kernels' tests have in common."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
def path(request: pytest.FixtureRequest) -> str:
    """A test on the torch path, and where Triton's interpreter runs on the kernels."""
    return request.param
