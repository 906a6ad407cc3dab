"""A network that takes scikit-learn's steps: its losses, its update rules, its penalty; it does not import scikit-learn."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import numpy as np

from gpubackprop.architecture import Architecture
from gpubackprop.backends.base import Run
from gpubackprop.backends.current import OnDevice, active
from gpubackprop.definitions import Array
from gpubackprop.losses import LOSSES, Loss
from gpubackprop.network import Data, Network
from gpubackprop.optimizers import Optimizer, Scalars
from gpubackprop.parameters import Parameters
from gpubackprop.step.buffers import Memory
from gpubackprop.step.layout import flat_size
from gpubackprop.step.state import CURSOR, FACTOR


@dataclass(frozen=True)
class _Summed(Loss):
    """A loss that is summed, not averaged, over the outputs of a sample, times a factor."""

    factor: float = 1.0

    def scale(self, n: float, d: int, weighted: bool) -> float:
        return self.factor / (1 if weighted else n)


def _summed(name: str, factor: float = 1.0) -> _Summed:
    loss = LOSSES[name]
    return _Summed(**{f.name: getattr(loss, f.name) for f in fields(loss)}, factor=factor)


def _poisson_deviance(real: Any, m: Any) -> Any:
    """ell = t log t - t o - t + e^o, half the deviance, o the log of the rate; dell = e^o - t."""
    zero, one, exp, log, where = real(0), real(1), m.exp, m.log, m.where

    def ell(o: Any, t: Any) -> Any:
        return t * (log(where(t > zero, t, one)) - o) - t + exp(o)

    def dell(o: Any, t: Any) -> Any:
        return exp(o) - t

    return ell, dell


LOSS_OF: dict[str, Loss] = {
    "softmax": LOSSES["softmax_cross_entropy"],
    "logistic": _summed("sigmoid_cross_entropy"),
    "identity": _summed("mean_squared_error", 0.5),
    "exp": _Summed("poisson_deviance", _poisson_deviance, mean_function="exp"),
}
"""By the output activation."""
ACTIVATION_OF = {"identity": "identity", "logistic": "sigmoid", "tanh": "tanh", "relu": "relu"}


class _Rule(Optimizer, registered=False):
    """An update with alpha / 2 |W|^2 / (weight of the mini-batch) in the loss, on weights alone.

    What changes during a fit is data: the base rate of the state holds ``decay``, which is alpha over the weight of the mini-batch.
    The last state array is -1 where a bias is; where a weight is, the squares that it had before each update are added up there,
    so that the epoch's loss has its penalty without another pass.
    """


@dataclass(frozen=True)
class Momentum(_Rule, registered=False):
    """v <- momentum v - g; p <- p + v, or p + momentum v - g with Nesterov; g and decay are multiplied by eta from outside.

    So eta is inside the velocity, as in Sutskever et al. (2013), eq. 3: it matters where eta changes.
    """

    momentum: float = 0.9
    nesterov: bool = True
    n_states: ClassVar[int] = 2

    @property
    def numbers(self) -> tuple[float, ...]:  # type: ignore[override]
        """Momentum."""
        return (self.momentum,)

    def define(self, real: Any, m: Any) -> Scalars:
        zero, nesterov, fma, where = real(0), self.nesterov, m.fma, m.where

        def constants(t: float, decay: float, momentum: float) -> tuple[float, float, float]:
            return decay, 0.0, 0.0

        def update(p: Any, g: Any, v: Any, squares: Any, s2: Any, decay: Any, c1: Any, c2: Any, momentum: Any) -> Any:
            is_bias = squares < zero
            g = fma(where(is_bias, zero, decay), p, g)
            v = fma(momentum, v, -g)
            squares = fma(where(is_bias, zero, p), p, squares)
            return p + (fma(momentum, v, -g) if nesterov else v), v, squares, s2

        return constants, update


@dataclass(frozen=True)
class UncorrectedAdam(_Rule, registered=False):
    """m <- b1 m + (1 - b1) g; v <- b2 v + (1 - b2) g^2; p <- p - eta_t m / (sqrt(v) + eps).

    eta_t = eta sqrt(1 - b2^t) / (1 - b1^t). As at the end of section 2 of Kingma and Ba (2015), not as in
    their algorithm 1, eps is added to the uncorrected root.
    """

    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-8
    n_states: ClassVar[int] = 3

    @property
    def numbers(self) -> tuple[float, ...]:  # type: ignore[override]
        """eta, both betas, 1 - each of them, eps."""
        eta = self.schedule.learning_rate
        return eta, self.beta_1, self.beta_2, 1 - self.beta_1, 1 - self.beta_2, self.epsilon

    def define(self, real: Any, m: Any) -> Scalars:
        zero, sqrt, power, fma, where = real(0), m.sqrt, m.power, m.fma, m.where

        def constants(
            t: float, decay: float, eta: float, b1: float, b2: float, a1: float, a2: float, eps: float
        ) -> tuple[float, float, float]:
            return eta * sqrt(1.0 - power(b2, t)) / (1.0 - power(b1, t)), decay, 0.0

        def update(
            p: Any, g: Any, mean: Any, square: Any, squares: Any, eta: Any, decay: Any, c2: Any,
            eta_0: Any, b1: Any, b2: Any, a1: Any, a2: Any, eps: Any,
        ) -> Any:  # fmt: skip
            is_bias = squares < zero
            g = fma(where(is_bias, zero, decay), p, g)
            mean, square = fma(b1, mean, a1 * g), fma(b2, square, a2 * (g * g))
            squares = fma(where(is_bias, zero, p), p, squares)
            return p - eta * mean / (sqrt(square) + eps), mean, square, squares

        return constants, update


class Kind(NamedTuple):
    """What a network is made for; two fits of one kind can have the same network."""

    sizes: tuple[int, ...]
    activations: Any
    loss: Loss
    dtype: np.dtype[Any]
    device: str
    rule: Optimizer | None
    """None for loss and gradients alone."""
    weighted: bool
    dropout: float = 0.0
    seed: int = 0


class Steps(NamedTuple):
    """The compiled steps over n samples in mini-batches, on a copy of the data."""

    arrays: dict[str, Array]
    """``X``, ``y``, ``w`` of the data; ``order``; ``loss``."""
    parts: list[tuple[Run, int]]
    """A step for each size of mini-batch, and that size."""


class Trainer(OnDevice):
    """A network and its steps; parameters go in and come out as scikit-learn's lists of arrays."""

    KEPT = 16  # numbers of samples whose steps are kept: a loop over partial_fit meets them again

    def __init__(self, kind: Kind) -> None:
        self.kind, self.indices = kind, kind.loss.mean_function == "softmax"
        architecture = Architecture(
            kind.sizes, kind.activations, kind.loss, kind.dtype, kind.seed, dropout=kind.dropout
        )
        zeros = np.zeros(flat_size(kind.sizes), kind.dtype)
        self.network = network = Network(architecture, kind.device, zeros)
        self.backend = network.backend
        self._shared = False
        self.lists: list[Any] = [network.parameters.W, network.parameters.b]  # and the moments
        self.mean_over = (
            kind.sizes[-1] if kind.loss is LOSS_OF["identity"] else 1
        )  # scikit-learn's squared error, not its gradient
        self._steps: dict[tuple[int, int], Steps] = {}
        if kind.rule is not None:
            self.state = network.state_of(kind.rule)
            moments = [Parameters(kind.sizes, row) for row in self.state.states]
            self.squares: list[Array] = []
            if isinstance(kind.rule, _Rule):
                squares = moments.pop()
                self.squares = [*squares.W]
                with active(self.backend):
                    for b in squares.b:
                        b[...] = -1
            self.lists += [[*p.W, *p.b] for p in moments]

    def steps(self, n: int, batch_size: int) -> Steps:
        """Return the steps over n samples."""
        made = self._steps.pop((n, batch_size), None) or self._make_steps(n, batch_size)
        self._steps[n, batch_size] = made
        if len(self._steps) > self.KEPT:
            del self._steps[next(iter(self._steps))]
        return made

    def _make_steps(self, n: int, batch_size: int) -> Steps:
        network, kind, memory = self.network, self.kind, Memory()
        if kind.rule is None:
            step = network.step(n, class_indices=self.indices, weighted=kind.weighted, memory=memory)
            return Steps(memory.arrays, [(step.compile(), n)])
        zeros, real = self.backend.zeros, network.real
        data = Data(
            X=zeros((n, kind.sizes[0]), network.dtype),
            y=zeros((n,), np.int64) if self.indices else zeros((n, kind.sizes[-1]), real),
            weight=zeros((n,), real) if kind.weighted else None,
            order=zeros((n,), np.int64),
        )
        sizes = [size for size in (batch_size, n % batch_size) if size]
        parts = [(network.step(size, kind.rule, data=data, memory=memory).compile(), size) for size in sizes]
        weight = {} if data.weight is None else {"w": data.weight}
        here = {"X": data.X, "y": data.y, "order": data.order, "loss": memory.arrays["loss"]}
        return Steps(here | weight, parts)

    def load(self, steps: Steps, X: Any, y: Any, weight: Any) -> None:
        """Copy a data set in."""
        given = {
            "X": X.toarray() if hasattr(X, "toarray") else X,
            "y": y.argmax(axis=1) if self.indices else y,
            "w": weight,
        }
        for name, values in given.items():
            if values is not None:
                to = steps.arrays[name]
                to[...] = self.backend.asarray(values, to.dtype)

    def put(self, to: Any, values: Any) -> None:
        """Copy scikit-learn's arrays into the network's."""
        for here, there in zip(to, values, strict=True):
            if here is not there:
                here[...] = self.backend.asarray(there, here.dtype)

    @property
    def nbytes(self) -> int:
        """The bytes of the parameters and of the data sets that are kept."""
        kept = [a for steps in self._steps.values() for a in steps.arrays.values()]
        return sum(int(a.nbytes) for a in (self.network.parameters.flat, *kept))

    def may_write(self, lists: list[Any]) -> bool:
        """Return whether nobody else reads the network's arrays, or ``lists`` holds them, so that they may be written into."""
        return not self._shared or all(map(_same, self.lists, lists))

    def load_parameters(self, lists: list[Any], *, share: bool) -> None:
        """Copy scikit-learn's lists of arrays in: weights, biases, and for each moment that of both.

        ``share`` on the CPU puts the network's arrays in their place, so that none is copied again.
        """
        self._shared = share and self.backend.xp is np
        for here, there in zip(self.lists, lists, strict=True):
            self.put(here, there)
            if self._shared:
                there[:] = here

    def take(self, lists: list[Any]) -> None:
        """Copy the network's arrays into scikit-learn's, where they are not the same."""
        for here, there in zip(self.lists, lists, strict=False):
            for source, to in zip(here, there, strict=True):
                if source is not to:
                    to[...] = self.backend.to_numpy(source)

    @property
    def parameters(self) -> list[Array]:
        """Weights, then biases, as scikit-learn orders them."""
        return [*self.network.parameters.W, *self.network.parameters.b]

    def epoch(self, steps: Steps, order: np.ndarray, weight: Any, alpha: float, factor: float) -> float:
        """Take the steps of an epoch and return the mean of its losses, penalty included, each with the parameters before its step.

        ``factor`` is what gradient and decay are multiplied by; our optimizers have a decay of their own.
        """
        state, value, n = self.state, steps.arrays["loss"], len(order)
        steps.arrays["order"][...] = self.backend.asarray(order)
        state.counters[CURSOR] = 0
        state.scalars[FACTOR] = factor
        total, row = 0.0, 0
        for run, rows in steps.parts:
            batches = (n - row) // rows
            of_batch = rows * np.ones(1) if weight is None else _sums(weight[order[row : row + batches * rows]], rows)
            for w in of_batch:
                if not w:
                    raise ZeroDivisionError("the sample weights of a mini-batch add up to 0, so they have no mean")
                if self.squares:
                    state.rate[0] = factor * alpha / w
                value[...] = 0
                for a in self.squares:
                    a[...] = 0
                run(batches // len(of_batch))
                penalty = sum(float(a.sum(dtype=np.float64)) for a in self.squares)
                total += rows / w * (float(value[1]) / self.mean_over + 0.5 * alpha * penalty)
            row += batches * rows
        return float(total / n)

    def loss_and_gradients(self, steps: Steps, weight_sum: float, alpha: float) -> tuple[float, list[Any], list[Any]]:
        """Return the loss over all data and its gradients, penalty included."""
        steps.parts[0][0]()
        host, decay = self.backend.to_numpy, alpha / weight_sum
        gradients, weights = self.network.gradients, [host(W) for W in self.network.parameters.W]
        penalty = sum(float(np.vdot(W, W)) for W in weights)
        loss = float(steps.arrays["loss"][0]) / self.mean_over + 0.5 * decay * penalty
        return loss, [host(g) + decay * W for g, W in zip(gradients.W, weights, strict=True)], [*map(host, gradients.b)]


def _same(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def _sums(weight: np.ndarray, rows: int) -> Any:
    return weight.reshape(-1, rows).sum(axis=1)
