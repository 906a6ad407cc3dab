"""The devices to measure: array module, timer, memory, and how they run a list of calls."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import gpubackprop as gb
from gpubackprop.bench.timing import Candidate, Clock, Run, Sample, Timer, WallTimer, seconds_now
from gpubackprop.machine.host import usable

Call = tuple[Callable[..., Any], tuple[Any, ...]]

NUMBERS_OF_PAGE = 4096 // 16
MEMORY = "memory"
DEFAULT_CACHE = 32 << 20  # bytes, if the system does not tell


class Host:
    """The CPU."""

    name, on_gpu, xp = "cpu", False, np

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.backend: Any = gb.get_backend("cpu")

    def timer(self) -> Timer:
        """Return a timer for work on this device."""
        return WallTimer(lambda: None)

    def queue(self, name: str, calls: Sequence[Call], units: int = 1) -> Candidate:
        """Return the calls, one after another, as a candidate."""
        return Candidate(name, in_turn(calls), self.timer(), units)

    def scope(self) -> AbstractContextManager[Any]:
        """Return a context in which the arrays of a case are made."""
        return contextlib.nullcontext()

    def synchronize(self) -> None:
        """Do nothing: calls are synchronous."""

    def caches(self) -> dict[str, int]:
        """Return the bytes of each cache of data, by its level."""
        sizes = {name.split()[0]: text.removesuffix("K") for name, text in cache_sizes().items() if "instr" not in name}
        return {name: int(text) << 10 for name, text in sizes.items() if text.isdigit()}

    def cache_bytes(self) -> int:
        """Return the size of the largest cache."""
        return max([DEFAULT_CACHE, *self.caches().values()])

    def copiers(self) -> dict[str, Callable[[Any, Any], object]]:
        """Return the ways of copying an array into another."""
        found: dict[str, Callable[[Any, Any], object]] = {"copyto": np.copyto}
        if self.threads > 1:
            found[f"copyto, {self.threads} threads"] = _copy_in_threads(self.threads)
        return found


class Gpu:
    """A CUDA device; measurements run on a separate stream."""

    on_gpu = True

    def __init__(self, name: str) -> None:
        self.backend: Any = gb.get_backend(name)  # its error names what is missing, CuPy included
        import cupy

        self.name, self.xp = self.backend.device, cupy
        self.index = int(self.name.partition(":")[2])
        self.stream = cupy.cuda.Stream(non_blocking=True)

    def timer(self) -> Timer:
        """Return a timer for work on the stream."""
        return CudaTimer(self.stream)

    def queue(self, name: str, calls: Sequence[Call], units: int = 1) -> Candidate:
        """Return the calls as one graph; they run once before, to be compiled."""
        in_turn(calls)()
        self.stream.synchronize()
        started = time.perf_counter()
        run = keeping(self.capture(calls).launch, calls)
        return Candidate(name, run, self.timer(), units, time.perf_counter() - started)

    def capture(self, calls: Sequence[Call]) -> Any:
        """Return a graph of the calls, which must not wait."""
        with self.stream:
            self.stream.begin_capture()
            try:
                in_turn(calls)()
            except BaseException:
                with contextlib.suppress(Exception):  # the first error is the one to report
                    self.stream.end_capture()
                raise
            return self.stream.end_capture()

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """Make arrays on this stream, in a separate pool: nobody else gets addresses used by a graph."""
        pool = self.xp.cuda.MemoryPool()
        with self.xp.cuda.Device(self.index), self.xp.cuda.using_allocator(pool.malloc), self.stream:
            yield

    def synchronize(self) -> None:
        """Wait for the stream."""
        self.stream.synchronize()

    def caches(self) -> dict[str, int]:
        """Return the bytes of the cache that all multiprocessors share."""
        return {"L2": self.cache_bytes()}

    def cache_bytes(self) -> int:
        """Return the size of the L2 cache."""
        return int(self.xp.cuda.Device(self.index).attributes["L2CacheSize"])

    def copiers(self) -> dict[str, Callable[[Any, Any], object]]:
        """Return the ways of copying an array into another."""
        kernel = self.xp.ElementwiseKernel("T x", "T y", "y = x", "copy_16_bytes")

        def memcpy(target: Any, source: Any) -> None:
            target.data.copy_from_device_async(source.data, source.nbytes, self.stream)

        return {"kernel": lambda target, source: kernel(source, target), "memcpy": memcpy}


Device = Host | Gpu


@cache
def device_of(name: str, threads: int) -> Device:
    """Return a device by its name.

    Raises
    ------
    DeviceUnavailableError
        It cannot be used.
    """
    return Host(threads) if name == "cpu" else Gpu(name)


def cache_sizes() -> dict[str, str]:
    """Return the sizes of the caches of a processor as the system tells them."""
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (read(folder / name) for name in ("level", "type", "size"))
        if level and size:
            found[f"L{level} {(kind or '').lower()}".strip()] = size
    return found


def read(path: Path) -> str | None:
    """Return the content of a system file, or None if there is none."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None


class CudaTimer:
    """Time between two events on a stream, and on the wall until the second has happened."""

    def __init__(self, stream: Any, clock: Clock = seconds_now) -> None:
        import cupy

        self.stream, self.clock, self.elapsed = stream, clock, cupy.cuda.get_elapsed_time
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
        return Sample(self.elapsed(self.begin, self.end) / 1e3, wall)


def in_turn(calls: Sequence[Call]) -> Run:
    """Return a function that makes the calls one after another."""

    def run() -> None:
        for function, arguments in calls:
            function(*arguments)

    return run


def keeping(run: Run, keep: Any) -> Run:
    """Return ``run``, holding ``keep`` too: graphs and calls on a GPU know only the addresses of their arrays."""

    def kept(keep: Any = keep) -> None:
        run()

    return kept


def copies_beyond_cache(device: Device, nbytes: int, most: int) -> int:
    """Return how many sets of arrays to rotate through, so that none is still in the cache at its next turn."""
    return max(2, min(most, -(-2 * device.cache_bytes() // max(nbytes, 1)) + 1))


def level(device: Device, nbytes: int) -> str:
    """Return where arrays of so many bytes are when they are used in turn: the cache that holds them, or memory."""
    for name, size in sorted(device.caches().items(), key=lambda cache: cache[1]):
        if nbytes <= size:
            return name
    return MEMORY if nbytes >= 2 * device.cache_bytes() else "cache and memory"


def copy_pair(device: Device, nbytes: int) -> tuple[Any, Any]:
    """Return a target of zeros and a source of ones, for a copy of this many bytes in 16-byte elements, the widest type.

    Their offsets within a page differ: a C library's copy can be ten times slower if the target begins just after the source.
    """
    elements = max(1, nbytes // 32)
    first = -(-elements // NUMBERS_OF_PAGE) * NUMBERS_OF_PAGE + NUMBERS_OF_PAGE // 4
    block = device.xp.zeros(first + elements, "D")
    block[:elements] = 1
    return block[first:], block[:elements]


def _copy_in_threads(threads: int) -> Callable[[Any, Any], object]:
    pool = ThreadPoolExecutor(min(threads, usable()))

    def copy(target: Any, source: Any) -> None:
        shares = [slice(i * len(source) // threads, (i + 1) * len(source) // threads) for i in range(threads)]
        list(pool.map(lambda share: np.copyto(target[share], source[share]), shares))

    return copy
