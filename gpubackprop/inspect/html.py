"""A page as HTML: a single file without scripts; equations are MathML."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape

import numpy as np

from gpubackprop.inspect.page import Arrays, Block, Formula, Item, Note, Page, Pair, Part, Stage, Table, Words, shown
from gpubackprop.inspect.typeset import is_equation, mathml, write_words

STYLE = """
:root { color-scheme: light dark;
  --ink: #1c1c1a; --paper: #fdfdfb; --soft: #6b6a65; --line: #dddbd3; --right: #f4f2ea; --good: #2c6e49; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root {
  --ink: #e8e6df; --paper: #191917; --soft: #9b9a94; --line: #3a3934; --right: #22211e; --good: #7fc69d; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 17px/1.55 Georgia, "Times New Roman", serif; }
main { max-width: 980px; margin: 0 auto; padding: 2.5rem 1.25rem 5rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .6rem; }
h2 { font-size: 1.25rem; margin: 3rem 0 .8rem; padding-top: .9rem; border-top: 1px solid var(--line); }
h2 span, h3 span { color: var(--soft); margin-right: .6em; }
h3 { font-size: 1rem; margin: 1.9rem 0 .5rem; font-weight: 600; }
p { margin: .7rem 0; max-width: 46em; }
a { color: inherit; }
nav ol { columns: 2; padding-left: 1.4rem; color: var(--soft); margin: 1.4rem 0; }
.pair { display: grid; grid-template-columns: 1fr 1fr; margin: .35rem 0; overflow: hidden;
  border: 1px solid var(--line); border-radius: 6px; }
.pair > div { padding: .5rem .8rem; overflow-x: auto; min-width: 0; }
.pair > div + div { background: var(--right); }
.pair.one { grid-template-columns: 1fr; }
.alone { padding: .35rem .8rem; overflow-x: auto; line-height: 2; }
small { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 1.5em; margin-top: .3rem;
  color: var(--soft); font-size: .78rem; }
math { font-size: 1.06em; }
mi.array { font-weight: bold; font-style: normal; text-transform: none; }
.good { color: var(--good); white-space: nowrap; }
.bad { color: var(--bad); white-space: nowrap; font-weight: bold; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
td, th { padding: .18rem .8rem .18rem 0; text-align: left; white-space: nowrap; font-weight: normal; }
th { color: var(--soft); border-bottom: 1px solid var(--line); }
.number { text-align: right; }
details { margin: .5rem 0; }
summary { cursor: pointer; color: var(--soft); font-size: .85rem; }
.arrays { display: flex; flex-wrap: wrap; gap: .8rem 2rem; padding: .5rem .2rem; overflow-x: auto; }
figure { margin: 0; }
figcaption { font-size: .85rem; text-align: center; padding-bottom: .15rem; }
figure table { font: .76rem/1.35 ui-monospace, Menlo, Consolas, monospace;
  border: solid var(--line); border-width: 0 1px; border-radius: 6px; }
figure td { padding: .1rem .45rem; text-align: right; }
@media (max-width: 700px) {
  body { font-size: 16px; }
  main { padding-top: 1.5rem; }
  .pair { grid-template-columns: 1fr; }
  nav ol { columns: 1; }
  td, th { padding-right: .5rem; }
  table { font-size: .8rem; }
}
@media print { body { font-size: 11pt; } .pair, figure { break-inside: avoid; } nav { display: none; } }
"""


def html(page: Page, *, values: bool = False) -> str:
    """Return the page as an HTML document; the arrays can be unfolded, and with ``values`` are unfolded."""
    title = escape(page.title.capitalize())
    parts = enumerate(page.parts, 1)
    contents = "".join(f'<li><a href="#part-{number}">{escape(part.title)}</a></li>' for number, part in parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n"
        + "\n".join(_blocks(page.introduction, values))
        + f"\n<nav><ol>{contents}</ol></nav>\n"
        + "\n".join(_part(number, part, values) for number, part in enumerate(page.parts, 1))
        + "\n</main>\n</body>\n</html>\n"
    )


def _part(number: int, part: Part, values: bool) -> str:
    heading = f'<h2 id="part-{number}"><span>{number}</span>{escape(part.title)}</h2>'
    return "\n".join(["<section>", heading, *_blocks(part.blocks, values), "</section>"])


def _blocks(blocks: Sequence[Block], values: bool) -> Iterator[str]:
    at = 0
    while at < len(blocks):
        block, below = blocks[at], blocks[at + 1 : at + 2]
        at += 1
        match block:
            case Words(text):
                yield f"<p>{_words(text)}</p>"
            case Item(number, text):
                yield f'<p class="item">{number}. {_words(text)}</p>'
            case Stage(number, text):
                yield f"<h3><span>{number}.</span>{_words(text)}</h3>"
            case Pair():
                note = below[0] if below and isinstance(below[0], Note) else None
                at += note is not None
                yield _pair(block, note)
            case Note(text, ours, end):
                yield f'<div class="alone"><small><span>{_words(text)}</span><span>{_words(ours)} {end}</span></small></div>'
            case Formula(text, check):
                yield f'<div class="alone">{_formula(text) if is_equation(text) else _words(text)} {_check(check)}</div>'
            case Table():
                yield _table(block)
            case Arrays(arrays):
                yield _arrays(arrays, values)


def _formula(text: str) -> str:
    """Return an equation in pieces, so that a long one can wrap."""
    return " ".join(map(mathml, re.split(r" (?=[=+·−] )|(?<=,)\s+", text)))


def _pair(pair: Pair, note: Note | None) -> str:
    left, right = mathml(pair.text), mathml(pair.ours) if pair.ours else ""
    if note is not None:
        left += f"<small>{_check(note.text)}</small>" if note.text else ""
        right += f"<small><span>{escape(note.ours)}</span><span>{escape(note.end)}</span></small>"
    if not right:
        return f'<div class="pair one"><div>{left}</div></div>'
    return f'<div class="pair"><div>{left}</div><div>{right}</div></div>'


def _check(text: str) -> str:
    verdict, _, store = text.partition("   ")
    if not verdict.startswith(("✓", "✗")):
        return f"<span>{_words(text)}</span>" if text else ""
    kind = "good" if verdict.startswith("✓") else "bad"
    return f'<span class="{kind}">{escape(verdict)}</span><span>{_words(store)}</span>'


def _table(table: Table) -> str:
    rows = []
    for i, row in enumerate(table.rows):
        tag = "th" if table.header and i == 0 else "td"
        sides = ("number" if side == ">" else "" for side in table.align)
        written = (mathml(cell) if tag == "td" and is_equation(cell) else _words(cell) for cell in row)
        cells = (f'<{tag} class="{side}">{cell}</{tag}>' for cell, side in zip(written, sides, strict=True))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table>{"".join(rows)}</table></div>'


def _arrays(arrays: Mapping[str, np.ndarray], values: bool) -> str:
    figures = []
    for key, array in arrays.items():
        name, cells, cut = shown(key, array)
        rows = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in cells)
        more = f" (of {'×'.join(map(str, array.shape))})" if cut else ""
        figures.append(f"<figure><figcaption>{mathml(name)}{more}</figcaption><table>{rows}</table></figure>")
    summary = ", ".join(map(mathml, arrays))
    return (
        f'<details{" open" * values}><summary>{summary}</summary><div class="arrays">{"".join(figures)}</div></details>'
    )


def _words(text: str) -> str:
    return write_words(text, escape, mathml)
