"""Column sums in a fixed order, without atomics: over the threads of a block, then over blocks."""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np

from gpubackprop.definitions import real_of
from gpubackprop.kernels.cuda.access import access, device, load_current, take_ticket
from gpubackprop.kernels.cuda.compile import THREADS, Source, label
from gpubackprop.kernels.cuda.numba import cuda
from gpubackprop.kernels.cuda.parameters import I, P, R, S, declared
from gpubackprop.kernels.cuda.storage import storage_of
from gpubackprop.kernels.cuda.unroll import static_range, unrolled

SUM_COLUMNS = 8
"""Columns of a block of :func:`column_sum`: 32 bytes of float32, one memory sector, and many rows at once."""
SUM_ROWS = 4
"""Loads in flight per thread of :func:`column_sum`, which is bound by memory, not arithmetic."""


@cache
def fold_rows(width: int, threads: int, adjacent: bool = True) -> Any:
    """Return fold(sums, shared, out, row, line): out[row] = sums over the block's threads of one column.

    Called by all threads of a block, each with the sums of its ``width`` columns, which are adjacent or else blockDim.x
    apart; ``shared`` holds threads * width numbers. ``out`` has rows of ``line`` numbers.
    """

    @unrolled
    def fold(sums, shared, out, row, line):  # type: ignore[no-untyped-def]
        bx = cuda.blockDim.x
        t = cuda.threadIdx.y * bx + cuda.threadIdx.x
        for k in static_range(width):
            shared[k * threads + t] = sums[k]
        cuda.syncthreads()
        half = cuda.blockDim.y // 2
        while half > 0:
            if cuda.threadIdx.y < half:
                for k in static_range(width):
                    shared[k * threads + t] = shared[k * threads + t] + shared[k * threads + t + half * bx]
            cuda.syncthreads()
            half = half // 2
        first = cuda.blockIdx.x * bx * width
        j = numba.int64(t)
        while j < bx * width:
            if first + j < line:  # adjacent threads write adjacent columns
                place = j % width * threads + j // width if adjacent else j // bx * threads + j % bx
                out[row * line + first + j] = shared[place]
            j += threads

    return device(fold)


@cache
def finish_rows(dtype: np.dtype[Any], width: int, threads: int) -> Any:
    """Return finish(sums, shared, partial, out, tickets, line): out = column sums of partial, by the last block to arrive.

    Its order is fixed, whichever block is last: each thread adds up rows of partial, then :func:`fold_rows` the threads.
    """
    fold, zero = fold_rows(width, threads), real_of(dtype).type(0)

    @unrolled
    def finish(sums, shared, partial, out, tickets, line):  # type: ignore[no-untyped-def]
        last = cuda.shared.array(1, numba.int64)
        cuda.threadfence()  # this block's sums, before its ticket
        cuda.syncthreads()
        if cuda.threadIdx.x == 0 and cuda.threadIdx.y == 0:
            last[0] = take_ticket(tickets, numba.int64(cuda.blockIdx.x))
        cuda.syncthreads()
        if last[0] == cuda.gridDim.y - 1:
            cuda.threadfence()
            column = (cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x) * width
            for k in static_range(width):
                sums[k] = zero
            i = numba.int64(cuda.threadIdx.y)
            while i < cuda.gridDim.y:
                for k in static_range(width):
                    if column + k < line:
                        sums[k] = sums[k] + load_current(partial, i * line + column + k)
                i += cuda.blockDim.y
            fold(sums, shared, out, numba.int64(0), line)
            if cuda.threadIdx.x == 0 and cuda.threadIdx.y == 0:
                tickets[cuda.blockIdx.x] = 0

    return device(finish)


@cache
def sum_columns(dtype: np.dtype[Any], threads: int) -> Any:
    """Return sum_columns(a, out, n, d, shared): out[blockIdx.y] = the block's share of the sums over rows of a (n, d)."""
    real_dtype = real_of(dtype)
    zero = real_dtype.type(0)
    real = numba.from_dtype(real_dtype)
    _, _, load1, _, _ = access(storage_of(dtype), 1)
    fold = fold_rows(1, threads)
    ROWS = SUM_ROWS

    @unrolled
    def body(a, out, n, d, shared):  # type: ignore[no-untyped-def]
        sums = cuda.local.array(1, real)
        x = cuda.local.array(ROWS, real)
        for r in static_range(ROWS):
            x[r] = zero
        j = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
        if j < d:
            i = cuda.blockIdx.y * cuda.blockDim.y + cuda.threadIdx.y
            step = cuda.gridDim.y * cuda.blockDim.y
            while i + (ROWS - 1) * step < n:
                for r in static_range(ROWS):
                    x[r] = x[r] + load1(a, (i + r * step) * d + j)
                i += ROWS * step
            while i < n:
                x[0] = x[0] + load1(a, i * d + j)
                i += step
        sums[0] = (x[0] + x[1]) + (x[2] + x[3])
        fold(sums, shared, out, numba.int64(cuda.blockIdx.y), d)

    return device(body)


@cache
def column_sum(dtype: np.dtype[Any], threads: int = THREADS) -> Source:
    """out (grid.y, d) = sums over the rows of a (n, d); with one row of blocks, the complete sum."""
    real = numba.from_dtype(real_of(dtype))
    body = sum_columns(dtype, threads)

    @unrolled
    def kernel(a: P[S], out: P[R], n: I, d: I) -> None:
        shared = cuda.shared.array(threads, real)
        body(a, out, n, d, shared)

    return Source(label("column_sum", storage_of(dtype)), kernel, declared(kernel, dtype), threads)
