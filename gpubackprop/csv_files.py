"""CSV files as arrays: delimiter and header are detected, and a cell that cannot be used is reported by row and column.

Apache Arrow splits lines into cells and parses numbers, some megabytes at a time. Nothing is guessed silently: an
ambiguous file is an error, and :attr:`Table.found` says what was found. Rows are counted as in an editor or a
spreadsheet: from 1, with the header and blank lines.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpubackprop import csv_lines
from gpubackprop.csv_lines import DELIMITERS, Block, CsvError, is_number, to_float
from gpubackprop.definitions import check_flag

AT_ONCE = 1 << 20  # bytes parsed at once: they stay in the caches
WIDEST = 100_000  # columns; each takes Arrow some kilobytes
SAMPLE = 100  # rows by which the delimiter and the header are judged
MISSING = {"", "nan", "na", "n/a", "#n/a", "null", "none", "?", "-", "."}  # in a column of numbers


@dataclass
class Table:
    """Features, targets, and a line that says how the file was read.

    Attributes
    ----------
    X : array, shape (n, d)
    y : array, shape (n, targets) or (n,)
        float64; for a classification (n,), and of ``str`` objects if the labels are text.
    found : str
    """

    X: np.ndarray
    y: np.ndarray
    found: str


def read_csv(
    content: bytes,
    *,
    classification: bool,
    targets: int = 1,
    target: str | int | None = None,
    header: bool | None = None,
) -> Table:
    """Return the numbers in a CSV file.

    Parameters
    ----------
    content : bytes
        UTF-8, or UTF-16 with a byte-order mark. Values are separated by commas, semicolons, tabs or bars, numbers may have decimal
        commas where commas do not separate, and a quoted value ends on its own line. Blank lines are skipped.
    classification : bool
        There is one target; it may be text.
    targets : int
        How many columns, the last ones, are targets.
    target : str or int, optional
        The name of the target column, or its number from 1.
    header : bool, optional
        Whether the first row holds names; detected by default.

    Raises
    ------
    CsvError
        For anything but a complete table of numbers (and labels).
    """
    header = None if header is None else check_flag("header", header)
    name = None if target is None else str(target)
    return _Reader(classification, 1 if classification else targets, name, header).read(csv_lines.normal(content))


class _Reader:
    """Reads one file; what was found is kept for messages."""

    def __init__(self, classification: bool, targets: int, target: str | None, header: bool | None) -> None:
        self.classification, self.targets, self.target, self.header = classification, targets, target, header
        self.delimiter = ","
        self.first: list[str] = []  # the cells of the first row
        self.first_at, self.row_bytes = 1, 0  # its number and its length
        self.is_target: list[bool] = []
        self.comma: str = ""  # where a number has a decimal comma, and where a decimal point
        self.point: str = ""
        self.labels: dict[bool, str] = {}  # places of the first numeric label and the first other one
        self.unsure = False  # whether the first row is a sample: only its label could tell

    def read(self, content: bytes) -> Table:
        features: list[np.ndarray] = []
        labels: list[Any] = []
        for block in csv_lines.blocks(content):
            if not self.first:
                if not block.rows:
                    continue
                self.first_at, self.row_bytes = block.rows[0][0], len(block.rows[0][1])
                self.delimiter = csv_lines.delimiter_of([row for _, row in block.rows[:SAMPLE]])
                columns = self._begin(self._text(block), block)
            else:
                columns = self._plain(block) or self._text(block)
            if columns:
                features.append(self._features(columns, block))
                labels.append(self._targets(columns, block))
        if not self.first:
            raise CsvError("it is empty")
        X = np.concatenate(features)
        if not len(X):
            raise CsvError("it has a header and no other row")
        y = np.concatenate(labels)
        self._check(y)
        return Table(X, y, self._found(len(X)))

    def _begin(self, columns: list[Any], block: Block) -> list[Any]:
        """Find header and target by the first rows; return the rows of the first block that are samples."""
        width = len(columns)
        if width <= self.targets:
            parted = f"{width} columns, separated by {DELIMITERS[self.delimiter]}" if width > 1 else "1 column"
            raise CsvError(
                f"it has {parted}; at least one feature and {self.targets} target column{'s' * (self.targets > 1)} are needed, "
                "separated by commas, semicolons, tabs or |"
            )
        self.first = [column[0].as_py() for column in columns]
        self.is_target = [j >= width - self.targets for j in range(width)]
        below = [column.slice(1, SAMPLE).to_pylist() for column in columns]
        if self.target is not None:
            self._choose_target(self.target, below)
        if self.header is None:
            labels = columns[self.is_target.index(True)].slice(1).to_pylist()
            self.header = self._is_header(below, labels)
        block.skipped = int(self.header)
        return [column.slice(block.skipped) for column in columns]

    def _choose_target(self, target: str, below: list[list[str]]) -> None:
        if self.targets != 1:
            raise CsvError(f"target names one column; targets is {self.targets}")
        named = [j for j, name in enumerate(self.first) if name == target]
        number = int(target) if _is_whole(target) else 0
        numbered = [number - 1] if 1 <= number <= len(self.first) else []
        # a number, or a label of the column, can also be in a sample
        if named and self.header is None and (self._is_number(target) or any(target in below[j] for j in named)):
            raise self._cannot_tell()
        found = [] if self.header is False else named
        if len(found) == 1:
            self.header = True
        elif not found and numbered:
            found = numbered
        else:
            names = _shorten(", ".join(map(repr, self.first)), 200)
            raise CsvError(
                f"target is {target!r}, which {len(found) or 'no'} column{'s are' if len(found) > 1 else ' is'} called; "
                f"row {self.first_at} holds {names}: give a name, or a number from 1 to {len(self.first)}"
            )
        self.is_target = [j == found[0] for j in range(len(self.first))]

    def _is_header(self, below: list[list[str]], labels: list[str]) -> bool:
        """Return whether the first row holds names: text above columns that are mostly numbers."""
        if not below[0]:  # the only row
            return not any(map(self._is_number, self.first))
        features = [j for j, is_target in enumerate(self.is_target) if not is_target]
        target = self.is_target.index(True)
        numeric = [2 * sum(map(self._is_number, column)) >= len(column) for column in below]
        named = [
            is_numeric and not self._is_number(cell) and cell.lower() not in MISSING
            for cell, is_numeric in zip(self.first, numeric, strict=True)
        ]
        names = sum(named[j] for j in features)
        # names may be whole numbers, such as years; they stand out above decimals, or with a label of their own
        whole = len({self.first[j] for j in features if _is_whole(self.first[j])}) == len(features)
        above_decimals = whole and not any(_is_whole(cell) for j in features for cell in below[j])
        if self.classification and not numeric[target]:
            if self.first[target] and self.first[target] in labels:
                return False
            if 2 * names > len(features):
                return True
            sure, self.unsure = not names, whole
        else:
            if any(map(named.__getitem__, self._targets_at())) or 1 < names == len(features):
                return True
            second = [column[0] for column in below]
            sure = not names and (not _consecutive(self.first) or _consecutive(second))
            self.unsure = self.classification and above_decimals
            if above_decimals and not self.classification:
                sure = sure and (_is_whole(below[target][0]) or not _is_whole(self.first[target]))
        if not sure:
            raise self._cannot_tell()
        return False

    def _targets_at(self) -> list[int]:
        return [j for j, is_target in enumerate(self.is_target) if is_target]

    def _cannot_tell(self) -> CsvError:
        names = _shorten(", ".join(map(repr, self.first)), 200)
        return CsvError(
            f"row {self.first_at} may be a header or a sample: {names}; say which by --header or --no-header (header=True or False)"
        )

    # ------------------------------------------------------------------ cells

    def _plain(self, block: Block) -> list[Any] | None:
        """Return the columns of a block in which nothing is amiss, features as numbers; or None."""
        import pyarrow as pa
        import pyarrow.compute as pc

        content = block.content
        if b'"' in content:
            return None
        if self.delimiter != "," and (self.comma or b"," in content or (not self.point and b"." in content)):
            return None  # there may be decimal commas, or conflicts with them
        types = [pa.string() if target and self.classification else pa.float64() for target in self.is_target]
        try:
            table = csv_lines.parse(content, self.delimiter, types, at_once=max(AT_ONCE, 4 * self.row_bytes))
        except pa.ArrowInvalid:
            return None
        if len(table) != block.newlines + (content[-1:] != b"\n"):  # blank lines
            return None
        columns = [column.combine_chunks() for column in table.columns]
        if not all(pc.all(pc.is_finite(column)).as_py() for column in columns if column.type == pa.float64()):
            return None
        return [pc.utf8_trim_whitespace(column) if column.type == pa.string() else column for column in columns]

    def _text(self, block: Block) -> list[Any]:
        """Return the columns of a block as text without blanks around it: of no columns if it has no rows."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if not block.rows:
            return []
        for number, row in block.rows if not block.content.isascii() else ():
            try:
                row.decode()
            except UnicodeDecodeError as error:
                byte = row[error.start]
                raise CsvError(f"row {number} is not UTF-8 (byte 0x{byte:02x}); save the file as UTF-8") from None
        content = b"\n".join(row for _, row in block.rows)
        if b'"' in content:
            content = csv_lines.without_blanks(content, block, self.delimiter)
        # the first row of the file says how many columns there are
        wide = content.partition(b"\n")[0].count(self.delimiter.encode()) + 1
        if not self.first and wide > WIDEST:
            raise CsvError(f"row {block.rows[0][0]} has {wide:,} columns; {WIDEST:,} can be read: use an .npz file")
        width = len(self.first) or len(
            csv_lines.parse(content.partition(b"\n")[0] + b"\n", self.delimiter).column_names
        )
        ragged: list[Any] = []

        def refuse(row: Any) -> str:
            ragged.append(row)
            return "error"

        try:
            table = csv_lines.parse(content, self.delimiter, [pa.string()] * width, refuse)
        except pa.ArrowInvalid as error:
            for number, row in block.rows if ragged else ():
                if row.decode() == ragged[0].text:
                    have, want = ragged[0].actual_columns, ragged[0].expected_columns
                    raise CsvError(f"row {number} has {have} column{'s' * (have > 1)}, the first has {want}") from None
            raise CsvError(" ".join(str(error).split())) from None
        if len(table) != len(block.rows):
            raise CsvError(f"row {csv_lines.unclosed(block, self.delimiter)} has a quotation mark that is not closed")
        return [pc.utf8_trim_whitespace(column.combine_chunks()) for column in table.columns]

    # ------------------------------------------------------------------ numbers and labels

    def _features(self, columns: list[Any], block: Block) -> np.ndarray:
        return self._matrix([j for j, target in enumerate(self.is_target) if not target], columns, block)

    def _matrix(self, chosen: list[int], columns: list[Any], block: Block) -> np.ndarray:
        """Return the chosen columns as numbers, all finite."""
        result = np.empty((len(columns[0]), len(chosen)))
        whole = True
        for k, j in enumerate(chosen):
            values = self._numbers(columns[j], j, block)
            if values is None:
                whole = False
                break
            result[:, k] = values
        if not whole or not np.isfinite(result).all():
            raise self._bad_cell(chosen, columns, block)
        return result

    def _numbers(self, column: Any, j: int, block: Block) -> np.ndarray | None:
        """Return a column as numbers, or None if some cell is no number."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if pa.types.is_floating(column.type):
            return np.asarray(column.to_numpy())
        if self.delimiter != "," and len(column):
            for mark in ("comma", "point"):
                where = pc.match_substring(column, "," if mark == "comma" else ".")
                if not getattr(self, mark) and pc.any(where).as_py():
                    i = pc.index(where, True).as_py()
                    setattr(self, mark, f"{self._place(block.number(i), j)} is {column[i].as_py()!r}")
            if self.comma and self.point:
                raise CsvError(f"decimal commas and decimal points in one file: {self.comma}, {self.point}")
            if self.comma:
                column = pc.replace_substring(column, ",", ".")
        return to_float(column)

    def _bad_cell(self, chosen: list[int], columns: list[Any], block: Block) -> CsvError:
        """Return the error for the first cell that is not a finite number."""
        worst: tuple[int, int, str] | None = None
        for j in chosen:
            for i, cell in enumerate(columns[j].to_pylist()[: worst[0] if worst else None]):
                if not self._is_number(cell) or not np.isfinite(float(cell.replace(",", "."))):
                    worst = (i, j, cell)
                    break
        if worst is None:
            return CsvError(f"the rows from {block.number(0)} on hold a cell that is not a number")
        return self._cell_error(*worst, block)

    def _cell_error(self, i: int, j: int, cell: str, block: Block) -> CsvError:
        place = self._place(block.number(i), j)
        if cell.lower() in MISSING:
            return CsvError(
                f"{place} is missing{f' ({cell!r})' if cell else ''}; fill it in, or remove the row or the column"
            )
        if self._is_number(cell) or cell.lower().lstrip("+-") in ("inf", "infinity"):
            return CsvError(f"{place} is {_shorten(cell)!r}, which is not a finite number")
        return CsvError(f"{place} is {_shorten(cell)!r}, which is not a number")

    def _targets(self, columns: list[Any], block: Block) -> np.ndarray:
        chosen = self._targets_at()
        if not self.classification:
            return self._matrix(chosen, columns, block)
        import pyarrow.compute as pc

        j = chosen[0]
        cells = columns[j].to_pylist()
        kinds = {cell: self._is_number(cell) for cell in pc.unique(columns[j]).to_pylist()}
        missing = next((cell for cell in kinds if cell.lower() in ("", "nan", "?")), None)
        if missing is not None:
            i = cells.index(missing)
            raise self._cell_error(i, j, missing, block)
        for cell, kind in kinds.items():
            if kind not in self.labels:
                self.labels[kind] = f"{self._place(block.number(cells.index(cell)), j)} is {_shorten(cell)!r}"
        if not all(kinds.values()):
            return np.array(cells, object)
        result = self._matrix([j], columns, block)[:, 0]
        large = np.abs(result) >= 2**53
        if large.any():
            i = int(np.argmax(large))
            raise CsvError(f"{self._place(block.number(i), j)} is {_shorten(cells[i])!r}: too large for a class label")
        return result

    def _check(self, y: np.ndarray) -> None:
        """Check all labels together."""
        if len(self.labels) == 2:
            raise CsvError(
                f"the target is a number in some rows and text in others: {self.labels[True]}, {self.labels[False]}"
            )
        if self.unsure:
            first, others = y[0], Counter(y[1:].tolist())
            if first not in others and min(others.values()) > 1:
                raise self._cannot_tell()

    def _is_number(self, cell: str) -> bool:
        return is_number(cell, self.delimiter)

    def _place(self, row: int, j: int) -> str:
        return f"row {row}, {self._name(j)}"

    def _name(self, j: int) -> str:
        name = self.first[j] if self.header else ""
        return f"column {_shorten(name)!r}" if name and self.first.count(name) == 1 else f"column {j + 1}"

    def _found(self, rows: int) -> str:
        chosen = [self._name(j) for j in self._targets_at()]
        return (
            f"{rows:,} row{'s' * (rows > 1)} of {len(self.first)} columns, separated by {DELIMITERS[self.delimiter]}"
            f"{' (with decimal commas)' * bool(self.comma)}, {f'a header in row {self.first_at}' if self.header else 'no header'}; "
            f"target: {', '.join(chosen)}"
        )


def _is_whole(cell: str) -> bool:
    """Return whether a cell is a whole number, as names and numbers of columns may be."""
    return len(cell) < 20 and cell.isdecimal() and cell.isascii()


def _consecutive(cells: list[str]) -> bool:
    """Return whether cells are consecutive whole numbers, such as 0, 1, 2 (names of columns)."""
    if len(cells) < 2 or not all(map(_is_whole, cells)):
        return False
    return [int(cell) for cell in cells] == list(range(int(cells[0]), int(cells[0]) + len(cells)))


def _shorten(text: str, most: int = 40) -> str:
    return text if len(text) <= most else f"{text[:most]}..."
