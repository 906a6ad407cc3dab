"""The fused kernels: their arrays, their operation as a step records it, and the same in plain NumPy or CuPy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

import gpubackprop as gb
from gpubackprop.activations import ACTIVATIONS
from gpubackprop.backends.reference import ReferenceBackend
from gpubackprop.bench import unfused
from gpubackprop.definitions import NUMPY, check_dtype, eps_of, real_of
from gpubackprop.losses import LOSSES
from gpubackprop.step.operations import (
    BiasActivationBackward,
    BiasActivationForward,
    BiasLoss,
    Clip,
    Dropout,
    Gather,
    Operation,
    Update,
)
from gpubackprop.step.state import C1, C2, FACTOR, RATE

Arrays = dict[str, Any]

ACTIVATION_NAMES = ("relu", "tanh", "gelu", "gelu_tanh")
LOSS_NAMES = ("softmax_cross_entropy", "mean_squared_error", "sigmoid_cross_entropy")
RATE_OF_DROPOUT, SEED, MAX_NORM = 0.25, 7, 1.0


@dataclass
class Kernel:
    """One kernel at one shape.

    Parameters
    ----------
    name : str
    shape : tuple of int
    make : callable
        Returns new arrays, by name; two names may have the same array.
    record : callable
        ``record(a)`` returns the operation on the arrays ``a``.
    unfused : callable
        Does the same to the arrays with the array module's own operations.
    outputs : tuple of str
        The arrays that are compared.
    sums : tuple of str
        Those of them that are sums over many elements.
    expected : callable, optional
        Does the same to the arrays, for the comparison, where ``unfused`` does not give the same numbers.
    """

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Arrays]
    record: Callable[[Arrays], Operation]
    unfused: Callable[[Arrays], None]
    outputs: tuple[str, ...]
    sums: tuple[str, ...] = ()
    expected: Callable[[Arrays], None] | None = None

    def operation(self, a: Arrays) -> Operation:
        """Return the operation on the arrays, with its count of bytes."""
        return self.record(a)


def kernels_of(backend: Any, dtype_name: str, shape: tuple[int, int], *, few: bool = False) -> Iterator[Kernel]:
    """Yield all kernels for a dtype, or some; where they take flat arrays, these have the elements of the shape."""
    dtype, size = check_dtype(dtype_name), shape[0] * shape[1]
    for name in ACTIVATION_NAMES[:2] if few else ACTIVATION_NAMES:
        yield _forward(backend, name, shape, dtype)
        yield _backward(backend, name, shape, dtype)
    for name in LOSS_NAMES[:1] if few else LOSS_NAMES:
        yield _loss(backend, name, shape, dtype)
    optimizers = gb.Adam(1e-3), gb.SGD(1e-3, momentum=0.9), gb.AdamW(1e-3)
    for optimizer in optimizers[:1] if few else optimizers:
        yield _update(backend, optimizer, size, dtype)
    yield _clip(backend, size, dtype)
    yield _dropout(backend, shape, dtype)
    yield _gather(backend, shape, dtype)


def _normal(backend: Any, shape: tuple[int, ...], dtype: np.dtype[Any], scale: float = 1.0) -> Any:
    drawn = np.random.default_rng(len(shape)).standard_normal(shape, np.float32) * np.float32(scale)
    return backend.asarray(drawn.astype(dtype))


def _forward(backend: Any, name: str, shape: tuple[int, int], dtype: np.dtype[Any]) -> Kernel:
    activation = ACTIVATIONS[name]

    def make() -> Arrays:
        z = _normal(backend, shape, dtype)
        out = z if activation.needs == "h" else backend.zeros(shape, dtype)  # as a step has it
        return {"z": z, "b": _normal(backend, shape[1:], dtype), "out": out}

    def record(a: Arrays) -> Operation:
        return BiasActivationForward(a["z"], a["b"], activation, a["out"])

    return Kernel(
        f"bias_activation_forward {name}", shape, make, record, partial(unfused.forward(name), backend.xp), ("z", "out")
    )


def _backward(backend: Any, name: str, shape: tuple[int, int], dtype: np.dtype[Any]) -> Kernel:
    activation = ACTIVATIONS[name]

    def make() -> Arrays:
        z, dh = _normal(backend, shape, dtype), _normal(backend, shape, dtype)[::-1].copy()
        h = backend.xp.tanh(z) if name == "tanh" else z  # what plain operations have kept; only relu and tanh read it
        # out is not dh, as it is in a step: dh would be multiplied by the derivative in every run, and vanish
        out, db = backend.zeros(shape, dtype), backend.zeros(shape[1:], real_of(dtype))
        return {"dh": dh, "z": z, "h": h, "out": out, "db": db}

    def record(a: Arrays) -> Operation:
        return BiasActivationBackward(a["dh"], a["z"], a["h"], activation, a["out"], a["db"])

    label = f"bias_activation_backward {name}"
    return Kernel(label, shape, make, record, partial(unfused.backward(name), backend.xp), ("out", "db"), ("db",))


def _loss(backend: Any, name: str, shape: tuple[int, int], dtype: np.dtype[Any]) -> Kernel:
    n, d = shape

    def make() -> Arrays:
        rng, real = np.random.default_rng(2), real_of(dtype)
        y = rng.integers(0, d, n) if name == "softmax_cross_entropy" else rng.random(shape).astype(real)
        z = _normal(backend, shape, dtype)
        db, value = backend.zeros((d,), real), backend.zeros((2,), np.dtype(np.float64))
        return {"z": z, "b": _normal(backend, (d,), dtype), "y": backend.asarray(y), "out": z, "db": db, "value": value}

    def record(a: Arrays) -> Operation:
        return BiasLoss(a["z"], a["b"], a["y"], LOSSES[name], None, a["out"], a["db"], a["value"])

    outputs = ("out", "db", "value")
    return Kernel(
        f"bias_loss {name}", shape, make, record, partial(unfused.bias_loss(name), backend.xp), outputs, ("db", "value")
    )


def _update(backend: Any, optimizer: Any, n: int, dtype: np.dtype[Any]) -> Kernel:
    real = real_of(dtype)
    if optimizer.n_states == 1:
        plain, label = partial(unfused.sgd_momentum(optimizer.momentum), backend.xp), "update SGD momentum"
    else:
        decay = optimizer.weight_decay if optimizer.decoupled else 0.0
        plain, label = (
            partial(unfused.adam(optimizer.betas, optimizer.eps, decay), backend.xp),
            f"update {type(optimizer).__name__}",
        )

    def make() -> Arrays:
        constants, _ = optimizer.define(np.float64, NUMPY)
        scalars = np.zeros(8, real)
        scalars[[RATE, C1, C2]] = constants(1.0, 1e-3, *optimizer.numbers)
        scalars[FACTOR] = 1
        a = {
            "parameters": _normal(backend, (n,), real), "gradients": _normal(backend, (n,), real, 0.1),
            "states": backend.zeros((optimizer.n_states, n), real), "scalars": backend.asarray(scalars),
        }  # fmt: skip
        return a if real == dtype else {**a, "weights": backend.zeros((n,), dtype)}

    def record(a: Arrays) -> Operation:
        return Update(optimizer, a["parameters"], a["gradients"], a["states"], a["scalars"], a.get("weights"))

    return Kernel(label, (n,), make, record, plain, ("parameters", "states"))


def _clip(backend: Any, n: int, dtype: np.dtype[Any]) -> Kernel:
    real = real_of(dtype)

    def make() -> Arrays:
        return {"gradients": _normal(backend, (n,), real), "scalars": backend.zeros((8,), real)}

    def record(a: Arrays) -> Operation:
        return Clip(a["gradients"], MAX_NORM, a["scalars"])

    return Kernel("clip", (n,), make, record, partial(unfused.clip(MAX_NORM), backend.xp), ("scalars",), ("scalars",))


def _dropout(backend: Any, shape: tuple[int, int], dtype: np.dtype[Any]) -> Kernel:
    def make() -> Arrays:
        counters = backend.asarray(np.array([3, 0]))
        return {"x": _normal(backend, shape, dtype), "counters": counters, "out": backend.zeros(shape, dtype)}

    def record(a: Arrays) -> Operation:
        return Dropout(a["x"], RATE_OF_DROPOUT, SEED, 1, a["counters"], a["out"])

    def expected(a: Arrays) -> None:
        x, counters = backend.to_numpy(a["x"]), backend.to_numpy(a["counters"])
        a["out"][...] = backend.asarray(ReferenceBackend().dropout(x, RATE_OF_DROPOUT, SEED, 1, counters))

    return Kernel(
        "dropout",
        shape,
        make,
        record,
        partial(unfused.dropout(RATE_OF_DROPOUT), backend.xp),
        ("out",),
        expected=expected,
    )


def _gather(backend: Any, shape: tuple[int, int], dtype: np.dtype[Any]) -> Kernel:
    n, first = shape[0], shape[0] // 2

    def make() -> Arrays:
        order = backend.asarray(np.random.default_rng(3).permutation(2 * n))
        a = {"source": _normal(backend, (2 * n, shape[1]), dtype), "order": order}
        return {**a, "counters": backend.asarray(np.array([0, first])), "out": backend.zeros(shape, dtype)}

    def record(a: Arrays) -> Operation:
        return Gather(a["source"], a["order"], a["counters"], a["out"])

    return Kernel("gather", shape, make, record, partial(unfused.gather(first), backend.xp), ("out",))


def copied(backend: Any, a: Arrays, dtype: np.dtype[Any] | None = None) -> Arrays:
    """Return copies of the arrays, those of real numbers in ``dtype`` if given; the same array stays the same."""
    done: dict[int, Any] = {}
    for array in a.values():
        if id(array) in done:
            continue
        if dtype is None or array.dtype.kind == "i":
            done[id(array)] = array.copy()
        elif array.dtype.itemsize == 2:  # CuPy does not convert every 16-bit type to float64
            done[id(array)] = backend.asarray(backend.to_numpy(array).astype(dtype))
        else:
            done[id(array)] = array.astype(dtype)
    return {name: done[id(array)] for name, array in a.items()}


def disagreement(backend: Any, kernel: Kernel, found: Arrays, expected: Arrays) -> str | None:
    """Return how the arrays found differ from those expected, in float64, or None where they agree.

    An element may differ by 32 units of rounding of the largest one. A sum of n elements may differ by 4 sqrt(n) units of
    the sum of their magnitudes more, what n roundings in any order rarely exceed, and by the rounding of its elements.
    """
    # n elements to a sum: the rows for db, all elements otherwise
    xp = backend.xp
    for name in kernel.outputs:
        got = found[name]
        real, storage = eps_of(real_of(found["db"].dtype if name == "value" else got.dtype)), eps_of(got.dtype)
        got, wanted = copied(backend, {name: got}, np.dtype(np.float64))[name], expected[name]
        scale, allowed = xp.abs(wanted).max(), 32 * storage
        if name in kernel.sums:
            count = kernel.shape[0] if name == "db" else int(np.prod(kernel.shape))
            allowed = (32 + 4 * count**0.5) * real
            if name == "db":
                scale = xp.abs(expected["out"]).sum(axis=0)
            if "out" in found:
                allowed += 4 * eps_of(found["out"].dtype)
        over = float(xp.max(xp.abs(got - wanted) / (allowed * scale + 1e-30)))
        if not over <= 1:  # NaN is no agreement either
            return f"{name} differs by {over:.3g} times what rounding explains"
    return None
