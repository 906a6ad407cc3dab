"""Optimizers: the update of one parameter, defined once, on scalars.

An optimizer is its hyperparameters (an immutable dataclass); what changes during training lives in arrays beside the
parameters. ``define(real, m)`` returns two scalar functions:

``constants(t, lr)``
    float64, once per step: the step's learning rate and two more numbers, t = 1 for the first step.
``update(p, g, s0, s1, s2, lr, c1, c2)``
    per parameter: the new p, s0, s1, s2, where s0 ... are the first ``n_states`` state arrays (zero at first).

Names and defaults are PyTorch's where PyTorch has the optimizer. ``weight_decay`` is coupled (added to the gradient)
in SGD, Adam, RMSprop and Adagrad, and decoupled (p shrinks by lr * weight_decay) in AdamW and Lion. It acts on all
parameters, biases included, as in PyTorch. ``clip_norm`` scales the whole gradient to at most that Euclidean norm
(``torch.nn.utils.clip_grad_norm_``), ``clip_value`` then limits each element.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from gpubackprop.definitions import fingerprint
from gpubackprop.registry import Registry
from gpubackprop.schedules import Schedule

OPTIMIZERS: Registry[type[Optimizer]] = Registry("optimizer")

Scalars = tuple[Callable[..., tuple[float, float, float]], Callable[..., tuple[Any, Any, Any, Any]]]


@dataclass(frozen=True)
class Optimizer:
    """The base of all optimizers.

    Parameters
    ----------
    learning_rate : float or Schedule
        eta, or eta as a function of the step.
    """

    learning_rate: float | Schedule = 0.01
    n_states: ClassVar[int] = 0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        OPTIMIZERS[cls.__name__.lower()] = cls

    def __post_init__(self) -> None:
        if not isinstance(self.learning_rate, Schedule):
            object.__setattr__(self, "learning_rate", float(self.learning_rate))
            Schedule(self.learning_rate)  # raises for a bad rate
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in ("clip_norm", "clip_value"):
                _check(f.name, value, value is None or 0 < value < math.inf, "None or a number > 0")
            elif f.name in ("weight_decay", "momentum", "lr_decay", "initial_accumulator_value"):
                _check(f.name, value, 0 <= value < math.inf, "a number >= 0")
            elif f.name == "eps":
                _check(f.name, value, 0 < value < math.inf, "a number > 0")
            elif f.name == "alpha":
                _check(f.name, value, 0 <= value < 1, "in [0, 1)")
            elif f.name == "betas":
                object.__setattr__(self, "betas", tuple(value))
                _check(f.name, value, len(value) == 2 and all(0 <= b < 1 for b in value), "two numbers in [0, 1)")
        self.check()

    def check(self) -> None:
        """Raise ValueError where hyperparameters contradict each other."""

    @property
    def schedule(self) -> Schedule:
        """The learning rate as a schedule."""
        rate = self.learning_rate
        return rate if isinstance(rate, Schedule) else Schedule(rate)

    @property
    def clipping(self) -> tuple[float | None, float | None]:
        """(clip_norm, clip_value)."""
        return getattr(self, "clip_norm", None), getattr(self, "clip_value", None)

    def define(self, real: Any, m: Any) -> Scalars:
        """Return (constants, update), see the module's docstring."""
        raise NotImplementedError(f"{type(self).__name__} has no step-wise update")

    @property
    def fingerprint(self) -> str:
        """A digest of the formulas and hyperparameters, without the base learning rate, which is data."""
        values = [(f.name, getattr(self, f.name)) for f in fields(self) if f.name != "learning_rate"]
        return fingerprint(type(self).define, values, self.schedule.fingerprint)


def _check(name: str, value: Any, ok: bool, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name} is {value!r}; it must be {allowed}")


@dataclass(frozen=True)
class SGD(Optimizer):
    """v <- momentum v + g; p <- p - eta v, or p - eta (g + momentum v) with Nesterov. Source: ``torch.optim.SGD``.

    The velocity does not hold eta (as in PyTorch; Sutskever et al. (2013), eq. 3, puts eta inside).
    """

    learning_rate: float | Schedule = 1e-2
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    clip_norm: float | None = None
    clip_value: float | None = None

    def check(self) -> None:
        _check("nesterov", self.nesterov, not self.nesterov or self.momentum > 0, "False where momentum is 0")

    @property
    def n_states(self) -> int:  # type: ignore[override]
        """One state, the velocity, where there is momentum."""
        return int(self.momentum > 0)

    def define(self, real: Any, m: Any) -> Scalars:
        momentum, decay, nesterov = real(self.momentum), real(self.weight_decay), self.nesterov

        def constants(t: float, lr: float) -> tuple[float, float, float]:
            return lr, 0.0, 0.0

        def update(p: Any, g: Any, v: Any, s1: Any, s2: Any, lr: Any, c1: Any, c2: Any) -> Any:
            g = g + decay * p
            v = momentum * v + g
            step = g + momentum * v if nesterov else v
            return p - lr * step, v, s1, s2

        return constants, update


@dataclass(frozen=True)
class Adam(Optimizer):
    """m <- b1 m + (1 - b1) g; v <- b2 v + (1 - b2) g^2; p <- p - eta mh / (sqrt(vh) + eps), mh = m / (1 - b1^t).

    Source: Kingma and Ba (2015), algorithm 1; amsgrad: Reddi et al. (2018), algorithm 2 as in ``torch.optim.Adam``.
    """

    learning_rate: float | Schedule = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False
    clip_norm: float | None = None
    clip_value: float | None = None
    decoupled: ClassVar[bool] = False

    @property
    def n_states(self) -> int:  # type: ignore[override]
        """m and v, and the running maximum of v with amsgrad."""
        return 3 if self.amsgrad else 2

    def define(self, real: Any, m: Any) -> Scalars:
        beta1, beta2 = map(float, self.betas)
        b1, b2, eps, decay, one = real(beta1), real(beta2), real(self.eps), real(self.weight_decay), real(1)
        a1, a2 = real(1 - beta1), real(1 - beta2)
        amsgrad, decoupled = self.amsgrad, self.decoupled
        sqrt, where = m.sqrt, m.where

        def constants(t: float, lr: float) -> tuple[float, float, float]:
            return lr, lr / (1.0 - beta1**t), (1.0 - beta2**t) ** -0.5

        def update(p: Any, g: Any, mean: Any, square: Any, top: Any, lr: Any, c1: Any, c2: Any) -> Any:
            if decoupled:
                p = p * (one - lr * decay)
            else:
                g = g + decay * p
            mean = b1 * mean + a1 * g
            square = b2 * square + a2 * g * g
            if amsgrad:
                top = where(top > square, top, square)
                return p - c1 * mean / (sqrt(top) * c2 + eps), mean, square, top
            return p - c1 * mean / (sqrt(square) * c2 + eps), mean, square, top

        return constants, update


@dataclass(frozen=True)
class AdamW(Adam):
    """p <- (1 - eta weight_decay) p, then Adam. Source: Loshchilov and Hutter (2019), algorithm 2; ``torch.optim.AdamW``."""

    weight_decay: float = 1e-2
    decoupled: ClassVar[bool] = True


@dataclass(frozen=True)
class RMSprop(Optimizer):
    """v <- alpha v + (1 - alpha) g^2; p <- p - eta g / (sqrt(v) + eps), v - mean^2 if centered.

    eps stands outside the root, as in ``torch.optim.RMSprop`` (TensorFlow has it inside).
    Source: Hinton (2012), lecture 6e; centered: Graves (2013), eq. 38.
    """

    learning_rate: float | Schedule = 1e-2
    alpha: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    centered: bool = False
    clip_norm: float | None = None
    clip_value: float | None = None

    @property
    def n_states(self) -> int:  # type: ignore[override]
        """v; with momentum also the velocity; centered also the mean of g."""
        return 3 if self.centered else 2 if self.momentum > 0 else 1

    def define(self, real: Any, m: Any) -> Scalars:
        alpha, rest, eps, decay = real(self.alpha), real(1 - self.alpha), real(self.eps), real(self.weight_decay)
        momentum, centered, sqrt = real(self.momentum), self.centered, m.sqrt

        def constants(t: float, lr: float) -> tuple[float, float, float]:
            return lr, 0.0, 0.0

        def update(p: Any, g: Any, square: Any, velocity: Any, mean: Any, lr: Any, c1: Any, c2: Any) -> Any:
            g = g + decay * p
            square = alpha * square + rest * g * g
            if centered:
                mean = alpha * mean + rest * g
                velocity = momentum * velocity + g / (sqrt(square - mean * mean) + eps)
            else:
                velocity = momentum * velocity + g / (sqrt(square) + eps)
            return p - lr * velocity, square, velocity, mean

        return constants, update


@dataclass(frozen=True)
class Adagrad(Optimizer):
    """v <- v + g^2; p <- p - eta_t g / (sqrt(v) + eps), eta_t = eta / (1 + (t - 1) lr_decay).

    Source: Duchi et al. (2011), figure 1; ``torch.optim.Adagrad``.
    """

    learning_rate: float | Schedule = 1e-2
    lr_decay: float = 0.0
    weight_decay: float = 0.0
    eps: float = 1e-10
    clip_norm: float | None = None
    clip_value: float | None = None
    n_states: ClassVar[int] = 1

    def define(self, real: Any, m: Any) -> Scalars:
        lr_decay, eps, decay, sqrt = float(self.lr_decay), real(self.eps), real(self.weight_decay), m.sqrt

        def constants(t: float, lr: float) -> tuple[float, float, float]:
            return lr / (1.0 + (t - 1.0) * lr_decay), 0.0, 0.0

        def update(p: Any, g: Any, square: Any, s1: Any, s2: Any, lr: Any, c1: Any, c2: Any) -> Any:
            g = g + decay * p
            square = square + g * g
            return p - lr * g / (sqrt(square) + eps), square, s1, s2

        return constants, update


@dataclass(frozen=True)
class Lion(Optimizer):
    """p <- (1 - eta weight_decay) p - eta sign(b1 m + (1 - b1) g); m <- b2 m + (1 - b2) g.

    Source: Chen et al. (2023), algorithm 2.
    """

    learning_rate: float | Schedule = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    clip_norm: float | None = None
    clip_value: float | None = None
    n_states: ClassVar[int] = 1

    def define(self, real: Any, m: Any) -> Scalars:
        beta1, beta2 = map(float, self.betas)
        b1, b2, a1, a2 = real(beta1), real(beta2), real(1 - beta1), real(1 - beta2)
        zero, one, decay, where = real(0), real(1), real(self.weight_decay), m.where

        def constants(t: float, lr: float) -> tuple[float, float, float]:
            return lr, 0.0, 0.0

        def update(p: Any, g: Any, mean: Any, s1: Any, s2: Any, lr: Any, c1: Any, c2: Any) -> Any:
            u = b1 * mean + a1 * g
            sign = where(u > zero, one, where(u < zero, -one, u))
            return p * (one - lr * decay) - lr * sign, b2 * mean + a2 * g, s1, s2

        return constants, update


@dataclass(frozen=True)
class LBFGS(Optimizer):
    """Limited-memory BFGS on the whole data set, through ``scipy.optimize.minimize``. Source: Byrd et al. (1995).

    It has no mini-batches: one epoch of ``fit`` is one iteration, with its own line search, so there is no learning rate to choose.
    """

    history_size: int = 10
    tolerance: float = 1e-7
    learning_rate: float | Schedule = 1.0

    def check(self) -> None:
        _check("history_size", self.history_size, self.history_size >= 1, "a whole number >= 1")
        _check("learning_rate", self.learning_rate, self.learning_rate == 1.0, "1.0: the line search sets it")
