"""The threads of this process that kernels may use."""

from __future__ import annotations

import os
import threading
from functools import cache
from typing import Protocol

import numpy as np

from gpubackprop.definitions import aligned_zeros
from gpubackprop.kernels.cpu import atomics
from gpubackprop.kernels.cpu.compile import Kernel, compiled, inlined
from gpubackprop.machine.host import VARIABLES, usable

MOST = 1024  # threads that kernels use


@cache
def available_threads() -> int:
    """Return the number of cores that this process may use, or the minimum of the usual environment variables."""
    limits = [os.environ.get(name, "").partition(",")[0].strip() for name in VARIABLES]
    return max(1, min([usable(), MOST, *(int(limit) for limit in limits if limit.isdigit() and int(limit) > 0)]))


@inlined
def is_last(arrived, pieces):  # type: ignore[no-untyped-def]
    """Return True in the last piece to arrive, when all others are done; arrived[0] is reset to 0."""
    if pieces > 1:
        if atomics.add(arrived.ctypes.data, 1) + 1 < pieces:
            return False
        arrived[0] = 0
    return True


class Job(Protocol):
    """What several threads may do together."""

    def help(self, thread: int) -> None:
        """Take part as thread number 1, 2, ..., and return when nothing is left to take."""
        ...


@cache
def _sleeper() -> Kernel:
    """Return kernel(calls): wait until the number of calls is no longer ``piece``."""

    def wait_for_call(calls, piece, pieces):  # type: ignore[no-untyped-def]
        at = calls.ctypes.data
        while atomics.load(at) == piece:
            atomics.sleep(at, piece)

    return compiled(wait_for_call)


class Crew:
    """Threads that sleep in compiled code until they are called to a job.

    Attributes
    ----------
    calls : array, shape (1,), int64
        Compiled code calls them: it adds 1 and wakes who sleeps on it. So the job has begun when they come.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()  # held during a job
        self.calls = aligned_zeros((1,), np.int64)
        self._wait, _, self._block = _sleeper().bind((self.calls,))
        self._job: Job | None = None
        self._size = 1  # with the caller

    def begin(self, job: Job, threads: int) -> None:
        """Name the job to which the next call of compiled code calls; the caller holds the lock."""
        self._job = job
        while self._size < threads:
            threading.Thread(target=self._serve, args=(self._size, int(self.calls[0])), daemon=True).start()
            self._size += 1

    def end(self) -> None:
        """Forget the job; a thread that is late for it may still hold it for a while."""
        self._job = None

    def _serve(self, thread: int, seen: int) -> None:
        while True:
            self._wait(self._block.ctypes.data, seen, 0)
            seen = int(self.calls[0])
            job = self._job  # it holds the arrays while compiled code has their addresses
            if job is not None:
                job.help(thread)
            del job


_crews: dict[int, Crew] = {}


def crew() -> Crew:
    """Return the threads of this process; a forked one has none of its parent's."""
    pid = os.getpid()
    if pid not in _crews:
        _crews.clear()
        _crews[pid] = Crew()
    return _crews[pid]
