"""The digest of all kernel sources, part of the names of compiled kernels."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from gpubackprop._version import __version__
from gpubackprop.code_digest import fingerprint


@cache
def source_digest() -> str:
    """Return a digest of the source text of all kernels of this package, and of its version."""
    folder = Path(__file__).parent
    files = [(path.relative_to(folder).as_posix(), path) for path in folder.rglob("*.py")]
    return fingerprint(__version__, [(name, path.read_bytes()) for name, path in sorted(files)])
