"""CPU kernels of the losses: bias add, loss, its gradient and the bias gradient; see :mod:`gpubackprop.kernels.cpu.passes`."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from gpubackprop.definitions import per_definition
from gpubackprop.kernels.cpu.compile import Kernel, PerThread, compiled, inlined, maximum, share
from gpubackprop.kernels.cpu.math import vector_math
from gpubackprop.kernels.cpu.passes import ROWS, SHORT, add_shares
from gpubackprop.kernels.cpu.threads import is_last
from gpubackprop.kernels.cpu.vector import define_sum
from gpubackprop.kernels.softmax import define_log_softmax
from gpubackprop.losses import Loss

BLOCK = 4 * ROWS  # short rows taken together
ARRAYS = 5  # of BLOCK numbers, besides two for each column: the scratch of such rows


def loss_scratch(d: int, dtype: np.dtype[Any], threads: int) -> PerThread:
    """Return the memory of a loss of rows of d numbers, for each thread."""
    return PerThread(np.empty((threads, 2 * d + ARRAYS, BLOCK) if d < SHORT else (threads, 3, d), dtype))


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
def compile_bias_loss(
    loss: Loss, dtype: np.dtype[Any], indices: bool, weighted: bool, in_place: bool, short: bool
) -> Kernel:
    """Return kernel(z, b, y, weight, scale, count, out, db, value, sums, scratch, losses, arrived).

    ``count`` (1,) float64 is what the sum in value[1] grows by, times the loss. ``sums``, ``losses`` and ``scratch`` are memory
    for each share, (shares_of(n), d), (shares_of(n),) float64 and :func:`loss_scratch`; ``arrived`` (1,) int64 is 0. In place,
    ``out`` is ``z``; ``short`` is whether d is less than SHORT.
    """
    softmax = _short_softmax_loss if short else _softmax_loss
    make = _elementwise_loss if loss.family == "elementwise" else softmax
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
        terms = scratch.reshape(-1)[: z.shape[1]]
        first, last = share(sums.shape[0], 1, piece, pieces)
        for k in range(first, last):
            sums_k, total = sums[k], 0.0
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
    """Return the kernel for rows of SHORT numbers or more, one row at a time."""
    chain = define_log_softmax(loss, dtype, vector_math(dtype), inlined)
    lowest, shift, term, log_probability, one_hot, value_of, slope_of, gradient = chain
    one, log, row_sum, real = dtype.type(1), vector_math(dtype).log, _define_row_sum(dtype), dtype.type
    zero = dtype.type(0)

    def read_index(y_i, j):  # type: ignore[no-untyped-def]
        return one_hot(j, y_i)

    def read_dense(y_i, j):  # type: ignore[no-untyped-def]
        return y_i[j]

    read = inlined(read_index if indices else read_dense)

    def softmax_loss(  # type: ignore[no-untyped-def]
        z, b, y, weight, scale, count, out, db, value, sums, scratch, losses, arrived, piece, pieces
    ):
        d = z.shape[1]
        u, q, e, terms = one / real(d), scratch[0], scratch[1], scratch[2]
        first, last = share(sums.shape[0], 1, piece, pieces)
        for k in range(first, last):
            sums_k, losses[k] = sums[k], 0.0
            sums_k[:] = zero
            for i in range(k * ROWS, min((k + 1) * ROWS, z.shape[0])):
                w, y_i, top = weight[i] if weighted else one, y[i], lowest
                for j in range(d):
                    o = z[i, j] + b[j]
                    q[j] = o
                    if not in_place:
                        z[i, j] = o
                    top = maximum(top, o)
                for j in range(d):
                    q[j] = shift(q[j], top)
                    e[j] = term(q[j])
                total = row_sum(e)
                log_s = log(total)
                for j in range(d):
                    t, q_j = read(y_i, j), log_probability(q[j], log_s)
                    terms[j] = value_of(q_j, t, u)
                    q[j] = slope_of(q_j, t, u)
                row, slope = row_sum(terms), row_sum(q) / total
                for j in range(d):
                    do = gradient(q[j], e[j], slope) * (w * scale)
                    out[i, j] = do
                    sums_k[j] += do
                losses[k] += row * w
        if is_last(arrived, pieces):
            add_shares(sums, db)
            add_losses(losses, scale, count, value)

    return softmax_loss


def _short_softmax_loss(loss: Loss, dtype: np.dtype[Any], indices: bool, weighted: bool, in_place: bool) -> Any:
    """Return the kernel for rows of less than SHORT numbers: BLOCK of them at a time, transposed, so that loops run over rows.

    Sums are taken in the order of the other kernel.
    """
    chain = define_log_softmax(loss, dtype, vector_math(dtype), inlined)
    lowest, shift, term, log_probability, one_hot, value_of, slope_of, gradient = chain
    zero, one, log, real = dtype.type(0), dtype.type(1), vector_math(dtype).log, dtype.type

    def read_index(y, i, j):  # type: ignore[no-untyped-def]
        return one_hot(j, y[i])

    def read_dense(y, i, j):  # type: ignore[no-untyped-def]
        return y[i, j]

    read = inlined(read_index if indices else read_dense)

    def softmax_loss(  # type: ignore[no-untyped-def]
        z, b, y, weight, scale, count, out, db, value, sums, scratch, losses, arrived, piece, pieces
    ):
        n, d = z.shape
        u, q, e = one / real(d), scratch[:d], scratch[d : 2 * d]
        top, total, row, slope, t = (
            scratch[2 * d],
            scratch[2 * d + 1],
            scratch[2 * d + 2],
            scratch[2 * d + 3],
            scratch[2 * d + 4],
        )
        first, last = share(sums.shape[0], 1, piece, pieces)
        for begin in range(first * ROWS, min(last * ROWS, n), BLOCK):
            rows = min(BLOCK, min(last * ROWS, n) - begin)
            z_k, y_k, out_k = z[begin : begin + rows], y[begin : begin + rows], out[begin : begin + rows]
            for r in range(rows):
                top[r], total[r], row[r], slope[r] = lowest, zero, zero, zero
            for j in range(d):
                q_j, b_j = q[j], b[j]
                for r in range(rows):
                    o = z_k[r, j] + b_j
                    q_j[r] = o
                    if not in_place:
                        z_k[r, j] = o
                for r in range(rows):
                    top[r] = maximum(top[r], q_j[r])
            for j in range(d):
                q_j, e_j = q[j], e[j]
                for r in range(rows):
                    q_j[r] = shift(q_j[r], top[r])
                for r in range(rows):
                    e_j[r] = term(q_j[r])
                for r in range(rows):
                    total[r] += e_j[r]
            for r in range(rows):
                top[r] = log(total[r])
            for j in range(d):
                q_j = q[j]
                for r in range(rows):
                    t[r] = read(y_k, r, j)
                for r in range(rows):
                    q_jr = log_probability(q_j[r], top[r])
                    row[r] += value_of(q_jr, t[r], u)
                    q_j[r] = slope_of(q_jr, t[r], u)
                for r in range(rows):
                    slope[r] += q_j[r]
            for r in range(rows):
                slope[r] /= total[r]
                t[r] = weight[begin + r] if weighted else one
            for j in range(d):
                q_j, e_j = q[j], e[j]
                for r in range(rows):
                    q_j[r] = gradient(q_j[r], e_j[r], slope[r]) * (t[r] * scale)
                for r in range(rows):
                    out_k[r, j] = q_j[r]
            for of_share in range(0, rows, ROWS):
                k, size, sum_k = (begin + of_share) // ROWS, min(ROWS, rows - of_share), 0.0
                row_k, w_k, q_k = row[of_share:], t[of_share:], q[:, of_share:]
                for r in range(size):
                    sum_k += row_k[r] * w_k[r]
                losses[k] = sum_k
                for j in range(d):
                    sum_j = zero
                    for r in range(size):
                        sum_j += q_k[j, r]
                    sums[k, j] = sum_j
        if is_last(arrived, pieces):
            add_shares(sums, db)
            add_losses(losses, scale, count, value)

    return softmax_loss
