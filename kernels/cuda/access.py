"""Access to memory 16 bytes at a time, sums over a warp and a block, and the functions a definition may use on the GPU.

Kernels take raw pointers, which Numba cannot load vectors from: the intrinsics here emit one load or store of the whole
width. The compute type is the storage type, but float32 for the 16-bit types: "f2" is IEEE half, "bf16" is bfloat16
behind a pointer to uint16, rounded to nearest even with NaN kept.

Everything has a twin for Numba's simulator (``NUMBA_ENABLE_CUDASIM=1``), where pointers are flat NumPy arrays and warp
shuffles, which the simulator lacks, go through shared memory: kernels call them with all threads of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numba
import numpy as np

from gpubackprop.definitions import NUMPY, Math, power
from gpubackprop.kernels.cuda.numba import SIMULATED, cuda, intrinsic, types
from gpubackprop.kernels.cuda.unroll import static_range, unrolled

VECTOR_BYTES = 16
WARP = 32
STORAGE = {"f4": np.float32, "f8": np.float64, "f2": np.float16, "bf16": np.uint16, "u2": np.uint16, "i8": np.int64}
"""The element type of memory by the name of the storage; "u2" is 16 bits that are only copied."""


def compute_type(storage: str) -> Any:
    """Return the NumPy scalar type that a kernel computes with."""
    return np.float32 if storage in ("f2", "bf16") else STORAGE[storage]


def storage_of(dtype: np.dtype[Any]) -> str:
    """Return the storage name of an array's dtype: ``"f4"`` for float32."""
    return "bf16" if dtype.name == "bfloat16" else dtype.str[1:]


class Access(NamedTuple):
    """Vector and scalar loads and stores of one storage type and width."""

    load: Any
    """load(buffer, offset, p, i): buffer[offset : offset + width] = p[i : i + width]"""
    store: Any
    """store(p, i, buffer, offset): p[i : i + width] = buffer[offset : offset + width]"""
    load1: Any
    """load1(p, i) -> the element p[i]"""
    store1: Any
    """store1(p, i, x): p[i] = x"""
    rounded: Any
    """rounded(x) -> x as it would come back from memory"""


if SIMULATED:

    def inlined(function: Callable[..., Any]) -> Any:
        """Return a scalar function as kernels call it."""
        return function

    def device(function: Callable[..., Any]) -> Any:
        """Return a function that kernels call with all threads of a block."""
        return cuda.jit(device=True)(function)

    def _where(condition: Any, a: Any, b: Any) -> Any:
        return a if condition else b

    MATH = NUMPY._replace(where=_where)

    def uint32(x: Any) -> Any:
        """Return the low 32 bits of a whole number."""
        return np.uint32(int(x) & 0xFFFFFFFF)

    uint64 = np.uint64

    def _from_bf16(bits: Any) -> Any:
        return (np.uint32(bits) << np.uint32(16)).view(np.float32)

    def _to_bf16(x: Any) -> Any:
        bits = int(np.float32(x).view(np.uint32))
        return np.uint16(0x7FFF if x != x else (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)

    @cache
    def access(storage: str, width: int) -> Access:
        """Return the loads and stores of one storage type; width is a power of two."""
        narrow, wide = STORAGE[storage], compute_type(storage)
        get = _from_bf16 if storage == "bf16" else wide
        put = _to_bf16 if storage == "bf16" else narrow

        def load(buffer: Any, offset: int, p: Any, i: int) -> None:
            for k in range(width):
                buffer[offset + k] = get(p[i + k])

        def store(p: Any, i: int, buffer: Any, offset: int) -> None:
            for k in range(width):
                p[i + k] = put(buffer[offset + k])

        def load1(p: Any, i: int) -> Any:
            return get(p[i])

        def store1(p: Any, i: int, x: Any) -> None:
            p[i] = put(x)

        def rounded(x: Any) -> Any:
            return get(put(x))

        return Access(load, store, load1, store1, rounded)

    def load_current(p: Any, i: int) -> Any:
        """Return p[i] as other blocks have left it."""
        return p[i]

    def take_ticket(p: Any, i: int) -> Any:
        """Return p[i] and add 1 to it, which no other thread comes between."""
        ticket = p[i]  # blocks run one after another here
        p[i] = ticket + 1
        return ticket

    @cache
    def warp_reductions(lanes: int) -> tuple[Any, Any]:
        """Return (sum, max) over groups of ``lanes`` neighbouring threads; every thread gets the result."""

        def total(x):  # type: ignore[no-untyped-def]
            shared = cuda.shared.array(1024, numba.float64)
            t = cuda.threadIdx.x + cuda.blockDim.x * cuda.threadIdx.y
            shared[t] = x
            cuda.syncthreads()
            result = x.dtype.type(shared[t // lanes * lanes : t // lanes * lanes + lanes].sum())
            cuda.syncthreads()
            return result

        def top(x):  # type: ignore[no-untyped-def]
            shared = cuda.shared.array(1024, numba.float64)
            t = cuda.threadIdx.x + cuda.blockDim.x * cuda.threadIdx.y
            shared[t] = x
            cuda.syncthreads()
            result = x.dtype.type(shared[t // lanes * lanes : t // lanes * lanes + lanes].max())
            cuda.syncthreads()
            return result

        return device(total), device(top)

else:
    from llvmlite import ir

    _F32, _F64, _HALF = ir.FloatType(), ir.DoubleType(), ir.HalfType()
    _I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
    _ELEMENT = {"f4": _F32, "f8": _F64, "f2": _HALF, "bf16": _I16, "u2": _I16, "i8": _I64}

    def inlined(function: Callable[..., Any]) -> Any:
        """Return a scalar function as kernels call it.

        Inlined in Numba's own representation: a device function that is compiled by itself asks for the device at hand,
        and kernels are also compiled where there is none.
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
        math.exp, math.expm1, math.log, math.log1p, math.tanh, math.sin, math.cos, math.sqrt, math.fabs, math.erf, _erfcx, _where,
        inlined(power), _fma,
    )  # fmt: skip
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

    @cache
    def access(storage: str, width: int) -> Access:
        """Return the loads and stores of one storage type; width is a power of two.

        Vectors lie at multiples of their size, those of more than 16 bytes at multiples of 16: they are two accesses.
        """
        element = _ELEMENT[storage]
        compute = numba.from_dtype(np.dtype(compute_type(storage)))
        nbytes = min(VECTOR_BYTES, width * np.dtype(STORAGE[storage]).itemsize)
        packed = storage == "bf16" and width > 1  # eight i16 would become two loads; four i32 become one
        vector = ir.VectorType(_I32, width // 2) if packed else ir.VectorType(element, width) if width > 1 else element

        def pointer(builder: Any, p: Any, i: Any, kind: Any) -> Any:
            first = builder.gep(builder.bitcast(p, element.as_pointer()), [i])
            return builder.bitcast(first, kind.as_pointer())

        def place(context: Any, builder: Any, kind: Any, buffer: Any, offset: Any, k: int) -> Any:
            data = context.make_array(kind)(context, builder, buffer).data
            return builder.gep(data, [builder.add(offset, _constant(k, offset.type))])

        def parts(builder: Any, v: Any) -> list[Any]:
            if width == 1:
                return [_widen(builder, storage, v)]
            if not packed:
                return [_widen(builder, storage, builder.extract_element(v, _constant(k))) for k in range(width)]
            result = []
            for k in range(width // 2):
                pair = builder.extract_element(v, _constant(k))
                result.append(builder.bitcast(builder.shl(pair, _constant(16)), _F32))
                result.append(builder.bitcast(builder.and_(pair, _constant(0xFFFF0000)), _F32))
            return result

        def joined(builder: Any, elements: list[Any]) -> Any:
            if width == 1:
                return _narrow(builder, storage, elements[0])
            if packed:
                low = [builder.lshr(_rounded(builder, x), _constant(16)) for x in elements[::2]]
                high = [builder.and_(_rounded(builder, x), _constant(0xFFFF0000)) for x in elements[1::2]]
                stored = [builder.or_(*pair) for pair in zip(low, high, strict=True)]
            else:
                stored = [_narrow(builder, storage, x) for x in elements]
            v = ir.Constant(vector, ir.Undefined)
            for k, x in enumerate(stored):
                v = builder.insert_element(v, x, _constant(k))
            return v

        @intrinsic
        def load(typingctx, buffer, offset, p, i):  # type: ignore[no-untyped-def]
            def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
                buffer_, offset_, p_, i_ = arguments
                v = builder.load(pointer(builder, p_, i_, vector))
                v.align = nbytes
                for k, x in enumerate(parts(builder, v)):
                    builder.store(x, place(context, builder, signature.args[0], buffer_, offset_, k))
                return context.get_dummy_value()

            return types.void(buffer, types.int64, p, types.int64), codegen

        @intrinsic
        def store(typingctx, p, i, buffer, offset):  # type: ignore[no-untyped-def]
            def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
                p_, i_, buffer_, offset_ = arguments
                places = [place(context, builder, signature.args[2], buffer_, offset_, k) for k in range(width)]
                v = joined(builder, [builder.load(one) for one in places])
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
        """Return p[i] and add 1 to it, which no other thread comes between."""

        def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            return builder.atomic_rmw("add", builder.gep(arguments[0], [arguments[1]]), _constant(1, _I64), "monotonic")

        return types.int64(p, types.int64), codegen

    @intrinsic
    def load_current(typingctx, p, i):  # type: ignore[no-untyped-def]
        """Return p[i] as other blocks have left it: past the first cache, which may hold what was there."""
        element = p.dtype
        kind, letter, name = (_F32, "f", "f32") if element == types.float32 else (_F64, "d", "f64")

        def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            place = builder.ptrtoint(builder.gep(arguments[0], [arguments[1]]), _I64)
            load = ir.FunctionType(kind, [_I64])
            return builder.asm(load, f"ld.global.cg.{name} $0, [$1];", f"={letter},l", [place], True)

        return element(p, types.int64), codegen

    @cache
    def warp_reductions(lanes: int) -> tuple[Any, Any]:
        """Return (sum, max) over groups of ``lanes`` neighbouring threads; every thread gets the result."""
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


@cache
def block_reductions(threads: int, count: int = 0) -> tuple[Any, Any]:
    """Return (sum, max) over a block, in a fixed order; every thread gets the result.

    ``x = reduce(x, shared)`` for one number, with ``shared`` for 32; or, with ``count``, ``reduce(x, shared)`` for as many
    at once in a local array x, with ``shared`` for 32 times as many.
    """
    warps = threads // WARP

    def define(within: Any, between: Any) -> Any:
        def one(x, shared):  # type: ignore[no-untyped-def]
            x = within(x)
            t = cuda.threadIdx.x + cuda.blockDim.x * cuda.threadIdx.y
            if t % 32 == 0:
                shared[t // 32] = x
            cuda.syncthreads()
            x = between(shared[t % warps])
            cuda.syncthreads()  # the next call writes into the same place
            return x

        @unrolled
        def several(x, shared):  # type: ignore[no-untyped-def]
            t = cuda.threadIdx.x + cuda.blockDim.x * cuda.threadIdx.y
            for k in static_range(count):
                x[k] = within(x[k])
                if t % 32 == 0:
                    shared[k * 32 + t // 32] = x[k]
            cuda.syncthreads()
            for k in static_range(count):
                x[k] = between(shared[k * 32 + t % warps])
            cuda.syncthreads()

        return device(several if count else one)

    total, top = map(define, warp_reductions(WARP), warp_reductions(warps))
    return total, top


@cache
def read_once(storage: str) -> Any:
    """Return read(p, i, shared) -> p[i], fetched by one thread of the block for all; ``shared`` holds a number."""
    _, _, load1, _, _ = access(storage, 1)

    def read(p, i, shared):  # type: ignore[no-untyped-def]
        if cuda.threadIdx.x == 0 and cuda.threadIdx.y == 0:
            shared[0] = load1(p, i)
        cuda.syncthreads()
        x = shared[0]
        cuda.syncthreads()  # the next call writes into the same place
        return x

    return device(read)


@cache
def access_within(storage: str, width: int) -> tuple[Any, Any]:
    """Return load(buffer, offset, p, i, size) and store(p, i, buffer, offset, size): those of :func:`access` for ``size`` elements.

    What would lie beyond is loaded as 0 and is not stored.
    """
    load, store, load1, store1, _ = access(storage, width)
    zero, vector = compute_type(storage)(0), width > 1

    @unrolled
    def load_within(buffer, offset, p, i, size):  # type: ignore[no-untyped-def]
        if i + width <= size:
            load(buffer, offset, p, i)
        elif vector:
            for k in static_range(width):
                buffer[offset + k] = zero
                if i + k < size:
                    buffer[offset + k] = load1(p, i + k)

    @unrolled
    def store_within(p, i, buffer, offset, size):  # type: ignore[no-untyped-def]
        if i + width <= size:
            store(p, i, buffer, offset)
        elif vector:
            for k in static_range(width):
                if i + k < size:
                    store1(p, i + k, buffer[offset + k])

    return inlined(load_within), inlined(store_within)
