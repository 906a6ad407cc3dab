"""The threads of this process that kernels may use, and a meeting point for them inside compiled code."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import llvmlite.binding
import numpy as np
from numba import types
from numba.extending import intrinsic

from gpubackprop.kernels.cpu.compile import helper, inlined

VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "NUMBA_NUM_THREADS")
PATIENCE = (
    200_000  # looks at the meeting point, about 100 microseconds, before a thread sleeps: another may need its core
)
NAP = 20  # microseconds
MOST = 1024  # threads in a process; each is started when it is first needed


@cache
def available_threads() -> int:
    """Return the number of cores that this process may use, or the least that a usual environment variable allows."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = [os.environ.get(name, "").partition(",")[0].strip() for name in VARIABLES]
    return max(1, min([cores, *(int(limit) for limit in limits if limit.isdigit() and int(limit) > 0)]))


def _sleep_of_the_system() -> Any:
    """Return sleep(time), in microseconds, or milliseconds on Windows; a yield would come back at once on a busy core."""
    function = ctypes.CDLL("kernel32").Sleep if sys.platform == "win32" else ctypes.CDLL(None).usleep
    llvmlite.binding.add_symbol("gpubackprop_sleep", ctypes.cast(function, ctypes.c_void_p).value)
    return types.ExternalFunction("gpubackprop_sleep", types.int32(types.uint32))


_sleep, _NAP = _sleep_of_the_system(), 0 if sys.platform == "win32" else NAP


@intrinsic  # type: ignore[untyped-decorator]
def _arrive(typingctx: Any, at: Any) -> Any:
    """Add 1 to the number at an address and return what it was; what was written before is seen by whoever sees the sum."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = context.get_value_type(types.int64)
        return builder.atomic_rmw("add", builder.inttoptr(args[0], word.as_pointer()), word(1), "seq_cst")

    return types.int64(types.intp), codegen


@intrinsic  # type: ignore[untyped-decorator]
def _look(typingctx: Any, at: Any) -> Any:
    """Return the number at an address as it is now."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], context.get_value_type(types.int64).as_pointer())
        return builder.load_atomic(pointer, "seq_cst", 8)

    return types.int64(types.intp), codegen


def _meet(at, goal):  # type: ignore[no-untyped-def]
    """Wait until all threads have come ``goal`` times in all; return False if another gave up."""
    _arrive(at)
    looks = 0
    while _look(at) < goal:
        looks += 1
        if looks > PATIENCE:
            if _look(at + 64):  # a cache line further on
                return False
            _sleep(_NAP)
    return True


meet = helper(_meet)


@inlined
def is_last(arrived, threads):  # type: ignore[no-untyped-def]
    """Return True in the last of the threads that come here, for which all others have done their part; arrived[0] is 0 again."""
    if threads > 1:
        if _arrive(arrived.ctypes.data) + 1 < threads:
            return False
        arrived[0] = 0
    return True


class Team:
    """Threads that run one compiled function together, one call at a time; the caller is the first of them."""

    def __init__(self) -> None:
        self._lock, self._others = threading.Lock(), ThreadPoolExecutor(MOST, "gpubackprop")

    def run(self, function: Callable[[int, int, int, int], object], times: int, threads: int) -> None:
        """Call ``function(thread, threads, meeting, times)`` in each of so many threads, and return when all are done.

        ``meeting`` is the address of their meeting point.
        """
        meeting = np.zeros(16, np.int64)

        def call(thread: int) -> None:  # it holds the meeting point, which must outlive the last who comes there
            function(thread, threads, meeting.ctypes.data, times)

        with self._lock:
            try:
                others = [self._others.submit(call, thread) for thread in range(1, threads)]
                call(0)
                for other in others:
                    other.result()
            except BaseException:
                meeting[8] = 1  # Ctrl-C came before this thread did its part: nobody shall wait for it
                raise


_teams: dict[int, Team] = {}


def team() -> Team:
    """Return the team of this process; a forked one has no threads of its parent's."""
    pid = os.getpid()
    if pid not in _teams:
        _teams.clear()
        _teams[pid] = Team()
    return _teams[pid]
