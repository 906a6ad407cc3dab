"""The threads that the libraries of a run may use, and the processors that these run on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gpubackprop.machine.host import VARIABLES

ONE_THREAD_OF_XLA = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
TASKS = Path("/proc/self/task")  # the threads of this process

_limits: list[Any] = []


def limit(threads: int) -> None:
    """Give ``threads`` threads to NumPy, which is loaded, and to every library that is loaded from now on.

    Libraries read their variable when they are loaded: call this before Numba, PyTorch, JAX and the others are imported.
    XLA takes one thread or as many as there are processors, which ``NPROC`` tells it, and has others beside them:
    only :func:`pinned` keeps it to some processors.
    """
    from threadpoolctl import threadpool_limits

    for name in (*VARIABLES, "NPROC"):
        os.environ[name] = str(threads)
    if threads == 1:
        os.environ["XLA_FLAGS"] = ONE_THREAD_OF_XLA
    elif os.environ.get("XLA_FLAGS") == ONE_THREAD_OF_XLA:  # a process with one thread has started this one
        del os.environ["XLA_FLAGS"]
    _limits.append(threadpool_limits(threads))  # in effect as long as it is referenced


def chosen(threads: int) -> list[int] | None:
    """Return the processors for so many threads, or None where a process cannot be kept to some.

    They are the last ones: the first serve most interrupts, and the hardware threads of one core are numbered far apart.
    """
    if not hasattr(os, "sched_setaffinity"):
        return None
    return sorted(os.sched_getaffinity(0))[-threads:]


@contextlib.contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Keep all threads of this process, those of libraries too, and the processes it starts to so many processors."""
    processors = chosen(threads)
    if processors is None:
        yield
        return
    before = os.sched_getaffinity(0)
    _pin(processors)
    try:
        yield
    finally:
        _pin(before)


def _pin(processors: Iterable[int]) -> None:
    for task in map(int, (path.name for path in TASKS.iterdir())) if TASKS.is_dir() else [0]:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(task, processors)
