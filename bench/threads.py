"""The number of threads that the libraries of a run may use."""

from __future__ import annotations

import os
from typing import Any

from gpubackprop.machine.host import VARIABLES

_limits: list[Any] = []


def limit(threads: int) -> None:
    """Give ``threads`` threads to NumPy, which is loaded, and to every library that is loaded from now on.

    Libraries read their variable when they are loaded: call this before Numba, PyTorch, JAX and the others are imported.
    Only XLA takes one thread or as many as there are processors, which ``NPROC`` tells it.
    """
    from threadpoolctl import threadpool_limits

    for name in (*VARIABLES, "NPROC"):
        os.environ[name] = str(threads)
    if threads == 1:
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    _limits.append(threadpool_limits(threads))  # in effect as long as it is referenced
