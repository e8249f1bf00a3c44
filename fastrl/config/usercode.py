"""A user's own functions, named in a recipe: ``my_file.py:function`` or ``package.module:function``."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


class UserCodeError(ValueError):
    """A name that does not resolve to a function; the message has the file or module and the reason."""


def load_function(name: str) -> Callable[..., Any]:
    """The function (or class) that ``name`` refers to. A file is run only the first time.

    Raises:
        UserCodeError: the file, module or function does not exist, or running it fails.
    """
    place, colon, attribute = name.rpartition(":")
    if not colon or not place or not attribute.isidentifier():
        raise UserCodeError(f"{name!r} must be my_file.py:function or package.module:function")
    module = _file(place) if place.endswith(".py") else _module(place)
    found = getattr(module, attribute, None)
    if not callable(found):
        names = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise UserCodeError(f"{place} has no function {attribute!r}; it has {', '.join(names) or 'none'}")
    return found


def where_it_raised(error: BaseException) -> str:
    """``file:line: in function: `` of the innermost frame of an exception; empty if it has no traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}: in {frames[-1].name}: " if frames else ""


def _file(place: str) -> ModuleType:
    path = Path(place).resolve()
    if not path.is_file():
        raise UserCodeError(f"no such file: {place}")
    name = f"fastrl_user_{path.stem}_{hashlib.blake2b(str(path).encode(), digest_size=8).hexdigest()}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look up the file's classes here
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UserCodeError(
            f"{place} cannot be run: {where_it_raised(error)}{type(error).__name__}: {error}"
        ) from error
    return module


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise UserCodeError(f"module {name} cannot be imported: {type(error).__name__}: {error}") from error
