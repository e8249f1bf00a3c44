"""Folders of every family, built once per session, each with a policy and transformers' own model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.contract import Pair, pair_of
from tests.helpers.families import BUILDS, build_family


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = build_family(tmp_path_factory.mktemp(model_type), model_type)
        return made[model_type]

    return folder


@pytest.fixture(params=sorted(BUILDS))
def pair(request: pytest.FixtureRequest, folder_of: Callable[[str], Path]) -> Pair:
    return pair_of(folder_of(request.param), request.param)


@pytest.fixture
def make_pair(folder_of: Callable[[str], Path]) -> Callable[[str], Pair]:
    return lambda model_type: pair_of(folder_of(model_type), model_type)
