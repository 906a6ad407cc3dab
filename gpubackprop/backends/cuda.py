"""The CUDA backend: products by cuBLAS through CuPy, everything else by fused kernels, on CuPy's current stream.

A method checks its arrays, since kernels take raw pointers, and makes a list of launches; an eager call runs the list at
once, a compiled step keeps it. Partial sums go to scratch memory that is kept per stream and grows to the largest need:
operations on one stream come one after another, so they may share it. A compiled step uses the scratch of the stream that
was current when it was compiled; run it there, or where nothing else runs at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import cupy
import numpy as np
import numpy.typing as npt
from cuda.core import Stream, launch

from gpubackprop.backends.base import Run
from gpubackprop.backends.diagnosis import DeviceUnavailableError, cuda_version, installed
from gpubackprop.definitions import Array, check_dtype, check_precision
from gpubackprop.kernels import cuda as passes
from gpubackprop.kernels import cuda_loss, cuda_softmax, cuda_training
from gpubackprop.kernels.cuda_launch import THREADS, Source, launch_config, load
from gpubackprop.kernels.cuda_vector import VECTOR_BYTES, storage_of
from gpubackprop.philox import keep_threshold, split_seed

if TYPE_CHECKING:
    from gpubackprop.activations import Activation
    from gpubackprop.losses import Loss
    from gpubackprop.optimizers import Optimizer
    from gpubackprop.step import Operation, Step

BLOCKS_PER_MULTIPROCESSOR = 4  # of 256 threads with up to 64 registers: one full wave, the rest by striding
LEGACY_STREAM = 1  # CU_STREAM_LEGACY: the same stream as handle 0, which cuda.core takes for no stream
FEW_ROWS = 128  # up to here one launch adds up rows faster than two
SCRATCH_STEP = 4096  # elements; scratch grows in multiples of it


Call = tuple[Callable[..., Any], tuple[Any, ...]]


class Launch(NamedTuple):
    """A kernel, its grid and its arguments."""

    config: Any
    kernel: Any
    arguments: tuple[Any, ...]
    scratch: Array | None = None
    """Kept, since the arguments hold only its address."""


class CudaBackend:
    """See :class:`gpubackprop.backends.base.Backend`.

    Parameters
    ----------
    index : int
        The number of the device, as CUDA counts them.
    matmul_precision : {"float32", "tf32"}
        How float32 matrices are multiplied; TF32 keeps 10 bits of each factor's mantissa, and is never used unasked.
    epilogues : {"auto", "all", "off"}
        Whether products may end with the next operation, see :mod:`gpubackprop.backends.cuda_epilogues`.
    """

    xp: ModuleType = cupy
    dtypes: tuple[str, ...] = ("float32", "float64")

    def __init__(self, index: int = 0, *, matmul_precision: str = "float32", epilogues: str = "auto") -> None:
        self.device = f"cuda:{index}"
        self._device = cupy.cuda.Device(index)
        capability = self._device.compute_capability
        self._capability = (int(capability[:-1]), int(capability[-1]))
        self._blocks = BLOCKS_PER_MULTIPROCESSOR * self._device.attributes["MultiProcessorCount"]
        self._streams: dict[int, Stream] = {}
        self._scratch: dict[tuple[int, np.dtype[Any]], Array] = {}
        check_precision(matmul_precision)
        self.matmul_precision = matmul_precision
        self._products: Any = None
        if installed("nvmath-python"):
            from gpubackprop.backends.cublaslt import Products
            from gpubackprop.backends.cuda_epilogues import Autotuner

            properties = cupy.cuda.runtime.getDeviceProperties(index)
            versions = [installed(name) for name in ("nvmath-python", "nvidia-cublas-cu12", "nvidia-cublas")]
            self._products = Products(index, tf32=matmul_precision == "tf32")
            self._autotuner: Any = Autotuner(
                self._products, epilogues, f"{properties['name']} {cuda_version()} {versions}"
            )

        elif matmul_precision == "tf32":
            raise DeviceUnavailableError("matmul_precision 'tf32' needs nvmath-python; run: pip install nvmath-python")

    def asarray(self, a: Any, dtype: npt.DTypeLike | None = None) -> Array:
        with self._device:
            if isinstance(a, cupy.ndarray) and a.device != self._device:
                a = a.copy()
            return cupy.ascontiguousarray(cupy.asarray(a, dtype=dtype))

    def to_numpy(self, a: Array) -> np.ndarray:
        with self._device:
            return cupy.asnumpy(a)  # type: ignore[no-any-return]

    def synchronize(self) -> None:
        self._device.synchronize()

    def memory(self) -> tuple[int, int] | None:
        with self._device:
            free, total = cupy.cuda.runtime.memGetInfo()
            return free + cupy.get_default_memory_pool().free_bytes(), total

    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        with self._device:
            return cupy.zeros(shape, dtype)

    def matmul(self, a: Array, b: Array, out: Array | None = None) -> Array:
        with self._device:
            if self.matmul_precision == "float32" and a.dtype == (a if out is None else out).dtype:
                return cupy.matmul(a, b, out=out)
            if out is None:
                out = cupy.empty((a.shape[0], b.shape[1]), a.dtype)
            self._products.matmul(a, b, out)
            return out

    def bias_activation_forward(self, z: Array, b: Array, activation: Activation, out: Array | None = None) -> Array:
        with self._device:
            out = cupy.empty_like(z) if out is None else out
            self._run(self._bias_activation_forward(z, b, activation, out))
        return out

    def bias_activation_backward(
        self,
        dh: Array,
        z: Array | None,
        h: Array | None,
        activation: Activation,
        out: Array | None = None,
        db: Array | None = None,
    ) -> tuple[Array, Array]:
        with self._device:
            out = cupy.empty_like(dh) if out is None else out
            db = cupy.empty(dh.shape[1], dh.dtype) if db is None else db
            self._run(self._bias_activation_backward(dh, z, h, activation, out, db))
        return out, db

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
        with self._device:
            out = cupy.empty_like(z) if out is None else out
            db = cupy.empty(z.shape[1], z.dtype) if db is None else db
            value = cupy.zeros(2) if value is None else value
            self._run(self._bias_loss(z, b, y, loss, weight, out, db, value, scalars, samples))
        return value, out, db

    def normalize_weights(self, weight: Array, out: Array | None = None) -> Array:
        with self._device:
            out = cupy.empty_like(weight) if out is None else out
            self._run(self._normalize_weights(weight, out))
        return out

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
        with self._device:
            out = cupy.empty_like(x) if out is None else out
            self._run(self._dropout(x, rate, seed, layer, counters, out, first_block))
        return out

    def gather(self, source: Array, order: Array, counters: Array, out: Array | None = None) -> Array:
        assert out is not None
        with self._device:
            self._run(self._gather(source, order, counters, out))
        return out

    def accumulate(self, total: Array | None, term: Array, out: Array) -> Array:
        with self._device:
            self._run(self._accumulate(total, term, out))
        return out

    def clip(self, gradients: Array, max_norm: float, scalars: Array, loss_scaling: bool = False) -> None:
        with self._device:
            self._run(self._clip(gradients, max_norm, scalars, loss_scaling))

    def advance(
        self, optimizer: Optimizer, rate: Array, batch: int, counters: Array, scalars: Array, loss_scaling: bool = False
    ) -> None:
        with self._device:
            self._run(self._advance(optimizer, rate, batch, counters, scalars, loss_scaling))

    def update(
        self,
        optimizer: Optimizer,
        parameters: Array,
        gradients: Array,
        states: Array,
        scalars: Array,
        weights: Array | None = None,
    ) -> None:
        with self._device:
            self._run(self._update(optimizer, parameters, gradients, states, scalars, weights))

    def bind(self, operation: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Return the function of an operation of a step, and its arguments; shapes, kernels and grids are settled here."""
        arguments = operation.arguments
        if operation.name == "matmul":
            return cupy.matmul, (arguments["a"], arguments["b"], arguments["out"])
        with self._device:
            return self._run, (getattr(self, "_" + operation.name)(**arguments),)

    def compile(self, step: Step) -> Run:
        """Return the step as CUDA graphs, or, where nvmath-python is missing, as a loop over its operations."""
        if self._products is None:
            calls = [self.bind(operation) for operation in step.operations]

            def run(
                times: int = 1, step: Step = step
            ) -> None:  # the calls hold only the addresses of the step's arrays
                with self._device:
                    for _ in range(times):
                        for function, arguments in calls:
                            function(*arguments)

            return run
        from gpubackprop.backends.cuda_graph import CapturedStep

        with self._device:
            stream = cupy.cuda.Stream(non_blocking=True)
            with stream:  # scratch belongs to a stream: this step's own
                calls = self._autotuner.calls(step.operations, self.bind_product)
            self._device.synchronize()
        return CapturedStep(self._device, stream, calls, step)

    @property
    def epilogue_choices(self) -> list[Any]:
        """What was measured for each pair of a product and the operation after it, and which way won."""
        return [] if self._products is None else list(self._autotuner.choices.values())

    def bind_product(self, operation: Operation) -> Call:
        """As :meth:`bind`, with products that may be captured."""
        if operation.name != "matmul":
            return self.bind(operation)
        plan, arguments = self._products.bind(**operation.arguments)

        def run() -> None:
            plan(*arguments, cupy.cuda.get_current_stream().ptr)

        return run, ()

    # What each method launches. The current device is this one.

    def _bias_activation_forward(self, z: Array, b: Array, activation: Activation, out: Array) -> list[Launch]:
        n, d, dtype = *self._matrix("z", z), z.dtype
        self._require(dtype, b=(b, (d,)), out=(out, (n, d)))
        width = passes.width_of(dtype, d, _at(z), _at(b), _at(out))
        source = passes.bias_activation_forward(activation, dtype, width, _at(out) != _at(z))
        return [self._launch(source, *self._cut(n, d, width, dtype), _at(z), _at(b), _at(out), n, d)]

    def _bias_activation_backward(
        self, dh: Array, z: Array | None, h: Array | None, activation: Activation, out: Array, db: Array
    ) -> list[Launch]:
        n, d, dtype = *self._matrix("dh", dh), dh.dtype
        s = h if activation.needs == "h" else z
        self._require(dtype, **{activation.needs: (s, (n, d))}, out=(out, (n, d)), db=(db, (d,)))
        width = passes.width_of(dtype, d, _at(dh), _at(s), _at(out))
        grid, block = self._cut(n, d, width, dtype)
        source = passes.bias_activation_backward(activation, dtype, width)
        if grid[1] == 1:
            return [self._launch(source, grid, block, _at(dh), _at(s), _at(out), _at(db), n, d)]
        partial = self._room(grid[1] * d, dtype)
        return [
            self._launch(source, grid, block, _at(dh), _at(s), _at(out), _at(partial), n, d, scratch=partial),
            self._column_sum(_at(partial), _at(db), grid[1], d, dtype),
        ]

    def _bias_loss(
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
    ) -> list[Launch]:
        n, d, dtype = *self._matrix("z", z), z.dtype
        indices, weighted, keep = y.ndim == 1 and loss.family == "softmax", weight is not None, _at(out) != _at(z)
        self._require(dtype, b=(b, (d,)), out=(out, (n, d)), db=(db, (d,)))
        self._require(np.dtype(np.int64) if indices else dtype, y=(y, (n,) if indices else (n, d)))
        self._require(np.dtype(np.float64), value=(value, (2,)))
        if weighted:
            self._require(dtype, weight=(weight, (n,)))
        scale = loss.scale(samples or n, d, weighted)
        vectors = (_at(z), _at(b), _at(out)) if indices else (_at(z), _at(b), _at(out), _at(y))
        width = passes.width_of(dtype, d, *vectors)
        inputs = [_at(z), _at(b), _at(y), _at(weight) if weighted else 0, _at(out)]
        first: list[Launch] = []
        if loss.family == "softmax" and d > cuda_softmax.WARP_COLUMNS:
            grid, block = (min(n, self._blocks), 1), (THREADS, 1)
            tall, (sum_grid, sum_block) = n > FEW_ROWS, self._cut_sum(n, d)
            room = self._room(grid[0] + sum_grid[1] * d, dtype)
            losses, count, partial, rows = _at(room), grid[0], _at(out), n
            source = cuda_softmax.softmax_loss_block(loss, dtype, width, indices, weighted, keep)
            numbers = [losses, dtype.type(scale), dtype.type(1 / d), n, d]
            first.append(self._launch(source, grid, block, *inputs, *numbers, scratch=room))
            if tall:
                partial, rows = losses + grid[0] * dtype.itemsize, sum_grid[1]
                first.append(self._launch(passes.column_sum(dtype), sum_grid, sum_block, _at(out), partial, n, d))
        else:
            if loss.family == "softmax":
                block = cuda_softmax.warp_shape(d)
                grid = (1, max(1, min(self._blocks, -(-n // block[1]))))
                source = cuda_softmax.softmax_loss_warp(loss, dtype, d, indices, weighted, keep)
                numbers = [dtype.type(scale), dtype.type(1 / d), n, d]
            else:
                grid, block = self._cut(n, d, width, dtype)
                source = cuda_loss.elementwise_loss(loss, dtype, width, weighted, keep)
                numbers = [dtype.type(scale), n, d]
            count, rows = grid[0] * grid[1], grid[1]
            room = self._room(count + rows * d, dtype)
            losses, partial = _at(room), _at(room) + count * dtype.itemsize
            first.append(self._launch(source, grid, block, *inputs, partial, losses, *numbers, scratch=room))
        growth = float(samples or n) if loss.reduction == "mean" else 1.0
        columns, rows_at_once = passes.block_shape(d, passes.SUM_COLUMNS)
        finish = self._launch(
            cuda_loss.finish_loss(dtype), (-(-d // columns) + 1, 1), (columns, rows_at_once),
            partial, _at(db), losses, _at(value), float(scale), growth, rows, d, count,
        )  # fmt: skip
        return [*first, finish]

    def _normalize_weights(self, weight: Array, out: Array) -> list[Launch]:
        (n,), dtype = weight.shape, check_dtype(weight.dtype)
        self._require(dtype, weight=(weight, (n,)), out=(out, (n,)))
        source = cuda_training.normalize_weights(dtype)
        return [self._launch(source, (1, 1), (THREADS, 1), _at(weight), _at(out), n)]

    def _dropout(
        self, x: Array, rate: float, seed: int, layer: int, counters: Array, out: Array, first_block: int = 0
    ) -> list[Launch]:
        n, dtype = x.size, check_dtype(x.dtype)
        self._require(dtype, x=(x, x.shape), out=(out, x.shape))
        self._require(np.dtype(np.int64), counters=(counters, (2,)))
        source = cuda_training.dropout(dtype, passes.width_of(dtype, 4, _at(x), _at(out)))
        numbers = [keep_threshold(rate), dtype.type(1 / (1 - rate)), *split_seed(seed), layer, n, first_block]
        grid = (self._flat_grid(-(-n // 4)), 1)
        return [self._launch(source, grid, (THREADS, 1), _at(x), _at(out), _at(counters), *numbers)]

    def _accumulate(self, total: Array | None, term: Array, out: Array) -> list[Launch]:
        size, dtype = term.size, check_dtype(term.dtype)
        self._require(dtype, term=(term, (size,)), out=(out, (size,)))
        first, a = total is None, term if total is None else total
        self._require(dtype, total=(a, (size,)))
        width = passes.width_of(dtype, VECTOR_BYTES, _at(a), _at(term), _at(out))
        source = cuda_training.accumulate(dtype, width, first)
        grid = (self._flat_grid(-(-size // width)), 1)
        return [self._launch(source, grid, (THREADS, 1), _at(a), _at(term), _at(out), size)]

    def _gather(self, source: Array, order: Array, counters: Array, out: Array) -> list[Launch]:
        size, rows, n = len(order), len(source), len(out)
        if source.dtype.kind not in "fi" or source.dtype.itemsize not in (4, 8):
            raise TypeError(f"source is an array of {source.dtype}; it must be float32, float64, int32 or int64")
        self._require(source.dtype, source=(source, source.shape), out=(out, (n, *source.shape[1:])))
        self._require(np.dtype(np.int64), order=(order, (size,)), counters=(counters, (2,)))
        d = out.size // n
        floats = np.dtype(f"f{source.dtype.itemsize}")  # a copy keeps the bits, whatever they mean
        width = passes.width_of(floats, d, _at(source), _at(out))
        kernel = cuda_training.gather(storage_of(floats), width)
        arrays = (_at(source), _at(order), _at(counters), _at(out))
        return [self._launch(kernel, *self._cut(n, d, width, floats), *arrays, size, rows, n, d)]

    def _clip(self, gradients: Array, max_norm: float, scalars: Array, loss_scaling: bool) -> list[Launch]:
        size, dtype = gradients.size, check_dtype(gradients.dtype)
        self._require(dtype, gradients=(gradients, (size,)), scalars=(scalars, (8,)))
        if _at(gradients) % 16:
            raise ValueError("gradients must be aligned to 16 bytes, as backend.zeros gives them")
        blocks = self._flat_grid(size * dtype.itemsize // 16 + 1)
        partial = self._room(blocks, dtype)
        block = (THREADS, 1)
        return [
            self._launch(
                cuda_training.sum_of_squares(dtype), (blocks, 1), block, _at(gradients), _at(partial), size,
                scratch=partial,
            ),
            self._launch(
                cuda_training.clip(dtype), (1, 1), block, _at(partial), _at(scalars), dtype.type(max_norm), blocks
            ),
        ]  # fmt: skip

    def _advance(
        self, optimizer: Optimizer, rate: Array, batch: int, counters: Array, scalars: Array, loss_scaling: bool
    ) -> list[Launch]:
        dtype = check_dtype(scalars.dtype)
        self._require(dtype, scalars=(scalars, (8,)))
        self._require(np.dtype(np.float64), rate=(rate, (1,)))
        self._require(np.dtype(np.int64), counters=(counters, (2,)))
        source = cuda_training.advance(optimizer, dtype)
        return [self._launch(source, (1, 1), (1, 1), _at(rate), _at(counters), _at(scalars), int(batch))]

    def _update(
        self,
        optimizer: Optimizer,
        parameters: Array,
        gradients: Array,
        states: Array,
        scalars: Array,
        weights: Array | None,
    ) -> list[Launch]:
        size, dtype = parameters.size, check_dtype(parameters.dtype)
        self._require(dtype, parameters=(parameters, (size,)), gradients=(gradients, (size,)), scalars=(scalars, (8,)))
        pointers = [_at(parameters), _at(gradients)]
        if optimizer.n_states:
            self._require(dtype, states=(states, (optimizer.n_states, size)))
            pointers.append(_at(states))
        width = cuda_training.update_width(optimizer, dtype, size, *pointers)
        source = cuda_training.update(optimizer, dtype, width)
        pointers = [*pointers, 0][:3]
        grid = (self._flat_grid(-(-size // width)), 1)
        return [self._launch(source, grid, (THREADS, 1), *pointers, _at(scalars), size)]

    # Launching.

    def _run(self, launches: Sequence[Launch]) -> None:
        stream = self._stream()
        for one in launches:
            launch(stream, one.config, one.kernel, *one.arguments)

    def _stream(self) -> Stream:
        handle = cupy.cuda.get_current_stream().ptr or LEGACY_STREAM
        stream = self._streams.get(handle)
        if stream is None:
            stream = self._streams[handle] = Stream.from_handle(handle)
        return stream

    def _launch(
        self,
        source: Source,
        grid: tuple[int, int],
        block: tuple[int, int],
        *arguments: Any,
        scratch: Array | None = None,
    ) -> Launch:
        return Launch(launch_config(grid, block), load(source, self._capability), arguments, scratch)

    def _cut(self, n: int, d: int, width: int, dtype: np.dtype[Any]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return grid and block for a matrix (n, d), see :mod:`gpubackprop.kernels.cuda`."""
        bx, by = passes.block_shape(-(-d // width))
        across = -(-d // (bx * width))
        down = min(self._blocks // across, -(-n // (by * passes.rows_in_flight(dtype, width))))
        return (across, max(1, down)), (bx, by)

    def _cut_sum(self, n: int, d: int) -> tuple[tuple[int, int], tuple[int, int]]:
        bx, by = passes.block_shape(d, passes.SUM_COLUMNS)
        across = -(-d // bx)
        return (across, max(1, min(self._blocks // across, -(-n // (4 * by))))), (bx, by)

    def _flat_grid(self, threads: int) -> int:
        return max(1, min(2 * int(self._blocks), -(-threads // THREADS)))

    def _column_sum(self, a: int, out: int, n: int, d: int, dtype: np.dtype[Any]) -> Launch:
        bx, by = passes.block_shape(d, passes.SUM_COLUMNS)
        return self._launch(passes.column_sum(dtype), (-(-d // bx), 1), (bx, by), a, out, n, d)

    def _room(self, size: int, dtype: np.dtype[Any]) -> Array:
        """Return scratch for ``size`` numbers."""
        key = (cupy.cuda.get_current_stream().ptr, dtype)
        room = self._scratch.get(key)
        if room is None or room.size < size:
            room = self._scratch[key] = cupy.empty(-(-size // SCRATCH_STEP) * SCRATCH_STEP, dtype)
        return room

    def _matrix(self, name: str, a: Array) -> tuple[int, int]:
        if a.ndim != 2:
            raise ValueError(f"{name} has shape {a.shape}; it must have rows (samples) and columns")
        self._require(check_dtype(a.dtype), **{name: (a, a.shape)})
        return a.shape  # type: ignore[no-any-return]

    def _require(self, dtype: np.dtype[Any], **arrays: tuple[Array | None, tuple[int, ...]]) -> None:
        """Check what kernels take on trust: kind, place, dtype, shape and order of memory."""
        for name, (a, shape) in arrays.items():
            if not isinstance(a, cupy.ndarray) or a.device != self._device:
                raise TypeError(f"{name} is {type(a).__name__}; it must be an array on {self.device}")
            if a.dtype != dtype or a.shape != shape or not a.flags.c_contiguous:
                raise ValueError(
                    f"{name} is an array {a.shape} of {a.dtype}; it must be {shape} of {dtype}, C-contiguous"
                )
            if a.size == 0:
                raise ValueError(f"{name} is empty: its shape is {a.shape}")


def _at(a: Array | None) -> int:
    assert a is not None
    return int(a.data.ptr)
