"""Draw ``docs/peers.svg``: a training step of two networks, ours and the peers', from the run in ``bench/results/cpu``."""

import json
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

DOCS = Path(__file__).parent
REPORT = DOCS.parent / "bench" / "results" / "cpu" / "report.json"
SIZES = ("64-64-32-10, batch 32", "784-256-128-10, batch 128")
OWN = {"gpubackprop, eager", "products", "products, K steps"}  # parts of our own step
OURS, THEIRS = "#d1495b", "#b8c4ce"


def times(report: dict[str, Any], size: str) -> list[tuple[str, float]]:
    """Return each library with its time over that of our step, one call each, the fastest first."""
    (row,) = (r for r in report["rows"] if r["suite"] == "step" and r["case"] == size)
    found = [
        (name, 1.0 if name == row["base"] else float(candidate["over_base"]["median"]))
        for name, candidate in row["candidates"].items()
        if not name.startswith(" ") and name not in OWN
    ]
    return sorted(found, key=lambda pair: pair[1])


def picture(report: dict[str, Any]) -> Figure:
    """Return the picture: a bar for each library, with its number."""
    figure = Figure(figsize=(6.4, 5.4), layout="constrained")  # one below the other, to be read on a phone
    FigureCanvasSVG(figure)
    for ax, size in zip(figure.subplots(len(SIZES), 1), SIZES, strict=True):
        names, values = zip(*times(report, size), strict=True)
        colors = [OURS if name.startswith("gpubackprop") else THEIRS for name in names]
        ax.barh(range(len(names)), values, color=colors, height=0.72)
        ax.set_yticks(range(len(names)), names, fontsize=9)
        ax.set(xlim=(0, 1.16 * max(values)), ylim=(len(names) - 0.5, -0.5))
        ax.set_title(size, fontsize=10)
        for i, value in enumerate(values):
            ax.text(
                value + 0.012 * max(values),
                i,
                f"{value:.2f}x" if value < 10 else f"{value:.3g}x",
                va="center",
                fontsize=9,
            )
        ax.set_xticks([])
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
    conditions = "CPU, one thread, float32; K steps: up to 16 per call"
    figure.suptitle(f"time of a training step over that of gpubackprop\n({conditions})", fontsize=10)
    return figure


if __name__ == "__main__":
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "gpubackprop", "font.family": "sans-serif"}):
        drawn = picture(json.loads(REPORT.read_text(encoding="utf-8")))
        drawn.savefig(DOCS / "peers.svg", format="svg", metadata={"Date": None})
    print(f"wrote {DOCS / 'peers.svg'}")
