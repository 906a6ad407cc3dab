"""exp, expm1, log1p, tanh and erf for the CPU as straight-line arithmetic, so that the loops around them are vectorized.

The C library's functions are called one element at a time. These take the same inputs to within 2 units in the last place, NaN to
NaN and infinities to their limits; results below the smallest normal number are 0.

With n = round(x / ln 2) and r = x - n ln 2, |r| <= ln(2) / 2: e^x = 2^n (1 + p(r)) and e^x - 1 = 2^n p(r) + (2^n - 1), where
p(r) = r + r^2/2! + ... is e^r - 1 by its Taylor series, cut where the next term is below the rounding.

With u = 1 + x = 2^n m, 1/sqrt 2 <= m < sqrt 2, f = m - 1 and s = f / (2 + f): log(1 + x) = n ln 2 + log(1 + f) + (x - (u - 1)) / u.
The last is what was rounded in u, and log(1 + f) = 2 (s + s^3/3 + ...) = f - s (f - R), R = 2 (s^2/3 + s^4/5 + ...).

erf(x) is its Taylor series for |x| <= 1, and beyond that 1 - e^(-x^2) G(x), where G(x) = e^(x^2) erfc(x) is a polynomial in
1 / (|x| + 3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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


def _mantissa_and_exponent(part: str) -> Any:
    """Return f(u) = m or n (as a real number) with u = 2^n m, 1/sqrt 2 <= m < sqrt 2, for a normal u > 0."""

    def instruction(typingctx: Any, u: Any) -> Any:
        info = np.finfo(str(u))
        real, word = (np.float32, np.int32) if u.bitwidth == 32 else (np.float64, np.int64)
        root_half, unit = (int(real(v).view(word)) for v in (math.sqrt(0.5), 1.0))

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            integer = ir.IntType(u.bitwidth)
            bits = builder.add(builder.bitcast(args[0], integer), ir.Constant(integer, unit - root_half))
            if part == "exponent":
                n = builder.ashr(bits, ir.Constant(integer, int(info.nmant)))
                return builder.sitofp(builder.sub(n, ir.Constant(integer, int(info.maxexp) - 1)), args[0].type)
            fraction = builder.and_(bits, ir.Constant(integer, (1 << int(info.nmant)) - 1))
            return builder.bitcast(builder.add(fraction, ir.Constant(integer, root_half)), args[0].type)

        return u(u), codegen

    return intrinsic(instruction)


_mantissa, _exponent = _mantissa_and_exponent("mantissa"), _mantissa_and_exponent("exponent")

LN_2 = Decimal("0.693147180559945309417232121458")


# the Chebyshev expansion of G(x) = e^(x^2) erfc(x), 1 <= x <= 6, in y = (1 / (x + 3) - 13/72) 72/5, -1 <= y <= 1, made with 40
# digits and written in powers of y; e^(-x^2) times what is left out is below 2e-18, and below 2e-9 after the first 11
ERFC_SCALED = (
    0.207983291333428867, 0.154361174294369174, 0.0496984454033941398, 0.0127131476956921479, 0.00247931469708620014,
    0.000331602960576804844, 1.95635831980995251e-5, -2.42555747324700576e-6, -5.54127310709044008e-7,
    4.52670299659700863e-9, 1.13393370612805565e-8, 2.63813306763736186e-10, -2.57005042464829219e-10,
    -6.0468580182030323e-12, 6.04406831844964236e-12,
)  # fmt: skip


def _polynomial(real: Any, coefficients: Sequence[float]) -> Any:
    """Return c_0 + c_1 x + c_2 x^2 + ..., by Horner's rule, written out."""
    nested = f"c{len(coefficients) - 1}"
    for k in range(len(coefficients) - 2, -1, -1):
        nested = f"c{k} + x * ({nested})"
    namespace: dict[str, Any] = {f"c{k}": real(c) for k, c in enumerate(coefficients)}
    exec(f"def polynomial(x):\n    return {nested}\n", namespace)
    return inlined(namespace["polynomial"])


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
    quadratic = _polynomial(real, [1 / math.factorial(k) for k in range(2, 9 if single else 14)])
    where = SCALAR.where

    @inlined
    def series(r):  # type: ignore[no-untyped-def]
        return r + r * r * quadratic(r)

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

    vector_exp, log1p, erf = inlined(exp), _define_log1p(dtype), _define_erf(dtype, inlined(exp))
    return SCALAR._replace(exp=vector_exp, expm1=vector_expm1, log1p=log1p, tanh=inlined(tanh), erf=erf)


def _define_log1p(dtype: np.dtype[Any]) -> Any:
    real, single = dtype.type, dtype == np.float32
    zero, one, two, infinity, nan = (real(v) for v in (0, 1, 2, np.inf, np.nan))
    ln2, where = real(math.log(2)), SCALAR.where
    # s^2 <= 0.0295, so that the first term left out is below the rounding
    R = _polynomial(real, [2 / (2 * k + 3) for k in range(5 if single else 11)])

    def log1p(x):  # type: ignore[no-untyped-def]
        u = one + x
        f = _mantissa(u) - one
        s = f / (two + f)
        value = _exponent(u) * ln2 + ((f - s * (f - s * s * R(s * s))) + (x - (u - one)) / u)
        special = where(u == zero, -infinity, where(u == infinity, infinity, nan))
        return where(u > zero, where(u < infinity, value, special), special)

    return inlined(log1p)


def _define_erf(dtype: np.dtype[Any], exp: Any) -> Any:
    real, single = dtype.type, dtype == np.float32
    zero, one, three, end, middle, scale = (real(v) for v in (0, 1, 3, 6, 13 / 72, 72 / 5))
    where = SCALAR.where
    taylor = _polynomial(
        real, [2 / math.sqrt(math.pi) * (-1) ** n / (math.factorial(n) * (2 * n + 1)) for n in range(11 if single else 19)]
    )  # fmt: skip
    scaled = _polynomial(real, ERFC_SCALED[: 11 if single else 15])

    def erf(x):  # type: ignore[no-untyped-def]
        t = where(x < zero, -x, x)
        t = where(t > end, end, t)
        above = one - exp(-t * t) * scaled((one / (t + three) - middle) * scale)
        return where(t > one, where(x < zero, -above, above), x * taylor(x * x))

    return inlined(erf)
