"""Sums and maxima over a warp and over a block, in a fixed order."""

from __future__ import annotations

from functools import cache
from typing import Any

from gpubackprop.kernels.cuda.access import device, warp_reductions
from gpubackprop.kernels.cuda.numba import cuda
from gpubackprop.kernels.cuda.storage import WARP
from gpubackprop.kernels.cuda.unroll import static_range, unrolled


@cache
def block_reductions(threads: int, count: int = 0) -> tuple[Any, Any]:
    """Return (sum, max) over a block, in a fixed order; every thread gets the result.

    ``x = reduce(x, shared)`` for one number, with ``shared`` for 32; or, with ``count``, ``reduce(x, shared)`` for as many
    at once in a local array x, with ``shared`` for 32 times as many.
    """
    warps = threads // WARP

    def define(within: Any, between: Any) -> Any:
        def one(x, shared):  # type: ignore[no-untyped-def]
            x = within(x)
            t = cuda.threadIdx.x + cuda.blockDim.x * cuda.threadIdx.y
            if t % 32 == 0:
                shared[t // 32] = x
            cuda.syncthreads()
            x = between(shared[t % warps])
            cuda.syncthreads()  # the next call writes into the same place
            return x

        @unrolled
        def several(x, shared):  # type: ignore[no-untyped-def]
            t = cuda.threadIdx.x + cuda.blockDim.x * cuda.threadIdx.y
            for k in static_range(count):
                x[k] = within(x[k])
                if t % 32 == 0:
                    shared[k * 32 + t // 32] = x[k]
            cuda.syncthreads()
            for k in static_range(count):
                x[k] = between(shared[k * 32 + t % warps])
            cuda.syncthreads()

        return device(several if count else one)

    total, top = map(define, warp_reductions(WARP), warp_reductions(warps))
    return total, top
