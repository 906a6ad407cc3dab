"""CUDA kernels of the elementwise losses: bias add, loss, its gradient and the bias gradient in one pass over the outputs.

Each leaves the loss of its share of the rows in ``losses`` (one number a block) and the column sums of do in ``partial``;
:func:`finish_loss` adds both up. ``scale`` is the factor of the gradient, 1 / (n d) for a mean.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np
from numba import cuda

from gpubackprop.kernels.cuda import fold_rows, label, sum_columns
from gpubackprop.kernels.cuda_launch import THREADS, Source
from gpubackprop.kernels.cuda_unroll import static_range, unrolled
from gpubackprop.kernels.cuda_vector import MATH, access, block_reductions, inlined, storage_of
from gpubackprop.losses import Loss


def variant(loss: Loss, style: str, storage: str, indices: bool, weighted: bool, keep: bool, *shape: str) -> str:
    """Return the name of a kernel of a loss."""
    flags = ["indices" * indices, "weighted" * weighted, "keep" * keep]
    return label("bias_loss", loss.name, style, storage, *shape, *flags)


@cache
def elementwise_loss(
    loss: Loss, dtype: np.dtype[Any], width: int, weighted: bool, keep: bool, threads: int = THREADS
) -> Source:
    """kernel(z, b, y, weight, out, partial, losses, scale, n, d), cut like ``bias_activation_backward``."""
    storage = storage_of(dtype)
    load, store, _, _ = access(storage, width)
    real, zero, one = numba.from_dtype(dtype), dtype.type(0), dtype.type(1)
    ell, dell = map(inlined, loss.scalars(dtype, MATH))
    fold = fold_rows(width, threads)
    block_sum, _ = block_reductions(threads)

    @unrolled
    def kernel(z, b, y, weight, out, partial, losses, scale, n, d):  # type: ignore[no-untyped-def]
        shared = cuda.shared.array(threads * width, real)
        warps = cuda.shared.array(32, real)
        bias = cuda.local.array(width, real)
        sums = cuda.local.array(width, real)
        o = cuda.local.array(width, real)
        t = cuda.local.array(width, real)
        for k in static_range(width):
            sums[k] = zero
        total = zero
        column = (cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x) * width
        if column < d:
            load(bias, 0, b, column)
            i = cuda.blockIdx.y * cuda.blockDim.y + cuda.threadIdx.y
            step = cuda.gridDim.y * cuda.blockDim.y
            while i < n:
                load(o, 0, z, i * d + column)
                load(t, 0, y, i * d + column)
                w = one
                if weighted:
                    w = weight[i]
                row = zero
                for k in static_range(width):
                    o[k] = o[k] + bias[k]
                    row = row + ell(o[k], t[k])
                    t[k] = dell(o[k], t[k]) * w * scale
                    sums[k] = sums[k] + t[k]
                total = total + row * w
                if keep:
                    store(z, i * d + column, o, 0)
                store(out, i * d + column, t, 0)
                i += step
        fold(sums, shared, partial, d)
        total = block_sum(total, warps)
        if cuda.threadIdx.x == 0 and cuda.threadIdx.y == 0:
            losses[cuda.blockIdx.y * cuda.gridDim.x + cuda.blockIdx.x] = total

    name = variant(loss, "", storage, False, weighted, keep, f"v{width}")
    p = f"{storage}*"
    return Source(name, kernel, f"{p} {p} {p} {p} {p} {p} {p} {storage} i8 i8", loss.fingerprint)


@cache
def finish_loss(dtype: np.dtype[Any], threads: int = THREADS) -> Source:
    """kernel(partial, db, losses, value, scale, growth, rows, d, count): the sums over blocks.

    db = column sums of partial (rows, d), cut like ``column_sum``; the last block, one more than the columns need, sets
    value[0] = scale * sum(losses) and value[1] += growth * value[0], in float64: a sum over an epoch is long.
    """
    storage = storage_of(dtype)
    real, zero = numba.from_dtype(dtype), np.float64(0)
    body = sum_columns(dtype, threads)
    block_sum, _ = block_reductions(threads)

    @unrolled
    def kernel(partial, db, losses, value, scale, growth, rows, d, count):  # type: ignore[no-untyped-def]
        shared = cuda.shared.array(threads, real)
        warps = cuda.shared.array(32, numba.float64)
        if cuda.blockIdx.x < cuda.gridDim.x - 1:
            body(partial, db, rows, d, shared)
        else:
            t = cuda.threadIdx.y * cuda.blockDim.x + cuda.threadIdx.x
            total = zero
            i = numba.int64(t)
            while i < count:
                total = total + losses[i]
                i += threads
            total = block_sum(total, warps)
            if t == 0:
                value[0] = scale * total
                value[1] = value[1] + growth * value[0]

    p = f"{storage}*"
    return Source(label("finish_loss", storage), kernel, f"{p} {p} {p} f8* f8 f8 i8 i8 i8")
