"""Gradients of each layer over a training: norms and histograms, recorded between the epochs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpubackprop.definitions import check_count, shown
from gpubackprop.interop import on_host
from gpubackprop.training.callbacks import Callback, State

if TYPE_CHECKING:
    from gpubackprop.training.curves import Picture
    from gpubackprop.training.history import Training

EDGES = np.linspace(-12.0, 4.0, 65)
"""Edges of the bins of a histogram, of log10 |dW|; what is smaller (0 too) or larger counts in the outermost bins."""


class GradientFlow(Callback):
    """Record the gradients dW_l on fixed samples before a training and after its epochs.

    Parameters
    ----------
    X, y, sample_weight : array
        A few hundred samples, as ``loss_and_gradients`` takes them.
    every : int
        Epochs between two records.

    Attributes
    ----------
    epochs : list of int
        How many epochs precede each record; the first is 0.
    norms : array, shape (records, layers)
        Frobenius norms of dW_l.
    histograms : array, shape (records, layers, bins)
        How many elements of dW_l have log10 |dW| between two of :data:`EDGES`.

    Examples
    --------
    >>> import numpy as np, gpubackprop as gb
    >>> X, y = np.eye(4, dtype=np.float32), np.arange(4) % 2
    >>> flow = gb.GradientFlow(X, y)
    >>> history = gb.MLP([4, 8, 2], device="reference").fit(X, y, epochs=3, callbacks=flow, progress=False)
    >>> flow.epochs, flow.norms.shape
    ([0, 1, 2, 3], (4, 2))
    """

    def __init__(self, X: Any, y: Any, sample_weight: Any = None, *, every: int = 1) -> None:
        self.X, self.y, self.sample_weight = X, y, sample_weight
        self.every = check_count("every", every, " of epochs")
        self._begin()

    def _begin(self) -> None:
        self.epochs: list[int] = []
        self.norms = np.empty((0, 0))
        self.histograms = np.empty((0, 0, len(EDGES) - 1), np.int64)

    def on_train_begin(self, training: Training) -> None:
        self._begin()
        self._record(training, 0)

    def on_epoch_end(self, training: Training) -> None:
        if (training.epoch + 1) % self.every == 0:
            self._record(training, training.epoch + 1)

    def state_dict(self) -> State:
        return {"epochs": self.epochs, "norms": self.norms, "histograms": self.histograms}

    def load_state_dict(self, state: State) -> None:
        self.epochs = list(state["epochs"])
        self.norms, self.histograms = (np.asarray(on_host(state[name])) for name in ("norms", "histograms"))

    def _record(self, training: Training, epochs: int) -> None:
        _, gradients = training.model.loss_and_gradients(self.X, self.y, self.sample_weight)
        dW = [np.asarray(on_host(a), np.float64) for a in gradients.W]
        norms = np.array([[np.linalg.norm(a) for a in dW]])
        histograms = np.array([[histogram(a) for a in dW]])
        first = not self.epochs
        self.epochs.append(epochs)
        self.norms = norms if first else np.concatenate([self.norms, norms])
        self.histograms = histograms if first else np.concatenate([self.histograms, histograms])

    def plot(self, path: str | Path | None = None) -> Picture:
        """Return a picture of the norms and histograms over the training.

        Parameters
        ----------
        path : str or Path, optional
            Write it into this file too.

        Raises
        ------
        ValueError
            No training has been recorded.
        """
        from gpubackprop.inspect.pictures import gradient_flow  # loads matplotlib

        return gradient_flow(self).write(path)

    def __repr__(self) -> str:
        layers = self.norms.shape[1]
        return f"GradientFlow({len(self.epochs)} records of {layers} layers, every={shown(self.every)})"


def histogram(a: np.ndarray) -> np.ndarray:
    """Return how many elements have log10 |a| in each bin of :data:`EDGES`."""
    with np.errstate(divide="ignore"):
        exponents = np.log10(np.abs(a))
    counts: np.ndarray = np.histogram(np.clip(np.nan_to_num(exponents, nan=np.inf), EDGES[0], EDGES[-1]), EDGES)[0]
    return counts
