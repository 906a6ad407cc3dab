"""Kinds of targets: one class per kind answers every question about y, and about outputs read as predictions.

A loss names its kind by two strings, ``targets`` and ``mean_function``; ``kind_of`` looks it up. Arrays are NumPy's or
CuPy's, and ``xp`` is that module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from gpubackprop.definitions import Array


@dataclass(frozen=True)
class Mean:
    """A mean function, the inverse of a link function: how outputs are read."""

    predict: Callable[[Array, Any], Array]
    """Of (o, xp)."""
    probabilities: Callable[[Array, Any], Array] | None = None
    """A function of (o, xp); None where the outputs are not probabilities."""


def _exp(o: Array, xp: Any) -> Array:
    with np.errstate(over="ignore"):
        return xp.exp(o)


def _sigmoid(o: Array, xp: Any) -> Array:
    e = xp.exp(-xp.abs(o))
    return xp.where(o < 0, e, xp.ones_like(e)) / (1 + e)


def _softmax(o: Array, xp: Any) -> Array:
    short = xp is np and o.shape[1] < 32  # NumPy finds the maxima of short rows slowly
    top = np.ascontiguousarray(o.T).max(axis=0)[:, None] if short else o.max(axis=1, keepdims=True)
    e = xp.exp(o - top)
    return e / e.sum(axis=1, keepdims=True)


MEANS = {
    "identity": Mean(lambda o, xp: o),
    "exp": Mean(_exp),
    "sigmoid": Mean(lambda o, xp: (o > 0).astype(np.int64), _sigmoid),
    "softmax": Mean(lambda o, xp: o.argmax(axis=1), _softmax),
}


@dataclass(frozen=True)
class Kind:
    """Base class of the kinds of targets, without limits or a metric.

    Parameters
    ----------
    mean : Mean
        The mean function of the loss.
    """

    mean: Mean
    takes_indices: ClassVar[bool] = False
    """y may hold class indices, shape (n,), instead of a row of numbers per sample."""
    numbered: ClassVar[bool] = False
    """y counts classes from 0, so that the labels of a file, which may be text, can be numbered."""

    def are_indices(self, shape: Sequence[int]) -> bool:
        """Return whether a y of this shape holds class indices."""
        return self.takes_indices and (len(shape) == 1 or (len(shape) == 2 and shape[1] == 1))

    def shapes(self, n: int, d: int) -> str:
        """Return the shapes that y may have, in words."""
        return f"({n}, {d})" + (f" or class indices ({n},)" if self.takes_indices else "")

    def check(self, y: Array, d: int, xp: Any, loss: str) -> None:
        """Raise ValueError if y, finite and of the right shape, holds values that the loss is not defined for."""

    def random(self, rng: np.random.Generator, n: int, d: int) -> Array:
        """Return random targets of n samples and d outputs."""
        return rng.normal(size=(n, d))

    def predict(self, o: Array, xp: Any) -> Array:
        """Return what the outputs o, shape (n, d), predict."""
        return self.mean.predict(o, xp)

    def score(self, o: Array, y: Array, w: Array) -> Array:
        """Return the weighted sum over samples that :meth:`metric` takes."""
        return 0.0

    def metric(self, score: float, total: float, y: Array, w: Array) -> dict[str, float]:
        """Return ``{"accuracy": ...}``, ``{"r2": ...}`` or nothing, given the score and the total weight of all samples.

        w has shape (n,), or () if all samples weigh the same.
        """
        return {}


class Real(Kind):
    """Any numbers; the metric is r2 = 1 - sum (y - o)^2 / sum (y - mean y)^2, over all outputs."""

    def score(self, o: Array, y: Array, w: Array) -> Array:
        return (w * ((y.astype(np.float64) - o) ** 2).sum(axis=1)).sum()

    def metric(self, score: float, total: float, y: Array, w: Array) -> dict[str, float]:
        column, first = (w, 0) if w.ndim == 0 else (w[:, None], int(w.argmax()))
        y64 = y.astype(np.float64)
        # relative to a row with weight: if all such rows are equal the spread is 0, not a rounding of the mean
        y64 -= y64[first].copy()
        mean = (column * y64).sum(axis=0) / total
        spread = float((column * (y64 - mean) ** 2).sum())
        return {"r2": 1.0 - score / spread if spread > 0 else 0.0}


class Counts(Kind):
    """Numbers >= 0."""

    def check(self, y: Array, d: int, xp: Any, loss: str) -> None:
        low = float(y.min())
        if low < 0:
            raise ValueError(f"y holds {low:g}; {loss} takes counts >= 0")

    def random(self, rng: np.random.Generator, n: int, d: int) -> Array:
        return rng.poisson(2.0, (n, d)).astype(np.float64)


class Distribution(Kind):
    """A row of probabilities per sample."""

    def check(self, y: Array, d: int, xp: Any, loss: str) -> None:
        low, high = float(y.min()), float(y.max())
        if low < 0 or high > 1:
            raise ValueError(f"y holds values from {low:g} to {high:g}; {loss} takes values in [0, 1]")

    def random(self, rng: np.random.Generator, n: int, d: int) -> Array:
        e: Array = np.exp(rng.normal(size=(n, d)))
        return e / e.sum(axis=1, keepdims=True)


class Classified(Kind):
    """Right or wrong; the metric is the weighted fraction of samples, or of their outputs, that are right."""

    def metric(self, score: float, total: float, y: Array, w: Array) -> dict[str, float]:
        return {"accuracy": score / total}


class Classes(Classified, Distribution):
    """One of d classes: its index, or a row of probabilities."""

    takes_indices = numbered = True

    def check(self, y: Array, d: int, xp: Any, loss: str) -> None:
        if y.ndim == 2:
            super().check(y, d, xp, loss)
            return
        if y.dtype.kind == "f" and not bool((y == xp.rint(y)).all()):
            raise ValueError("y holds labels that are not whole numbers; class indices are 0, 1, 2, ...")
        low, high = int(y.min()), int(y.max())
        if low < 0 or high >= d:
            raise ValueError(
                f"y holds labels from {low:.12g} to {high:.12g}; with {d} outputs they must be 0 to {d - 1}"
            )

    def random(self, rng: np.random.Generator, n: int, d: int) -> Array:
        return rng.integers(0, d, n)

    def score(self, o: Array, y: Array, w: Array) -> Array:
        labels = y if y.ndim == 1 else y.argmax(axis=1)
        return (w * (o.argmax(axis=1) == labels)).sum()


class Binary(Classified, Distribution):
    """Each output by itself: a probability in [0, 1]."""

    numbered = True

    def random(self, rng: np.random.Generator, n: int, d: int) -> Array:
        return (rng.normal(size=(n, d)) > 0).astype(np.float64)

    def score(self, o: Array, y: Array, w: Array) -> Array:
        return (w * ((o > 0) == (y > 0.5)).mean(axis=1)).sum()


class Signs(Classified):
    """Each output by itself: -1 or +1."""

    def check(self, y: Array, d: int, xp: Any, loss: str) -> None:
        if not bool((abs(y) == 1).all()):
            raise ValueError(f"y holds values from {float(y.min()):g} to {float(y.max()):g}; {loss} takes -1 and +1")

    def random(self, rng: np.random.Generator, n: int, d: int) -> Array:
        return np.where(rng.normal(size=(n, d)) > 0, 1.0, -1.0)

    def predict(self, o: Array, xp: Any) -> Array:
        return xp.where(o > 0, 1, -1) if self.mean.probabilities is None else super().predict(o, xp)

    def score(self, o: Array, y: Array, w: Array) -> Array:
        return (w * ((o > 0) == (y > 0.0)).mean(axis=1)).sum()


KINDS: dict[str, type[Kind]] = {
    "real": Real,
    "counts": Counts,
    "binary": Binary,
    "signs": Signs,
    "classes": Classes,
    "distribution": Distribution,
}


def kind_of(targets: str, mean_function: str | None) -> Kind:
    """Return the kind of a loss that has these two strings.

    Raises
    ------
    ValueError
        There is none of that name.
    """
    for name, value, known in (("targets", targets, KINDS), ("mean_function", mean_function or "identity", MEANS)):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}; choose from {', '.join(known)}")
    return KINDS[targets](MEANS[mean_function or "identity"])
