"""Dropout: a function that passes call, and a separate kernel."""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np

from gpubackprop.definitions import real_of
from gpubackprop.kernels.cuda.access import MATH, access, access_within, inlined, read_once, uint32, uint64
from gpubackprop.kernels.cuda.compile import THREADS, Source, label
from gpubackprop.kernels.cuda.numba import cuda
from gpubackprop.kernels.cuda.parameters import I, P, R, S, declared
from gpubackprop.kernels.cuda.storage import storage_of
from gpubackprop.kernels.cuda.unroll import static_range, unrolled
from gpubackprop.philox import define_philox
from gpubackprop.step.state import STEPS


@cache
def define_dropout(dtype: np.dtype[Any], width: int) -> Any:
    """Return drop(x, offset, e, step, layer, bound, scale, low, high, first): dropout of x[offset : offset + width].

    They are the elements from e on, a multiple of ``width``; four share a block of random numbers, the first of which is
    block ``first``. Numbers are rounded to the storage type before and after, as if loaded and stored.
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


@cache
def dropout(dtype: np.dtype[Any], width: int, threads: int = THREADS) -> Source:
    """out = dropout(x), by :func:`define_dropout`.

    ``out`` may be ``x``; size may be any number.
    """
    storage, real_dtype = storage_of(dtype), real_of(dtype)
    load, store = access_within(storage, width)
    real = numba.from_dtype(real_dtype)
    drop, fetch = define_dropout(dtype, width), read_once("i8")

    @unrolled
    def kernel(
        x: P[S], out: P[S], counters: P[I], bound: I, scale: R, low: I, high: I, layer: I, first: I, size: I,
    ) -> None:  # fmt: skip
        shared = cuda.shared.array(1, numba.int64)
        r = cuda.local.array(width, real)
        step = fetch(counters, STEPS, shared)
        e = numba.int64(cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x) * width
        while e < size:
            load(r, 0, x, e, size)
            drop(r, 0, e, step, layer, bound, scale, low, high, first)
            store(out, e, r, 0, size)
            e += cuda.gridDim.x * cuda.blockDim.x * width

    return Source(label("dropout", storage, f"v{width}"), kernel, declared(kernel, dtype), threads)
