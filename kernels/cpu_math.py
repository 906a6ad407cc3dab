"""exp, expm1 and tanh for the CPU as straight-line arithmetic, so that the loops around them are vectorized.

The C library's functions are called one element at a time. These take the same inputs to within 2 units in the last place, NaN to
NaN and infinities to their limits; results below the smallest normal number are 0.

With n = round(x / ln 2) and r = x - n ln 2, |r| <= ln(2) / 2: e^x = 2^n (1 + p(r)) and e^x - 1 = 2^n p(r) + (2^n - 1), where
p(r) = r + r^2/2! + ... is e^r - 1 by its Taylor series, cut where the next term is below the rounding.
"""

from __future__ import annotations

import math
from decimal import Decimal
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba.extending import intrinsic

from gpubackprop.definitions import Math
from gpubackprop.kernels.cpu_compile import SCALAR, inlined


@intrinsic  # type: ignore[untyped-decorator]
def _half_power_of_two(typingctx: Any, shifted: Any) -> Any:
    """Return 2^(n - 1), given n plus 1.5 * 2^mantissa: the low bits of that number hold n."""
    info = np.finfo(str(shifted))

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        integer = ir.IntType(shifted.bitwidth)
        bits = builder.bitcast(args[0], integer)
        exponent = builder.add(bits, ir.Constant(integer, int(info.maxexp) - 2))
        power = builder.shl(exponent, ir.Constant(integer, int(info.nmant)))
        return builder.bitcast(power, args[0].type)

    return shifted(shifted), codegen


LN_2 = Decimal("0.693147180559945309417232121458")


def _series(real: Any, terms: int) -> Any:
    """Return p(r) = r + r^2/2! + ... + r^terms/terms!, by Horner's rule, written out."""
    nested = f"c{terms}"
    for k in range(terms - 1, 1, -1):
        nested = f"c{k} + r * ({nested})"
    namespace = {f"c{k}": real(1 / math.factorial(k)) for k in range(2, terms + 1)}
    exec(f"def series(r):\n    return r + r * r * ({nested})\n", namespace)
    return inlined(namespace["series"])


@cache
def vector_math(dtype: np.dtype[Any]) -> Math:
    """Return the functions that definitions use on the CPU, for numbers of a dtype."""
    real, info, single = dtype.type, np.finfo(dtype), dtype == np.float32
    zero, half, one, two, infinity = (real(v) for v in (0, 0.5, 1, 2, np.inf))
    # adding 1.5 * 2^mantissa rounds to a whole number and leaves it in the low bits
    shifter, log2_e = real(1.5 * 2.0**info.nmant), real(1 / math.log(2))
    # ln 2 in two parts; the first has so few bits that n times it is exact
    bits = 2.0 ** (11 if single else 33)
    ln2_high = real(math.floor(math.log(2) * bits) / bits)
    ln2_low = real(LN_2 - Decimal(float(ln2_high)))
    highest, lowest = real(math.log(info.max)), real(math.log(info.tiny) + 1.5)
    saturated = real(9.5 if single else 19.5)  # beyond it tanh is 1 to the last bit
    series, where = _series(real, 8 if single else 13), SCALAR.where

    def exp(x):  # type: ignore[no-untyped-def]
        shifted = x * log2_e + shifter
        n = shifted - shifter
        r = (x - n * ln2_high) - n * ln2_low
        # 2^(n - 1), doubled at the end, since n may be one above the largest exponent
        scale = _half_power_of_two(shifted)
        return where(x > highest, infinity, where(x < lowest, zero, (one + series(r)) * scale * two))

    def expm1(x):  # type: ignore[no-untyped-def]
        shifted = x * log2_e + shifter
        n = shifted - shifter
        r = (x - n * ln2_high) - n * ln2_low
        scale = _half_power_of_two(shifted)
        result = (series(r) * scale + (scale - half)) * two
        return where(x > highest, infinity, where(x < lowest, -one, result))

    vector_expm1 = inlined(expm1)

    def tanh(x):  # type: ignore[no-untyped-def]
        t = where(x < zero, -x, x)
        e = vector_expm1(two * where(t > saturated, saturated, t))
        h = e / (e + two)
        return where(x < zero, -h, h)

    return SCALAR._replace(exp=inlined(exp), expm1=vector_expm1, tanh=inlined(tanh))
