"""Compressed files from untrusted sources: the unpacked size is checked against the header and a limit.

A file may unpack to :data:`LEAST` bytes, or to :data:`RATIO` times its own size where that is more: images of digits shrink to a
fifth, files made to exhaust memory to a thousandth. Data that compress that well must be unpacked first.
"""

from __future__ import annotations

import gzip
import io
import math
import warnings
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

LEAST, RATIO = 1 << 28, 100
AT_ONCE = 1 << 20  # bytes unpacked at a time
HEADERS: dict[Any, Any] = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class ArchiveError(ValueError):
    """A fault in a file; the caller adds its name."""


def limit_of(path: Path) -> int:
    """Return the most bytes that a file may unpack to."""
    return max(LEAST, RATIO * path.stat().st_size)


def read_unpacked(path: Path) -> bytes:
    """Return the content of a file, unpacked if it is gzipped.

    Raises
    ------
    ArchiveError
        It is damaged, or unpacks to more than :func:`limit_of`.
    """
    content = path.read_bytes()
    if content[:2] != b"\x1f\x8b":
        return content
    limit, unpacked = limit_of(path), io.BytesIO()
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
            while chunk := file.read(AT_ONCE):
                if unpacked.tell() + len(chunk) > limit:
                    raise _too_large(limit, len(content))
                unpacked.write(chunk)
    except (OSError, EOFError, zlib.error) as error:
        raise ArchiveError(f"it is truncated or not a valid gzip file ({error})") from None
    return unpacked.getvalue()


@contextmanager
def open_unpacked(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading a part at a time, unpacked if it is gzipped.

    Raises
    ------
    ArchiveError
        It is damaged.
    """
    with path.open("rb") as file:
        if file.peek(2)[:2] != b"\x1f\x8b":  # a pipe cannot go back
            yield file
            return
        try:
            with gzip.GzipFile(fileobj=file) as unpacked:
                yield cast(BinaryIO, unpacked)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ArchiveError(f"it is truncated or not a valid gzip file ({error})") from None


def read_npz(content: bytes, wanted: Collection[str] | None, limit: int) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return the arrays of an .npz file with one of the names ``wanted``, or all of them, and all names in it.

    No memory is taken before the header of an array, its size in the archive and ``limit`` agree, and no object is unpickled.

    Raises
    ------
    ArchiveError
        It is damaged, holds a name twice, or unpacks to more than the limit.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = [entry.filename.removesuffix(".npy") for entry in archive.infolist()]
            entries = dict(zip(names, archive.infolist(), strict=True))
            chosen = [name for name in names if wanted is None or name in wanted]
            if len(set(chosen)) < len(chosen):
                raise ArchiveError(f"it holds {max(chosen, key=chosen.count)} more than once")
            if sum(entries[name].file_size for name in chosen) > limit:
                raise _too_large(limit, len(content))
            return {name: _array(archive, entries[name], name) for name in chosen}, names
    except (ArchiveError, MemoryError):
        raise
    except Exception as error:  # a damaged archive may raise anything in the parsers of zip files and headers
        raise ArchiveError(f"it is truncated or not a valid .npz file ({error or type(error).__name__})") from None


def _array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, name: str) -> np.ndarray:
    with archive.open(entry) as opened:
        file: Any = opened
        shape, fortran, dtype = _header(file, name)
        if dtype.hasobject:
            raise ArchiveError("it holds Python objects, which are not loaded: a pickle can run any code")
        size, there = math.prod(shape) * dtype.itemsize, entry.file_size - file.tell()
        if not dtype.itemsize or any(d < 0 for d in shape) or size != there:
            raise ArchiveError(f"{name} is incomplete: shape {shape}, {dtype}, but {there} bytes of data")
        memory = np.empty(size, np.uint8)
        view, filled = memory.data, 0
        while filled < size and (more := file.readinto(view[filled : filled + AT_ONCE])):
            filled += more
        if filled < size or file.read(1):  # at the end of the entry its checksum is verified
            raise ArchiveError(f"{name} is truncated: {filled} of {size} bytes of data")
    return memory.view(dtype).reshape(shape, order="F" if fortran else "C")


def _header(file: Any, name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return shape, order and dtype of an .npy file; NumPy limits the length of a header."""
    if not file.peek(6).startswith(np.lib.format.MAGIC_PREFIX):
        raise ArchiveError(f"{name} in it is not an array of NumPy")
    version = np.lib.format.read_magic(file)
    if version not in HEADERS:
        raise ArchiveError(
            f"{name} has version {version} of the format .npy, which is for structured arrays, not numbers"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as written in a header
            shape, fortran, dtype = HEADERS[version](file)
    except MemoryError:  # parentheses too deep for Python's parser
        raise ArchiveError(f"the header of {name} cannot be parsed") from None
    return shape, fortran, dtype


def _too_large(limit: int, size: int) -> ArchiveError:
    return ArchiveError(f"its {size:,} bytes unpack to more than {limit:,}; if that is right, unpack the file first")
