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
    r2 = 1 - sum (y - o)^2 / sum (y - mean y)^2, over all outputs. Which of them there is, the kind of targets says.
    """
    loss, backend = model.loss, model.backend
    value = backend.zeros((2,), np.float64)
    no_bias = backend.zeros((model.layer_sizes[-1],), model.dtype)
    db = backend.zeros(no_bias.shape, model.real)
    w: Array = np.float64(1) if weight is None else weight.astype(np.float64)
    total = float(len(X) if weight is None else w.sum())
    summed = loss(reduction="sum")
    score = backend.zeros((1,), np.float64)
    for rows, o in model.outputs_in_batches(X):
        w_rows = w if weight is None else w[rows]
        score += loss.kind.score(o, y[rows], w_rows)
        batch_weight = None if weight is None else weight[rows]
        backend.bias_loss(o, no_bias, y[rows], summed, batch_weight, out=o, db=db, value=value)
    elements = model.layer_sizes[-1] if loss.family == "elementwise" else 1
    scale = 1.0 if loss.reduction == "sum" else 1.0 / (total * elements)
    return {"loss": float(value[1]) * scale} | loss.kind.metric(float(score[0]), total, y, w)
