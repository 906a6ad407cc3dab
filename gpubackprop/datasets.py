"""Data from files: .npz, .csv and IDX (the format of MNIST), gzipped or not, and the embedded handwritten digits."""

from __future__ import annotations

import gzip
import io
import struct
import zipfile
import zlib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

IDX_TYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
FORMATS = "a .npz file with X and y, a .csv file with the target in its last column, or an IDX file, each also with .gz"


@dataclass
class DataSet:
    """A data set split into training and test samples.

    Attributes
    ----------
    X, y, X_test, y_test : array
    classes : list of str or None
        What the class indices stand for.
    name : str
    """

    X: np.ndarray
    y: np.ndarray
    X_test: np.ndarray
    y_test: np.ndarray
    classes: list[str] | None
    name: str


def load_dataset(
    source: str, *, classification: bool = True, targets: int = 1, test_fraction: float = 0.2, seed: int = 0
) -> DataSet:
    """Return the data set called ``"digits"``, or the one in a file.

    Parameters
    ----------
    source : str
        ``"digits"`` or a path. An .npz file has ``X`` and ``y``, or ``x_train``, ``y_train``, ``x_test``, ``y_test``. A .csv file
        has one sample a row, its target last, and may have a header. Beside an IDX file of images lies one of labels,
        its name with "labels" and "idx1" for "images" and "idx3"; ``t10k-...`` in the same folder is the test set.
    classification : bool
        The targets are classes; they may be strings.
    targets : int
        Of a regression from a .csv file: how many of its last columns are targets.
    test_fraction, seed
        The share of samples kept for the test, and the seed of the choice, where the file has no test set.

    Returns
    -------
    DataSet
        X in float64, pixels (bytes) scaled to [0, 1], samples flattened.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        The file is truncated or of another format.
    """
    if source == "digits":
        path = files("gpubackprop") / "data" / "digits.npz"
        with path.open("rb") as file, np.load(file) as arrays:
            X, y = arrays["X"] / 16.0, arrays["y"].astype(np.int64)
        return _split(X, y, None, "digits", test_fraction, seed)
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"no file {source!r}; --data takes 'digits' or {FORMATS}")
    try:
        parts = _read(path, classification, targets)
    except (OSError, EOFError, KeyError, UnicodeDecodeError, struct.error, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error).strip("'\"") or type(error).__name__
        raise ValueError(f"{source!r} is truncated or of another format ({reason}); expected {FORMATS}") from None
    X, y, *test = (_flat(a) for a in parts)
    if len(X) != len(y):
        raise ValueError(f"{source!r} has {len(X)} samples and {len(y)} targets")
    if len(X) < 2:
        raise ValueError(f"{source!r} has {len(X)} samples; at least 2 are needed")
    classes = None
    if classification and y.ndim == 1:
        both = np.concatenate([y, test[1]]) if test else y
        labels, indices = np.unique(both, return_inverse=True)
        if labels.dtype.kind == "f" and not np.array_equal(labels, np.rint(labels)):
            raise ValueError(
                f"{source!r} has targets that are not classes, such as {labels[0]!s}; choose a loss for real values"
            )
        if labels.dtype.kind in "US" or not np.array_equal(labels, np.arange(len(labels))):
            classes = [str(label) for label in labels]
        y, test_y = indices[: len(y)].astype(np.int64), indices[len(y) :].astype(np.int64)
        test = [test[0], test_y] if test else []
    if test:
        return DataSet(X, y, test[0], test[1], classes, path.name)
    return _split(X, y, classes, path.name, test_fraction, seed)


def _split(
    X: np.ndarray, y: np.ndarray, classes: list[str] | None, name: str, test_fraction: float, seed: int
) -> DataSet:
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction is {test_fraction}; it must be in (0, 1)")
    order = np.random.default_rng(seed).permutation(len(X))
    n_test = min(max(round(len(X) * test_fraction), 1), len(X) - 1)
    train, test = order[n_test:], order[:n_test]
    return DataSet(X[train], y[train], X[test], y[test], classes, name)


def _flat(a: np.ndarray) -> np.ndarray:
    if a.ndim > 2 or (a.dtype == np.uint8 and a.ndim == 2 and a.shape[1] > 1):
        pixels = a.reshape(len(a), -1)
        return pixels / 255.0 if a.dtype == np.uint8 else pixels.astype(np.float64)
    return a[:, 0] if a.ndim == 2 and a.shape[1] == 1 and a.dtype.kind in "iu" else a


def _read(path: Path, classification: bool, targets: int) -> list[np.ndarray]:
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    if content[:2] == b"PK":
        return _read_npz(content)
    if content[:2] == b"\0\0" and len(content) > 4 and content[2] in IDX_TYPES:
        return _read_idx_set(path, content)
    if b"\0" in content[:4096]:
        raise OSError("it is binary, but neither .npz nor IDX")
    return _read_csv(content.decode(), classification, targets)


def _read_npz(content: bytes) -> list[np.ndarray]:
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        for names in (("X", "y"), ("x", "y"), ("x_train", "y_train", "x_test", "y_test")):
            if all(name in file for name in names):
                return [file[name] for name in names]
        raise KeyError(f"it holds {', '.join(file.files) or 'nothing'}")


def _read_idx_set(path: Path, content: bytes) -> list[np.ndarray]:
    def labels_of(name: str) -> str:
        return name.replace("images", "labels").replace("idx3", "idx1")

    if labels_of(path.name) == path.name:
        raise OSError("it has no 'images' in its name, by which the file of labels is found")
    parts = [_parse_idx(content), _read_idx(path.with_name(labels_of(path.name)))]
    test = path.with_name(path.name.replace("train", "t10k"))
    if test.name != path.name and test.is_file():
        parts += [_read_idx(test), _read_idx(test.with_name(labels_of(test.name)))]
    return parts


def _read_idx(path: Path) -> np.ndarray:
    content = path.read_bytes()
    return _parse_idx(gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content)


def _parse_idx(content: bytes) -> np.ndarray:
    """Source: Y. LeCun, C. Cortes, C. Burges, "The MNIST database": two zero bytes, type, rank, sizes, data, all big-endian."""
    _, kind, rank = struct.unpack(">HBB", content[:4])
    shape = struct.unpack(f">{rank}I", content[4 : 4 + 4 * rank])
    dtype = np.dtype(IDX_TYPES[kind])
    expected = int(np.prod(shape)) * dtype.itemsize
    body = content[4 + 4 * rank :]
    if len(body) != expected:
        raise OSError(f"its header promises {expected} bytes of data, there are {len(body)}")
    return np.frombuffer(body, dtype).reshape(shape).astype(dtype.newbyteorder("="))


def _read_csv(text: str, classification: bool, targets: int) -> list[np.ndarray]:
    import csv

    rows = [row for row in csv.reader(text.splitlines()) if row]
    if not rows:
        raise OSError("it is empty")
    if not _is_number(rows[0][0]):
        rows = rows[1:]
    width = len(rows[0]) if rows else 0
    if width <= targets:
        raise OSError(f"it has {width} columns; at least one feature and {targets} target columns are needed")
    for number, row in enumerate(rows, 1):
        if len(row) != width:
            raise OSError(f"row {number} has {len(row)} columns, the first has {width}")
    if classification:
        targets = 1
    try:
        X = np.array([row[:-targets] for row in rows], np.float64)
        last: Any = [row[-targets:] for row in rows]
        if not classification:
            return [X, np.array(last, np.float64)]
    except ValueError as error:
        raise OSError(str(error)) from None
    labels = [row[0].strip() for row in last]
    return [X, np.array(labels, np.float64) if all(map(_is_number, labels)) else np.array(labels)]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
