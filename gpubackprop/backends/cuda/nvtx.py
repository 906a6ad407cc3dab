"""Named ranges on the timeline of a profiler (NVTX, as in Nsight Systems), off by default.

A range is work of the host: the queueing of an operation, its capture, or the launch of a graph. When off it costs nothing:
functions are wrapped when a backend or a step is made.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import cupy

from gpubackprop.machine.diagnosis import DeviceUnavailableError

F = TypeVar("F", bound=Callable[..., Any])
Ranged = Callable[[str, F], F]


def choose(nvtx: bool | None) -> Ranged[Any]:
    """Return :func:`ranged` or :func:`plain`; None reads the environment variable GPUBACKPROP_NVTX."""
    if nvtx is None:
        nvtx = os.environ.get("GPUBACKPROP_NVTX", "0") not in ("", "0")
    if nvtx and not cupy.cuda.nvtx.available:
        raise DeviceUnavailableError("NVTX ranges need a CuPy that was built with NVTX; unset GPUBACKPROP_NVTX")
    return ranged if nvtx else plain


def plain(name: str, function: F) -> F:
    """Return the function itself."""
    return function


def ranged(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that does the same within a range of this name."""
    push, pop = cupy.cuda.nvtx.RangePush, cupy.cuda.nvtx.RangePop

    def within(*arguments: Any, **options: Any) -> Any:
        push(name)
        try:
            return function(*arguments, **options)
        finally:
            pop()

    return within
