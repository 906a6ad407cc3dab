"""CUDA kernels of the rest of a step: mini-batch, dropout, clipping, schedule and update.

All numbers that change from step to step are read from device memory (see :mod:`gpubackprop.backends.base`), so a recorded
launch stays valid for every step.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np
from numba import cuda

from gpubackprop.backends.base import C1, C2, CURSOR, FACTOR, NORM, RATE, STEPS
from gpubackprop.kernels.cuda import label
from gpubackprop.kernels.cuda_launch import THREADS, Source
from gpubackprop.kernels.cuda_unroll import static_range, unrolled
from gpubackprop.kernels.cuda_vector import (
    MATH,
    VECTOR_BYTES,
    access,
    block_reductions,
    compute_type,
    inlined,
    storage_of,
    uint32,
    uint64,
)  # fmt: skip
from gpubackprop.optimizers import Optimizer
from gpubackprop.philox import define_philox


@cache
def normalize_weights(dtype: np.dtype[Any], threads: int = THREADS) -> Source:
    """kernel(weight, out, n): out = weight / sum(weight), by one block: there are as many as rows in a mini-batch."""
    storage = storage_of(dtype)
    real, zero = numba.from_dtype(dtype), dtype.type(0)
    block_sum, _ = block_reductions(threads)

    @unrolled
    def kernel(weight, out, n):  # type: ignore[no-untyped-def]
        warps = cuda.shared.array(32, real)
        total = zero
        i = numba.int64(cuda.threadIdx.x)
        while i < n:
            total = total + weight[i]
            i += threads
        total = block_sum(total, warps)
        i = numba.int64(cuda.threadIdx.x)
        while i < n:
            out[i] = weight[i] / total
            i += threads

    return Source(label("normalize_weights", storage), kernel, f"{storage}* {storage}* i8")


@cache
def dropout(dtype: np.dtype[Any], width: int, threads: int = THREADS) -> Source:
    """kernel(x, out, counters, threshold, scale, low, high, layer, n, first): four elements and one Philox block per thread.

    ``out`` may be ``x``; its random numbers begin at block ``first``. A width of 1 is for addresses off 16 bytes; whatever
    the width, n may be any number.
    """
    storage = storage_of(dtype)
    load, store, load1, store1 = access(storage, width)
    real, zero = numba.from_dtype(dtype), dtype.type(0)
    philox, where = inlined(define_philox(uint32, uint64)), MATH.where
    parts = 4 // width

    @unrolled
    def kernel(x, out, counters, threshold, scale, low, high, layer, n, first):  # type: ignore[no-untyped-def]
        r = cuda.local.array(4, real)
        word = cuda.local.array(4, numba.uint32)
        k0 = uint32(low)
        k1 = uint32(high)
        c2 = uint32(counters[STEPS])
        c3 = uint32(layer)
        bound = uint32(threshold)
        block = numba.int64(cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x)
        while block * 4 < n:
            w0, w1, w2, w3 = philox(uint32(block + first), uint32((block + first) >> 32), c2, c3, k0, k1)
            word[0] = w0
            word[1] = w1
            word[2] = w2
            word[3] = w3
            if block * 4 + 4 <= n:
                for part in static_range(parts):
                    load(r, part * width, x, block * 4 + part * width)
                for k in static_range(4):
                    r[k] = where(word[k] < bound, r[k] * scale, zero)
                for part in static_range(parts):
                    store(out, block * 4 + part * width, r, part * width)
            else:
                for k in static_range(3):
                    if block * 4 + k < n:
                        store1(out, block * 4 + k, where(word[k] < bound, load1(x, block * 4 + k) * scale, zero))
            block += cuda.gridDim.x * cuda.blockDim.x

    signature = f"{storage}* {storage}* i8* i8 {storage} i8 i8 i8 i8 i8"
    return Source(label("dropout", storage, f"v{width}"), kernel, signature)


@cache
def accumulate(dtype: np.dtype[Any], width: int, first: bool) -> Source:
    """kernel(total, term, out, size): out = total + term, or (``first``) term; ``out`` may be either."""
    storage = storage_of(dtype)
    load, store, load1, store1 = access(storage, width)
    real = numba.from_dtype(dtype)

    @unrolled
    def kernel(total, term, out, size):  # type: ignore[no-untyped-def]
        a = cuda.local.array(width, real)
        b = cuda.local.array(width, real)
        thread = numba.int64(cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x)
        i = thread * width
        whole = size - size % width
        while i < whole:
            load(b, 0, term, i)
            if not first:
                load(a, 0, total, i)
                for k in static_range(width):
                    b[k] = a[k] + b[k]
            store(out, i, b, 0)
            i += cuda.gridDim.x * cuda.blockDim.x * width
        if width > 1 and whole + thread < size:
            x = load1(term, whole + thread)
            if not first:
                x = load1(total, whole + thread) + x
            store1(out, whole + thread, x)

    name = label("accumulate", storage, "first" if first else "", f"v{width}")
    return Source(name, kernel, f"{storage}* {storage}* {storage}* i8")


@cache
def gather(storage: str, width: int) -> Source:
    """kernel(source, order, counters, out, size, rows, n, d): out[i] = source[order[counters[CURSOR] + i]], i < n.

    ``size`` is the length of ``order`` and ``rows`` that of ``source``; positions beyond them are cut to the last.
    """
    load, store, _, _ = access(storage, width)
    real = numba.from_dtype(np.dtype(compute_type(storage)))

    @unrolled
    def kernel(source, order, counters, out, size, rows, n, d):  # type: ignore[no-untyped-def]
        r = cuda.local.array(width, real)
        column = (cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x) * width
        i = numba.int64(cuda.blockIdx.y * cuda.blockDim.y + cuda.threadIdx.y)
        if column < d:
            while i < n:
                row = order[min(counters[CURSOR] + i, size - 1)]
                row = max(min(row, rows - 1), 0)
                load(r, 0, source, row * d + column)
                store(out, i * d + column, r, 0)
                i += cuda.gridDim.y * cuda.blockDim.y

    pointer = f"{storage}*"
    return Source(label("gather", storage, f"v{width}"), kernel, f"{pointer} i8* i8* {pointer} i8 i8 i8 i8")


@cache
def sum_of_squares(dtype: np.dtype[Any], threads: int = THREADS) -> Source:
    """kernel(g, partial, size): partial[block] = its share of sum(g^2). g is aligned to 16 bytes."""
    storage = storage_of(dtype)
    width = VECTOR_BYTES // dtype.itemsize
    load, _, load1, _ = access(storage, width)
    real, zero = numba.from_dtype(dtype), dtype.type(0)
    block_sum, _ = block_reductions(threads)
    PARTS = 2

    @unrolled
    def kernel(g, partial, size):  # type: ignore[no-untyped-def]
        warps = cuda.shared.array(32, real)
        r = cuda.local.array(PARTS * width, real)
        sums = cuda.local.array(width, real)
        for k in static_range(width):
            sums[k] = zero
        thread = numba.int64(cuda.blockIdx.x * threads + cuda.threadIdx.x)
        i = thread * width
        step = cuda.gridDim.x * threads * width
        whole = size - size % width
        while i + (PARTS - 1) * step < whole:
            for part in static_range(PARTS):
                load(r, part * width, g, i + part * step)
            for part in static_range(PARTS):
                for k in static_range(width):
                    sums[k] = sums[k] + r[part * width + k] * r[part * width + k]
            i += PARTS * step
        while i < whole:
            load(r, 0, g, i)
            for k in static_range(width):
                sums[k] = sums[k] + r[k] * r[k]
            i += step
        total = zero
        for k in static_range(width):
            total = total + sums[k]
        if whole + thread < size:
            total = total + load1(g, whole + thread) * load1(g, whole + thread)
        total = block_sum(total, warps)
        if cuda.threadIdx.x == 0:
            partial[cuda.blockIdx.x] = total

    return Source(label("sum_of_squares", storage), kernel, f"{storage}* {storage}* i8")


@cache
def clip(dtype: np.dtype[Any], threads: int = THREADS) -> Source:
    """kernel(partial, scalars, max_norm, count): the norm and the factor of the gradient from the sums of its squares."""
    storage = storage_of(dtype)
    real, zero, one, tiny = numba.from_dtype(dtype), dtype.type(0), dtype.type(1), dtype.type(1e-6)
    block_sum, _ = block_reductions(threads)
    sqrt, where = MATH.sqrt, MATH.where

    @unrolled
    def kernel(partial, scalars, max_norm, count):  # type: ignore[no-untyped-def]
        warps = cuda.shared.array(32, real)
        total = zero
        i = numba.int64(cuda.threadIdx.x)
        while i < count:
            total = total + partial[i]
            i += threads
        total = block_sum(total, warps)
        if cuda.threadIdx.x == 0:
            norm = sqrt(total)
            factor = max_norm / (norm + tiny)
            scalars[NORM] = norm
            scalars[FACTOR] = where(factor > one, one, factor)  # NaN stays NaN

    return Source(label("clip", storage), kernel, f"{storage}* {storage}* {storage} i8")


@cache
def advance(optimizer: Optimizer, dtype: np.dtype[Any]) -> Source:
    """kernel(rate, counters, scalars, batch): one thread, in float64: the schedule and the constants of the next step."""
    real = dtype.type
    constants = inlined(optimizer.define(np.float64, MATH)[0])
    factor = inlined(optimizer.schedule.define(MATH))
    one = np.float64(1)

    @unrolled
    def kernel(rate, counters, scalars, batch):  # type: ignore[no-untyped-def]
        t = numba.float64(counters[STEPS])
        eta, c1, c2 = constants(t + one, rate[0] * factor(t))
        scalars[RATE] = real(eta)
        scalars[C1] = real(c1)
        scalars[C2] = real(c2)
        counters[STEPS] = counters[STEPS] + 1
        counters[CURSOR] = counters[CURSOR] + batch

    storage = storage_of(dtype)
    name = label("advance", type(optimizer).__name__.lower(), type(optimizer.schedule).__name__.lower(), storage)
    return Source(name, kernel, f"f8* i8* {storage}* i8", optimizer.fingerprint)


@cache
def update(optimizer: Optimizer, dtype: np.dtype[Any], width: int) -> Source:
    """kernel(parameters, gradients, states, scalars, size): one step of the optimizer; states are rows of ``size``."""
    storage = storage_of(dtype)
    load, store, load1, store1 = access(storage, width)
    real, zero = numba.from_dtype(dtype), dtype.type(0)
    step_of = inlined(optimizer.define(dtype.type, MATH)[1])
    where = MATH.where
    limit = optimizer.clipping[1]
    clipped, limit = limit is not None, dtype.type(limit or 0)
    has_state, has_second, has_third = (optimizer.n_states > k for k in range(3))
    vector = width > 1

    @unrolled
    def kernel(parameters, gradients, states, scalars, size):  # type: ignore[no-untyped-def]
        p = cuda.local.array(width, real)
        g = cuda.local.array(width, real)
        s0 = cuda.local.array(width, real)
        s1 = cuda.local.array(width, real)
        s2 = cuda.local.array(width, real)
        rate = scalars[RATE]
        c1 = scalars[C1]
        c2 = scalars[C2]
        factor = scalars[FACTOR]
        for k in static_range(width):
            s0[k] = zero
            s1[k] = zero
            s2[k] = zero
        thread = numba.int64(cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x)
        i = thread * width
        step = cuda.gridDim.x * cuda.blockDim.x * width
        whole = size - size % width
        while i < whole:
            load(g, 0, gradients, i)
            load(p, 0, parameters, i)
            if has_state:
                load(s0, 0, states, i)
            if has_second:
                load(s1, 0, states, size + i)
            if has_third:
                load(s2, 0, states, 2 * size + i)
            for k in static_range(width):
                x = g[k] * factor
                if clipped:
                    x = where(x > limit, limit, where(x < -limit, -limit, x))
                p[k], s0[k], s1[k], s2[k] = step_of(p[k], x, s0[k], s1[k], s2[k], rate, c1, c2)
            store(parameters, i, p, 0)
            if has_state:
                store(states, i, s0, 0)
            if has_second:
                store(states, size + i, s1, 0)
            if has_third:
                store(states, 2 * size + i, s2, 0)
            i += step
        if vector:  # the few elements after the last whole vector; there is at most one state then
            i = whole + thread
            if i < size:
                x = load1(gradients, i) * factor
                if clipped:
                    x = where(x > limit, limit, where(x < -limit, -limit, x))
                a = zero
                if has_state:
                    a = load1(states, i)
                a, b, _, _ = step_of(load1(parameters, i), x, a, zero, zero, rate, c1, c2)
                store1(parameters, i, a)
                if has_state:
                    store1(states, i, b)

    name = label("update", type(optimizer).__name__.lower(), storage, f"v{width}")
    pointer = f"{storage}*"
    return Source(name, kernel, f"{pointer} {pointer} {pointer} {pointer} i8", optimizer.fingerprint)


def update_width(optimizer: Optimizer, dtype: np.dtype[Any], size: int, *addresses: int) -> int:
    """Return the vector width of :func:`update`: 1 where a later row of the states would start off 16 bytes."""
    width = VECTOR_BYTES // dtype.itemsize
    aligned = not any(a % VECTOR_BYTES for a in addresses) and (optimizer.n_states < 2 or size % width == 0)
    return width if aligned else 1
