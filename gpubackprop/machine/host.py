"""The processor: its name, how many cores this process may use, and the libraries that run threads on them."""

from __future__ import annotations

import contextlib
import math
import os
import platform
from pathlib import Path
from typing import Any

from gpubackprop.machine.finding import Finding

VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "NUMBA_NUM_THREADS")
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # limits of a container: microseconds of CPU time per period


def processor() -> str:
    """Return the name of the processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def usable() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def blas() -> list[dict[str, Any]]:
    """Return the loaded BLAS and threading libraries, and their threads."""
    from threadpoolctl import threadpool_info

    return [
        {name: entry.get(name) for name in ("user_api", "internal_api", "version", "num_threads", "architecture")}
        | {"file": Path(entry["filepath"]).name}
        for entry in threadpool_info()
    ]


def threads_finding() -> Finding:
    """Return the threads of each library, and whether each has its own processor."""
    libraries = blas()
    named = [f"{b['internal_api']} {b['version'] or ''}".strip() + f" {b['num_threads']} threads" for b in libraries]
    limits = [f"{name}={os.environ[name]}" for name in VARIABLES if os.environ.get(name)]
    text = "; ".join([f"{usable()} processors usable ({processor()})", *named, *limits])
    share = min(_quota(), usable())
    most = max([usable() if not limits else 1, *(b["num_threads"] for b in libraries)])
    if most > math.ceil(share):
        fewer = f"more threads than processors they may use ({share:g}) wait for each other"
        return Finding("threads", "warning", text, fewer, f"export OMP_NUM_THREADS={math.ceil(share)}")
    return Finding("threads", "ok", text)


def _quota() -> float:
    """Return the processors that a container may use, infinity without a limit."""
    with contextlib.suppress(OSError, ValueError):
        most, period = QUOTA.read_text(encoding="utf-8").split()
        return int(most) / int(period)
    return math.inf
