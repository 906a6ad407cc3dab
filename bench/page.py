"""The report as one self-contained page: plots and tables, for screen and paper."""

from __future__ import annotations

import html
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpubackprop.bench import plots, render, tables
from gpubackprop.bench.report import Report
from gpubackprop.machine.files import write_whole

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1c2733; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
p { margin: .4rem 0; overflow-wrap: break-word; } .small { color: #5b6b7b; font-size: .88em; }
.result { font-size: 1.15rem; font-weight: 600; margin: .8rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem; width: 100%; }
table.numbers { table-layout: fixed; }
td, th { padding: .15rem .3rem .15rem 0; text-align: right; border-bottom: 1px solid #e4e9ee; vertical-align: top; }
td:first-child, th:first-child, .words td, .words th { text-align: left; overflow-wrap: break-word; }
.words td:first-child { min-width: 6.5rem; }
.numbers th:first-child { width: 14rem; } .numbers td { white-space: nowrap; } .numbers td:first-child { white-space: normal; }
th { color: #5b6b7b; font-weight: 600; font-size: .8rem; vertical-align: bottom; }
.wrong { color: #b3261e; font-weight: 600; } .ours { font-weight: 600; } .warning { background: #fff3cd; padding: .5rem .8rem; }
figure { margin: .6rem 0; } figure svg { width: 100%; max-width: 46rem; min-width: 30rem; height: auto; display: block; }
figcaption { font-size: .9rem; display: flex; flex-wrap: wrap; gap: .15rem 1.1rem; margin-top: .3rem; max-width: 46rem; }
.case { break-inside: avoid; page-break-inside: avoid; }
@media (max-width: 40rem) { .numbers th:first-child { width: 8.5rem; } }
@media print {
  body { font-size: 10pt; margin: 0; max-width: none; } h2 { break-after: avoid; } h3 { break-after: avoid; }
  figure { break-inside: avoid; } table { font-size: 8pt; } @page { size: A4; margin: 15mm; }
}
"""

TITLES = {
    "transfer": "Copies between host and device", "bandwidth": "Copies on the device", "gemm": "Matrix products",
    "kernels": "Fused kernels", "step": "One training step", "products": "One training step and its products by NumPy or CuPy",
    "scaling": "Batch sizes and widths", "memory": "Memory of a training",
    "epoch": "One epoch, from data to trained weights", "fit": "Calls of fit, short and long",
    "latency": "Small mini-batches", "coldstart": "From the start of a process to the first step",
    "sklearn": "Estimators for scikit-learn, and its own", "crossover": "Where a GPU overtakes the CPU",
}  # fmt: skip

STEPS = (
    "K steps: up to 16 steps per call, as in fit. Products, forward, backward and update alone: these operations of the step and "
    "nothing else, in one call. Eager: one call from Python per operation, so small networks mostly wait for Python."
)
EXPLAINED = {
    "kernels": "Arrays are used in turn so that they come from memory; where they fit into a cache, the table names it.",
    "step": STEPS, "latency": STEPS,
    "fit": "The base is MLP.fit on one network again and again; jax is one compiled scan over an epoch, called once per epoch.",
}  # fmt: skip


def write_page(report: Report, path: Path) -> None:
    """Write the page."""
    write_whole(path, "\n".join(_page(report)).encode())


def _page(report: Report) -> Iterator[str]:
    e = report["environment"]
    devices = html.escape(", ".join([e["cpu"]["name"], *(gpu["name"] for gpu in e["gpus"])]))
    yield "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
    yield "<meta name='viewport' content='width=device-width, initial-scale=1'>"
    yield f"<title>gpubackprop bench: {devices}</title><style>{STYLE}</style></head><body>"
    yield f"<h1>gpubackprop bench</h1><p>{devices}</p><p class='result'>{html.escape(tables.result(report))}</p>"
    yield from (f"<p class='warning'>{warning}</p>" for warning in tables.warnings(report))
    yield "<p class='small'>"
    yield from (f"{html.escape(line)}<br>" for line in tables.heading(report))
    yield f"<code>gpubackprop {html.escape(' '.join(report['command']))}</code></p>"
    yield (
        "<p>Candidates are timed in turn, round by round, so that a slow moment affects all of them. Times are medians with "
        "their interquartile range (IQR); ratios are medians over rounds with a 95&nbsp;% bootstrap interval. A candidate "
        "is FASTER or SLOWER than the base if the whole interval lies beyond what noise makes, SAME if it lies within, else "
        "AMBIGUOUS. Noise is "
        "at least 1&nbsp;%; where processes are repeated (<code>--robust</code>), as much as ours differs from ours. Results are "
        "checked against the reference before they are timed. Compilation and transfers are timed only in their "
        "own suites.</p>"
    )
    for shown in tables.pivots(report):
        yield from render.page(shown)
    for title, figure in plots.figures(report):
        yield f"<div class='case'><h2>{html.escape(title)}</h2>{_figure(figure)}</div>"
    for (suite, device, dtype), rows in tables.groups(report["rows"]).items():
        yield f"<h2>{TITLES[suite]}, {device}, {dtype}</h2>"
        if suite in EXPLAINED:
            yield f"<p class='small'>{html.escape(EXPLAINED[suite])}</p>"
        for shown in tables.tables(rows):
            yield from render.page(shown)
    for title, shown in (
        ("Left out", tables.left_out(report)), ("What the numbers depend on", tables.conditions(report)),
    ):  # fmt: skip
        if shown.cells:
            yield f"<h2>{title}</h2>"
            yield from render.page(shown)
    yield "</body></html>"


def _figure(figure: Any) -> str:
    entries = "".join(
        f"<span><span style='color:{color}'>{glyph}</span> {html.escape(label)}</span>"
        for color, glyph, label in plots.legend(figure)
    )
    return f"<figure><div class='scroll'>{plots.svg(figure)}</div><figcaption>{entries}</figcaption></figure>"
