"""CUDA kernels of the two passes: phi fused with the bias add and dropout, phi' with dropout, the bias gradient
and a narrow product before it.

A function here returns a :class:`~gpubackprop.kernels.cuda.compile.Source`: a kernel over raw pointers and int64 sizes,
built from a definition for one dtype, one vector width and one block size (the simulator needs small ones). Arithmetic on
16-bit numbers is in float32; what a kernel reads or writes as "real" is float32 then, else of the same dtype.

How a matrix (n, d) is split: a *line* is the least number of whole rows whose length is a multiple of the vector width, one
row where d is one. A block is (bx, by) threads; each thread owns ``width`` adjacent elements of a line and strides over
lines. So every access moves 16 bytes for any d; a thread has the same columns throughout, so the bias stays in
registers and column sums need no atomics; and the threads of a warp read adjacent addresses. The last line may be short.
Column sums are taken in a fixed order: each thread its own lines, at most 32 of them, a tree over the block, then
:func:`~gpubackprop.kernels.cuda.column_sums.column_sum` over the blocks and the rows of a line; the same shape on the same device
gives the same bits. In small matrices a block takes whole columns, and its sums are complete.
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
    access,
    access_within,
    device,
    inlined,
    read_once,
)
from gpubackprop.kernels.cuda.column_sums import finish_rows, fold_rows
from gpubackprop.kernels.cuda.compile import THREADS, Source, label, occupancy_of
from gpubackprop.kernels.cuda.dropout import define_dropout
from gpubackprop.kernels.cuda.numba import cuda
from gpubackprop.kernels.cuda.parameters import I, P, R, S, declared
from gpubackprop.kernels.cuda.storage import VECTOR_BYTES, storage_of
from gpubackprop.kernels.cuda.unroll import static_range, unrolled

WIDEST = 32
"""Threads of a block along a line, at most: half a kilobyte of contiguous memory."""


NARROW = 16
"""Columns of a, up to which :func:`narrow_product` computes a w^T: with sums so short, the work is to store them."""


def lines_in_flight(dtype: np.dtype[Any], width: int, busy: bool = False) -> int:
    """Return how many lines a thread loads before it computes: enough bytes in flight to keep the memory busy.

    One where a vector takes many registers (eight 16-bit numbers, or float64, where gelu' would need 163), and where the
    kernel is ``busy`` otherwise: the random numbers of dropout, or a product, are enough work, and take registers too.
    """
    if busy:
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
def narrow_terms(dtype: np.dtype[Any], width: int, threads: int) -> tuple[Any, Any]:
    """Return stage(w, staged, inner, d) and multiply(a, row, staged, inner, out) of a product a w^T, ``inner`` columns each.

    ``staged`` holds the block's rows of w, :data:`WIDEST` * width * :data:`NARROW` numbers; out[: width] are sums of ``inner``
    terms in their order, each added by one fused multiply-add, and rounded as they would be in memory. The loop over the terms
    stays one: unrolled, all numbers of ``staged`` would be kept in registers.
    """
    _, _, load1, _, rounded = access(storage_of(dtype), 1)
    zero, fma = real_of(dtype).type(0), MATH.fma

    @unrolled
    def stage(w, staged, inner, d):  # type: ignore[no-untyped-def]
        bx = cuda.blockDim.x
        first = cuda.blockIdx.x * bx * width
        column = numba.int64(cuda.threadIdx.y * bx + cuda.threadIdx.x)
        while column < bx * width and first + column < d:
            for i in range(inner):  # adjacent threads later read different banks
                staged[(i * width + column % width) * bx + column // width] = load1(w, (first + column) * inner + i)
            column += threads
        cuda.syncthreads()

    @unrolled
    def multiply(a, row, staged, inner, out):  # type: ignore[no-untyped-def]
        bx = cuda.blockDim.x
        for k in static_range(width):
            out[k] = zero
        for i in range(inner):
            t = load1(a, row * inner + i)
            for k in static_range(width):
                out[k] = fma(t, staged[(i * width + k) * bx + cuda.threadIdx.x], out[k])
        for k in static_range(width):
            out[k] = rounded(out[k])

    return device(stage), device(multiply)


@cache
def narrow_product(dtype: np.dtype[Any], width: int, threads: int = THREADS) -> Source:
    """out = a w^T, for a (n, inner) and w (d, inner) of at most :data:`NARROW` columns; ``line`` is d, a multiple of ``width``."""
    _, store, _, _, _ = access(storage_of(dtype), width)
    real = numba.from_dtype(real_of(dtype))
    stage, multiply = narrow_terms(dtype, width, threads)
    STAGED = WIDEST * width * NARROW

    @unrolled
    def kernel(a: P[S], w: P[S], out: P[S], inner: I, size: I, line: I) -> None:
        staged = cuda.shared.array(STAGED, real)
        g = cuda.local.array(width, real)
        stage(w, staged, inner, line)
        column = (cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x) * width
        row = numba.int64(cuda.blockIdx.y * cuda.blockDim.y + cuda.threadIdx.y)
        if column < line:
            while row * line < size:
                multiply(a, row, staged, inner, g)
                store(out, row * line + column, g, 0)
                row += cuda.gridDim.y * cuda.blockDim.y

    name = label("narrow_product", storage_of(dtype), f"v{width}")
    return Source(name, kernel, declared(kernel, dtype), threads, occupancy_of(dtype))


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
            # All loads of a trip precede its stores: out may be z, so the compiler cannot reorder them itself.
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
    product: bool = False,
    threads: int = THREADS,
) -> Source:
    """delta = dh * phi'(s), partial[block row] = its column sums of delta, over a line.

    s is h or z, whichever phi' needs; delta may be dh. With ``dropout``, dh is the gradient of what was dropped. With ``product``,
    the kernel first computes dh, as in :func:`narrow_product`: ``dh`` is the factor (n, inner), ``w`` is (line, inner), and a line
    is one row. ``partial`` is (grid.y, line). With ``finish`` the last block of a column of blocks adds up their sums:
    db[0 : line], and ``tickets``, one number for each such column, 0 before, is 0 again.
    """
    storage, real_dtype = storage_of(dtype), real_of(dtype)
    load, store, _, _, _ = access(storage, width)
    load_within, store_within = access_within(storage, width)
    real, zero, where = numba.from_dtype(real_dtype), real_dtype.type(0), MATH.where
    dphi = inlined(activation.scalars(real_dtype, MATH)[1])
    fold, finish_sums, fetch = fold_rows(width, threads), finish_rows(dtype, width, threads), read_once("i8")
    drop = define_dropout(dtype, width)
    stage, multiply = narrow_terms(dtype, width, threads)
    LINES = lines_in_flight(dtype, width, dropout or product)
    several, STAGED = LINES > 1, WIDEST * width * NARROW

    @unrolled
    def kernel(
        dh: P[S], w: P[S], inner: I, s: P[S], delta: P[S], partial: P[R], db: P[R], tickets: P[I],
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
        if product:
            staged = cuda.shared.array(STAGED, real)
            stage(w, staged, inner, line)
        column = (cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x) * width
        if column < line:
            p = (cuda.blockIdx.y * cuda.blockDim.y + cuda.threadIdx.y) * line + column
            stride = cuda.gridDim.y * cuda.blockDim.y * line
            if product:
                row = numba.int64(cuda.blockIdx.y * cuda.blockDim.y + cuda.threadIdx.y)
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
                if product:
                    multiply(dh, row, staged, inner, g)
                    row += cuda.gridDim.y * cuda.blockDim.y
                else:
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

    flags = ["dropout" * dropout, "finish" * finish, "product" * product]
    name = label("bias_activation_backward", activation.name, storage, f"v{width}", *flags)
    # eight numbers a vector, random numbers for them and the sums of other blocks: gelu' would not fit in 64 registers as well
    occupancy = occupancy_of(dtype) * (0.75 if dropout and finish and dtype.itemsize == 2 else 1)
    return Source(name, kernel, declared(kernel, dtype), threads, occupancy)
