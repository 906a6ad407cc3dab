"""The CPU backend: products by a micro-kernel, everything else by fused Numba kernels, steps in one call."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gpubackprop.backends.base import Call, Run
from gpubackprop.backends.checks import check_arrays
from gpubackprop.backends.host import HostBackend
from gpubackprop.definitions import Array, address
from gpubackprop.philox import keep_threshold, split_seed
from gpubackprop.step import Step
from gpubackprop.step import operations as table
from gpubackprop.step.dataflow import Access, dependencies, spans

if TYPE_CHECKING:
    from gpubackprop.kernels.cpu.compile import PerThread


SHARED = 2e6  # FLOP of a step from which on threads share it: below, they wait for each other longer than they compute
SHARED_CALL = 5e7  # the same for one operation, some 0.2 ms, since threads must be woken for it alone
LEAST = 2e4  # FLOP of a piece, about 0.2 microseconds: below, taking it takes longer
GRAIN = 3e7  # FLOP of a piece of something large, about 0.3 ms: who loses its core holds up one
SIDE = 96  # rows or columns of a piece of a product, which packs the operands for itself
LARGE = 1 << 20  # bytes of an array that threads check together
FLOP_OF_A_BYTE = 4  # an operation that moves memory takes about the time of so many


class CpuBackend(HostBackend):
    """See :class:`gpubackprop.backends.base.Backend`.

    A method ``bind_NAME`` for each operation chooses the kernel and orders its arguments. An eager call runs the result; a
    compiled step keeps it, so that nothing is chosen again.
    """

    device = "cpu"
    dtypes = ("float32", "float64")

    def __init__(self) -> None:
        self._scratch = _Scratch()

    def bind(self, operation: table.Operation) -> Call:
        check_arrays(self, operation, bound=True)
        return self._call(operation)

    def execute(self, operation: table.Operation) -> None:
        self._ready(operation)()

    def prepare(self, operations: Sequence[table.Operation]) -> list[Callable[[], None]]:
        with self._own_scratch():
            return [self._ready(operation) for operation in operations]

    def _ready(self, operation: table.Operation) -> Callable[[], None]:
        """Return a function that runs an operation: in the caller's thread, or shared by all where that pays."""
        call: Any = self._call(operation)
        kernel, arguments = call
        if self._scratch.threads > 1 and work_of(operation) >= SHARED_CALL:
            return self._shared(operation, kernel, arguments)
        run: Callable[[], None] = kernel.prepare(arguments)
        return run

    def _shared(self, operation: table.Operation, kernel: Any, arguments: tuple[Any, ...]) -> Run:
        """Return a program of one operation that threads share."""
        from gpubackprop.kernels.cpu.program import Program, Task

        threads = self._scratch.threads
        return Program([Task(kernel, arguments, pieces_of(operation, threads), ((0, 0),))], threads)

    def count_not_finite(self, a: Array) -> int:
        from gpubackprop.kernels.cpu.minibatch import compile_count_not_finite
        from gpubackprop.kernels.cpu.program import Program, Task
        from gpubackprop.kernels.cpu.threads import available_threads

        if a.nbytes < LARGE or a.dtype.name not in self.dtypes or not a.flags.c_contiguous:
            return super().count_not_finite(a)
        threads = available_threads()
        counts = np.zeros(4 * threads, np.int64)
        kernel = compile_count_not_finite(a.dtype)
        Program([Task(kernel, (a.reshape(-1), counts), len(counts), ((0, 0),))], threads)()
        return int(counts.sum())

    @cached_property
    def decides_bits(self) -> dict[str, str]:
        from llvmlite import binding

        return {"processor": binding.get_host_cpu_name(), "LLVM": ".".join(map(str, binding.llvm_version_info))}

    def compile(self, step: Step) -> Run:
        from gpubackprop.kernels.cpu.program import Program, Task
        from gpubackprop.kernels.cpu.threads import available_threads

        threads = available_threads() if step.flops >= SHARED else 1
        with self._own_scratch(threads):
            parts = list(self._parts(step.bound(), threads))
        accesses = [Access(spans(part.read), spans(part.written)) for part in parts]
        after = dependencies(accesses) if threads > 1 else [()] * len(parts)
        tasks = [Task(p.kernel, p.arguments, p.pieces, before) for p, before in zip(parts, after, strict=True)]
        return Program(tasks, threads, [span for access in accesses for span in access.writes])

    def rebind(self, run: Run, sources: Mapping[int, Array]) -> bool:
        from gpubackprop.kernels.cpu.program import Program

        assert isinstance(run, Program)
        if run.threads > 1 and any(run.writes(*span) for span in spans(sources.values())):
            return False  # the threads would not wait for what overwrites it
        for number, source in sources.items():
            run.replace(number, source)
        return True

    @contextmanager
    def _own_scratch(self, threads: int | None = None) -> Iterator[None]:
        """Give operations bound here their own memory, for ``threads`` threads or all, since any Python thread may run them."""
        self._scratch.begin(threads)
        yield
        self._scratch.begin()

    def _call(self, operation: table.Operation) -> Call:
        call: Call = getattr(self, f"bind_{operation.name}")(operation)
        return call

    def bind_matmul(self, o: table.Matmul) -> Call:
        from gpubackprop.kernels.cpu.gemm import compile_product, total_for

        a, b, out = o.a, o.b, o.out
        a_transposed, b_transposed = not a.flags.c_contiguous, not b.flags.c_contiguous
        a, b = a.T if a_transposed else a, b.T if b_transposed else b
        total = total_for(out, a.shape[0] if a_transposed else a.shape[1])
        scratch = self._scratch.of(a.dtype)
        return compile_product(a.dtype), (a, b, out, int(a_transposed), int(b_transposed), scratch, total)

    def bind_bias_activation_forward(self, o: table.BiasActivationForward) -> Call:
        from gpubackprop.kernels.cpu.passes import compile_bias_activation_forward

        in_place = address(o.z) == address(o.out)
        return compile_bias_activation_forward(o.activation, o.z.dtype, in_place), (o.z, o.b, o.out)

    def bind_bias_activation_backward(self, o: table.BiasActivationBackward) -> Call:
        from gpubackprop.kernels.cpu.passes import compile_bias_activation_backward, shares_of

        kernel = compile_bias_activation_backward(o.activation, o.dh.dtype, address(o.dh) == address(o.out))
        sums, arrived = np.empty((shares_of(len(o.dh)), o.dh.shape[1]), o.dh.dtype), np.zeros(1, np.int64)
        return kernel, (o.dh, o.at, o.out, o.db, sums, arrived)

    def bind_bias_loss(self, o: table.BiasLoss) -> Call:
        from gpubackprop.kernels.cpu.loss import compile_bias_loss, loss_scratch
        from gpubackprop.kernels.cpu.passes import SHORT, shares_of

        z, y, loss, weighted = o.z, o.y, o.loss, o.weight is not None
        n, d, shares = o.samples or len(z), z.shape[1], shares_of(len(z))
        kernel = compile_bias_loss(loss, z.dtype, y.ndim == 1, weighted, address(z) == address(o.out), d < SHORT)
        sums, scratch = np.empty((shares, d), z.dtype), loss_scratch(d, z.dtype, self._scratch.threads)
        losses, arrived = np.empty(shares), np.zeros(1, np.int64)
        scale = z.dtype.type(loss.scale(n, d, weighted))
        count = np.array([n if loss.reduction == "mean" else 1], np.float64) if o.total is None else o.total
        w = o.weight if weighted else o.b
        return kernel, (z, o.b, y, w, scale, count, o.out, o.db, o.value, sums, scratch, losses, arrived)

    def bind_normalize_weights(self, o: table.NormalizeWeights) -> Call:
        from gpubackprop.kernels.cpu.minibatch import compile_normalize_weights

        total = np.empty(1) if o.total is None else o.total
        return compile_normalize_weights(o.weight.dtype), (o.weight, o.out, total)

    def bind_dropout(self, o: table.Dropout) -> Call:
        from gpubackprop.kernels.cpu.minibatch import compile_dropout

        scale, (low, high) = o.x.dtype.type(1 / (1 - o.rate)), split_seed(o.seed)
        numbers = keep_threshold(o.rate), scale, low, high, o.layer
        return compile_dropout(o.x.dtype), (o.x.reshape(-1), *numbers, o.counters, o.out.reshape(-1), o.first_block)

    def bind_gather(self, o: table.Gather) -> Call:
        from gpubackprop.kernels.cpu.minibatch import compile_gather

        return compile_gather(o.out.dtype, o.out.ndim), (o.source, o.order, o.counters, o.out)

    def bind_accumulate(self, o: table.Accumulate) -> Call:
        from gpubackprop.kernels.cpu.training import compile_accumulate

        arguments = (o.term, o.out) if o.total is None else (o.total, o.term, o.out)
        return compile_accumulate(o.term.dtype, o.total is None), arguments

    def bind_clip(self, o: table.Clip) -> Call:
        from gpubackprop.kernels.cpu.training import compile_clip

        return compile_clip(o.gradients.dtype), (o.gradients, float(o.max_norm), o.scalars)

    def bind_advance(self, o: table.Advance) -> Call:
        from gpubackprop.kernels.cpu.training import compile_advance

        numbers, of_schedule = np.array(o.optimizer.numbers, float), np.array(o.optimizer.schedule.numbers, float)
        kernel = compile_advance(o.optimizer, o.scalars.dtype)
        return kernel, (o.rate, o.batch, o.counters, o.scalars, numbers, of_schedule)

    def bind_update(self, o: table.Update) -> Call:
        from gpubackprop.kernels.cpu.training import compile_update

        kernel = compile_update(o.optimizer, o.parameters.dtype)
        return kernel, (o.parameters, o.gradients, o.states, 0, *_numbers_of(o))

    def _parts(self, operations: Sequence[table.Operation], threads: int) -> Iterator[Part]:
        """Yield the calls of a step; for one sample, dW_l is an outer product and part of the update of W_l."""
        update = operations[-1]
        outer = _outer_products(operations, update) if isinstance(update, table.Update) else []
        for o in operations:
            call = self.bind(o)
            if isinstance(o, table.Update) and outer:
                yield from _update_by(outer, o, threads)
            elif o not in outer:
                yield Part(*call, o.read, o.written, pieces_of(o, threads))


class Part(NamedTuple):
    """A call of a kernel in a step, the arrays that it reads and writes, and into how many pieces it is cut."""

    kernel: Any
    arguments: tuple[Any, ...]
    read: Sequence[Array]
    written: Sequence[Array]
    pieces: int


def _numbers_of(o: table.Update) -> tuple[Array, Any, Array]:
    """Return the last arguments of the kernels of an update."""
    dtype, limit = o.parameters.dtype, o.optimizer.clipping[1]
    numbers = np.array([dtype.type(number) for number in o.optimizer.numbers], dtype)
    return o.scalars, dtype.type(0 if limit is None else limit), numbers


def _outer_products(operations: Sequence[table.Operation], update: table.Update) -> list[table.Matmul]:
    """Return the weight gradients of a step of one sample that only its update reads, by their places."""
    if any(isinstance(o, table.Clip | table.Accumulate) for o in operations):
        return []
    products = [o for o in operations if isinstance(o, table.Matmul) and np.may_share_memory(o.out, update.gradients)]
    return sorted((o for o in products if o.a.shape[1] == 1), key=lambda o: address(o.out))


def _update_by(products: Sequence[table.Matmul], o: table.Update, threads: int) -> Iterator[Part]:
    """Yield the parts of an update: of each W_l by its outer product, of what lies between them by the gradients."""
    from gpubackprop.kernels.cpu.compile import PerThread
    from gpubackprop.kernels.cpu.training import compile_update, compile_update_by_outer_product

    dtype, numbers, begin = o.parameters.dtype, _numbers_of(o), 0
    by_gradient, by_product = compile_update(o.optimizer, dtype), compile_update_by_outer_product(o.optimizer, dtype)

    def rest(begin: int, end: int) -> Iterator[Part]:
        if begin < end:
            p, g = o.parameters[begin:end], o.gradients[begin:end]
            pieces = pieces_for(FLOP_OF_A_BYTE * p.nbytes, threads)
            yield Part(by_gradient, (p, g, o.states, begin, *numbers), (g, o.scalars), (p, o.states), pieces)

    for product in products:
        place = (address(product.out) - address(o.gradients)) // dtype.itemsize
        yield from rest(begin, place)
        begin = place + product.out.size
        W, x, delta = o.parameters[place:begin].reshape(product.out.shape), product.a.reshape(-1), product.b.reshape(-1)
        row = PerThread(np.empty((threads, W.shape[1]), dtype))
        pieces = pieces_for(FLOP_OF_A_BYTE * (1 + o.optimizer.n_states) * W.nbytes, threads)
        arguments = W, x, delta, row, o.states, place, *numbers
        yield Part(by_product, arguments, (x, delta, o.scalars), (W, o.states), pieces)
    yield from rest(begin, o.parameters.size)


def pieces_of(operation: table.Operation, threads: int) -> int:
    """Return into how many pieces an operation is cut: a multiple of ``threads``, or fewer where it is small.

    All have the same bits: kernels share rows, columns or elements, never a sum.
    """
    if isinstance(operation, table.Advance | table.Clip | table.NormalizeWeights):
        return 1
    most = max(operation.out.shape) / SIDE if isinstance(operation, table.Matmul) else math.inf
    return pieces_for(work_of(operation), threads, most)


def work_of(operation: table.Operation) -> float:
    """Return the FLOP of an operation, or of what takes as long as its memory."""
    return max(operation.flops, FLOP_OF_A_BYTE * operation.nbytes)


def pieces_for(work: float, threads: int, most: float = math.inf) -> int:
    """Return into how many pieces a work of so many FLOP is cut."""
    if work < LEAST * threads:
        return int(max(1, work // LEAST))
    return threads * max(1, round(min(work / GRAIN, most) / threads))


class _Scratch(threading.local):
    """Memory in which products pack their operands, one per Python thread."""

    def __init__(self) -> None:
        self.begin()

    def of(self, dtype: np.dtype[Any]) -> PerThread:
        """Return the memory for a dtype."""
        from gpubackprop.kernels.cpu.gemm import scratch_for

        if dtype not in self._arrays:
            self._arrays[dtype] = scratch_for(dtype, self.threads)
        return self._arrays[dtype]

    def begin(self, threads: int | None = None) -> None:
        """Drop our references; the next use allocates, for ``threads`` threads per product, or as many as there are."""
        self._threads = threads
        self._arrays: dict[np.dtype[Any], PerThread] = {}

    @property
    def threads(self) -> int:
        """How many threads may share a product."""
        from gpubackprop.kernels.cpu.threads import available_threads

        return available_threads() if self._threads is None else self._threads
