"""CUDA kernels of the two passes: phi fused with the bias add and dropout, phi' with dropout and the bias gradient.

A function here returns a :class:`~gpubackprop.kernels.cuda.compile.Source`: a kernel over raw pointers and int64 sizes,
made from a definition for one dtype, one vector width and one block size (the simulator wants small ones). Arrays of 16-bit
numbers are computed with in float32; what a kernel reads or writes as "real" is float32 then, else of the same dtype.

How a matrix (n, d) is cut: a *line* is the least number of whole rows whose length is a multiple of the vector width, one
row where d is one. A block is (bx, by) threads; each thread owns ``width`` neighbouring elements of a line and strides over
lines. So every access moves 16 bytes, whatever d is; a thread meets the same columns throughout, so the bias stays in
registers and column sums need no atomics; and the threads of a warp read neighbouring addresses. The last line may be short.
Column sums are taken in a fixed order: each thread its own lines, at most 32 of them, a tree over the block, then
:func:`column_sum` over the blocks and the rows of a line; the same shape on the same device gives the same bits.
"""

from __future__ import annotations

from functools import cache
from math import gcd
from typing import Any

import numba
import numpy as np

from gpubackprop.activations import Activation
from gpubackprop.definitions import per_definition, real_of
from gpubackprop.kernels.cuda.access import (
    MATH,
    VECTOR_BYTES,
    access,
    access_within,
    device,
    inlined,
    load_current,
    read_once,
    storage_of,
    take_ticket,
    uint32,
    uint64,
)  # fmt: skip
from gpubackprop.kernels.cuda.compile import THREADS, Source, occupancy_of
from gpubackprop.kernels.cuda.numba import cuda
from gpubackprop.kernels.cuda.parameters import I, P, R, S, declared
from gpubackprop.kernels.cuda.unroll import static_range, unrolled
from gpubackprop.philox import define_philox

SUM_COLUMNS = 8
"""Columns of a block of :func:`column_sum`: 32 bytes of float32, the least that memory delivers, and many rows at once."""
SUM_ROWS = 4
"""Loads of a thread of :func:`column_sum` under way at once: it waits for memory, not for arithmetic."""
WIDEST = 32
"""Threads of a block along a line, at most: half a kilobyte of neighbouring memory."""


def lines_in_flight(dtype: np.dtype[Any], width: int, dropout: bool = False) -> int:
    """Return how many lines a thread loads before it computes: enough bytes under way to keep the memory busy.

    One where a vector takes many registers (eight numbers of 16 bits, or float64, where gelu' would need 163), and with
    dropout: random numbers are work enough, and take registers too.
    """
    if dropout:
        return 1
    if width > 1:
        return 2 if dtype.itemsize == 4 else 1
    return 4 if dtype.itemsize < 8 else 2


def block_shape(columns: int, widest: int = WIDEST, threads: int = THREADS) -> tuple[int, int]:
    """Return (bx, by), bx the least power of two that spans the columns, at most ``widest``."""
    bx = min(widest, 1 << (columns - 1).bit_length())
    return bx, threads // bx


def width_of(dtype: np.dtype[Any], *addresses: int) -> int:
    """Return how many elements one access moves: 16 bytes where addresses allow it, else one element."""
    return 1 if any(a % VECTOR_BYTES for a in addresses) else VECTOR_BYTES // dtype.itemsize


def rows_of_line(width: int, d: int) -> int:
    """Return the least number of rows of d elements whose length is a multiple of ``width``."""
    return width // gcd(width, d)


def label(*parts: object) -> str:
    """Return the name of a kernel, as in ``bias_activation_backward_relu_f4_v4``."""
    return "_".join(str(part) for part in parts if part != "")


@cache
def stage_bias(dtype: np.dtype[Any], width: int, threads: int) -> Any:
    """Return stage(b, staged, bias, line, d): bias[k] = b of the thread's k-th column, read once by its block."""
    _, _, load1, _, _ = access(storage_of(dtype), 1)

    @unrolled
    def stage(b, staged, bias, line, d):  # type: ignore[no-untyped-def]
        first = cuda.blockIdx.x * cuda.blockDim.x * width
        j = numba.int64(cuda.threadIdx.y * cuda.blockDim.x + cuda.threadIdx.x)
        while j < cuda.blockDim.x * width and first + j < line:
            column = first + j
            while column >= d:  # the line has a few rows at most
                column -= d
            staged[j] = load1(b, column)
            j += threads
        cuda.syncthreads()
        for k in static_range(width):
            bias[k] = staged[cuda.threadIdx.x * width + k]

    return device(stage)


@cache
def define_dropout(dtype: np.dtype[Any], width: int) -> Any:
    """Return drop(x, offset, e, step, layer, bound, scale, low, high, first): dropout of x[offset : offset + width].

    They are the elements from e on, a multiple of ``width``; four share a block of random numbers, the first of which is
    block ``first``. Numbers are rounded to memory's type before and after, as if they came from there and went there.
    """
    philox, where = inlined(define_philox(uint32, uint64)), MATH.where
    rounded = access(storage_of(dtype), 1).rounded
    zero = real_of(dtype).type(0)
    blocks, whole = max(1, width // 4), width >= 4

    @inlined
    def kept(w: Any, bound: Any, x: Any, scale: Any) -> Any:
        return where(w < uint32(bound), rounded(rounded(x) * scale), zero)

    @unrolled
    def drop(x, offset, e, step, layer, bound, scale, low, high, first):  # type: ignore[no-untyped-def]
        for q in static_range(blocks):
            block = first + (e >> 2) + q
            w0, w1, w2, w3 = philox(
                uint32(block), uint32(block >> 32), uint32(step), uint32(layer), uint32(low), uint32(high)
            )
            if whole:
                x[offset + 4 * q] = kept(w0, bound, x[offset + 4 * q], scale)
                x[offset + 4 * q + 1] = kept(w1, bound, x[offset + 4 * q + 1], scale)
                x[offset + 4 * q + 2] = kept(w2, bound, x[offset + 4 * q + 2], scale)
                x[offset + 4 * q + 3] = kept(w3, bound, x[offset + 4 * q + 3], scale)
            else:
                for k in static_range(width):
                    i = (e + k) & 3
                    w = where(i == 0, w0, where(i == 1, w1, where(i == 2, w2, w3)))
                    x[offset + k] = kept(w, bound, x[offset + k], scale)

    return inlined(drop)


@per_definition(lambda dtype: MATH)
def bias_activation_forward(
    activation: Activation,
    dtype: np.dtype[Any],
    width: int,
    keep: bool,
    dropout: bool = False,
    output: bool = True,
    threads: int = THREADS,
) -> Source:
    """out = phi(z + b).

    With ``keep`` also z <- z + b; without it ``out`` may be ``z``. With ``dropout`` also dropped = dropout(out), see
    :func:`define_dropout`; without ``output`` only that. size = n d; ``line`` is the length of a line.
    """
    storage, real_dtype = storage_of(dtype), real_of(dtype)
    load, store, _, _, _ = access(storage, width)
    load_within, store_within = access_within(storage, width)
    real = numba.from_dtype(real_dtype)
    phi = inlined(activation.scalars(real_dtype, MATH)[0])
    stage, fetch = stage_bias(dtype, width, threads), read_once("i8")
    drop, STAGED = define_dropout(dtype, width), WIDEST * width
    LINES = lines_in_flight(dtype, width, dropout)
    several = LINES > 1

    @unrolled
    def kernel(
        z: P[S], b: P[S], out: P[S], dropped: P[S],
        counters: P[I], bound: I, scale: R, low: I, high: I, layer: I, first: I, size: I, line: I, d: I,
    ) -> None:  # fmt: skip
        staged = cuda.shared.array(STAGED, real)
        shared_step = cuda.shared.array(1, numba.int64)
        bias = cuda.local.array(width, real)
        o = cuda.local.array(LINES * width, real)
        h = cuda.local.array(LINES * width, real)
        step = numba.int64(0)
        if dropout:
            step = fetch(counters, 0, shared_step)
        stage(b, staged, bias, line, d)
        column = (cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x) * width
        if column < line:
            p = (cuda.blockIdx.y * cuda.blockDim.y + cuda.threadIdx.y) * line + column
            stride = cuda.gridDim.y * cuda.blockDim.y * line
            # All loads of a trip come before its stores: out may be z, so the compiler cannot reorder them itself.
            if several:
                while p + (LINES - 1) * stride + width <= size:
                    for r in static_range(LINES):
                        load(o, r * width, z, p + r * stride)
                    for r in static_range(LINES):
                        for k in static_range(width):
                            o[r * width + k] = o[r * width + k] + bias[k]
                            h[r * width + k] = phi(o[r * width + k])
                    for r in static_range(LINES):
                        if keep:
                            store(z, p + r * stride, o, r * width)
                        if output:
                            store(out, p + r * stride, h, r * width)
                    p += LINES * stride
            while p < size:  # the last rows, and the end of a short line
                load_within(o, 0, z, p, size)
                for k in static_range(width):
                    o[k] = o[k] + bias[k]
                    h[k] = phi(o[k])
                if keep:
                    store_within(z, p, o, 0, size)
                if output:
                    store_within(out, p, h, 0, size)
                if dropout:
                    drop(h, 0, p, step, layer, bound, scale, low, high, first)
                    store_within(dropped, p, h, 0, size)
                p += stride

    flags = ["keep" * keep, "dropout" * dropout, "only" * (not output)]
    name = label("bias_activation_forward", activation.name, storage, f"v{width}", *flags)
    return Source(name, kernel, declared(kernel, dtype), threads, occupancy_of(dtype))


@per_definition(lambda dtype: MATH)
def bias_activation_backward(
    activation: Activation,
    dtype: np.dtype[Any],
    width: int,
    dropout: bool = False,
    finish: bool = False,
    threads: int = THREADS,
) -> Source:
    """delta = dh * phi'(s), partial[block row] = its column sums of delta, over a line.

    s is h or z, whichever phi' needs; delta may be dh. With ``dropout``, dh is the gradient of what was dropped. ``partial`` is
    (grid.y, line). With ``finish`` the last block of a column of blocks adds up their sums: db[0 : line], and ``tickets``, one
    number for each such column, 0 before, is 0 again.
    """
    storage, real_dtype = storage_of(dtype), real_of(dtype)
    load, store, _, _, _ = access(storage, width)
    load_within, store_within = access_within(storage, width)
    real, zero, where = numba.from_dtype(real_dtype), real_dtype.type(0), MATH.where
    dphi = inlined(activation.scalars(real_dtype, MATH)[1])
    fold, finish_sums, fetch = fold_rows(width, threads), finish_rows(dtype, width, threads), read_once("i8")
    drop = define_dropout(dtype, width)
    LINES = lines_in_flight(dtype, width, dropout)
    several = LINES > 1

    @unrolled
    def kernel(
        dh: P[S], s: P[S], delta: P[S], partial: P[R], db: P[R], tickets: P[I],
        counters: P[I], bound: I, scale: R, low: I, high: I, layer: I, first: I, size: I, line: I,
    ) -> None:  # fmt: skip
        shared = cuda.shared.array(threads * width, real)
        shared_step = cuda.shared.array(1, numba.int64)
        sums = cuda.local.array(width, real)
        g = cuda.local.array(LINES * width, real)
        at = cuda.local.array(LINES * width, real)
        for k in static_range(width):
            sums[k] = zero
        step = numba.int64(0)
        if dropout:
            step = fetch(counters, 0, shared_step)
        column = (cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x) * width
        if column < line:
            p = (cuda.blockIdx.y * cuda.blockDim.y + cuda.threadIdx.y) * line + column
            stride = cuda.gridDim.y * cuda.blockDim.y * line
            if several:
                while p + (LINES - 1) * stride + width <= size:
                    for r in static_range(LINES):
                        load(g, r * width, dh, p + r * stride)
                    for r in static_range(LINES):
                        load(at, r * width, s, p + r * stride)
                    for r in static_range(LINES):
                        for k in static_range(width):
                            g[r * width + k] = g[r * width + k] * dphi(at[r * width + k], at[r * width + k])
                    for r in static_range(LINES):
                        store(delta, p + r * stride, g, r * width)
                    for r in static_range(LINES):
                        for k in static_range(width):
                            sums[k] = sums[k] + g[r * width + k]
                    p += LINES * stride
            while p < size:  # the last rows, and the end of a short line
                load_within(g, 0, dh, p, size)
                load_within(at, 0, s, p, size)
                if dropout:
                    drop(g, 0, p, step, layer, bound, scale, low, high, first)
                for k in static_range(width):
                    g[k] = g[k] * dphi(at[k], at[k])
                    sums[k] = sums[k] + where(p + k < size, g[k], zero)
                store_within(delta, p, g, 0, size)
                p += stride
        fold(sums, shared, partial, numba.int64(cuda.blockIdx.y), line)
        if finish:
            finish_sums(sums, shared, partial, db, tickets, line)

    flags = ["dropout" * dropout, "finish" * finish]
    name = label("bias_activation_backward", activation.name, storage, f"v{width}", *flags)
    # eight numbers a vector, random numbers for them and the sums of other blocks: gelu' would not fit in 64 registers as well
    occupancy = occupancy_of(dtype) * (0.75 if dropout and finish and dtype.itemsize == 2 else 1)
    return Source(name, kernel, declared(kernel, dtype), threads, occupancy)


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
            if first + j < line:  # neighbouring threads write neighbouring columns
                place = j % width * threads + j // width if adjacent else j // bx * threads + j % bx
                out[row * line + first + j] = shared[place]
            j += threads

    return device(fold)


@cache
def finish_rows(dtype: np.dtype[Any], width: int, threads: int) -> Any:
    """Return finish(sums, shared, partial, out, tickets, line): out = column sums of partial, by the last block to arrive.

    Its order is fixed, whichever block is the last: each thread adds up rows of partial, then :func:`fold_rows` the threads.
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
    """out (grid.y, d) = sums over the rows of a (n, d); with one row of blocks the whole sum."""
    real = numba.from_dtype(real_of(dtype))
    body = sum_columns(dtype, threads)

    @unrolled
    def kernel(a: P[S], out: P[R], n: I, d: I) -> None:
        shared = cuda.shared.array(threads, real)
        body(a, out, n, d, shared)

    return Source(label("column_sum", storage_of(dtype)), kernel, declared(kernel, dtype), threads)
