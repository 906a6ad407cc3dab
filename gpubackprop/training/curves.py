"""The learning curve: loss and metric of a history over its epochs."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gpubackprop.training.history import is_better_larger


class Picture(Figure):
    """A figure with a canvas of its own, which a notebook shows without pyplot."""

    def __init__(self, width: float, height: float) -> None:
        super().__init__(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(self)

    def write(self, path: str | Path | None) -> Self:
        """Write the picture into a file, whose name says the format, unless it is None; return the picture."""
        if path is not None:
            self.savefig(path, dpi=130)
        return self

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=130)
        return buffer.getvalue()


def metrics_of(history: Mapping[str, list[float]]) -> list[str]:
    """Return the columns of a history that are metrics of the validation set."""
    return [name for name in history if name.startswith("val_") and name != "val_loss"]


def learning_curve(history: Mapping[str, list[float]]) -> Picture:
    """Return a picture of loss and metric over the epochs."""
    picture = Picture(8, 3.4)
    draw_curves(list(picture.subplots(1, 1 + bool(metrics_of(history)), squeeze=False)[0]), history)
    return picture


def draw_curves(axes: Sequence[Any], history: Mapping[str, list[float]]) -> None:
    """Draw the loss into the first axes, and the metric into the second where there is one."""
    losses, metrics = history.get("loss", []), metrics_of(history)
    epochs = range(1, len(losses) + 1)
    for name, label in (("loss", "training"), ("val_loss", "validation")):
        if name in history:
            axes[0].plot(epochs, history[name], label=label)
    axes[0].set(xlabel="epoch", ylabel="loss", yscale="log" if min(losses, default=0) > 0 else "linear")
    if losses:
        axes[0].legend(frameon=False)
    else:
        axes[0].set_title("no epoch was finished", fontsize=9)
    for i, name in enumerate(metrics):
        axes[1].plot(epochs, history[name], color=f"C{i + 2}", label=name.removeprefix("val_"))
    if len(metrics) > 1:
        axes[1].set(xlabel="epoch", ylabel="validation")
        axes[1].legend(frameon=False)
    elif metrics:
        best = max(history[metrics[0]]) if is_better_larger(metrics[0]) else min(history[metrics[0]])
        axes[1].axhline(best, color="0.7", linewidth=0.8, linestyle=":")
        axes[1].set(xlabel="epoch", ylabel=f"validation {metrics[0].removeprefix('val_')}")
        axes[1].set_title(f"best {best:.4f}", fontsize=9)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
