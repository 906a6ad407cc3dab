"""CPU kernels of the end of a step: sums of gradients over micro-batches, clipping, schedule and update."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from gpubackprop.definitions import per_definition
from gpubackprop.kernels.cpu.compile import LINE, Kernel, compiled, inlined, share, where
from gpubackprop.kernels.cpu.math import vector_math
from gpubackprop.kernels.cpu.vector import define_sum
from gpubackprop.optimizers import Optimizer
from gpubackprop.step.state import C1, C2, CURSOR, FACTOR, NORM, RATE, STEPS

SMALLER = 2.0**-600  # factor for numbers whose squares are infinite


@cache
def compile_accumulate(dtype: np.dtype[Any], first: bool) -> Kernel:
    """Return kernel(total, term, out): out = total + term; for the first term kernel(term, out): out = term."""

    def copy(term, out, piece, pieces):  # type: ignore[no-untyped-def]
        first, last = share(term.size, LINE, piece, pieces)
        out[first:last] = term[first:last]

    def accumulate(total, term, out, piece, pieces):  # type: ignore[no-untyped-def]
        first, last = share(term.size, LINE, piece, pieces)
        total, term, out = total[first:last], term[first:last], out[first:last]
        for i in range(term.size):
            out[i] = total[i] + term[i]

    return compiled(copy if first else accumulate)


@cache
def compile_clip(dtype: np.dtype[Any]) -> Kernel:
    """Return kernel(gradients, max_norm, scalars)."""
    squares = define_sum(dtype, squares=True)

    def clip(gradients, max_norm, scalars, piece, pieces):  # type: ignore[no-untyped-def]
        if piece > 0:
            return
        scale, total = 1.0, squares(gradients.ctypes.data, gradients.size, 1.0)
        if total == np.inf:  # so float64 will do: numbers much smaller than the largest may become 0
            scale = SMALLER
            total = squares(gradients.ctypes.data, gradients.size, scale)
        norm = np.sqrt(total)
        scalars[NORM] = norm / scale
        factor = max_norm / (norm + 1e-6 * scale) * scale
        scalars[FACTOR] = 1.0 if factor > 1.0 else factor

    return compiled(clip)


def with_numbers(function: Any, names: str, count: int) -> tuple[Any, Any]:
    """Return f(names, n), which passes a tuple of numbers to ``function`` one by one, and read(array), which makes the tuple.

    A tuple stays in registers; numbers in an array would be read again after each store of a loop.
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

    def advance(rate, batch, counters, scalars, numbers, of_schedule, piece, pieces):  # type: ignore[no-untyped-def]
        if piece > 0:
            return
        t = float(counters[STEPS])
        lr, c1, c2 = constants(t + 1.0, rate[0] * factor(t, read_schedule(of_schedule)), read(numbers))
        scalars[RATE], scalars[C1], scalars[C2] = lr, c1, c2
        counters[STEPS] += 1
        counters[CURSOR] += batch

    return compiled(advance)


def _define_update(optimizer: Optimizer, dtype: np.dtype[Any]) -> tuple[Any, Any]:
    """Return update(p, gradients, states, place, constants, limit, n), and read(numbers), which returns n.

    States of p[0], ... begin at ``place``; constants are the gradient's factor and what the optimizer computes for a step.
    """
    function = optimizer.define(dtype.type, vector_math(dtype))[1]
    update, read = with_numbers(function, "p, g, s0, s1, s2, lr, c1, c2", len(optimizer.numbers))
    clipped = optimizer.clipping[1] is not None
    has0, has1, has2 = (optimizer.n_states > k for k in range(3))
    zero = dtype.type(0)

    def update_range(p, gradients, states, place, constants, limit, n):  # type: ignore[no-untyped-def]
        factor, lr, c1, c2 = constants
        state0 = states[0, place : place + p.size] if has0 else p
        state1 = states[1, place : place + p.size] if has1 else p
        state2 = states[2, place : place + p.size] if has2 else p
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

    return inlined(update_range), read


@per_definition(vector_math)
def compile_update(optimizer: Optimizer, dtype: np.dtype[Any]) -> Kernel:
    """Return kernel(parameters, gradients, states, place, scalars, limit, numbers): ``clip_value``, and the optimizer's numbers.

    The parameters are a part of all of them, whose states begin at ``place``.
    """
    update, read = _define_update(optimizer, dtype)

    def update_all(p, gradients, states, place, scalars, limit, numbers, piece, pieces):  # type: ignore[no-untyped-def]
        constants = scalars[FACTOR], scalars[RATE], scalars[C1], scalars[C2]
        first, last = share(p.size, LINE, piece, pieces)
        update(p[first:last], gradients[first:last], states, place + first, constants, limit, read(numbers))

    return compiled(update_all)


@per_definition(vector_math)
def compile_update_by_outer_product(optimizer: Optimizer, dtype: np.dtype[Any]) -> Kernel:
    """Return kernel(W, x, delta, row, states, place, scalars, limit, numbers): the update by the gradient x^T delta of one sample.

    ``row`` is memory for a row of the gradient, which so never leaves the cache.
    """
    update, read = _define_update(optimizer, dtype)
    zero = dtype.type(0)

    def update_rows(W, x, delta, row, states, place, scalars, limit, numbers, piece, pieces):  # type: ignore[no-untyped-def]
        constants, n = (scalars[FACTOR], scalars[RATE], scalars[C1], scalars[C2]), W.shape[1]
        first, last = share(W.shape[0], 1, piece, pieces)
        for i in range(first, last):
            for j in range(n):
                row[j] = x[i] * delta[j] + zero  # as in a product, whose sums begin at +0
            update(W[i], row, states, place + i * n, constants, limit, read(numbers))

    return compiled(update_rows)
