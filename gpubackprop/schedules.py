"""Learning-rate schedules: eta as a function of the number of steps taken, defined once, on scalars.

Every optimizer takes a number or one of these as its ``learning_rate``. A schedule is evaluated inside the step, on
the device, in float64, with t = 0 for the first step. Units: steps, not epochs; ``fit`` takes
ceil(samples / batch size) steps in an epoch. ``ReduceOnPlateau`` reads the validation loss, so it is a callback
(:mod:`gpubackprop.training.callbacks`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from gpubackprop.definitions import NUMPY, Math, check_count, check_number, plain
from gpubackprop.registry import Registry

SCHEDULES: Registry[type[Schedule]] = Registry("schedule")


@dataclass(frozen=True)
class Schedule:
    """eta(t) = learning_rate: the constant schedule, and the base class of the others.

    Parameters
    ----------
    learning_rate : float
        The base rate eta_0; the factor of the schedule multiplies it.
    """

    learning_rate: float
    numbers: ClassVar[tuple[float, ...]] = ()

    def __init_subclass__(cls, name: str | None = None, aliases: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "define" in vars(cls) and "numbers" not in vars(cls):
            cls.numbers = ()  # the base class's numbers are for its own formula
        own = "".join("_" + c.lower() if c.isupper() else c for c in cls.__name__)[1:]
        SCHEDULES.add(name or own, cls, *aliases)

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, plain(getattr(self, f.name)))
        check_number("learning_rate", self.learning_rate, lambda x: 0 < x < math.inf, "a number > 0")
        object.__setattr__(self, "learning_rate", float(self.learning_rate))
        self.check()

    def check(self) -> None:
        """Raise ValueError where a parameter is out of range."""

    def define(self, m: Math) -> Callable[..., Any]:
        """Return ``factor(t, *numbers)``, a scalar function in float64: eta(t) is the learning rate times it.

        Kernels read ``numbers`` from memory, so other values need no other kernel; values that a schedule closes over are
        compiled.
        """

        def factor(t: float) -> Any:
            return 1.0

        return factor

    def at(self, t: float) -> float:
        """Return eta(t)."""
        return self.learning_rate * float(self.define(NUMPY)(float(t), *self.numbers))


SCHEDULES["constant"] = Schedule


def _check_steps(name: str, count: int) -> None:
    check_count(name, count, " of steps")


def _check_positive(name: str, value: float) -> None:
    check_number(name, value, lambda x: 0 < x < math.inf, "a number > 0")


@dataclass(frozen=True)
class StepDecay(Schedule, name="step", aliases=("step_decay",)):
    """eta(t) = eta_0 gamma^floor(t / step_size); ``torch.optim.lr_scheduler.StepLR`` counted in steps."""

    step_size: int = 1000
    gamma: float = 0.1

    def check(self) -> None:
        _check_steps("step_size", self.step_size)
        _check_positive("gamma", self.gamma)

    @property
    def numbers(self) -> tuple[float, ...]:  # type: ignore[override]
        """gamma, step size."""
        return float(self.gamma), float(self.step_size)

    def define(self, m: Math) -> Callable[..., Any]:
        power = m.power

        def factor(t: float, gamma: float, step_size: float) -> Any:
            return power(gamma, t // step_size)

        return factor


@dataclass(frozen=True)
class Exponential(Schedule):
    """eta(t) = eta_0 gamma^t; ``torch.optim.lr_scheduler.ExponentialLR`` counted in steps."""

    gamma: float = 0.999

    def check(self) -> None:
        _check_positive("gamma", self.gamma)

    @property
    def numbers(self) -> tuple[float, ...]:  # type: ignore[override]
        """gamma."""
        return (float(self.gamma),)

    def define(self, m: Math) -> Callable[..., Any]:
        power = m.power

        def factor(t: float, gamma: float) -> Any:
            return power(gamma, t)

        return factor


@dataclass(frozen=True)
class Cosine(Schedule, aliases=("cosine_annealing",)):
    """eta(t) = eta_0 (f + (1 - f) (1 + cos(pi min(t, T) / T)) / 2), f = final. Source: Loshchilov and Hutter (2017), eq. 5."""

    steps: int = 1000
    final: float = 0.0

    def check(self) -> None:
        _check_steps("steps", self.steps)
        check_number("final", self.final, lambda x: 0 <= x <= 1, "a fraction of the rate, in [0, 1]")

    @property
    def numbers(self) -> tuple[float, ...]:  # type: ignore[override]
        """Steps, final."""
        return float(self.steps), float(self.final)

    def define(self, m: Math) -> Callable[..., Any]:
        cos, pi = m.cos, math.pi

        def factor(t: float, steps: float, final: float) -> Any:
            return final + (1.0 - final) * 0.5 * (1.0 + cos(pi * min(t, steps) / steps))

        return factor


@dataclass(frozen=True)
class LinearWarmup(Schedule, aliases=("warmup", "linearwarmup")):
    """eta(t) = eta_0 min((t + 1) / steps, 1): the first step already moves. Source: Goyal et al. (2017), section 2.2."""

    steps: int = 100

    def check(self) -> None:
        _check_steps("steps", self.steps)

    @property
    def numbers(self) -> tuple[float, ...]:  # type: ignore[override]
        """Steps."""
        return (float(self.steps),)

    def define(self, m: Math) -> Callable[..., Any]:
        def factor(t: float, steps: float) -> Any:
            return min((t + 1.0) / steps, 1.0)

        return factor


@dataclass(frozen=True)
class OneCycle(Schedule, aliases=("onecycle",)):
    """Cosine from eta_0 / div up to eta_0 over the first ``warmup`` of the steps, then down to eta_0 / (div final_div).

    Defaults are those of ``torch.optim.lr_scheduler.OneCycleLR``; ``learning_rate`` is its ``max_lr``.
    Source: Smith and Topin (2018).
    """

    steps: int = 1000
    warmup: float = 0.3
    div: float = 25.0
    final_div: float = 1e4

    def check(self) -> None:
        _check_steps("steps", self.steps)
        check_number("warmup", self.warmup, lambda x: 0 < x < 1, "a fraction in (0, 1)")
        check_number("div", self.div, lambda x: 1 <= x < math.inf, "a number >= 1: the rate goes up from eta_0 / div")
        _check_positive("final_div", self.final_div)
        check_number(
            "div * final_div",
            self.div * self.final_div,
            lambda x: 1 <= x < math.inf,
            "a number >= 1: the rate goes down",
        )

    @property
    def numbers(self) -> tuple[float, ...]:  # type: ignore[override]
        """The steps of the peak and of the end, the factors of the rate at the beginning and at the end."""
        peak = max(self.warmup * self.steps - 1.0, 1.0)
        last = max(self.steps - 1.0, peak + 1.0)
        return peak, last, 1.0 / self.div, 1.0 / (self.div * self.final_div)

    def define(self, m: Math) -> Callable[..., Any]:
        cos, pi = m.cos, math.pi

        def factor(t: float, peak: float, last: float, low: float, final: float) -> Any:
            if t <= peak:
                return low + (1.0 - low) * 0.5 * (1.0 - cos(pi * t / peak))
            return final + (1.0 - final) * 0.5 * (1.0 + cos(pi * (min(t, last) - peak) / (last - peak)))

        return factor
