"""What kernels call on the device: loads and stores of whole vectors, sums over a warp, the functions of a definition.

Kernels take raw pointers, which Numba cannot load vectors from: the intrinsics here emit one load or store of the whole width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np
from llvmlite import ir

from gpubackprop.definitions import Math, power
from gpubackprop.kernels.cuda.numba import cuda, intrinsic, types
from gpubackprop.kernels.cuda.storage import STORAGE, VECTOR_BYTES, Access, compute_type
from gpubackprop.kernels.cuda.unroll import static_range, unrolled

_F32, _F64, _HALF = ir.FloatType(), ir.DoubleType(), ir.HalfType()
_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_ELEMENT = {"f4": _F32, "f8": _F64, "f2": _HALF, "bf16": _I16, "u2": _I16, "i8": _I64}


def inlined(function: Callable[..., Any]) -> Any:
    """Return a scalar function as kernels call it.

    Inlined in Numba's own representation: a separately compiled device function needs the current device,
    and kernels are also compiled without one.
    """
    return cuda.jit(device=True, inline="always")(function)


device = inlined


@intrinsic
def _where(typingctx, condition, a, b):  # type: ignore[no-untyped-def]
    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.select(*arguments)

    return (a(types.boolean, a, b), codegen) if a == b else None


@intrinsic
def _fma(typingctx, x, y, z):  # type: ignore[no-untyped-def]
    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.fma(*arguments)

    return (x(x, y, z), codegen) if x == y == z else None


@intrinsic
def _erfcx(typingctx, x):  # type: ignore[no-untyped-def]
    kind, name = (_F32, "__nv_erfcxf") if x == types.float32 else (_F64, "__nv_erfcx")

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        module, signature_ = builder.module, ir.FunctionType(kind, [kind])
        return builder.call(module.globals.get(name) or ir.Function(module, signature_, name), arguments)

    return x(x), codegen


MATH = Math(
    exp=math.exp,
    expm1=math.expm1,
    log=math.log,
    log1p=math.log1p,
    tanh=math.tanh,
    sin=math.sin,
    cos=math.cos,
    sqrt=math.sqrt,
    fabs=math.fabs,
    erf=math.erf,
    erfcx=_erfcx,
    where=_where,
    power=inlined(power),
    fma=_fma,
)
uint32, uint64 = numba.uint32, numba.uint64


def _constant(value: int, kind: Any = _I32) -> Any:
    return ir.Constant(kind, value)


def _widen(builder: Any, storage: str, x: Any) -> Any:
    if storage == "f2":
        return builder.fpext(x, _F32)
    if storage == "bf16":
        return builder.bitcast(builder.shl(builder.zext(x, _I32), _constant(16)), _F32)
    return x


def _narrow(builder: Any, storage: str, x: Any) -> Any:
    if storage == "f2":
        return builder.fptrunc(x, _HALF)
    if storage == "bf16":
        return builder.trunc(builder.lshr(_rounded(builder, x), _constant(16)), _I16)
    return x


def _rounded(builder: Any, x: Any) -> Any:
    """Return the bits of x with its bfloat16 in the high half; the device's NaN, all ones, would carry into -0."""
    bits = builder.bitcast(x, _I32)
    odd = builder.and_(builder.lshr(bits, _constant(16)), _constant(1))
    nearest = builder.add(bits, builder.add(odd, _constant(0x7FFF)))
    return builder.select(builder.fcmp_unordered("uno", x, x), _constant(0x7FFF0000), nearest)


def _place(context: Any, builder: Any, kind: Any, buffer: Any, offset: Any, k: int) -> Any:
    """Return the address of buffer[offset + k], of a local array."""
    data = context.make_array(kind)(context, builder, buffer).data
    return builder.gep(data, [builder.add(offset, _constant(k, offset.type))])


def _vector_of(storage: str, width: int) -> Any:
    """Return the LLVM type of ``width`` numbers that are loaded or stored at once."""
    if width == 1:
        return _ELEMENT[storage]
    if storage == "bf16":  # eight i16 would become two loads; four i32 become one
        return ir.VectorType(_I32, width // 2)
    return ir.VectorType(_ELEMENT[storage], width)


def _parts(builder: Any, storage: str, width: int, v: Any) -> list[Any]:
    """Return the numbers of a vector."""
    if width == 1:
        return [_widen(builder, storage, v)]
    if storage != "bf16":
        return [_widen(builder, storage, builder.extract_element(v, _constant(k))) for k in range(width)]
    result = []
    for k in range(width // 2):
        pair = builder.extract_element(v, _constant(k))
        result.append(builder.bitcast(builder.shl(pair, _constant(16)), _F32))
        result.append(builder.bitcast(builder.and_(pair, _constant(0xFFFF0000)), _F32))
    return result


def _joined(builder: Any, storage: str, width: int, numbers: list[Any]) -> Any:
    """Return the vector of numbers."""
    if width == 1:
        return _narrow(builder, storage, numbers[0])
    if storage == "bf16":
        low = [builder.lshr(_rounded(builder, x), _constant(16)) for x in numbers[::2]]
        high = [builder.and_(_rounded(builder, x), _constant(0xFFFF0000)) for x in numbers[1::2]]
        stored = [builder.or_(*pair) for pair in zip(low, high, strict=True)]
    else:
        stored = [_narrow(builder, storage, x) for x in numbers]
    v = ir.Constant(_vector_of(storage, width), ir.Undefined)
    for k, x in enumerate(stored):
        v = builder.insert_element(v, x, _constant(k))
    return v


@cache
def access(storage: str, width: int) -> Access:
    """Return the loads and stores of one storage type; width is a power of two.

    Vectors lie at multiples of their size, those of more than 16 bytes at multiples of 16: they are two accesses.
    """
    element = _ELEMENT[storage]
    compute = numba.from_dtype(np.dtype(compute_type(storage)))
    nbytes = min(VECTOR_BYTES, width * np.dtype(STORAGE[storage]).itemsize)
    vector = _vector_of(storage, width)

    def pointer(builder: Any, p: Any, i: Any, kind: Any) -> Any:
        first = builder.gep(builder.bitcast(p, element.as_pointer()), [i])
        return builder.bitcast(first, kind.as_pointer())

    @intrinsic
    def load(typingctx, buffer, offset, p, i):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            buffer_, offset_, p_, i_ = arguments
            v = builder.load(pointer(builder, p_, i_, vector))
            v.align = nbytes
            for k, x in enumerate(_parts(builder, storage, width, v)):
                builder.store(x, _place(context, builder, signature.args[0], buffer_, offset_, k))
            return context.get_dummy_value()

        return types.void(buffer, types.int64, p, types.int64), codegen

    @intrinsic
    def store(typingctx, p, i, buffer, offset):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            p_, i_, buffer_, offset_ = arguments
            places = [_place(context, builder, signature.args[2], buffer_, offset_, k) for k in range(width)]
            v = _joined(builder, storage, width, [builder.load(one) for one in places])
            builder.store(v, pointer(builder, p_, i_, vector)).align = nbytes
            return context.get_dummy_value()

        return types.void(p, types.int64, buffer, types.int64), codegen

    @intrinsic
    def load1(typingctx, p, i):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            return _widen(builder, storage, builder.load(pointer(builder, arguments[0], arguments[1], element)))

        return compute(p, types.int64), codegen

    @intrinsic
    def store1(typingctx, p, i, x):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            builder.store(
                _narrow(builder, storage, arguments[2]), pointer(builder, arguments[0], arguments[1], element)
            )
            return context.get_dummy_value()

        return types.void(p, types.int64, compute), codegen

    @intrinsic
    def rounded(typingctx, x):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            return _widen(builder, storage, _narrow(builder, storage, arguments[0]))

        return compute(compute), codegen

    return Access(load, store, load1, store1, rounded)


@intrinsic
def take_ticket(typingctx, p, i):  # type: ignore[no-untyped-def]
    """Return p[i] and add 1 to it, atomically."""

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.atomic_rmw("add", builder.gep(arguments[0], [arguments[1]]), _constant(1, _I64), "monotonic")

    return types.int64(p, types.int64), codegen


@intrinsic
def load_current(typingctx, p, i):  # type: ignore[no-untyped-def]
    """Return p[i] as other blocks have written it: past the L1 cache, which may be stale."""
    element = p.dtype
    kind, letter, name = (_F32, "f", "f32") if element == types.float32 else (_F64, "d", "f64")

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        place = builder.ptrtoint(builder.gep(arguments[0], [arguments[1]]), _I64)
        load = ir.FunctionType(kind, [_I64])
        return builder.asm(load, f"ld.global.cg.{name} $0, [$1];", f"={letter},l", [place], True)

    return element(p, types.int64), codegen


@cache
def warp_reductions(lanes: int) -> tuple[Any, Any]:
    """Return (sum, max) over groups of ``lanes`` adjacent threads; every thread gets the result."""
    steps = lanes.bit_length()
    where = _where

    @unrolled
    def total(x):  # type: ignore[no-untyped-def]
        for k in static_range(1, steps):
            x = x + cuda.shfl_xor_sync(0xFFFFFFFF, x, lanes >> k)
        return x

    @unrolled
    def top(x):  # type: ignore[no-untyped-def]
        for k in static_range(1, steps):
            other = cuda.shfl_xor_sync(0xFFFFFFFF, x, lanes >> k)
            x = where(other > x, other, x)
        return x

    return inlined(total), inlined(top)
