"""A walk through a network: one forward and one backward phase in float64, with every array kept and every gradient checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from gpubackprop.activations import Activation
from gpubackprop.definitions import Array
from gpubackprop.inspect.gradcheck import GradientCheck, check_gradient, gradient_step, gradients_of
from gpubackprop.intake import Samples
from gpubackprop.network import Network
from gpubackprop.optimizers import SGD
from gpubackprop.step import Step
from gpubackprop.training.convergence import Convergence

ETA, TOL, N_ITER_NO_CHANGE = 0.1, 1e-4, 10
MOST_ITERATIONS, MOST_FLOPS = 1000, 10**9
"""Limit of the iterations till convergence, so that no network takes more than a second or two."""


@dataclass(frozen=True)
class Descent:
    """Gradient descent over the whole batch: the loss before each update, the parameters after the first, and why it ended."""

    losses: list[float]
    updated: dict[str, Array]
    stopped: str


@dataclass(frozen=True)
class Walk:
    """What :func:`walk` returns.

    Attributes
    ----------
    network : Network
        A float64 copy on the reference backend, without dropout.
    step : Step
        Forward and backward phase; every array has its own memory.
    arrays : dict of str to array
        By the names of the step.
    checks : dict of str to GradientCheck
        In the order in which the gradients are computed.
    """

    network: Network
    step: Step
    arrays: Mapping[str, Array]
    checks: Mapping[str, GradientCheck]
    descent: Descent
    tolerance: float

    @property
    def sizes(self) -> tuple[int, ...]:
        """d_0, ..., d_L, d_o."""
        return self.network.layer_sizes

    @property
    def n(self) -> int:
        """The number of samples."""
        return len(self.arrays["X"])

    @property
    def L(self) -> int:  # noqa: N802  (the symbol)
        """The number of hidden layers."""
        return len(self.sizes) - 2

    @property
    def activations(self) -> tuple[Activation, ...]:
        """phi_1, ..., phi_L."""
        return self.network.architecture.activations

    @property
    def loss(self) -> float:
        """The loss, before any update."""
        return float(self.arrays["loss"][0])

    @cached_property
    def parameters(self) -> list[str]:
        """W_1, b_1, ..., W_o, b_o."""
        return [name for name in self.step.gradients.values() if name[0] in "Wb"]

    def verdict(self, error: float) -> str:
        """Return how well a derivative agrees with finite differences."""
        return f"✓ {max(error, 1e-16):.0e}" if error <= self.tolerance else f"✗ {error:.0e} DIFFERS"

    @property
    def ok(self) -> bool:
        """True if every gradient agrees with finite differences."""
        return all(check.error <= self.tolerance for check in self.checks.values())


def walk(network: Network, X: Any, y: Any, rng: np.random.Generator, tolerance: float) -> Walk:
    """Go through one forward and one backward phase, check each gradient on the way, then descend till convergence."""
    twin = network.twin("reference", dtype="float64", dropout=0.0)
    step, run = gradient_step(twin, X, y)
    for operation in step.operations:
        run(operation)
    arrays = {name: step.names.array(name).copy() for name in step.buffers}
    gradients = [name for operation in step.operations for name in gradients_of(step, operation)]
    checks = {name: check_gradient(step, run, name, arrays[name], rng) for name in gradients}
    return Walk(twin, step, arrays, checks, descend(twin, arrays["X"], arrays["y"]), tolerance)


def descend(network: Network, X: Array, y: Array) -> Descent:
    """Take steps of plain gradient descent on a copy until the loss has not fallen by TOL for some iterations."""
    copy = network.twin()
    step = copy.step(len(X), SGD(ETA), class_indices=y.ndim == 1)
    Samples(X, y).feed(step.names.array)
    run, loss = step.compile(), step.names.array("loss")
    limit = max(N_ITER_NO_CHANGE, min(MOST_ITERATIONS, MOST_FLOPS // step.flops))
    losses: list[float] = []
    updated: dict[str, Array] = {}
    criterion, converged = Convergence(TOL, N_ITER_NO_CHANGE), False
    while not converged and len(losses) < limit:
        run()
        losses.append(float(loss[0]))
        if not updated:
            updated = {name: step.names.array(name).copy() for name in step.buffers if name[:2] in ("W_", "b_")}
        converged = criterion.reached(losses[-1])
    last, lowest = len(losses) - 1, criterion.lowest
    if not np.isfinite(losses[0]):
        return Descent(losses, updated, f"not begun: the loss is {losses[0]}")
    if not losses[-1] < lowest + TOL:
        rise = (
            f"the loss is {losses[-1] - lowest:.2g} above its lowest"
            if np.isfinite(losses[-1])
            else "the loss overflows"
        )
        return Descent(losses, updated, f"not converged: after {last:,} iterations {rise}; η is too large here")
    if not converged:
        return Descent(losses, updated, f"not yet converged after {last:,} iterations, where this page stops")
    return Descent(losses, updated, f"converged at iteration {last:,}")
