"""Pictures of a training: what was learned, as one file, and the loss as a line for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpubackprop.datasets import DataSet
from gpubackprop.machine.files import write_whole

BLOCKS = "▁▂▃▄▅▆▇█"
SHOWN = 10  # images of right predictions, and of wrong ones
NAMED, COUNTED = 30, 15  # classes up to which a confusion matrix has names and numbers
RIGHT, WRONG = "#1a7f37", "#cf222e"


def draw_training(
    path: Path, title: str, history: Mapping[str, list[float]], d: DataSet, predicted: np.ndarray
) -> None:
    """Write one picture: the learning curve, and how the test set is predicted.

    For classes: the confusion matrix, and images of right and wrong predictions if the samples are images. For numbers:
    predicted against true.

    Parameters
    ----------
    path : Path
        A .png file.
    title : str
    history : History
    d : DataSet
    predicted : array
        Of the test samples.
    """
    from gpubackprop.training.curves import Picture, draw_curves, metrics_of

    curves, labels = 1 + bool(metrics_of(history)), _labels(d, predicted)
    images = d.image_shape if labels is not None and len(labels[0]) == len(d.X_test) else None
    picture = Picture(4.2 * (curves + 1), 6.4 if images else 3.8)
    picture.suptitle(title, fontsize=10)
    parts: Any = picture.subfigures(2, 1, height_ratios=[1, 1.6]) if images else (None, picture)
    top, below = parts
    *axes, last = below.subplots(1, curves + 1)
    draw_curves(axes, history)
    if labels is None:
        _draw_against(last, d.y_test, predicted)
    else:
        _draw_confusion(last, d, *labels)
        if top is not None and images is not None:
            _draw_images(top, d, *labels, images)
    write_whole(path, picture._repr_png_())


def _labels(d: DataSet, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Return true and predicted classes, one for each sample or for each of its outputs; None for numbers."""
    y = d.y_test
    if y.ndim == 2 and predicted.ndim == 1 and y.shape[1] > 1:
        return y.argmax(axis=1), predicted
    if d.classification:
        return np.rint(y.reshape(-1)).astype(np.int64), predicted.reshape(-1)
    return None


def _draw_images(figure: Any, d: DataSet, y: np.ndarray, predicted: np.ndarray, shape: tuple[int, ...]) -> None:
    """Draw images of each class that are predicted right, and the first ones that are not."""
    right, wrong = np.flatnonzero(predicted == y), np.flatnonzero(predicted != y)
    first = right[np.unique(y[right], return_index=True)[1]]  # one of each class, then others
    right = np.concatenate([first, np.setdiff1d(right, first)])
    figure.suptitle(f"test set: {len(right):,} of {len(y):,} predicted right (green)", fontsize=9)
    for row, (chosen, color) in zip(figure.subplots(2, SHOWN), ((right, RIGHT), (wrong, WRONG)), strict=True):
        for ax in row:
            ax.set_axis_off()
        for ax, i in zip(row, chosen[:SHOWN], strict=False):
            ax.imshow(d.X_test[i].reshape(shape).squeeze(), cmap="gray_r", vmin=0, vmax=d.scale)
            said, true = _name(d, predicted[i]), _name(d, y[i])
            ax.set_title(said if said == true else f"{said}, not {true}", fontsize=8, color=color, pad=2)


def _draw_confusion(ax: Any, d: DataSet, y: np.ndarray, predicted: np.ndarray) -> None:
    """Draw how many samples of each class are predicted as which."""
    k = int(max(predicted.max(), y.max(), len(d.classes or ()) - 1)) + 1
    counts = np.zeros((k, k), np.int64)
    np.add.at(counts, (y, predicted), 1)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ax.set(xlabel="predicted class", ylabel="true class")
    ax.set_title("test set, number of samples", fontsize=9)
    names = [_name(d, i) for i in range(k)]
    if k <= NAMED:
        tilted = 45 if max(map(len, names)) > 2 else 0
        ax.set_xticks(range(k), names, fontsize=7, rotation=tilted, ha="right" if tilted else "center")
        ax.set_yticks(range(k), names, fontsize=7)
    for i, j in np.argwhere(counts) if k <= COUNTED else ():
        color = "white" if shares[i, j] > 0.5 else "black"
        ax.text(j, i, counts[i, j], ha="center", va="center", fontsize=7, color=color)


def _name(d: DataSet, i: int) -> str:
    return str(d.classes[i])[:12] if d.classes is not None and i < len(d.classes) else str(int(i))


def _draw_against(ax: Any, y: np.ndarray, predicted: np.ndarray) -> None:
    """Draw predicted numbers against true ones, all targets together."""
    true, said = y.reshape(-1).astype(np.float64), predicted.reshape(-1).astype(np.float64)
    low, high = min(true.min(), said.min()), max(true.max(), said.max())
    ax.plot([low, high], [low, high], color="0.7", linewidth=0.8)
    ax.scatter(true, said, s=8, alpha=0.5, linewidths=0)
    ax.set(xlabel="true", ylabel="predicted")
    ax.set_title("test set", fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """Return the finite values as a line of block characters, at most ``width`` characters."""
    values = [v for v in values if math.isfinite(v)] or [0.0]
    if len(values) > width:
        values = [values[i * len(values) // width] for i in range(width - 1)] + [values[-1]]
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(BLOCKS[min(int((v - low) / span * len(BLOCKS)), len(BLOCKS) - 1)] for v in values)
