"""CSV files as lines and cells: blocks of rows, the delimiter, quotation marks; ``csv_files`` says what they mean."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, BinaryIO

import numpy as np

FIRST_BLOCK, BLOCK = 1 << 20, 1 << 22  # bytes looked at at a time
LONGEST = 1 << 30  # bytes of a row
NEWLINE = b"\n"
DELIMITERS = {"\t": "tabs", ";": "semicolons", "|": "bars", ",": "commas"}
BYTE_ORDER_MARKS = re.compile(rb"(\xef\xbb\xbf)*")
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)  # in linear time: one way to match


class CsvError(ValueError):
    """What is wrong with the content of a file; the caller adds its name."""


def normal(content: bytes) -> bytes:
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


class Block:
    """Some whole lines of a file. Which of them are rows is looked up only where a message or a careful look needs it.

    Attributes
    ----------
    content : bytes
    line, newlines : int
        The number of its first line, and how many end in it.
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
        """Return the number of the line of sample i."""
        return self.rows[i + self.skipped][0]


def blocks(content: bytes) -> Iterator[Block]:
    """Yield a file in blocks of lines, which end with newlines alone; the first block is small, by it all is judged."""
    start, line, size = 0, 1, FIRST_BLOCK
    while start < len(content):
        end = content.find(b"\n", start + size) + 1 or len(content)
        if end - start > LONGEST:
            raise CsvError(f"row {line} or later is longer than {LONGEST:,} bytes")
        block = content[start:end]
        start, size = end, BLOCK
        if b"\r" in block:
            block = block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        found = Block(block, line)
        yield found
        line += found.newlines


def stream(file: BinaryIO) -> Iterator[Block]:
    """Yield a file in blocks of lines like :func:`blocks`, and hold no more than one; UTF-16 and old line ends are read whole."""
    start, line = file.read(FIRST_BLOCK), 1
    if start[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\n" not in start:
        yield from blocks(normal(start + file.read()))
        return
    rest = start[BYTE_ORDER_MARKS.match(start).end() :]  # type: ignore[union-attr]
    while rest:
        more = file.read(BLOCK)
        end = len(rest) if not more else rest.rfind(b"\n") + 1
        if end > LONGEST or (more and len(rest) > LONGEST):
            raise CsvError(f"row {line} or later is longer than {LONGEST:,} bytes")
        block, rest = rest[:end], rest[end:] + more
        if (at := block.find(b"\0")) >= 0:
            raise CsvError(f"row {line + block.count(NEWLINE, 0, at)} holds a NUL byte: it is not a text file")
        if b"\r" in block:
            block = block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if block:
            found = Block(block, line)
            yield found
            line += found.newlines


def delimiter_of(rows: list[bytes]) -> str:
    """Return the delimiter that is in every row alike and leaves the largest share of numbers; commas if there is none."""
    sample = [re.sub(r'"[^"]*"', '""', row.decode(errors="replace")) for row in rows]
    candidates = [d for d in DELIMITERS if d in sample[0]]
    alike = [d for d in candidates if len({row.count(d) for row in sample}) == 1]

    def share(delimiter: str) -> float:
        cells = [cell.strip() for row in sample[-20:] for cell in row.split(delimiter)]
        return sum(is_number(cell, delimiter) for cell in cells) / len(cells)

    return max(alike or candidates or [","], key=share)


def is_number(cell: str, delimiter: str) -> bool:
    """Return whether a cell is a number; it may have a decimal comma where commas do not separate."""
    return bool(NUMBER.fullmatch(cell if delimiter == "," else cell.replace(",", ".")))


def parse(
    content: bytes,
    delimiter: str,
    types: list[Any] | None = None,
    refuse: Callable[[Any], str] | None = None,
    at_once: int | None = None,
) -> Any:
    """Return a table of Arrow, parsed so many bytes at once; without types, its columns are those of the first row."""
    import pyarrow as pa
    from pyarrow import csv as arrow_csv

    names = [f"f{j}" for j in range(len(types or ()))]
    return arrow_csv.read_csv(
        pa.py_buffer(content),
        arrow_csv.ReadOptions(
            block_size=at_once or len(content) + 1, column_names=names, autogenerate_column_names=not types
        ),
        arrow_csv.ParseOptions(delimiter=delimiter, invalid_row_handler=refuse),
        arrow_csv.ConvertOptions(column_types=dict(zip(names, types or (), strict=True)), null_values=[]),
    )


def without_blanks(content: bytes, block: Block, delimiter: str) -> bytes:
    """Return rows without blanks before opening quotation marks; each mark must be closed in its own row."""
    for number, row in block.rows:
        if row.count(b'"') % 2:
            raise CsvError(f"row {number} has a quotation mark that is not closed")
    if b' "' not in content and (delimiter == "\t" or b'\t"' not in content):
        return content
    blanks = rb" +" if delimiter == "\t" else rb"[ \t]+"
    before = rb"(^|" + re.escape(delimiter.encode()) + rb")" + blanks + rb'(?="(?!"))'
    return re.sub(before, rb"\1", content, flags=re.MULTILINE)


def unclosed(block: Block, delimiter: str) -> int:
    """Return the number of the first row with a quotation mark that is not closed."""
    for number, row in block.rows:
        try:
            list(csv.reader([row.decode()], delimiter=delimiter, strict=True))
        except csv.Error:
            return number
    return block.line


def to_float(column: Any) -> np.ndarray | None:
    """Return a column of text as numbers, or None if some cell is no number."""
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        return np.asarray(pc.cast(column, pa.float64()).to_numpy(zero_copy_only=False))
    except pa.ArrowInvalid:
        return None
