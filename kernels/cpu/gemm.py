"""Matrix products from tiles that are held in registers: compiled here, so that no call of a library stands between two kernels.

The scheme is that of Goto and van de Geijn (2008): panels of b that fit in the first cache are copied side by side, rows of a that
fit in the second likewise where they are read often enough, and a tile of the result stays in registers while it is summed.
Most is copied by the first tile that reads it, so that copying costs hardly any time of its own.

The order of a sum is a definition, kept from release to release, so that a product has the same bits on every machine, in any
tiles and any number of threads: k is cut into ceil(k / DEPTH) nearly equal parts, the p-th from floor(p k / parts) on. Within a
part, the products are added in their order to +0, each in one rounding (x y + z). The sums of PARTS parts are added in their order
in the arrays' dtype, and those sums, where there are more than one, in their order in float64.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from gpubackprop.definitions import Array, aligned_zeros
from gpubackprop.kernels.cpu.compile import compiled, helper, share
from gpubackprop.kernels.cpu.vector import (
    define_add,
    define_clear,
    define_move,
    define_move_part,
    define_tile,
    define_transpose,
    shape_for,
)

DEPTH = 320  # of k that is summed at a time: a panel of b and a tile's rows of a fit in a first cache of 32 KiB
PARTS = (
    16  # such sums that are added in the arrays' dtype: a sum over millions of rows is as exact as one over thousands
)
HEIGHT = 144  # rows of a that are taken at a time, whole tiles of 6 or 8: with DEPTH, 180 KiB of a second cache
BREADTH = 1024  # columns of b that are copied at a time
IN_PLACE = 8192  # numbers of b that fit in the first cache and need no copy
WIDE = 512  # columns of the result from which a copy of rows of a is read often enough
WIDE_TRANSPOSED = 96  # the same for a that is given transposed: the numbers that a tile takes at a time lie far apart


def scratch_for(dtype: np.dtype[Any], threads: int) -> Array:
    """Return memory for the copies of each thread; pages that a product does not use are never touched."""
    shape = shape_for(dtype)
    return aligned_zeros((threads, DEPTH * (BREADTH + HEIGHT) + 2 * shape.rows * shape.columns), dtype)


def total_for(out: Array, depth: int) -> Array:
    """Return memory for the sum in float64 that a product over so large a depth needs, or none."""
    return np.empty(out.shape if depth > DEPTH * PARTS else (0, 0))


@cache
def _define_tiles(dtype: np.dtype[Any]) -> tuple[Any, Any, Any]:
    """Return tile(rows, ...) for any number of rows, and those of full tiles that copy a or b; see :func:`define_tile`."""
    names = "a, a_row, a_step, b, b_step, out, out_row, k, more"
    most = shape_for(dtype).rows
    namespace: dict[str, Any] = {"__name__": __name__}
    lines = []
    for rows in range(most, 0, -1):
        namespace[f"tile{rows}"] = _function_of(names, define_tile(rows, dtype))
        lines.append(f"    if rows == {rows}:\n        tile{rows}({names})\n        return\n")
    exec(f"def tile(rows, {names}):\n" + "".join(lines), namespace)
    copying = [_function_of(f"{names}, copy", define_tile(most, dtype, copies)) for copies in "ab"]
    return helper(namespace["tile"]), copying[0], copying[1]


def _function_of(names: str, instruction: Any) -> Any:
    """Return a function of so many arguments that does one instruction."""
    namespace = {"__name__": __name__, "instruction": instruction}
    exec(f"def function({names}):\n    instruction({names})\n", namespace)
    return helper(namespace["function"])


@cache
def _define_copies(dtype: np.dtype[Any]) -> tuple[Any, Any]:
    """Return pack_b(b, transposed, ld, k, columns, to) and pack_a(a, transposed, ld, k, rows, to); addresses in bytes."""
    shape, size = shape_for(dtype), dtype.itemsize
    width, columns_of_tile, rows_of_tile = shape.width, shape.columns, shape.rows
    clear, move = define_clear(dtype), define_move(1, dtype)
    move_part = define_move_part(columns_of_tile, dtype)
    move_column = define_move(rows_of_tile, dtype)
    piece = min(rows_of_tile, width)  # rows that a transposition takes; a tile may have more, and some left over
    pieces, rest = divmod(rows_of_tile, piece)
    transpose, transpose_piece = define_transpose(width, dtype), define_transpose(piece, dtype)
    transpose_rest = define_transpose(rest, dtype) if rest else transpose

    def pack_b(b, transposed, ld, k, columns, to):  # type: ignore[no-untyped-def]
        done = 0
        if transposed and columns == columns_of_tile:
            done = k // width * width
            for p in range(0, done, width):
                for j in range(0, columns_of_tile, width):
                    transpose(b + (j * ld + p) * size, ld, to + (p * columns_of_tile + j) * size, columns_of_tile)
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
    """Return kernel(a, b, out, a_transposed, b_transposed, scratch, total): out = a b; a and b, or their transposes, are given.

    ``scratch`` comes from :func:`scratch_for`, ``total`` from :func:`total_for`.
    """
    shape, size = shape_for(dtype), dtype.itemsize
    (tile, tile_copying_a, tile_copying_b), (pack_b, pack_a) = _define_tiles(dtype), _define_copies(dtype)
    add, move = (_function_of("source, destination", one) for one in (define_add(dtype), define_move(1, dtype)))
    R, C = shape.rows, shape.columns

    @helper
    def first_row(t, tiles, rows):  # type: ignore[no-untyped-def]
        """Return where tile t begins: all are full but the last two, which share what is left."""
        if t >= tiles:
            return rows
        return t * R if t < tiles - 1 or t == 0 else rows - (rows - (t - 1) * R) // 2

    @helper
    def block(a, lda, at, pack, first, rows_copy, b, b_step, panel, out, n, rows, columns, k, more, edge):  # type: ignore[no-untyped-def]
        """Compute all tiles of some rows and one panel of columns; b is copied to ``panel`` unless that is 0."""
        a_row, a_step = (1, lda) if at else (lda, 1)
        tiles = (rows + R - 1) // R
        for t in range(tiles):
            i = first_row(t, tiles, rows)
            count = first_row(t + 1, tiles, rows) - i
            here, row, step = a + i * a_row * size, a_row, a_step
            copy, to = rows_copy + i * k * size, out + i * n * size
            if pack:
                if first and at and count == R and columns == C and t < tiles - 1 and (t > 0 or panel == 0):
                    tile_copying_a(here, row, step, b, b_step, to, n, k, more, copy)
                    continue
                if first:
                    pack_a(here, at, lda, k, count, copy)
                here, row, step = copy, 1, count
            if t == 0 and panel:  # of three tiles or more, so a full one
                tile_copying_b(here, row, step, b, b_step, to, n, k, more, panel)
                b, b_step = panel, C
            elif columns == C:
                tile(count, here, row, step, b, b_step, to, n, k, more)
            else:
                tile(count, here, row, step, b, b_step, edge, C, k, 0)
                for r in range(count):
                    for j in range(columns):
                        if more:
                            add(edge + (r * C + j) * size, to + (r * n + j) * size)
                        else:
                            move(edge + (r * C + j) * size, to + (r * n + j) * size)

    @helper
    def rectangle(a, lda, at, b, ldb, bt, out, n, m, width, depth, begin, end, parts, memory):  # type: ignore[no-untyped-def]
        """Compute m rows and ``width`` columns of the result, which has n columns, from parts begin to end of the depth."""
        panels = memory
        rows_copy = memory + DEPTH * BREADTH * size
        edge = rows_copy + DEPTH * HEIGHT * size + R * C * size
        a_row, a_step = (1, lda) if at else (lda, 1)
        b_row, b_column = (1, ldb) if bt else (ldb, 1)
        tiles = (m + R - 1) // R
        blocks = (tiles + HEIGHT // R - 1) // (HEIGHT // R)
        pack = m >= R and width >= (WIDE_TRANSPOSED if at else WIDE)
        in_place = not bt and (m <= 2 * R or depth * width <= IN_PLACE)
        for j0 in range(0, width, BREADTH):
            j1 = min(width, j0 + BREADTH)
            for part in range(begin, end):
                p0 = part * depth // parts
                k = (part + 1) * depth // parts - p0
                for q in range(blocks):
                    i0, i1 = share(m, R, q, blocks)
                    for j in range(j0, j1, C):
                        columns = min(C, j1 - j)
                        b_here, step, panel = b + (p0 * b_row + j * b_column) * size, ldb, 0
                        if columns < C or not in_place:
                            panel = panels + ((j - j0) * DEPTH * size if blocks > 1 else 0)
                            if q > 0 or columns < C or bt:
                                if q == 0:
                                    pack_b(b_here, bt, ldb, k, columns, panel)
                                b_here, step, panel = panel, C, 0
                        block(
                            a + (i0 * a_row + p0 * a_step) * size, lda, at, pack, j == j0, rows_copy, b_here, step, panel,
                            out + (i0 * n + j) * size, n, i1 - i0, columns, k, part - begin, edge,
                        )  # fmt: skip

    def product(a, b, out, a_transposed, b_transposed, scratch, total, thread, threads):  # type: ignore[no-untyped-def]
        m, n = out.shape
        depth = a.shape[0] if a_transposed else a.shape[1]
        i0, i1, j0, j1 = 0, m, 0, n
        threads = min(threads, scratch.shape[0])
        if m * C >= n * R:
            i0, i1 = share(m, R, thread, threads)
        else:
            j0, j1 = share(n, C, thread, threads)
        if i0 >= i1 or j0 >= j1:
            return
        parts = (depth + DEPTH - 1) // DEPTH
        for begin in range(0, parts, PARTS):
            end = min(begin + PARTS, parts)
            rectangle(
                a.ctypes.data + i0 * (1 if a_transposed else depth) * size, a.shape[1], a_transposed,
                b.ctypes.data + j0 * (depth if b_transposed else 1) * size, b.shape[1], b_transposed,
                out.ctypes.data + (i0 * n + j0) * size, n, i1 - i0, j1 - j0, depth, begin, end, parts,
                scratch.ctypes.data + thread * scratch.shape[1] * size,
            )  # fmt: skip
            if parts > PARTS:
                for i in range(i0, i1):
                    for j in range(j0, j1):
                        so_far = out[i, j] + total[i, j] if begin else np.float64(out[i, j])
                        total[i, j] = so_far
                        if end == parts:
                            out[i, j] = so_far

    return compiled(product)
