"""CUDA kernels of the end of a step: sums of gradients over micro-batches, clipping, schedule and update.

All numbers that change from step to step are read from device memory (see :mod:`gpubackprop.backends.base`), so a recorded
launch stays valid for every step.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numba
import numpy as np

from gpubackprop.definitions import per_definition
from gpubackprop.kernels.cuda.access import MATH, access, access_within, inlined
from gpubackprop.kernels.cuda.compile import THREADS, Source, label
from gpubackprop.kernels.cuda.numba import cuda
from gpubackprop.kernels.cuda.parameters import F8, I, P, R, S, W, declared
from gpubackprop.kernels.cuda.reductions import block_reductions
from gpubackprop.kernels.cuda.storage import VECTOR_BYTES, storage_of
from gpubackprop.kernels.cuda.unroll import static_range, unrolled
from gpubackprop.optimizers import Optimizer
from gpubackprop.step.state import (
    C1,
    C2,
    CURSOR,
    FACTOR,
    GOOD,
    GROW,
    GROW_AFTER,
    LARGEST_SCALE,
    LEAST_SCALE,
    NORM,
    RATE,
    SCALE,
    SHRINK,
    SKIP,
    STEPS,
)  # fmt: skip


@cache
def accumulate(dtype: np.dtype[Any], width: int, first: bool) -> Source:
    """out = total + term, or (``first``) term; ``out`` may be either."""
    storage = storage_of(dtype)
    load, store = access_within(storage, width)
    real = numba.from_dtype(dtype)

    @unrolled
    def kernel(total: P[S], term: P[S], out: P[S], size: I) -> None:
        a = cuda.local.array(width, real)
        b = cuda.local.array(width, real)
        i = numba.int64(cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x) * width
        while i < size:
            load(b, 0, term, i, size)
            if not first:
                load(a, 0, total, i, size)
                for k in static_range(width):
                    b[k] = a[k] + b[k]
            store(out, i, b, 0, size)
            i += cuda.gridDim.x * cuda.blockDim.x * width

    name = label("accumulate", storage, "first" if first else "", f"v{width}")
    return Source(name, kernel, declared(kernel, dtype))


def large(dtype: np.dtype[Any]) -> tuple[Any, Any]:
    """Return (limit, unit): squares of numbers up to ``limit`` add up without overflow, and so do those beyond times ``unit``."""
    real, top = dtype.type, np.finfo(dtype).maxexp
    return real(2.0 ** (3 * top // 8)), real(2.0 ** (-5 * top // 8))


@cache
def sum_of_squares(dtype: np.dtype[Any], threads: int = THREADS) -> Source:
    """partial[2 block : 2 block + 2] = its share of sum(g^2). g is aligned to 16 bytes.

    The squares of numbers beyond :func:`large` are added up separately, in scaled units, so that none overflows (Blue (1978)).
    """
    storage = storage_of(dtype)
    limit, shrink = large(dtype)
    width = VECTOR_BYTES // dtype.itemsize
    load, _, load1, _, _ = access(storage, width)
    real, zero = numba.from_dtype(dtype), dtype.type(0)
    block_sum, _ = block_reductions(threads)
    fabs, where = MATH.fabs, MATH.where
    PARTS = 2

    @inlined
    def squares(x: Any) -> Any:
        above = fabs(x) > limit
        y = where(above, x * shrink, zero)
        x = where(above, zero, x)
        return x * x, y * y

    @unrolled
    def kernel(g: P[S], partial: P[S], size: I) -> None:
        warps = cuda.shared.array(32, real)
        r = cuda.local.array(PARTS * width, real)
        sums = cuda.local.array(width, real)
        above = zero
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
                    x2, y2 = squares(r[part * width + k])
                    sums[k] = sums[k] + x2
                    above = above + y2
            i += PARTS * step
        while i < whole:
            load(r, 0, g, i)
            for k in static_range(width):
                x2, y2 = squares(r[k])
                sums[k] = sums[k] + x2
                above = above + y2
            i += step
        total = zero
        for k in static_range(width):
            total = total + sums[k]
        if whole + thread < size:
            x2, y2 = squares(load1(g, whole + thread))
            total = total + x2
            above = above + y2
        total = block_sum(total, warps)
        above = block_sum(above, warps)
        if cuda.threadIdx.x == 0:
            partial[2 * cuda.blockIdx.x] = total
            partial[2 * cuda.blockIdx.x + 1] = above

    return Source(label("sum_of_squares", storage), kernel, declared(kernel, dtype))


@cache
def clip(dtype: np.dtype[Any], loss_scaling: bool, threads: int = THREADS) -> Source:
    """The norm and the factor of the gradient from the sums of its squares.

    With ``loss_scaling`` they are those of the gradient over the loss scale, and SKIP says whether it is infinite or NaN.
    """
    storage = storage_of(dtype)
    real, zero, one, tiny = numba.from_dtype(dtype), dtype.type(0), dtype.type(1), dtype.type(1e-6)
    largest, unit = np.finfo(dtype).max, large(dtype)[1]
    block_sum, _ = block_reductions(threads)
    sqrt, where = MATH.sqrt, MATH.where

    @unrolled
    def kernel(partial: P[R], scalars: P[R], max_norm: R, count: I) -> None:
        warps = cuda.shared.array(32, real)
        total = zero
        above = zero
        i = numba.int64(cuda.threadIdx.x)
        while i < count:
            total = total + partial[2 * i]
            above = above + partial[2 * i + 1]
            i += threads
        total = block_sum(total, warps)
        above = block_sum(above, warps)
        if cuda.threadIdx.x == 0:
            u = where(above > zero, unit, one)  # all that follows is in units of 1 / u
            norm = where(above > zero, sqrt(total * unit * unit + above), sqrt(total))
            scale = scalars[SCALE] if loss_scaling else one
            scalars[SKIP] = where(norm <= largest, zero, one) if loss_scaling else zero
            norm = norm / scale
            factor = max_norm * u / (norm + tiny * u)
            scalars[NORM] = norm / u
            scalars[FACTOR] = where(factor > one, one, factor) / scale  # NaN stays NaN

    name = label("clip", storage, "scaled" if loss_scaling else "")
    return Source(name, kernel, declared(kernel, dtype), threads)


@per_definition(lambda dtype: MATH)
def advance(optimizer: Optimizer, dtype: np.dtype[Any], loss_scaling: bool) -> Source:
    """The constants of the next step, by one thread in float64.

    With ``loss_scaling`` a skipped step halves the scale and does not count; many good steps in a row double it.
    """
    real = dtype.type
    constants = inlined(optimizer.define(np.float64, MATH)[0])
    factor = inlined(optimizer.schedule.define(MATH))
    count, of_schedule_count = len(optimizer.numbers), len(optimizer.schedule.numbers)
    one = np.float64(1)
    zero, single, shrink, grow, limit = map(real, (0, 1, SHRINK, GROW, GROW_AFTER))
    least, largest = real(LEAST_SCALE), real(LARGEST_SCALE)

    @partial(unrolled, numbers=count, of_schedule=of_schedule_count)
    def kernel(rate: P[F8], counters: P[I], scalars: P[R], batch: I, numbers: F8, of_schedule: F8) -> None:
        counters[CURSOR] = counters[CURSOR] + batch
        skipped = False
        if loss_scaling:
            good = scalars[GOOD] + single
            if scalars[SKIP] > zero:
                skipped = True
                scalars[SCALE] = max(scalars[SCALE] * shrink, least)
                good = zero
            elif good >= limit:
                scalars[SCALE] = min(scalars[SCALE] * grow, largest)
                good = zero
            scalars[GOOD] = good
        if not skipped:
            t = numba.float64(counters[STEPS])
            eta, c1, c2 = constants(t + one, rate[0] * factor(t, *of_schedule), *numbers)
            scalars[RATE] = real(eta)
            scalars[C1] = real(c1)
            scalars[C2] = real(c2)
            counters[STEPS] = counters[STEPS] + 1

    names = (type(optimizer).__name__.lower(), type(optimizer.schedule).__name__.lower())
    name = label("advance", *names, storage_of(dtype), "scaled" if loss_scaling else "")
    return Source(name, kernel, declared(kernel, dtype))


@per_definition(lambda dtype: MATH)
def update(
    optimizer: Optimizer, dtype: np.dtype[Any], width: int, weights: np.dtype[Any] | None = None, threads: int = THREADS
) -> Source:
    """One step of an optimizer; states are rows of ``size``.

    With ``weights``, a 16-bit dtype, ``copy`` gets the parameters in it, and a step with SKIP set changes nothing.
    """
    storage = storage_of(dtype)
    load, store, load1, store1, _ = access(storage, width)
    mixed = weights is not None
    copy_storage = storage_of(weights) if weights is not None else storage
    _, store_copy, _, store_copy1, _ = access(copy_storage, width)
    real, zero = numba.from_dtype(dtype), dtype.type(0)
    step_of = inlined(optimizer.define(dtype.type, MATH)[1])
    where = MATH.where
    clipped, count = optimizer.clipping[1] is not None, len(optimizer.numbers)
    has_state, has_second, has_third = (optimizer.n_states > k for k in range(3))
    vector = width > 1

    @partial(unrolled, numbers=count)
    def kernel(
        parameters: P[S], gradients: P[S], states: P[S], scalars: P[S], copy: P[W], size: I, limit: S, numbers: S,
    ) -> None:  # fmt: skip
        shared = cuda.shared.array(8, real)
        p = cuda.local.array(width, real)
        g = cuda.local.array(width, real)
        s0 = cuda.local.array(width, real)
        s1 = cuda.local.array(width, real)
        s2 = cuda.local.array(width, real)
        if cuda.threadIdx.x < 8:  # one thread reads each, for all
            shared[cuda.threadIdx.x] = scalars[cuda.threadIdx.x]
        cuda.syncthreads()
        rate = shared[RATE]
        c1 = shared[C1]
        c2 = shared[C2]
        factor = shared[FACTOR]
        for k in static_range(width):
            s0[k] = zero
            s1[k] = zero
            s2[k] = zero
        thread = numba.int64(cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x)
        i = thread * width
        step = cuda.gridDim.x * cuda.blockDim.x * width
        whole = size - size % width
        end = size
        if mixed and shared[SKIP] > zero:
            whole = numba.int64(0)
            end = numba.int64(0)
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
                p[k], s0[k], s1[k], s2[k] = step_of(p[k], x, s0[k], s1[k], s2[k], rate, c1, c2, *numbers)
            store(parameters, i, p, 0)
            if has_state:
                store(states, i, s0, 0)
            if has_second:
                store(states, size + i, s1, 0)
            if has_third:
                store(states, 2 * size + i, s2, 0)
            if mixed:
                store_copy(copy, i, p, 0)
            i += step
        if vector:  # the few elements after the last whole vector; there is at most one state then
            i = whole + thread
            if i < end:
                x = load1(gradients, i) * factor
                if clipped:
                    x = where(x > limit, limit, where(x < -limit, -limit, x))
                a = zero
                if has_state:
                    a = load1(states, i)
                a, b, _, _ = step_of(load1(parameters, i), x, a, zero, zero, rate, c1, c2, *numbers)
                store1(parameters, i, a)
                if has_state:
                    store1(states, i, b)
                if mixed:
                    store_copy1(copy, i, a)

    name = label("update", type(optimizer).__name__.lower(), storage, f"v{width}", copy_storage if mixed else "")
    return Source(name, kernel, declared(kernel, dtype, W=copy_storage), threads)


def update_width(optimizer: Optimizer, dtype: np.dtype[Any], size: int, *addresses: int) -> int:
    """Return the vector width of :func:`update`: 1 where a later row of the states would start off 16 bytes.

    Also 1 for several states in float64, which would take more than 64 registers.
    """
    width = VECTOR_BYTES // dtype.itemsize
    several = optimizer.n_states > 1
    fits = not any(a % VECTOR_BYTES for a in addresses) and not (several and (size % width or dtype.itemsize == 8))
    return width if fits else 1
