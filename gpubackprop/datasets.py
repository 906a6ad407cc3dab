"""Data from files: .npz, .csv and IDX (the format of MNIST), gzipped or not, and the embedded handwritten digits."""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np

from gpubackprop.archives import limit_of, read_npz, read_unpacked
from gpubackprop.csv_files import read_csv
from gpubackprop.definitions import check_count, check_seed

IDX_TYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
FEW = 5  # samples of a class, on average, below which numbers are not classes: a fifth of fewer is less than one test sample
MANY = 100  # classes; more numbers, with gaps between them, are not classes either
NPZ_NAMES = (
    ("X", "y"),
    ("x", "y"),
    ("x_train", "y_train", "x_test", "y_test"),
    ("X_train", "y_train", "X_test", "y_test"),
)
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
    found : str
        What was found in the file, on one line.
    """

    X: np.ndarray
    y: np.ndarray
    X_test: np.ndarray
    y_test: np.ndarray
    classes: list[str] | None
    name: str
    found: str = ""


@dataclass
class _Part:
    """The training set or the test set, as read from the file."""

    X: np.ndarray
    y: np.ndarray


def load_dataset(
    source: str | Path,
    *,
    classification: bool = True,
    targets: int = 1,
    test_fraction: float = 0.2,
    seed: int = 0,
    target: str | int | None = None,
    header: bool | None = None,
) -> DataSet:
    """Return the data set called ``"digits"``, or the one in a file.

    Parameters
    ----------
    source : str or Path
        ``"digits"`` or a path. An .npz file has ``X`` and ``y``, or ``x_train``, ``y_train``, ``x_test``, ``y_test``. A .csv file
        has one sample per row, its target last, and may have a header; see :mod:`gpubackprop.csv_files`. An IDX file of images
        needs one of labels in the same folder, named with "labels" and "idx1" for "images" and "idx3"; ``t10k-...`` there is
        the test set.
    classification : bool
        The targets are classes; they may be strings.
    targets : int
        For a regression from a .csv file: how many of its last columns are targets.
    test_fraction, seed
        The fraction of samples for the test set, and the seed of the split, if the file has no test set.
    target : str or int, optional
        For a .csv file: the target column, by its name or its number from 1.
    header : bool, optional
        For a .csv file: whether its first row is a header; detected by default.

    Returns
    -------
    DataSet
        X in float64, samples flattened. Byte images (and rows of bytes with values above 1) are scaled to [0, 1]; targets
        never are.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        The file is truncated, has another format, or holds data that cannot be used for training.
    """
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction is {test_fraction}; it must be in (0, 1)")
    seed, targets = check_seed(seed), check_count("targets", targets)
    if source == "digits":
        path = files("gpubackprop") / "data" / "digits.npz"
        with path.open("rb") as file, np.load(file) as arrays:
            X, y = arrays["X"] / 16.0, arrays["y"].astype(np.int64)
        if not (target is None and header is None):
            raise ValueError("target and header are options of a CSV file, which 'digits' is not")
        return _split(_Part(X, y), None, "digits", "8 x 8 pixels, 10 classes", test_fraction, seed)
    path, source = Path(source), str(source)
    if path.is_dir():
        raise IsADirectoryError(f"{source!r} is a folder; --data takes 'digits' or {FORMATS}")
    if not path.is_file():
        raise FileNotFoundError(f"no file {source!r}; --data takes 'digits' or {FORMATS}")
    try:
        parts, found = _read(path, classification, targets, target, header)
        found = _check(parts, classification, found)
        classes, found = _to_classes(parts, found) if classification else (None, found)
    except (PermissionError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or "not enough memory for it"
        raise OSError(f"{source!r} cannot be read: {reason}") from None
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise ValueError(f"{source!r}: {_one_line(error)}") from None
    if len(parts) == 2:
        return DataSet(parts[0].X, parts[0].y, parts[1].X, parts[1].y, classes, path.name, found)
    return _split(parts[0], classes, path.name, found, test_fraction, seed)


def _split(part: _Part, classes: list[str] | None, name: str, found: str, test_fraction: float, seed: int) -> DataSet:
    order = np.random.default_rng(seed).permutation(len(part.X))
    n_test = min(max(round(len(order) * test_fraction), 1), len(order) - 1)
    train, test = order[n_test:], order[:n_test]
    return DataSet(part.X[train], part.y[train], part.X[test], part.y[test], classes, name, found)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 300 else f"{text[:300]}..."


# ---------------------------------------------------------------------- what may be in the arrays


def _check(parts: list[_Part], classification: bool, found: str) -> str:
    """Check shapes, kinds and values, make X a matrix of float64, and return what was found."""
    for part, where in zip(parts, ("", "of the test set "), strict=False):
        if part.X.ndim < 2 or 0 in part.X.shape[1:]:
            raise ValueError(f"the features {where}have shape {part.X.shape}; they must be (samples, features)")
        if part.y.ndim not in (1, 2) or 0 in part.y.shape[1:]:
            raise ValueError(
                f"the targets {where}have shape {part.y.shape}; they must be (samples,) or (samples, outputs)"
            )
        if len(part.X) != len(part.y):
            raise ValueError(f"there are {len(part.X)} samples {where}and {len(part.y)} targets")
        if part.X.dtype.kind not in "biuf":
            raise ValueError(f"the features {where}are not numbers (dtype {part.X.dtype})")
        if part.y.dtype.kind == "S":
            part.y = np.char.decode(part.y, "utf-8")
        text = part.y.dtype.kind in "UO"
        if part.y.dtype.kind not in "biufUO" or (text and not classification):
            raise ValueError(f"the targets {where}are not numbers (dtype {part.y.dtype})")
        with np.errstate(over="ignore"):  # longdouble numbers beyond float64 become infinite
            part.X, part.y = (a.astype(np.float64) if a.dtype == np.longdouble else a for a in (part.X, part.y))
        for name, a in (("features", part.X), ("targets", part.y)):
            if a.dtype.kind == "f" and not np.isfinite(a).all():
                at = np.argwhere(~np.isfinite(a))
                raise ValueError(
                    f"the {name} {where}hold NaN or infinity ({len(at)} of {a.size} values), first in sample {at[0][0] + 1}"
                )
    if len(parts[0].X) < (2 if len(parts) == 1 else 1) or not len(parts[-1].X):
        few = len(parts[0].X)
        raise ValueError(f"it has {few} sample{'s' * (few != 1)}; at least 2 are needed, one of them for the test")
    if len({part.X.shape[1:] for part in parts}) > 1 or len({part.y.shape[1:] for part in parts}) > 1:
        shapes = " and ".join(f"{part.X.shape} with targets {part.y.shape}" for part in parts)
        raise ValueError(f"training and test set have different shapes: {shapes}")
    if len({part.y.dtype.kind in "UO" for part in parts}) > 1:
        raise ValueError("the targets are text in one of training and test set, and numbers in the other")
    bytes_ = all(part.X.dtype == np.uint8 for part in parts)
    scaled = bytes_ and (parts[0].X.ndim > 2 or max(int(part.X.max()) for part in parts) > 1)
    for part in parts:
        X = part.X.reshape(len(part.X), -1)
        part.X = X / 255.0 if scaled else X.astype(np.float64, copy=False)
        if part.y.ndim == 2 and part.y.shape[1] == 1 and (classification or part.y.dtype.kind in "iu"):
            part.y = part.y[:, 0]
        if not classification and part.y.dtype.kind in "biu":
            part.y = part.y.astype(np.float64)
    return found + ", bytes scaled to [0, 1]" * scaled


def _to_classes(parts: list[_Part], found: str) -> tuple[list[str] | None, str]:
    """Replace labels by class indices; return the labels, if they differ from the indices, and what was found."""
    if parts[0].y.ndim == 2:
        return None, f"{found}, one column a class"
    both = np.concatenate([part.y for part in parts])
    n, text = len(both), both.dtype.kind in "UO"
    if text:  # np.unique would sort all of them
        labels = np.array(sorted(set(both.tolist())), object)
        index = {label: i for i, label in enumerate(labels)}
        indices = np.array([index[label] for label in both.tolist()])
    else:
        labels, indices = np.unique(both, return_inverse=True)
    k = len(labels)
    hint = "for a regression choose a loss such as --loss mean_squared_error (classification=False)"
    if labels.dtype.kind == "f" and not np.array_equal(labels, np.rint(labels)):
        fraction = labels[labels != np.rint(labels)][0]
        raise ValueError(f"the targets are not classes, but real numbers such as {fraction!s}; {hint}")
    if k < 2:
        raise ValueError(
            f"all targets are of one class only ({labels[0] if text else int(labels[0])}); a classification needs at least two"
        )
    if text and 2 * k > n and k > 10:
        raise ValueError(
            f"the targets are {k} different texts in {n} samples, such as {str(labels[0])[:40]!r}: no classes"
        )
    gaps = not text and int(labels[-1]) - int(labels[0]) + 1 > k
    if not text and ((k > 10 and n < FEW * k) or (k > MANY and gaps)):
        raise ValueError(f"the targets are {k} different numbers in {n} samples, which are hardly classes; {hint}")
    start = 0
    for part in parts:
        part.y = indices[start : start + len(part.y)].astype(np.int64)
        start += len(part.y)
    names = [str(int(label)) if labels.dtype.kind == "f" else str(label) for label in labels]
    shown = ", ".join(name[:40] for name in names[:6]) + ", ..." * (k > 6)
    plain = not text and np.array_equal(labels, np.arange(k))
    return None if plain else names, f"{found}, {k} classes: {shown}"


# ---------------------------------------------------------------------- formats


def _read(
    path: Path, classification: bool, targets: int, target: str | int | None, header: bool | None
) -> tuple[list[_Part], str]:
    content = read_unpacked(path)
    is_zip, is_idx = (
        content[:4] in (b"PK\3\4", b"PK\5\6"),
        content[:2] == b"\0\0" and len(content) > 4 and content[2] in IDX_TYPES,
    )
    if (is_zip or is_idx) and not (target is None and header is None):
        raise ValueError("target and header are options of a CSV file, which this is not")
    if is_zip:
        return _read_npz(content, limit_of(path))
    if is_idx:
        return _read_idx_set(path, content)
    if b"\0" in content[:4096] and content[:2] not in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(f"it is binary, but neither .npz nor IDX; expected {FORMATS}")
    table = read_csv(content, classification=classification, targets=targets, target=target, header=header)
    return [_Part(table.X, table.y)], table.found


def _read_npz(content: bytes, limit: int) -> tuple[list[_Part], str]:
    arrays, names = read_npz(content, {name for names in NPZ_NAMES for name in names}, limit)
    for X, y, *test in NPZ_NAMES:
        if all(name in arrays for name in (X, y, *test)):
            break
    else:
        raise ValueError(f"it holds {', '.join(map(repr, names))[:200] or 'nothing'}; expected {FORMATS}")
    parts = [_Part(arrays[X], arrays[y]), *([_Part(arrays[test[0]], arrays[test[1]])] if test else [])]
    return parts, _shapes(".npz", parts)


def _shapes(kind: str, parts: list[_Part]) -> str:
    described = [f"features {part.X.shape} {part.X.dtype}, targets {part.y.shape} {part.y.dtype}" for part in parts]
    return f"{kind}: {'; test: '.join(described)}"


def _read_idx_set(path: Path, content: bytes) -> tuple[list[_Part], str]:
    def labels_of(name: str) -> str:
        return name.replace("images", "labels").replace("idx3", "idx1")

    if labels_of(path.name) == path.name:
        raise ValueError("its name lacks 'images', which leads to the file of labels")
    sources = [path]
    test = path.with_name(path.name.replace("train", "t10k"))
    if test.name != path.name and test.is_file():
        sources.append(test)
    parts = []
    for source in sources:
        images = _parse_idx(content if source == path else read_unpacked(source), source.name)
        labels_path = source.with_name(labels_of(source.name))
        if not labels_path.is_file():
            raise ValueError(f"there is no file of labels {labels_path.name!r} in its folder")
        labels = _parse_idx(read_unpacked(labels_path), labels_path.name)
        if images.ndim < 2 or labels.ndim != 1:
            raise ValueError(
                f"{source.name!r} holds an array of shape {images.shape} and {labels_path.name!r} one of shape {labels.shape}; "
                "images have two dimensions or more, labels one: are the files swapped?"
            )
        parts.append(_Part(images, labels))
    return parts, _shapes("IDX", parts)


def _parse_idx(content: bytes, name: str) -> np.ndarray:
    """Source: Y. LeCun, C. Cortes, C. Burges, "The MNIST database": two zero bytes, type, rank, sizes, data, all big-endian."""
    magic, kind, rank = struct.unpack(">HBB", content[:4]) if len(content) >= 4 else (None, 0, 0)
    if magic != 0 or kind not in IDX_TYPES or rank == 0:
        begins = content[:4].hex(" ")
        raise ValueError(
            f"{name!r} is not an IDX file: it begins with {begins or 'nothing'}, not with 00 00, a type and a rank"
        )
    if len(content) < 4 + 4 * rank:
        raise ValueError(f"{name!r} is truncated in its header")
    shape = struct.unpack(f">{rank}I", content[4 : 4 + 4 * rank])
    dtype = np.dtype(IDX_TYPES[kind])
    expected, have = math.prod(shape) * dtype.itemsize, len(content) - 4 - 4 * rank
    if have != expected:
        raise ValueError(
            f"{name!r} is not a complete IDX file: its header promises {expected} bytes of data, there are {have}"
        )
    return np.frombuffer(content, dtype, offset=4 + 4 * rank).reshape(shape).astype(dtype.newbyteorder("="))
