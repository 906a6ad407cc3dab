"""CUDA kernels that build a mini-batch: its rows, of all arrays at once, and its normalized weights."""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np

from gpubackprop.kernels.cuda.access import MATH, access, device, read_once
from gpubackprop.kernels.cuda.compile import OCCUPANCY, THREADS, Source, label
from gpubackprop.kernels.cuda.numba import cuda
from gpubackprop.kernels.cuda.parameters import F8, I, P, S, W, Y, declared
from gpubackprop.kernels.cuda.reductions import block_reductions
from gpubackprop.kernels.cuda.storage import STORAGE, compute_type, storage_of
from gpubackprop.kernels.cuda.unroll import static_range, unrolled
from gpubackprop.step.state import CURSOR

ROWS_AT_ONCE = 4
"""Rows in flight per thread of :func:`gather`: their addresses are random."""


@cache
def normalize_weights(dtype: np.dtype[Any], threads: int = THREADS) -> Source:
    """out = weight / sum(weight), or 0 where that is 0; total[0] = the sum.

    One block, in float64: there are only as many weights as rows in a mini-batch.
    """
    storage, real = storage_of(dtype), dtype.type
    zero, one, where = np.float64(0), np.float64(1), MATH.where
    block_sum, block_max = block_reductions(threads)

    @unrolled
    def kernel(weight: P[S], out: P[S], total: P[F8], n: I) -> None:
        warps = cuda.shared.array(32, numba.float64)
        top = zero
        i = numba.int64(cuda.threadIdx.x)
        while i < n:
            w = numba.float64(weight[i])
            top = where(w > top, w, top)
            i += threads
        top = block_max(top, warps)
        top = where(top > zero, top, one)  # relative to the largest, no sum overflows or underflows
        shares = zero
        i = numba.int64(cuda.threadIdx.x)
        while i < n:
            shares = shares + numba.float64(weight[i]) / top
            i += threads
        shares = block_sum(shares, warps)
        if cuda.threadIdx.x == 0:
            total[0] = shares * top
        shares = where(shares == zero, one, shares)
        i = numba.int64(cuda.threadIdx.x)
        while i < n:
            out[i] = real(numba.float64(weight[i]) / top / shares)
            i += threads

    return Source(label("normalize_weights", storage), kernel, declared(kernel, dtype))


@cache
def _gather_rows(storage: str, width: int) -> Any:
    """Return copy(source, out, places, first, n, d, block): rows of one array, for a block of threads."""
    load, store, _, _, _ = access(storage, width)
    real = numba.from_dtype(np.dtype(compute_type(storage)))
    ROWS = ROWS_AT_ONCE

    @unrolled
    def copy(source, out, places, first, n, d, block):  # type: ignore[no-untyped-def]
        r = cuda.local.array(ROWS * width, real)
        column = (block * cuda.blockDim.x + cuda.threadIdx.x) * width
        by = cuda.blockDim.y
        i = first + cuda.threadIdx.y
        if column < d:
            for k in static_range(ROWS):
                if i + k * by < n:
                    load(r, k * width, source, places[cuda.threadIdx.y + k * by] * d + column)
            for k in static_range(ROWS):
                if i + k * by < n:
                    store(out, (i + k * by) * d + column, r, k * width)

    return device(copy)


@cache
def gather(*kinds: tuple[str, int], threads: int = THREADS) -> Source:
    """out[i] = source[order[counters[CURSOR] + i]], i < n, for one to three arrays: X, y and w, or x alone.

    ``kinds`` are their storages and widths; their rows have x_d, y_d and w_d elements. A block takes rows of one array: side by
    side there are x_blocks of them for x, then y_blocks for y, then those for w. ``size`` is the length of ``order`` and ``rows``
    that of the sources; positions beyond them are clamped. A block reads the positions of its rows once, and its threads share
    them.
    """
    fetch = read_once("i8")
    copy_x, copy_y, copy_w = (_gather_rows(*kind) for kind in (*kinds, *kinds[-1:] * 2)[:3])
    several, three = len(kinds) > 1, len(kinds) > 2
    ROWS = ROWS_AT_ONCE

    @unrolled
    def kernel(
        order: P[I], counters: P[I], size: I, rows: I, n: I, x: P[S], x_out: P[S], x_d: I, x_blocks: I,
        y: P[Y], y_out: P[Y], y_d: I, y_blocks: I, w: P[W], w_out: P[W], w_d: I,
    ) -> None:  # fmt: skip
        places = cuda.shared.array(ROWS * threads, numba.int64)
        shared = cuda.shared.array(1, numba.int64)
        cursor = max(min(fetch(counters, CURSOR, shared), size - 1), 0)
        by = cuda.blockDim.y
        block = numba.int64(cuda.blockIdx.x)
        first = numba.int64(cuda.blockIdx.y) * by * ROWS
        while first < n:
            row = numba.int64(cuda.threadIdx.y * cuda.blockDim.x + cuda.threadIdx.x)
            while row < by * ROWS and first + row < n:
                places[row] = max(min(order[min(cursor + first + row, size - 1)], rows - 1), 0)
                row += threads
            cuda.syncthreads()
            if block < x_blocks:
                copy_x(x, x_out, places, first, n, x_d, block)
            if several and block >= x_blocks and block < x_blocks + y_blocks:
                copy_y(y, y_out, places, first, n, y_d, block - x_blocks)
            if three and block >= x_blocks + y_blocks:
                copy_w(w, w_out, places, first, n, w_d, block - x_blocks - y_blocks)
            cuda.syncthreads()
            first += cuda.gridDim.y * by * ROWS

    (x, _), (y, _), (w, _) = (*kinds, *kinds[-1:] * 2)[:3]
    types = declared(kernel, np.dtype(STORAGE[x]), Y=y, W=w)
    name = label("gather", *(f"{storage}_v{width}" for storage, width in kinds))
    # the rows of three arrays in flight would not fit in 64 registers on every device
    return Source(name, kernel, types, threads, OCCUPANCY * (0.75 if three else 1))
