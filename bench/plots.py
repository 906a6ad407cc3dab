"""The plots of the page: roofline, speed against batch and width, peers, kernels, crossover.

A figure has its legend below; the page writes the legend itself, in letters that a phone shows as large as others.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gpubackprop.bench.busy import BESIDE
from gpubackprop.bench.case import AGAIN, Row, best_seconds
from gpubackprop.bench.report import Report
from gpubackprop.bench.tables import groups

COLORS = {
    "gpubackprop": "#d1495b", "gpubackprop, K steps": "#8f2d56", "products": "#6c757d", "numpy": "#2e86ab", "cupy": "#2e86ab",
    "torch": "#f18f01", "torch compile": "#c77700", "torch graph": "#a35f00", "torch compile+graph": "#7a4700",
    "jax": "#3f7d20", "jax, K steps": "#72b01d", "sklearn": "#7768ae", "thinc": "#1b998b", "keras": "#b56576",
    "tinygrad": "#495057", "plain products": "#6c757d", "gpubackprop, sgd": "#d1495b", "gpubackprop, adam": "#8f2d56",
}  # fmt: skip
GLYPHS = {
    "o": "●", "s": "■", "D": "◆", "^": "▲", "v": "▼", "P": "✚", "X": "✖", "*": "★", "<": "◀", ">": "▶", "h": "⬢", "p": "⬟",
}  # fmt: skip
MARKERS = "".join(GLYPHS)
LINES = {"-": "━", "--": "╌"}
WIDTH = 7.5  # inches


def figures(report: Report) -> Iterator[tuple[str, Any]]:
    """Yield the title and the figure of each plot that the report has rows for."""
    by_group = groups(row for row in report["rows"] if row["candidates"])
    steps: dict[str, list[Row]] = {}
    for (suite, device, dtype), rows in by_group.items():
        if suite in ("step", "latency"):
            chosen = [row for row in rows if "gpubackprop" in row["candidates"] and "ledger" in row]
            steps.setdefault(f"{device}, {dtype}", []).extend(chosen)
    for where, rows in steps.items():
        if rows:
            yield f"One step against the peers, {where}", peers(rows)
            if any("ceilings" in row for row in rows):
                yield f"Roofline, {where}", roofline([row for row in rows if "ceilings" in row])
            yield from along(rows, f"Speed against the {{}}, {where}", "samples per second", _samples_per_second)
    for (suite, device, dtype), rows in by_group.items():
        where = f"{device}, {dtype}"
        if suite == "scaling":
            yield from along(rows, f"Time against the {{}}, {where}", "picoseconds per FLOP of a step", _picoseconds)
        elif suite == "kernels" and any("share_of_memory" in row for row in rows):
            chosen = [row for row in rows if "share_of_memory" in row]
            yield f"Fused kernels against the speed of memory, {where}", shares(chosen)
        elif suite == "crossover":
            yield (
                f"Where {device} overtakes the CPU, {dtype}",
                crossover([row for row in rows if len(row["candidates"]) == 2], device),
            )


def along(rows: list[Row], title: str, label: str, value: Callable[[Row, str], float]) -> Iterator[tuple[str, Any]]:
    """Yield a figure over the mini-batches of the layers that have most, and over the widths at the mini-batch that has most."""
    layers = most(rows, lambda row: tuple(row["size"]["layers"]))
    if len({row["size"]["batch"] for row in layers}) > 1:
        name = "-".join(map(str, layers[0]["size"]["layers"]))
        x = [row["size"]["batch"] for row in layers]
        yield title.format(f"mini-batch, {name}"), curves(layers, x, "samples in a mini-batch", label, value)
    square = [row for row in rows if len(set(row["size"]["layers"][:-1])) == 1]
    widths = most(square, lambda row: row["size"]["batch"])
    if len(widths) > 1:
        size = widths[0]["size"]
        x = [row["size"]["layers"][0] for row in widths]
        name = f"width, {len(size['layers']) - 1} layers, batch {size['batch']}"
        yield title.format(name), curves(widths, x, "width of the layers", label, value)


def most(rows: list[Row], key: Any) -> list[Row]:
    """Return the largest group of rows with one key, in the order of their sizes."""
    by_key: dict[Any, list[Row]] = {}
    for row in rows:
        by_key.setdefault(key(row), []).append(row)
    largest = max(by_key.values(), key=len, default=[])
    return sorted(largest, key=lambda row: (row["size"]["batch"], row["size"]["layers"]))


def _samples_per_second(row: Row, name: str) -> float:
    return float(row["size"]["batch"]) / time_of(row, name)


def _picoseconds(row: Row, name: str) -> float:
    return 1e12 * time_of(row, name) / float(row["flops"])


def figure_of(height: float) -> tuple[Any, Any]:
    """Return a figure with one pair of axes."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    axes.tick_params(labelsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def legend(figure: Any) -> list[tuple[str, str, str]]:
    """Return the color, the glyph and the label of each entry of a figure's legend."""
    from matplotlib.colors import to_hex

    found = []
    for handle, label in zip(*figure.axes[0].get_legend_handles_labels(), strict=True):
        line = handle[0] if isinstance(handle, tuple) else handle  # a line with bars of errors
        glyph = GLYPHS.get(line.get_marker()) or LINES[line.get_linestyle()]
        found.append((to_hex(line.get_color()), glyph, label))
    return found


def svg(figure: Any) -> str:
    """Return a figure without its legend as an SVG element."""
    import matplotlib as mpl

    for one in list(figure.legends):
        one.remove()
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "gpubackprop", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def add_legend(figure: Any) -> None:
    """Write the legend below the axes."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=3, fontsize=9)


def plain_numbers(*axes: Any) -> None:
    """Write the numbers along logarithmic axes as 0.5 and 20k, not as powers of ten."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    large = EngFormatter(sep="")
    for one in axes:
        one.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        one.set_major_formatter(lambda x, _: large(x) if x >= 1000 else f"{x:g}")
        one.set_minor_formatter(NullFormatter())


def write_pictures(report: Report, folder: Path) -> None:
    """Write each plot into a folder, its title for a name."""
    folder.mkdir(parents=True, exist_ok=True)
    for title, figure in figures(report):
        figure.savefig(folder / f"{'-'.join(re.findall('[a-z0-9]+', title.lower()))}.png", dpi=110)


def time_of(row: Row, name: str) -> float:
    """Return the seconds of a candidate: of the base, times the ratio, so that drift cancels."""
    base = float(best_seconds(row["candidates"][row["base"]])["median"])
    over = row["candidates"][name]["over_base"]
    return base if over is None else base * float(over["median"])


def names_of(rows: list[Row]) -> list[str]:
    """Return the candidates that train, without the parts of our step."""
    names = dict.fromkeys(name for row in rows for name in row["candidates"])
    others = ("gpubackprop, eager", "products, K steps")
    return [
        name for name in names if name not in others and not name.startswith(" ") and not name.endswith((AGAIN, BESIDE))
    ]


def peers(rows: list[Row]) -> Any:
    """How much longer than our step, one call each, the others take: a row per size, a mark per candidate."""
    names = [name for name in names_of(rows) if name != "gpubackprop"]
    figure, axes = figure_of(1.4 + 0.5 * len(rows))
    for name, marker in zip(names, itertools.cycle(MARKERS), strict=False):
        points = [(row["candidates"][name]["over_base"], y) for y, row in enumerate(rows) if name in row["candidates"]]
        middle = [found["median"] for found, _ in points]
        spread = [
            [max(0.0, found["median"] - found["low"]) for found, _ in points],
            [max(0.0, found["high"] - found["median"]) for found, _ in points],
        ]
        style = {"color": COLORS.get(name), "fmt": marker, "markersize": 7, "elinewidth": 1.5, "alpha": 0.9}
        axes.errorbar(middle, [y for _, y in points], xerr=spread, label=name, **style)
    axes.axvline(1, color=COLORS["gpubackprop"], linewidth=2, label="gpubackprop")
    axes.set(xscale="log", xlabel="time over that of gpubackprop (left of the line: faster)")
    axes.set_yticks(range(len(rows)), [row["case"] for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}x")
    add_legend(figure)
    return figure


def roofline(rows: list[Row]) -> Any:
    """FLOP per second against FLOP per byte, under the ceilings of products and copies on this machine."""
    import numpy as np

    figure, axes = figure_of(4.6)
    limits = rows[-1]["ceilings"]
    intensities = [row["flops"] / row["bytes"] for row in rows]
    x = np.geomspace(min(0.25, *intensities), max(64.0, 2 * max(intensities)), 200)
    peak = limits["flops_per_second"]
    for (nbytes, speed_), shade in zip(limits["copies"], np.linspace(0.75, 0.35, len(limits["copies"])), strict=True):
        label = f"copy of {_bytes(nbytes)}: {speed_ / 1e9:.3g} GB/s"
        axes.plot(x, np.minimum(peak, x * speed_) / 1e9, color=str(shade), linewidth=1.5, label=label)
    axes.axhline(peak / 1e9, color="0.2", linewidth=1, linestyle="--", label=f"products: {peak / 1e9:.3g} GFLOP/s")
    for row, intensity, marker in zip(rows, intensities, itertools.cycle(MARKERS), strict=False):
        y = row["flops"] / time_of(row, "gpubackprop") / 1e9
        axes.plot(intensity, y, marker, color=COLORS["gpubackprop"], markersize=8, label=row["case"], linestyle="none")
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte of the step's operations", ylabel="GFLOP/s")
    plain_numbers(axes.xaxis, axes.yaxis)
    add_legend(figure)
    return figure


def curves(rows: list[Row], x: list[int], xlabel: str, ylabel: str, value: Callable[[Row, str], float]) -> Any:
    """A value of each candidate against a size."""
    figure, axes = figure_of(4.2)
    for name, marker in zip(names_of(rows), itertools.cycle(MARKERS), strict=False):
        points = [(at, value(row, name)) for at, row in zip(x, rows, strict=True) if name in row["candidates"]]
        wide = {"linewidth": 2.5, "zorder": 3} if name == "gpubackprop" else {"linewidth": 1.3}
        axes.plot(*zip(*points, strict=True), marker=marker, color=COLORS.get(name), label=name, **wide)
    axes.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel)
    plain_numbers(axes.yaxis)
    ticks = sorted(set(x))
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.minorticks_off()
    add_legend(figure)
    return figure


def shares(rows: list[Row]) -> Any:
    """The share of the fastest traffic with memory that each fused kernel reaches, if its arrays are not in a cache."""
    figure, axes = figure_of(1 + 0.26 * len(rows))
    values = [row["share_of_memory"] * 100 for row in rows]
    axes.barh(range(len(rows)), values, color=COLORS["gpubackprop"], height=0.7)
    axes.axvline(100, color="0.2", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(rows)), [row["case"] for row in rows], fontsize=8)
    axes.set(xlabel="% of the fastest traffic with memory", ylim=(len(rows) - 0.4, -0.6))
    return figure


def crossover(rows: list[Row], device: str) -> Any:
    """Seconds of a step on both devices against its FLOP."""
    figure, axes = figure_of(4.2)
    for name, color, marker in (("cpu", "#2e86ab", "o"), (device, COLORS["gpubackprop"], "s")):
        points = sorted((row["flops"], best_seconds(row["candidates"][name])["median"] * 1e6) for row in rows)
        axes.plot(*zip(*points, strict=True), marker=marker, color=color, label=name)
    axes.set(xscale="log", yscale="log", xlabel="FLOP of a step", ylabel="microseconds per step")
    plain_numbers(axes.xaxis, axes.yaxis)
    add_legend(figure)
    return figure


def _bytes(n: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.3g} {unit}"
        n /= 1024
    return f"{n:.3g} GiB"
