"""Files that are written completely or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_whole(path: Path, content: bytes, *, before: Path | None = None) -> None:
    """Write a file atomically: nobody sees half of it, not even after a power failure.

    The bytes are on the disk (fsync) before the file has its name, and the name before this returns. With ``before``, the file
    that had the name is kept under that one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o666 & ~_umask())
        if before is not None and path.exists():
            path.replace(before)
        Path(temporary).replace(path)
        _sync_folder(path.parent)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    """Sync the names in a folder to the disk; Windows does so by itself, and cannot open a folder."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_folder(name: str, folder: Path) -> None:
    """Create a folder, and raise ValueError unless files can be written to it: better now than after the work.

    ``name`` is the caller's name for it.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{name} is {str(folder)!r}, which is a file; name a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{name} is {str(folder)!r}, which cannot be written to: {error.strerror}") from None
