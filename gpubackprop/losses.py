"""Losses: the value ell and its derivative of each loss, side by side, defined once, on scalars.

The network's output o is linear; softmax and sigmoid belong to the loss. Two families cover all of them:

elementwise
    ``define`` returns ``ell(o, t)`` and ``dell(o, t)``, functions of one output and its target. The loss of a sample
    is their mean over the outputs, so that the mean over samples is PyTorch's mean over all elements.
softmax
    ``define`` returns ``target(t, u)``, ``ell(q, t)`` and ``dell(q, t)`` with q = log softmax(o)_j and u = 1 / classes;
    the loss of a sample is the sum over j of ell(q_j, target(t_j, u)). With g_j = dell(q_j, t_j) the chain rule
    through log softmax gives do_j = g_j - softmax(o)_j * sum_k g_k.

Reductions: ``"mean"`` (default) is the mean over samples, weighted by ``sample_weight`` where given,
sum_i w_i ell_i / sum_i w_i; ``"sum"`` is sum_i w_i ell_i, over all outputs, as in PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import numpy as np

from gpubackprop.definitions import NUMPY, Array, Definition, Math, check_number, constant, shown
from gpubackprop.registry import Registry
from gpubackprop.targets import Kind, kind_of

REDUCTIONS = ("mean", "sum")


@dataclass(frozen=True)
class Loss(Definition):
    """A loss of the outputs o and the targets y.

    Parameters
    ----------
    family : {"elementwise", "softmax"}
        Which of the two shapes of definition it has.
    mean_function : {"identity", "exp", "sigmoid", "softmax"} or None
        How ``predict_proba`` and ``predict`` read the outputs (the inverse of the link function).
    targets : {"real", "counts", "binary", "signs", "classes", "distribution"}
        What y may hold; checked at the input. Each is a class of :mod:`gpubackprop.targets`.
    reduction : {"mean", "sum"}
        How the losses of the samples are combined.
    """

    family: Literal["elementwise", "softmax"] = "elementwise"
    mean_function: Literal["identity", "exp", "sigmoid", "softmax"] = "identity"
    targets: Literal["real", "counts", "binary", "signs", "classes", "distribution"] = "real"
    reduction: Literal["mean", "sum"] = "mean"

    def __call__(self, *, reduction: Literal["mean", "sum"] | None = None, **parameters: Any) -> Self:
        """Return this loss with another reduction or other parameters, as in ``huber(delta=2.0, reduction="sum")``."""
        if reduction is not None and not (isinstance(reduction, str) and reduction in REDUCTIONS):
            raise ValueError(f"unknown reduction {shown(reduction)}; choose from {', '.join(REDUCTIONS)}")
        result = super().__call__(**parameters)
        return result if reduction is None else replace(result, reduction=reduction)

    @property
    def kind(self) -> Kind:
        """The kind of its targets, which says how its outputs are read."""
        return kind_of(self.targets, self.mean_function)

    def made_of(self, dtype: np.dtype[Any], m: Math) -> tuple[Any, ...]:
        return self.family, *super().made_of(dtype, m)

    def scale(self, n: float, d: int, weighted: bool) -> float:
        """Return the factor of each element: loss = scale * sum_i w_i sum_j ell_ij, w_i = 1 where there are no weights.

        Under ``"mean"`` the weights are already divided by their sum.
        """
        if self.reduction == "sum":
            return 1.0
        elements = d if self.family == "elementwise" else 1
        return 1.0 / (elements if weighted else n * elements)

    def per_sample(self, o: Array, y: Array) -> tuple[Array, Array]:
        """Return the loss of each sample, summed over its outputs, and its gradient with respect to o.

        Shapes
        ------
        o : (n, d); y : (n, d), or (n,) class indices in the softmax family; returns (n,) and (n, d)
        """
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # a branch not taken may overflow
            if self.family == "elementwise":
                ell, dell = self.scalars(np.dtype(o.dtype), NUMPY)
                return ell(o, y).sum(axis=1), dell(o, y) + np.zeros_like(o)
            target, ell, dell = self.scalars(np.dtype(o.dtype), NUMPY)
            if y.ndim == 1:
                y = (y[:, None] == np.arange(o.shape[1])).astype(o.dtype)
            t = target(y, o.dtype.type(1 / o.shape[1]))
            shifted = o - o.max(axis=1, keepdims=True)
            q = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
            g = dell(q, t)
            return ell(q, t).sum(axis=1), g - np.exp(q) * g.sum(axis=1, keepdims=True)


LOSSES: Registry[Loss] = Registry("loss")


def loss(*, aliases: Sequence[str] = (), **attributes: Any) -> Callable[[Callable[..., Any]], Loss]:
    """Register a definition under the name of its function; ``attributes`` are the fields of :class:`Loss`.

    ``aliases`` are other names of the same loss, in lower case with underscores.
    """

    def register(function: Callable[..., Any]) -> Loss:
        entry = Loss(function.__name__, function, **attributes)
        LOSSES.add(entry.name, entry, *aliases)
        return entry

    return register


@loss(aliases=("mse", "mse_loss", "l2", "squared_error"))
def mean_squared_error(real: Any, m: Any) -> Any:
    """ell = (o - t)^2, without the 1/2 of some textbooks, as ``torch.nn.MSELoss``."""
    two = real(2)

    def ell(o: Any, t: Any) -> Any:
        return (o - t) * (o - t)

    def dell(o: Any, t: Any) -> Any:
        return two * (o - t)

    return ell, dell


@loss(aliases=("mae", "l1", "l1_loss", "absolute_error"))
def mean_absolute_error(real: Any, m: Any) -> Any:
    """ell = |o - t|, with derivative 0 at o = t, as ``torch.nn.L1Loss``."""
    zero, one, fabs, where = real(0), real(1), m.fabs, m.where

    def ell(o: Any, t: Any) -> Any:
        return fabs(o - t)

    def dell(o: Any, t: Any) -> Any:
        r = o - t
        return where(r > zero, one, where(r < zero, -one, r))

    return ell, dell


@loss(aliases=("huber_loss", "smooth_l1"))
def huber(real: Any, m: Any, delta: float = 1.0) -> Any:
    """ell = r^2 / 2 for |r| <= delta, else delta (|r| - delta / 2), r = o - t. Source: Huber (1964); ``torch.nn.HuberLoss``."""
    check_number("delta", delta, lambda x: 0 < x < np.inf, "a number > 0")
    half, delta = real(0.5), constant(real, "delta", delta)
    fabs, where = m.fabs, m.where

    def ell(o: Any, t: Any) -> Any:
        r = fabs(o - t)
        return where(r > delta, delta * (r - half * delta), half * r * r)

    def dell(o: Any, t: Any) -> Any:
        r = o - t
        return where(r > delta, delta, where(r < -delta, -delta, r))

    return ell, dell


@loss(
    family="softmax", mean_function="softmax", targets="classes",
    aliases=(
        "cross_entropy", "crossentropy", "ce", "categorical_cross_entropy", "categorical_crossentropy",
        "sparse_categorical_cross_entropy", "sparse_categorical_crossentropy",
    ),
)  # fmt: skip
def softmax_cross_entropy(real: Any, m: Any, label_smoothing: float = 0.0) -> Any:
    """loss of a sample = -sum_j t_j log softmax(o)_j, t smoothed to (1 - s) t + s / classes; do = softmax(o) - t.

    y holds class indices (n,) or one row of probabilities (one-hot) per sample (n, classes), as in
    ``torch.nn.CrossEntropyLoss``. Source: Bishop (2006), eq. 4.108; smoothing: Szegedy et al. (2016), section 7.
    """
    check_number("label_smoothing", label_smoothing, lambda x: 0 <= x < 1, "in [0, 1)")
    zero, keep, where = real(0), real(1 - label_smoothing), m.where
    smoothing = constant(real, "label_smoothing", label_smoothing)

    def target(t: Any, u: Any) -> Any:
        return keep * t + smoothing * u

    def ell(q: Any, t: Any) -> Any:
        return where(t == zero, zero, -t * q)  # also where q is -inf

    def dell(q: Any, t: Any) -> Any:
        return -t

    return target, ell, dell


@loss(
    mean_function="sigmoid", targets="binary",
    aliases=("bce", "binary_cross_entropy", "binary_crossentropy", "bce_with_logits"),
)  # fmt: skip
def sigmoid_cross_entropy(real: Any, m: Any) -> Any:
    """ell = max(o, 0) - o t + log(1 + e^-|o|); dell = sigmoid(o) - t; ``torch.nn.BCEWithLogitsLoss``.

    max(o, 0) - o t is written |o| t for o < 0, else |o| (1 - t), and sigmoid(o) - t for o >= 0 is (1 - t) - sigmoid(-o): nothing
    cancels where t is 0 or 1.

    Each output is an independent probability: y in [0, 1], (n, d). Source: Bishop (2006), eq. 4.90.
    """
    zero, one = real(0), real(1)
    exp, log1p, fabs, where = m.exp, m.log1p, m.fabs, m.where

    def ell(o: Any, t: Any) -> Any:
        share = where(o < zero, t, one - t)
        return where(share == zero, zero, fabs(o) * share) + log1p(exp(-fabs(o)))

    def dell(o: Any, t: Any) -> Any:
        e = exp(-fabs(o))
        p = e / (one + e)
        return where(o < zero, p - t, (one - t) - p)

    return ell, dell


@loss(mean_function="exp", targets="counts", aliases=("poisson_nll",))
def poisson(real: Any, m: Any) -> Any:
    """ell = e^o - t o, o the log of the rate, without log t!, as ``torch.nn.PoissonNLLLoss``; dell = e^o - t."""
    zero, infinity, exp, where = real(0), real(np.inf), m.exp, m.where

    def ell(o: Any, t: Any) -> Any:
        rate = exp(o)
        return where(rate == infinity, rate, rate - where(t == zero, zero, t * o))  # avoids inf - inf and 0 inf

    def dell(o: Any, t: Any) -> Any:
        return exp(o) - t

    return ell, dell


@loss(targets="signs")
def hinge(real: Any, m: Any) -> Any:
    """ell = max(0, 1 - t o), t in {-1, +1}; dell = -t where 1 - t o > 0, else 0. Source: Vapnik (1995); as in Keras."""
    zero, one, where = real(0), real(1), m.where

    def ell(o: Any, t: Any) -> Any:
        margin = one - t * o
        return where(margin < zero, zero, margin)

    def dell(o: Any, t: Any) -> Any:
        margin = one - t * o
        return -t * where(margin > zero, one, where(margin <= zero, zero, margin))

    return ell, dell


@loss(family="softmax", mean_function="softmax", targets="distribution", aliases=("kl", "kl_div", "kld"))
def kl_divergence(real: Any, m: Any) -> Any:
    """loss of a sample = sum_j t_j (log t_j - log softmax(o)_j), 0 log 0 = 0; do = softmax(o) - t.

    y holds one row of probabilities per sample. It is ``torch.nn.KLDivLoss(reduction="batchmean")`` of
    ``log_softmax(o)``. Source: Kullback and Leibler (1951), eq. 2.4.
    """
    zero, one, log, where = real(0), real(1), m.log, m.where

    def target(t: Any, u: Any) -> Any:
        return t

    def ell(q: Any, t: Any) -> Any:
        return where(t == zero, zero, t * (log(where(t > zero, t, one)) - q))

    def dell(q: Any, t: Any) -> Any:
        return -t

    return target, ell, dell
