"""Vector instructions for the products and sums of the CPU, emitted as LLVM code that Numba functions call on addresses.

The width of a register and the shape of the micro-kernel come from this machine: see :class:`Shape`.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

I32, I64 = ir.IntType(32), ir.IntType(64)


class Shape(NamedTuple):
    """The micro-tile of a product, MR x NR, that the micro-kernel holds in registers.

    Attributes
    ----------
    width : int
        Numbers in a vector register.
    rows, columns : int
        MR and NR, at most; NR is two registers, and all sums with their operands fit in the registers.
    """

    width: int
    rows: int
    columns: int


@cache
def shape_for(dtype: np.dtype[Any]) -> Shape:
    """Return the largest micro-tile on this machine: 2 x rows sums, two vectors of b and one number of a, in 16 or 32 registers."""
    features = cpu_target.target_context.codegen().magic_tuple()[2].split(",")  # the features that Numba compiles for
    arm = platform.machine().lower() in ("arm64", "aarch64")
    bits = 512 if "+avx512f" in features else 256 if "+avx" in features else 128
    width = bits // (8 * dtype.itemsize)
    return Shape(width, 8 if arm or bits == 512 else 6, 2 * width)


def _emitter(arguments: int, emit: Callable[[Any, Any], None]) -> Any:
    """Return an intrinsic of ``arguments`` integers, mostly addresses, that emits code and returns nothing."""
    names = ", ".join(f"x{k}" for k in range(arguments))

    def typed(emitted: Callable[[Any, Any], None]) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            emitted(builder, args)
            return context.get_dummy_value()

        return types.void(*[types.intp] * arguments), codegen

    namespace: dict[str, Any] = {"__name__": __name__, "typed": typed, "emit": emit}
    exec(f"def instruction(typingctx, {names}):\n    return typed(emit)\n", namespace)
    return intrinsic(namespace["instruction"])


def _real(dtype: np.dtype[Any]) -> Any:
    return ir.FloatType() if dtype == np.float32 else ir.DoubleType()


def _constant(value: int) -> Any:
    return ir.Constant(I64, value)


def _mask(lanes: list[int]) -> Any:
    return ir.Constant(ir.VectorType(I32, len(lanes)), lanes)


def _function(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    return builder.module.globals.get(name) or ir.Function(builder.module, ir.FunctionType(result, arguments), name)


def _spread(builder: Any, value: Any, kind: Any) -> Any:
    """Return a vector of a kind, with a value in every lane."""
    nothing = ir.Constant(kind, ir.Undefined)
    return builder.shuffle_vector(
        builder.insert_element(nothing, value, ir.Constant(I32, 0)), nothing, _mask([0] * kind.count)
    )


def _first_lanes(builder: Any, count: Any, lanes: int) -> Any:
    """Return the mask of the first ``count`` of some lanes."""
    counts = _spread(builder, builder.trunc(count, I32), ir.VectorType(I32, lanes))
    return builder.icmp_signed("<", _mask(list(range(lanes))), counts)


def _prefetch(builder: Any, address: Any, write: int, level: int) -> None:
    pointer = ir.IntType(8).as_pointer()
    function = _function(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, I32, I32, I32])
    numbers = [ir.Constant(I32, value) for value in (write, level, 1)]
    builder.call(function, [builder.inttoptr(address, pointer), *numbers])


def define_move(count: int, dtype: np.dtype[Any]) -> Any:
    """Return move(source, destination): copy ``count`` numbers."""
    pointer, size = ir.VectorType(_real(dtype), count).as_pointer(), dtype.itemsize

    def emit(builder: Any, args: Any) -> None:
        source, destination = (builder.inttoptr(a, pointer) for a in args)
        builder.store(builder.load(source, align=size), destination, align=size)

    return _emitter(2, emit)


def define_prefetch() -> Any:
    """Return prefetch(address): begin to load a line, which need not exist."""

    def emit(builder: Any, args: Any) -> None:
        byte = ir.IntType(8).as_pointer()
        load = _function(builder, "llvm.prefetch.p0", ir.VoidType(), [byte, I32, I32, I32])
        read, near, data = (ir.Constant(I32, k) for k in (0, 3, 1))
        builder.call(load, [builder.inttoptr(args[0], byte), read, near, data])

    return _emitter(1, emit)


def define_move_part(count: int, dtype: np.dtype[Any]) -> Any:
    """Return move(source, destination, some): write ``count`` numbers: the first ``some`` from the source, the rest 0."""
    vector, size = ir.VectorType(_real(dtype), count), dtype.itemsize
    pointer, bits = vector.as_pointer(), ir.VectorType(ir.IntType(1), count)

    def emit(builder: Any, args: Any) -> None:
        source, destination = (builder.inttoptr(a, pointer) for a in args[:2])
        mask = _first_lanes(builder, args[2], count)
        name = f"llvm.masked.load.v{count}f{8 * size}.p0"
        load = _function(builder, name, vector, [pointer, I32, bits, vector])
        zeros = ir.Constant(vector, [0.0] * count)
        value = builder.call(load, [source, ir.Constant(I32, size), mask, zeros])
        builder.store(value, destination, align=size)

    return _emitter(3, emit)


def define_clear(dtype: np.dtype[Any]) -> Any:
    """Return clear(destination): set one number to 0."""
    real = _real(dtype)

    def emit(builder: Any, args: Any) -> None:
        builder.store(ir.Constant(real, 0.0), builder.inttoptr(args[0], real.as_pointer()))

    return _emitter(1, emit)


def define_add(dtype: np.dtype[Any]) -> Any:
    """Return add(source, destination): add one number to another."""
    pointer = _real(dtype).as_pointer()

    def emit(builder: Any, args: Any) -> None:
        source, destination = (builder.inttoptr(a, pointer) for a in args)
        builder.store(builder.fadd(builder.load(destination), builder.load(source)), destination)

    return _emitter(2, emit)


def define_transpose(rows: int, dtype: np.dtype[Any]) -> Any:
    """Return transpose(source, row, destination, step): destination[k, i] = source[i, k] for k < width and i < rows.

    Rows lie ``row`` numbers apart, the destination's ``step``; a whole vector is written for each k, in their order.
    """
    width, size = shape_for(dtype).width, dtype.itemsize
    vector = ir.VectorType(_real(dtype), width)

    def emit(builder: Any, args: Any) -> None:
        source, row, destination, step = args
        row, step = (builder.mul(a, _constant(size)) for a in (row, step))
        v = [ir.Constant(vector, ir.Undefined)] * width
        for i in range(rows):
            v[i] = builder.load(builder.inttoptr(source, vector.as_pointer()), align=size)
            source = builder.add(source, row)
        block = width // 2
        while block:  # swap the off-diagonal blocks, of half the size each time
            first = [k if not k & block else width + k - block for k in range(width)]
            second = [k + block if not k & block else width + k for k in range(width)]
            for i in range(width):
                if not i & block:
                    a, b = v[i], v[i + block]
                    v[i] = builder.shuffle_vector(a, b, _mask(first))
                    v[i + block] = builder.shuffle_vector(a, b, _mask(second))
            block //= 2
        for k in range(width):
            builder.store(v[k], builder.inttoptr(destination, vector.as_pointer()), align=size)
            destination = builder.add(destination, step)

    return _emitter(4, emit)


def define_micro_kernel(rows: int, dtype: np.dtype[Any], packs: str = "") -> Any:
    """Return kernel(a, a_row, a_step, b, b_step, out, out_row, k, more): out = a b, or out += a b where ``more`` is not 0.

    a[i, p] lies at a + i a_row + p a_step, b[p, j] at b + p b_step + j, out[i, j] at out + i out_row + j (addresses in bytes,
    distances in numbers), for i < rows, j < columns and p < k, k >= 1. Every sum runs over p in order, from +0, and each product is
    added to it in one rounding; without such an instruction the C library's function does it, slowly.

    With ``packs`` of "a" or "b" there is one more address, to which a or b is packed as it is read: other micro-kernels find
    a[i, p] at i + p rows, or b[p, j] at p columns + j. Packing a needs a_row = 1; it may read and write two numbers beyond the
    last row. What the next micro-kernel packs is prefetched meanwhile.
    """
    shape, size = shape_for(dtype), dtype.itemsize
    real, vector = _real(dtype), ir.VectorType(_real(dtype), shape.width)
    row_of_a = ir.VectorType(real, 1 << (rows - 1).bit_length()).as_pointer()  # whole vectors, or half of one
    parts = range(shape.columns // shape.width)

    def multiply_add(builder: Any, x: Any, y: Any, z: Any) -> Any:
        name = f"llvm.fma.v{shape.width}f{8 * size}"
        return builder.call(_function(builder, name, vector, [vector] * 3), [x, y, z])

    def vectors_at(builder: Any, address: Any) -> list[Any]:
        pointer = vector.as_pointer()
        return [
            builder.inttoptr(builder.add(address, _constant(v * shape.width * size)), pointer) for v in parts
        ]  # fmt: skip

    def pack(builder: Any, pa: Any, pb: Any, b: list[Any], to: Any) -> None:
        if packs == "a":
            _prefetch(builder, builder.add(pa, _constant(64)), 0, 3)
            number = builder.load(builder.inttoptr(pa, row_of_a), align=size)
            builder.store(number, builder.inttoptr(to, row_of_a), align=size)
        else:
            _prefetch(builder, builder.add(pb, _constant(shape.columns * size)), 0, 2)
            store(builder, [vectors_at(builder, to)], [b], False)

    def products(builder: Any, running: list[Any], offsets: list[Any], sums: list[list[Any]]) -> list[list[Any]]:
        _, pa, pb, *to = running
        b = [builder.load(p, align=size) for p in vectors_at(builder, pb)]
        if to:
            pack(builder, pa, pb, b, to[0])
        result = []
        for offset, row in zip(offsets, sums, strict=True):
            one = builder.load(builder.inttoptr(builder.add(pa, offset), real.as_pointer()), align=size)
            result.append([multiply_add(builder, _spread(builder, one, vector), b[v], row[v]) for v in parts])
        return result

    def store(builder: Any, places: list[list[Any]], sums: list[list[Any]], add: bool) -> None:
        for place, row in zip(places, sums, strict=True):
            for v in parts:
                total = builder.fadd(builder.load(place[v], align=size), row[v]) if add else row[v]
                builder.store(total, place[v], align=size)

    def emit(builder: Any, args: Any) -> None:
        builder.function.attributes.add("noinline")  # called in two places, and slow to compile
        a, a_row, a_step, b, b_step, out, out_row, k, more, *to = args
        a_row, a_step, b_step, out_row = (builder.mul(x, _constant(size)) for x in (a_row, a_step, b_step, out_row))
        offsets, outs = [_constant(0)], [out]
        for _ in range(rows - 1):
            offsets.append(builder.add(offsets[-1], a_row))
            outs.append(builder.add(outs[-1], out_row))
        for address in outs:
            _prefetch(builder, address, 1, 3)
        starts = [k, a, b, *to]
        steps = [_constant(-1), a_step, b_step, _constant((rows if packs == "a" else shape.columns) * size)]
        entry, loop, done = builder.block, builder.append_basic_block(), builder.append_basic_block()
        builder.branch(loop)
        builder.position_at_end(loop)
        running = [builder.phi(I64) for _ in starts]
        sums = [[builder.phi(vector) for _ in parts] for _ in range(rows)]
        new = products(builder, running, offsets, sums)
        for phi, start, step in zip(running, starts, steps, strict=False):
            phi.add_incoming(start, entry)
            phi.add_incoming(builder.add(phi, step), loop)
        for row, new_row in zip(sums, new, strict=True):
            for phi, value in zip(row, new_row, strict=True):
                phi.add_incoming(ir.Constant(vector, [0.0] * shape.width), entry)
                phi.add_incoming(value, loop)
        builder.cbranch(builder.icmp_signed(">", running[0], _constant(1)), loop, done)
        builder.position_at_end(done)
        places = [vectors_at(builder, address) for address in outs]
        with builder.if_else(builder.icmp_signed("!=", more, _constant(0))) as (then, otherwise):
            with then:
                store(builder, places, new, True)
            with otherwise:
                store(builder, places, new, False)

    return _emitter(10 if packs else 9, emit)


def define_narrow_tile(rows: int, lanes: int, dtype: np.dtype[Any], exact: bool, side_by_side: bool = False) -> Any:
    """Return tile(a, a_row, a_step, b, b_step, out, n, k, more): out = a b, or out += a b where ``more`` is not 0, n <= lanes.

    Arguments and sums are those of :func:`define_micro_kernel`; out has n columns and nothing else. Where the tile is not
    ``exact``, ``more`` is 0, and each row is stored as a whole vector: it may write the next rows too, before they are
    stored. With ``side_by_side`` a_row is 1, so that the places of many rows need no registers.
    """
    size, real = dtype.itemsize, _real(dtype)
    vector, bits = (ir.VectorType(kind, lanes) for kind in (real, ir.IntType(1)))
    pointer, suffix = vector.as_pointer(), f"v{lanes}f{8 * size}"
    align, zeros = ir.Constant(I32, size), ir.Constant(vector, [0.0] * lanes)

    def emit(builder: Any, args: Any) -> None:
        builder.function.attributes.add("noinline")  # so that the registers are allocated for it alone
        a, a_row, a_step, b, b_step, out, n, k, more = args
        load = _function(builder, f"llvm.masked.load.{suffix}.p0", vector, [pointer, I32, bits, vector])
        store = _function(builder, f"llvm.masked.store.{suffix}.p0", ir.VoidType(), [vector, pointer, I32, bits])
        fma = _function(builder, f"llvm.fma.{suffix}", vector, [vector] * 3)
        a_row, a_step, b_step, out_row = (builder.mul(x, _constant(size)) for x in (a_row, a_step, b_step, n))
        mask = _first_lanes(builder, n, lanes)
        offsets = [_constant(r * size) if side_by_side else builder.mul(a_row, _constant(r)) for r in range(rows)]
        entry, loop, done = builder.block, builder.append_basic_block(), builder.append_basic_block()
        builder.branch(loop)
        builder.position_at_end(loop)
        left, pa, pb = (builder.phi(I64) for _ in range(3))
        sums = [builder.phi(vector) for _ in range(rows)]
        row_of_b, new = builder.call(load, [builder.inttoptr(pb, pointer), align, mask, zeros]), []
        for offset, total in zip(offsets, sums, strict=True):
            one = builder.load(builder.inttoptr(builder.add(pa, offset), real.as_pointer()), align=size)
            new.append(builder.call(fma, [_spread(builder, one, vector), row_of_b, total]))
        for phi, start, step in ((left, k, _constant(-1)), (pa, a, a_step), (pb, b, b_step)):
            phi.add_incoming(start, entry)
            phi.add_incoming(builder.add(phi, step), loop)
        for phi, value in zip(sums, new, strict=True):
            phi.add_incoming(zeros, entry)
            phi.add_incoming(value, loop)
        builder.cbranch(builder.icmp_signed(">", left, _constant(1)), loop, done)
        builder.position_at_end(done)
        adds = builder.and_(mask, _spread(builder, builder.icmp_signed("!=", more, _constant(0)), bits))
        for value in new:
            place = builder.inttoptr(out, pointer)
            if exact:
                before = builder.call(load, [place, align, adds, ir.Constant(vector, [-0.0] * lanes)])
                builder.call(store, [builder.fadd(before, value), place, align, mask])
            else:
                builder.store(value, place, align=size)
            out = builder.add(out, out_row)

    return _emitter(9, emit)


def define_column_sums(dtype: np.dtype[Any]) -> Any:
    """Return sums(b, b_step, out, n, k): out[j] = the sum of b[p, j] over p < k in order, from +0, for j < n; n <= NR, k >= 1."""
    size, lanes = dtype.itemsize, shape_for(dtype).columns
    vector, bits = (ir.VectorType(kind, lanes) for kind in (_real(dtype), ir.IntType(1)))
    pointer, suffix = vector.as_pointer(), f"v{lanes}f{8 * size}"
    align, zeros = ir.Constant(I32, size), ir.Constant(vector, [0.0] * lanes)

    def emit(builder: Any, args: Any) -> None:
        b, b_step, out, n, k = args
        load = _function(builder, f"llvm.masked.load.{suffix}.p0", vector, [pointer, I32, bits, vector])
        store = _function(builder, f"llvm.masked.store.{suffix}.p0", ir.VoidType(), [vector, pointer, I32, bits])
        step, mask = builder.mul(b_step, _constant(size)), _first_lanes(builder, n, lanes)
        entry, loop, done = builder.block, builder.append_basic_block(), builder.append_basic_block()
        builder.branch(loop)
        builder.position_at_end(loop)
        left, at, total = builder.phi(I64), builder.phi(I64), builder.phi(vector)
        more = builder.fadd(total, builder.call(load, [builder.inttoptr(at, pointer), align, mask, zeros]))
        for phi, start, new in (
            (left, k, builder.sub(left, _constant(1))), (at, b, builder.add(at, step)), (total, zeros, more)
        ):  # fmt: skip
            phi.add_incoming(start, entry)
            phi.add_incoming(new, loop)
        builder.cbranch(builder.icmp_signed(">", left, _constant(1)), loop, done)
        builder.position_at_end(done)
        builder.call(store, [more, builder.inttoptr(out, pointer), align, mask])

    return _emitter(5, emit)


LANES = 16  # parallel sums; a definition, not the width of a register


def define_sum(dtype: np.dtype[Any], squares: bool = False) -> Any:
    """Return total(at, count, scale): the sum of numbers at an address in float64, or of squares of the numbers times ``scale``.

    Number j is added to lane j mod LANES, in order, the last round padded with zeros; then the upper half of the lanes is added
    to the lower until one is left. So the order is the same on every machine, for vectors of any width.
    """
    size, wide = dtype.itemsize, ir.VectorType(ir.DoubleType(), LANES)
    narrow = ir.VectorType(_real(dtype), LANES)
    pointer, bits = narrow.as_pointer(), ir.VectorType(ir.IntType(1), LANES)

    def add(builder: Any, total: Any, numbers: Any, scale: Any) -> Any:
        numbers = numbers if size == 8 else builder.fpext(numbers, wide)
        if not squares:
            return builder.fadd(total, numbers)
        numbers = builder.fmul(numbers, scale)
        fma = _function(builder, f"llvm.fma.v{LANES}f64", wide, [wide] * 3)
        return builder.call(fma, [numbers, numbers, total])

    def emit(builder: Any, at: Any, count: Any, scale: Any) -> Any:
        scale, zeros = _spread(builder, scale, wide), ir.Constant(wide, [0.0] * LANES)
        entry = builder.block
        head, loop, done = (builder.append_basic_block() for _ in range(3))
        builder.branch(head)
        builder.position_at_end(head)
        here, left, total = builder.phi(I64), builder.phi(I64), builder.phi(wide)
        builder.cbranch(builder.icmp_signed(">=", left, _constant(LANES)), loop, done)
        builder.position_at_end(loop)
        more = add(builder, total, builder.load(builder.inttoptr(here, pointer), align=size), scale)
        for phi, start, new in (
            (here, at, builder.add(here, _constant(LANES * size))),
            (left, count, builder.sub(left, _constant(LANES))),
            (total, zeros, more),
        ):
            phi.add_incoming(start, entry)
            phi.add_incoming(new, loop)
        builder.branch(head)
        builder.position_at_end(done)
        mask = _first_lanes(builder, left, LANES)
        load = _function(builder, f"llvm.masked.load.v{LANES}f{8 * size}.p0", narrow, [pointer, I32, bits, narrow])
        rest = [builder.inttoptr(here, pointer), ir.Constant(I32, size), mask, ir.Constant(narrow, [0.0] * LANES)]
        result = add(builder, total, builder.call(load, rest), scale)
        half = LANES // 2
        while half:
            upper = builder.shuffle_vector(result, result, _mask([k + half if k < half else k for k in range(LANES)]))
            result, half = builder.fadd(result, upper), half // 2
        return builder.extract_element(result, ir.Constant(I32, 0))

    @intrinsic  # type: ignore[untyped-decorator]
    def total(typingctx: Any, at: Any, count: Any, scale: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return emit(builder, *args)

        return types.float64(types.intp, types.intp, types.float64), codegen

    return total
