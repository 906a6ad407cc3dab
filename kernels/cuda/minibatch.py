"""CUDA kernels that build a mini-batch: its rows, and its normalized weights."""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np

from gpubackprop.kernels.cuda.access import MATH, access, read_once
from gpubackprop.kernels.cuda.compile import THREADS, Source, label
from gpubackprop.kernels.cuda.numba import cuda
from gpubackprop.kernels.cuda.parameters import F8, I, P, S, declared
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
def gather(storage: str, width: int, threads: int = THREADS) -> Source:
    """out[i] = source[order[counters[CURSOR] + i]], i < n.

    ``size`` is the length of ``order`` and ``rows`` that of ``source``; positions beyond them are clamped. The block
    reads the positions of its rows once, and its threads share them.
    """
    load, store, _, _, _ = access(storage, width)
    real = numba.from_dtype(np.dtype(compute_type(storage)))
    fetch = read_once("i8")
    ROWS = ROWS_AT_ONCE

    @unrolled
    def kernel(
        source: P[S], order: P[I], counters: P[I], out: P[S], size: I, rows: I, n: I, d: I,
    ) -> None:  # fmt: skip
        places = cuda.shared.array(ROWS * threads, numba.int64)
        shared = cuda.shared.array(1, numba.int64)
        r = cuda.local.array(ROWS * width, real)
        cursor = max(min(fetch(counters, CURSOR, shared), size - 1), 0)
        column = (cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x) * width
        by = cuda.blockDim.y
        first = numba.int64(cuda.blockIdx.y) * by * ROWS
        while first < n:
            row = numba.int64(cuda.threadIdx.y * cuda.blockDim.x + cuda.threadIdx.x)
            while row < by * ROWS and first + row < n:
                places[row] = max(min(order[min(cursor + first + row, size - 1)], rows - 1), 0)
                row += threads
            cuda.syncthreads()
            i = first + cuda.threadIdx.y
            if column < d:
                for k in static_range(ROWS):
                    if i + k * by < n:
                        load(r, k * width, source, places[cuda.threadIdx.y + k * by] * d + column)
                for k in static_range(ROWS):
                    if i + k * by < n:
                        store(out, (i + k * by) * d + column, r, k * width)
            cuda.syncthreads()
            first += cuda.gridDim.y * by * ROWS

    types = declared(kernel, np.dtype(STORAGE[storage]))
    return Source(label("gather", storage, f"v{width}"), kernel, types, threads)
