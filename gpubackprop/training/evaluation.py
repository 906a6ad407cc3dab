"""The loss and a metric of a network on a data set, in batches, summed on the device in float64."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from gpubackprop.definitions import Array
from gpubackprop.network import Network


def evaluate(
    network: Network, outputs: Iterable[tuple[slice, Array]], y: Array, weight: Array | None = None
) -> dict[str, float]:
    """Return ``{"loss": ..., "accuracy" or "r2": ...}``; the metric is that of the loss's kind of targets.

    Parameters
    ----------
    network : Network
    outputs : iterable of (rows, o)
        The outputs in batches, which are overwritten.
    y, weight : array
        Of all samples; checked arrays on the network's device.
    """
    loss, backend, d = network.loss, network.backend, network.layer_sizes[-1]
    value, score = backend.zeros((2,), np.float64), backend.zeros((1,), np.float64)
    no_bias, db = backend.zeros((d,), network.dtype), backend.zeros((d,), network.real)
    w: Array = np.float64(1) if weight is None else weight.astype(np.float64)
    total = float(len(y) if weight is None else w.sum())
    summed = loss(reduction="sum")
    for rows, o in outputs:
        batch_weight = None if weight is None else weight[rows]
        score += loss.kind.score(o, y[rows], w if weight is None else w[rows])
        backend.bias_loss(o, no_bias, y[rows], summed, batch_weight, out=o, db=db, value=value)
    scale = loss.scale(total, d, weighted=False)
    return {"loss": float(value[1]) * scale} | loss.kind.metric(float(score[0]), total, y, w)
