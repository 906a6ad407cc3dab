"""The CPU backend: products in register tiles, everything else by fused Numba kernels, steps in one call."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from gpubackprop.backends.base import Run
from gpubackprop.backends.checks import check_arrays, checked
from gpubackprop.backends.reference import ReferenceBackend
from gpubackprop.definitions import Array, address
from gpubackprop.philox import keep_threshold, split_seed

if TYPE_CHECKING:
    from gpubackprop.activations import Activation
    from gpubackprop.losses import Loss
    from gpubackprop.optimizers import Optimizer
    from gpubackprop.step import Operation, Step

Call = tuple[Any, tuple[Any, ...]]


class CpuBackend(ReferenceBackend):
    """See :class:`gpubackprop.backends.base.Backend`.

    Each fused operation has one ``_bind`` method that chooses the kernel and orders its arguments. The eager method calls
    what it returns; a compiled step keeps it, so that nothing is chosen again.
    """

    device = "cpu"
    dtypes = ("float32", "float64")

    def __init__(self) -> None:
        self._scratch = _Scratch()

    def bind(self, operation: Operation) -> Call:
        check_arrays(self, operation.name, operation.arguments, bound=True)
        call: Call = getattr(self, f"_bind_{operation.name}")(**operation.arguments)
        return call

    def compile(self, step: Step) -> Run:
        self._scratch.forget()  # a step has memory of its own, since steps run in several Python threads at once
        calls = [self.bind(operation) for operation in step.operations]
        self._scratch.forget()
        return CpuStep(calls, step.flops)

    @checked
    def matmul(self, a: Array, b: Array, out: Array | None = None) -> Array:
        out = np.empty((a.shape[0], b.shape[1]), a.dtype) if out is None else out
        _run(self._bind_matmul(a, b, out))
        return out

    def _bind_matmul(self, a: Array, b: Array, out: Array) -> Call:
        from gpubackprop.kernels.cpu.gemm import compile_product, total_for

        a_transposed, b_transposed = not a.flags.c_contiguous, not b.flags.c_contiguous
        a, b = a.T if a_transposed else a, b.T if b_transposed else b
        total = total_for(out, a.shape[0] if a_transposed else a.shape[1])
        scratch = self._scratch.of(a.dtype)
        return compile_product(a.dtype), (a, b, out, int(a_transposed), int(b_transposed), scratch, total)

    @checked
    def bias_activation_forward(self, z: Array, b: Array, activation: Activation, out: Array | None = None) -> Array:
        out = np.empty_like(z) if out is None else out
        _run(self._bind_bias_activation_forward(z, b, activation, out))
        return out

    def _bind_bias_activation_forward(self, z: Array, b: Array, activation: Activation, out: Array) -> Call:
        from gpubackprop.kernels.cpu.passes import compile_bias_activation_forward

        kernel = compile_bias_activation_forward(activation, z.dtype, address(z) == address(out))
        return kernel, (z, b, out)

    @checked
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
        from gpubackprop.kernels.cpu.passes import compile_bias_activation_backward, shares_of

        at = h if activation.needs == "h" else z
        kernel = compile_bias_activation_backward(activation, dh.dtype, address(dh) == address(out))
        sums, arrived = np.empty((shares_of(len(dh)), dh.shape[1]), dh.dtype), np.zeros(1, np.int64)
        return kernel, (dh, at, out, db, sums, arrived)

    @checked
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
        out = np.empty_like(z) if out is None else out
        db = np.empty(z.shape[1], z.dtype) if db is None else db
        value = np.zeros(2) if value is None else value
        _run(self._bind_bias_loss(z, b, y, loss, weight, out, db, value, scalars, samples, total))
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
        total: Array | None = None,
    ) -> Call:
        from gpubackprop.kernels.cpu.passes import compile_bias_loss, loss_scratch, shares_of

        n, d, shares = samples or len(z), z.shape[1], shares_of(len(z))
        kernel = compile_bias_loss(loss, z.dtype, y.ndim == 1, weight is not None, address(z) == address(out))
        sums, scratch = np.empty((shares, d), z.dtype), np.empty(loss_scratch(len(z), d), z.dtype)
        losses, arrived = np.empty(shares), np.zeros(1, np.int64)
        scale = z.dtype.type(loss.scale(n, d, weight is not None))
        count = np.array([n if loss.reduction == "mean" else 1], np.float64) if total is None else total
        w = b if weight is None else weight
        return kernel, (z, b, y, w, scale, count, out, db, value, sums, scratch, losses, arrived)

    @checked
    def normalize_weights(self, weight: Array, out: Array | None = None, total: Array | None = None) -> Array:
        out = np.empty_like(weight) if out is None else out
        _run(self._bind_normalize_weights(weight, out, total))
        return out

    def _bind_normalize_weights(self, weight: Array, out: Array, total: Array | None = None) -> Call:
        from gpubackprop.kernels.cpu.passes import compile_normalize_weights

        return compile_normalize_weights(weight.dtype), (weight, out, np.empty(1) if total is None else total)

    @checked
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
        from gpubackprop.kernels.cpu.passes import compile_dropout

        scale, (low, high) = x.dtype.type(1 / (1 - rate)), split_seed(seed)
        flat = x.reshape(-1), keep_threshold(rate), scale, low, high, layer, counters, out.reshape(-1), first_block
        return compile_dropout(x.dtype), flat

    @checked
    def gather(self, source: Array, order: Array, counters: Array, out: Array | None = None) -> Array:
        assert out is not None
        _run(self._bind_gather(source, order, counters, out))
        return out

    def _bind_gather(self, source: Array, order: Array, counters: Array, out: Array) -> Call:
        from gpubackprop.kernels.cpu.passes import compile_gather

        return compile_gather(out.dtype, out.ndim), (source, order, counters, out)

    @checked
    def accumulate(self, total: Array | None, term: Array, out: Array) -> Array:
        _run(self._bind_accumulate(total, term, out))
        return out

    def _bind_accumulate(self, total: Array | None, term: Array, out: Array) -> Call:
        from gpubackprop.kernels.cpu.passes import compile_accumulate

        arguments = (term, out) if total is None else (total, term, out)
        return compile_accumulate(term.dtype, total is None), arguments

    @checked
    def clip(self, gradients: Array, max_norm: float, scalars: Array, loss_scaling: bool = False) -> None:
        _run(self._bind_clip(gradients, max_norm, scalars, loss_scaling))

    def _bind_clip(self, gradients: Array, max_norm: float, scalars: Array, loss_scaling: bool) -> Call:
        from gpubackprop.kernels.cpu.passes import compile_clip

        return compile_clip(gradients.dtype), (gradients, float(max_norm), scalars)

    @checked
    def advance(
        self, optimizer: Optimizer, rate: Array, batch: int, counters: Array, scalars: Array, loss_scaling: bool = False
    ) -> None:
        _run(self._bind_advance(optimizer, rate, batch, counters, scalars, loss_scaling))

    def _bind_advance(
        self, optimizer: Optimizer, rate: Array, batch: int, counters: Array, scalars: Array, loss_scaling: bool
    ) -> Call:
        from gpubackprop.kernels.cpu.passes import compile_advance

        numbers, of_schedule = np.array(optimizer.numbers, float), np.array(optimizer.schedule.numbers, float)
        return compile_advance(optimizer, scalars.dtype), (rate, batch, counters, scalars, numbers, of_schedule)

    @checked
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
        from gpubackprop.kernels.cpu.passes import compile_update

        real, limit = parameters.dtype.type, optimizer.clipping[1]
        numbers = np.array([real(number) for number in optimizer.numbers], parameters.dtype)
        arguments = parameters, gradients, states, scalars, real(0 if limit is None else limit), numbers
        return compile_update(optimizer, parameters.dtype), arguments


class CpuStep:
    """A step, run by compiled code for as many times as it is asked to, on as many threads as is fastest.

    The bits do not depend on the number of threads, so the first long enough runs try one and all in turn.
    """

    TRIALS = 6  # of each number of threads; the fastest counts, since other programs may take a core for a while
    ALONE = 1e6  # FLOP of a step below which the threads would spend more time on meeting than on computing
    LONG = 3e8  # FLOP of a run that is long enough to be judged by: some milliseconds, beside 50 microseconds to begin

    def __init__(self, calls: Sequence[Call], flops: float) -> None:
        from gpubackprop.kernels.cpu.program import Program
        from gpubackprop.kernels.cpu.threads import available_threads

        self._program, self._flops = Program(calls), flops
        self._seconds: dict[int, list[float]] = {1: []}  # of a step, in the trials with so many threads
        if flops >= self.ALONE and available_threads() > 1:
            self._seconds[available_threads()] = []
        # what takes the steps, once the number of threads is known
        self._run: Callable[[int], None] | None = self._program.alone if len(self._seconds) == 1 else None

    def __call__(self, times: int = 1) -> None:
        """Run the step ``times`` times over."""
        if self._run is not None:
            self._run(times)
        elif times * self._flops < self.LONG:
            self._program(times)
        else:
            self._try(times)

    @property
    def once(self) -> Callable[[], None]:
        """The quickest way to run the step a single time."""
        return self if self._run is None else partial(self._run, 1)

    def _try(self, times: int) -> None:
        threads = min(self._seconds, key=lambda number: len(self._seconds[number]))
        started = time.perf_counter()
        self._program(times, threads)
        self._seconds[threads].append((time.perf_counter() - started) / times)
        if all(len(seconds) == self.TRIALS for seconds in self._seconds.values()):
            threads = min(self._seconds, key=lambda number: min(self._seconds[number]))
            self._run = self._program.alone if threads == 1 else partial(self._program, threads=threads)


class _Scratch(threading.local):
    """Memory for the copies that products make, per Python thread."""

    def __init__(self) -> None:
        self._arrays: dict[np.dtype[Any], Array] = {}

    def of(self, dtype: np.dtype[Any]) -> Array:
        """Return the memory for a dtype."""
        from gpubackprop.kernels.cpu.gemm import scratch_for
        from gpubackprop.kernels.cpu.threads import available_threads

        if dtype not in self._arrays:
            self._arrays[dtype] = scratch_for(dtype, available_threads())
        return self._arrays[dtype]

    def forget(self) -> None:
        """Leave the memory to whoever has it, and take new one when it is needed."""
        self._arrays = {}


def _run(call: Call) -> None:
    kernel, arguments = call
    kernel(*arguments)
