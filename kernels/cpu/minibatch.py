"""CPU kernels that build a mini-batch: its rows, its normalized weights, and dropout."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from gpubackprop.definitions import ALIGNMENT
from gpubackprop.kernels.cpu.compile import LINE, Kernel, compiled, inlined, share, where
from gpubackprop.kernels.cpu.vector import define_move, define_prefetch
from gpubackprop.philox import define_philox
from gpubackprop.step.state import CURSOR, STEPS

LONG, AHEAD = 4, 2  # rows of so many cache lines are fetched before they are copied, so many rows ahead
BLOCKS = 64  # blocks of four random numbers generated at a time


@cache
def compile_normalize_weights(dtype: np.dtype[Any]) -> Kernel:
    """Return kernel(weight, out, total): out = weight / sum(weight), or 0 where that is 0, and the sum."""

    def normalize_weights(weight, out, total, piece, pieces):  # type: ignore[no-untyped-def]
        if piece > 0:
            return
        top, shares = 0.0, 0.0
        for i in range(weight.size):
            top = max(top, weight[i])
        top = top if top > 0.0 else 1.0  # relative to the largest, no sum overflows or underflows
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

    def dropout(x, threshold, scale, seed_low, seed_high, layer, counters, out, first_block, piece, pieces):  # type: ignore[no-untyped-def]
        begin, end = share(x.size, 4, piece, pieces)
        step, limit = u32(counters[STEPS]), u32(threshold)
        words, mixed = np.empty((4, BLOCKS), np.uint32), np.empty((BLOCKS, 4), np.uint32)
        words0, words1, words2, words3 = words[0], words[1], words[2], words[3]
        flat = mixed.reshape(-1)
        for first in range(begin, end, 4 * BLOCKS):
            for k in range(BLOCKS):  # several at a time, to vectorize the loop
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
def compile_count_not_finite(dtype: np.dtype[Any]) -> Kernel:
    """Return kernel(x, counts): how many numbers of x are NaN or infinite, in counts[piece] for each piece."""
    zero, none, one = dtype.type(0), np.int64(0), np.int64(1)

    def count_not_finite(x, counts, piece, pieces):  # type: ignore[no-untyped-def]
        first, last = share(x.size, LINE, piece, pieces)
        x, count = x[first:last], none
        for i in range(x.size):
            count += where(x[i] - x[i] == zero, none, one)
        counts[piece] = count

    return compiled(count_not_finite)


@cache
def compile_gather(dtype: np.dtype[Any], ndim: int) -> Kernel:
    """Return kernel(source, order, counters, out): the rows of the next mini-batch; positions are clamped."""
    size, line = dtype.itemsize, ALIGNMENT // dtype.itemsize
    move, prefetch = define_move(line, dtype), define_prefetch()

    def gather_rows(source, order, counters, out, piece, pieces):  # type: ignore[no-untyped-def]
        last, last_row, width = order.size - 1, source.shape[0] - 1, out.shape[1]
        first, (begin, end) = min(max(counters[CURSOR], 0), last), share(out.shape[0], 1, piece, pieces)
        if width < LONG * line:
            for i in range(begin, end):
                k = min(max(order[min(first + i, last)], 0), last_row)
                for j in range(width):
                    out[i, j] = source[k, j]
            return
        whole = width // line * line
        for i in range(begin, end):  # rows lie anywhere: each is on its way while those before it are copied
            k = min(max(order[min(first + i, last)], 0), last_row)
            then = source[min(max(order[min(first + i + AHEAD, last)], 0), last_row)].ctypes.data
            row, to = source[k].ctypes.data, out[i].ctypes.data
            for j in range(0, whole, line):
                prefetch(then + j * size)
                move(row + j * size, to + j * size)
            for j in range(whole, width):
                out[i, j] = source[k, j]

    def gather_values(source, order, counters, out, piece, pieces):  # type: ignore[no-untyped-def]
        last, last_row = order.size - 1, source.shape[0] - 1
        first, (begin, end) = min(max(counters[CURSOR], 0), last), share(out.shape[0], LINE, piece, pieces)
        for i in range(begin, end):
            out[i] = source[min(max(order[min(first + i, last)], 0), last_row)]

    return compiled(gather_rows if ndim == 2 else gather_values)
