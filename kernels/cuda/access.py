"""Access to memory 16 bytes at a time, and the functions a definition may use on the GPU, on a device or in Numba's simulator.

The functions come from :mod:`gpubackprop.kernels.cuda.intrinsics` or, in the simulator, :mod:`gpubackprop.kernels.cuda.simulated`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from gpubackprop.kernels.cuda.numba import SIMULATED, cuda
from gpubackprop.kernels.cuda.storage import compute_type
from gpubackprop.kernels.cuda.unroll import static_range, unrolled

if SIMULATED:
    from gpubackprop.kernels.cuda.simulated import (
        MATH,
        access,
        device,
        inlined,
        load_current,
        take_ticket,
        uint32,
        uint64,
        warp_reductions,
    )
else:
    from gpubackprop.kernels.cuda.intrinsics import (
        MATH,
        access,
        device,
        inlined,
        load_current,
        take_ticket,
        uint32,
        uint64,
        warp_reductions,
    )

__all__ = [
    "MATH",
    "access",
    "access_within",
    "device",
    "inlined",
    "load_current",
    "read_once",
    "take_ticket",
    "uint32",
    "uint64",
    "warp_reductions",
]


@cache
def read_once(storage: str) -> Any:
    """Return read(p, i, shared) -> p[i], fetched by one thread of the block for all; ``shared`` holds a number."""
    _, _, load1, _, _ = access(storage, 1)

    def read(p, i, shared):  # type: ignore[no-untyped-def]
        if cuda.threadIdx.x == 0 and cuda.threadIdx.y == 0:
            shared[0] = load1(p, i)
        cuda.syncthreads()
        x = shared[0]
        cuda.syncthreads()  # the next call writes to the same place
        return x

    return device(read)


@cache
def access_within(storage: str, width: int) -> tuple[Any, Any]:
    """Return load(buffer, offset, p, i, size) and store(p, i, buffer, offset, size): those of :func:`access` for ``size`` elements.

    Elements beyond it are loaded as 0 and not stored.
    """
    load, store, load1, store1, _ = access(storage, width)
    zero, vector = compute_type(storage)(0), width > 1

    @unrolled
    def load_within(buffer, offset, p, i, size):  # type: ignore[no-untyped-def]
        if i + width <= size:
            load(buffer, offset, p, i)
        elif vector:
            for k in static_range(width):
                buffer[offset + k] = zero
                if i + k < size:
                    buffer[offset + k] = load1(p, i + k)

    @unrolled
    def store_within(p, i, buffer, offset, size):  # type: ignore[no-untyped-def]
        if i + width <= size:
            store(p, i, buffer, offset)
        elif vector:
            for k in static_range(width):
                if i + k < size:
                    store1(p, i + k, buffer[offset + k])

    return inlined(load_within), inlined(store_within)
