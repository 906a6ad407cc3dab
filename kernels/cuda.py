"""CUDA kernels of the two passes: phi fused with the bias add, phi' fused with the bias gradient, and sums over rows.

A function here returns a :class:`~gpubackprop.kernels.cuda_launch.Source`: a kernel over raw pointers and int64 sizes,
made from a definition for one dtype, one vector width and one block size (the simulator wants small ones).

How a matrix (n, d) is cut: a block is (bx, by) threads, each thread owns ``width`` neighbouring columns and strides over
rows, so the bias stays in registers and column sums need no atomics. Threads of a warp read neighbouring addresses, for
narrow matrices over several rows. Column sums are taken in a fixed order: each thread its own rows, a tree over the block,
then :func:`column_sum` over the blocks; the same shape on the same device gives the same bits.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np
from numba import cuda

from gpubackprop.activations import Activation
from gpubackprop.kernels.cuda_launch import THREADS, Source
from gpubackprop.kernels.cuda_unroll import static_range, unrolled
from gpubackprop.kernels.cuda_vector import MATH, VECTOR_BYTES, access, device, inlined, storage_of

SUM_COLUMNS = 8
"""Columns of a block of :func:`column_sum`: 32 bytes of float32, the least that memory delivers, and many rows at once."""


def rows_in_flight(dtype: np.dtype[Any], width: int) -> int:
    """Return how many rows a thread loads before it computes: enough bytes under way to keep the memory busy.

    Half as many in float64, whose loads are as wide: with two rows, gelu' takes 163 registers on sm_90.
    """
    return (2 if width > 1 else 4) // (dtype.itemsize // 4)


def block_shape(columns: int, widest: int = 32, threads: int = THREADS) -> tuple[int, int]:
    """Return (bx, by), bx the least power of two that spans the columns, at most ``widest``."""
    bx = min(widest, 1 << (columns - 1).bit_length())
    return bx, threads // bx


def width_of(dtype: np.dtype[Any], columns: int, *addresses: int) -> int:
    """Return how many elements one access moves: 16 bytes where rows and addresses allow it, else one element."""
    width = VECTOR_BYTES // dtype.itemsize
    return width if columns % width == 0 and not any(a % VECTOR_BYTES for a in addresses) else 1


def label(*parts: object) -> str:
    """Return the name of a kernel, as in ``bias_activation_backward_relu_f4_v4``."""
    return "_".join(str(part) for part in parts if part != "")


@cache
def bias_activation_forward(
    activation: Activation, dtype: np.dtype[Any], width: int, keep: bool, threads: int = THREADS
) -> Source:
    """kernel(z, b, out, n, d): out = phi(z + b); with ``keep`` also z <- z + b. ``out`` may be ``z`` without ``keep``."""
    storage = storage_of(dtype)
    load, store, _, _ = access(storage, width)
    real = numba.from_dtype(dtype)
    phi = inlined(activation.scalars(dtype, MATH)[0])
    ROWS = rows_in_flight(dtype, width)

    @unrolled
    def kernel(z, b, out, n, d):  # type: ignore[no-untyped-def]
        column = (cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x) * width
        if column < d:
            bias = cuda.local.array(width, real)
            o = cuda.local.array(ROWS * width, real)
            h = cuda.local.array(ROWS * width, real)
            load(bias, 0, b, column)
            i = cuda.blockIdx.y * cuda.blockDim.y + cuda.threadIdx.y
            step = cuda.gridDim.y * cuda.blockDim.y
            p = i * d + column
            stride = step * d
            # All loads of a trip come before its stores: out may be z, so the compiler cannot reorder them itself.
            while i + (ROWS - 1) * step < n:
                for r in static_range(ROWS):
                    load(o, r * width, z, p + r * stride)
                for r in static_range(ROWS):
                    for k in static_range(width):
                        o[r * width + k] = o[r * width + k] + bias[k]
                        h[r * width + k] = phi(o[r * width + k])
                for r in static_range(ROWS):
                    if keep:
                        store(z, p + r * stride, o, r * width)
                    store(out, p + r * stride, h, r * width)
                i += ROWS * step
                p += ROWS * stride
            while i < n:
                load(o, 0, z, p)
                for k in static_range(width):
                    o[k] = o[k] + bias[k]
                    h[k] = phi(o[k])
                if keep:
                    store(z, p, o, 0)
                store(out, p, h, 0)
                i += step
                p += stride

    name = label("bias_activation_forward", activation.name, storage, f"v{width}", "keep" if keep else "")
    pointer = f"{storage}*"
    return Source(name, kernel, f"{pointer} {pointer} {pointer} i8 i8", activation.fingerprint)


@cache
def bias_activation_backward(
    activation: Activation, dtype: np.dtype[Any], width: int, threads: int = THREADS
) -> Source:
    """kernel(dh, s, delta, partial, n, d): delta = dh * phi'(s), partial[block row] = its column sums of delta.

    s is h or z, whichever phi' needs; delta may be dh. ``partial`` is (grid.y, d): with one row of blocks it is db itself.
    """
    storage = storage_of(dtype)
    load, store, _, _ = access(storage, width)
    real, zero = numba.from_dtype(dtype), dtype.type(0)
    dphi = inlined(activation.scalars(dtype, MATH)[1])
    fold = fold_rows(width, threads)
    ROWS = rows_in_flight(dtype, width)

    @unrolled
    def kernel(dh, s, delta, partial, n, d):  # type: ignore[no-untyped-def]
        shared = cuda.shared.array(threads * width, real)
        sums = cuda.local.array(width, real)
        g = cuda.local.array(ROWS * width, real)
        at = cuda.local.array(ROWS * width, real)
        for k in static_range(width):
            sums[k] = zero
        column = (cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x) * width
        if column < d:
            i = cuda.blockIdx.y * cuda.blockDim.y + cuda.threadIdx.y
            step = cuda.gridDim.y * cuda.blockDim.y
            p = i * d + column
            stride = step * d
            while i + (ROWS - 1) * step < n:
                for r in static_range(ROWS):
                    load(g, r * width, dh, p + r * stride)
                for r in static_range(ROWS):
                    load(at, r * width, s, p + r * stride)
                for r in static_range(ROWS):
                    for k in static_range(width):
                        g[r * width + k] = g[r * width + k] * dphi(at[r * width + k], at[r * width + k])
                for r in static_range(ROWS):
                    store(delta, p + r * stride, g, r * width)
                for r in static_range(ROWS):
                    for k in static_range(width):
                        sums[k] = sums[k] + g[r * width + k]
                i += ROWS * step
                p += ROWS * stride
            while i < n:
                load(g, 0, dh, p)
                load(at, 0, s, p)
                for k in static_range(width):
                    g[k] = g[k] * dphi(at[k], at[k])
                    sums[k] = sums[k] + g[k]
                store(delta, p, g, 0)
                i += step
                p += stride
        fold(sums, shared, partial, d)

    name = label("bias_activation_backward", activation.name, storage, f"v{width}")
    pointer = f"{storage}*"
    return Source(name, kernel, " ".join([pointer] * 4 + ["i8", "i8"]), activation.fingerprint)


@cache
def fold_rows(width: int, threads: int, adjacent: bool = True) -> Any:
    """Return fold(sums, shared, partial, d): partial[blockIdx.y] = sums over the block's threads of one column.

    Called by all threads of a block, each with the sums of its ``width`` columns, which are adjacent or else blockDim.x
    apart; ``shared`` holds threads * width numbers.
    """

    @unrolled
    def fold(sums, shared, partial, d):  # type: ignore[no-untyped-def]
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
            if first + j < d:  # neighbouring threads write neighbouring columns
                place = j % width * threads + j // width if adjacent else j // bx * threads + j % bx
                partial[cuda.blockIdx.y * d + first + j] = shared[place]
            j += threads

    return device(fold)


@cache
def sum_columns(dtype: np.dtype[Any], threads: int) -> Any:
    """Return sum_columns(a, out, n, d, shared): out[blockIdx.y] = the block's share of the sums over rows of a (n, d)."""
    zero = dtype.type(0)
    real = numba.from_dtype(dtype)
    fold = fold_rows(1, threads)
    ROWS = 4  # loads under way at once: this kernel waits for memory, not for arithmetic

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
                    x[r] = x[r] + a[(i + r * step) * d + j]
                i += ROWS * step
            while i < n:
                x[0] = x[0] + a[i * d + j]
                i += step
        sums[0] = (x[0] + x[1]) + (x[2] + x[3])
        fold(sums, shared, out, d)

    return device(body)


@cache
def column_sum(dtype: np.dtype[Any], threads: int = THREADS) -> Source:
    """kernel(a, out, n, d): out (grid.y, d) = sums over the rows of a (n, d); with one row of blocks the whole sum."""
    storage = storage_of(dtype)
    real = numba.from_dtype(dtype)
    body = sum_columns(dtype, threads)

    @unrolled
    def kernel(a, out, n, d):  # type: ignore[no-untyped-def]
        shared = cuda.shared.array(threads, real)
        body(a, out, n, d, shared)

    return Source(label("column_sum", storage), kernel, f"{storage}* {storage}* i8 i8")
