"""CUDA kernel of the softmax losses for short rows: bias add, log softmax, loss and gradient, each output read once.

The formulas are in :mod:`gpubackprop.kernels.softmax`; the outputs are as in :mod:`gpubackprop.kernels.cuda.loss`.

Up to :func:`tile_columns` columns, a block takes a tile of rows through shared memory, so that rows of any length move 16 bytes at
a time; longer rows are handled by :mod:`gpubackprop.kernels.cuda.softmax_rows`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np

from gpubackprop.definitions import per_definition, real_of
from gpubackprop.kernels.cuda.access import MATH, access, device, inlined, read_once, warp_reductions
from gpubackprop.kernels.cuda.column_sums import fold_rows
from gpubackprop.kernels.cuda.compile import THREADS, Source, occupancy_of
from gpubackprop.kernels.cuda.loss import Variant
from gpubackprop.kernels.cuda.numba import cuda
from gpubackprop.kernels.cuda.parameters import I, P, R, S, Y, declared
from gpubackprop.kernels.cuda.reductions import block_reductions
from gpubackprop.kernels.cuda.storage import WARP, storage_of
from gpubackprop.kernels.cuda.unroll import static_range, unrolled
from gpubackprop.kernels.softmax import LogSoftmax, define_log_softmax
from gpubackprop.losses import Loss
from gpubackprop.step.state import SCALE

TILE_BYTES = 16384
"""Bytes of a tile in shared memory; dense targets take as much again."""


def tile_columns(dtype: np.dtype[Any]) -> int:
    """Return the longest row of a tile: a thread has four registers, or pairs of them, per column."""
    return 128 if dtype.itemsize == 8 else 256


def lanes_of(d: int) -> int:
    """Return how many threads share a row of a tile: a warp, or a power of two of its lanes."""
    return min(WARP, 1 << (d - 1).bit_length())


def tile_rows(dtype: np.dtype[Any], d: int, threads: int = THREADS) -> int:
    """Return the most rows of a tile: a multiple of the rows a block works on at once."""
    at_once = threads // lanes_of(d)
    numbers = TILE_BYTES * threads // THREADS // real_of(dtype).itemsize
    return min(threads, max(1, numbers // (d * at_once)) * at_once)


def _place(e: Any) -> Any:
    """Return the place of element e of a tile in shared memory."""
    return e + (e >> 5)


def softmax_loss_tile(
    loss: Loss, dtype: np.dtype[Any], width: int, d: int, variant: Variant, threads: int = THREADS
) -> Source:
    """A softmax loss by tiles of ``rows`` rows.

    For d <= :func:`tile_columns`; only the powers of two above d make different kernels. The block is (lanes, threads / lanes), the
    grid has one column of blocks. ``rows`` is at most :func:`tile_rows`, and a multiple of ``width``.
    """
    slots = 1 << max(0, (d - 1).bit_length() - 5)
    return _softmax_loss_tile(loss, dtype, width, lanes_of(d), slots, variant, threads)


@cache
def _tile_moves(dtype: np.dtype[Any], width: int, variant: Variant, threads: int) -> tuple[Any, Any]:
    """Return load_tile(...) and store_tile(...): a tile is contiguous in memory, and moved from end to end.

    Loading also adds the bias.
    """
    load, store, load1, store1, _ = access(storage_of(dtype), width)
    load_real, _, _, _, _ = access(storage_of(real_of(dtype)), width)
    dense, keep, vector = not variant.indices, variant.keep, width > 1
    real, place = numba.from_dtype(real_of(dtype)), inlined(_place)

    @unrolled
    def load_tile(z, y, tile, targets, biases, start, size, d, jump, thread):  # type: ignore[no-untyped-def]
        r = cuda.local.array(width, real)
        e = numba.int64(thread * width)
        column = e % d
        while e < size:
            if e + width <= size:
                load(r, 0, z, start + e)
                c = column
                for k in static_range(width):
                    r[k] = r[k] + biases[place(c)]
                    tile[place(e + k)] = r[k]
                    c += 1
                    c = c if c < d else c - d
                if keep:
                    store(z, start + e, r, 0)
                if dense:
                    load_real(r, 0, y, start + e)
                    for k in static_range(width):
                        targets[place(e + k)] = r[k]
            elif vector:
                c = column
                for k in static_range(width):
                    if e + k < size:
                        x = load1(z, start + e + k) + biases[place(c)]
                        tile[place(e + k)] = x
                        if keep:
                            store1(z, start + e + k, x)
                        if dense:
                            targets[place(e + k)] = y[start + e + k]
                    c += 1
                    c = c if c < d else c - d
            e += threads * width
            column += jump
            column = column if column < d else column - d

    @unrolled
    def store_tile(out, tile, start, size, thread):  # type: ignore[no-untyped-def]
        r = cuda.local.array(width, real)
        e = numba.int64(thread * width)
        while e < size:
            if e + width <= size:
                for k in static_range(width):
                    r[k] = tile[place(e + k)]
                store(out, start + e, r, 0)
            elif vector:
                for k in static_range(width):
                    if e + k < size:
                        store1(out, start + e + k, tile[place(e + k)])
            e += threads * width

    return device(load_tile), device(store_tile)


def _tile_row(chain: LogSoftmax, dtype: np.dtype[Any], lanes: int, slots: int, variant: Variant) -> Any:
    """Return do_row(...) -> total: the gradient of a row, in place in the tile, and its loss added to ``total``."""
    lowest, shift, term, log_probability, one_hot, value_of, slope_of, gradient = chain
    log, where = MATH.log, MATH.where
    real, zero, one = numba.from_dtype(dtype), dtype.type(0), dtype.type(1)
    warp_sum, warp_max = warp_reductions(lanes)
    indices, weighted = variant.indices, variant.weighted
    place = inlined(_place)

    @unrolled
    def do_row(tile, targets, classes, weights, sums, row, here, d, u, scale, total):  # type: ignore[no-untyped-def]
        q = cuda.local.array(slots, real)
        p = cuda.local.array(slots, real)
        g = cuda.local.array(slots, real)
        lane = cuda.threadIdx.x
        i = min(row, here - 1)
        inside = row < here
        own_class = classes[i] if indices else 0
        top = lowest
        for k in static_range(slots):
            q[k] = lowest
            if inside and lane + lanes * k < d:  # else its owner may be writing to it
                q[k] = tile[place(i * d + lane + lanes * k)]
            top = where(q[k] > top, q[k], top)
        top = warp_max(top)
        s = zero
        for k in static_range(slots):
            q[k] = shift(q[k], top)
            p[k] = zero
            if lane + lanes * k < d:
                p[k] = term(q[k])
            s = s + p[k]
        s = warp_sum(s)
        log_s = log(s)
        inverse = one / s
        value = zero
        slope = zero
        for k in static_range(slots):
            g[k] = zero
            if lane + lanes * k < d:
                j = lane + lanes * k
                t = one_hot(j, own_class) if indices else targets[place(i * d + j)]
                g[k] = slope_of(log_probability(q[k], log_s), t, u)
                value = value + value_of(log_probability(q[k], log_s), t, u)
                slope = slope + g[k]
        slope = warp_sum(slope) * inverse
        if inside:
            w = one
            if weighted:
                w = weights[i]
            total = total + value * w
            for k in static_range(slots):
                if lane + lanes * k < d:
                    do = gradient(g[k], p[k], slope) * w * scale
                    tile[place(i * d + lane + lanes * k)] = do
                    sums[k] = sums[k] + do
        return total

    return device(do_row)


@per_definition(lambda dtype: MATH)
def _softmax_loss_tile(
    loss: Loss, dtype: np.dtype[Any], width: int, lanes: int, slots: int, variant: Variant, threads: int
) -> Source:
    storage, real_dtype = storage_of(dtype), real_of(dtype)
    load1, real, zero = access(storage, width).load1, numba.from_dtype(real_dtype), real_dtype.type(0)
    load_tile, store_tile = _tile_moves(dtype, width, variant, threads)
    do_row = _tile_row(define_log_softmax(loss, real_dtype, MATH, inlined), real_dtype, lanes, slots, variant)
    fold, fetch = fold_rows(slots, threads, adjacent=False), read_once(storage_of(real_dtype))
    block_sum, _ = block_reductions(threads)
    indices, weighted, _, scaled = variant
    at_once = threads // lanes
    # rows of the widest d for these lanes and slots still make a whole trip
    capacity = max(TILE_BYTES * threads // THREADS // real_dtype.itemsize, threads * slots)
    ROOM = capacity + capacity // 32  # padding after 32 numbers: a warp then accesses each bank once, see place
    BIASES = lanes * slots + lanes * slots // 32
    TARGETS = 1 if indices else ROOM
    place = inlined(_place)

    @unrolled
    def kernel(
        z: P[S], b: P[S], y: P[Y], weight: P[R], out: P[S], partial: P[R], losses: P[R],
        scalars: P[R], scale: R, u: R, n: I, d: I, rows: I,
    ) -> None:  # fmt: skip
        tile = cuda.shared.array(ROOM, real)
        targets = cuda.shared.array(TARGETS, real)
        biases = cuda.shared.array(BIASES, real)
        classes = cuda.shared.array(threads, numba.int64)
        weights = cuda.shared.array(threads, real)
        warps = cuda.shared.array(32, real)
        sums = cuda.local.array(slots, real)
        thread = cuda.threadIdx.y * lanes + cuda.threadIdx.x
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
            load_tile(z, y, tile, targets, biases, first * d, size, d, jump, thread)
            if thread < here:
                if indices:
                    classes[thread] = y[first + thread]
                if weighted:
                    weights[thread] = weight[first + thread]
            cuda.syncthreads()
            above = numba.int64(0)
            # the same number of trips for every thread: the lanes of a warp stay together, only stores are guarded
            while above < here:
                row = above + cuda.threadIdx.y
                total = do_row(tile, targets, classes, weights, sums, row, here, d, u, scale, total)
                above += at_once
            cuda.syncthreads()
            store_tile(out, tile, first * d, size, thread)
            cuda.syncthreads()
            first += cuda.gridDim.y * rows
        fold(sums, tile, partial, numba.int64(cuda.blockIdx.y), d)
        total = block_sum(total, warps)
        if thread == 0:
            losses[cuda.blockIdx.y] = total

    types = declared(kernel, dtype, Y=variant.targets(dtype))
    name = variant.name(loss, dtype, "tile", f"{lanes}x{slots}", f"v{width}")
    return Source(name, kernel, types, threads, occupancy_of(dtype))
