"""CSV files as arrays: delimiter and header are detected, and a cell that cannot be used is reported by row and column.

Apache Arrow splits lines into cells and parses numbers, some megabytes at a time. Nothing is guessed silently: an
ambiguous file is an error, and ``Table.found`` says what was found. Rows are counted as in an editor or a
spreadsheet: from 1, with the header and blank lines.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpubackprop import csv_lines
from gpubackprop.csv_lines import DELIMITERS, Block, CsvError, is_number, to_float
from gpubackprop.definitions import check_flag, shown
from gpubackprop.frames import Frame, text_column

AT_ONCE = 1 << 20  # bytes parsed at once: they stay in the caches
WIDEST = 100_000  # columns; each takes Arrow some kilobytes
SAMPLE = 100  # rows by which the delimiter and the header are judged
MISSING = {"", "nan", "na", "n/a", "#n/a", "null", "none", "?", "-", "."}  # in a column of numbers
MISSING_TEXT = MISSING - {"none", "-", "."}  # in a column of text


@dataclass
class Table:
    """Features, targets, and a line that says how the file was read.

    Attributes
    ----------
    X : array, shape (n, d), or Frame
    y : array, shape (n, targets) or (n,)
        float64; for a classification (n,), and of ``str`` objects if the labels are text.
    found : str
    """

    X: Any
    y: np.ndarray
    found: str


def read_csv(
    content: bytes,
    *,
    classification: bool,
    targets: int = 1,
    target: str | int | None = None,
    header: bool | None = None,
    delimiter: str | None = None,
    drop: Sequence[str] = (),
    frame: bool = False,
    missing: bool = False,
) -> Table:
    """Return the numbers in a CSV file, or with ``frame`` its columns of numbers and text.

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
    delimiter : str, optional
        ``","``, ``";"``, ``"|"`` or a tab; detected by default.
    drop : sequence of str
        Columns to leave out, by name or number.
    frame : bool
        Features may be text: a column is if no cell in its first rows is a number. X is then a :class:`Frame`.
    missing : bool
        With ``frame``: cells may be missing.

    Raises
    ------
    CsvError
        For anything but a complete table of numbers (and labels).
    """
    header = None if header is None else check_flag("header", header)
    name = None if target is None else str(target)
    reader = _Reader(classification, 1 if classification else targets, name, header, delimiter)
    reader.drop, reader.frame, reader.missing = [str(column) for column in drop], frame, missing
    return reader.read(csv_lines.blocks(csv_lines.normal(content)))


def check_delimiter(delimiter: str) -> str:
    """Return a delimiter; ``\\t`` and "tab" are a tab."""
    found = {"\\t": "\t", "tab": "\t"}.get(delimiter, delimiter)
    if found not in DELIMITERS:
        raise CsvError(f"delimiter is {shown(delimiter)}; choose , ; | or tab")
    return found


def read_rows(
    blocks: Iterable[Block],
    *,
    names: Sequence[str] | None,
    is_text: Sequence[bool],
    with_target: bool = False,
    target: str | None = None,
    classification: bool = False,
    header: bool | None = None,
    delimiter: str | None = None,
) -> Iterator[tuple[Frame, np.ndarray | None, str]]:
    """Yield the known columns of a file block by block: a table of them, the target if there is one, and how it was read.

    Parameters
    ----------
    blocks : iterable of Block
    names : sequence of str, optional
        The columns; those of the file may be in another order, and others are left out. Without names: all columns in order.
    is_text : sequence of bool
        For each column.
    with_target : bool
        There is a target too.
    target : str, optional
        Its name, or its number; the last column by default.
    """
    reader = _Reader(classification, 1, target, header, delimiter)
    reader.frame = reader.missing = True
    reader.known = (None if names is None else list(names), list(is_text))
    reader.with_target = with_target
    for X, y in reader.parts(blocks):
        yield X, (y if with_target else None), reader.found()
    if not reader.first:
        raise CsvError("it is empty")


class _Reader:
    """Reads one file; what was found is kept for messages."""

    def __init__(
        self, classification: bool, targets: int, target: str | None, header: bool | None, delimiter: str | None
    ) -> None:
        self.classification, self.targets, self.target, self.header = classification, targets, target, header
        self.delimiter = "," if delimiter is None else check_delimiter(delimiter)
        self.first: list[str] = []  # the cells of the first row
        self.first_at, self.row_bytes = 1, 0  # its number and its length
        self.is_target: list[bool] = []
        self.comma: str = ""  # where a number has a decimal comma, and where a decimal point
        self.point: str = ""
        self.labels: dict[bool, str] = {}  # places of the first numeric label and the first other one
        self.unsure = False  # whether the first row is a sample: only its label could tell
        self.detects = delimiter is None
        self.rows = 0
        # for tables with text
        self.frame = self.missing = self.with_target = False
        self.drop: list[str] = []
        self.is_text: list[bool] = []
        self.chosen: list[int] = []  # the columns that are features, in order
        self.known: tuple[list[str] | None, list[bool]] | None = (
            None  # their names and kinds, where a network wants them
        )

    def read(self, blocks: Iterable[Block]) -> Table:
        parts = list(self.parts(blocks))
        if not self.first:
            raise CsvError("it is empty")
        if not self.rows:
            raise CsvError("it has a header and no other row")
        y = np.concatenate([y for _, y in parts])
        self._check(y)
        return Table(_joined([X for X, _ in parts]), y, self.found())

    def parts(self, blocks: Iterable[Block]) -> Iterator[tuple[Any, np.ndarray]]:
        """Yield the features and targets of each block."""
        for block in blocks:
            if not self.first:
                if not block.rows:
                    continue
                self.first_at, self.row_bytes = block.rows[0][0], len(block.rows[0][1])
                if self.detects:
                    self.delimiter = csv_lines.delimiter_of([row for _, row in block.rows[:SAMPLE]])
                columns = self._begin(self._text(block), block)
            else:
                columns = self._plain(block) or self._text(block)
            if columns:
                self.rows += len(columns[0])
                yield self._features(columns, block), self._targets(columns, block)

    def _begin(self, columns: list[Any], block: Block) -> list[Any]:
        """Find header and target by the first rows; return the rows of the first block that are samples."""
        width = len(columns)
        if self.known is not None:
            return self._begin_known(columns, block)
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
        columns = [column.slice(block.skipped) for column in columns]
        dropped = {self._place_of(column) for column in self.drop}
        self.chosen = [j for j, target in enumerate(self.is_target) if not target and j not in dropped]
        self.is_text = [self.frame and j in self.chosen and self._is_text(column) for j, column in enumerate(columns)]
        if not self.chosen:
            raise CsvError("no column is left as a feature")
        return columns

    def _begin_known(self, columns: list[Any], block: Block) -> list[Any]:
        """Find the columns that a network wants."""
        assert self.known is not None
        names, is_text = self.known
        self.first = [column[0].as_py() for column in columns]
        if self.header is None:
            self.header = names is not None and not set(names).isdisjoint(self.first)
        if names is not None and self.header:
            missing = [name for name in names if name not in self.first]
            if missing:
                raise CsvError(
                    f"it has no column {', '.join(map(shown, missing[:5]))}; its columns are {shown(self.first, 200)}"
                )
            self.chosen = [self.first.index(name) for name in names]
        else:
            target = self._target_at()
            self.chosen = [j for j in range(len(columns)) if j != target]
            if len(self.chosen) != len(is_text):
                named = f", named {shown(names, 200)}" if names is not None else ""
                raise CsvError(
                    f"it has {len(self.chosen)} columns of features, its first row {shown(self.first, 200)}; the network "
                    f"takes {len(is_text)}{named}"
                )
        target = self._target_at()
        if target in self.chosen:
            raise CsvError(
                f"the target, {self._name(self.chosen[self.chosen.index(target)])}, is one of the features; name another"
            )
        self.is_target = [j == target for j in range(len(columns))]
        kinds = dict(zip(self.chosen, is_text, strict=True))
        self.is_text = [kinds.get(j, False) for j in range(len(columns))]
        block.skipped = int(self.header)
        return [column.slice(block.skipped) for column in columns]

    def _target_at(self) -> int | None:
        """Return the place of the target, where there is one."""
        if not self.with_target:
            return None
        return len(self.first) - 1 if self.target is None else self._place_of(self.target)

    def _place_of(self, name: str) -> int:
        """Return the place of a column by its name or number."""
        named = [j for j, cell in enumerate(self.first) if self.header and cell == name]
        if not named and _is_whole(name) and 1 <= int(name) <= len(self.first):
            return int(name) - 1
        if len(named) != 1:
            raise CsvError(
                f"{len(named) or 'no'} column is called {shown(name)}; row {self.first_at} holds {shown(self.first, 200)}"
            )
        return named[0]

    def _is_text(self, column: Any) -> bool:
        """Return whether no cell is a number, and some cell is not missing."""
        import pyarrow.compute as pc

        cells = [cell for cell in pc.unique(column).to_pylist() if cell.lower() not in MISSING_TEXT]
        return bool(cells) and not any(map(self._is_number, cells))

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
        if self.frame:  # names stand out above numbers only
            numbers = [j for j in features if any(map(self._is_number, below[j]))]
            if not numbers:
                raise self._cannot_tell()
            features = numbers
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
        types = [
            pa.string() if (target and self.classification) or text or (self.frame and not target and j not in self.chosen)
            else pa.float64()
            for j, (target, text) in enumerate(zip(self.is_target, self.is_text, strict=True))
        ]  # fmt: skip
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

    def _features(self, columns: list[Any], block: Block) -> Any:
        numbers = self._matrix([j for j in self.chosen if not self.is_text[j]], columns, block)
        if not self.frame:
            return numbers
        texts = {k: self._cells(columns[j], j, block) for k, j in enumerate(self.chosen) if self.is_text[j]}
        return Frame(self._names(), numbers, texts, self.rows - len(numbers) + 1)

    def _names(self) -> tuple[str, ...] | None:
        if not self.header:
            return None
        names = tuple(self.first[j] or f"column {j + 1}" for j in self.chosen)
        if len(set(names)) < len(names):
            raise CsvError(
                f"two columns are called {shown(max(names, key=names.count))}; give them different names, or drop one"
            )
        return names

    def _cells(self, column: Any, j: int, block: Block) -> np.ndarray:
        """Return a column of text, None where a cell is missing."""
        cells = column.to_pylist()
        gone = {cell for cell in set(cells) if cell.lower() in MISSING_TEXT}
        if gone and not self.missing:
            i = next(i for i, cell in enumerate(cells) if cell in gone)
            raise self._cell_error(i, j, cells[i], block)
        return text_column([None if cell in gone else cell for cell in cells])

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
        finite = not np.isinf(result).any() if self.missing else np.isfinite(result).all()
        if not whole or not finite:
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
        found = to_float(column)
        if found is None and self.missing:
            gone = pc.is_in(pc.utf8_lower(column), value_set=pa.array(sorted(MISSING)))
            found = to_float(pc.if_else(gone, "nan", column))
        return found

    def _bad_cell(self, chosen: list[int], columns: list[Any], block: Block) -> CsvError:
        """Return the error for the first cell that is not a finite number."""
        worst: tuple[int, int, str] | None = None
        for j in chosen:
            for i, cell in enumerate(columns[j].to_pylist()[: worst[0] if worst else None]):
                if self.missing and cell.lower() in MISSING:
                    continue
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
                + "; --missing median fills in numbers" * self.frame
            )
        if self._is_number(cell) or cell.lower().lstrip("+-") in ("inf", "infinity"):
            return CsvError(f"{place} is {_shorten(cell)!r}, which is not a finite number")
        return CsvError(f"{place} is {_shorten(cell)!r}, which is not a number")

    def _targets(self, columns: list[Any], block: Block) -> np.ndarray:
        chosen = self._targets_at()
        if not chosen:  # the network is asked for it
            return np.empty(0)
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

    def found(self) -> str:
        """Return how the file was read."""
        chosen, rows = [self._name(j) for j in self._targets_at()], self.rows
        return (
            f"{rows:,} row{'s' * (rows > 1)} of {len(self.first)} columns, separated by {DELIMITERS[self.delimiter]}"
            f"{' (with decimal commas)' * bool(self.comma)}, {f'a header in row {self.first_at}' if self.header else 'no header'}"
            + f"; target: {', '.join(chosen)}"
            * bool(chosen)
        )


def _joined(parts: list[Any]) -> Any:
    """Return the features of all blocks together."""
    if not isinstance(parts[0], Frame):
        return np.concatenate(parts)
    texts = {j: np.concatenate([part.texts[j] for part in parts]) for j in parts[0].texts}
    return Frame(parts[0].names, np.concatenate([part.numbers for part in parts]), texts)


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
