"""What the numbers of a GPU depend on, its timer, its graphs and its copy bandwidth."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import cupy
from timing import Clock, Contestant, Run, Sample, measure, summaries

from gpubackprop.backends.diagnosis import cuda_version, cupy_wheels, installed

PACKAGES = (
    "gpubackprop", "numpy", "numba", "numba-cuda", "cuda-core", "nvmath-python", "nvidia-cublas-cu12", "nvidia-cublas",
    "ml-dtypes", "torch", "triton", "jax", "jaxlib",
)  # fmt: skip
CLOCKS = (
    "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "temperature.gpu", "power.draw",
    "power.limit", "clocks_throttle_reasons.active",
)  # fmt: skip
COPY_BYTES = 1 << 30

Call = tuple[Callable[..., Any], tuple[Any, ...]]


class CudaTimer:
    """Time between two events on a stream, and on the wall until the second has happened."""

    def __init__(self, stream: cupy.cuda.Stream, clock: Clock = time.perf_counter) -> None:
        self.stream, self.clock = stream, clock
        self.begin, self.end = cupy.cuda.Event(), cupy.cuda.Event()

    def __call__(self, run: Run, repeats: int) -> Sample:
        """Return the seconds of ``repeats`` runs on the stream."""
        with self.stream:
            self.stream.synchronize()
            started = self.clock()
            self.begin.record(self.stream)
            for _ in range(repeats):
                run()
            self.end.record(self.stream)
            self.end.synchronize()
            wall = self.clock() - started
        return Sample(cupy.cuda.get_elapsed_time(self.begin, self.end) / 1e3, wall)


def capture(stream: cupy.cuda.Stream, calls: Iterable[Call]) -> Any:
    """Return a graph of the calls, which wait for nothing."""
    with stream:
        stream.begin_capture()
        try:
            for function, arguments in calls:
                function(*arguments)
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is the one to report
                stream.end_capture()
            raise
        return stream.end_capture()


@contextlib.contextmanager
def own_pool() -> Iterator[cupy.cuda.MemoryPool]:
    """Allocate from a pool of one's own: as long as it lives, nobody else gets the addresses that a graph has seen."""
    pool = cupy.cuda.MemoryPool()
    with cupy.cuda.using_allocator(pool.malloc):
        yield pool


def copies_beyond_cache(nbytes: int, most: int) -> int:
    """Return how many sets of arrays to take in turn, so that none is still in the L2 cache when its turn comes again."""
    cache = int(cupy.cuda.Device().attributes["L2CacheSize"])
    return max(2, min(most, -(-2 * cache // max(nbytes, 1)) + 1))


def copier() -> Callable[[Any, Any], Any]:
    """Return a kernel that copies arrays of complex128, the type of 16 bytes that CuPy has."""
    return cupy.ElementwiseKernel("T x", "T y", "y = x", "copy_16_bytes")  # type: ignore[no-any-return]


def copy_graph(stream: cupy.cuda.Stream, nbytes: int, copies: int) -> tuple[Any, list[Any]]:
    """Return a graph that copies ``nbytes`` / 2 from each of some arrays to another, and the arrays."""
    elements, kernel = max(1, nbytes // 32), copier()
    pairs = [(cupy.ones(elements, "D"), cupy.empty(elements, "D")) for _ in range(copies)]
    kernel(*pairs[0])  # compiled outside the capture
    cupy.cuda.Device().synchronize()
    return capture(stream, [(kernel, pair) for pair in pairs]), [kernel, pairs]


def copy_bandwidth(stream: cupy.cuda.Stream, rounds: int, seconds: float, *, dry: bool) -> dict[str, Any]:
    """Measure a large copy from the device to itself; the bytes read and written, over the time.

    Returns
    -------
    dict
        ``kernel`` and ``memcpy`` with their bytes per second and times, and ``bytes_per_second``, the larger of the two.
    """
    free = int(cupy.cuda.runtime.memGetInfo()[0])
    nbytes = 1 << 16 if dry else min(COPY_BYTES, free // 8)
    elements, kernel = nbytes // 16, copier()
    with stream:  # it does not wait for the default stream
        pairs = [(cupy.ones(elements, "D"), cupy.empty(elements, "D")) for _ in range(2)]

    def by_kernel() -> None:
        for source, target in pairs:
            kernel(source, target)

    def by_memcpy() -> None:
        for source, target in pairs:
            target.data.copy_from_device_async(source.data, source.nbytes, stream)

    result: dict[str, Any] = {"bytes_copied": nbytes}
    contestants = []
    for name, run in (("kernel", by_kernel), ("memcpy", by_memcpy)):
        with stream:
            pairs[1][1].fill(0)
            run()
            stream.synchronize()
            if not bool((pairs[1][1] == 1).all()):
                raise SystemExit(f"the copy by {name} is wrong: nothing is measured on this device")
        contestants.append(Contestant(name, run, CudaTimer(stream), units=len(pairs)))
    for name, samples in measure(contestants, rounds, seconds).items():
        found = summaries(samples)
        result[name] = {"bytes_per_second": 2 * nbytes / max(found["device_seconds"]["median"], 1e-12), **found}
    result["bytes_per_second"] = max(result[name]["bytes_per_second"] for name in ("kernel", "memcpy"))
    return result


def clocks(index: int) -> dict[str, str] | None:
    """Return clocks, temperature and power as ``nvidia-smi`` gives them at this moment, or None without it."""
    try:
        bus = cupy.cuda.runtime.deviceGetPCIBusId(index)
        command = ["nvidia-smi", f"--id={bus}", f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError, cupy.cuda.runtime.CUDARuntimeError):
        return None
    values = found.stdout.strip().split(", ")
    return dict(zip(CLOCKS, values, strict=True)) if len(values) == len(CLOCKS) else None


def commit() -> str | None:
    """Return the commit of the source tree, with ``+`` if it was changed since, or None outside of one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def environment(backend: Any) -> dict[str, Any]:
    """Return the device, the driver, the libraries and the settings that the numbers depend on."""
    index = int(backend.device.split(":")[1])
    device, properties = cupy.cuda.Device(index), cupy.cuda.runtime.getDeviceProperties(index)
    runtime = cupy.cuda.runtime.runtimeGetVersion()
    return {
        "gpu": properties["name"].decode(),
        "compute_capability": device.compute_capability,
        "multiprocessors": device.attributes["MultiProcessorCount"],
        "l2_bytes": device.attributes["L2CacheSize"],
        "memory_bytes": properties["totalGlobalMem"],
        "clock_khz": device.attributes.get("ClockRate"),
        "memory_clock_khz": device.attributes.get("MemoryClockRate"),
        "now": clocks(index),
        "cuda_driver": cuda_version(),
        "cuda_runtime": f"{runtime // 1000}.{runtime % 1000 // 10}",
        "cublas": cupy.cuda.cublas.getVersion(cupy.cuda.device.get_cublas_handle()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: installed(name) for name in (*PACKAGES, *cupy_wheels())},
        "tf32": {"gpubackprop": "where dtype is tf32", "cupy": os.environ.get("CUPY_TF32") == "1"},
        "commit": commit(),
    }


def epilogues(backend: Any) -> list[dict[str, Any]]:
    """Return which products end with the next operation, what was measured for each, and why it was chosen."""
    return [dict(vars(choice)) for choice in getattr(backend, "epilogue_choices", [])]
