"""CSV files as arrays: delimiter and header are detected, and a cell that cannot be used is reported by row and column.

Apache Arrow splits lines into cells and parses numbers, some megabytes at a time. Nothing is guessed silently: an
ambiguous file is an error, and :attr:`Table.found` says what was found. Rows are counted as in an editor or a
spreadsheet: from 1, with the header and blank lines.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from gpubackprop.definitions import check_flag

FIRST_BLOCK, BLOCK = 1 << 20, 1 << 22  # bytes in the first block
AT_ONCE = 1 << 20  # bytes parsed at once: they stay in the caches
LONGEST = 1 << 30  # bytes of a row
WIDEST = 100_000  # columns; each takes Arrow some kilobytes
SAMPLE = 100  # rows that decide the delimiter and the header
DELIMITERS = {"\t": "tabs", ";": "semicolons", "|": "bars", ",": "commas"}
MISSING = {"", "nan", "na", "n/a", "#n/a", "null", "none", "?", "-", "."}  # in a column of numbers
BYTE_ORDER_MARKS = re.compile(rb"(\xef\xbb\xbf)*")
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)  # linear time: there is only one way to match


class CsvError(ValueError):
    """A fault in the content of a file; the caller adds its name."""


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
    return _Reader(classification, 1 if classification else targets, name, header).read(_normal(content))


def _normal(content: bytes) -> bytes:
    """Return UTF-8 without a byte-order mark, with a newline somewhere if there are lines."""
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        try:
            content = content.decode("utf-16").encode()
        except UnicodeError as error:
            raise CsvError(f"it begins like UTF-16, but is not ({error})") from None
    content = content[BYTE_ORDER_MARKS.match(content).end() :]  # type: ignore[union-attr]
    if (at := content.find(b"\0")) >= 0:
        row = content.count(b"\n", 0, at) + 1
        raise CsvError(f"row {row} holds a NUL byte: it is not a text file")
    return content if b"\n" in content else content.replace(b"\r", b"\n")


class _Block:
    """Some complete lines of a file. Which of them are rows is determined only where a message or a close check needs it.

    Attributes
    ----------
    content : bytes
    line, newlines : int
        The number of its first line, and how many lines end in it.
    skipped : int
        Rows before the samples: 1 for a header.
    """

    def __init__(self, content: bytes, line: int) -> None:
        self.content, self.line, self.skipped = content, line, 0
        self.newlines = content.count(b"\n")

    @cached_property
    def rows(self) -> list[tuple[int, bytes]]:
        """The lines that are not blank, with their numbers."""
        lines = enumerate(self.content.split(b"\n"), self.line)
        return [(number, row) for number, row in lines if row and not row.isspace()]

    def number(self, i: int) -> int:
        """Return the line number of sample i."""
        return self.rows[i + self.skipped][0]


def _blocks(content: bytes) -> Iterator[_Block]:
    """Yield a file in blocks of lines that end in newlines; the first is small, since it decides the format."""
    start, line, size = 0, 1, FIRST_BLOCK
    while start < len(content):
        end = content.find(b"\n", start + size) + 1 or len(content)
        if end - start > LONGEST:
            raise CsvError(f"row {line} or later is longer than {LONGEST:,} bytes")
        block = content[start:end]
        start, size = end, BLOCK
        if b"\r" in block:
            block = block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        found = _Block(block, line)
        yield found
        line += found.newlines


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
        for block in _blocks(content):
            if not self.first:
                if not block.rows:
                    continue
                self.first_at, self.row_bytes = block.rows[0][0], len(block.rows[0][1])
                self.delimiter = _delimiter([row for _, row in block.rows[:SAMPLE]])
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

    def _begin(self, columns: list[Any], block: _Block) -> list[Any]:
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

    def _plain(self, block: _Block) -> list[Any] | None:
        """Return the columns of a block without faults, features as numbers; or None."""
        import pyarrow as pa
        import pyarrow.compute as pc

        content = block.content
        if b'"' in content:
            return None
        if self.delimiter != "," and (self.comma or b"," in content or (not self.point and b"." in content)):
            return None  # there may be decimal commas, or conflicts with them
        types = [pa.string() if target and self.classification else pa.float64() for target in self.is_target]
        try:
            table = self._parse(content, types, at_once=max(AT_ONCE, 4 * self.row_bytes))
        except pa.ArrowInvalid:
            return None
        if len(table) != block.newlines + (content[-1:] != b"\n"):  # blank lines
            return None
        columns = [column.combine_chunks() for column in table.columns]
        if not all(pc.all(pc.is_finite(column)).as_py() for column in columns if column.type == pa.float64()):
            return None
        return [pc.utf8_trim_whitespace(column) if column.type == pa.string() else column for column in columns]

    def _text(self, block: _Block) -> list[Any]:
        """Return the columns of a block as stripped text, no columns if it has no rows."""
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
            content = self._quoted(content, block)
        # the first row of the file says how many columns there are
        wide = content.partition(b"\n")[0].count(self.delimiter.encode()) + 1
        if not self.first and wide > WIDEST:
            raise CsvError(f"row {block.rows[0][0]} has {wide:,} columns; {WIDEST:,} can be read: use an .npz file")
        width = len(self.first) or len(self._parse(content.partition(b"\n")[0] + b"\n").column_names)
        ragged: list[Any] = []

        def refuse(row: Any) -> str:
            ragged.append(row)
            return "error"

        try:
            table = self._parse(content, [pa.string()] * width, refuse)
        except pa.ArrowInvalid as error:
            for number, row in block.rows if ragged else ():
                if row.decode() == ragged[0].text:
                    have, want = ragged[0].actual_columns, ragged[0].expected_columns
                    raise CsvError(f"row {number} has {have} column{'s' * (have > 1)}, the first has {want}") from None
            raise CsvError(" ".join(str(error).split())) from None
        if len(table) != len(block.rows):
            raise CsvError(f"row {self._unclosed(block)} has a quotation mark that is not closed")
        return [pc.utf8_trim_whitespace(column.combine_chunks()) for column in table.columns]

    def _parse(
        self,
        content: bytes,
        types: list[Any] | None = None,
        refuse: Callable[[Any], str] | None = None,
        at_once: int | None = None,
    ) -> Any:
        """Return a table of Arrow, parsed in blocks of this size; without types, its columns are those of the first row."""
        import pyarrow as pa
        from pyarrow import csv as arrow_csv

        names = [f"f{j}" for j in range(len(types or ()))]
        return arrow_csv.read_csv(
            pa.py_buffer(content),
            arrow_csv.ReadOptions(
                block_size=at_once or len(content) + 1, column_names=names, autogenerate_column_names=not types
            ),
            arrow_csv.ParseOptions(delimiter=self.delimiter, invalid_row_handler=refuse),
            arrow_csv.ConvertOptions(column_types=dict(zip(names, types or (), strict=True)), null_values=[]),
        )

    def _quoted(self, content: bytes, block: _Block) -> bytes:
        """Return rows without blanks before opening quotation marks; each quotation mark must be closed in its row."""
        for number, row in block.rows:
            if row.count(b'"') % 2:
                raise CsvError(f"row {number} has a quotation mark that is not closed")
        if b' "' not in content and (self.delimiter == "\t" or b'\t"' not in content):
            return content
        blanks = rb" +" if self.delimiter == "\t" else rb"[ \t]+"
        before = rb"(^|" + re.escape(self.delimiter.encode()) + rb")" + blanks + rb'(?="(?!"))'
        return re.sub(before, rb"\1", content, flags=re.MULTILINE)

    def _unclosed(self, block: _Block) -> int:
        for number, row in block.rows:
            try:
                list(csv.reader([row.decode()], delimiter=self.delimiter, strict=True))
            except csv.Error:
                return number
        return block.line

    # ------------------------------------------------------------------ numbers and labels

    def _features(self, columns: list[Any], block: _Block) -> np.ndarray:
        return self._matrix([j for j, target in enumerate(self.is_target) if not target], columns, block)

    def _matrix(self, chosen: list[int], columns: list[Any], block: _Block) -> np.ndarray:
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

    def _numbers(self, column: Any, j: int, block: _Block) -> np.ndarray | None:
        """Return a column as numbers, or None if some cell is not a number."""
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
        return _to_float(column)

    def _bad_cell(self, chosen: list[int], columns: list[Any], block: _Block) -> CsvError:
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

    def _cell_error(self, i: int, j: int, cell: str, block: _Block) -> CsvError:
        place = self._place(block.number(i), j)
        if cell.lower() in MISSING:
            return CsvError(
                f"{place} is missing{f' ({cell!r})' if cell else ''}; fill it in, or remove the row or the column"
            )
        if self._is_number(cell) or cell.lower().lstrip("+-") in ("inf", "infinity"):
            return CsvError(f"{place} is {_shorten(cell)!r}, which is not a finite number")
        return CsvError(f"{place} is {_shorten(cell)!r}, which is not a number")

    def _targets(self, columns: list[Any], block: _Block) -> np.ndarray:
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
        return bool(NUMBER.fullmatch(cell if self.delimiter == "," else cell.replace(",", ".")))

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


def _to_float(column: Any) -> np.ndarray | None:
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        return np.asarray(pc.cast(column, pa.float64()).to_numpy(zero_copy_only=False))
    except pa.ArrowInvalid:
        return None


def _delimiter(rows: list[bytes]) -> str:
    """Return the delimiter that splits every row alike and yields the largest share of numbers; comma if there is none."""
    sample = [re.sub(r'"[^"]*"', '""', row.decode(errors="replace")) for row in rows]
    candidates = [d for d in DELIMITERS if d in sample[0]]
    alike = [d for d in candidates if len({row.count(d) for row in sample}) == 1]

    def share(delimiter: str) -> float:
        cells = [cell.strip() for row in sample[-20:] for cell in row.split(delimiter)]
        return sum(bool(NUMBER.fullmatch(c if delimiter == "," else c.replace(",", "."))) for c in cells) / len(cells)

    return max(alike or candidates or [","], key=share)


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
