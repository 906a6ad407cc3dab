"""Compiled kernels on disk: written atomically, and a folder that cannot be written only costs the compile time.

The folder is ``$GPUBACKPROP_CACHE_DIR``, by default the platform's user cache folder. An entry's name holds a digest of everything
that shaped it (source, versions, architecture), so an entry is never stale, only unused.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import platformdirs

from gpubackprop._version import __version__
from gpubackprop.definitions import fingerprint


def cache_folder() -> Path:
    """Return the folder of compiled kernels."""
    chosen = os.environ.get("GPUBACKPROP_CACHE_DIR")
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("gpubackprop", appauthor=False))


def read(name: str) -> bytes | None:
    """Return the entry called ``name``, or None where there is none that can be read."""
    try:
        return (cache_folder() / name).read_bytes()
    except OSError:
        return None


def write(name: str, content: bytes) -> None:
    """Store an entry: all of it or nothing, whatever other processes do."""
    folder = cache_folder()
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            Path(temporary).replace(folder / name)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise


@cache
def source_digest(*modules: str) -> str:
    """Return a digest of the source text of modules of this package and of its version."""
    import importlib.util

    texts = [__version__]
    for module in modules:
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.origin is not None:
            texts.append(Path(spec.origin).read_text(encoding="utf-8"))
    return fingerprint(texts)
