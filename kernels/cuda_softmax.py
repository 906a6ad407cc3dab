"""CUDA kernels of the softmax losses: bias add, log softmax, loss and gradient, rows held in registers where they fit.

With g_j = dell(q_j, t_j) and p = softmax(o), do_j = g_j - p_j sum_k g_k, see :mod:`gpubackprop.losses`; what the kernels
leave is as in :mod:`gpubackprop.kernels.cuda_loss`. An index that is no class matches no column: nothing is read through it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np
from numba import cuda

from gpubackprop.kernels.cuda import fold_rows
from gpubackprop.kernels.cuda_launch import THREADS, Source
from gpubackprop.kernels.cuda_loss import variant
from gpubackprop.kernels.cuda_unroll import static_range, unrolled
from gpubackprop.kernels.cuda_vector import MATH, WARP, access, block_reductions, inlined, storage_of, warp_reductions
from gpubackprop.losses import Loss

WARP_COLUMNS = 256
"""Rows up to this length are held in the registers of a warp; longer ones are read again by a block."""


def warp_shape(d: int, threads: int = THREADS) -> tuple[int, int]:
    """Return the block (lanes, rows) of :func:`softmax_loss_warp`: the lanes of a row, and the rows at once."""
    lanes = min(WARP, 1 << (d - 1).bit_length())
    return lanes, threads // lanes


@cache
def softmax_loss_warp(
    loss: Loss,
    dtype: np.dtype[Any],
    d: int,
    indices: bool,
    weighted: bool,
    keep: bool,
    threads: int = THREADS,
) -> Source:
    """kernel(z, b, y, weight, out, partial, losses, scale, u, n, d): a warp, or a power of two of its lanes, per row.

    For d <= WARP_COLUMNS; only the powers of two above d make different kernels. The grid has one column of blocks on y.
    """
    lanes, _ = warp_shape(d, threads)
    slots = 1 << max(0, (d - 1).bit_length() - 5)
    return _softmax_loss_warp(loss, dtype, lanes, slots, indices, weighted, keep, threads)


@cache
def _softmax_loss_warp(
    loss: Loss,
    dtype: np.dtype[Any],
    lanes: int,
    slots: int,
    indices: bool,
    weighted: bool,
    keep: bool,
    threads: int,
) -> Source:
    storage = storage_of(dtype)
    real, zero, one = numba.from_dtype(dtype), dtype.type(0), dtype.type(1)
    lowest = dtype.type(-np.inf)
    target, ell, dell = map(inlined, loss.scalars(dtype, MATH))
    exp, log, where = MATH.exp, MATH.log, MATH.where
    warp_sum, warp_max = warp_reductions(lanes)
    fold = fold_rows(slots, threads, adjacent=False)
    block_sum, _ = block_reductions(threads)

    @unrolled
    def kernel(z, b, y, weight, out, partial, losses, scale, u, n, d):  # type: ignore[no-untyped-def]
        shared = cuda.shared.array(threads * slots, real)
        warps = cuda.shared.array(32, real)
        bias = cuda.local.array(slots, real)
        sums = cuda.local.array(slots, real)
        q = cuda.local.array(slots, real)
        p = cuda.local.array(slots, real)
        g = cuda.local.array(slots, real)
        lane = cuda.threadIdx.x
        for k in static_range(slots):
            sums[k] = zero
            bias[k] = zero
            if lane + lanes * k < d:
                bias[k] = b[lane + lanes * k]
        total = zero
        step = cuda.gridDim.y * cuda.blockDim.y
        row = cuda.blockIdx.y * cuda.blockDim.y + cuda.threadIdx.y
        trips = (n - 1) // step + 1
        while trips > 0:  # as many for every thread: the lanes of a warp stay together, and only stores are guarded
            i = min(row, n - 1)
            inside = row < n
            own_class = y[i] if indices else 0
            top = lowest
            for k in static_range(slots):
                q[k] = lowest
                if lane + lanes * k < d:
                    q[k] = z[i * d + lane + lanes * k] + bias[k]
                top = where(q[k] > top, q[k], top)
            top = warp_max(top)
            if keep:
                for k in static_range(slots):
                    if inside and lane + lanes * k < d:
                        z[i * d + lane + lanes * k] = q[k]
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
                    t = where(lane + lanes * k == own_class, one, zero) if indices else y[i * d + lane + lanes * k]
                    t = target(t, u)
                    g[k] = dell(q[k] - log_s, t)
                    value = value + ell(q[k] - log_s, t)
                    slope = slope + g[k]
            value = warp_sum(value)
            slope = warp_sum(slope) * inverse
            if inside:
                w = one
                if weighted:
                    w = weight[i]
                if lane == 0:
                    total = total + value * w
                for k in static_range(slots):
                    if lane + lanes * k < d:
                        do = (g[k] - p[k] * slope) * w * scale
                        out[i * d + lane + lanes * k] = do
                        sums[k] = sums[k] + do
            row += step
            trips -= 1
        fold(sums, shared, partial, d)
        total = block_sum(total, warps)
        if cuda.threadIdx.x == 0 and cuda.threadIdx.y == 0:
            losses[cuda.blockIdx.y] = total

    name = variant(loss, "warp", storage, indices, weighted, keep, f"{lanes}x{slots}")
    p, label_type = f"{storage}*", "i8*" if indices else f"{storage}*"
    signature = f"{p} {p} {label_type} {p} {p} {p} {p} {storage} {storage} i8 i8"
    return Source(name, kernel, signature, loss.fingerprint)


@cache
def softmax_loss_block(
    loss: Loss,
    dtype: np.dtype[Any],
    width: int,
    indices: bool,
    weighted: bool,
    keep: bool,
    threads: int = THREADS,
) -> Source:
    """kernel(z, b, y, weight, out, losses, scale, u, n, d): a block per row, of any length.

    The maximum and the sum of exponentials come from one pass (the sum is rescaled when the maximum grows); two more read
    the row again, from the cache. Every thread meets only its own columns, so ``out`` may be ``z``. It leaves no column sums.
    """
    storage = storage_of(dtype)
    load, store, _, _ = access(storage, width)
    real, zero, one = numba.from_dtype(dtype), dtype.type(0), dtype.type(1)
    lowest = np.finfo(dtype).min  # finite: a row may begin with -inf, and -inf - -inf is NaN
    target, ell, dell = map(inlined, loss.scalars(dtype, MATH))
    exp, log, where = MATH.exp, MATH.log, MATH.where
    block_sum, block_max = block_reductions(threads)
    add_bias, dense = not keep, not indices

    @unrolled
    def kernel(z, b, y, weight, out, losses, scale, u, n, d):  # type: ignore[no-untyped-def]
        warps = cuda.shared.array(32, real)
        bias = cuda.local.array(width, real)
        o = cuda.local.array(width, real)
        t = cuda.local.array(width, real)
        thread = cuda.threadIdx.x
        total = zero
        i = numba.int64(cuda.blockIdx.x)
        while i < n:
            own_class = y[i] if indices else 0
            top = lowest
            s = zero
            j = numba.int64(thread * width)
            while j < d:
                load(o, 0, z, i * d + j)
                load(bias, 0, b, j)
                for k in static_range(width):
                    o[k] = o[k] + bias[k]
                if keep:
                    store(z, i * d + j, o, 0)
                largest = top
                for k in static_range(width):
                    largest = where(o[k] > largest, o[k], largest)
                s = s * exp(top - largest)
                top = largest
                for k in static_range(width):
                    s = s + exp(o[k] - top)
                j += threads * width
            own = top
            top = block_max(top, warps)
            s = block_sum(s * exp(own - top), warps)
            log_s = log(s)
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
                    load(t, 0, y, i * d + j)
                for k in static_range(width):
                    if indices:
                        t[k] = where(j + k == own_class, one, zero)
                    x = target(t[k], u)
                    slope = slope + dell(o[k] - top - log_s, x)
                    value = value + ell(o[k] - top - log_s, x)
                j += threads * width
            slope = block_sum(slope, warps)
            value = block_sum(value, warps)
            w = one
            if weighted:
                w = weight[i]
            total = total + value * w
            j = numba.int64(thread * width)
            while j < d:
                load(o, 0, z, i * d + j)
                if add_bias:
                    load(bias, 0, b, j)
                    for k in static_range(width):
                        o[k] = o[k] + bias[k]
                if dense:
                    load(t, 0, y, i * d + j)
                for k in static_range(width):
                    if indices:
                        t[k] = where(j + k == own_class, one, zero)
                    x = o[k] - top - log_s
                    o[k] = (dell(x, target(t[k], u)) - exp(x) * slope) * w * scale
                store(out, i * d + j, o, 0)
                j += threads * width
            i += cuda.gridDim.x
        if thread == 0:
            losses[cuda.blockIdx.x] = total

    name = variant(loss, "block", storage, indices, weighted, keep, f"v{width}")
    p, label_type = f"{storage}*", "i8*" if indices else f"{storage}*"
    signature = f"{p} {p} {label_type} {p} {p} {p} {storage} {storage} i8 i8"
    return Source(name, kernel, signature, loss.fingerprint)
