"""A page: parts made of blocks, which hold the content and not its looks, and plain text as one of its renderers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from textwrap import wrap
from typing import NamedTuple

import numpy as np

WIDTH, LEFT = 100, 47
LARGEST = 10
"""Rows and columns of an array that are shown."""


class Words(NamedTuple):
    """A paragraph."""

    text: str


class Item(NamedTuple):
    """An entry of a numbered list."""

    number: int
    text: str


class Stage(NamedTuple):
    """A step of a phase; what it computes is below it."""

    number: int
    text: str


class Pair(NamedTuple):
    """An equation in the text's notation, one sample a column, and in ours, samples as rows."""

    text: str
    ours: str = ""


class Note(NamedTuple):
    """Remarks on the pair above: on its left, on its right, and a number at the end of the line."""

    text: str
    ours: str
    end: str = ""


class Formula(NamedTuple):
    """An equation on a line of its own, and whether it agrees with finite differences."""

    text: str
    check: str = ""


class Table(NamedTuple):
    """Rows of cells, the first row a header; ``align`` has "<" or ">" for each column, ``widths`` its least width."""

    rows: Sequence[Sequence[str]]
    align: str
    widths: Sequence[int]
    header: bool = True


class Arrays(NamedTuple):
    """Matrices by name, side by side; shown if values are requested."""

    arrays: Mapping[str, np.ndarray]


Block = Words | Item | Stage | Pair | Note | Formula | Table | Arrays


class Part(NamedTuple):
    """A part of a page."""

    title: str
    blocks: list[Block]


@dataclass
class Page:
    """A title, an introduction and numbered parts."""

    title: str
    introduction: list[Block] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)

    def part(self, title: str, *blocks: Block) -> None:
        """Begin a part."""
        self.parts.append(Part(title, list(blocks)))

    def add(self, *blocks: Block) -> None:
        """Add to the part that was begun last, or to the introduction."""
        (self.parts[-1].blocks if self.parts else self.introduction).extend(blocks)

    def plain(self, *, values: bool = False) -> str:
        """Return the page as text of at most 100 columns."""
        lines = [self.title, "", *_lines(self.introduction, values)]
        for number, (title, blocks) in enumerate(self.parts, 1):
            lines += ["", f"{number}  {title.upper()}", "", *_lines(blocks, values)]
        return re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in lines)).strip()


def number(value: float, digits: int = 6) -> str:
    """Return a number with ``digits`` digits after the point, or in scientific notation if it is too large or small."""
    fixed = value == 0 or 10.0**-digits <= abs(value) < 1e6
    value += 0.0  # of -0.0 and 0.0 both are 0.0
    return f"{value:.{digits}f}" if fixed else f"{value:.{max(digits - 3, 1)}e}"


def shown(name: str, array: np.ndarray) -> tuple[str, list[list[str]], bool]:
    """Return an array's name, its first rows and columns as text, and whether it is cut."""
    rows = array[:, None] if name == "y" and array.ndim == 1 else np.atleast_2d(array)  # one target for each sample
    written = (lambda value: number(value, 4)) if array.dtype.kind == "f" else str
    cells = [[written(value) for value in row[:LARGEST].tolist()] for row in rows[:LARGEST]]
    return name, cells, max(rows.shape) > LARGEST


def _lines(blocks: Sequence[Block], values: bool) -> list[str]:
    lines: list[str] = []
    before: Block | None = None
    for block in blocks:
        match block:
            case Words(text):
                lines += ["", *wrap(text, WIDTH, initial_indent="   ", subsequent_indent="   "), ""]
            case Item(number, text) | Stage(number, text):
                apart = [""] * isinstance(block, Stage)
                lines += apart + wrap(text, WIDTH, initial_indent=f"   {number}. ", subsequent_indent="      ")
            case Pair(text, ours):
                beside = len(text) + 2 <= LEFT and LEFT + 6 + len(ours) <= WIDTH
                lines += [f"      {text:{LEFT}}{ours}"] if beside else [f"      {text}", f"      {ours}"]
            case Note(text, ours, end):
                if len(text) + 2 > LEFT:
                    lines.append(f"      {text}")
                    text = ""
                lines.append(f"      {text:{LEFT}}{ours:30}{end:>17}")
            case Formula(text, check):
                whole = f"      {text:69}{check}".rstrip()
                wrapped = wrap(f"{text} {check}", WIDTH, initial_indent="      ", subsequent_indent="         ")
                lines += [""] * isinstance(before, Table) + ([whole] if len(whole) <= WIDTH else wrapped)
            case Table():
                lines += ["", *_table(block), ""]
            case Arrays(arrays) if values:
                lines += ["", *_side_by_side(arrays), ""]
        before = block
    return lines


def _table(table: Table) -> list[str]:
    rows = zip(*table.rows, strict=True)
    widths = [max(least, *map(len, column)) for least, column in zip(table.widths, rows, strict=True)]
    columns = list(zip(table.align, widths, strict=True))
    return [
        "      " + "  ".join(f"{cell:{side}{width}}" for cell, (side, width) in zip(row, columns, strict=True))
        for row in table.rows
    ]


def _side_by_side(arrays: Mapping[str, np.ndarray]) -> list[str]:
    """Return matrices side by side, each under its name, in rows of at most WIDTH columns."""
    rows: list[list[list[str]]] = [[]]
    for name, array in arrays.items():
        name, cells, cut = shown(name, array)
        width = max(8, *(len(cell) for row in cells for cell in row))
        body = [" ".join(f"{cell:>{width}}" for cell in row) for row in cells]
        block = [f"{name + ' …' * cut:>8}", *body]
        used = sum(max(map(len, b)) + 4 for b in rows[-1])
        if rows[-1] and used + max(map(len, block)) + 6 > WIDTH:
            rows.append([])
        rows[-1].append(block)
    lines: list[str] = []
    for blocks in rows:
        for i in range(max(map(len, blocks))):
            each = (f"{b[i] if i < len(b) else '':{max(map(len, b))}}" for b in blocks)
            lines.append("      " + "    ".join(each))
        lines.append("")
    return lines[:-1]
