"""Compiled code and measurements on disk: verified before use, written atomically, and never needed.

The folder is ``$GPUBACKPROP_CACHE_DIR``, by default the platform's user cache folder. An entry's name holds a digest of everything
that shaped it (code, constants, versions, architecture), so an entry is never stale, only unused. Its content begins with a digest
of itself: a damaged entry counts as missing, and the next write replaces it. Since entries are executed, a folder or a file that
another user could have written is not used. A faulty disk costs only the time to compile.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import stat
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path, PurePath

import platformdirs

from gpubackprop.machine.finding import Finding

_MAGIC = b"gpubackprop cache entry 1\n"


def cache_folder() -> Path | None:
    """Return the folder of compiled kernels, or None if there is no home folder, or no absolute one."""
    chosen = os.environ.get("GPUBACKPROP_CACHE_DIR")
    with suppress(OSError, RuntimeError, KeyError):  # no HOME and no entry in the password file, no current folder
        if chosen:
            return Path(chosen).absolute()
        folder = Path(platformdirs.user_cache_dir("gpubackprop", appauthor=False))
        return folder if folder.is_absolute() else None
    return None


def cache_problem(part: str = "") -> str | None:
    """Return why the cache, or a folder in it, is not used and what to do, or None if nobody else can write in it."""
    found = _unsafe(part)
    return found.message if found else None


def cache_finding() -> Finding:
    """Return where compiled kernels are kept, or why they are not and what to do; then each process compiles them again."""
    folder = cache_folder()
    if (unsafe := _unsafe()) or folder is None:
        return unsafe or NO_FOLDER
    there = next(place for place in _and_parents(folder) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        what = "cannot be written to" if there.is_dir() else "is a file"
        return _not_used(f"{there} {what}", OTHER_FOLDER, OTHER_COMMAND)
    free, mode = shutil.disk_usage(there).free, stat.S_IMODE(there.stat().st_mode)
    if free < LEAST_FREE:
        return _not_used(f"{folder}: only {free >> 20} MiB are free", OTHER_FOLDER, OTHER_COMMAND)
    entries = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    state = f"mode {mode:o}, {len(entries)} entries of {sum(entries) >> 10:,} KiB" if there == folder else "empty"
    return Finding("cache", "ok", f"{folder}: {state}, {free >> 20:,} MiB free")


OTHER_FOLDER = "set GPUBACKPROP_CACHE_DIR to a folder of your own"
OTHER_COMMAND = 'export GPUBACKPROP_CACHE_DIR="$HOME/.gpubackprop"'
LEAST_FREE = 64 << 20  # bytes, several times the size of all kernels of a few networks


def _not_used(text: str, advice: str = "", command: str = "") -> Finding:
    return Finding("cache", "warning", text, advice, command)


NO_FOLDER = _not_used(
    "there is no home folder", "set GPUBACKPROP_CACHE_DIR to keep compiled kernels", "export GPUBACKPROP_CACHE_DIR=$(mktemp -d)"
)  # fmt: skip


def _unsafe(part: str = "") -> Finding | None:
    """Return which other user could write entries, which are executed, or None."""
    folder = cache_folder()
    if folder is None:
        return NO_FOLDER
    if not hasattr(os, "geteuid"):  # Windows: the user's profile is closed to others
        return None
    with suppress(OSError, RuntimeError):
        ours = {folder / part, folder, (folder / part).resolve(), folder.resolve()}
        for place in dict.fromkeys([*_and_parents(folder / part), *_and_parents((folder / part).resolve())]):
            try:
                status = place.stat()
            except FileNotFoundError:
                continue  # it will be created, for us alone
            if place in ours and status.st_uid != os.geteuid():
                return _not_used(f"{place} belongs to another user", OTHER_FOLDER, OTHER_COMMAND)
            # in a sticky folder such as /tmp nobody can replace another user's files
            if _writable_by_others(status.st_mode) and (place in ours or not status.st_mode & stat.S_ISVTX):
                command = f"chmod go-w {shlex.quote(str(place))}"
                return _not_used(f"{place} can be written by other users", command=command)
    return None


def read(name: str) -> bytes | None:
    """Return the content of the entry called ``name``, or None if there is none that is intact and ours."""
    path = _path(name)
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            if hasattr(os, "geteuid"):
                status = os.fstat(file.fileno())
                if status.st_uid != os.geteuid() or _writable_by_others(status.st_mode):
                    return None
            whole = file.read()
    except OSError:
        return None
    content = whole[len(_MAGIC) + 32 :]
    return content if whole.startswith(_head(name, content)) else None


def write(name: str, content: bytes) -> None:
    """Store an entry atomically, also against other processes."""
    path = _path(name)
    if path is None:
        return
    with suppress(OSError):
        for place in reversed([place for place in _and_parents(path.parent) if not place.exists()]):
            place.mkdir(mode=0o700, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)  # readable and writable only by its owner
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_head(name, content) + content)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def _path(name: str) -> Path | None:
    """Return the path of an entry, or None, with one warning, if the folder must not be used."""
    folder = cache_folder()
    if folder is None:
        return None
    problem = cache_problem(str(PurePath(name).parent))
    if problem is not None:
        if problem not in _said:
            _said.add(problem)
            warnings.warn(f"compiled kernels are not kept on disk: {problem}", RuntimeWarning, stacklevel=2)
        return None
    return folder / name


_said: set[str] = set()


def _head(name: str, content: bytes) -> bytes:
    """Return the header of an entry, which detects damage and an entry under another's name."""
    return _MAGIC + hashlib.sha256(name.encode() + b"\0" + content).digest()


def _and_parents(path: Path) -> list[Path]:
    return [path, *path.parents]


def _writable_by_others(mode: int) -> bool:
    return bool(mode & (stat.S_IWGRP | stat.S_IWOTH))
