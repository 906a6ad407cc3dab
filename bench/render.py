"""Tables for a terminal of 80 columns, in Markdown, and in HTML."""

from __future__ import annotations

import html
import io
from collections.abc import Iterator

from gpubackprop.bench.case import Row
from gpubackprop.bench.report import Report
from gpubackprop.bench.tables import KERNELS, Column, Table, groups, pivots, tables

WIDTH = 80


def lines_of(*parts: Table | str, headings: bool = True) -> list[str]:
    """Return tables and paragraphs as lines for a terminal."""
    from rich.console import Console

    file = io.StringIO()
    console = Console(file=file, width=WIDTH, color_system=None, markup=False, highlight=False, emoji=False)
    for part in parts:
        for line in [part] if isinstance(part, str) else _rich(part, headings):
            console.print(line)
    return [line.rstrip() for line in file.getvalue().splitlines()]


def _rich(shown: Table, headings: bool) -> Iterator[object]:
    from rich.padding import Padding
    from rich.table import Table as RichTable

    if shown.title:
        title = RichTable.grid(expand=True, padding=(0, 2, 0, 0))
        title.add_column()
        title.add_column(justify="right", no_wrap=True)
        title.add_row(shown.title, shown.facts)
        yield title
    places = [i for i, column in enumerate(shown.columns) if shown.suite not in column.only_page]
    if places:
        found = RichTable(box=None, show_header=headings, padding=(0, 1, 0, 0), pad_edge=False)
        for i in places:
            column = shown.columns[i]
            right = i > 0 and not shown.words
            label = "\n".join(part for part in (column.name, column.unit) if part)
            found.add_column(label, justify="right" if right else "left", min_width=column.width, no_wrap=right)
        for cells in shown.cells:
            found.add_row(*(cells[i] for i in places))
        yield found
    for text in (*shown.wrong, *shown.notes):
        yield Padding(text, (0, 0, 0, 2))


def markdown(report: Report) -> str:
    """Return a report's tables of one line per case in Markdown."""
    return "\n\n".join(map(_markdown, pivots(report)))


def _markdown(shown: Table) -> str:
    lines = [[_label(column) for column in shown.columns], *shown.cells]
    texts = ["| " + " | ".join(cells) + " |" for cells in lines]
    return "\n".join([texts[0], "|" + "---|" * len(shown.columns), *texts[1:]])


def page(shown: Table) -> Iterator[str]:
    """Yield a table in HTML, with its title, what is wrong, and its notes."""
    yield "<div class='case'>"
    if shown.title:
        yield f"<h3>{_text(shown.title)} <span class='small'>{_text(shown.facts)}</span></h3>"
    yield "<div class='scroll'>"
    if shown.words:
        yield "<table class='words'>"
    else:  # all columns but the first are equally wide
        longest = max((len(word) for column in shown.columns[1:] for word in _label(column).split()), default=0)
        yield f"<table class='numbers' style='min-width:{8.5 + max(4.6, 0.57 * longest) * (len(shown.columns) - 1):.1f}rem'>"
    if any(map(_label, shown.columns)):
        yield "<tr>" + "".join(f"<th>{_text(_label(column))}</th>" for column in shown.columns) + "</tr>"
    for cells in shown.cells:
        ours = " class='ours'" if cells[0].startswith("gpubackprop") else ""
        name = _text(cells[0]).replace("_", "_<wbr>")  # a line may end there
        yield (f"<tr><td{ours}>{name}</td>" + "".join(f"<td>{_text(cell)}</td>" for cell in cells[1:]) + "</tr>")
    yield "</table></div>"
    yield from (f"<p class='wrong'>{_text(text)}</p>" for text in shown.wrong)
    yield from (f"<p class='small'>{_text(text)}</p>" for text in shown.notes)
    yield "</div>"


class Terminal:
    """Prints rows as they come: a heading where the suite, the device or the dtype changes, a reason once."""

    def __init__(self) -> None:
        self._last: tuple[str, str, str] | None = None
        self._named: set[tuple[str, ...]] = set()

    def say(self, *parts: Table | str) -> None:
        """Print paragraphs and tables."""
        print("\n".join(lines_of(*parts)), flush=True)

    def show(self, row: Row) -> None:
        """Print a row."""
        print("\n".join(self.lines(row)), flush=True)

    def lines(self, row: Row) -> Iterator[str]:
        """Yield the lines of a row."""
        (group,) = groups([row])
        first = group != self._last
        self._last = group
        if first:
            yield from ("", ", ".join(group).upper())
        for shown in tables([row]):
            yield from lines_of(shown, headings=first or row["suite"] not in KERNELS)
        for name, reason in row["left_out"].items():
            if (row["suite"], row["device"], name, reason) not in self._named:
                self._named.add((row["suite"], row["device"], name, reason))
                yield from lines_of(Table([], [], notes=[f"left out: {name}: {reason}"]))


def _label(column: Column) -> str:
    return ", ".join(part for part in (column.name, column.unit) if part)


def _text(value: object) -> str:
    return html.escape(str(value))
