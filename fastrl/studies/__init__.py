"""Experiments that test the papers' claims: ``fastrl study``."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from fastrl.rewards.base import unknown

if TYPE_CHECKING:
    from fastrl.studies.base import Study

# name -> module; each has a class ``Experiment``
STUDIES = {
    "blind": "fastrl.studies.blind",
    "preference": "fastrl.studies.preference",
    "temporal": "fastrl.studies.temporal",
    "rewards": "fastrl.studies.rewards",
    "complexity": "fastrl.studies.complexity",
    "hacking": "fastrl.studies.hacking",
    "reflection": "fastrl.studies.reflection",
    "gaze": "fastrl.studies.gaze",
    "thinking": "fastrl.studies.thinking",
    "rollouts": "fastrl.studies.rollouts",
    "curriculum": "fastrl.studies.curriculum",
}


def study_class(name: str) -> type[Study]:
    """The class of a study. Raises ``ValueError`` for an unknown name, with those that exist."""
    if name not in STUDIES:
        raise ValueError(unknown("study", name, STUDIES))
    return importlib.import_module(STUDIES[name]).Experiment


def all_studies() -> Iterable[type[Study]]:
    """The classes of all studies, in order."""
    return map(study_class, STUDIES)
