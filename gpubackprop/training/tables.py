"""Small tables, as text for a terminal and as HTML for a notebook."""

from __future__ import annotations

from collections.abc import Sequence

Rows = Sequence[Sequence[str]]
"""The first holds the heads of the columns."""


def text_table(rows: Rows, right: frozenset[int] = frozenset()) -> str:
    """Return the rows with aligned columns, those in ``right`` to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if j in right else cell.ljust(width)
            for j, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def html_table(rows: Rows, caption: str) -> str:
    """Return the rows as an HTML table without scripts."""
    from html import escape

    head, *body = rows

    def line(row: Sequence[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in row)}</tr>"

    lines = [line(head, "th"), *(line(row, "td") for row in body)]
    return f"<table><caption>{escape(caption)}</caption>{''.join(lines)}</table>"
