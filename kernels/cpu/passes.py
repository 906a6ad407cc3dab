"""CPU kernels: one pass over memory each, compiled by Numba from the definitions.

They know no activation, loss or optimizer by name. Loops run over rows, the inner one over columns, so that every array is
read in the order it lies in memory and the inner loop is vectorized. Where an output may be an input there are two variants
(``in_place``): the compiler vectorizes only what it knows to be one or two arrays.

The order of every sum is a definition, so that it is the same on every machine. A column sum adds ROWS rows in their order, then
those sums in pairs, pairs of pairs and so on. A sum along a row is in order where the row is short, and otherwise in lanes
(:func:`gpubackprop.kernels.cpu.vector.define_sum`), as is the norm of the gradient. The losses of the rows are added in float64.

The last two arguments of each are ``thread`` and ``threads``: threads share rows, columns or elements, never a sum, so that no
result depends on their number. What is too small to be shared is done by the first.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from gpubackprop.activations import Activation
from gpubackprop.definitions import per_definition
from gpubackprop.kernels.cpu.compile import Kernel, compiled, inlined, maximum, share, where
from gpubackprop.kernels.cpu.math import vector_math
from gpubackprop.kernels.cpu.threads import available_threads, is_last
from gpubackprop.kernels.cpu.vector import define_sum
from gpubackprop.kernels.softmax import define_log_softmax
from gpubackprop.losses import Loss
from gpubackprop.optimizers import Optimizer
from gpubackprop.philox import define_philox
from gpubackprop.step.state import C1, C2, CURSOR, FACTOR, NORM, RATE, STEPS

BLOCKS = 64  # of four random numbers that are made at a time
LINE = 16  # elements that a share is a multiple of, so that two threads rarely write to one cache line
ROWS = 16  # in a share that has sums of its own; so few that these sums lose no digits
SHORT = (
    32  # numbers in a row from which a loop over them fills vectors: the exponentials of shorter rows are one long loop
)
SMALLER = 2.0**-600  # by which numbers are multiplied whose squares are infinite


def shares_of(n: int) -> int:
    """Return the number of shares of n rows that have sums of their own."""
    return -(-n // ROWS)


def loss_scratch(n: int, d: int) -> tuple[int, int, int]:
    """Return the shape of the memory that a loss of n rows of d numbers needs: for each thread, five arrays of some rows."""
    return available_threads(), 5, d * (min(n, ROWS) if d < SHORT else 1)


@inlined
def add_shares(sums, total):  # type: ignore[no-untyped-def]
    """Add the sums of all shares in pairs, pairs of pairs and so on; the shares' own sums are lost."""
    apart = 1
    while apart < sums.shape[0]:
        for k in range(0, sums.shape[0] - apart, 2 * apart):
            for j in range(sums.shape[1]):
                sums[k, j] += sums[k + apart, j]
        apart *= 2
    total[:] = sums[0]


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
def compile_bias_activation_forward(activation: Activation, dtype: np.dtype[Any], in_place: bool) -> Kernel:
    """Return kernel(z, b, h): z <- z + b, h = phi(z); in place, h is z: z <- phi(z + b)."""
    phi = inlined(activation.scalars(dtype, vector_math(dtype))[0])

    def forward(z, b, h, thread, threads):  # type: ignore[no-untyped-def]
        first, last = share(z.shape[0], 1, thread, threads)
        for i in range(first, last):
            for j in range(z.shape[1]):
                z_ij = z[i, j] + b[j]
                if in_place:
                    z[i, j] = phi(z_ij)
                else:
                    z[i, j] = z_ij
                    h[i, j] = phi(z_ij)

    return compiled(forward)


@per_definition(vector_math)
def compile_bias_activation_backward(activation: Activation, dtype: np.dtype[Any], in_place: bool) -> Kernel:
    """Return kernel(dh, s, delta, db, sums, arrived), s = h or z as phi' needs; in place, delta is dh.

    ``sums`` is memory for the column sums of each share, (shares_of(n), d), and ``arrived`` (1,) int64 is 0.
    """
    dphi = inlined(activation.scalars(dtype, vector_math(dtype))[1])
    zero = dtype.type(0)

    def backward(dh, s, delta, db, sums, arrived, thread, threads):  # type: ignore[no-untyped-def]
        first, last = share(sums.shape[0], 1, thread, threads)
        for k in range(first, last):
            sums_k = sums[k]
            sums_k[:] = zero
            for i in range(k * ROWS, min((k + 1) * ROWS, dh.shape[0])):
                for j in range(dh.shape[1]):
                    delta_ij = dh[i, j] * dphi(s[i, j], s[i, j])
                    if in_place:
                        dh[i, j] = delta_ij
                    else:
                        delta[i, j] = delta_ij
                    sums_k[j] += delta_ij
        if is_last(arrived, threads):
            add_shares(sums, db)

    return compiled(backward)


@per_definition(vector_math)
def compile_bias_loss(loss: Loss, dtype: np.dtype[Any], indices: bool, weighted: bool, in_place: bool) -> Kernel:
    """Return kernel(z, b, y, weight, scale, count, out, db, value, sums, scratch, losses, arrived).

    ``count`` (1,) float64 is what the sum in value[1] grows by, times the loss. ``sums``, ``losses`` and ``scratch`` are memory
    for each share, (shares_of(n), d), (shares_of(n),) float64 and loss_scratch(n, d); ``arrived`` (1,) int64 is 0. In place,
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
        z, b, y, weight, scale, count, out, db, value, sums, scratch, losses, arrived, thread, threads
    ):
        first, last = share(sums.shape[0], 1, thread, min(threads, scratch.shape[0]))
        for k in range(first, last):
            sums_k, terms, total = sums[k], scratch[thread, 0, : z.shape[1]], 0.0
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
                for j in range(z.shape[1]):  # a loop of its own: with less memory in a loop, the compiler vectorizes it
                    sums_k[j] += out[i, j]
                total += row_sum(terms) * w
            losses[k] = total
        if is_last(arrived, threads):
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
        z, b, y, weight, scale, count, out, db, value, sums, scratch, losses, arrived, thread, threads
    ):
        d = z.shape[1]
        u, together = one / dtype_of(d), scratch.shape[2] // d
        first, last = share(sums.shape[0], 1, thread, min(threads, scratch.shape[0]))
        for k in range(first, last):
            sums_k, losses[k], end = sums[k], 0.0, min((k + 1) * ROWS, z.shape[0])
            sums_k[:] = zero
            for begin in range(k * ROWS, end, together):
                rows = min(together, end - begin)
                flat_q, flat_e = scratch[thread, 0, : rows * d], scratch[thread, 1, : rows * d]
                terms, sums_e, logs = scratch[thread, 2, :d], scratch[thread, 3, :rows], scratch[thread, 4, :rows]
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
        if is_last(arrived, threads):
            add_shares(sums, db)
            add_losses(losses, scale, count, value)

    dtype_of = dtype.type
    return softmax_loss


@cache
def compile_normalize_weights(dtype: np.dtype[Any]) -> Kernel:
    """Return kernel(weight, out, total): out = weight / sum(weight), or 0 where that is 0, and the sum."""

    def normalize_weights(weight, out, total, thread, threads):  # type: ignore[no-untyped-def]
        if thread > 0:
            return
        top, shares = 0.0, 0.0
        for i in range(weight.size):
            top = max(top, weight[i])
        top = top if top > 0.0 else 1.0  # relative to the largest, no sum is too large or too small
        for i in range(weight.size):
            shares += weight[i] / top
        total[0] = shares * top
        shares = 1.0 if shares == 0.0 else shares
        for i in range(weight.size):
            out[i] = weight[i] / top / shares

    return compiled(normalize_weights)


@cache
def compile_dropout(dtype: np.dtype[Any]) -> Kernel:
    """Return kernel(x, threshold, scale, seed_low, seed_high, layer, counters, out, first_block) on flat arrays."""
    philox = inlined(define_philox(np.uint32, np.uint64))
    zero, u32, u64, high = dtype.type(0), np.uint32, np.uint64, np.uint64(32)

    def dropout(x, threshold, scale, seed_low, seed_high, layer, counters, out, first_block, thread, threads):  # type: ignore[no-untyped-def]
        begin, end = share(x.size, 4, thread, threads)
        step, limit = u32(counters[STEPS]), u32(threshold)
        words, mixed = np.empty((4, BLOCKS), np.uint32), np.empty((BLOCKS, 4), np.uint32)
        words0, words1, words2, words3 = words[0], words[1], words[2], words[3]
        flat = mixed.reshape(-1)
        for first in range(begin, end, 4 * BLOCKS):
            for k in range(BLOCKS):  # several at a time, so that the loop is vectorized
                block = u64(first_block + first // 4 + k)
                words0[k], words1[k], words2[k], words3[k] = philox(
                    u32(block), u32(block >> high), step, u32(layer), u32(seed_low), u32(seed_high)
                )
            for k in range(BLOCKS):
                mixed[k, 0], mixed[k, 1], mixed[k, 2], mixed[k, 3] = words0[k], words1[k], words2[k], words3[k]
            part, to = x[first : min(first + 4 * BLOCKS, end)], out[first : min(first + 4 * BLOCKS, end)]
            for k in range(part.size):
                to[k] = where(flat[k] < limit, part[k] * scale, zero)

    return compiled(dropout)


@cache
def compile_gather(dtype: np.dtype[Any], ndim: int) -> Kernel:
    """Return kernel(source, order, counters, out): the rows of the next mini-batch; places outside are cut."""

    def gather_rows(source, order, counters, out, thread, threads):  # type: ignore[no-untyped-def]
        last, last_row = order.size - 1, source.shape[0] - 1
        first, (begin, end) = min(max(counters[CURSOR], 0), last), share(out.shape[0], 1, thread, threads)
        for i in range(begin, end):
            k = min(max(order[min(first + i, last)], 0), last_row)
            for j in range(out.shape[1]):
                out[i, j] = source[k, j]

    def gather_values(source, order, counters, out, thread, threads):  # type: ignore[no-untyped-def]
        if thread > 0:
            return
        last, last_row = order.size - 1, source.shape[0] - 1
        first = min(max(counters[CURSOR], 0), last)
        for i in range(out.shape[0]):
            out[i] = source[min(max(order[min(first + i, last)], 0), last_row)]

    return compiled(gather_rows if ndim == 2 else gather_values)


@cache
def compile_accumulate(dtype: np.dtype[Any], first: bool) -> Kernel:
    """Return kernel(total, term, out): out = total + term; for the first term kernel(term, out): out = term."""

    def copy(term, out, thread, threads):  # type: ignore[no-untyped-def]
        first, last = share(term.size, LINE, thread, threads)
        out[first:last] = term[first:last]

    def accumulate(total, term, out, thread, threads):  # type: ignore[no-untyped-def]
        first, last = share(term.size, LINE, thread, threads)
        total, term, out = total[first:last], term[first:last], out[first:last]
        for i in range(term.size):
            out[i] = total[i] + term[i]

    return compiled(copy if first else accumulate)


@cache
def compile_clip(dtype: np.dtype[Any]) -> Kernel:
    """Return kernel(gradients, max_norm, scalars)."""
    squares = define_sum(dtype, squares=True)

    def clip(gradients, max_norm, scalars, thread, threads):  # type: ignore[no-untyped-def]
        if thread > 0:
            return
        scale, total = 1.0, squares(gradients.ctypes.data, gradients.size, 1.0)
        if total == np.inf:  # so it may be in float64: what is much smaller than the largest may become 0
            scale = SMALLER
            total = squares(gradients.ctypes.data, gradients.size, scale)
        norm = np.sqrt(total)
        scalars[NORM] = norm / scale
        factor = max_norm / (norm + 1e-6 * scale) * scale
        scalars[FACTOR] = 1.0 if factor > 1.0 else factor

    return compiled(clip)


def with_numbers(function: Any, names: str, count: int) -> tuple[Any, Any]:
    """Return f(names, n), which gives ``function`` a tuple of so many numbers one by one, and read(array), which makes the tuple.

    A tuple is in registers; numbers of an array would be read again after each store of a loop.
    """
    given = "".join(f", n[{k}]" for k in range(count))
    made = "".join(f"numbers[{k}], " for k in range(count))
    namespace = {"__name__": __name__, "function": inlined(function)}
    exec(f"def spread({names}, n):\n    return function({names}{given})\n", namespace)
    exec(f"def read(numbers):\n    return ({made})\n", namespace)
    return inlined(namespace["spread"]), inlined(namespace["read"])


@per_definition(lambda dtype: vector_math(np.dtype(np.float64)))
def compile_advance(optimizer: Optimizer, dtype: np.dtype[Any]) -> Kernel:
    """Return kernel(rate, batch, counters, scalars, numbers, of_schedule): the numbers of the optimizer and its schedule."""
    m = vector_math(np.dtype(np.float64))
    constants, read = with_numbers(optimizer.define(np.float64, m)[0], "t, lr", len(optimizer.numbers))
    schedule = optimizer.schedule
    factor, read_schedule = with_numbers(schedule.define(m), "t", len(schedule.numbers))

    def advance(rate, batch, counters, scalars, numbers, of_schedule, thread, threads):  # type: ignore[no-untyped-def]
        if thread > 0:
            return
        t = float(counters[STEPS])
        lr, c1, c2 = constants(t + 1.0, rate[0] * factor(t, read_schedule(of_schedule)), read(numbers))
        scalars[RATE], scalars[C1], scalars[C2] = lr, c1, c2
        counters[STEPS] += 1
        counters[CURSOR] += batch

    return compiled(advance)


@per_definition(vector_math)
def compile_update(optimizer: Optimizer, dtype: np.dtype[Any]) -> Kernel:
    """Return kernel(parameters, gradients, states, scalars, limit, numbers): ``clip_value``, and the optimizer's numbers."""
    function = optimizer.define(dtype.type, vector_math(dtype))[1]
    update, read = with_numbers(function, "p, g, s0, s1, s2, lr, c1, c2", len(optimizer.numbers))
    clipped = optimizer.clipping[1] is not None
    has0, has1, has2 = (optimizer.n_states > k for k in range(3))
    zero = dtype.type(0)

    def update_all(p, gradients, states, scalars, limit, numbers, thread, threads):  # type: ignore[no-untyped-def]
        factor, lr, c1, c2, n = scalars[FACTOR], scalars[RATE], scalars[C1], scalars[C2], read(numbers)
        first, last = share(p.size, LINE, thread, threads)
        p, gradients = p[first:last], gradients[first:last]
        state0 = states[0, first:last] if has0 else p
        state1 = states[1, first:last] if has1 else p
        state2 = states[2, first:last] if has2 else p
        for i in range(p.size):
            g = gradients[i] * factor
            if clipped:
                g = where(g > limit, limit, g)
                g = where(g < -limit, -limit, g)
            s0 = state0[i] if has0 else zero
            s1 = state1[i] if has1 else zero
            s2 = state2[i] if has2 else zero
            p[i], s0, s1, s2 = update(p[i], g, s0, s1, s2, lr, c1, c2, n)
            if has0:
                state0[i] = s0
            if has1:
                state1[i] = s1
            if has2:
                state2[i] = s2

    return compiled(update_all)
