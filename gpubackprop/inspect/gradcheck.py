"""Gradients against finite differences, in float64, by walking through the operations of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gpubackprop.definitions import Array
from gpubackprop.intake import Samples
from gpubackprop.step import Step
from gpubackprop.step.operations import Operation

if TYPE_CHECKING:
    from gpubackprop.mlp import MLP
    from gpubackprop.network import Network

STEPS = (1e-3, 1e-4, 1e-5, 1e-6)


@dataclass(frozen=True)
class GradientCheck:
    """One gradient against finite differences along one random direction.

    Attributes
    ----------
    name : str
        The gradient: dW_1, db_o, dh_2, ....
    computed, expected : float
        <gradient, v> by backpropagation, and (loss(x + e v) - loss(x - e v)) / 2 e.
    error : float
        |computed - expected| / max(|computed|, |expected|, floor), floor from the rounding of the loss.
    """

    name: str
    computed: float
    expected: float
    error: float


@dataclass(frozen=True)
class GradientReport:
    """The checks of all gradients of a network, in the order of the backward pass."""

    checks: list[GradientCheck]
    tolerance: float

    @property
    def ok(self) -> bool:
        """True if every relative error is below the tolerance."""
        return all(check.error <= self.tolerance for check in self.checks)

    @property
    def worst(self) -> float:
        """The largest relative error."""
        return max((check.error for check in self.checks), default=0.0)

    def __str__(self) -> str:
        lines = [f"{'gradient':8s} {'backprop':>14s} {'differences':>14s} {'error':>9s}"]
        for c in self.checks:
            mark = "ok" if c.error <= self.tolerance else "WRONG"
            lines.append(f"{c.name:8s} {c.computed:14.6e} {c.expected:14.6e} {c.error:9.1e}  {mark}")
        return "\n".join(lines)


def check_gradients(
    model: MLP, X: Any, y: Any, sample_weight: Any = None, *, tolerance: float = 1e-6, seed: int = 0
) -> GradientReport:
    """Check do and every dh_l, delta_l, dW_l, db_l of a network against central differences of its loss.

    The network is copied to the reference backend in float64. Each gradient is compared along one random direction v:
    <gradient, v> = (loss(x + e v) - loss(x - e v)) / 2 e, extrapolated once (Richardson), the best of a few e. A gradient
    with respect to an intermediate is checked by adding e v to it in the middle of the forward pass.

    Parameters
    ----------
    model : MLP
    X, y, sample_weight : array
    tolerance : float
        Relative. A kink (relu, hinge, ...) between x - e v and x + e v may exceed it.
    seed : int
        The seed of the directions.

    Returns
    -------
    GradientReport
        ``print(report)`` shows every gradient; ``report.ok``.
    """
    step, run = gradient_step(model.network, X, y, sample_weight)
    for operation in step.operations:
        run(operation)
    rng = np.random.default_rng(seed)
    names = [name for operation in step.operations for name in gradients_of(step, operation)]
    computed = {name: step.names.array(name).copy() for name in names}
    return GradientReport([check_gradient(step, run, name, computed[name], rng) for name in names], tolerance)


def gradient_step(network: Network, X: Any, y: Any, sample_weight: Any = None) -> tuple[Step, Any]:
    """Return (step, run): the fed step of a float64 copy on the reference backend, and a function that runs one operation."""
    twin = network.twin("reference", dtype="float64", dropout=0.0)
    samples = Samples.given(X, y, sample_weight, by=twin.architecture).on(twin.backend, twin.architecture, finite=False)
    step = twin.step(len(samples), class_indices=samples.y.ndim == 1, weighted=samples.weight is not None, keep=True)
    samples.feed(step.names.array)
    bound = dict(zip(step.operations, step.bound(), strict=True))
    return step, lambda operation: twin.backend.execute(bound[operation])


def gradients_of(step: Step, operation: Operation) -> list[str]:
    """Return the names of the gradients that an operation computes: do, dW_1, db_1, dh_1, delta_1, ...."""
    return [buffer.name for buffer in operation.written if buffer.name in step.gradients]


def check_gradient(step: Step, run: Any, name: str, gradient: Array, rng: np.random.Generator) -> GradientCheck:
    """Check one gradient of a step along a random direction."""
    v = rng.normal(size=gradient.shape)
    v /= np.linalg.norm(v)
    # along the gradient too: a random direction in many dimensions would see little of it
    size = np.linalg.norm(gradient)
    if size > 0:
        v += gradient / size
    computed = float(np.sum(gradient * v))
    source = step.gradients[name]
    scale = max(1.0, float(np.abs(step.names.array(source)).max()))
    best = GradientCheck(name, computed, np.nan, np.inf)
    for e in STEPS:
        e *= scale
        values = [forward_with(step, run, source, k * e * v) for k in (-2, -1, 1, 2)]
        expected = (8 * (values[2] - values[1]) - (values[3] - values[0])) / (12 * e)
        floor = 64 * np.finfo(np.float64).eps * max(map(abs, values)) / e  # rounding of the loss, as a slope
        error = abs(computed - expected) / max(abs(computed), abs(expected), floor, 1e-300)
        if error < best.error:
            best = GradientCheck(name, computed, float(expected), float(error))
    return best


def forward_with(step: Step, run: Any, source: str, change: Array) -> float:
    """Run the forward phase with ``change`` added to a parameter, or to an intermediate once it is computed; return the loss."""
    array = step.names.array(source)
    parameter = not any(source in _written(operation) for operation in step.operations)
    if parameter:
        array += change
    pending = not parameter
    for operation in step.operations:
        if operation.phase == "backward":
            break
        run(operation)
        if pending and source in _written(operation):
            array += change
            pending = False
    if parameter:
        array -= change
    return float(step.names.array("loss")[0])


def _written(operation: Operation) -> list[str]:
    return [buffer.name for buffer in operation.written]
