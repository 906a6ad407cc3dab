"""Data from files: .npz, .csv and IDX (the format of MNIST), gzipped or not, and the embedded handwritten digits."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from gpubackprop.archives import limit_of, open_unpacked, read_npz, read_unpacked
from gpubackprop.csv_files import read_csv
from gpubackprop.definitions import check_count, check_number, check_seed
from gpubackprop.frames import Frame

IDX_TYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
FEW = 5  # samples of a class, on average, below which numbers are not classes: a fifth of fewer is less than one test sample
MANY = 100  # classes; more numbers, with gaps between them, are not classes either
PLAIN = 20  # classes; more numbers are recognised as classes only if they count from 0 or 1 without a gap
NPZ_NAMES = (
    ("X", "y"),
    ("x", "y"),
    ("x_train", "y_train", "x_test", "y_test"),
    ("X_train", "y_train", "X_test", "y_test"),
)
FEATURES = ("X", "x", "X_test", "x_test")  # of an .npz file for predictions
FORMATS = "a .npz file with X and y, a .csv file with the target in its last column, or an IDX file, each also with .gz"


@dataclass
class DataSet:
    """A data set split into training, validation and test samples.

    Attributes
    ----------
    X, y, X_test, y_test : array
        With ``frame``, the features of a .csv file are a :class:`gpubackprop.frames.Frame`.
    classes : list of str or int, or None
        What the class indices stand for.
    name : str
    found : str
        What was found in the file, on one line.
    X_validation, y_validation : array
        Without samples if there is no validation set.
    classification : bool
    recognised : str
        Why the targets are taken as classes or as numbers, if that was recognised from them.
    ambiguous : bool
        They could be taken as the other, too.
    image_shape : tuple of int or None
        The shape of a sample, if it is an image.
    scale : float
        What the features have yet to be divided by; 1 unless they were asked for as they are.
    """

    X: Any
    y: np.ndarray
    X_test: Any
    y_test: np.ndarray
    classes: list[str] | list[int] | None
    name: str
    found: str
    X_validation: Any
    y_validation: np.ndarray
    classification: bool
    recognised: str
    ambiguous: bool
    image_shape: tuple[int, ...] | None
    scale: float


@dataclass
class _Part:
    """The training set or the test set, as read from the file."""

    X: Any
    y: np.ndarray

    def at(self, rows: np.ndarray) -> _Part:
        return _Part(self.X[rows], self.y[rows])


@dataclass
class _Options:
    """How a file is read; ``classification`` is None until it is recognised from the target."""

    classification: bool | None
    targets: int
    target: str | int | None
    header: bool | None
    delimiter: str | None = None
    drop: tuple[str, ...] = ()
    frame: bool = False
    missing: bool = False
    recognised: str = ""
    ambiguous: bool = False

    @property
    def of_csv(self) -> list[str]:
        """The options that are given and of a CSV file alone."""
        given = {"target": self.target, "header": self.header, "delimiter": self.delimiter, "drop": self.drop or None}
        return [name for name, value in given.items() if value is not None]

    def decide(self, y: np.ndarray) -> bool:
        """Return whether the targets are classes, as given or as recognised from them."""
        if self.classification is None:
            self.classification, self.recognised, self.ambiguous = _recognise(y)
        return self.classification


def load_dataset(
    source: str | Path,
    *,
    classification: bool | None = True,
    targets: int = 1,
    test: str | Path | None = None,
    test_fraction: float = 0.2,
    validation_fraction: float = 0.0,
    seed: int = 0,
    target: str | int | None = None,
    header: bool | None = None,
    delimiter: str | None = None,
    drop: Sequence[str] = (),
    frame: bool = False,
    missing: bool = False,
    scaled: bool = True,
) -> DataSet:
    """Return the data set called ``"digits"``, or the one in a file.

    Parameters
    ----------
    source : str or Path
        ``"digits"`` or a path. An .npz file has ``X`` and ``y``, or ``x_train``, ``y_train``, ``x_test``, ``y_test``. A .csv file
        has one sample per row, its target last, and may have a header; see :mod:`gpubackprop.csv_files`. An IDX file of images
        needs one of labels in the same folder, named with "labels" and "idx1" for "images" and "idx3"; ``t10k-...`` there is
        the test set.
    classification : bool or None
        Whether the targets are classes, which may be strings. None: recognised from them, see ``DataSet.recognised``.
    targets : int
        For a regression from a .csv file: how many of its last columns are targets.
    test : str or Path, optional
        A file with the test set.
    test_fraction : float
        The fraction of samples for the test set, if there is none in the file and none is given.
    validation_fraction : float
        The fraction of the training samples that become the validation set, in [0, 1). 0: none.
    seed : int
        The seed of these two splits. Each class is divided in proportion.
    target : str or int, optional
        For a .csv file: the target column, by its name or its number from 1.
    header : bool, optional
        For a .csv file: whether its first row is a header; detected by default.
    delimiter : str, optional
        For a .csv file: what separates its columns; detected by default.
    drop : sequence of str
        For a .csv file: columns to leave out, by name or number.
    frame : bool
        For a .csv file: return a table, whose columns may be text.
    missing : bool
        With ``frame``: cells may be missing.
    scaled : bool
        Scale bytes of images to [0, 1]; else leave them, and say in ``scale`` what to divide by.

    Returns
    -------
    DataSet
        X in float64, samples flattened. Byte images (and rows of bytes with values above 1) are scaled to [0, 1]; targets
        never are. The samples of a part are in the order of the file.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        The file is truncated, has another format, or holds data that cannot be used for training.
    """
    check_number("test_fraction", test_fraction, lambda x: 0 < x < 1, "in (0, 1)")
    check_number("validation_fraction", validation_fraction, lambda x: 0 <= x < 1, "in [0, 1)")
    seed, targets = check_seed(seed), check_count("targets", targets)
    options = _Options(classification, targets, target, header, delimiter, tuple(drop), frame, missing)
    classes: list[str] | list[int] | None = None
    if source == "digits":
        if options.of_csv or test is not None:
            given = " and ".join([*options.of_csv, *["test"] * (test is not None)])
            raise ValueError(f"{given} is an option of a file, which 'digits' is not")
        parts = [_digits()]
        options.classification = classification is not False
        image_shape: tuple[int, ...] | None = (8, 8)
        name, found, scale = "digits", "8 x 8 pixels, 10 classes", 16.0
    else:
        name, of_test = Path(source).name, None if test is None else _file(test, "--test")
        path, source = _file(source, "--data"), str(source)
        with _named(source):
            parts, found = _read(path, options)
        if of_test is not None:
            with _named(str(test)):
                parts.append(_only(_read(of_test, options)[0], "a file with a test set"))
            with _named(source):
                _only(parts[:-1], "a training set that comes with --test")
        with _named(source):
            found, image_shape, scale = _check(parts, options.decide(parts[0].y), found)
            if options.classification:
                classes, found = _to_classes(parts, found)
    if scaled and scale != 1:
        for part in parts:
            part.X = part.X / scale
        scale = 1.0
    with _named(str(source)):
        training, validation, test_part = _split(
            parts, bool(options.classification), test_fraction, validation_fraction, seed
        )
    return DataSet(
        training.X, training.y, test_part.X, test_part.y, classes, name, found, validation.X, validation.y,
        bool(options.classification), options.recognised, options.ambiguous, image_shape, scale,
    )  # fmt: skip


def _digits() -> _Part:
    path = files("gpubackprop") / "data" / "digits.npz"
    with path.open("rb") as file, np.load(file) as arrays:
        return _Part(arrays["X"].astype(np.float64), arrays["y"].astype(np.int64))


def is_csv(path: Path) -> bool:
    """Return whether a file is read as CSV: it is a pipe, or neither .npz nor IDX."""
    if path.exists() and not path.is_file() and not path.is_dir():
        return True
    path = _file(path, "DATA")
    with _named(str(path)), open_unpacked(path) as file:
        start = file.read(4)
    return not _is_npz(start) and not _is_idx(start)


def load_arrays(source: str, *, with_target: bool, scale: float | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Return X and y of ``"digits"``, an .npz or an IDX file for a trained network: of its test set, if it has one.

    Parameters
    ----------
    with_target : bool
        There must be a y.
    scale : float, optional
        What the network divides by: 1 or that of bytes. None: it has no features, and takes bytes scaled to [0, 1].

    Raises
    ------
    ValueError
        The network divides bytes, and these are real numbers.
    """
    if source == "digits":
        part, found = _digits(), 16.0
    else:
        path = _file(source, "DATA")
        with _named(source):
            content = read_unpacked(path)
            if with_target:
                parts, _ = _read_npz(content, limit_of(path)) if _is_npz(content) else _read_idx_set(path, content)
                part = parts[-1]
            elif _is_npz(content):
                arrays, names = read_npz(content, FEATURES, limit_of(path))
                if not arrays:
                    raise ValueError(
                        f"it holds {', '.join(map(repr, names))[:200] or 'nothing'}; expected one of {', '.join(FEATURES)}"
                    )
                part = _Part(arrays[next(name for name in FEATURES if name in arrays)], np.empty(0))
            else:
                part = _Part(_parse_idx(content, path.name), np.empty(0))
            kind = part.X.dtype.kind
            _check([part] if with_target else [_Part(part.X, np.zeros(len(part.X)))], True, "")
            found = 255.0 if part.X.dtype == np.uint8 else 1.0
            if scale not in (None, 1.0) and kind == "f":
                raise ValueError(
                    f"its features are real numbers; the network takes bytes, and divides them by {scale:g}"
                )
    X = part.X.reshape(len(part.X), -1)
    return X / found if scale is None and found != 1 else X.astype(np.float64), part.y if with_target else None


def _file(source: str | Path, option: str) -> Path:
    """Return the path of a file that exists."""
    digits = "'digits' or " * (option == "--data")
    allowed = f"{option} takes {digits}{FORMATS}"
    if Path(source).is_dir():
        raise IsADirectoryError(f"{str(source)!r} is a folder; {allowed}")
    if not Path(source).is_file():
        raise FileNotFoundError(f"no file {str(source)!r}; {allowed}")
    return Path(source)


@contextmanager
def _named(source: str) -> Iterator[None]:
    """Name the file in every error about it, on one line."""
    try:
        yield
    except (PermissionError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or "not enough memory for it"
        raise OSError(f"{source!r} cannot be read: {reason}") from None
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise ValueError(f"{source!r}: {_one_line(error)}") from None


def _only(parts: list[_Part], what: str) -> _Part:
    if len(parts) > 1:
        raise ValueError(f"it holds a training set and a test set; {what} holds one of them only")
    return parts[0]


# ---------------------------------------------------------------------- the split


def _split(
    parts: list[_Part], classification: bool, test_fraction: float, validation_fraction: float, seed: int
) -> list[_Part]:
    """Return training, validation and test set; a given test set is kept, and the others are split off."""
    training, *given = parts
    fractions = [validation_fraction] if given else [test_fraction, validation_fraction]
    n, wanted = len(training.X), 1 + sum(fraction > 0 for fraction in fractions)
    if n < wanted:
        purposes = ["train"] + ["validate"] * (validation_fraction > 0) + ["test"] * (not given)
        to = ", ".join(purposes[:-1]) + f" and {purposes[-1]}" if wanted > 1 else "train"
        hint = "; --validation 0 (validation_fraction=0) does without a validation set" * (validation_fraction > 0)
        raise ValueError(f"it has {n} sample{'s' * (n != 1)}; at least {wanted} are needed, to {to}{hint}")
    rng, split_off = np.random.default_rng(seed), list(given)
    for i, fraction in enumerate(fractions):
        n, later = len(training.X), sum(f > 0 for f in fractions[i + 1 :])
        taken = held_out(training.y if classification else None, n, fraction, rng, n - 1 - later)
        split_off.append(training.at(taken))
        training = training.at(~taken)
    test, validation = split_off
    return [training, validation, test]


def held_out(y: np.ndarray | None, n: int, fraction: float, rng: np.random.Generator, most: int) -> np.ndarray:
    """Return which of n samples are split off, at least one and at most ``most``; of classes y each in proportion.

    Shapes
    ------
    y : (n,) or (n, classes); returns (n,) bool
    """
    taken = np.zeros(n, bool)
    if fraction > 0:
        m = min(max(round(n * fraction), 1), most)
        taken[rng.permutation(n)[:m] if y is None else _in_proportion(y, m, rng)] = True
    return taken


def _in_proportion(y: np.ndarray, m: int, rng: np.random.Generator) -> np.ndarray:
    """Return m random samples, of each class in proportion, by the method of the largest remainder."""
    labels = y if y.ndim == 1 else y.argmax(axis=1)
    order, counts = rng.permutation(len(labels)), np.bincount(labels)
    share, remainder = np.divmod(counts * m, len(labels))
    emptied = counts - share < 2  # the others come first, so that classes keep a sample where they can
    ranked = np.lexsort((-counts, -remainder, emptied))
    share[ranked[: m - share.sum()]] += 1
    by_class = order[np.argsort(labels[order], kind="stable")]
    place = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return by_class[place < np.repeat(share, counts)]


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 300 else f"{text[:300]}..."


# ---------------------------------------------------------------------- what may be in the arrays


def _check(parts: list[_Part], classification: bool, found: str) -> tuple[str, tuple[int, ...] | None, float]:
    """Check shapes, kinds and values, make X a matrix of float64; return what was found, the shape of an image, and its scale."""
    for part, where in zip(parts, ("", "of the test set "), strict=False):
        table = isinstance(part.X, Frame)  # which its reader has checked
        if not table and (part.X.ndim < 2 or 0 in part.X.shape[1:]):
            raise ValueError(f"the features {where}have shape {part.X.shape}; they must be (samples, features)")
        if part.y.ndim not in (1, 2) or 0 in part.y.shape[1:]:
            raise ValueError(
                f"the targets {where}have shape {part.y.shape}; they must be (samples,) or (samples, outputs)"
            )
        if len(part.X) != len(part.y):
            raise ValueError(f"there are {len(part.X)} samples {where}and {len(part.y)} targets")
        if not table and part.X.dtype.kind not in "biuf":
            raise ValueError(f"the features {where}are not numbers (dtype {part.X.dtype})")
        if part.y.dtype.kind == "S":
            part.y = np.char.decode(part.y, "utf-8")
        text = part.y.dtype.kind in "UO"
        if part.y.dtype.kind not in "biufUO" or (text and not classification):
            raise ValueError(f"the targets {where}are not numbers (dtype {part.y.dtype})")
        with np.errstate(over="ignore"):  # longdouble numbers beyond float64 become infinite
            part.X, part.y = (
                a.astype(np.float64) if not isinstance(a, Frame) and a.dtype == np.longdouble else a
                for a in (part.X, part.y)
            )
        for name, a in (("features", part.X), ("targets", part.y)):
            if isinstance(a, Frame):
                continue
            if a.dtype.kind == "f" and not np.isfinite(a).all():
                at = np.argwhere(~np.isfinite(a))
                raise ValueError(
                    f"the {name} {where}hold NaN or infinity ({len(at)} of {a.size} values), first in sample {at[0][0] + 1}"
                )
    for part, where in zip(parts, ("training", "test"), strict=False):
        if not len(part.X):
            raise ValueError(f"it has no {where} samples")
    if len({part.X.shape[1:] for part in parts}) > 1 or len({part.y.shape[1:] for part in parts}) > 1:
        shapes = " and ".join(f"{part.X.shape} with targets {part.y.shape}" for part in parts)
        raise ValueError(f"training and test set have different shapes: {shapes}")
    if len({part.y.dtype.kind in "UO" for part in parts}) > 1:
        raise ValueError("the targets are text in one of training and test set, and numbers in the other")
    bytes_ = all(not isinstance(part.X, Frame) and part.X.dtype == np.uint8 for part in parts)
    shape = parts[0].X.shape[1:]
    scaled = bytes_ and (len(shape) > 1 or max(int(part.X.max()) for part in parts) > 1)
    for part in parts:
        if not isinstance(part.X, Frame):
            part.X = part.X.reshape(len(part.X), -1).astype(np.float64, copy=False)
        if part.y.ndim == 2 and part.y.shape[1] == 1 and (classification or part.y.dtype.kind in "iu"):
            part.y = part.y[:, 0]
        if not classification and part.y.dtype.kind in "biu":
            part.y = part.y.astype(np.float64)
    side = math.isqrt(shape[0])
    square = (side, side) if len(shape) == 1 and side**2 == shape[0] and side >= 8 else None
    image = shape if len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3, 4)) else square
    return found + ", bytes scaled to [0, 1]" * scaled, image if scaled else None, 255.0 if scaled else 1.0


def _recognise(y: np.ndarray) -> tuple[bool, str, bool]:
    """Return whether targets are classes, why, and whether they could be taken as the other."""
    if y.dtype.kind in "OUS":
        return True, "is text", False
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    if y.ndim != 1:
        one_hot = y.ndim == 2 and y.dtype.kind in "biuf" and np.isin(y, (0, 1)).all() and (y.sum(axis=1) == 1).all()
        why = f"has {math.prod(y.shape[1:])} columns{', with a single 1 in each row' * bool(one_hot)}"
        return bool(one_hot), why, False
    if y.dtype.kind not in "biuf" or (y.dtype.kind == "f" and not np.isfinite(y).all()):
        return False, "is not finite numbers", False  # which _check says
    fractions = y[y != np.rint(y)] if y.dtype.kind == "f" else y[:0]
    if len(fractions):
        return False, f"holds real numbers such as {fractions[0]:.6g}", False
    values, n = np.unique(y), len(y)
    k, low = len(values), int(values[0]) if len(values) else 0
    counted = low in (0, 1) and int(values[-1]) - low + 1 == k
    repeated = k <= 2 or (k <= 10 and n >= 2 * k) or n >= FEW * k
    classes = repeated and (k <= PLAIN or counted)
    why = f"holds {k} different whole numbers in {n:,} samples"
    return classes, why, classes or not _hardly_classes(values, n)


def _hardly_classes(values: np.ndarray, n: int) -> bool:
    """Return whether sorted whole numbers, found in n samples, are too many to be classes."""
    k = len(values)
    gaps = int(values[-1]) - int(values[0]) + 1 > k
    return (k > 10 and n < FEW * k) or (k > MANY and gaps)


def _to_classes(parts: list[_Part], found: str) -> tuple[list[str] | list[int] | None, str]:
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
    if not text and _hardly_classes(labels, n):
        raise ValueError(f"the targets are {k} different numbers in {n} samples, which are hardly classes; {hint}")
    start = 0
    for part in parts:
        part.y = indices[start : start + len(part.y)].astype(np.int64)
        start += len(part.y)
    names: Any = [str(label) if text else int(label) for label in labels]
    shown = ", ".join(str(name)[:40] for name in names[:6]) + ", ..." * (k > 6)
    plain = not text and np.array_equal(labels, np.arange(k))
    return None if plain else names, f"{found}, {k} classes: {shown}"


# ---------------------------------------------------------------------- formats


def _read(path: Path, options: _Options) -> tuple[list[_Part], str]:
    content = read_unpacked(path)
    if (_is_npz(content) or _is_idx(content)) and options.of_csv:
        raise ValueError(f"{' and '.join(options.of_csv)} is an option of a CSV file, which this is not")
    if _is_npz(content):
        return _read_npz(content, limit_of(path))
    if _is_idx(content):
        return _read_idx_set(path, content)
    if b"\0" in content[:4096] and content[:2] not in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(f"it is binary, but neither .npz nor IDX; expected {FORMATS}")
    read = partial(
        read_csv, content, targets=options.targets, target=options.target, header=options.header,
        delimiter=options.delimiter, drop=options.drop, frame=options.frame, missing=options.missing,
    )  # fmt: skip
    table = read(classification=options.classification is not False)
    if not options.decide(table.y) and table.y.ndim == 1:  # recognised just now: read as if it had been given
        table = read(classification=False)
    return [_Part(table.X, table.y)], table.found


def _is_npz(start: bytes) -> bool:
    return start[:4] in (b"PK\3\4", b"PK\5\6")


def _is_idx(start: bytes) -> bool:
    return start[:2] == b"\0\0" and len(start) > 3 and start[2] in IDX_TYPES


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
