"""The CUDA backend: products by cuBLAS, everything else by fused kernels, on CuPy's current stream.

A method makes a list of launches (:mod:`gpubackprop.backends.cuda.launches`); an eager call runs the list at once, a compiled
step keeps it. A compiled step owns its scratch and the workspaces of its products, one for each of its branches, so steps on
different streams do not interfere; one step runs on one stream at a time.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from functools import cached_property
from types import ModuleType
from typing import Any

import cupy
import cupy.cublas
import numpy as np
import numpy.typing as npt
from cuda.core import Stream, launch

from gpubackprop.backends.base import Backend, Call, Run
from gpubackprop.backends.checks import check_arrays
from gpubackprop.backends.cuda import nvtx as ranges
from gpubackprop.backends.cuda.branches import schedule
from gpubackprop.backends.cuda.fusion import Fused, fuse_dropout, fuse_gathers, fuse_products, is_planned
from gpubackprop.backends.cuda.launcher import Launch
from gpubackprop.backends.cuda.launches import Launches
from gpubackprop.backends.memory import DeviceMemoryError
from gpubackprop.definitions import DTYPES, Array, check_precision
from gpubackprop.interop import as_cupy, on_gpu
from gpubackprop.machine.diagnosis import DeviceUnavailableError, installed, missing_dtypes
from gpubackprop.step import Step
from gpubackprop.step.dataflow import Access, spans
from gpubackprop.step.operations import Matmul, Operation

LEGACY_STREAM = 1  # CU_STREAM_LEGACY: the same stream as handle 0, which cuda.core does not take for a stream
PER_THREAD_STREAM = 2  # CU_STREAM_PER_THREAD: one handle for a stream per thread
EPILOGUES = ("auto", "all", "off")
STREAMS = 8  # streams whose wrappers for cuda.core are kept


class Device(cupy.cuda.Device):  # type: ignore[misc]
    """A CUDA device; an out-of-memory error of CuPy in its context becomes DeviceMemoryError."""

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        super().__exit__(kind, error, traceback)
        if isinstance(error, cupy.cuda.memory.OutOfMemoryError):
            needed, (free, _) = error._size, self.memory() or (0, 0)
            raise DeviceMemoryError(
                f"an array of {needed:,} bytes does not fit on cuda:{self.id}: {free:,} are free, perhaps fragmented",
                needed, free,
            ) from None  # fmt: skip

    def memory(self, wanted: int = 0) -> tuple[int, int] | None:
        """See :meth:`gpubackprop.backends.base.Backend.memory`."""
        pool = cupy.get_default_memory_pool()
        if cupy.cuda.get_allocator() not in (pool.malloc, cupy.cuda.memory._malloc):
            return None
        with cupy.cuda.Device(self.id):
            free, total = self._beyond_pool(pool)
            if wanted <= free:
                return free + pool.free_bytes(), total
            pool.free_all_blocks()  # what is left of the pool are fragments between arrays
            return self._beyond_pool(pool)

    def _beyond_pool(self, pool: Any) -> tuple[int, int]:
        """Return the bytes that the pool can still get, and the total."""
        (free, total), limit = cupy.cuda.runtime.memGetInfo(), pool.get_limit()
        return min(free, max(0, limit - pool.total_bytes())) if limit else free, total


class CudaBackend(Backend):
    """See :class:`gpubackprop.backends.base.Backend`.

    Parameters
    ----------
    index : int
        The number of the device, as CUDA counts them.
    matmul_precision : {"float32", "tf32"}
        How float32 matrices are multiplied; TF32 keeps 10 bits of each factor's mantissa, and is off by default.
    epilogues : {"auto", "all", "off"}
        Which products end with the next operation, see :mod:`gpubackprop.backends.cuda.epilogues`.
    single_launch_sums : bool
        Let the last block of the backward kernel add up the bias gradient, instead of a second launch. Its order of sums is
        fixed too. Off until shown to be right and faster on a device: no emulation runs blocks concurrently.
    nvtx : bool, optional
        Name each operation and each launch of a graph on a profiler's timeline; by default where the environment variable
        GPUBACKPROP_NVTX is 1 when the backend is made.

    Raises
    ------
    DeviceUnavailableError
        An option needs nvmath-python.
    """

    xp: ModuleType = cupy
    precisions = ("float32", "tf32")

    def __init__(
        self,
        index: int = 0,
        *,
        matmul_precision: str = "float32",
        epilogues: str = "auto",
        single_launch_sums: bool = False,
        nvtx: bool | None = None,
    ) -> None:
        self.device = f"cuda:{index}"
        self._ranged = ranges.choose(nvtx)
        self._device = Device(index)
        self._launches = Launches(self._device, single_launch_sums)
        self._streams: dict[int, Stream] = {}
        self._thread = threading.local()
        check_precision(matmul_precision)
        if epilogues not in EPILOGUES:
            raise ValueError(f"epilogues is {epilogues!r}; choose from {', '.join(EPILOGUES)}")
        self.matmul_precision = matmul_precision
        self._products: Any = None
        if installed("nvmath-python"):
            from gpubackprop.backends.cuda.epilogues import Epilogues
            from gpubackprop.backends.cuda.products import Products

            self._products = Products(index, tf32=matmul_precision == "tf32")
            self._epilogues: Any = Epilogues(self._products, epilogues)
        elif matmul_precision == "tf32" or epilogues == "all":
            what = "matmul_precision 'tf32'" if matmul_precision == "tf32" else "epilogues 'all'"
            raise DeviceUnavailableError(f"{what} needs nvmath-python; run: pip install nvmath-python")
        missing = missing_dtypes(self._launches.capability)
        self.dtypes = tuple(name for name in DTYPES if name not in missing)

    @cached_property
    def decides_bits(self) -> dict[str, str]:
        properties = cupy.cuda.runtime.getDeviceProperties(self._device.id)
        named = {"nvmath-python": installed("nvmath-python"), "numba-cuda": installed("numba-cuda")}
        cublas = cupy.cuda.cublas.getVersion(cupy.cuda.device.get_cublas_handle())
        return {
            "GPU": properties["name"].decode(), "compute capability": f"{properties['major']}.{properties['minor']}",
            "CuPy": cupy.__version__, "cuBLAS": str(cublas), "epilogues": self._epilogues.mode if self._products else "none",
            "CUDA driver": str(cupy.cuda.runtime.driverGetVersion()), **{name: number or "none" for name, number in named.items()},
        }  # fmt: skip

    def asarray(self, a: Any, dtype: npt.DTypeLike | None = None) -> Array:
        with self._device:
            a = as_cupy(a) if on_gpu(a) else a
            if isinstance(a, cupy.ndarray) and a.device != self._device:
                a = a.copy()
            return cupy.ascontiguousarray(cupy.asarray(a, dtype=dtype))

    def to_numpy(self, a: Array) -> np.ndarray:
        with self._device:
            return cupy.asnumpy(a)  # type: ignore[no-any-return]

    def synchronize(self) -> None:
        self._device.synchronize()

    def active(self) -> Device:
        """Return a context in which this device is the current one; see :mod:`gpubackprop.backends.current`."""
        return self._device

    def queue(self) -> Any:
        """Return what orders work queued on this device now: CuPy's stream, and the thread if each has its own."""
        handle = cupy.cuda.get_current_stream(self._device.id).ptr
        if handle != PER_THREAD_STREAM:
            return handle
        if not hasattr(self._thread, "queue"):
            self._thread.queue = object()  # a later thread may get the same id
        return self._thread.queue

    def memory(self, wanted: int = 0) -> tuple[int, int] | None:
        return self._device.memory(wanted)

    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        with self._device:
            return cupy.zeros(shape, dtype)

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        with self._device:
            return cupy.empty(shape, dtype)

    def execute(self, operation: Operation) -> None:
        self._ranged(operation.name, self._execute)(operation)

    def _execute(self, operation: Operation) -> None:
        with self._device:
            if is_planned(operation):
                function, arguments = self._bind_product(operation, self._launches)
                function(*arguments)
            else:
                self._run(self._launches.of(operation))

    def _cublas(self, a: Array, b: Array, out: Array) -> None:
        """out = a b without a plan, which cannot be captured."""
        if a.dtype.itemsize == 2:
            cupy.matmul(a, b, out=out)
        else:  # cupy.matmul would round to TF32 where the environment variable CUPY_TF32 is set
            cupy.cublas.gemm("N", "N", a, b, out=out)

    def _plan(self, o: Matmul) -> Any:
        """Return cuBLASLt's plan of a product, or None with a warning if it has none."""
        if self._products is None:
            return None
        from gpubackprop.backends.cuda.products import UnsupportedProductError

        try:
            return self._products.plan_for(o.a, o.b, o.out)
        except UnsupportedProductError as error:
            if o.a.dtype.itemsize == 2 and o.out.dtype != o.a.dtype:
                raise  # cuBLAS cannot either
            warnings.warn(f"{error}; cuBLAS computes it, without TF32 and outside CUDA graphs", RuntimeWarning, 3)
            return None

    def bind(self, operation: Operation) -> Call:
        """Return the function of an operation of a step, and its arguments; shapes, kernels and grids are fixed here.

        With nvmath-python it can be captured. It has its own scratch memory.
        """
        check_arrays(self, operation, bound=True)
        with self._device:
            return self._bind(operation, self._launches.for_step())

    def _bind(self, item: Operation | Fused, launches: Launches) -> Call:
        if not is_planned(item):
            return self._ranged(item.name, self._run), (launches.of(item),)
        function, arguments = self._bind_product(item, launches)
        if not arguments:
            self._products.load(function)
        return self._ranged("matmul", function), arguments

    def _bind_product(self, o: Matmul, launches: Launches) -> Call:
        """Return a product by cuBLASLt, bound, with its workspace among the scratch of ``launches``, or one by cuBLAS."""
        plan = self._plan(o)
        if plan is None:
            return self._cublas, (o.a, o.b, o.out)
        return plan.bind(o.a, o.b, o.out, launches.scratch), ()

    def compile(self, step: Step) -> Run:
        """Return the step as CUDA graphs, or, where a product cannot be captured, as a loop over its operations.

        Kernels and products of a kind that has not run yet are loaded; a product is loaded by running it.
        """
        bound = step.bound()
        for operation in bound:
            check_arrays(self, operation, bound=True)
        with self._device:
            operations = fuse_gathers(bound)
            operations = operations if step.keep else fuse_products(fuse_dropout(operations))
            captured = self._products is not None and all(
                self._plan(o) is not None for o in operations if is_planned(o)
            )
            if captured:
                run: Run = self._capture(self._epilogues.fuse(operations), step)
            else:
                launches = self._launches.for_step()
                calls = [self._bind(operation, launches) for operation in operations]

                # it keeps the step: the calls hold only the addresses of its arrays
                def run(times: int = 1, step: Step = step) -> None:
                    with self._device:
                        for _ in range(times):
                            for function, arguments in calls:
                                function(*arguments)

            # allocations are complete, for any stream of the step; waiting for the whole device would fail
            # while another thread captures
            cupy.cuda.get_current_stream().synchronize()
        return run

    def _capture(self, items: Sequence[Operation | Fused], step: Step) -> Run:
        """Return operations as CUDA graphs of two branches, each with a workspace for its products."""
        from gpubackprop.backends.cuda.epilogues import WithEpilogue
        from gpubackprop.backends.cuda.graph import CapturedStep

        branches = [self._launches.for_step() for _ in range(2)]
        # what is called, its launches and memory; products get their workspace when their branch is known
        tasks: list[tuple[Any, list[Launch], Access]] = []
        for item in items:
            if is_planned(item) or isinstance(item, WithEpilogue):
                tasks.append((item, [], Access(spans(item.read), spans(item.written))))
            else:
                tasks += [(item, *task) for task in branches[0].tasks(item)]
        places = schedule([access for _, _, access in tasks])

        products = {
            task: item.plan if isinstance(item, WithEpilogue) else self._plan(item)
            for task, (item, launches, _) in enumerate(tasks)
            if not launches
        }
        for side, branch in enumerate(branches):  # the largest workspace first: the others fit into it
            needed = (plan.workspace for task, plan in products.items() if places[task].side == side)
            branch.scratch(max(needed, default=0), np.dtype(np.uint8))
        calls: list[Call] = []
        accesses: list[Access] = []
        for task, (item, launches, access) in enumerate(tasks):
            if launches:
                calls.append((self._ranged(item.name, self._run), (launches,)))
                accesses.append(access)
                continue
            product = products[task].bind(item.a, item.b, item.out, branches[places[task].side].scratch)
            self._products.load(product)
            calls.append((self._ranged(item.name, product), ()))
            used = () if product.workspace is None else (product.workspace,)
            accesses.append(access._replace(writes=access.writes + spans(used)))
        return CapturedStep(self._device, calls, accesses, step, self._ranged)

    @property
    def epilogue_choices(self) -> list[Any]:
        """For each pair of a product and the operation after it: whether they are fused, and why."""
        return [] if self._products is None else list(self._epilogues.choices.values())

    # Launching. The current device is this one.

    def _run(self, launches: Sequence[Launch]) -> None:
        stream = self._stream()
        for one in launches:
            launch(stream, one.config, one.kernel, *one.arguments)

    def _stream(self) -> Stream:
        """Return CuPy's current stream for cuda.core."""
        if not hasattr(
            self._thread, "ready"
        ):  # a new thread: the default stream alone does not set the driver's context
            cupy.cuda.runtime.setDevice(self._device.id)
            self._thread.ready = True
        handle = cupy.cuda.get_current_stream().ptr or LEGACY_STREAM
        stream = self._streams.get(handle)
        if stream is None:
            if len(self._streams) >= STREAMS:  # most of these streams are gone
                self._streams.clear()
            stream = self._streams[handle] = Stream.from_handle(handle)
        return stream
