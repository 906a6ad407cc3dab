"""CPU kernels of the losses: bias add, loss, its gradient and the bias gradient; see :mod:`gpubackprop.kernels.cpu.passes`."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from gpubackprop.definitions import per_definition
from gpubackprop.kernels.cpu.compile import Kernel, PerThread, compiled, inlined, maximum, share
from gpubackprop.kernels.cpu.math import vector_math
from gpubackprop.kernels.cpu.passes import ROWS, add_shares
from gpubackprop.kernels.cpu.threads import is_last
from gpubackprop.kernels.cpu.vector import define_sum
from gpubackprop.kernels.softmax import define_log_softmax
from gpubackprop.losses import Loss

SHORT = 32
"""Least length of a row whose loop fills vectors; for shorter rows all exponentials are one long loop."""


def loss_scratch(n: int, d: int, dtype: np.dtype[Any], threads: int) -> PerThread:
    """Return the memory of a loss of n rows of d numbers: for each thread, five arrays of some rows."""
    return PerThread(np.empty((threads, 5, d * (min(n, ROWS) if d < SHORT else 1)), dtype))


@cache
def _define_row_sum(dtype: np.dtype[Any]) -> Any:
    """Return row_sum(x): the sum of the numbers of a row."""
    in_lanes, real, zero = define_sum(dtype), dtype.type, dtype.type(0)

    def row_sum(x):  # type: ignore[no-untyped-def]
        if x.size >= SHORT:
            return real(in_lanes(x.ctypes.data, x.size, 1.0))
        total = zero
        for j in range(x.size):
            total += x[j]
        return total

    return inlined(row_sum)


@per_definition(vector_math)
def compile_bias_loss(loss: Loss, dtype: np.dtype[Any], indices: bool, weighted: bool, in_place: bool) -> Kernel:
    """Return kernel(z, b, y, weight, scale, count, out, db, value, sums, scratch, losses, arrived).

    ``count`` (1,) float64 is what the sum in value[1] grows by, times the loss. ``sums``, ``losses`` and ``scratch`` are memory
    for each share, (shares_of(n), d), (shares_of(n),) float64 and :func:`loss_scratch`; ``arrived`` (1,) int64 is 0. In place,
    ``out`` is ``z``.
    """
    make = _elementwise_loss if loss.family == "elementwise" else _softmax_loss
    return compiled(make(loss, dtype, indices, weighted, in_place))


@inlined
def add_losses(losses, scale, count, value):  # type: ignore[no-untyped-def]
    """Write the loss from the sums of all shares, and add it to the sum over batches."""
    total = 0.0
    for k in range(losses.size):
        total += losses[k]
    value[0] = total * scale
    value[1] += total * scale * count[0]


def _elementwise_loss(loss: Loss, dtype: np.dtype[Any], indices: bool, weighted: bool, in_place: bool) -> Any:
    ell, dell = map(inlined, loss.scalars(dtype, vector_math(dtype)))
    zero, one, row_sum = dtype.type(0), dtype.type(1), _define_row_sum(dtype)

    def elementwise_loss(  # type: ignore[no-untyped-def]
        z, b, y, weight, scale, count, out, db, value, sums, scratch, losses, arrived, piece, pieces
    ):
        first, last = share(sums.shape[0], 1, piece, pieces)
        for k in range(first, last):
            sums_k, terms, total = sums[k], scratch[0, : z.shape[1]], 0.0
            sums_k[:] = zero
            for i in range(k * ROWS, min((k + 1) * ROWS, z.shape[0])):
                w = weight[i] if weighted else one
                for j in range(z.shape[1]):
                    o = z[i, j] + b[j]
                    terms[j] = ell(o, y[i, j])
                    do = dell(o, y[i, j]) * (w * scale)
                    if in_place:
                        z[i, j] = do
                    else:
                        z[i, j] = o
                        out[i, j] = do
                for j in range(z.shape[1]):  # a separate loop: with fewer arrays per loop the compiler vectorizes it
                    sums_k[j] += out[i, j]
                total += row_sum(terms) * w
            losses[k] = total
        if is_last(arrived, pieces):
            add_shares(sums, db)
            add_losses(losses, scale, count, value)

    return elementwise_loss


def _softmax_loss(loss: Loss, dtype: np.dtype[Any], indices: bool, weighted: bool, in_place: bool) -> Any:
    chain = define_log_softmax(loss, dtype, vector_math(dtype), inlined)
    lowest, shift, term, log_probability, one_hot, value_of, slope_of, gradient = chain
    zero, one, log, row_sum = dtype.type(0), dtype.type(1), vector_math(dtype).log, _define_row_sum(dtype)

    def read_index(y_i, j):  # type: ignore[no-untyped-def]
        return one_hot(j, y_i)

    def read_dense(y_i, j):  # type: ignore[no-untyped-def]
        return y_i[j]

    read = inlined(read_index if indices else read_dense)

    def softmax_loss(  # type: ignore[no-untyped-def]
        z, b, y, weight, scale, count, out, db, value, sums, scratch, losses, arrived, piece, pieces
    ):
        d = z.shape[1]
        u, together = one / dtype_of(d), scratch.shape[1] // d
        first, last = share(sums.shape[0], 1, piece, pieces)
        for k in range(first, last):
            sums_k, losses[k], end = sums[k], 0.0, min((k + 1) * ROWS, z.shape[0])
            sums_k[:] = zero
            for begin in range(k * ROWS, end, together):
                rows = min(together, end - begin)
                flat_q, flat_e = scratch[0, : rows * d], scratch[1, : rows * d]
                terms, sums_e, logs = scratch[2, :d], scratch[3, :rows], scratch[4, :rows]
                for r in range(rows):
                    q, top = flat_q[r * d : (r + 1) * d], lowest
                    for j in range(d):
                        o = z[begin + r, j] + b[j]
                        q[j] = o
                        if not in_place:
                            z[begin + r, j] = o
                        top = maximum(top, o)
                    for j in range(d):
                        q[j] = shift(q[j], top)
                for j in range(rows * d):
                    flat_e[j] = term(flat_q[j])
                for r in range(rows):
                    sums_e[r] = row_sum(flat_e[r * d : (r + 1) * d])
                for r in range(rows):
                    logs[r] = log(sums_e[r])
                for r in range(rows):
                    i, q, e = begin + r, flat_q[r * d : (r + 1) * d], flat_e[r * d : (r + 1) * d]
                    w, y_i, log_s = weight[i] if weighted else one, y[i], logs[r]
                    if d < SHORT:
                        row, sum_g = zero, zero
                        for j in range(d):
                            t, q_j = read(y_i, j), log_probability(q[j], log_s)
                            row += value_of(q_j, t, u)
                            q[j] = slope_of(q_j, t, u)
                            sum_g += q[j]
                    else:
                        for j in range(d):
                            t, q_j = read(y_i, j), log_probability(q[j], log_s)
                            terms[j] = value_of(q_j, t, u)
                            q[j] = slope_of(q_j, t, u)
                        row, sum_g = row_sum(terms), row_sum(q)
                    slope = sum_g / sums_e[r]
                    for j in range(d):
                        do = gradient(q[j], e[j], slope) * (w * scale)
                        out[i, j] = do
                        sums_k[j] += do
                    losses[k] += row * w
        if is_last(arrived, pieces):
            add_shares(sums, db)
            add_losses(losses, scale, count, value)

    dtype_of = dtype.type
    return softmax_loss
