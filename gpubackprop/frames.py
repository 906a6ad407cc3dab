"""Tables: samples by named columns of numbers and of text, as DataFrames and CSV files have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpubackprop.definitions import one_line, shown


@dataclass(frozen=True)
class Frame:
    """Columns of numbers in one matrix, and columns of text.

    Attributes
    ----------
    names : tuple of str or None
        Of all columns, in order; None if they have no names.
    numbers : array, shape (n, k)
        The columns that are numbers, in order, in float64; NaN where one is missing.
    texts : dict
        The columns that are text, by position: arrays (n,) of ``str`` objects, None where one is missing.
    first : int
        The number of the first sample, where it is not the first of a file.
    """

    names: tuple[str, ...] | None
    numbers: np.ndarray
    texts: Mapping[int, np.ndarray] = field(default_factory=dict)
    first: int = 1

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, rows: Any) -> Frame:
        """Return some samples."""
        return Frame(self.names, self.numbers[rows], {j: column[rows] for j, column in self.texts.items()})

    @property
    def shape(self) -> tuple[int, int]:
        """Samples and columns."""
        return len(self.numbers), self.numbers.shape[1] + len(self.texts)

    @property
    def number_places(self) -> list[int]:
        """Where the columns of numbers are among all columns."""
        return [j for j in range(self.shape[1]) if j not in self.texts]

    def name(self, j: int) -> str:
        """Return what messages call a column."""
        return column_name(self.names, j)

    def column(self, j: int) -> np.ndarray:
        """Return a column."""
        column: np.ndarray = self.texts[j] if j in self.texts else self.numbers[:, self.number_places.index(j)]
        return column

    def take(self, places: Sequence[int]) -> Frame:
        """Return a table of the columns at these places, in their order."""
        names = None if self.names is None else tuple(self.names[j] for j in places)
        own = {j: k for k, j in enumerate(self.number_places)}
        numbers = [own[j] for j in places if j not in self.texts]
        whole = numbers == list(range(self.numbers.shape[1]))
        texts = {k: self.texts[j] for k, j in enumerate(places) if j in self.texts}
        return Frame(names, self.numbers if whole else self.numbers[:, numbers], texts, self.first)


def column_name(names: Sequence[str] | None, j: int) -> str:
    """Return what messages call a column: by its name, or else by its number."""
    return f"column {shown(names[j])}" if names is not None else f"column {j + 1}"


def text_column(cells: Sequence[Any]) -> np.ndarray:
    """Return cells as an array of objects, whatever they are."""
    column = np.empty(len(cells), object)
    column[:] = cells
    return column


def is_table(X: Any) -> bool:
    """Return whether X is a table: a :class:`Frame`, or a DataFrame of pandas, polars, pyarrow and others that narwhals knows."""
    if isinstance(X, Frame):
        return True
    if isinstance(X, np.ndarray) or not hasattr(type(X), "columns"):
        return False
    from narwhals import dependencies

    return dependencies.is_into_dataframe(X) or dependencies.is_polars_lazyframe(X)


def frame_of(X: Any, name: str = "X") -> Frame:
    """Return a table as columns; numbers and truth values become float64, text and categories ``str``.

    Raises
    ------
    ValueError
        Two columns have the same name, or one holds neither numbers nor text, such as dates.
    """
    if isinstance(X, Frame):
        return X
    import narwhals.stable.v1 as nw
    from narwhals.exceptions import NarwhalsError

    try:
        table = nw.from_native(X, eager_only=True)
    except NarwhalsError as error:
        raise ValueError(f"{name} cannot be read: {one_line(str(error), 200)}") from None
    except TypeError:
        raise ValueError(f"{name} is a {type(X).__name__}, which is not read yet: collect() it first") from None
    names = [str(column) for column in table.columns]
    if len(set(names)) < len(names):
        raise ValueError(f"{name} has more than one column {shown(max(names, key=names.count))}")
    numbers, texts = [], {}
    for j, own in enumerate(table.columns):
        series = table.get_column(own)
        if series.dtype.is_numeric() or series.dtype == nw.Boolean:
            numbers.append(series.cast(nw.Float64).to_numpy())
        else:
            texts[j] = _text(series.to_list(), f"{name} has column {shown(str(own))} of {series.dtype}")
    matrix = np.column_stack(numbers).astype(np.float64, copy=False) if numbers else np.empty((len(table), 0))
    return Frame(tuple(names), matrix, texts)


def _text(cells: list[Any], what: str) -> np.ndarray:
    """Return cells as an array of text, None where one is missing."""
    missing = [cell is None or (isinstance(cell, float) and np.isnan(cell)) for cell in cells]
    for i, (cell, gone) in enumerate(zip(cells, missing, strict=True)):
        if not gone and not isinstance(cell, str):
            raise ValueError(f"{what}: sample {i + 1} is {shown(cell)}; give numbers or text, or leave the column out")
    return text_column([None if gone else cell for cell, gone in zip(cells, missing, strict=True)])


def column_of(y: Any) -> Any:
    """Return targets as an array: a Series, or a DataFrame of one column or more; anything else as it is.

    Text is an array of ``str`` objects.
    """
    if is_table(y):
        frame = frame_of(y, "y")
        return frame.column(0) if frame.texts and frame.shape[1] == 1 else _numbers_only(frame)
    if isinstance(y, np.ndarray):
        return y
    if isinstance(y, list | tuple) and any(isinstance(label, str) for label in y):
        return text_column(y)
    if hasattr(type(y), "to_list") or hasattr(type(y), "to_pylist"):
        import narwhals.stable.v1 as nw

        series = nw.from_native(y, series_only=True, pass_through=True)
        if isinstance(series, nw.Series):
            numeric = series.dtype.is_numeric() or series.dtype == nw.Boolean
            return series.to_numpy() if numeric else column_of(series.to_list())
    return y


def _numbers_only(frame: Frame) -> np.ndarray:
    for j in frame.texts:
        raise ValueError(f"y has {frame.shape[1]} columns, and {frame.name(j)} is text; classes are one column")
    return frame.numbers
