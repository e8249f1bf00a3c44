"""All cases, in the order they are run and printed."""

from __future__ import annotations

import importlib
from fnmatch import fnmatch

from benchmarks.case import SIZES, Case

MODULES = ("cases_head", "cases_attention", "cases_rollout", "cases_losses", "cases_pointwise", "cases_boxes")


def cases(size: str, only: str | None = None) -> list[Case]:
    """The cases at one of ``SIZES`` whose name contains or matches (``*``) ``only``.

    Raises:
        ValueError: the size is unknown, the pattern matches nothing, or two cases have the same name.
    """
    if size not in SIZES:
        raise ValueError(f"size: expected one of {', '.join(SIZES)}, got {size!r}")
    found = [case for module in MODULES for case in importlib.import_module(f"benchmarks.{module}").cases(size)]
    names = [case.name for case in found]
    if len(set(names)) < len(names):
        raise ValueError(f"case names used twice: {sorted({name for name in names if names.count(name) > 1})}")
    chosen = [case for case in found if only is None or only in case.name or fnmatch(case.name, only)]
    if not chosen:
        raise ValueError(f"no case matches {only!r}; cases: {', '.join(names)}")
    return chosen
