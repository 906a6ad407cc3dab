"""The twins of :mod:`gpubackprop.kernels.cuda.intrinsics` for Numba's simulator (``NUMBA_ENABLE_CUDASIM=1``).

Pointers are flat NumPy arrays there, and warp shuffles, which the simulator lacks, go through shared memory: kernels call them
with all threads of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from operator import methodcaller
from typing import Any

import numba
import numpy as np

from gpubackprop.definitions import NUMPY
from gpubackprop.kernels.cuda.numba import cuda
from gpubackprop.kernels.cuda.storage import STORAGE, Access, compute_type


def inlined(function: Callable[..., Any]) -> Any:
    """Return a scalar function as kernels call it."""
    return function


def device(function: Callable[..., Any]) -> Any:
    """Return a function that kernels call with all threads of a block."""
    return cuda.jit(device=True)(function)


def _where(condition: Any, a: Any, b: Any) -> Any:
    return a if condition else b


MATH = NUMPY._replace(where=_where)


def uint32(x: Any) -> Any:
    """Return the low 32 bits of an integer."""
    return np.uint32(int(x) & 0xFFFFFFFF)


uint64 = np.uint64


def _from_bf16(bits: Any) -> Any:
    return (np.uint32(bits) << np.uint32(16)).view(np.float32)


def _to_bf16(x: Any) -> Any:
    bits = int(np.float32(x).view(np.uint32))
    return np.uint16(0x7FFF if x != x else (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)


@cache
def access(storage: str, width: int) -> Access:
    """Return the loads and stores of one storage type; width is a power of two."""
    narrow, wide = STORAGE[storage], compute_type(storage)
    get = _from_bf16 if storage == "bf16" else wide
    put = _to_bf16 if storage == "bf16" else narrow

    def load(buffer: Any, offset: int, p: Any, i: int) -> None:
        for k in range(width):
            buffer[offset + k] = get(p[i + k])

    def store(p: Any, i: int, buffer: Any, offset: int) -> None:
        for k in range(width):
            p[i + k] = put(buffer[offset + k])

    def load1(p: Any, i: int) -> Any:
        return get(p[i])

    def store1(p: Any, i: int, x: Any) -> None:
        p[i] = put(x)

    def rounded(x: Any) -> Any:
        return get(put(x))

    return Access(load, store, load1, store1, rounded)


def load_current(p: Any, i: int) -> Any:
    """Return p[i] as other blocks have written it."""
    return p[i]


def take_ticket(p: Any, i: int) -> Any:
    """Return p[i] and add 1 to it, atomically."""
    ticket = p[i]  # blocks run one after another here
    p[i] = ticket + 1
    return ticket


@cache
def warp_reductions(lanes: int) -> tuple[Any, Any]:
    """Return (sum, max) over groups of ``lanes`` adjacent threads; every thread gets the result."""

    def reduction(of_group: Callable[[Any], Any]) -> Any:
        def reduced(x):  # type: ignore[no-untyped-def]
            shared = cuda.shared.array(1024, numba.float64)
            t = cuda.threadIdx.x + cuda.blockDim.x * cuda.threadIdx.y
            shared[t] = x
            cuda.syncthreads()
            result = x.dtype.type(of_group(shared[t // lanes * lanes : t // lanes * lanes + lanes]))
            cuda.syncthreads()
            return result

        return device(reduced)

    return reduction(methodcaller("sum")), reduction(methodcaller("max"))
