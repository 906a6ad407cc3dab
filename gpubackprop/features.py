"""What the inputs of a network are made of: columns, scaling, categories, missing values; fitted once and kept in its file.

scikit-learn's transformers fit the numbers (:meth:`Features.of`); what is kept is plain data, and applying it needs NumPy alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from gpubackprop.definitions import check_flag, check_number, shown
from gpubackprop.frames import Frame, column_name, frame_of, is_table
from gpubackprop.interop import as_array, on_host

MOST_CATEGORIES = 1000  # of a column; each is an input
LEAST_SHARE = 2  # samples of a category, on average, below which text is no category but a name or a note


@dataclass(frozen=True)
class Features:
    """The columns that a network takes, and how each becomes inputs: numbers first, then a 0 or 1 for each category.

    Parameters
    ----------
    categories : tuple
        For each column the texts that it may hold, or None if it is numbers.
    names : tuple of str, optional
        Of the columns, which may then come in any order.
    scale : float
        Numbers are divided by it: 255 for images of bytes.
    fill : tuple, optional
        For each column what replaces a missing value: the median, or the most frequent text.
    mean, std : tuple of float, optional
        For each column of numbers: x becomes (x - mean) / std, after scale and fill.
    """

    categories: tuple[tuple[str, ...] | None, ...]
    names: tuple[str, ...] | None = None
    scale: float = 1.0
    fill: tuple[float | str, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        width, numbers = len(self.categories), self._count
        for name, value, wanted in (
            ("names", self.names, width), ("fill", self.fill, width), ("mean", self.mean, numbers), ("std", self.std, numbers),
        ):  # fmt: skip
            if value is not None and len(value) != wanted:
                raise ValueError(f"features have {len(value)} {name}; {wanted} are needed")
        if not width:
            raise ValueError("features have no column")
        if self.names is not None and len(set(self.names)) < width:
            raise ValueError(f"features have column {shown(max(self.names, key=self.names.count))} more than once")
        if (self.mean is None) != (self.std is None):
            raise ValueError("features have mean or std, but not both")
        check_number("scale", self.scale, lambda x: 0 < x < math.inf, "a number > 0")
        for x in (*(self.mean or ()), *(self.std or ()), *(x for x in self.fill or () if not isinstance(x, str))):
            check_number("a mean, std or fill of features", x, lambda x: -math.inf < x < math.inf, "finite")
        if any(x <= 0 for x in self.std or ()):
            raise ValueError("a std of features is not above 0")
        for j, filled in enumerate(self.fill or ()):
            texts = self.categories[j]
            if filled not in texts if texts is not None else isinstance(filled, str):
                raise ValueError(f"features fill {self._name(j)} with {shown(filled)}, which it cannot hold")

    @classmethod
    def of(cls, X: Any, *, standardize: bool = False, missing: str | None = None, scale: float = 1.0) -> Self:
        """Return the features of training data: the numbers that scikit-learn's imputer, scaler and encoder find.

        Parameters
        ----------
        X : DataFrame or array, shape (n, columns)
        standardize : bool
            Give each column of numbers mean 0 and standard deviation 1.
        missing : {"median"}, optional
            Replace a missing number by the column's median, missing text by its most frequent. By default it is an error.
        scale : float
            Divide all numbers by this.

        Raises
        ------
        ValueError
            A value is missing or infinite, or a column of text has too many different values for categories.
        """
        standardize, missing, scale = check_asked(standardize, missing, scale)
        frame = as_frame(X)
        if not len(frame):
            raise ValueError(f"X has shape {frame.shape}: there are no samples")
        found = cls(tuple(_categories(frame, j) for j in range(frame.shape[1])), frame.names, scale)
        if missing is not None:
            found = replace(found, fill=_medians(frame, scale))
        if standardize:
            from sklearn.preprocessing import StandardScaler

            fitted = StandardScaler().fit(found._numbers(frame, "X"))
            found = replace(found, mean=tuple(fitted.mean_.tolist()), std=tuple(fitted.scale_.tolist()))
        return found

    def check_same(self, standardize: bool, missing: str | None, scale: float) -> None:
        """Raise ValueError if a later fit asks for what the first did not: it keeps what that found."""
        has = {"standardize": self.mean is not None, "missing": self.fill is not None, "scale": self.scale}
        for name, asked, found in (
            ("standardize", standardize, has["standardize"]), ("missing", missing is not None, has["missing"]),
            ("scale", scale != 1, scale == has["scale"]),
        ):  # fmt: skip
            if asked and not found:
                raise ValueError(f"{name} is asked for; the network keeps the features of its first fit: {self}")

    @property
    def inputs(self) -> int:
        """The number of inputs that they make."""
        return sum(1 if texts is None else len(texts) for texts in self.categories)

    @property
    def input_names(self) -> tuple[str, ...]:
        """A name for each input: the column's, and for a category ``column=text``."""
        numbers = [self._plain_name(j) for j, texts in enumerate(self.categories) if texts is None]
        return (
            *numbers,
            *(f"{self._plain_name(j)}={t}" for j, texts in enumerate(self.categories) for t in texts or ()),
        )

    def __str__(self) -> str:
        """Return what they are on one line."""
        count = len(self.categories)
        parts = [f"{count} column{'s' * (count > 1)}" + (f" ({self.inputs} inputs)" if self.inputs != count else "")]
        parts += [
            f"{self._name(j).removeprefix('column ')}: {', '.join(texts[:4])}{', ...' * (len(texts) > 4)}"
            for j, texts in enumerate(self.categories) if texts is not None
        ]  # fmt: skip
        parts += [f"divided by {self.scale:g}"] * (self.scale != 1)
        parts += ["missing values by the median"] * (self.fill is not None)
        parts += ["standardized"] * (self.mean is not None)
        return "; ".join(parts)

    def matrix(self, X: Any, name: str = "X") -> np.ndarray:
        """Return the inputs of the network for a DataFrame, whose columns may be in another order, or an array of the columns.

        Shapes
        ------
        X : (n, columns); returns (n, inputs) in float64

        Raises
        ------
        ValueError
            A column is missing or of another kind, or a cell cannot be used; the message names it.
        """
        frame = self._in_order(as_frame(X, name), name)
        parts = [self._numbers(frame, name)]
        for j, texts in enumerate(self.categories):
            if texts is not None:
                parts.append(self._one_hot(frame, j, texts, name))
        return parts[0] if len(parts) == 1 else np.hstack(parts)

    def scaling(self) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and deviation of the columns of numbers as they are given: scale, mean and std in one."""
        mean, std = self.mean or [0.0] * self._count, self.std or [1.0] * self._count
        return self.scale * np.array(mean), self.scale * np.array(std)

    def folded(self, W: np.ndarray, b: np.ndarray) -> tuple[Features, np.ndarray, np.ndarray]:
        """Return features without scaling, and first parameters that take it over: the same outputs up to rounding.

        Shapes
        ------
        W : (inputs, d), b : (d,), both float64
        """
        mean, std = self.scaling()
        W, b = W.copy(), b - (mean / std) @ W[: self._count]
        W[: self._count] /= std[:, None]
        fill = None
        if self.fill is not None:
            fill = tuple(x if isinstance(x, str) else x * self.scale for x in self.fill)
        return replace(self, mean=None, std=None, scale=1.0, fill=fill), W, b

    def growth_of_rounding(self) -> tuple[float, str]:
        """Return by how much rounding grows when the scaling is folded into the first layer, 1 + |mean| / std, and the column."""
        ratios = [abs(m) / s for m, s in zip(self.mean or (), self.std or (), strict=True)] or [0.0]
        worst = max(range(len(ratios)), key=ratios.__getitem__)
        places = [j for j, texts in enumerate(self.categories) if texts is None]
        return 1 + ratios[worst], self._name(places[worst]) if places else ""

    def to_json(self) -> dict[str, Any]:
        """Return what :meth:`from_json` takes."""
        return {
            "categories": self.categories, "names": self.names, "scale": self.scale, "fill": self.fill, "mean": self.mean,
            "std": self.std,
        }  # fmt: skip

    @classmethod
    def from_json(cls, given: Any) -> Self:
        """Return the features of a description, which may come from anywhere.

        Raises
        ------
        ValueError
            An entry is missing, unknown, or of another kind.
        """
        known = ("categories", "names", "scale", "fill", "mean", "std")
        if not isinstance(given, Mapping) or sorted(given) != sorted(known):
            raise ValueError(f"features are {shown(given)}; they must be a dictionary of {', '.join(known)}")
        texts = _list("categories", given["categories"], list | tuple | None) or ()
        categories = tuple(None if t is None else _list("a category", t, str) for t in texts)
        for t in categories:
            if t is not None and len(set(t)) < max(len(t), 1):
                raise ValueError(f"categories are {shown(t)}; they must be different texts")
        return cls(
            categories=categories, names=_list("names", given["names"], str),
            scale=given["scale"],
            fill=_list("fill", given["fill"], str | float | int),
            mean=_list("mean", given["mean"], float | int), std=_list("std", given["std"], float | int),
        )  # fmt: skip

    # ------------------------------------------------------------------ columns

    @property
    def _count(self) -> int:
        return sum(texts is None for texts in self.categories)

    def _name(self, j: int) -> str:
        return column_name(self.names, j)

    def _plain_name(self, j: int) -> str:
        return self.names[j] if self.names is not None else f"column {j + 1}"

    def _in_order(self, frame: Frame, name: str) -> Frame:
        """Return a table with these columns, in this order; others are left out."""
        if self.names is None or frame.names is None:
            if frame.shape[1] != len(self.categories):
                raise ValueError(f"{name} has {frame.shape[1]} columns; the network takes {len(self.categories)}")
        else:
            place = {column: j for j, column in enumerate(frame.names)}
            missing = [column for column in self.names if column not in place]
            if missing:
                raise ValueError(
                    f"{name} has no column {', '.join(map(shown, missing[:5]))}{', ...' * (len(missing) > 5)}; "
                    f"it has {shown(list(frame.names), 200)}"
                )
            if frame.names != self.names:
                frame = frame.take([place[column] for column in self.names])
        for j, texts in enumerate(self.categories):
            if (texts is None) == (j in frame.texts):
                kinds = ("text", "numbers") if texts is None else ("numbers", "text")
                raise ValueError(f"{name} has {kinds[0]} in {self._name(j)}; the network takes {kinds[1]} there")
        return frame

    def _numbers(self, frame: Frame, name: str) -> np.ndarray:
        """Return the columns of numbers: scaled, filled and standardized, all finite."""
        x = frame.numbers
        if self.scale != 1:
            x = x / self.scale
        if self.fill is not None and (gone := np.isnan(x)).any():
            places = [value for value in self.fill if not isinstance(value, str)]
            x = np.where(gone, np.array(places, np.float64), x)
        if not np.isfinite(x.sum()) and not np.isfinite(x).all():
            i, k = np.argwhere(~np.isfinite(x))[0]
            what = "is missing (NaN); missing='median' fills it in" if np.isnan(x[i, k]) else "is infinite"
            raise ValueError(f"{name}: {frame.name(frame.number_places[k])} of sample {frame.first + i} {what}")
        if self.mean is None:
            return x
        result: np.ndarray = x - np.array(self.mean)
        result /= np.array(self.std)
        return result

    def _one_hot(self, frame: Frame, j: int, texts: tuple[str, ...], name: str) -> np.ndarray:
        """Return a column of 0 and 1 for each category."""
        fill = None if self.fill is None else self.fill[j]
        cells = [fill if cell is None else cell for cell in frame.texts[j].tolist()]
        place: dict[Any, int] = {text: k for k, text in enumerate(texts)}
        try:
            at = np.array([place[cell] for cell in cells], np.int64)
        except KeyError:
            i = next(i for i, cell in enumerate(cells) if cell not in place)
            what = "is missing; missing='median' fills it in with the most frequent text"
            if cells[i] is not None:
                what = f"is {shown(cells[i])}; in training it was one of {shown(list(texts), 200)}"
            raise ValueError(f"{name}: {self._name(j)} of sample {frame.first + i} {what}") from None
        result = np.zeros((len(cells), len(texts)))
        result[np.arange(len(cells)), at] = 1.0
        return result


def check_asked(standardize: Any, missing: Any, scale: Any) -> tuple[bool, str | None, float]:
    """Return the options of :meth:`Features.of`, or raise ValueError."""
    if missing is not None and (not isinstance(missing, str) or missing != "median"):
        raise ValueError(f"missing is {shown(missing)}; choose 'median', or None for an error where a value is missing")
    scale = float(check_number("scale", scale, lambda x: 0 < x < math.inf, "a number > 0"))
    return check_flag("standardize", standardize), missing, scale


def as_frame(X: Any, name: str = "X") -> Frame:
    """Return a DataFrame, or an array of any library, as a table."""
    if is_table(X):
        return frame_of(X, name)
    array = np.asarray(on_host(as_array(X, name)))
    if array.ndim != 2 or (array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16"):
        raise ValueError(
            f"{name} has shape {array.shape} and dtype {array.dtype}; it must be numbers (samples, columns)"
        )
    return Frame(None, array.astype(np.float64, copy=False))


def _categories(frame: Frame, j: int) -> tuple[str, ...] | None:
    """Return the categories of a column of text, sorted, or None for numbers."""
    if j not in frame.texts:
        return None
    cells = [cell for cell in frame.texts[j].tolist() if cell is not None]
    found = tuple(sorted(set(cells)))
    if not found:
        raise ValueError(f"X: {frame.name(j)} is missing in all samples; leave it out")
    if len(found) > MOST_CATEGORIES or (len(found) > 10 and len(cells) < LEAST_SHARE * len(found)):
        raise ValueError(
            f"X: {frame.name(j)} holds {len(found):,} different texts in {len(cells):,} samples, such as {shown(found[0])}: "
            "these are no categories; leave the column out"
        )
    return found


def _medians(frame: Frame, scale: float) -> tuple[float | str, ...]:
    from sklearn.impute import SimpleImputer

    numbers = frame.numbers / scale
    if numbers.shape[1] and (gone := np.isnan(numbers).all(axis=0)).any():
        raise ValueError(
            f"X: {frame.name(frame.number_places[int(gone.argmax())])} is missing in all samples; leave it out"
        )
    medians = iter(SimpleImputer(strategy="median").fit(numbers).statistics_.tolist() if numbers.shape[1] else [])
    return tuple(_most_frequent(frame.texts[j]) if j in frame.texts else next(medians) for j in range(frame.shape[1]))


def _most_frequent(column: np.ndarray) -> str:
    texts, counts = np.unique([cell for cell in column.tolist() if cell is not None], return_counts=True)
    return str(texts[counts.argmax()])


def _list(name: str, value: Any, kind: Any) -> tuple[Any, ...] | None:
    """Return a list of values of one kind as a tuple, or None."""
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not all(isinstance(x, kind) and not isinstance(x, bool) for x in value):
        raise ValueError(f"{name} of the features is {shown(value)}, which has the wrong type")
    return tuple(value)
