"""Optimizers: the update of one parameter, defined once, on scalars.

An optimizer is its hyperparameters (an immutable dataclass); what changes during training is in arrays next to the
parameters. ``define(real, m)`` returns two scalar functions:

``constants(t, lr)``
    float64, once per step: the step's learning rate and two more numbers, t = 1 for the first step.
``update(p, g, s0, s1, s2, lr, c1, c2)``
    per parameter: the new p, s0, s1, s2, where s0 ... are the first ``n_states`` state arrays (zero at first).

Both take the optimizer's ``numbers``, a tuple, as further arguments, ``update`` in the dtype of the arithmetic. Kernels read
them from memory, so other hyperparameters need no other kernel. An optimizer may have none and close over its numbers; each
value is then compiled. Options that add or remove terms (momentum, nesterov, ...) are always compiled.

Names and defaults are PyTorch's where PyTorch has the optimizer. ``weight_decay`` is coupled (added to the gradient)
in SGD, Adam, RMSprop and Adagrad, and decoupled (p shrinks by lr * weight_decay) in AdamW and Lion. It acts on all
parameters, biases included, as in PyTorch. ``clip_norm`` scales the whole gradient to at most that Euclidean norm
(``torch.nn.utils.clip_grad_norm_``), ``clip_value`` then limits each element.

A running average v <- b v + (1 - b) x is computed as v + (1 - b) (x - v), or x + b (v - x) for b < 1/2, and so has gain 1 in any
dtype: rounded, b and 1 - b do not add up to 1. A gradient whose square would overflow counts as the largest whose square does
not, so that differences are finite too; infinity and NaN make the parameters NaN. Products that are added to something are written
``m.fma``: the CPU's compiler contracts nothing by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any, ClassVar

import numpy as np

from gpubackprop.code_digest import Digest, fingerprint
from gpubackprop.definitions import NUMPY, Math, check_count, check_flag, check_number, constant, plain, shown
from gpubackprop.registry import Registry
from gpubackprop.schedules import Schedule

OPTIMIZERS: Registry[type[Optimizer]] = Registry("optimizer")

Scalars = tuple[Callable[..., tuple[float, float, float]], Callable[..., tuple[Any, Any, Any, Any]]]


@dataclass(frozen=True)
class Optimizer:
    """Base class of all optimizers.

    Parameters
    ----------
    learning_rate : float or Schedule
        eta, or eta as a function of the step.
    """

    learning_rate: float | Schedule = 0.01
    n_states: ClassVar[int] = 0
    numbers: ClassVar[tuple[float, ...]] = ()
    origin: ClassVar[None] = None  # all of a class: see definitions.per_definition

    def __init_subclass__(cls, *, registered: bool = True, aliases: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "define" in vars(cls) and "numbers" not in vars(cls):
            cls.numbers = ()  # the base class's are for the base class's formulas
        if registered:  # known by its name, on the command line too
            OPTIMIZERS.add(cls.__name__.lower(), cls, *aliases)

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, plain(getattr(self, f.name)))
        if not isinstance(self.learning_rate, Schedule):
            object.__setattr__(
                self, "learning_rate", Schedule(self.learning_rate).learning_rate
            )  # raises for a bad rate
        for name, limit in zip(("clip_norm", "clip_value"), self.clipping, strict=True):
            if limit is not None:
                check_number(name, limit, lambda x: 0 < x < math.inf, "None or a number > 0")
        self.check()

    def check(self) -> None:
        """Raise ValueError for hyperparameters that are out of range or contradict each other; each class checks its own."""

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

    def made_of(self, dtype: np.dtype[Any], m: Math) -> tuple[Any, ...]:
        """Return everything that kernels for a dtype read of this optimizer; the base learning rate and ``numbers`` are data."""
        schedule = self.schedule
        constants, _ = self.define(np.float64, m)
        _, update = self.define(dtype.type, m)
        names = type(self).__name__, type(schedule).__name__
        counts = self.n_states, len(self.numbers), len(schedule.numbers)
        return names, counts, self.clipping[1] is not None, constants, update, schedule.define(m)

    @property
    def fingerprint(self) -> Digest:
        """A digest of the formulas, without the base learning rate and ``numbers``, which are data."""
        return fingerprint(self.made_of(np.dtype(np.float64), NUMPY))


def _at_least_zero(**values: float) -> None:
    for name, value in values.items():
        check_number(name, value, lambda x: 0 <= x < math.inf, "a number >= 0")


def _largest_to_square(real: Any) -> Any:
    """Return the largest power of two whose square, and that of its double, is finite."""
    return real(2.0 ** (np.finfo(real).maxexp // 2 - 2))


def _part_of_average(beta: float) -> float:
    """Return the smaller coefficient of a running average, which is exact where 1 - beta is not."""
    return float(1 - beta if beta >= 0.5 else beta)


def _check_eps(eps: float) -> None:
    check_number("eps", eps, lambda x: 0 < x < math.inf, "a number > 0")


def _check_betas(optimizer: Adam | Lion) -> None:
    """Check the two betas, and store them as a tuple."""
    try:
        betas = tuple(plain(b) for b in islice(optimizer.betas, 3))
    except Exception:  # iterating over it may raise anything
        betas = ()
    if len(betas) != 2 or not all(type(b) in (int, float) and 0 <= b < 1 for b in betas):
        raise ValueError(f"betas is {shown(optimizer.betas)}; it must be two numbers in [0, 1)")
    object.__setattr__(optimizer, "betas", betas)


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
        _at_least_zero(momentum=self.momentum, weight_decay=self.weight_decay)
        if check_flag("nesterov", self.nesterov) and not self.momentum:
            raise ValueError("nesterov is True; it must be False where momentum is 0")

    @property
    def n_states(self) -> int:  # type: ignore[override]
        """One state, the velocity, where there is momentum."""
        return int(self.momentum > 0)

    @property
    def numbers(self) -> tuple[float, ...]:  # type: ignore[override]
        """Momentum, weight decay."""
        return float(self.momentum), float(self.weight_decay)

    def define(self, real: Any, m: Any) -> Scalars:
        moving, nesterov, fma = self.momentum > 0, self.nesterov, m.fma

        def constants(t: float, lr: float, momentum: float, decay: float) -> tuple[float, float, float]:
            return lr, 0.0, 0.0

        def update(
            p: Any, g: Any, v: Any, s1: Any, s2: Any, lr: Any, c1: Any, c2: Any, momentum: Any, decay: Any
        ) -> Any:
            g = fma(decay, p, g)
            v = fma(momentum, v, g) if moving else g
            step = fma(momentum, v, g) if nesterov else v
            return fma(-lr, step, p), v, s1, s2

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

    def check(self) -> None:
        _check_betas(self)
        _check_eps(self.eps)
        _at_least_zero(weight_decay=self.weight_decay)
        check_flag("amsgrad", self.amsgrad)

    @property
    def n_states(self) -> int:  # type: ignore[override]
        """m and v, and the running maximum of v with amsgrad."""
        return 3 if self.amsgrad else 2

    @property
    def numbers(self) -> tuple[float, ...]:  # type: ignore[override]
        """Both betas, their coefficients in an average, eps, weight decay."""
        return *map(float, self.betas), *map(_part_of_average, self.betas), float(self.eps), float(self.weight_decay)

    def define(self, real: Any, m: Any) -> Scalars:
        constant(real, "eps", self.eps)  # raises where there is no such number
        slow1, slow2 = (beta >= 0.5 for beta in self.betas)
        one, zero = real(1), real(0)
        limit, amsgrad, decoupled = _largest_to_square(real), self.amsgrad, self.decoupled
        sqrt, where, power, fma = m.sqrt, m.where, m.power, m.fma

        def constants(
            t: float, lr: float, beta1: float, beta2: float, rest1: float, rest2: float, eps: float, decay: float
        ) -> tuple[float, float, float]:
            return lr, lr / (1.0 - power(beta1, t)), 1.0 / sqrt(1.0 - power(beta2, t))

        def update(
            p: Any,
            g: Any,
            mean: Any,
            square: Any,
            top: Any,
            lr: Any,
            c1: Any,
            c2: Any,
            beta1: Any,
            beta2: Any,
            rest1: Any,
            rest2: Any,
            eps: Any,
            decay: Any,
        ) -> Any:
            if decoupled:
                p = p * (one - lr * decay)
            else:
                g = fma(decay, p, g)
            limited = where(g > limit, limit, g)
            g = fma(zero, g, where(limited < -limit, -limit, limited))
            mean = fma(rest1, g - mean, mean) if slow1 else fma(rest1, mean - g, g)
            square = fma(rest2, fma(g, g, -square), square) if slow2 else fma(rest2, fma(-g, g, square), g * g)
            if amsgrad:
                top = where(top > square, top, square)
                return fma(-c1, mean / fma(sqrt(top), c2, eps), p), mean, square, top
            return fma(-c1, mean / fma(sqrt(square), c2, eps), p), mean, square, top

        return constants, update


@dataclass(frozen=True)
class AdamW(Adam, aliases=("adam_w",)):
    """p <- (1 - eta weight_decay) p, then Adam. Source: Loshchilov and Hutter (2019), algorithm 2; ``torch.optim.AdamW``."""

    weight_decay: float = 1e-2
    decoupled: ClassVar[bool] = True


@dataclass(frozen=True)
class RMSprop(Optimizer, aliases=("rms_prop",)):
    """v <- alpha v + (1 - alpha) g^2; p <- p - eta g / (sqrt(v) + eps); centered, v is the variance of g.

    eps stands outside the root, as in ``torch.optim.RMSprop`` (TensorFlow has it inside). PyTorch's mean of g^2 less the square
    of the mean of g is a variance that rounding may make negative; here v <- alpha (v + (1 - alpha) (g - mean)^2),
    mathematically equal, cannot be.
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

    def check(self) -> None:
        check_number("alpha", self.alpha, lambda x: 0 <= x < 1, "in [0, 1)")
        _check_eps(self.eps)
        _at_least_zero(weight_decay=self.weight_decay, momentum=self.momentum)
        check_flag("centered", self.centered)

    @property
    def n_states(self) -> int:  # type: ignore[override]
        """v; with momentum also the velocity; centered also the mean of g."""
        return 3 if self.centered else 2 if self.momentum > 0 else 1

    @property
    def numbers(self) -> tuple[float, ...]:  # type: ignore[override]
        """alpha, 1 - alpha, eps, weight decay, momentum."""
        return self.alpha, 1.0 - self.alpha, self.eps, self.weight_decay, self.momentum

    def define(self, real: Any, m: Any) -> Scalars:
        constant(real, "eps", self.eps)  # raises where there is no such number
        slow, moving, centered = self.alpha >= 0.5, self.momentum > 0, self.centered
        limit, zero = _largest_to_square(real), real(0)
        sqrt, where, fma = m.sqrt, m.where, m.fma

        def constants(
            t: float, lr: float, alpha: float, rest: float, eps: float, decay: float, momentum: float
        ) -> tuple[float, float, float]:
            return lr, 0.0, 0.0

        def update(
            p: Any,
            g: Any,
            square: Any,
            velocity: Any,
            mean: Any,
            lr: Any,
            c1: Any,
            c2: Any,
            alpha: Any,
            rest: Any,
            eps: Any,
            decay: Any,
            momentum: Any,
        ) -> Any:
            g = fma(decay, p, g)
            limited = where(g > limit, limit, g)
            g = fma(zero, g, where(limited < -limit, -limit, limited))
            if centered:
                d = g - mean
                square = alpha * fma(rest, d * d, square)
                mean = fma(rest, d, mean) if slow else fma(-alpha, d, g)
            elif slow:
                square = fma(rest, fma(g, g, -square), square)
            else:
                square = fma(alpha, fma(-g, g, square), g * g)
            step = g / (sqrt(square) + eps)
            velocity = fma(momentum, velocity, step) if moving else step
            return fma(-lr, velocity, p), square, velocity, mean

        return constants, update


@dataclass(frozen=True)
class Adagrad(Optimizer, aliases=("ada_grad",)):
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

    def check(self) -> None:
        _check_eps(self.eps)
        _at_least_zero(lr_decay=self.lr_decay, weight_decay=self.weight_decay)

    @property
    def numbers(self) -> tuple[float, ...]:  # type: ignore[override]
        """Decay of the rate, eps, weight decay."""
        return self.lr_decay, self.eps, self.weight_decay

    def define(self, real: Any, m: Any) -> Scalars:
        constant(real, "eps", self.eps)  # raises where there is no such number
        limit, largest, zero = _largest_to_square(real), real(np.finfo(real).max), real(0)
        sqrt, where, fma = m.sqrt, m.where, m.fma

        def constants(t: float, lr: float, lr_decay: float, eps: float, decay: float) -> tuple[float, float, float]:
            return lr / (1.0 + (t - 1.0) * lr_decay), 0.0, 0.0

        def update(
            p: Any,
            g: Any,
            square: Any,
            s1: Any,
            s2: Any,
            lr: Any,
            c1: Any,
            c2: Any,
            lr_decay: Any,
            eps: Any,
            decay: Any,
        ) -> Any:
            g = fma(decay, p, g)
            limited = where(g > limit, limit, g)
            g = fma(zero, g, where(limited < -limit, -limit, limited))
            square = fma(g, g, square)
            square = where(square > largest, largest, square)
            return fma(-lr, g / (sqrt(square) + eps), p), square, s1, s2

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

    def check(self) -> None:
        _check_betas(self)
        _at_least_zero(weight_decay=self.weight_decay)

    @property
    def numbers(self) -> tuple[float, ...]:  # type: ignore[override]
        """The coefficients of both betas in an average, weight decay."""
        return *map(_part_of_average, self.betas), float(self.weight_decay)

    def define(self, real: Any, m: Any) -> Scalars:
        slow1, slow2 = (beta >= 0.5 for beta in self.betas)
        zero, one = real(0), real(1)
        limit, where, fma = _largest_to_square(real), m.where, m.fma

        def constants(t: float, lr: float, rest1: float, rest2: float, decay: float) -> tuple[float, float, float]:
            return lr, 0.0, 0.0

        def update(
            p: Any, g: Any, mean: Any, s1: Any, s2: Any, lr: Any, c1: Any, c2: Any, rest1: Any, rest2: Any, decay: Any
        ) -> Any:
            limited = where(g > limit, limit, g)
            g = fma(zero, g, where(limited < -limit, -limit, limited))
            u = fma(rest1, g - mean, mean) if slow1 else fma(rest1, mean - g, g)
            sign = where(u > zero, one, where(u < zero, -one, u))
            mean = fma(rest2, g - mean, mean) if slow2 else fma(rest2, mean - g, g)
            return fma(-lr, sign, p * (one - lr * decay)), mean, s1, s2

        return constants, update


@dataclass(frozen=True)
class LBFGS(Optimizer, aliases=("l_bfgs",)):
    """Limited-memory BFGS on the whole data set, through ``scipy.optimize.minimize``. Source: Byrd et al. (1995).

    It has no mini-batches: one epoch of ``fit`` is one iteration, with its own line search, so there is no learning rate to choose.
    """

    history_size: int = 10
    tolerance: float = 1e-7
    learning_rate: float | Schedule = 1.0

    def check(self) -> None:
        check_count("history_size", self.history_size)
        check_number("history_size", self.history_size, lambda x: x <= 10_000, "at most 10,000: each takes two vectors")
        _at_least_zero(tolerance=self.tolerance)
        if self.learning_rate != 1.0:
            raise ValueError(f"learning_rate is {self.learning_rate!r}; it must be 1.0: the line search sets it")
