"""Initial weights: drawn on the host in float64, so that a seed gives the same network on every device.

Each initializer is a function of (rng, fan_in, fan_out, gain) that returns W, shape (fan_in, fan_out). Biases start at 0.
``gain`` is that of the next activation (:attr:`gpubackprop.activations.Activation.gain`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import overload

import numpy as np

from gpubackprop.registry import Registry

Initializer = Callable[[np.random.Generator, int, int, float], np.ndarray]

INITIALIZERS: Registry[Initializer] = Registry("initializer")


@overload
def initializer(function: Initializer) -> Initializer: ...


@overload
def initializer(*, aliases: Sequence[str]) -> Callable[[Initializer], Initializer]: ...


def initializer(
    function: Initializer | None = None, *, aliases: Sequence[str] = ()
) -> Initializer | Callable[[Initializer], Initializer]:
    """Register an initializer under the name of its function, and under other names; usable bare or with arguments."""

    def register(function: Initializer) -> Initializer:
        INITIALIZERS.add(function.__name__, function, *aliases)
        return function

    return register if function is None else register(function)


def _uniform(rng: np.random.Generator, fan_in: int, fan_out: int, std: float) -> np.ndarray:
    return rng.uniform(-np.sqrt(3) * std, np.sqrt(3) * std, (fan_in, fan_out))


def _normal(rng: np.random.Generator, fan_in: int, fan_out: int, std: float) -> np.ndarray:
    return rng.normal(0.0, std, (fan_in, fan_out))


@initializer(aliases=("kaiming_normal",))
def he_normal(rng: np.random.Generator, fan_in: int, fan_out: int, gain: float) -> np.ndarray:
    """N(0, gain^2 / fan_in). Source: He et al. (2015), eq. 10; ``torch.nn.init.kaiming_normal_``."""
    return _normal(rng, fan_in, fan_out, gain / fan_in**0.5)


@initializer(aliases=("kaiming_uniform",))
def he_uniform(rng: np.random.Generator, fan_in: int, fan_out: int, gain: float) -> np.ndarray:
    """U(-a, a), a = gain sqrt(3 / fan_in). Source: He et al. (2015); ``torch.nn.init.kaiming_uniform_``."""
    return _uniform(rng, fan_in, fan_out, gain / fan_in**0.5)


@initializer(aliases=("xavier_normal",))
def glorot_normal(rng: np.random.Generator, fan_in: int, fan_out: int, gain: float) -> np.ndarray:
    """N(0, 2 gain^2 / (fan_in + fan_out)). Source: Glorot and Bengio (2010), eq. 12; ``xavier_normal_``."""
    return _normal(rng, fan_in, fan_out, gain * (2.0 / (fan_in + fan_out)) ** 0.5)


@initializer(aliases=("xavier_uniform",))
def glorot_uniform(rng: np.random.Generator, fan_in: int, fan_out: int, gain: float) -> np.ndarray:
    """U(-a, a), a = gain sqrt(6 / (fan_in + fan_out)). Source: Glorot and Bengio (2010), eq. 16; ``xavier_uniform_``."""
    return _uniform(rng, fan_in, fan_out, gain * (2.0 / (fan_in + fan_out)) ** 0.5)


@initializer
def lecun_normal(rng: np.random.Generator, fan_in: int, fan_out: int, gain: float) -> np.ndarray:
    """N(0, 1 / fan_in), for any gain: for selu. Source: LeCun et al. (1998), eq. 16."""
    return _normal(rng, fan_in, fan_out, 1.0 / fan_in**0.5)


@initializer
def lecun_uniform(rng: np.random.Generator, fan_in: int, fan_out: int, gain: float) -> np.ndarray:
    """U(-a, a), a = sqrt(3 / fan_in), for any gain. Source: LeCun et al. (1998), eq. 16."""
    return _uniform(rng, fan_in, fan_out, 1.0 / fan_in**0.5)


@initializer
def orthogonal(rng: np.random.Generator, fan_in: int, fan_out: int, gain: float) -> np.ndarray:
    """gain times a (semi-)orthogonal matrix: QR of a normal matrix, signs fixed. Source: Saxe et al. (2014)."""
    a = rng.normal(size=(max(fan_in, fan_out), min(fan_in, fan_out)))
    q, r = np.linalg.qr(a)
    q *= np.sign(np.diag(r))
    return gain * (q if fan_in >= fan_out else q.T)
