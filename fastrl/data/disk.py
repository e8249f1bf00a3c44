"""Writing to a disk that may be full: errors name the file and its size, and files that cannot fit are not started."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def writing(path: Path, needed: int) -> Iterator[None]:
    """Add path, needed and free bytes to an ``OSError`` raised while ``needed`` bytes are written to ``path``."""
    try:
        yield
    except OSError as error:
        message = f"{error.strerror or error} ({sizes(path, needed)})"
        raise OSError(error.errno or errno.EIO, message, str(path)) from None


def require_space(path: Path, needed: int) -> None:
    """Raise ``OSError`` if the disk of ``path`` has no room for ``needed`` more bytes."""
    free = free_bytes(path)
    if free is not None and free < needed:
        raise OSError(errno.ENOSPC, f"No space left on device ({sizes(path, needed)})", str(path))


def sizes(path: Path, needed: int) -> str:
    """``needs 1,234 bytes, 56 are free``."""
    free = free_bytes(path)
    return f"needs {needed:,} bytes" + ("" if free is None else f", {free:,} are free")


def free_bytes(path: Path) -> int | None:
    """Free bytes on the disk of ``path``, which need not exist yet; None if the system does not report them."""
    place = path
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        return shutil.disk_usage(place).free
    except OSError:
        return None


def write_file(path: Path, text: str) -> None:
    """Write a file in place. Raises ``OSError`` with the path and the bytes needed."""
    data = text.encode()
    with writing(path, len(data)):
        path.write_bytes(data)


def replace_file(path: Path, data: bytes) -> None:
    """Replace a file atomically. Raises ``OSError`` with the path and the bytes needed."""
    temporary = path.with_name(f".{path.name}.writing")
    try:
        with writing(path, len(data)):
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


@contextmanager
def nothing_empty_left(*places: Path) -> Iterator[None]:
    """If the block fails, remove files and folders at ``places`` that are new and empty, and parent folders that were
    created for them."""
    made = {path for place in places for path in (place, *place.parents) if not os.path.lexists(path)}
    try:
        yield
    except BaseException:
        for path in sorted(made, key=lambda path: -len(path.parts)):
            remove_empty(path)
        raise


def remove_empty(path: Path) -> None:
    """Remove an empty file, or a folder that only contains empty files and folders. Anything else is kept whole, as is
    what cannot be removed."""
    with contextlib.suppress(OSError):
        if not _is_empty(path):
            return
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _is_empty(path: Path) -> bool:
    if path.is_symlink():
        return False
    if path.is_dir():
        return all(map(_is_empty, path.iterdir()))
    return path.is_file() and not path.stat().st_size
