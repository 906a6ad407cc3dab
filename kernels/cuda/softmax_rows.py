"""CUDA kernels of the softmax losses for long rows, beyond those of :mod:`gpubackprop.kernels.cuda.softmax`.

A block holds its rows in registers if they fit (:func:`row_shape`); otherwise it reads its row again from the cache.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from gpubackprop.definitions import per_definition, real_of
from gpubackprop.kernels.cuda.access import MATH, access, device, inlined, read_once
from gpubackprop.kernels.cuda.compile import THREADS, Source, occupancy_of
from gpubackprop.kernels.cuda.loss import Variant
from gpubackprop.kernels.cuda.numba import cuda
from gpubackprop.kernels.cuda.parameters import I, P, R, S, Y, declared
from gpubackprop.kernels.cuda.reductions import block_reductions
from gpubackprop.kernels.cuda.storage import storage_of
from gpubackprop.kernels.cuda.unroll import static_range, unrolled
from gpubackprop.kernels.softmax import LogSoftmax, define_log_softmax
from gpubackprop.losses import Loss
from gpubackprop.step.state import SCALE

ROW_THREADS = 1024


def row_shape(dtype: np.dtype[Any], width: int, d: int, dense: bool) -> tuple[int, int, int] | None:
    """Return (threads, slots, rows) of :func:`softmax_loss_row`, or None if d is too large for it.

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


def _row_passes(
    chain: LogSoftmax, dtype: np.dtype[Any], width: int, shape: tuple[int, int, int], variant: Variant
) -> tuple[Any, Any, Any, Any]:
    """Return load_rows(...), sum_terms(...), add_losses(...) -> total and store_gradients(...): the passes over a block's rows.

    ``o`` holds the outputs, then those less the maximum, then the logs of the probabilities. ``x`` has a number for each row, the
    thread's after a pass and the block's before the next: the maximum, the sum of the terms, the sum of the slopes.
    """
    threads, slots, ROWS = shape
    load, store, _, _, _ = access(storage_of(dtype), width)
    load_real = access(storage_of(real_of(dtype)), width).load
    lowest, shift, term, log_probability, one_hot, value_of, slope_of, gradient = chain
    indices, weighted, keep, _ = variant
    log, zero = MATH.log, real_of(dtype).type(0)
    dense, where, SIZE = not indices, MATH.where, slots * width

    @unrolled
    def load_rows(o, t, x, bias, z, y, i, n, d):  # type: ignore[no-untyped-def]
        thread = numba.int64(cuda.threadIdx.x)
        for r in static_range(ROWS):  # a row beyond the last repeats the last, and is not stored
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

    @unrolled
    def sum_terms(o, x, d):  # type: ignore[no-untyped-def]
        thread = numba.int64(cuda.threadIdx.x)
        for r in static_range(ROWS):
            s = zero
            for slot in static_range(slots):
                if (slot * threads + thread) * width < d:
                    for k in static_range(slot * width, slot * width + width):
                        o[r * SIZE + k] = shift(o[r * SIZE + k], x[r])
                        s = s + term(o[r * SIZE + k])
            x[r] = s

    @unrolled
    def add_losses(o, t, x, own, own_weight, i, n, d, u, total):  # type: ignore[no-untyped-def]
        thread = numba.int64(cuda.threadIdx.x)
        for r in static_range(ROWS):
            log_s = log(x[r])
            own_class = own[r] if indices else 0
            value = zero
            x[r] = zero
            for slot in static_range(slots):
                j = (slot * threads + thread) * width
                if j < d:
                    for k in static_range(width):
                        q = log_probability(o[r * SIZE + slot * width + k], log_s)
                        o[r * SIZE + slot * width + k] = q
                        v = one_hot(j + k, own_class) if indices else t[r * SIZE + slot * width + k]
                        x[r] = x[r] + slope_of(q, v, u)
                        value = value + value_of(q, v, u)
            if i + r < n:
                total = total + (value * own_weight[r] if weighted else value)
        return total

    @unrolled
    def store_gradients(o, t, x, sums, own, own_weight, out, i, n, d, u, scale):  # type: ignore[no-untyped-def]
        thread = numba.int64(cuda.threadIdx.x)
        for r in static_range(ROWS):
            own_class = own[r] if indices else 0
            factor = own_weight[r] * scale if weighted else scale
            for slot in static_range(slots):
                j = (slot * threads + thread) * width
                if j < d and i + r < n:
                    for k in static_range(width):
                        q = o[r * SIZE + slot * width + k]
                        v = one_hot(j + k, own_class) if indices else t[r * SIZE + slot * width + k]
                        do = gradient(slope_of(q, v, u), term(q), x[r]) * factor
                        o[r * SIZE + slot * width + k] = do
                        sums[slot * width + k] = sums[slot * width + k] + do
                    store(out, (i + r) * d + j, o, r * SIZE + slot * width)

    return device(load_rows), device(sum_terms), device(add_losses), device(store_gradients)


@per_definition(lambda dtype: MATH)
def softmax_loss_row(
    loss: Loss, dtype: np.dtype[Any], width: int, shape: tuple[int, int, int], variant: Variant
) -> Source:
    """A softmax loss by a block per few rows, held in its registers.

    ``shape`` comes from :func:`row_shape`; d is a multiple of ``width``. ``partial`` is (grid.y, d).
    """
    threads, slots, ROWS = shape
    storage, real_dtype = storage_of(dtype), real_of(dtype)
    load, store_real = access(storage, width).load, access(storage_of(real_dtype), width).store
    real, zero = numba.from_dtype(real_dtype), real_dtype.type(0)
    chain = define_log_softmax(loss, real_dtype, MATH, inlined)
    load_rows, sum_terms, add_losses, store_gradients = _row_passes(chain, dtype, width, shape, variant)
    block_sum, _ = block_reductions(threads)
    row_sums, row_maxima = block_reductions(threads, ROWS)
    fetch = read_once(storage_of(real_dtype))
    indices, weighted, _, scaled = variant
    SIZE = slots * width
    TARGETS = 1 if indices else ROWS * SIZE

    @unrolled
    def kernel(
        z: P[S], b: P[S], y: P[Y], weight: P[R], out: P[S], partial: P[R], losses: P[R],
        scalars: P[R], scale: R, u: R, n: I, d: I,
    ) -> None:  # fmt: skip
        warps = cuda.shared.array(32 * ROWS, real)
        own = cuda.shared.array(ROWS, numba.int64)
        own_weight = cuda.shared.array(ROWS, real)
        bias = cuda.local.array(SIZE, real)
        sums = cuda.local.array(SIZE, real)
        o = cuda.local.array(ROWS * SIZE, real)
        t = cuda.local.array(TARGETS, real)
        x = cuda.local.array(ROWS, real)  # reduced over the block: a number per row
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
            load_rows(o, t, x, bias, z, y, i, n, d)
            row_maxima(x, warps)
            sum_terms(o, x, d)
            row_sums(x, warps)
            total = add_losses(o, t, x, own, own_weight, i, n, d, u, total)
            row_sums(x, warps)
            store_gradients(o, t, x, sums, own, own_weight, out, i, n, d, u, scale)
            cuda.syncthreads()  # the next rows' classes and weights overwrite these
            i += cuda.gridDim.y * ROWS
        for slot in static_range(slots):
            j = (slot * threads + thread) * width
            if j < d:
                store_real(partial, cuda.blockIdx.y * d + j, sums, slot * width)
        total = block_sum(total, warps)
        if thread == 0:
            losses[cuda.blockIdx.y] = total

    types = declared(kernel, dtype, Y=variant.targets(dtype))
    name = variant.name(loss, dtype, "row", f"{threads}x{slots}", f"v{width}")
    return Source(name, kernel, types, threads, occupancy_of(dtype))


def _row_reads(dtype: np.dtype[Any], width: int, variant: Variant, one_hot: Any) -> tuple[Any, Any]:
    """Return outputs(...), which reads ``width`` outputs with their bias, and targets(...), as many targets."""
    load, load_real = access(storage_of(dtype), width).load, access(storage_of(real_of(dtype)), width).load
    add_bias, dense = not variant.keep, not variant.indices

    @unrolled
    def load_outputs(o, bias, z, b, i, j, d):  # type: ignore[no-untyped-def]
        load(o, 0, z, i * d + j)
        if add_bias:  # else the first pass has added it
            load(bias, 0, b, j)
            for k in static_range(width):
                o[k] = o[k] + bias[k]

    @unrolled
    def load_targets(t, y, own_class, i, j, d):  # type: ignore[no-untyped-def]
        if dense:
            load_real(t, 0, y, i * d + j)
        else:
            for k in static_range(width):
                t[k] = one_hot(j + k, own_class)

    return inlined(load_outputs), inlined(load_targets)


@per_definition(lambda dtype: MATH)
def softmax_loss_long(loss: Loss, dtype: np.dtype[Any], width: int, variant: Variant, threads: int = THREADS) -> Source:
    """A softmax loss by a block per row, of any length.

    Its passes (the maximum, the sum of exponentials, the sum of g, the gradient) read the row again, from the cache. Every
    thread touches only its own columns, so ``out`` may be ``z``. It writes no column sums.
    """
    storage, real_dtype = storage_of(dtype), real_of(dtype)
    load, store, _, _, rounded = access(storage, width)
    real, zero, one = numba.from_dtype(real_dtype), real_dtype.type(0), real_dtype.type(1)
    chain = define_log_softmax(loss, real_dtype, MATH, inlined)
    lowest, shift, term, log_probability, one_hot, value_of, slope_of, gradient = chain
    log, where = MATH.log, MATH.where
    block_sum, block_max = block_reductions(threads)
    fetch = read_once(storage_of(real_dtype))
    indices, weighted, keep, scaled = variant
    outputs, targets = _row_reads(dtype, width, variant, one_hot)

    @unrolled
    def kernel(
        z: P[S], b: P[S], y: P[Y], weight: P[R], out: P[S], losses: P[R],
        scalars: P[R], scale: R, u: R, n: I, d: I,
    ) -> None:  # fmt: skip
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
                outputs(o, bias, z, b, i, j, d)
                for k in static_range(width):
                    s = s + term(shift(o[k], top))
                j += threads * width
            log_s = log(block_sum(s, warps))
            w = weight[i] if weighted else one
            value = zero
            slope = zero
            j = numba.int64(thread * width)
            while j < d:
                outputs(o, bias, z, b, i, j, d)
                targets(t, y, own_class, i, j, d)
                for k in static_range(width):
                    q = log_probability(shift(o[k], top), log_s)
                    slope = slope + slope_of(q, t[k], u)
                    value = value + value_of(q, t[k], u)
                j += threads * width
            total = total + value * w
            slope = block_sum(slope, warps)
            j = numba.int64(thread * width)
            while j < d:
                outputs(o, bias, z, b, i, j, d)
                targets(t, y, own_class, i, j, d)
                for k in static_range(width):
                    q = log_probability(shift(o[k], top), log_s)
                    o[k] = gradient(slope_of(q, t[k], u), term(q), slope) * w * scale
                store(out, i * d + j, o, 0)
                j += threads * width
            i += cuda.gridDim.y
        total = block_sum(total, warps)
        if thread == 0:
            losses[cuda.blockIdx.y] = total

    types = declared(kernel, dtype, Y=variant.targets(dtype))
    name = variant.name(loss, dtype, "long", f"v{width}")
    return Source(name, kernel, types, threads, occupancy_of(dtype))
