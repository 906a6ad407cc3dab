"""The loss and a metric of a network on a data set, in batches, summed on the device in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gpubackprop.definitions import Array

if TYPE_CHECKING:
    from gpubackprop.mlp import MLP


def evaluate(model: MLP, X: Array, y: Array, weight: Array | None = None) -> dict[str, float]:
    """Return ``{"loss": ..., "accuracy" or "r2": ...}``; X, y and weight are checked arrays of the model's device.

    accuracy is the (weighted) share of samples, or of outputs for ``sigmoid_cross_entropy`` and ``hinge``, that are right;
    r2 = 1 - sum (y - o)^2 / sum (y - mean y)^2, over all outputs.
    """
    loss, backend = model.loss, model.backend
    value = backend.zeros((2,), np.float64)
    no_bias = backend.zeros((model.layer_sizes[-1],), model.dtype)
    db = backend.zeros(no_bias.shape, model.real)
    w: Array = np.float64(1) if weight is None else weight.astype(np.float64)
    total = float(len(X) if weight is None else w.sum())
    summed = loss(reduction="sum")
    right = backend.zeros((1,), np.float64)
    for rows, o in model.outputs_in_batches(X):
        w_rows = w if weight is None else w[rows]
        right += _score(model, o, y[rows], w_rows)
        batch_weight = None if weight is None else weight[rows]
        backend.bias_loss(o, no_bias, y[rows], summed, batch_weight, out=o, db=db, value=value)
    elements = model.layer_sizes[-1] if loss.family == "elementwise" else 1
    scale = 1.0 if loss.reduction == "sum" else 1.0 / (total * elements)
    result = {"loss": float(value[1]) * scale}
    if loss.targets in ("classes", "binary", "signs"):
        result["accuracy"] = float(right[0]) / total
    elif loss.targets == "real":
        column = w if weight is None else w[:, None]
        y64 = y.astype(np.float64)
        # relative to a row that counts: where all such rows are equal the spread is 0, not what a rounded mean leaves of it
        y64 -= y64[0 if weight is None else int(w.argmax())].copy()
        mean = (column * y64).sum(axis=0) / total
        spread = float((column * (y64 - mean) ** 2).sum())
        result["r2"] = 1.0 - float(right[0]) / spread if spread > 0 else 0.0
    return result


def _score(model: MLP, o: Array, y: Array, w: Array) -> Array:
    """Return the weighted number of right predictions, or the weighted sum of squared errors."""
    loss = model.loss
    if loss.targets == "classes":
        labels = y if y.ndim == 1 else y.argmax(axis=1)
        return (w * (o.argmax(axis=1) == labels)).sum()
    if loss.targets in ("binary", "signs"):
        threshold = 0.5 if loss.targets == "binary" else 0.0
        return (w * ((o > 0) == (y > threshold)).mean(axis=1)).sum()
    return (w * ((y.astype(np.float64) - o) ** 2).sum(axis=1)).sum()
