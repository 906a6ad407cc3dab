"""Matrix products from tiles that are held in registers: compiled here, so that no call of a library stands between two kernels.

The scheme is that of Goto and van de Geijn (2008): panels of b that fit in the first cache are copied side by side, rows of a that
fit in the second likewise where they are read more than once, and a tile of the result stays in registers while it is
summed. An element of the result is summed over k in one order, whatever its place and the share it is computed in, so the
result does not depend on the number of threads.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from gpubackprop.definitions import Array
from gpubackprop.kernels.cpu_compile import compiled, helper, share
from gpubackprop.kernels.cpu_vector import (
    define_add,
    define_clear,
    define_move,
    define_move_part,
    define_prefetch,
    define_tile,
    define_transpose,
    shape_for,
)

DEPTH = 320  # of k that is summed at a time: a panel of b and a tile's rows of a fit in a first cache of 32 KiB
HEIGHT = 96  # rows of a that are copied at a time: with DEPTH, 120 KiB of a second cache
BREADTH = 1024  # columns of b that are copied at a time
IN_PLACE = 8192  # numbers of b that fit in the first cache and need no copy
WIDE = 192  # columns of the result from which a copy of a is read often enough


def scratch_for(dtype: np.dtype[Any], threads: int) -> Array:
    """Return memory for the copies of each thread; pages that a product does not use are never touched."""
    shape = shape_for(dtype)
    return np.empty((threads, DEPTH * (BREADTH + HEIGHT) + 2 * shape.rows * shape.columns), dtype)


@cache
def _define_tiles(dtype: np.dtype[Any]) -> Any:
    """Return tile(rows, ...) for any number of rows; see :func:`define_tile`."""
    names = "a, a_row, a_step, b, b_step, out, out_row, k, more"
    namespace: dict[str, Any] = {"__name__": __name__}
    lines = []
    for rows in range(shape_for(dtype).rows, 0, -1):
        inner = {"__name__": __name__, "emit": define_tile(rows, dtype)}
        exec(f"def tile({names}):\n    emit({names})\n", inner)
        namespace[f"tile{rows}"] = helper(inner["tile"])
        lines.append(f"    if rows == {rows}:\n        tile{rows}({names})\n        return\n")
    exec(f"def tile(rows, {names}):\n" + "".join(lines), namespace)
    return helper(namespace["tile"])


@cache
def _define_copies(dtype: np.dtype[Any]) -> tuple[Any, Any]:
    """Return pack_b(b, transposed, ld, k, columns, to) and pack_a(a, transposed, ld, k, rows, to); addresses in bytes."""
    shape, size = shape_for(dtype), dtype.itemsize
    width, columns_of_tile, rows_of_tile = shape.width, shape.columns, shape.rows
    prefetch, clear, move = define_prefetch(), define_clear(dtype), define_move(1, dtype)
    move_part = define_move_part(columns_of_tile, dtype)
    move_row, move_column = define_move(columns_of_tile, dtype), define_move(rows_of_tile, dtype)
    piece = min(rows_of_tile, width)  # rows that a transposition takes; a tile may have more, and some left over
    pieces, rest = divmod(rows_of_tile, piece)
    transpose, transpose_piece = define_transpose(width, dtype), define_transpose(piece, dtype)
    transpose_rest = define_transpose(rest, dtype) if rest else transpose

    def pack_b(b, transposed, ld, k, columns, to):  # type: ignore[no-untyped-def]
        done = 0
        if columns == columns_of_tile:
            if transposed:
                done = k // width * width
                for p in range(0, done, width):
                    for j in range(0, columns_of_tile, width):
                        transpose(b + (j * ld + p) * size, ld, to + (p * columns_of_tile + j) * size, columns_of_tile)
            else:
                done = k
                for p in range(k):
                    prefetch(b + (p * ld + columns_of_tile) * size)  # the next panel's
                    move_row(b + p * ld * size, to + p * columns_of_tile * size)
        elif not transposed:
            done = k
            for p in range(k):
                move_part(b + p * ld * size, to + p * columns_of_tile * size, columns)
        for p in range(done, k):
            for j in range(columns):
                move(b + (p + j * ld) * size, to + (p * columns_of_tile + j) * size)
            for j in range(columns, columns_of_tile):
                clear(to + (p * columns_of_tile + j) * size)

    def pack_a(a, transposed, ld, k, rows, to):  # type: ignore[no-untyped-def]
        done = 0
        if rows == rows_of_tile:
            if transposed:
                done = k
                for p in range(k):
                    move_column(a + p * ld * size, to + p * rows_of_tile * size)
            else:
                done = k // width * width
                for p in range(0, done, width):  # the last rows first: a vector reaches into what the others write
                    source, destination = a + p * size, to + p * rows_of_tile * size
                    if rest:
                        r = pieces * piece
                        transpose_rest(source + r * ld * size, ld, destination + r * size, rows_of_tile)
                    for r in range((pieces - 1) * piece, -1, -piece):
                        transpose_piece(source + r * ld * size, ld, destination + r * size, rows_of_tile)
        row, column = (1, ld) if transposed else (ld, 1)
        for p in range(done, k):
            for i in range(rows):
                move(a + (i * row + p * column) * size, to + (p * rows + i) * size)

    return helper(pack_b), helper(pack_a)


@cache
def compile_product(dtype: np.dtype[Any]) -> Any:
    """Return kernel(a, b, out, a_transposed, b_transposed, scratch): out = a b, where a and b, or their transposes, are given."""
    shape, size = shape_for(dtype), dtype.itemsize
    tile, (pack_b, pack_a) = _define_tiles(dtype), _define_copies(dtype)
    add, move = (helper(_on_addresses(define(dtype))) for define in (define_add, lambda d: define_move(1, d)))
    R, C = shape.rows, shape.columns

    @helper
    def first_row(t, tiles, rows):  # type: ignore[no-untyped-def]
        """Return where tile t begins: all are full but the last two, which share what is left."""
        if t >= tiles:
            return rows
        return t * R if t < tiles - 1 or t == 0 else rows - (rows - (t - 1) * R) // 2

    @helper
    def block(a, a_row, a_step, packed, b, b_step, out, n, rows, columns, k, more, edge):  # type: ignore[no-untyped-def]
        """Compute all tiles of some rows and one panel of columns."""
        tiles = (rows + R - 1) // R
        for t in range(tiles):
            i = first_row(t, tiles, rows)
            count = first_row(t + 1, tiles, rows) - i
            at, row, step = (a + i * k * size, 1, count) if packed else (a + i * a_row * size, a_row, a_step)
            if columns == C:
                tile(count, at, row, step, b, b_step, out + i * n * size, n, k, more)
            else:
                tile(count, at, row, step, b, b_step, edge, C, k, 0)
                for r in range(count):
                    for j in range(columns):
                        to = out + ((i + r) * n + j) * size
                        if more:
                            add(edge + (r * C + j) * size, to)
                        else:
                            move(edge + (r * C + j) * size, to)

    @helper
    def rectangle(a, lda, at, b, ldb, bt, out, n, m, width, depth, memory):  # type: ignore[no-untyped-def]
        """Compute m rows and ``width`` columns of the result, which has n columns."""
        panels = memory
        rows_copy = memory + DEPTH * BREADTH * size
        edge = rows_copy + DEPTH * HEIGHT * size + R * C * size
        a_row, a_step = (1, lda) if at else (lda, 1)
        b_row, b_column = (1, ldb) if bt else (ldb, 1)
        parts = (depth + DEPTH - 1) // DEPTH
        pack = width >= WIDE and m >= R
        in_place = not bt and (m <= 2 * R or depth * width <= IN_PLACE)
        for j0 in range(0, width, BREADTH):
            j1 = min(width, j0 + BREADTH)
            for part in range(parts):
                p0 = part * depth // parts
                k = (part + 1) * depth // parts - p0
                for i0 in range(0, m, HEIGHT):
                    rows = min(HEIGHT, m - i0)
                    a_here = a + (i0 * a_row + p0 * a_step) * size
                    if pack:
                        tiles = (rows + R - 1) // R
                        for t in range(tiles):
                            i = first_row(t, tiles, rows)
                            count = first_row(t + 1, tiles, rows) - i
                            pack_a(a_here + i * a_row * size, at, lda, k, count, rows_copy + i * k * size)
                    for j in range(j0, j1, C):
                        columns = min(C, j1 - j)
                        b_here, step = b + (p0 * b_row + j * b_column) * size, ldb
                        if columns < C or not in_place:
                            panel = panels + ((j - j0) * DEPTH * size if m > HEIGHT else 0)
                            if i0 == 0 or m <= HEIGHT:
                                pack_b(b_here, bt, ldb, k, columns, panel)
                            b_here, step = panel, C
                        block(
                            rows_copy if pack else a_here, a_row, a_step, pack, b_here, step,
                            out + (i0 * n + j) * size, n, rows, columns, k, part, edge,
                        )  # fmt: skip

    def product(a, b, out, a_transposed, b_transposed, scratch, thread, threads):  # type: ignore[no-untyped-def]
        m, n = out.shape
        depth = a.shape[0] if a_transposed else a.shape[1]
        i0, i1, j0, j1 = 0, m, 0, n
        threads = min(threads, scratch.shape[0])
        if m * C >= n * R:
            i0, i1 = share(m, R, thread, threads)
        else:
            j0, j1 = share(n, C, thread, threads)
        if i0 < i1 and j0 < j1:
            rectangle(
                a.ctypes.data + i0 * (1 if a_transposed else depth) * size, a.shape[1], a_transposed,
                b.ctypes.data + j0 * (depth if b_transposed else 1) * size, b.shape[1], b_transposed,
                out.ctypes.data + (i0 * n + j0) * size, n, i1 - i0, j1 - j0, depth,
                scratch.ctypes.data + thread * scratch.shape[1] * size,
            )  # fmt: skip

    return compiled(product, dtype.name, shape)


def _on_addresses(instruction: Any) -> Any:
    """Return a function of two addresses that does one instruction."""

    def function(source, destination):  # type: ignore[no-untyped-def]
        instruction(source, destination)

    return function
