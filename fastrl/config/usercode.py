"""A user's own functions, named in a recipe: ``my_file.py:function`` or ``package.module:function``."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

# Frames that say nothing about a user's code, and those that say less than a user's own
_OURS = ("<", str(Path(__file__).parents[1]), str(Path(importlib.__file__).parent))
_LIBRARIES = (*_OURS, *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")))


class UserCodeError(ValueError):
    """A name that does not resolve to a function; the message has the file or module and the reason."""


def load_function(name: str) -> Callable[..., Any]:
    """The function (or class) that ``name`` refers to. A file is run once, and again if it was changed since.

    A file may import files beside it, and a package is also found in the working folder: that folder is appended to
    ``sys.path``, so that it hides no installed module.

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
    """``file:line: in function: `` of an exception: its innermost frame in a user's file, else in a library; empty if
    there is none."""
    if isinstance(error, SyntaxError) and error.filename is not None:  # the frames are those of the importer
        return f"{error.filename}:{error.lineno}: "
    every = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in every if not frame.filename.startswith(_LIBRARIES)]
    frames = frames or [frame for frame in every if not frame.filename.startswith(_OURS)]
    return f"{frames[-1].filename}:{frames[-1].lineno}: in {frames[-1].name}: " if frames else ""


def takes(function: object, *arguments: str) -> str:
    """Why a user's hook cannot be called with these arguments, to follow its name; empty if it can."""
    if not callable(function):
        return f"must be a function, got {function!r}"
    if inspect.iscoroutinefunction(function):
        return "is async: it would never be awaited"
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        return f"is called as {getattr(function, '__name__', 'it')}({', '.join(arguments)}): {error}"
    except ValueError:  # of no Python function
        return ""
    return ""


@contextmanager
def same_folder() -> Iterator[None]:
    """Undo a change of the working folder, to which the run's other paths are relative.

    Raises:
        UserCodeError: it was changed, and nothing else was raised.
    """
    before = _folder()
    try:
        yield
        after = _folder()
    finally:
        if before is not None:
            with suppress(OSError):
                os.chdir(before)
    if after != before:
        raise UserCodeError(f"changes the working folder to {after}; the run's paths are relative to {before}")


def _folder() -> Path | None:
    """The working folder; None if it was removed."""
    try:
        return Path.cwd()
    except OSError:
        return None


def _file(place: str) -> ModuleType:
    path = Path(place).resolve()
    if not path.is_file():
        raise UserCodeError(f"no such file: {place}")
    version = hashlib.blake2b(str(path).encode() + b"\0" + path.read_bytes(), digest_size=8).hexdigest()
    name = f"fastrl_user_{path.stem}_{version}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look up the file's classes here
    _find_in(path.parent)
    try:
        with same_folder():
            spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if not isinstance(error, Exception | SystemExit):
            raise
        hint = " (a file stands alone: name it package.module:function)" if "relative import" in str(error) else ""
        raise UserCodeError(f"{place} cannot be run: {_what(error)}{hint}") from error
    return module


def _module(name: str) -> ModuleType:
    _find_in(Path.cwd())
    try:
        with same_folder():
            return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise UserCodeError(f"module {name} cannot be imported: {_what(error)}") from error


def _find_in(folder: Path) -> None:
    """Let modules be imported from a folder: the installed command does not know the working folder."""
    importlib.invalidate_caches()
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _what(error: BaseException) -> str:
    if isinstance(error, UserCodeError):
        return str(error)
    return f"{where_it_raised(error)}{type(error).__name__}: {error}"
