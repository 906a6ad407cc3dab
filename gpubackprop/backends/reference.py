"""The reference backend: plain NumPy, nothing fused. It is the meaning of every operation, the oracle and the baseline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gpubackprop.backends.base import C1, C2, CURSOR, FACTOR, NORM, RATE, STEPS, Run
from gpubackprop.definitions import NUMPY, Array
from gpubackprop.philox import keep_threshold, random_uint32

if TYPE_CHECKING:
    from gpubackprop.activations import Activation
    from gpubackprop.losses import Loss
    from gpubackprop.optimizers import Optimizer
    from gpubackprop.step import Step

ALIGNMENT = 64  # bytes: a cache line, and the widest vector register


class ReferenceBackend:
    """See :class:`gpubackprop.backends.base.Backend`."""

    device = "reference"
    xp: ModuleType = np

    def asarray(self, a: Any, dtype: npt.DTypeLike | None = None) -> Array:
        return np.ascontiguousarray(a, dtype=dtype)

    def to_numpy(self, a: Array) -> np.ndarray:
        return np.asarray(a)

    def synchronize(self) -> None:
        return None

    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        block = np.zeros(nbytes + ALIGNMENT, np.uint8)
        first = -block.ctypes.data % ALIGNMENT
        return block[first : first + nbytes].view(dtype).reshape(shape)

    def matmul(self, a: Array, b: Array, out: Array | None = None) -> Array:
        return np.matmul(a, b, out=out)

    def bias_activation_forward(self, z: Array, b: Array, activation: Activation, out: Array | None = None) -> Array:
        z += b
        return _store(activation.phi(z), out)

    def bias_activation_backward(
        self,
        dh: Array,
        z: Array | None,
        h: Array | None,
        activation: Activation,
        out: Array | None = None,
        db: Array | None = None,
    ) -> tuple[Array, Array]:
        dphi = activation.dphi(h if z is None else z, h if activation.needs == "h" else z)
        delta = _store(dh * dphi, out)
        return delta, _store(delta.sum(axis=0), db)

    def bias_loss(
        self,
        z: Array,
        b: Array,
        y: Array,
        loss: Loss,
        weight: Array | None = None,
        out: Array | None = None,
        db: Array | None = None,
        value: Array | None = None,
    ) -> tuple[Array, Array, Array]:
        value = np.zeros(2) if value is None else value
        n, d = z.shape
        z += b
        ell, do = loss.per_sample(z, y)
        scale = loss.scale(n, d, weight is not None)
        if weight is not None:
            ell, do = ell * weight, do * weight[:, None]
        value[0] = scale * ell.sum(dtype=np.float64)
        value[1] += value[0] * (n if loss.reduction == "mean" else 1)
        do = _store(do * do.dtype.type(scale), out)
        return value, do, _store(do.sum(axis=0), db)

    def normalize_weights(self, weight: Array, out: Array | None = None) -> Array:
        return _store(weight / weight.sum(), out)

    def dropout(self, x: Array, rate: float, seed: int, layer: int, counters: Array, out: Array | None = None) -> Array:
        random = random_uint32(x.size, seed, int(counters[STEPS]), layer).reshape(x.shape)
        keep = random < keep_threshold(rate)
        return _store(np.where(keep, x * x.dtype.type(1 / (1 - rate)), x.dtype.type(0)), out)

    def gather(self, source: Array, order: Array, counters: Array, out: Array | None = None) -> Array:
        assert out is not None
        first = int(counters[CURSOR])
        return np.take(source, order[first : first + len(out)], axis=0, out=out, mode="clip")

    def clip(self, gradients: Array, max_norm: float, scalars: Array) -> None:
        scalars[NORM] = np.sqrt(np.sum(gradients * gradients))
        scalars[FACTOR] = np.minimum(1.0, max_norm / (scalars[NORM] + 1e-6))

    def advance(self, optimizer: Optimizer, rate: Array, batch: int, counters: Array, scalars: Array) -> None:
        constants, _ = optimizer.define(np.float64, NUMPY)
        factor = optimizer.schedule.define(NUMPY)
        t = float(counters[STEPS])
        scalars[RATE], scalars[C1], scalars[C2] = constants(t + 1.0, rate[0] * factor(t))
        counters += (1, batch)

    def update(self, optimizer: Optimizer, parameters: Array, gradients: Array, states: Array, scalars: Array) -> None:
        _, clip_value = optimizer.clipping
        _, update = optimizer.define(parameters.dtype.type, NUMPY)
        g = gradients * scalars[FACTOR]
        if clip_value is not None:
            g = np.clip(g, -clip_value, clip_value)
        padded = [*states, *[parameters.dtype.type(0)] * (3 - len(states))]
        parameters[:], *new = update(parameters, g, *padded, scalars[RATE], scalars[C1], scalars[C2])
        for state, values in zip(states, new, strict=False):
            state[:] = values

    def bind(self, operation: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Return the function of an operation of a step, and its arguments."""
        method, arguments = getattr(self, operation.name), operation.arguments
        return lambda: method(**arguments), ()

    def compile(self, step: Step) -> Run:
        return loop([self.bind(operation) for operation in step.operations])


def loop(calls: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]]) -> Run:
    """Return a function that makes the calls one after another."""

    def run(times: int = 1) -> None:
        for _ in range(times):
            for function, arguments in calls:
                function(*arguments)

    return run


def _store(result: Array, out: Array | None) -> Array:
    if out is None:
        return result
    out[...] = result
    return out
