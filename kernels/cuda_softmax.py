"""CUDA kernels of the softmax losses: bias add, log softmax, loss and gradient, each output read from memory once.

With g_j = dell(q_j, t_j) and p = softmax(o), do_j = g_j - p_j sum_k g_k, see :mod:`gpubackprop.losses`; what the kernels
leave is as in :mod:`gpubackprop.kernels.cuda_loss`. An index that is no class matches no column: nothing is read through it.

There are three, by the length d of a row: up to :func:`tile_columns` a block takes a tile of rows through shared memory, so that
rows of any length move 16 bytes at a time; then a block holds a row in its registers, where :func:`row_shape` finds room; beyond,
a block reads its row again from the cache.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np
from numba import cuda

from gpubackprop.backends.base import SCALE
from gpubackprop.definitions import real_of
from gpubackprop.kernels.cuda import fold_rows, signature
from gpubackprop.kernels.cuda_launch import RESIDENT, THREADS, Source
from gpubackprop.kernels.cuda_loss import Variant
from gpubackprop.kernels.cuda_unroll import static_range, unrolled
from gpubackprop.kernels.cuda_vector import (
    MATH,
    WARP,
    access,
    block_reductions,
    inlined,
    read_once,
    storage_of,
    warp_reductions,
)  # fmt: skip
from gpubackprop.losses import Loss

TILE_BYTES = 16384
"""Of a tile in shared memory; dense targets take as much again."""
ROW_THREADS = 1024


def tile_columns(dtype: np.dtype[Any]) -> int:
    """Return the longest row of a tile: a thread has four registers, or pairs of them, for each of its columns."""
    return 128 if dtype.itemsize == 8 else 256


def lanes_of(d: int) -> int:
    """Return how many threads share a row of a tile: a warp, or a power of two of its lanes."""
    return min(WARP, 1 << (d - 1).bit_length())


def tile_rows(dtype: np.dtype[Any], d: int, threads: int = THREADS) -> int:
    """Return the most rows of a tile: a multiple of those that a block works on at once."""
    at_once = threads // lanes_of(d)
    room = TILE_BYTES * threads // THREADS // real_of(dtype).itemsize
    return min(threads, max(1, room // (d * at_once)) * at_once)


def _place(e: Any) -> Any:
    """Return where element e of a tile lies in shared memory."""
    return e + (e >> 5)


@cache
def softmax_loss_tile(
    loss: Loss, dtype: np.dtype[Any], width: int, d: int, variant: Variant, threads: int = THREADS
) -> Source:
    """kernel(z, b, y, weight, out, partial, losses, scalars, scale, u, n, d, rows): tiles of ``rows`` rows.

    For d <= :func:`tile_columns`; only the powers of two above d make different kernels. The block is (lanes, threads / lanes), the
    grid has one column of blocks. ``rows`` is at most :func:`tile_rows`, and a multiple of ``width``.
    """
    slots = 1 << max(0, (d - 1).bit_length() - 5)
    return _softmax_loss_tile(loss, dtype, width, lanes_of(d), slots, variant, threads)


@cache
def _softmax_loss_tile(
    loss: Loss, dtype: np.dtype[Any], width: int, lanes: int, slots: int, variant: Variant, threads: int
) -> Source:
    storage, real_dtype = storage_of(dtype), real_of(dtype)
    load, store, load1, store1, _ = access(storage, width)
    load_real, _, _, _, _ = access(storage_of(real_dtype), width)
    real, zero, one = numba.from_dtype(real_dtype), real_dtype.type(0), real_dtype.type(1)
    lowest = real_dtype.type(-np.inf)
    target, ell, dell = map(inlined, loss.scalars(real_dtype, MATH))
    exp, log, where = MATH.exp, MATH.log, MATH.where
    warp_sum, warp_max = warp_reductions(lanes)
    fold, fetch = fold_rows(slots, threads, adjacent=False), read_once(storage_of(real_dtype))
    block_sum, _ = block_reductions(threads)
    indices, weighted, keep, scaled = variant
    dense, vector = not indices, width > 1
    at_once = threads // lanes
    # rows of the widest d that these lanes and slots serve still make a whole trip
    capacity = max(TILE_BYTES * threads // THREADS // real_dtype.itemsize, threads * slots)
    ROOM = capacity + capacity // 32  # a gap after 32 numbers: a warp then meets each bank once, see place
    BIASES = lanes * slots + lanes * slots // 32
    TARGETS = ROOM if dense else 1
    place = inlined(_place)

    @unrolled
    def kernel(z, b, y, weight, out, partial, losses, scalars, scale, u, n, d, rows):  # type: ignore[no-untyped-def]
        tile = cuda.shared.array(ROOM, real)
        targets = cuda.shared.array(TARGETS, real)
        biases = cuda.shared.array(BIASES, real)
        classes = cuda.shared.array(threads, numba.int64)
        weights = cuda.shared.array(threads, real)
        warps = cuda.shared.array(32, real)
        r = cuda.local.array(width, real)
        sums = cuda.local.array(slots, real)
        q = cuda.local.array(slots, real)
        p = cuda.local.array(slots, real)
        g = cuda.local.array(slots, real)
        lane = cuda.threadIdx.x
        thread = cuda.threadIdx.y * lanes + lane
        for k in static_range(slots):
            sums[k] = zero
        if scaled:
            scale = scale * fetch(scalars, SCALE, warps)
        j = numba.int64(thread)
        while j < d:
            biases[place(j)] = load1(b, j)
            j += threads
        cuda.syncthreads()
        total = zero
        first = numba.int64(cuda.blockIdx.y) * rows
        jump = threads * width % d
        while first < n:
            here = min(rows, n - first)
            size = here * d
            # the tile lies in memory without a gap: move it from end to end, and add the bias on the way
            e = numba.int64(thread * width)
            column = e % d
            while e < size:
                if e + width <= size:
                    load(r, 0, z, first * d + e)
                    c = column
                    for k in static_range(width):
                        r[k] = r[k] + biases[place(c)]
                        tile[place(e + k)] = r[k]
                        c += 1
                        c = c if c < d else c - d
                    if keep:
                        store(z, first * d + e, r, 0)
                    if dense:
                        load_real(r, 0, y, first * d + e)
                        for k in static_range(width):
                            targets[place(e + k)] = r[k]
                elif vector:
                    c = column
                    for k in static_range(width):
                        if e + k < size:
                            x = load1(z, first * d + e + k) + biases[place(c)]
                            tile[place(e + k)] = x
                            if keep:
                                store1(z, first * d + e + k, x)
                            if dense:
                                targets[place(e + k)] = y[first * d + e + k]
                        c += 1
                        c = c if c < d else c - d
                e += threads * width
                column += jump
                column = column if column < d else column - d
            if thread < here:
                if indices:
                    classes[thread] = y[first + thread]
                if weighted:
                    weights[thread] = weight[first + thread]
            cuda.syncthreads()
            above = numba.int64(0)
            while (
                above < here
            ):  # as many trips for every thread: the lanes of a warp stay together, only stores are guarded
                row = above + cuda.threadIdx.y
                i = min(row, here - 1)
                inside = row < here
                own_class = classes[i] if indices else 0
                top = lowest
                for k in static_range(slots):
                    q[k] = lowest
                    if lane + lanes * k < d:
                        q[k] = tile[place(i * d + lane + lanes * k)]
                    top = where(q[k] > top, q[k], top)
                top = warp_max(top)
                s = zero
                for k in static_range(slots):
                    q[k] = q[k] - top
                    p[k] = zero
                    if lane + lanes * k < d:
                        p[k] = exp(q[k])
                    s = s + p[k]
                s = warp_sum(s)
                log_s = log(s)
                inverse = one / s
                value = zero
                slope = zero
                for k in static_range(slots):
                    g[k] = zero
                    if lane + lanes * k < d:
                        t = (
                            where(lane + lanes * k == own_class, one, zero)
                            if indices
                            else targets[place(i * d + lane + lanes * k)]
                        )
                        t = target(t, u)
                        g[k] = dell(q[k] - log_s, t)
                        value = value + ell(q[k] - log_s, t)
                        slope = slope + g[k]
                slope = warp_sum(slope) * inverse
                if inside:
                    w = one
                    if weighted:
                        w = weights[i]
                    total = total + value * w
                    for k in static_range(slots):
                        if lane + lanes * k < d:
                            do = (g[k] - p[k] * slope) * w * scale
                            tile[place(i * d + lane + lanes * k)] = do
                            sums[k] = sums[k] + do
                above += at_once
            cuda.syncthreads()
            e = numba.int64(thread * width)
            while e < size:
                if e + width <= size:
                    for k in static_range(width):
                        r[k] = tile[place(e + k)]
                    store(out, first * d + e, r, 0)
                elif vector:
                    for k in static_range(width):
                        if e + k < size:
                            store1(out, first * d + e + k, tile[place(e + k)])
                e += threads * width
            cuda.syncthreads()
            first += cuda.gridDim.y * rows
        fold(sums, tile, partial, numba.int64(cuda.blockIdx.y), d)
        total = block_sum(total, warps)
        if thread == 0:
            losses[cuda.blockIdx.y] = total

    types = signature(dtype, f"s* s* {'i8*' if indices else 'r*'} r* s* r* r* r* r r i8 i8 i8")
    name = variant.name(loss, dtype, "tile", f"{lanes}x{slots}", f"v{width}")
    return Source(name, kernel, types, loss.fingerprint, threads)


def row_shape(dtype: np.dtype[Any], width: int, d: int, dense: bool) -> tuple[int, int, int] | None:
    """Return (threads, slots, rows) of :func:`softmax_loss_row`, or None where d is too long for it.

    A thread holds slots * width elements of each of ``rows`` rows, as many dense targets, sums and biases: 32 registers at most.
    """
    threads = min(ROW_THREADS, max(64, 1 << (-(-d // width) - 1).bit_length()))
    slots = 1 << (-(-d // (threads * width)) - 1).bit_length()
    size, double = slots * width, dtype.itemsize == 8
    if size > (2 if double else 8):
        return None
    if double or (size == 8 and dense):
        return threads, slots, 1
    return threads, slots, 2 if dense or size == 8 else 4


@cache
def softmax_loss_row(
    loss: Loss, dtype: np.dtype[Any], width: int, shape: tuple[int, int, int], variant: Variant
) -> Source:
    """kernel(z, b, y, weight, out, partial, losses, scalars, scale, u, n, d): a block per few rows, held in its registers.

    ``shape`` comes from :func:`row_shape`; d is a multiple of ``width``. ``partial`` is (grid.y, d).
    """
    threads, slots, ROWS = shape
    storage, real_dtype = storage_of(dtype), real_of(dtype)
    load, store, _, _, _ = access(storage, width)
    load_real, store_real, _, _, _ = access(storage_of(real_dtype), width)
    real, zero, one = numba.from_dtype(real_dtype), real_dtype.type(0), real_dtype.type(1)
    lowest = np.finfo(real_dtype).min  # finite: a row may begin with -inf, and -inf - -inf is NaN
    target, ell, dell = map(inlined, loss.scalars(real_dtype, MATH))
    exp, log, where = MATH.exp, MATH.log, MATH.where
    block_sum, _ = block_reductions(threads)
    row_sums, row_maxima = block_reductions(threads, ROWS)
    fetch = read_once(storage_of(real_dtype))
    indices, weighted, keep, scaled = variant
    dense = not indices
    SIZE = slots * width
    TARGETS = ROWS * SIZE if dense else 1

    @unrolled
    def kernel(z, b, y, weight, out, partial, losses, scalars, scale, u, n, d):  # type: ignore[no-untyped-def]
        warps = cuda.shared.array(32 * ROWS, real)
        own = cuda.shared.array(ROWS, numba.int64)
        own_weight = cuda.shared.array(ROWS, real)
        bias = cuda.local.array(SIZE, real)
        sums = cuda.local.array(SIZE, real)
        o = cuda.local.array(ROWS * SIZE, real)
        t = cuda.local.array(TARGETS, real)
        x = cuda.local.array(ROWS, real)  # what is reduced over the block: a number for each row
        thread = numba.int64(cuda.threadIdx.x)
        if scaled:
            scale = scale * fetch(scalars, SCALE, warps)
        for k in static_range(SIZE):
            sums[k] = zero
            bias[k] = zero
        for slot in static_range(slots):
            if (slot * threads + thread) * width < d:
                load(bias, slot * width, b, (slot * threads + thread) * width)
        total = zero
        i = numba.int64(cuda.blockIdx.y) * ROWS
        while i < n:
            if thread < ROWS:
                row = min(i + thread, n - 1)
                if indices:
                    own[thread] = y[row]
                if weighted:
                    own_weight[thread] = weight[row]
            for r in static_range(ROWS):  # a row beyond the last is the last once more, and is not stored
                for slot in static_range(slots):
                    j = (slot * threads + thread) * width
                    if j < d:
                        load(o, r * SIZE + slot * width, z, min(i + r, n - 1) * d + j)
                        if dense:
                            load_real(t, r * SIZE + slot * width, y, min(i + r, n - 1) * d + j)
            for r in static_range(ROWS):
                x[r] = lowest
                for slot in static_range(slots):
                    j = (slot * threads + thread) * width
                    if j < d:
                        for k in static_range(slot * width, slot * width + width):
                            o[r * SIZE + k] = o[r * SIZE + k] + bias[k]
                            x[r] = where(o[r * SIZE + k] > x[r], o[r * SIZE + k], x[r])
                        if keep and i + r < n:
                            store(z, (i + r) * d + j, o, r * SIZE + slot * width)
            row_maxima(x, warps)
            for r in static_range(ROWS):
                s = zero
                for slot in static_range(slots):
                    if (slot * threads + thread) * width < d:
                        for k in static_range(slot * width, slot * width + width):
                            o[r * SIZE + k] = o[r * SIZE + k] - x[r]
                            s = s + exp(o[r * SIZE + k])
                x[r] = s
            row_sums(x, warps)
            for r in static_range(ROWS):
                log_s = log(x[r])
                own_class = own[r] if indices else 0
                value = zero
                x[r] = zero
                for slot in static_range(slots):
                    j = (slot * threads + thread) * width
                    if j < d:
                        for k in static_range(width):
                            q = o[r * SIZE + slot * width + k] - log_s
                            o[r * SIZE + slot * width + k] = q
                            v = where(j + k == own_class, one, zero) if indices else t[r * SIZE + slot * width + k]
                            x[r] = x[r] + dell(q, target(v, u))
                            value = value + ell(q, target(v, u))
                if i + r < n:
                    total = total + (value * own_weight[r] if weighted else value)
            row_sums(x, warps)
            for r in static_range(ROWS):
                own_class = own[r] if indices else 0
                factor = own_weight[r] * scale if weighted else scale
                for slot in static_range(slots):
                    j = (slot * threads + thread) * width
                    if j < d and i + r < n:
                        for k in static_range(width):
                            q = o[r * SIZE + slot * width + k]
                            v = where(j + k == own_class, one, zero) if indices else t[r * SIZE + slot * width + k]
                            do = (dell(q, target(v, u)) - exp(q) * x[r]) * factor
                            o[r * SIZE + slot * width + k] = do
                            sums[slot * width + k] = sums[slot * width + k] + do
                        store(out, (i + r) * d + j, o, r * SIZE + slot * width)
            cuda.syncthreads()  # the next rows' classes and weights go to the same place
            i += cuda.gridDim.y * ROWS
        for slot in static_range(slots):
            j = (slot * threads + thread) * width
            if j < d:
                store_real(partial, cuda.blockIdx.y * d + j, sums, slot * width)
        total = block_sum(total, warps)
        if thread == 0:
            losses[cuda.blockIdx.y] = total

    types = signature(dtype, f"s* s* {'i8*' if indices else 'r*'} r* s* r* r* r* r r i8 i8")
    name = variant.name(loss, dtype, "row", f"{threads}x{slots}", f"v{width}")
    return Source(name, kernel, types, loss.fingerprint, threads)


@cache
def softmax_loss_long(loss: Loss, dtype: np.dtype[Any], width: int, variant: Variant, threads: int = THREADS) -> Source:
    """kernel(z, b, y, weight, out, losses, scalars, scale, u, n, d): a block per row, of any length.

    Its passes (the maximum, the sum of exponentials, the sum of g, the gradient) read the row again, from the cache. Every
    thread meets only its own columns, so ``out`` may be ``z``. It leaves no column sums.
    """
    storage, real_dtype = storage_of(dtype), real_of(dtype)
    load, store, _, _, rounded = access(storage, width)
    load_real, _, _, _, _ = access(storage_of(real_dtype), width)
    real, zero, one = numba.from_dtype(real_dtype), real_dtype.type(0), real_dtype.type(1)
    lowest = np.finfo(real_dtype).min  # finite: a row may begin with -inf, and -inf - -inf is NaN
    target, ell, dell = map(inlined, loss.scalars(real_dtype, MATH))
    exp, log, where = MATH.exp, MATH.log, MATH.where
    block_sum, block_max = block_reductions(threads)
    fetch = read_once(storage_of(real_dtype))
    indices, weighted, keep, scaled = variant
    add_bias, dense = not keep, not indices

    @unrolled
    def kernel(z, b, y, weight, out, losses, scalars, scale, u, n, d):  # type: ignore[no-untyped-def]
        warps = cuda.shared.array(32, real)
        bias = cuda.local.array(width, real)
        o = cuda.local.array(width, real)
        t = cuda.local.array(width, real)
        thread = cuda.threadIdx.x
        if scaled:
            scale = scale * fetch(scalars, SCALE, warps)
        total = zero
        i = numba.int64(cuda.blockIdx.y)
        while i < n:
            own_class = y[i] if indices else 0
            top = lowest
            j = numba.int64(thread * width)
            while j < d:
                load(o, 0, z, i * d + j)
                load(bias, 0, b, j)
                for k in static_range(width):
                    o[k] = o[k] + bias[k]
                if keep:
                    store(z, i * d + j, o, 0)
                    for k in static_range(width):
                        o[k] = rounded(o[k])  # as the next passes read it
                for k in static_range(width):
                    top = where(o[k] > top, o[k], top)
                j += threads * width
            top = block_max(top, warps)
            s = zero
            j = numba.int64(thread * width)
            while j < d:
                load(o, 0, z, i * d + j)
                if add_bias:
                    load(bias, 0, b, j)
                    for k in static_range(width):
                        o[k] = o[k] + bias[k]
                for k in static_range(width):
                    s = s + exp(o[k] - top)
                j += threads * width
            top = top + log(block_sum(s, warps))
            w = weight[i] if weighted else one
            value = zero
            slope = zero
            j = numba.int64(thread * width)
            while j < d:
                load(o, 0, z, i * d + j)
                if add_bias:
                    load(bias, 0, b, j)
                    for k in static_range(width):
                        o[k] = o[k] + bias[k]
                if dense:
                    load_real(t, 0, y, i * d + j)
                for k in static_range(width):
                    if indices:
                        t[k] = where(j + k == own_class, one, zero)
                    x = target(t[k], u)
                    slope = slope + dell(o[k] - top, x)
                    value = value + ell(o[k] - top, x)
                j += threads * width
            total = total + value * w
            slope = block_sum(slope, warps)
            j = numba.int64(thread * width)
            while j < d:
                load(o, 0, z, i * d + j)
                if add_bias:
                    load(bias, 0, b, j)
                    for k in static_range(width):
                        o[k] = o[k] + bias[k]
                if dense:
                    load_real(t, 0, y, i * d + j)
                for k in static_range(width):
                    if indices:
                        t[k] = where(j + k == own_class, one, zero)
                    x = o[k] - top
                    o[k] = (dell(x, target(t[k], u)) - exp(x) * slope) * w * scale
                store(out, i * d + j, o, 0)
                j += threads * width
            i += cuda.gridDim.y
        total = block_sum(total, warps)
        if thread == 0:
            losses[cuda.blockIdx.y] = total

    types = signature(dtype, f"s* s* {'i8*' if indices else 'r*'} r* s* r* r* r r i8 i8")
    # exp and log of float64 take more than 64 registers here, and rows this long in float64 are no one's hot path
    resident = 512 if dtype.itemsize == 8 else RESIDENT
    return Source(variant.name(loss, dtype, "long", f"v{width}"), kernel, types, loss.fingerprint, threads, resident)
