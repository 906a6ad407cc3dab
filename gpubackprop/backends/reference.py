"""The reference backend: plain NumPy, nothing fused. It is the meaning of every operation, the oracle and the baseline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gpubackprop.backends import reduce_backend
from gpubackprop.backends.base import (
    C1,
    C2,
    CURSOR,
    FACTOR,
    GOOD,
    GROW,
    GROW_AFTER,
    LARGEST_SCALE,
    LEAST_SCALE,
    NORM,
    RATE,
    SCALE,
    SHRINK,
    SKIP,
    STEPS,
    Run,
)  # fmt: skip
from gpubackprop.backends.checks import check_arrays, checked
from gpubackprop.definitions import DTYPES, NUMPY, Array, aligned_zeros, real_of
from gpubackprop.philox import keep_threshold, random_uint32

if TYPE_CHECKING:
    from gpubackprop.activations import Activation
    from gpubackprop.losses import Loss
    from gpubackprop.optimizers import Optimizer
    from gpubackprop.step import Step

quiet = np.errstate(
    over="ignore", invalid="ignore", divide="ignore"
)  # infinity and NaN are in the numbers, as on every device

DEPTH = 4096  # terms of a product that are added in the arrays' dtype; such sums are added in float64


class ReferenceBackend:
    """See :class:`gpubackprop.backends.base.Backend`."""

    device = "reference"
    xp: ModuleType = np
    dtypes: tuple[str, ...] = DTYPES

    def __deepcopy__(self, memo: Any) -> ReferenceBackend:
        return self  # one for all networks of a process

    def __reduce__(self) -> Any:
        return reduce_backend(self)

    def asarray(self, a: Any, dtype: npt.DTypeLike | None = None) -> Array:
        result = np.ascontiguousarray(a, dtype=dtype)
        # memory of any place and byte order is copied, so that kernels may read it
        return (
            result if result.flags.aligned and result.dtype.isnative else result.astype(result.dtype.newbyteorder("="))
        )

    def to_numpy(self, a: Array) -> np.ndarray:
        return np.asarray(a)

    def synchronize(self) -> None:
        return None

    def memory(self, wanted: int = 0) -> tuple[int, int] | None:
        return None

    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        return aligned_zeros(shape, dtype)

    @checked
    @quiet
    def matmul(self, a: Array, b: Array, out: Array | None = None) -> Array:
        a_wide, b_wide, depth = _wide(a), _wide(b), a.shape[1]
        if depth <= DEPTH:
            return np.matmul(a, b, out=out) if a_wide is a else _store(np.matmul(a_wide, b_wide), out, a.dtype)
        total = np.zeros((len(a), b.shape[1]))
        for k in range(0, depth, DEPTH):
            total += np.matmul(a_wide[:, k : k + DEPTH], b_wide[k : k + DEPTH])
        return _store(total, out, a.dtype)

    @checked
    @quiet
    def bias_activation_forward(self, z: Array, b: Array, activation: Activation, out: Array | None = None) -> Array:
        wide = _wide(z) + _wide(b)
        z[...] = wide
        return _store(activation.phi(wide), out, z.dtype)

    @checked
    @quiet
    def bias_activation_backward(
        self,
        dh: Array,
        z: Array | None,
        h: Array | None,
        activation: Activation,
        out: Array | None = None,
        db: Array | None = None,
    ) -> tuple[Array, Array]:
        at = _wide(h if activation.needs == "h" else z)
        delta = _wide(dh) * activation.dphi(at, at)
        db = _store(delta.sum(axis=0, dtype=np.float64), db, delta.dtype)
        return _store(delta, out, dh.dtype), db

    @checked
    @quiet
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
        scalars: Array | None = None,
        samples: int | None = None,
        total: Array | None = None,
    ) -> tuple[Array, Array, Array]:
        value = np.zeros(2) if value is None else value
        n, d = samples or len(z), z.shape[1]
        o = _wide(z) + _wide(b)
        z[...] = o
        ell, do = loss.per_sample(o, y)
        scale = loss.scale(n, d, weight is not None)
        if weight is not None:
            ell, do = ell * weight, do * weight[:, None]
        value[0] = scale * ell.sum(dtype=np.float64)
        value[1] += value[0] * (total[0] if total is not None else n if loss.reduction == "mean" else 1)
        do = do * do.dtype.type(scale if scalars is None else scale * scalars[SCALE])
        db = _store(do.sum(axis=0, dtype=np.float64), db, do.dtype)
        return value, _store(do, out, z.dtype), db

    @checked
    @quiet
    def normalize_weights(self, weight: Array, out: Array | None = None, total: Array | None = None) -> Array:
        top = np.float64(weight.max()) or 1.0  # relative to the largest, no sum is too large or too small
        share = weight / top
        shares = share.sum()
        if total is not None:
            total[0] = shares * top
        return _store(share / (shares or 1.0), out, weight.dtype)

    @checked
    @quiet
    def dropout(
        self,
        x: Array,
        rate: float,
        seed: int,
        layer: int,
        counters: Array,
        out: Array | None = None,
        first_block: int = 0,
    ) -> Array:
        random = random_uint32(x.size, seed, int(counters[STEPS]), layer, first_block).reshape(x.shape)
        keep = random < keep_threshold(rate)
        scale = real_of(x.dtype).type(1 / (1 - rate))
        return _store(np.where(keep, _wide(x) * scale, scale * 0), out, x.dtype)

    @checked
    def gather(self, source: Array, order: Array, counters: Array, out: Array | None = None) -> Array:
        assert out is not None
        last = len(order) - 1
        places = np.arange(len(out)) + min(max(int(counters[CURSOR]), 0), last)
        return np.take(source, order[np.minimum(places, last)], axis=0, out=out, mode="clip")

    @checked
    @quiet
    def accumulate(self, total: Array | None, term: Array, out: Array) -> Array:
        return _store(term if total is None else total + term, out)

    @checked
    @quiet
    def clip(self, gradients: Array, max_norm: float, scalars: Array, loss_scaling: bool = False) -> None:
        scale = np.float64(scalars[SCALE] if loss_scaling else 1.0)
        top = np.float64(np.maximum(np.max(np.abs(gradients)), 1))  # relative to it, no square is too large
        norm = np.sqrt(np.sum((gradients / top) ** 2)) if np.isfinite(top) else top
        scalars[SKIP] = loss_scaling and not np.isfinite(norm)
        scalars[NORM] = norm * (top / scale)
        factor = max_norm / top * scale / (norm + 1e-6 / top * scale) if np.isfinite(top) else max_norm / top
        scalars[FACTOR] = np.minimum(1.0, factor) / scale

    @checked
    @quiet
    def advance(
        self,
        optimizer: Optimizer,
        rate: Array,
        batch: int,
        counters: Array,
        scalars: Array,
        loss_scaling: bool = False,
    ) -> None:
        if loss_scaling:
            grow = scalars[GOOD] + 1 >= GROW_AFTER
            scale = scalars[SCALE] * (SHRINK if scalars[SKIP] else GROW if grow else 1.0)
            scalars[SCALE] = min(max(scale, LEAST_SCALE), LARGEST_SCALE)
            scalars[GOOD] = 0 if scalars[SKIP] or grow else scalars[GOOD] + 1
            if scalars[SKIP]:
                counters[CURSOR] += batch
                return
        constants, _ = optimizer.define(np.float64, NUMPY)
        factor = optimizer.schedule.define(NUMPY)
        t = float(counters[STEPS])
        scalars[RATE], scalars[C1], scalars[C2] = constants(
            t + 1.0, rate[0] * factor(t, *optimizer.schedule.numbers), *optimizer.numbers
        )
        counters += (1, batch)

    @checked
    @quiet
    def update(
        self,
        optimizer: Optimizer,
        parameters: Array,
        gradients: Array,
        states: Array,
        scalars: Array,
        weights: Array | None = None,
    ) -> None:
        if weights is not None and scalars[SKIP]:
            return
        _, clip_value = optimizer.clipping
        _, update = optimizer.define(parameters.dtype.type, NUMPY)
        g = gradients * scalars[FACTOR]
        if clip_value is not None:
            g = np.clip(g, -clip_value, clip_value)
        padded = [*states, *[parameters.dtype.type(0)] * (3 - len(states))]
        numbers = scalars[RATE], scalars[C1], scalars[C2], *map(parameters.dtype.type, optimizer.numbers)
        parameters[:], *new = update(parameters, g, *padded, *numbers)
        for state, values in zip(states, new, strict=False):
            state[:] = values
        if weights is not None:
            weights[:] = parameters

    def bind(self, operation: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Return the function of an operation of a step, and its arguments."""
        check_arrays(self, operation.name, operation.arguments, bound=True)
        method, arguments = getattr(type(self), operation.name), operation.arguments
        method = getattr(method, "unchecked", method)  # a subclass may have one of its own
        return lambda: method(self, **arguments), ()

    def compile(self, step: Step) -> Run:
        return loop([self.bind(operation) for operation in step.operations])


def loop(calls: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]]) -> Run:
    """Return a function that makes the calls one after another."""

    def run(times: int = 1) -> None:
        for _ in range(times):
            for function, arguments in calls:
                function(*arguments)

    return run


def _wide(a: Array) -> Array:
    """Return an array in the dtype that arithmetic is done in."""
    return a.astype(real_of(a.dtype), copy=False)


def _store(result: Array, out: Array | None, dtype: npt.DTypeLike | None = None) -> Array:
    if out is None:
        return result if dtype is None else result.astype(dtype, copy=False)
    out[...] = result
    return out
