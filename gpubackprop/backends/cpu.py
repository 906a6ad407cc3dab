"""The CPU backend: the products by NumPy's BLAS, everything else by fused Numba kernels."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gpubackprop.backends.base import Run
from gpubackprop.backends.reference import ReferenceBackend, loop
from gpubackprop.definitions import Array, address
from gpubackprop.philox import keep_threshold, split_seed

if TYPE_CHECKING:
    from gpubackprop.activations import Activation
    from gpubackprop.losses import Loss
    from gpubackprop.optimizers import Optimizer
    from gpubackprop.step import Operation, Step

Call = tuple[Callable[..., Any], tuple[Any, ...]]


class CpuBackend(ReferenceBackend):
    """See :class:`gpubackprop.backends.base.Backend`.

    Each fused operation has one ``_bind`` method that chooses the kernel and orders its arguments. The eager method calls
    what it returns; a compiled step keeps it, so that nothing is chosen again.
    """

    device = "cpu"
    dtypes = ("float32", "float64")

    def __init__(self) -> None:
        self._scratch: dict[tuple[int, str], Array] = {}

    def bind(self, operation: Operation) -> Call:
        call: Call = getattr(self, f"_bind_{operation.name}")(**operation.arguments)
        return call

    def compile(self, step: Step) -> Run:
        from gpubackprop.kernels.cpu_compile import compile_for

        calls = [self.bind(operation) for operation in step.operations]
        for function, arguments in calls:
            compile_for(function, arguments)
        return CpuStep(calls)

    def matmul(self, a: Array, b: Array, out: Array | None = None) -> Array:
        out = np.empty((a.shape[0], b.shape[1]), a.dtype) if out is None else out
        _run(self._bind_matmul(a, b, out))
        return out

    def _bind_matmul(self, a: Array, b: Array, out: Array) -> Call:
        from gpubackprop.kernels.cpu_blas import chooser

        return chooser().kernel(a, b, out), (a, b, out)

    def bias_activation_forward(self, z: Array, b: Array, activation: Activation, out: Array | None = None) -> Array:
        out = np.empty_like(z) if out is None else out
        _run(self._bind_bias_activation_forward(z, b, activation, out))
        return out

    def _bind_bias_activation_forward(self, z: Array, b: Array, activation: Activation, out: Array) -> Call:
        from gpubackprop.kernels.cpu import compile_bias_activation_forward

        in_place = address(z) == address(out)
        kernel = compile_bias_activation_forward(activation, z.dtype, in_place)
        return kernel, ((z, b) if in_place else (z, b, out))

    def bias_activation_backward(
        self,
        dh: Array,
        z: Array | None,
        h: Array | None,
        activation: Activation,
        out: Array | None = None,
        db: Array | None = None,
    ) -> tuple[Array, Array]:
        out = np.empty_like(dh) if out is None else out
        db = np.empty(dh.shape[1], dh.dtype) if db is None else db
        _run(self._bind_bias_activation_backward(dh, z, h, activation, out, db))
        return out, db

    def _bind_bias_activation_backward(
        self, dh: Array, z: Array | None, h: Array | None, activation: Activation, out: Array, db: Array
    ) -> Call:
        from gpubackprop.kernels.cpu import compile_bias_activation_backward

        in_place, at = address(dh) == address(out), h if activation.needs == "h" else z
        kernel = compile_bias_activation_backward(activation, dh.dtype, in_place)
        return kernel, ((dh, at, db) if in_place else (dh, at, out, db))

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
    ) -> tuple[Array, Array, Array]:
        out = np.empty_like(z) if out is None else out
        db = np.empty(z.shape[1], z.dtype) if db is None else db
        value = np.zeros(2) if value is None else value
        _run(self._bind_bias_loss(z, b, y, loss, weight, out, db, value, scalars, samples))
        return value, out, db

    def _bind_bias_loss(
        self,
        z: Array,
        b: Array,
        y: Array,
        loss: Loss,
        weight: Array | None,
        out: Array,
        db: Array,
        value: Array,
        scalars: Array | None,
        samples: int | None = None,
    ) -> Call:
        from gpubackprop.kernels.cpu import compile_bias_loss

        n, d = samples or len(z), z.shape[1]
        kernel = compile_bias_loss(loss, z.dtype, y.ndim == 1, weight is not None, address(z) == address(out))
        scratch = self._scratch.setdefault((d, z.dtype.name), np.empty((2, d), z.dtype))
        scale = z.dtype.type(loss.scale(n, d, weight is not None))
        count = float(n if loss.reduction == "mean" else 1)
        return kernel, (z, b, y, b if weight is None else weight, scale, count, out, db, value, scratch)

    def normalize_weights(self, weight: Array, out: Array | None = None) -> Array:
        out = np.empty_like(weight) if out is None else out
        _run(self._bind_normalize_weights(weight, out))
        return out

    def _bind_normalize_weights(self, weight: Array, out: Array) -> Call:
        from gpubackprop.kernels.cpu import compile_normalize_weights

        return compile_normalize_weights(weight.dtype), (weight, out)

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
        out = np.empty_like(x) if out is None else out
        _run(self._bind_dropout(x, rate, seed, layer, counters, out, first_block))
        return out

    def _bind_dropout(
        self, x: Array, rate: float, seed: int, layer: int, counters: Array, out: Array, first_block: int = 0
    ) -> Call:
        from gpubackprop.kernels.cpu import compile_dropout

        scale, (low, high) = x.dtype.type(1 / (1 - rate)), split_seed(seed)
        flat = x.reshape(-1), keep_threshold(rate), scale, low, high, layer, counters, out.reshape(-1), first_block
        return compile_dropout(x.dtype), flat

    def gather(self, source: Array, order: Array, counters: Array, out: Array | None = None) -> Array:
        assert out is not None
        _run(self._bind_gather(source, order, counters, out))
        return out

    def _bind_gather(self, source: Array, order: Array, counters: Array, out: Array) -> Call:
        from gpubackprop.kernels.cpu import compile_gather

        return compile_gather(out.dtype, out.ndim), (source, order, counters, out)

    def accumulate(self, total: Array | None, term: Array, out: Array) -> Array:
        _run(self._bind_accumulate(total, term, out))
        return out

    def _bind_accumulate(self, total: Array | None, term: Array, out: Array) -> Call:
        from gpubackprop.kernels.cpu import compile_accumulate

        arguments = (term, out) if total is None else (total, term, out)
        return compile_accumulate(term.dtype, total is None), arguments

    def clip(self, gradients: Array, max_norm: float, scalars: Array, loss_scaling: bool = False) -> None:
        _run(self._bind_clip(gradients, max_norm, scalars, loss_scaling))

    def _bind_clip(self, gradients: Array, max_norm: float, scalars: Array, loss_scaling: bool) -> Call:
        from gpubackprop.kernels.cpu import compile_clip

        return compile_clip(gradients.dtype), (gradients, float(max_norm), scalars)

    def advance(
        self, optimizer: Optimizer, rate: Array, batch: int, counters: Array, scalars: Array, loss_scaling: bool = False
    ) -> None:
        _run(self._bind_advance(optimizer, rate, batch, counters, scalars, loss_scaling))

    def _bind_advance(
        self, optimizer: Optimizer, rate: Array, batch: int, counters: Array, scalars: Array, loss_scaling: bool
    ) -> Call:
        from gpubackprop.kernels.cpu import compile_advance

        return compile_advance(optimizer, scalars.dtype), (rate, batch, counters, scalars)

    def update(
        self,
        optimizer: Optimizer,
        parameters: Array,
        gradients: Array,
        states: Array,
        scalars: Array,
        weights: Array | None = None,
    ) -> None:
        _run(self._bind_update(optimizer, parameters, gradients, states, scalars, weights))

    def _bind_update(
        self,
        optimizer: Optimizer,
        parameters: Array,
        gradients: Array,
        states: Array,
        scalars: Array,
        weights: Array | None,
    ) -> Call:
        from gpubackprop.kernels.cpu import compile_update

        return compile_update(optimizer, parameters.dtype), (parameters, gradients, states, scalars)


class CpuStep:
    """A step that is first a loop over its operations, and one compiled function as soon as that pays.

    Compiling a step takes seconds, once per machine; a short run ends before it would have been worth it. So the step is
    composed when the time spent in the loop has reached ``PATIENCE``, or at once where it is on disk already. The
    kernels are the same both ways, and so are the bits.
    """

    PATIENCE = 2.0  # seconds, about what compiling takes

    def __init__(self, calls: Sequence[Call]) -> None:
        from gpubackprop.kernels.cpu_step import ComposedStep

        self.calls = calls
        self._loop, self._composed = loop(calls), ComposedStep(calls)
        self._spent = 0.0 if not self._composed.is_cheap else self.PATIENCE

    def __call__(self, times: int = 1) -> None:
        """Run the step ``times`` times over."""
        if self._spent >= self.PATIENCE:
            self._composed(times)
            return
        started = time.perf_counter()
        self._loop(times)
        self._spent += time.perf_counter() - started

    def compose(self) -> None:
        """Compile the step now, without running it."""
        self._composed(0)
        self._spent = self.PATIENCE


def _run(call: Call) -> None:
    function, arguments = call
    function(*arguments)
