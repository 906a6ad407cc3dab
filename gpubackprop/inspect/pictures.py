"""Pictures of networks and trainings: what was learned, where it is wrong, how gradients flow; a line for the terminal.

Each function returns a matplotlib figure, which a notebook shows and ``write("name.png")`` writes. The learning curve is
:meth:`gpubackprop.History.plot`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpubackprop.datasets import DataSet
from gpubackprop.definitions import check_count, shown
from gpubackprop.frames import Frame, column_of, frame_of, is_table
from gpubackprop.inspect.gradient_flow import EDGES
from gpubackprop.interop import on_host
from gpubackprop.labels import indices_of
from gpubackprop.machine.files import write_whole
from gpubackprop.training.scores import of_each_class, outputs_of

if TYPE_CHECKING:
    from gpubackprop.inspect.diagnose import Diagnosis
    from gpubackprop.inspect.gradient_flow import GradientFlow
    from gpubackprop.mlp import MLP
    from gpubackprop.training.curves import Picture

BLOCKS = "▁▂▃▄▅▆▇█"
SHOWN = 10  # images of right predictions, and of wrong ones
NAMED, COUNTED = 30, 15  # classes up to which a confusion matrix has names and numbers
RIGHT, WRONG = "#1a7f37", "#cf222e"
CLASS_COLORS = (
    "#2e86ab",
    "#f18f01",
    "#3f7d20",
    "#d1495b",
    "#7768ae",
    "#8c564b",
    "#e377c2",
    "#7f7f7f",
    "#bcbd22",
    "#17becf",
)
HEALTHY, SATURATED, DEAD = "#9ecae1", "#f18f01", "#3d3d3d"
MOST_HISTOGRAMS = 6  # layers of a picture of the gradients


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
        _draw_confusion(last, d.classes or (), *labels)
        last.set_title("test set, number of samples", fontsize=9)
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
    names = d.classes or ()
    for row, (chosen, color) in zip(figure.subplots(2, SHOWN), ((right, RIGHT), (wrong, WRONG)), strict=True):
        for ax in row:
            ax.set_axis_off()
        for ax, i in zip(row, chosen[:SHOWN], strict=False):
            _draw_image(ax, d.X_test[i].reshape(shape), 0, d.scale)
            said, true = _name(names, predicted[i]), _name(names, y[i])
            ax.set_title(said if said == true else f"{said}, not {true}", fontsize=8, color=color, pad=2)


def _draw_image(ax: Any, image: np.ndarray, low: float, high: float) -> None:
    ax.set_axis_off()
    ax.imshow(image.squeeze(), cmap="gray_r", vmin=low, vmax=high)


def _draw_confusion(ax: Any, classes: Sequence[Any], y: np.ndarray, predicted: np.ndarray) -> None:
    """Draw how many samples of each class are predicted as which."""
    k = int(max(predicted.max(), y.max(), len(classes) - 1)) + 1
    counts = np.zeros((k, k), np.int64)
    np.add.at(counts, (y, predicted), 1)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ax.set(xlabel="predicted class", ylabel="true class")
    names = [_name(classes, i) for i in range(k)]
    if k <= NAMED:
        tilted = 45 if max(map(len, names)) > 2 else 0
        ax.set_xticks(range(k), names, fontsize=7, rotation=tilted, ha="right" if tilted else "center")
        ax.set_yticks(range(k), names, fontsize=7)
    for i, j in np.argwhere(counts) if k <= COUNTED else ():
        color = "white" if shares[i, j] > 0.5 else "black"
        ax.text(j, i, counts[i, j], ha="center", va="center", fontsize=7, color=color)


def _name(classes: Sequence[Any], i: int) -> str:
    return str(classes[i])[:12] if i < len(classes) else str(int(i))


def _draw_against(ax: Any, y: np.ndarray, predicted: np.ndarray) -> None:
    """Draw predicted numbers against true ones, all targets together."""
    true, said = y.reshape(-1).astype(np.float64), predicted.reshape(-1).astype(np.float64)
    low, high = min(true.min(), said.min()), max(true.max(), said.max())
    ax.plot([low, high], [low, high], color="0.7", linewidth=0.8)
    ax.scatter(true, said, s=8, alpha=0.5, linewidths=0)
    ax.set(xlabel="true", ylabel="predicted")
    ax.set_title("test set", fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)


def confusion_matrix(model: MLP, X: Any, y: Any) -> Picture:
    """Return a picture of how many samples of each class are predicted as which.

    Parameters
    ----------
    model : MLP
        A classification.
    X, y : array or DataFrame
        As ``evaluate`` takes them.
    """
    from gpubackprop.training.curves import Picture

    truth, said = _classes(model, X, y)
    picture = Picture(4.6, 4.2)
    ax: Any = picture.subplots()
    _draw_confusion(ax, model.classes or (), truth, said)
    ax.set_title(f"{np.count_nonzero(truth == said):,} of {len(truth):,} samples predicted right", fontsize=9)
    return picture


def wrong_examples(model: MLP, X: Any, y: Any, shape: tuple[int, ...], most: int = 20) -> Picture:
    """Return a picture of the images that are predicted wrong, the surest mistakes first.

    Parameters
    ----------
    model : MLP
        A classification.
    X, y : array
    shape : tuple of int
        Height and width of an image, (28, 28) for 784 inputs; a third number for colors.
    most : int
        Images at most.

    Raises
    ------
    ValueError
        A row of X is no image of this shape.
    """
    from gpubackprop.training.curves import Picture

    images = np.asarray(on_host(X))
    most = check_count("most", most, " of images")
    if images.ndim != 2 or not isinstance(shape, tuple | list) or math.prod(shape) != images.shape[1]:
        raise ValueError(f"shape is {shown(shape)}; X has shape {images.shape}: give the height and width of an image")
    truth, said = _classes(model, X, y)
    sure = np.asarray(on_host(model.predict_proba(X)), np.float64).max(axis=1) if _has_probabilities(model) else None
    wrong = np.flatnonzero(truth != said)
    if sure is not None:
        wrong = wrong[np.argsort(-sure[wrong], kind="stable")]
    chosen = wrong[:most]
    columns = min(max(len(chosen), 1), SHOWN // 2)
    rows = -(-max(len(chosen), 1) // columns)
    picture = Picture(max(1.4 * columns, 4.2), 1.75 * rows + 0.4)
    picture.suptitle(f"{len(wrong):,} of {len(truth):,} samples predicted wrong", fontsize=9)
    axes: Any = picture.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    low, high, names = images.min(), images.max(), model.classes or ()
    for ax, i in zip(axes.flat, chosen, strict=False):
        _draw_image(ax, images[i].reshape(shape), low, high)
        text = f"{_name(names, said[i])}, not {_name(names, truth[i])}"
        ax.set_title(text + (f"\n{sure[i]:.0%} sure" if sure is not None else ""), fontsize=8, color=WRONG, pad=2)
    return picture


def decision_boundary(model: MLP, X: Any, y: Any, resolution: int = 200) -> Picture:
    """Return a picture of the predictions over the plane of two inputs, with the samples in it.

    For classes: the color is that of the predicted class, the stronger the surer; lines are where the class changes, and samples
    predicted wrong have a dark edge. For a number: contours, and the samples in the colors of their targets.

    Parameters
    ----------
    model : MLP
        With two inputs; with one output unless it is a classification.
    X : array or DataFrame, shape (n, 2)
    y : array
    resolution : int
        Points of the grid along each axis.

    Raises
    ------
    ValueError
        X has not two columns of numbers, or y has several numbers for each sample.
    """
    from gpubackprop.training.curves import Picture

    n = check_count("resolution", resolution, least=2)
    frame = frame_of(X) if is_table(X) else None
    points = np.asarray(on_host(X) if frame is None else frame.numbers, np.float64)
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"X has shape {np.shape(X)}; a boundary is drawn over two columns of numbers")
    low, high = points.min(axis=0), points.max(axis=0)
    margin = 0.08 * np.where(high > low, high - low, 1.0)
    axes = [np.linspace(a, b, n) for a, b in zip(low - margin, high + margin, strict=True)]
    places = np.column_stack([a.ravel() for a in np.meshgrid(*axes)])
    grid = places if frame is None else Frame(frame.names, places)  # the network knows its columns by name
    picture = Picture(5.2, 4.4)
    ax: Any = picture.subplots()
    if model.loss.kind.numbered:
        _draw_regions(ax, model, axes, grid, points, X, y)
    else:
        _draw_surface(picture, ax, model, axes, grid, points, y)
    names = ["x_1", "x_2"] if frame is None or frame.names is None else frame.names
    ax.set(xlabel=names[0], ylabel=names[1])
    return picture


def _draw_regions(ax: Any, model: MLP, axes: list[np.ndarray], grid: Any, points: np.ndarray, X: Any, y: Any) -> None:
    """Draw the predicted classes over the plane."""
    from matplotlib.colors import to_rgb

    truth, said = _classes(model, X, y)
    k, n = max(2, model.layer_sizes[-1], int(truth.max()) + 1), len(axes[0])
    colors = np.array([to_rgb(CLASS_COLORS[i % len(CLASS_COLORS)]) for i in range(k)])
    if _has_probabilities(model):
        p = of_each_class(np.asarray(on_host(model.predict_proba(grid)), np.float64))
    else:
        p = np.eye(k)[_indices(outputs_of(model, grid))]
    least = 1 / p.shape[1]
    strength = 0.1 + 0.4 * (p.max(axis=1, keepdims=True) - least) / (1 - least)
    image = 1 - strength * (1 - colors[p.argmax(axis=1)])
    extent = (*axes[0][[0, -1]], *axes[1][[0, -1]])
    ax.imshow(image.reshape(n, n, 3), extent=extent, origin="lower", aspect="auto", interpolation="nearest")
    for i in range(p.shape[1] if p.shape[1] > 2 else 1):
        lead = p[:, i] - np.delete(p, i, axis=1).max(axis=1)
        if lead.min() < 0 < lead.max():
            ax.contour(*axes, lead.reshape(n, n), levels=[0.0], colors="0.35", linewidths=0.9)
    for i in np.unique(truth):
        of = truth == i
        edges = np.where((said == truth)[of], "white", "black")
        ax.scatter(
            *points[of].T, s=16, color=colors[i], edgecolors=edges, linewidths=0.7, label=_name(model.classes or (), i)
        )
    ax.legend(frameon=True, framealpha=0.8, fontsize=8, loc="upper right")
    ax.set_title(f"{np.count_nonzero(truth == said):,} of {len(truth):,} samples predicted right", fontsize=9)


def _draw_surface(
    picture: Any, ax: Any, model: MLP, axes: list[np.ndarray], grid: Any, points: np.ndarray, y: Any
) -> None:
    """Draw a predicted number over the plane."""
    truth = np.asarray(on_host(column_of(y)), np.float64).reshape(len(points), -1)
    if truth.shape[1] != 1:
        raise ValueError(f"y has {truth.shape[1]} numbers for each sample; a surface is drawn of one")
    n = len(axes[0])
    o = outputs_of(model, grid).astype(np.float64).reshape(n, n)
    low, high = min(o.min(), truth.min()), max(o.max(), truth.max())
    levels = np.linspace(low, high if high > low else low + 1, 13)
    drawn = ax.contourf(*axes, o, levels=levels, cmap="viridis", alpha=0.85)
    ax.scatter(
        *points.T,
        c=truth[:, 0],
        cmap="viridis",
        vmin=levels[0],
        vmax=levels[-1],
        s=16,
        edgecolors="white",
        linewidths=0.7,
    )
    picture.colorbar(drawn, ax=ax, label="predicted; points: true", format="%.2g")


def gradient_flow(flow: GradientFlow) -> Picture:
    """Return a picture of the gradients over a training: the norm of each layer, and histograms of log10 |dW|.

    Parameters
    ----------
    flow : GradientFlow
        The callback of that training.

    Raises
    ------
    ValueError
        It has recorded nothing.
    """
    import matplotlib as mpl
    import matplotlib.ticker

    from gpubackprop.training.curves import Picture

    if not flow.epochs:
        raise ValueError("flow has no records; give it to fit(..., callbacks=flow) first")
    layers = flow.norms.shape[1]
    names = [*map(str, range(1, layers)), "o"]
    chosen = sorted({round(i) for i in np.linspace(0, layers - 1, min(layers, MOST_HISTOGRAMS))})
    columns = min(len(chosen), 3)
    rows = -(-len(chosen) // columns)
    picture = Picture(4.2 + 2.3 * columns, 3.6 if rows == 1 else 4.6)
    halves: Any = picture.subfigures(1, 2, width_ratios=[4.2, 2.3 * columns])
    left, right = halves
    ax: Any = left.subplots()
    for i, name in enumerate(names):
        norms = np.where(flow.norms[:, i] > 0, flow.norms[:, i], np.nan)  # 0 has no place on a logarithmic axis
        color = mpl.colormaps["viridis"](0.9 * i / max(layers - 1, 1))
        ax.plot(flow.epochs, norms, color=color, marker="." if len(flow.epochs) < 15 else None, label=f"layer {name}")
    ax.set(xlabel="epochs", ylabel="norm of dW", yscale="log", ylim=_decades(flow.norms))
    ax.yaxis.set_minor_formatter("")
    ax.set_title("gradient of each layer", fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), handlelength=1)
    used = np.flatnonzero(flow.histograms[:, chosen].sum(axis=(0, 1))[1:]) + 1  # the first bin has the zeros
    low, high = (EDGES[used[0]], EDGES[used[-1] + 1]) if len(used) else (EDGES[0], EDGES[-1])
    edges = np.append(flow.epochs, flow.epochs[-1] + flow.every)
    parts: Any = right.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for ax in parts.flat[len(chosen) :]:
        ax.set_visible(False)
    for ax, i in zip(parts.flat, chosen, strict=False):
        counts = flow.histograms[:, i]
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        ax.pcolormesh(edges, EDGES, shares.T, cmap="magma_r", rasterized=True)
        ax.set(ylim=(low, high))
        ax.xaxis.set_major_locator(mpl.ticker.MaxNLocator(3, integer=True))
        zeros = f", {shares[-1, 0]:.0%} are 0" if shares[-1, 0] > 0 else ""
        ax.set_title(f"layer {names[i]}{zeros}", fontsize=9)
    for ax in parts[:, 0]:
        ax.set_ylabel("log10 |dW|")
    for ax in parts[-1]:
        ax.set_xlabel("epochs")
    return picture


def layers_of(diagnosis: Diagnosis) -> Picture:
    """Return a picture of a diagnosis: shares of dead and saturated units, gradients and updates of each layer.

    Parameters
    ----------
    diagnosis : Diagnosis
        Of ``model.diagnose(X, y)``.
    """
    from gpubackprop.training.curves import Picture

    layers = diagnosis.layers
    picture = Picture(9.5, 1.6 + 0.34 * len(layers))
    units, gradients, updates = axes = picture.subplots(1, 3, sharey=True)
    places = np.arange(len(layers))
    dead, saturated = (np.nan_to_num([getattr(a, name) for a in layers]) for name in ("dead", "saturated"))
    hidden = np.array([not math.isnan(a.dead) for a in layers], float)
    start = np.zeros(len(layers))
    for label, shares, color in (
        ("dead", dead, DEAD), ("saturated", saturated, SATURATED), ("others", hidden - dead - saturated, HEALTHY),
    ):  # fmt: skip
        units.barh(places, 100 * shares, left=100 * start, color=color, height=0.7, label=label)
        start = start + shares
    units.set(xlabel="% of the units", xlim=(0, 100), yticks=places, ylim=(len(layers) - 0.5, -0.5))
    units.set_yticklabels([f"{a.name}  {a.activation}" for a in layers], fontsize=8)
    units.legend(frameon=False, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), handlelength=1)
    for ax, name, label in (
        (gradients, "gradient_rms", "root mean square of dW"), (updates, "update_ratio", "|ΔW| / |W| of the next step"),
    ):  # fmt: skip
        values = np.array([getattr(a, name) for a in layers])
        ax.plot(np.where(values > 0, values, np.nan), places, "o-", color="#2e86ab")
        ax.set(xscale="log", xlabel=label, xlim=_decades(values))
        ax.xaxis.set_minor_formatter("")
        ax.grid(alpha=0.25, linewidth=0.6, axis="x")
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return picture


def _decades(values: np.ndarray) -> tuple[float, float]:
    """Return limits of a logarithmic axis: whole decades around the values above 0, at least one."""
    exponents = np.log10(values[(values > 0) & np.isfinite(values)], dtype=np.float64)
    low = math.floor(exponents.min(initial=0.0 if not exponents.size else math.inf))
    high = math.ceil(exponents.max(initial=0.0 if not exponents.size else -math.inf))
    return 10.0**low, 10.0 ** max(high, low + 1)


def _classes(model: MLP, X: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return true and predicted classes of each sample as indices."""
    if not model.loss.kind.numbered:
        raise ValueError(f"the loss is {model.loss.name}; this picture is of classes")
    truth = column_of(y)
    if model.classes is not None:
        truth = indices_of(truth, model.classes)
    truth = np.asarray(on_host(truth))
    if truth.ndim == 2 and truth.shape[1] > 1:
        if not model.loss.kind.takes_indices:
            raise ValueError(f"y has {truth.shape[1]} columns of classes; this picture is of one class for each sample")
        truth = truth.argmax(axis=1)
    said = _indices(outputs_of(model, X))
    if truth.size != said.size:
        raise ValueError(f"y has shape {truth.shape}; there are {said.size} predictions")
    return _indices(truth), said


def _indices(a: np.ndarray) -> np.ndarray:
    indices: np.ndarray = np.rint(a.reshape(-1)).astype(np.int64)
    return indices


def _has_probabilities(model: MLP) -> bool:
    return model.loss.kind.mean.probabilities is not None


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """Return the finite values as a line of block characters, at most ``width`` characters."""
    values = [v for v in values if math.isfinite(v)] or [0.0]
    if len(values) > width:
        values = [values[i * len(values) // width] for i in range(width - 1)] + [values[-1]]
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(BLOCKS[min(int((v - low) / span * len(BLOCKS)), len(BLOCKS) - 1)] for v in values)
