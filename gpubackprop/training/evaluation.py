"""The loss and a metric of a network on a data set, in batches, summed on the device in float64."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from gpubackprop.definitions import Array
from gpubackprop.intake import Samples
from gpubackprop.network import Network


def evaluate(network: Network, outputs: Iterable[tuple[slice, Array]], samples: Samples) -> dict[str, float]:
    """Return ``{"loss": ..., "accuracy" or "r2": ...}``; the metric is that of the loss's kind of targets.

    Parameters
    ----------
    network : Network
    outputs : iterable of (rows, o)
        The outputs for ``samples.X`` in batches, on the network's device; they are overwritten.
    samples : Samples
        Checked, on the network's device or on the host.
    """
    loss, backend, d, y = network.loss, network.backend, network.layer_sizes[-1], samples.y
    value, score = backend.zeros((2,), np.float64), backend.zeros((1,), np.float64)
    no_bias, db = backend.zeros((d,), network.dtype), backend.zeros((d,), network.real)
    w: Array = np.float64(1) if samples.weight is None else samples.weight.astype(np.float64)
    total = float(len(y) if samples.weight is None else w.sum())
    summed = loss(reduction="sum")
    for rows, o in outputs:
        y_here = backend.asarray(y[rows])
        weight_here = None if samples.weight is None else backend.asarray(samples.weight[rows])
        score += loss.kind.score(o, y_here, w if weight_here is None else weight_here.astype(np.float64))
        backend.bias_loss(o, no_bias, y_here, summed, weight_here, out=o, db=db, value=value)
    scale = loss.scale(total, d, weighted=False)
    return {"loss": float(value[1]) * scale} | loss.kind.metric(float(score[0]), total, y, w)
