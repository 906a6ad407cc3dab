"""Matrix products from a micro-kernel, compiled here, so that no library call separates two kernels.

The scheme is that of Goto and van de Geijn (2008), in the words of BLIS: micro-panels of b (KC x NR), which fit in the L1 cache,
are packed side by side; blocks of a (MC x KC), which fit in the L2 cache, are packed if they are read often enough; and a
micro-tile of the result (MR x NR) stays in registers while the micro-kernel sums it. Most is packed by the first micro-kernel that
reads it, so packing costs hardly any extra time.

The order of a sum is a definition, kept from release to release, so that a product has the same bits on every machine, in any
blocks and any number of threads: k is cut into ceil(k / KC) nearly equal parts, the p-th from floor(p k / parts) on. Within a
part, the products are added in their order to +0, each in one rounding (x y + z). The sums of PARTS parts are added in their order
in the arrays' dtype, and those sums, where there are more than one, in their order in float64.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from gpubackprop.definitions import Array, aligned_zeros
from gpubackprop.kernels.cpu.compile import PerThread, compiled, helper, share
from gpubackprop.kernels.cpu.vector import (
    define_add,
    define_clear,
    define_micro_kernel,
    define_move,
    define_move_part,
    define_narrow_tile,
    define_transpose,
    shape_for,
)

KC = 320  # depth summed at a time: micro-panels of a and b fit in an L1 cache of 32 KiB
PARTS = 16  # such sums are added in the arrays' dtype: a sum over millions of rows is as accurate as one over thousands
MC = 144  # rows of a in a block, a multiple of MR (6 or 8): with KC, 180 KiB of an L2 cache
NC = 1024  # columns of b that are packed at a time
IN_PLACE = 8192  # numbers of b that fit in the L1 cache and need no packing
WIDE = 512  # columns of the result above which packing a block of a pays
WIDE_TRANSPOSED = 96  # the same for a transposed a, whose elements lie far apart for the micro-kernel


def scratch_for(dtype: np.dtype[Any], threads: int) -> PerThread:
    """Return memory for the packed operands of each thread; pages that a product does not use are never touched."""
    shape = shape_for(dtype)
    return PerThread(aligned_zeros((threads, KC * (NC + MC) + 2 * shape.rows * shape.columns), dtype))


def total_for(out: Array, depth: int) -> Array:
    """Return memory for the float64 sum that a product of large depth needs, or none."""
    return np.empty(out.shape if depth > KC * PARTS else (0, 0))


@cache
def _define_micro_kernels(dtype: np.dtype[Any]) -> tuple[Any, Any, Any]:
    """Return micro_kernel(rows, ...), rows <= MR, and those of MR rows that pack a or b; see :func:`define_micro_kernel`."""
    names = "a, a_row, a_step, b, b_step, out, out_row, k, more"
    most = shape_for(dtype).rows
    namespace: dict[str, Any] = {"__name__": __name__}
    lines = []
    for rows in range(most, 0, -1):
        namespace[f"of{rows}"] = _function_of(names, define_micro_kernel(rows, dtype))
        lines.append(f"    if rows == {rows}:\n        of{rows}({names})\n        return\n")
    exec(f"def micro_kernel(rows, {names}):\n" + "".join(lines), namespace)
    packing = [_function_of(f"{names}, packed", define_micro_kernel(most, dtype, packs)) for packs in "ab"]
    return helper(namespace["micro_kernel"]), packing[0], packing[1]


def _function_of(names: str, instruction: Any) -> Any:
    """Return a function of the arguments ``names`` that executes one instruction."""
    namespace = {"__name__": __name__, "instruction": instruction}
    exec(f"def function({names}):\n    instruction({names})\n", namespace)
    return helper(namespace["function"])


@cache
def _define_packing(dtype: np.dtype[Any]) -> tuple[Any, Any]:
    """Return pack_b(b, transposed, ld, k, columns, to) and pack_a(a, transposed, ld, k, rows, to); addresses in bytes."""
    shape, size = shape_for(dtype), dtype.itemsize
    width, NR, MR = shape.width, shape.columns, shape.rows
    clear, move = define_clear(dtype), define_move(1, dtype)
    move_part = define_move_part(NR, dtype)
    move_column = define_move(MR, dtype)
    piece = min(MR, width)  # rows per transposition; a micro-panel may have more, with a remainder
    pieces, rest = divmod(MR, piece)
    transpose, transpose_piece = define_transpose(width, dtype), define_transpose(piece, dtype)
    transpose_rest = define_transpose(rest, dtype) if rest else transpose

    def pack_b(b, transposed, ld, k, columns, to):  # type: ignore[no-untyped-def]
        done = 0
        if transposed and columns == NR:
            done = k // width * width
            for p in range(0, done, width):
                for j in range(0, NR, width):
                    transpose(b + (j * ld + p) * size, ld, to + (p * NR + j) * size, NR)
        elif not transposed:
            done = k
            for p in range(k):
                move_part(b + p * ld * size, to + p * NR * size, columns)
        for p in range(done, k):
            for j in range(columns):
                move(b + (p + j * ld) * size, to + (p * NR + j) * size)
            for j in range(columns, NR):
                clear(to + (p * NR + j) * size)

    def pack_a(a, transposed, ld, k, rows, to):  # type: ignore[no-untyped-def]
        done = 0
        if rows == MR:
            if transposed:
                done = k
                for p in range(k):
                    move_column(a + p * ld * size, to + p * MR * size)
            else:
                done = k // width * width
                for p in range(0, done, width):  # the last rows first: a vector overlaps what the others write
                    source, destination = a + p * size, to + p * MR * size
                    if rest:
                        r = pieces * piece
                        transpose_rest(source + r * ld * size, ld, destination + r * size, MR)
                    for r in range((pieces - 1) * piece, -1, -piece):
                        transpose_piece(source + r * ld * size, ld, destination + r * size, MR)
        row, column = (1, ld) if transposed else (ld, 1)
        for p in range(done, k):
            for i in range(rows):
                move(a + (i * row + p * column) * size, to + (p * rows + i) * size)

    return helper(pack_b), helper(pack_a)


def _define_block(dtype: np.dtype[Any], pack_a: Any) -> Any:
    """Return block(...), which computes all micro-tiles of some rows and NR columns."""
    shape, size = shape_for(dtype), dtype.itemsize
    micro_kernel, micro_kernel_packing_a, micro_kernel_packing_b = _define_micro_kernels(dtype)
    add, move = (_function_of("source, destination", one) for one in (define_add(dtype), define_move(1, dtype)))
    MR, NR = shape.rows, shape.columns

    @helper
    def first_row(t, tiles, rows):  # type: ignore[no-untyped-def]
        """Return where micro-tile t begins: all have MR rows but the last two, which share the remainder."""
        if t >= tiles:
            return rows
        return t * MR if t < tiles - 1 or t == 0 else rows - (rows - (t - 1) * MR) // 2

    @helper
    def block(a, lda, at, pack, first, packed_a, b, b_step, panel, out, n, rows, columns, k, more, edge):  # type: ignore[no-untyped-def]
        """Pack b to ``panel`` unless that is 0."""
        a_row, a_step = (1, lda) if at else (lda, 1)
        tiles = (rows + MR - 1) // MR
        for t in range(tiles):
            i = first_row(t, tiles, rows)
            count = first_row(t + 1, tiles, rows) - i
            here, row, step = a + i * a_row * size, a_row, a_step
            packed, to = packed_a + i * k * size, out + i * n * size
            if pack:
                if first and at and count == MR and columns == NR and t < tiles - 1 and (t > 0 or panel == 0):
                    micro_kernel_packing_a(here, row, step, b, b_step, to, n, k, more, packed)
                    continue
                if first:
                    pack_a(here, at, lda, k, count, packed)
                here, row, step = packed, 1, count
            if t == 0 and panel:  # one of three micro-tiles or more, so a full one
                micro_kernel_packing_b(here, row, step, b, b_step, to, n, k, more, panel)
                b, b_step = panel, NR
            elif columns == NR:
                micro_kernel(count, here, row, step, b, b_step, to, n, k, more)
            else:
                micro_kernel(count, here, row, step, b, b_step, edge, NR, k, 0)
                for r in range(count):
                    for j in range(columns):
                        if more:
                            add(edge + (r * NR + j) * size, to + (r * n + j) * size)
                        else:
                            move(edge + (r * NR + j) * size, to + (r * n + j) * size)

    return block


def _define_tiles(lanes: int, dtype: np.dtype[Any]) -> Any:
    """Return tiles(a, a_row, a_step, b, b_step, out, n, m, k, more): out = a b, or out += a b, of m rows and n <= lanes columns."""
    shape, size = shape_for(dtype), dtype.itemsize
    rows = 8 if lanes <= shape.width else 4  # eight sums side by side: two units, each busy four cycles with one
    most = (3 if shape.rows == 8 else 1.5) * rows  # as many as the registers hold
    names, beside_rows = "a, a_row, a_step, b, b_step, out, n, k, more", int(most)
    one, last = (_function_of(names, define_narrow_tile(count, lanes, dtype, exact=True)) for count in (1, rows))
    many = _function_of(names, define_narrow_tile(rows, lanes, dtype, exact=False))
    beside = _function_of(names, define_narrow_tile(beside_rows, lanes, dtype, exact=False, side_by_side=True))

    def tiles(a, a_row, a_step, b, b_step, out, n, m, k, more):  # type: ignore[no-untyped-def]
        i, end = (
            0,
            0 if more else m * n - (lanes - n),
        )  # a whole vector after the last row but ``rows`` stays within out
        while a_row == 1 and (i + beside_rows) * n <= end:
            beside(a + i * size, 1, a_step, b, b_step, out + i * n * size, n, k, 0)
            i += beside_rows
        while (i + rows) * n <= end:
            many(a + i * a_row * size, a_row, a_step, b, b_step, out + i * n * size, n, k, 0)
            i += rows
        while i + rows <= m:
            last(a + i * a_row * size, a_row, a_step, b, b_step, out + i * n * size, n, k, more)
            i += rows
        while i < m:
            one(a + i * a_row * size, a_row, a_step, b, b_step, out + i * n * size, n, k, more)
            i += 1

    return helper(tiles)


def _define_narrow(dtype: np.dtype[Any]) -> Any:
    """Return narrow(a, lda, at, b, ldb, bt, out, n, m, depth, begin, end, parts, memory), n <= NR columns: what ``rectangle`` does.

    A row of the result is one vector, of as many lanes as it needs, and a tile many rows.
    """
    size, NR = dtype.itemsize, shape_for(dtype).columns
    move = _function_of("source, destination", define_move(1, dtype))
    few, half, full = max(2, NR // 4), NR // 2, NR
    tiles_few, tiles_half, tiles_full = (_define_tiles(lanes, dtype) for lanes in (few, half, full))

    @helper
    def narrow(a, lda, at, b, ldb, bt, out, n, m, depth, begin, end, parts, memory):  # type: ignore[no-untyped-def]
        a_row, a_step = (1, lda) if at else (lda, 1)
        for part in range(begin, end):
            p0 = part * depth // parts
            k = (part + 1) * depth // parts - p0
            a_here, b_here = a + p0 * a_step * size, b + p0 * n * size
            if bt:
                b_here = memory
                for j in range(n):
                    for p in range(k):
                        move(b + (j * ldb + p0 + p) * size, memory + (p * n + j) * size)
            if n <= few:
                tiles_few(a_here, a_row, a_step, b_here, n, out, n, m, k, part - begin)
            elif n <= half:
                tiles_half(a_here, a_row, a_step, b_here, n, out, n, m, k, part - begin)
            else:
                tiles_full(a_here, a_row, a_step, b_here, n, out, n, m, k, part - begin)

    return narrow


@cache
def compile_product(dtype: np.dtype[Any]) -> Any:
    """Return kernel(a, b, out, a_transposed, b_transposed, scratch, total): out = a b; either may be passed transposed.

    ``scratch`` comes from :func:`scratch_for`, ``total`` from :func:`total_for`.
    """
    shape, size = shape_for(dtype), dtype.itemsize
    pack_b, pack_a = _define_packing(dtype)
    block, narrow = _define_block(dtype, pack_a), _define_narrow(dtype)
    MR, NR = shape.rows, shape.columns

    @helper
    def rectangle(a, lda, at, b, ldb, bt, out, n, m, width, depth, begin, end, parts, memory):  # type: ignore[no-untyped-def]
        """Compute m rows and ``width`` columns of the result, which has n columns, from parts begin to end of the depth."""
        panels = memory
        packed_a = memory + KC * NC * size
        edge = packed_a + KC * MC * size + MR * NR * size
        a_row, a_step = (1, lda) if at else (lda, 1)
        b_row, b_column = (1, ldb) if bt else (ldb, 1)
        tiles = (m + MR - 1) // MR
        blocks = (tiles + MC // MR - 1) // (MC // MR)
        pack = m >= MR and width >= (WIDE_TRANSPOSED if at else WIDE)
        in_place = not bt and (m <= 2 * MR or depth * width <= IN_PLACE)
        for j0 in range(0, width, NC):
            j1 = min(width, j0 + NC)
            for part in range(begin, end):
                p0 = part * depth // parts
                k = (part + 1) * depth // parts - p0
                for q in range(blocks):
                    i0, i1 = share(m, MR, q, blocks)
                    for j in range(j0, j1, NR):
                        columns = min(NR, j1 - j)
                        b_here, step, panel = b + (p0 * b_row + j * b_column) * size, ldb, 0
                        if columns < NR or not in_place:
                            panel = panels + ((j - j0) * KC * size if blocks > 1 else 0)
                            if q > 0 or columns < NR or bt:
                                if q == 0:
                                    pack_b(b_here, bt, ldb, k, columns, panel)
                                b_here, step, panel = panel, NR, 0
                        block(
                            a + (i0 * a_row + p0 * a_step) * size, lda, at, pack, j == j0, packed_a, b_here, step, panel,
                            out + (i0 * n + j) * size, n, i1 - i0, columns, k, part - begin, edge,
                        )  # fmt: skip

    def product(a, b, out, a_transposed, b_transposed, scratch, total, piece, pieces):  # type: ignore[no-untyped-def]
        m, n = out.shape
        depth = a.shape[0] if a_transposed else a.shape[1]
        i0, i1, j0, j1 = 0, m, 0, n
        if m * NR >= n * MR:
            i0, i1 = share(m, MR, piece, pieces)
        else:
            j0, j1 = share(n, NR, piece, pieces)
        if i0 >= i1 or j0 >= j1:
            return
        parts = (depth + KC - 1) // KC
        for begin in range(0, parts, PARTS):
            end = min(begin + PARTS, parts)
            a_here = a.ctypes.data + i0 * (1 if a_transposed else depth) * size
            b_here = b.ctypes.data + j0 * (depth if b_transposed else 1) * size
            to = out.ctypes.data + (i0 * n + j0) * size
            if n < NR:
                narrow(
                    a_here, a.shape[1], a_transposed, b_here, b.shape[1], b_transposed, to, n, i1 - i0, depth, begin, end,
                    parts, scratch.ctypes.data,
                )  # fmt: skip
            else:
                rectangle(
                    a_here, a.shape[1], a_transposed, b_here, b.shape[1], b_transposed, to, n, i1 - i0, j1 - j0, depth,
                    begin, end, parts, scratch.ctypes.data,
                )  # fmt: skip
            if parts > PARTS:
                for i in range(i0, i1):
                    for j in range(j0, j1):
                        so_far = out[i, j] + total[i, j] if begin else np.float64(out[i, j])
                        total[i, j] = so_far
                        if end == parts:
                            out[i, j] = so_far

    return compiled(product)
