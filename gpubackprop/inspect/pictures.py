"""Pictures of a training: a learning curve as a file, and as a line for the terminal."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

from gpubackprop.machine.files import write_whole

BLOCKS = "▁▂▃▄▅▆▇█"


def learning_curve(history: dict[str, list[float]], path: Path, title: str) -> None:
    """Write a picture of loss and metric over the epochs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metrics = [name for name in history if name.startswith("val_") and name != "val_loss"]
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 1 + bool(metrics), squeeze=False)[0]
    losses = history.get("loss", [])
    epochs = range(1, len(losses) + 1)
    for name, label in (("loss", "training"), ("val_loss", "test")):
        if name in history:
            axes[0].plot(epochs, history[name], label=label)
    axes[0].set(xlabel="epoch", ylabel="loss", yscale="log" if min(losses, default=0) > 0 else "linear")
    if losses:
        axes[0].legend(frameon=False)
    else:
        axes[0].set_title("no epoch was finished", fontsize=9)
    for name in metrics:
        axes[1].plot(epochs, history[name], color="C2")
        best = max(history[name])
        axes[1].axhline(best, color="0.7", linewidth=0.8, linestyle=":")
        axes[1].set(xlabel="epoch", ylabel=f"test {name.removeprefix('val_')}", title=f"best {best:.4f}")
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    write_whole(path, buffer.getvalue())


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """Return the finite values as a line of block characters, at most ``width`` characters."""
    values = [v for v in values if math.isfinite(v)] or [0.0]
    if len(values) > width:
        values = [values[i * len(values) // width] for i in range(width - 1)] + [values[-1]]
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(BLOCKS[min(int((v - low) / span * len(BLOCKS)), len(BLOCKS) - 1)] for v in values)
