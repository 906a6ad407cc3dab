"""A page as a LaTeX document."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from gpubackprop.inspect.page import Arrays, Block, Formula, Item, Note, Page, Pair, Stage, Table, Words, shown
from gpubackprop.inspect.typeset import LATEX_SIGNS, is_equation, latex, write_words

HEAD = r"""\documentclass[11pt]{article}
\usepackage[utf8]{inputenc}
\usepackage{amsmath,amssymb}
\usepackage[margin=2cm]{geometry}
\setlength{\parindent}{0pt}
\setlength{\parskip}{6pt}
\setcounter{MaxMatrixCols}{12}
\newcommand{\pair}[2]{\par\noindent\begin{minipage}[t]{.47\linewidth}\raggedright$\displaystyle #1$\end{minipage}\hfill
  \begin{minipage}[t]{.5\linewidth}\raggedright$\displaystyle #2$\end{minipage}\par}
\newcommand{\note}[3]{{\vspace{-4pt}\noindent\small\begin{minipage}[t]{.47\linewidth}#1\end{minipage}\hfill
  \begin{minipage}[t]{.5\linewidth}#2\hfill #3\end{minipage}\par}}
\begin{document}
"""


def document(page: Page, *, values: bool = False) -> str:
    """Return the page as a LaTeX document, with ``values`` also the arrays."""
    lines = [
        HEAD,
        rf"\begin{{center}}\Large {_text(page.title.capitalize())}\end{{center}}",
        *_blocks(page.introduction, values),
    ]
    for part in page.parts:
        lines += ["", rf"\section{{{_text(part.title)}}}", *_blocks(part.blocks, values)]
    return "\n".join([*lines, r"\end{document}", ""])


def _blocks(blocks: Sequence[Block], values: bool) -> Iterator[str]:
    for block in blocks:
        match block:
            case Words(text):
                yield f"\n{_words(text)}\n"
            case Item(number, text):
                yield rf"\par {number}.~{_words(text)}"
            case Stage(number, text):
                yield rf"\bigskip\par\textbf{{{number}.}}~{_words(text)}\par"
            case Pair(text, ours):
                yield rf"\pair{{{latex(text)}}}{{{latex(ours)}}}"
            case Note(text, ours, end):
                yield rf"\note{{{_words(text)}}}{{{_words(ours)}}}{{{end}}}"
            case Formula(text, check):
                written = rf"$\displaystyle {latex(text)}$" if is_equation(text) else _words(text)
                yield rf"\par\noindent {written}\hfill {_words(check)}\par"
            case Table():
                yield _table(block)
            case Arrays(arrays) if values:
                yield _arrays(arrays)


def _table(table: Table) -> str:
    columns = "".join("r" if side == ">" else "l" for side in table.align)
    rows = []
    for i, row in enumerate(table.rows):
        head = table.header and i == 0
        cells = (f"${latex(cell)}$" if not head and is_equation(cell) else _words(cell) for cell in row)
        rows.append(" & ".join(cells) + r" \\" + r"\hline" * head)
    return "\n".join(
        [rf"\par\smallskip{{\small\begin{{tabular}}{{@{{}}{columns}@{{}}}}", *rows, r"\end{tabular}}\par\smallskip"]
    )


def _arrays(arrays: Mapping[str, np.ndarray]) -> str:
    written = []
    for key, array in arrays.items():
        name, cells, cut = shown(key, array)
        rows = r" \\ ".join(" & ".join(row) for row in cells)
        written.append(rf"{latex(name)} = \begin{{pmatrix}} {rows} \end{{pmatrix}}" + r"\ldots" * cut)
    return r"\par{\footnotesize\raggedright $" + "$, \n$".join(written) + r"$\par}"


def _words(text: str) -> str:
    return write_words(text, _text, lambda symbol: f"${latex(symbol)}$")


def _text(text: str) -> str:
    """Return text with the characters escaped that LaTeX treats specially, or has only in mathematics."""
    text = re.sub(r"([&%$#_{}])", r"\\\1", text).replace("^", r"\^{}").replace("|", "$|$").replace("²", "$^2$")
    for sign, written in (*LATEX_SIGNS.items(), ("ℓ", r"\ell"), ("Σ", r"\Sigma"), ("′", "'")):
        if sign not in "{}%":
            text = text.replace(sign, f"${written.strip()}$")
    return text
