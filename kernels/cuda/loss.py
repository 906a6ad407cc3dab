"""CUDA kernels of the elementwise losses: bias add, loss, its gradient and the bias gradient in one pass over the outputs.

Each leaves the loss of its share of the rows in ``losses`` (one number per block) and the column sums of do in ``partial``;
:func:`finish_loss` adds both up. ``scale`` is the factor of the gradient, 1 / (n d) for a mean. Storage and "real" numbers,
and the row groups ("lines") of a matrix, are those of :mod:`gpubackprop.kernels.cuda.passes`.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numba
import numpy as np

from gpubackprop.definitions import per_definition, real_of
from gpubackprop.kernels.cuda.access import MATH, access_within, inlined, read_once
from gpubackprop.kernels.cuda.column_sums import fold_rows, sum_columns
from gpubackprop.kernels.cuda.compile import THREADS, Source, label, occupancy_of
from gpubackprop.kernels.cuda.numba import cuda
from gpubackprop.kernels.cuda.parameters import F8, I, P, R, S, declared
from gpubackprop.kernels.cuda.passes import WIDEST, stage_bias, width_of
from gpubackprop.kernels.cuda.reductions import block_reductions
from gpubackprop.kernels.cuda.storage import storage_of
from gpubackprop.kernels.cuda.unroll import static_range, unrolled
from gpubackprop.losses import Loss
from gpubackprop.step.state import SCALE


class Variant(NamedTuple):
    """The options of a loss kernel.

    Parameters
    ----------
    indices : bool
        y holds class indices (n,), else real numbers (n, d).
    weighted : bool
        There are sample weights.
    keep : bool
        z <- z + b; else ``out`` may be ``z``.
    scaled : bool
        The gradient is multiplied by the loss scale, ``scalars[SCALE]``.
    """

    indices: bool = False
    weighted: bool = False
    keep: bool = False
    scaled: bool = False

    def targets(self, dtype: np.dtype[Any]) -> str:
        """Return the storage type of a target."""
        return "i8" if self.indices else storage_of(real_of(dtype))

    def width(self, dtype: np.dtype[Any], z: int = 0, out: int = 0, y: int = 0) -> int:
        """Return how many outputs one access moves, given addresses.

        Dense targets are real: where z has 16 bits, as many as 16 bytes of targets hold.
        """
        return width_of(dtype, z, out) if self.indices else width_of(real_of(dtype), z, out, y)

    def name(self, loss: Loss, dtype: np.dtype[Any], *style: str) -> str:
        """Return the name of the kernel."""
        flags = [name for name, value in zip(self._fields, self, strict=True) if value]
        return label("bias_loss", loss.name, storage_of(dtype), *style, *flags)


@per_definition(lambda dtype: MATH)
def elementwise_loss(loss: Loss, dtype: np.dtype[Any], width: int, variant: Variant, threads: int = THREADS) -> Source:
    """An elementwise loss of rows cut like those of ``bias_activation_backward``; with weights a line is one row."""
    storage, real_dtype = storage_of(dtype), real_of(dtype)
    load_within, store_within = access_within(storage, width)
    load_real_within, _ = access_within(storage_of(real_dtype), width)
    real, zero, one, where = numba.from_dtype(real_dtype), real_dtype.type(0), real_dtype.type(1), MATH.where
    ell, dell = map(inlined, loss.scalars(real_dtype, MATH))
    stage, fetch = stage_bias(dtype, width, threads), read_once(storage_of(real_dtype))
    fold = fold_rows(width, threads)
    block_sum, _ = block_reductions(threads)
    weighted, keep, scaled = variant.weighted, variant.keep, variant.scaled
    STAGED = WIDEST * width

    @unrolled
    def kernel(
        z: P[S], b: P[S], y: P[R], weight: P[R], out: P[S], partial: P[R], losses: P[R],
        scalars: P[R], scale: R, size: I, line: I, d: I,
    ) -> None:  # fmt: skip
        staged = cuda.shared.array(STAGED, real)
        shared = cuda.shared.array(threads * width, real)  # the weights of a trip's rows, then the sums
        warps = cuda.shared.array(32, real)
        bias = cuda.local.array(width, real)
        sums = cuda.local.array(width, real)
        o = cuda.local.array(width, real)
        t = cuda.local.array(width, real)
        for k in static_range(width):
            sums[k] = zero
        if scaled:
            scale = scale * fetch(scalars, SCALE, warps)
        stage(b, staged, bias, line, d)
        total = zero
        thread = cuda.threadIdx.y * cuda.blockDim.x + cuda.threadIdx.x
        column = (cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x) * width
        first = numba.int64(cuda.blockIdx.y * cuda.blockDim.y)
        w = one
        while first * line < size:  # the same number of trips for every thread of the block
            if weighted:
                if thread < cuda.blockDim.y and (first + thread) * line < size:
                    shared[thread] = weight[first + thread]
                cuda.syncthreads()
                w = shared[cuda.threadIdx.y]
                cuda.syncthreads()
            p = (first + cuda.threadIdx.y) * line + column
            if column < line and p < size:
                load_within(o, 0, z, p, size)
                load_real_within(t, 0, y, p, size)
                for k in static_range(width):
                    o[k] = o[k] + bias[k]
                    total = total + where(p + k < size, ell(o[k], t[k]) * w, zero)
                    t[k] = where(p + k < size, dell(o[k], t[k]) * w * scale, zero)
                    sums[k] = sums[k] + t[k]
                if keep:
                    store_within(z, p, o, 0, size)
                store_within(out, p, t, 0, size)
            first += cuda.gridDim.y * cuda.blockDim.y
        fold(sums, shared, partial, numba.int64(cuda.blockIdx.y), line)
        total = block_sum(total, warps)
        if thread == 0:
            losses[cuda.blockIdx.y * cuda.gridDim.x + cuda.blockIdx.x] = total

    return Source(variant.name(loss, dtype, f"v{width}"), kernel, declared(kernel, dtype), threads, occupancy_of(dtype))


@cache
def finish_loss(dtype: np.dtype[Any], threads: int = THREADS) -> Source:
    """The sums over blocks, all in real numbers.

    db = column sums of partial (rows, d), cut like ``column_sum``; the last block, one more than the columns need, sets
    value[0] = scale * sum(losses) and value[1] += growth * value[0], in float64: a sum over an epoch is long. A ``growth`` of 0
    is weights[0] instead, the sum of the weights of the mini-batch.
    """
    dtype = real_of(dtype)
    real, zero = numba.from_dtype(dtype), np.float64(0)
    body = sum_columns(dtype, threads)
    block_sum, _ = block_reductions(threads)

    @unrolled
    def kernel(
        partial: P[R], db: P[R], losses: P[R], value: P[F8], weights: P[F8],
        scale: F8, growth: F8, rows: I, d: I, count: I,
    ) -> None:  # fmt: skip
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
                if growth == zero:
                    growth = weights[0]
                value[0] = scale * total
                value[1] = value[1] + growth * value[0]

    return Source(label("finish_loss", storage_of(dtype)), kernel, declared(kernel, dtype), threads)
