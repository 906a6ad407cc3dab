"""The threads of this process that kernels may use, and a barrier for them inside compiled code."""

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
from gpubackprop.machine.host import VARIABLES, usable

SPIN_LIMIT = 200_000  # loads at a barrier, about 100 microseconds, before a thread sleeps: another may need its core
BACKOFF_US = 20  # microseconds of each sleep
MOST = 1024  # threads in a process; each starts when first needed


@cache
def available_threads() -> int:
    """Return the number of cores that this process may use, or the minimum of the usual environment variables."""
    limits = [os.environ.get(name, "").partition(",")[0].strip() for name in VARIABLES]
    return max(1, min([usable(), *(int(limit) for limit in limits if limit.isdigit() and int(limit) > 0)]))


def _sleep_of_the_system() -> Any:
    """Return sleep(time), in microseconds, or milliseconds on Windows; a yield would return at once on a busy core."""
    function = ctypes.CDLL("kernel32").Sleep if sys.platform == "win32" else ctypes.CDLL(None).usleep
    llvmlite.binding.add_symbol("gpubackprop_sleep", ctypes.cast(function, ctypes.c_void_p).value)
    return types.ExternalFunction("gpubackprop_sleep", types.int32(types.uint32))


_sleep, _BACKOFF = _sleep_of_the_system(), 0 if sys.platform == "win32" else BACKOFF_US


@intrinsic  # type: ignore[untyped-decorator]
def _arrive(typingctx: Any, at: Any) -> Any:
    """Add 1 to the number at an address and return the old value; earlier writes are visible to every thread that sees the sum."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = context.get_value_type(types.int64)
        return builder.atomic_rmw("add", builder.inttoptr(args[0], word.as_pointer()), word(1), "seq_cst")

    return types.int64(types.intp), codegen


@intrinsic  # type: ignore[untyped-decorator]
def _load(typingctx: Any, at: Any) -> Any:
    """Return the number at an address as it is now."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], context.get_value_type(types.int64).as_pointer())
        return builder.load_atomic(pointer, "seq_cst", 8)

    return types.int64(types.intp), codegen


def _barrier_wait(barrier, goal):  # type: ignore[no-untyped-def]
    """Wait until the threads have arrived ``goal`` times in all; return False if another gave up."""
    _arrive(barrier)
    spins = 0
    while _load(barrier) < goal:
        spins += 1
        if spins > SPIN_LIMIT:
            if _load(barrier + 64):  # on the next cache line
                return False
            _sleep(_BACKOFF)
    return True


barrier_wait = helper(_barrier_wait)


@inlined
def is_last(arrived, threads):  # type: ignore[no-untyped-def]
    """Return True in the last thread to arrive, when all others are done; arrived[0] is reset to 0."""
    if threads > 1:
        if _arrive(arrived.ctypes.data) + 1 < threads:
            return False
        arrived[0] = 0
    return True


class ThreadTeam:
    """Threads that run one compiled function together, one call at a time; the caller is the first of them."""

    def __init__(self) -> None:
        self._lock, self._others = threading.Lock(), ThreadPoolExecutor(MOST, "gpubackprop")

    def run(self, function: Callable[[int, int, int, int], object], times: int, threads: int) -> None:
        """Call ``function(thread, threads, barrier, times)`` in ``threads`` threads, and return when all are done.

        ``barrier`` is the address of the barrier that they share.
        """
        barrier = np.zeros(16, np.int64)

        def call(thread: int) -> None:  # it holds the barrier, which must outlive the last waiting thread
            function(thread, threads, barrier.ctypes.data, times)

        with self._lock:
            try:
                others = [self._others.submit(call, thread) for thread in range(1, threads)]
                call(0)
                for other in others:
                    other.result()
            except BaseException:
                barrier[8] = 1  # Ctrl-C came before this thread arrived: the others must not wait for it
                raise


_teams: dict[int, ThreadTeam] = {}


def thread_team() -> ThreadTeam:
    """Return the threads of this process; a forked one has none of its parent's."""
    pid = os.getpid()
    if pid not in _teams:
        _teams.clear()
        _teams[pid] = ThreadTeam()
    return _teams[pid]
