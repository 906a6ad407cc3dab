"""Why a network does not learn: dead and saturated units, gradients and updates of each layer, and the likely causes."""

from __future__ import annotations

import copy
import math
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpubackprop.activations import Activation
from gpubackprop.definitions import shown
from gpubackprop.interop import on_host
from gpubackprop.network import optimizer_of
from gpubackprop.optimizers import Adam, Optimizer
from gpubackprop.training.divergence import DivergenceWarning
from gpubackprop.training.tables import html_table, text_table

if TYPE_CHECKING:
    from gpubackprop.mlp import MLP
    from gpubackprop.training.curves import Picture

DEAD_SLOPE = 1e-3  # of the activation's largest slope: less passes nothing on that a step would show
SATURATED_SLOPE = 0.05  # tanh at |z| > 2.2, sigmoid at |z| > 4.4, relu at z <= 0
SATURATED_SAMPLES = 0.9  # a relu that is active for half of the samples is not saturated
MANY = 0.5  # units of a layer
LARGE_INPUT = 10.0  # root mean square; standardized columns have 1
VANISHED = 1e-3  # of a gradient in the first layer over that in the last: three orders of magnitude
LARGE_UPDATE, SMALL_UPDATE = 0.1, 1e-6  # of the weights in one step; about 1e-3 is usual
WIDTH = 80  # of a terminal
GRID = np.linspace(-8.0, 8.0, 1601)


@dataclass(frozen=True)
class LayerDiagnosis:
    """One layer on one data set.

    Attributes
    ----------
    name : str
        ``"1"``, ``"2"``, ... and ``"o"``, the output layer.
    activation : str
    units : int
    dead : float
        Share of the units with |phi'(z)| below 0.001 of the activation's largest slope for every sample: they pass no gradient. A
        relu whose z is never positive is one. NaN for the output layer, which has no activation.
    saturated : float
        Share of the other units with |phi'(z)| below 0.05 of the largest slope for 90 % of the samples: tanh near -1 or 1, or a
        relu that is seldom active.
    gradient_norm : float
        The Frobenius norm of dW.
    gradient_rms : float
        The root mean square of dW, which can be compared between layers of different sizes.
    update_ratio : float
        The norm of the change of W in the next step over the norm of W: 0 if it does not change, infinite if W is 0, NaN if that
        step is not finite.
    """

    name: str
    activation: str
    units: int
    dead: float
    saturated: float
    gradient_norm: float
    gradient_rms: float
    update_ratio: float


@dataclass(frozen=True)
class Diagnosis:
    """What :meth:`gpubackprop.MLP.diagnose` finds; ``print`` shows it, ``dataclasses.asdict`` makes it plain data.

    Attributes
    ----------
    loss : float
    samples : int
    optimizer : str
        Whose next step the update ratios are of.
    largest_input : float
        The largest root mean square of an input of the first layer.
    layers : tuple of LayerDiagnosis
    causes : tuple of str
        What is likely to keep the network from learning, and what helps, most likely first; empty if nothing stands out.
    """

    loss: float
    samples: int
    optimizer: str
    largest_input: float
    layers: tuple[LayerDiagnosis, ...]
    causes: tuple[str, ...]

    def _rows(self) -> list[list[str]]:
        rows = [
            [a.name, a.activation, str(a.units), _percent(a.dead), _percent(a.saturated), f"{a.gradient_norm:.2e}",
             f"{a.gradient_rms:.2e}", f"{a.update_ratio:.2e}"]
            for a in self.layers
        ]  # fmt: skip
        return [["layer", "activation", "units", "dead", "saturated", "|dW|", "rms dW", "|ΔW| / |W|"], *rows]

    def _title(self) -> str:
        samples = f"{self.samples:,} sample{'s' * (self.samples != 1)}"
        return f"loss {self.loss:.4g} on {samples}; next step by {self.optimizer}"

    def plot(self, path: str | Path | None = None) -> Picture:
        """Return a picture of the units, gradients and updates of each layer.

        Parameters
        ----------
        path : str or Path, optional
            Write it into this file too.
        """
        from gpubackprop.inspect.pictures import layers_of  # loads matplotlib

        return layers_of(self).write(path)

    def _verdict(self) -> list[str]:
        if not self.causes:
            return ["nothing stands out"]
        return [f"likely cause: {self.causes[0]}", *(f"also: {cause}" for cause in self.causes[1:])]

    def __str__(self) -> str:
        table = text_table(self._rows(), right=frozenset(range(2, 8)))
        verdict = [textwrap.fill(text, WIDTH, subsequent_indent="  ") for text in self._verdict()]
        return "\n".join([self._title(), "", table, "", *verdict])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from html import escape

        return html_table(self._rows(), self._title()) + "".join(f"<p>{escape(text)}</p>" for text in self._verdict())


def diagnose(
    model: MLP, X: Any, y: Any, sample_weight: Any = None, *, optimizer: str | Optimizer | None = None
) -> Diagnosis:
    """Return dead and saturated units, gradients and updates of each layer on one data set, and the likely causes.

    The network does not change: the next step is taken by a copy. A few hundred samples are enough.

    Parameters
    ----------
    model : MLP
    X, y, sample_weight : array
        As ``fit`` takes them.
    optimizer : str or Optimizer, optional
        By default that of the last ``fit`` with its state, or Adam() before the first.

    Returns
    -------
    Diagnosis
    """
    state = model.optimizer_state
    chosen = optimizer_of(optimizer if optimizer is not None else Adam() if state is None else state.optimizer)
    trace = model.trace(X, y, sample_weight)
    ratios = _update_ratios(model, X, y, sample_weight, chosen, len(trace.X))
    inputs = np.asarray(on_host(trace.X), np.float64)
    activations = [*model.activations, None]
    layers = tuple(
        _layer(str(i + 1) if activation is not None else "o", activation, arrays, ratio)
        for i, (activation, arrays, ratio) in enumerate(zip(activations, trace.layers, ratios, strict=True))
    )
    scales = np.sqrt((inputs**2).mean(axis=0))
    step = f"{type(chosen).__name__}(learning_rate={shown(chosen.learning_rate)})"
    found = Diagnosis(float(trace.loss), len(inputs), step, float(scales.max()), layers, causes=())
    return replace(found, causes=tuple(_causes(model, found, int(scales.argmax()))))


def _layer(name: str, activation: Activation | None, arrays: Any, ratio: float) -> LayerDiagnosis:
    """Return what the arrays of a pass say about a layer."""
    dW = np.asarray(on_host(arrays.dW), np.float64)
    norm = float(np.linalg.norm(dW))
    gradients = norm, norm / math.sqrt(dW.size), ratio
    if activation is None:
        return LayerDiagnosis(name, "identity", dW.shape[1], math.nan, math.nan, *gradients)
    slope = np.abs(activation.dphi(np.asarray(on_host(arrays.z), np.float64)))
    largest = float(np.nanmax(np.abs(activation.dphi(GRID))))
    dead = (slope < DEAD_SLOPE * largest).all(axis=0)
    saturated = ((slope < SATURATED_SLOPE * largest).mean(axis=0) >= SATURATED_SAMPLES) & ~dead
    return LayerDiagnosis(
        name, activation.label, dW.shape[1], float(dead.mean()), float(saturated.mean()), *gradients
    )  # fmt: skip


def _update_ratios(model: MLP, X: Any, y: Any, weight: Any, optimizer: Optimizer, samples: int) -> list[float]:
    """Return the norm of the change of each W in the next step over the norm of W, NaN where that is not finite."""
    twin = copy.deepcopy(model)
    before = [np.asarray(on_host(W), np.float64).copy() for W in twin.parameters.W]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DivergenceWarning)  # the report says it
        history = twin.fit(
            X, y, epochs=1, batch_size=samples, optimizer=optimizer, sample_weight=weight, shuffle=False, progress=False
        )
    if history.stopped == "diverged":
        return [math.nan] * len(before)
    after = (np.asarray(on_host(W), np.float64) for W in twin.parameters.W)
    return [_ratio(float(np.linalg.norm(b - a)), float(np.linalg.norm(a))) for a, b in zip(before, after, strict=True)]


def _ratio(change: float, norm: float) -> float:
    return 0.0 if change == 0 else change / norm if norm > 0 else math.inf


def _causes(model: MLP, found: Diagnosis, column: int) -> list[str]:
    """Return what is likely to be wrong, with what helps, the most likely first."""
    *hidden, last = found.layers
    first, ratios, causes = found.layers[0], [a.update_ratio for a in found.layers], []
    if not math.isfinite(found.loss) or not all(math.isfinite(a.gradient_norm) for a in found.layers):
        causes.append(
            "the loss or a gradient is not finite: a smaller learning rate, clip_norm or data of unit scale help"
        )
    if found.largest_input > LARGE_INPUT:
        name = f"input {column + 1}" if model.features is None else shown(model.features.input_names[column])
        size = f"{name} has a root mean square of {found.largest_input:.3g}"
        causes.append(f"inputs are large ({size}): fit(..., standardize=True)")
    causes += _of_weights(model)
    causes += [cause for a in hidden for cause in _of_units(a)]
    if not causes and all(a.gradient_norm == 0 for a in found.layers):
        causes.append("every gradient is 0: the loss is at its minimum")
    elif not causes and hidden and first.gradient_rms < VANISHED * last.gradient_rms:
        causes.append(
            f"gradients vanish: their root mean square is {last.gradient_rms:.1e} in the output layer and "
            f"{first.gradient_rms:.1e} in the first; fewer layers, or relu, gelu or selu instead of {first.activation}"
        )
    largest = max((ratio for ratio in ratios if ratio < math.inf), default=0.0)
    if any(math.isnan(ratio) for ratio in ratios):
        causes.append("the next step is not finite: a smaller learning rate")
    elif largest > LARGE_UPDATE:
        causes.append(f"a step changes weights by {largest:.0%}: a smaller learning rate (about 0.1% is usual)")
    elif largest < SMALL_UPDATE and not causes:
        causes.append(f"a step changes weights by {largest:.1e} at most: a larger learning rate, or it has converged")
    return causes


def _of_units(a: LayerDiagnosis) -> Iterator[str]:
    """Yield what is wrong with the units of a hidden layer."""
    if a.dead >= MANY:
        yield (
            f"{a.dead:.0%} of the units of layer {a.name} are dead ({a.activation} passes no gradient for any sample): a "
            "new start with a smaller learning rate, or an activation with a slope everywhere, such as leaky_relu or gelu"
        )
    elif a.dead + a.saturated >= MANY:
        yield (
            f"{a.dead + a.saturated:.0%} of the units of layer {a.name} are saturated (the slope of {a.activation} is near 0 "
            f"for at least {SATURATED_SAMPLES:.0%} of the samples): standardized inputs, or a new start with a smaller rate"
        )


def _of_weights(model: MLP) -> Iterator[str]:
    """Yield what is wrong with weights that nobody has initialized at random."""
    weights = [np.asarray(on_host(W)) for W in model.parameters.W]
    for i, W in enumerate(weights):
        name = "o" if i == len(weights) - 1 else i + 1
        if not W.any() and i > 0:
            yield f"the weights of layer {name} are all 0, so no gradient reaches the layers below: random initial weights"
        elif W.shape[1] > 1 and name != "o" and (W[:, :1] == W).all():
            yield f"the units of layer {name} all have the same weights, so they learn the same: random initial weights"


def _percent(share: float) -> str:
    return "" if math.isnan(share) else f"{share:.0%}"
