"""The functions of definitions for the CPU, from operations whose result IEEE 754 defines: the same bits on every machine.

Every rounding is explicit: + - * / and sqrt, x y + z in one rounding only where ``fma`` is written, comparisons, and integer
operations on the bits. C libraries differ in the last bit. The functions here are straight-line arithmetic, so that the loops
around them are vectorized (except sin and cos), accurate to 2 units in the last place, also where the result is below
the smallest normal number; NaN gives NaN, infinities their limits.

With n = round(x / ln 2) and r = x - n ln 2, |r| <= ln(2) / 2: e^x = 2^n (1 + p(r)) and e^x - 1 = 2^n p(r) + (2^n - 1), where
p(r) = r + r^2/2! + ... is e^r - 1 by its Taylor series, cut where the next term is below the rounding.

With u = 2^n m, 1/sqrt 2 <= m < sqrt 2, f = m - 1 and s = f / (2 + f): log u = n ln 2 + log(1 + f), and
log(1 + f) = 2 (s + s^3/3 + ...) = f - s (f - R), R = 2 (s^2/3 + s^4/5 + ...). log(1 + x) is log u for u = 1 + x, plus
(x - (u - 1)) / u, the rounding of u.

erf(x) is its Taylor series for |x| <= 1, and beyond that 1 - e^(-x^2) erfcx(x); erfcx(x) = e^(x^2) erfc(x), x >= 0, is a
polynomial in s = 1 / (x + 3), times s.

sin and cos take x - n pi/2 in two numbers, |x - n pi/2| <= pi/4, and their Taylor series there: from pi/2 in three parts, or where
n is large from as many bits of 2/pi as x has digits beyond them (Payne and Hanek (1983)), in integers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gpubackprop.definitions import Math, power
from gpubackprop.kernels.cpu.compile import inlined, where


@intrinsic  # type: ignore[untyped-decorator]
def fma(typingctx: Any, x: Any, y: Any, z: Any) -> Any:
    """``x y + z`` in one rounding; without such an instruction, by the C library's function, which is exact but slow."""
    if not x == y == z:
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fma(*args)

    return x(x, y, z), codegen


@intrinsic  # type: ignore[untyped-decorator]
def _bits(typingctx: Any, x: Any) -> Any:
    """Return the bits of a float64 as an unsigned integer."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(64))

    return types.uint64(types.float64), codegen


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
LOG2_E = 1.44269504088896340736  # constants are literals: a library's log is not the same everywhere
PI = 3.14159265358979323846
TWO_OVER_ROOT_PI = 1.12837916709551257390

# the Chebyshev expansions of (x + 3) e^(x^2) erfc(x), x >= 0, in y = 6 / (x + 3) - 1, -1 < y <= 1, made with 50 digits and written
# in powers of y; the remainder is below 5e-9 for float32 and below 2e-17 for float64
ERFCX_32 = (
    1.0740069072830063999, 0.88339444518687949105, 0.59022833780062276108, 0.3104674893110152048, 0.11952807506461956697,
    0.026825370112629254437, -0.0012143417039291700563, -0.0030274244565849458116, -0.0005426214440275764452,
    0.00026498342172545952501, 0.000098737071586129041541, -0.000019655910560487883288, -0.000010302478671350565378,
)  # fmt: skip
ERFCX_64 = (
    1.0740069070883397004, 0.88339445316988346134, 0.59022835710410233411, 0.31046726190058322251, 0.11952776128726767066,
    0.02682723462405141569, -0.0012124166268458320223, -0.0030340619960581382021, -0.00054830969437658363103,
    0.00027677781402214097085, 0.00010756149572800276909, -0.000030398051585726808394, -0.000017470579898367112443,
    4.7490282761035752121e-6, 2.7653934843589291637e-6, -9.988170142910974006e-7, -4.0795588546379700613e-7,
    2.3385368009140524357e-7, 4.6057900194248514798e-8, -5.1182421970120698126e-8, -9.8183566055919012943e-10,
    8.6937742690358282044e-9, -9.7831363878406509705e-10, -8.1106872961899929386e-10, 1.6421143016942985549e-10,
)  # fmt: skip


def polynomial(real: Any, coefficients: Sequence[float]) -> Any:
    """Return c_0 + c_1 x + c_2 x^2 + ..., by Horner's rule, one rounding per term."""
    nested = f"c{len(coefficients) - 1}"
    for k in range(len(coefficients) - 2, -1, -1):
        nested = f"fma(x, {nested}, c{k})"
    namespace: dict[str, Any] = {"fma": fma, **{f"c{k}": real(c) for k, c in enumerate(coefficients)}}
    exec(f"def polynomial(x):\n    return {nested}\n", namespace)
    return inlined(namespace["polynomial"])


@cache
def vector_math(dtype: np.dtype[Any]) -> Math:
    """Return the functions that definitions use on the CPU, for numbers of a dtype."""
    exp, expm1 = _define_exp(dtype)
    two, saturated = (
        dtype.type(2),
        dtype.type(9.5 if dtype == np.float32 else 19.5),
    )  # beyond it tanh is 1 to the last bit
    zero = dtype.type(0)

    def tanh(x):  # type: ignore[no-untyped-def]
        t = where(x < zero, -x, x)
        e = expm1(two * where(t > saturated, saturated, t))
        h = e / (e + two)
        return where(x < zero, -h, h)

    log, log1p = _define_log(dtype)
    sin, cos = _define_sin(dtype)
    erf, erfcx = _define_erf(dtype, exp)
    return Math(
        exp=exp, expm1=expm1, log=log, log1p=log1p, tanh=inlined(tanh), sin=sin, cos=cos, sqrt=math.sqrt, fabs=math.fabs,
        erf=erf, erfcx=erfcx, where=where, power=inlined(power), fma=fma,
    )  # fmt: skip


def _define_exp(dtype: np.dtype[Any]) -> tuple[Any, Any]:
    real, info, single = dtype.type, np.finfo(dtype), dtype == np.float32
    zero, half, one, two, infinity = (real(v) for v in (0, 0.5, 1, 2, np.inf))
    # adding 1.5 * 2^mantissa rounds to a whole number and leaves it in the low bits
    shifter, log2_e = real(1.5 * 2.0**info.nmant), real(LOG2_E)
    # ln 2 in two parts; the first has so few bits that n times it is exact
    bits = 2 ** (11 if single else 33)
    ln2_high = real(float(int(LN_2 * bits)) / bits)
    ln2_low = real(LN_2 - Decimal(float(ln2_high)))
    highest = real(int(info.maxexp) * LN_2)  # e^x is infinite above it
    lowest = real((int(info.minexp) - int(info.nmant) - 1) * LN_2)  # and 0 below it
    # below ``small`` 2^(n - 1) would be no normal number: it is made 2^64 times as large, and the result as much smaller
    small, lift, lowered = real(int(info.minexp) * LN_2 + 2), real(64), real(2.0**-63)
    least, tiny = real(-(info.nmant + 2)), real(info.tiny * 4)  # e^x - 1 is -1, or x, to the last bit
    quadratic = polynomial(real, [1 / math.factorial(k) for k in range(2, 9 if single else 14)])

    @inlined
    def remainder(x, n):  # type: ignore[no-untyped-def]
        return fma(n, -ln2_low, fma(n, -ln2_high, x))

    @inlined
    def series(r):  # type: ignore[no-untyped-def]
        return fma(r * r, quadratic(r), r)

    def exp(x):  # type: ignore[no-untyped-def]
        shifted = fma(x, log2_e, shifter)
        # 2^(n - 1), doubled at the end, since n may be one above the largest exponent
        scale = _half_power_of_two(shifted + where(x < small, lift, zero))
        result = fma(series(remainder(x, shifted - shifter)), scale, scale) * where(x < small, lowered, two)
        return where(x > highest, infinity, where(x < lowest, zero, result))

    def expm1(x):  # type: ignore[no-untyped-def]
        shifted = fma(x, log2_e, shifter)
        scale = _half_power_of_two(shifted)
        result = fma(series(remainder(x, shifted - shifter)), scale, scale - half) * two
        result = where(math.fabs(x) < tiny, x, result)  # which half of may not be a number
        return where(x > highest, infinity, where(x < least, -one, result))

    return inlined(exp), inlined(expm1)


def _define_log(dtype: np.dtype[Any]) -> tuple[Any, Any]:
    real, info, single = dtype.type, np.finfo(dtype), dtype == np.float32
    zero, one, two, infinity, nan = (real(v) for v in (0, 1, 2, np.inf, np.nan))
    tiny, lift, lifted = info.tiny, real(2.0 ** (info.nmant + 1)), real(info.nmant + 1)
    ln2 = real(LN_2)
    # s^2 <= 0.0295, so that the first omitted term is below the rounding
    R = polynomial(real, [2 / (2 * k + 3) for k in range(5 if single else 11)])

    @inlined
    def sum_of_parts(u, n, rest):  # type: ignore[no-untyped-def]
        """Return n ln 2 + log(mantissa of u) + rest."""
        f = _mantissa(u) - one
        s = f / (two + f)
        q = s * s
        return fma(n, ln2, fma(-s, fma(-q, R(q), f), f) + rest)

    @inlined
    def or_special(u, value):  # type: ignore[no-untyped-def]
        special = where(u == zero, -infinity, where(u == infinity, infinity, nan))
        return where(u > zero, where(u < infinity, value, special), special)

    def log(x):  # type: ignore[no-untyped-def]
        u = where(x < tiny, x * lift, x)  # a number below the smallest normal one has its exponent in its leading zeros
        n = _exponent(u) - where(x < tiny, lifted, zero)
        return or_special(x, sum_of_parts(u, n, zero))

    def log1p(x):  # type: ignore[no-untyped-def]
        u = one + x
        return or_special(u, sum_of_parts(u, _exponent(u), (x - (u - one)) / u))

    return inlined(log), inlined(log1p)


def _define_erf(dtype: np.dtype[Any], exp: Any) -> tuple[Any, Any]:
    real, single = dtype.type, dtype == np.float32
    zero, one, three, six, end = (real(v) for v in (0, 1, 3, 6, 6))
    taylor = polynomial(
        real, [TWO_OVER_ROOT_PI * (-1) ** n / (math.factorial(n) * (2 * n + 1)) for n in range(11 if single else 19)]
    )  # fmt: skip
    scaled = polynomial(real, ERFCX_32 if single else ERFCX_64)

    @inlined
    def erfcx(x):  # type: ignore[no-untyped-def]
        s = one / (x + three)
        return scaled(fma(six, s, -one)) * s

    def erf(x):  # type: ignore[no-untyped-def]
        t = where(x < zero, -x, x)
        t = where(t > end, end, t)
        above = fma(-exp(-t * t), erfcx(t), one)
        return where(t > one, where(x < zero, -above, above), x * taylor(x * x))

    return inlined(erf), erfcx


# the digits of 2/pi after the point, as far as the largest float64 needs them, after 32 zeros
_TWO_OVER_PI = (
    "00000000"
    "a2f9836e4e441529fc2757d1f534ddc0db6295993c439041fe5163abdebbc561b7246e3a424dd2e006492eea09d1921cfe1deb1cb129a73e"
    "e88235f52ebb4484e99c7026b45f7e413991d639835339f49c845f8bbdf9283b1ff897ffde05980fef2f118b5a0a6d1f6d367ecf27cb09b7"
    "4f463f669e5fea2d7527bac7ebe5f17b3d0739f78a5292ea6bfb5fb11f8d5d0856033046fc7b6bab"
)
_WORDS = np.array([int(_TWO_OVER_PI[k : k + 8], 16) for k in range(0, len(_TWO_OVER_PI), 8)], np.uint64)
_HALF_PI = (1.5707963267948966, 6.123233995736766e-17, -1.4973849048591698e-33)  # the sum of the three
_NEAR = 2.0**30  # up to which pi/2 in three parts is enough


@inlined
def _reduce_near(x):  # type: ignore[no-untyped-def]
    """Return n mod 4, r and rest: x = n pi/2 + (r + rest), |r| <= pi/4 but for its rounding, for 0 <= x < _NEAR."""
    first, second, third = _HALF_PI
    shifter = 1.5 * 2.0**52
    n = fma(x, 2.0 / PI, shifter) - shifter
    whole = fma(-n, first, x)  # exact: it has fewer digits than either
    product = n * second
    r = whole - product
    back = r - whole
    rest = (whole - (r - back)) - (product + back)
    return np.uint64(n) & np.uint64(3), r, rest - fma(n, third, fma(n, second, -product))


@inlined
def _reduce_far(x):  # type: ignore[no-untyped-def]
    """Return the same for a large x = mantissa 2^exponent, from x 2/pi mod 4 with 190 digits after the point."""
    low32, k32 = np.uint64(0xFFFFFFFF), np.uint64(32)
    word = _bits(x)
    exponent = np.int64(word >> np.uint64(52)) - 1075
    mantissa = (word & np.uint64(2**52 - 1)) | np.uint64(2**52)
    m_high, m_low = mantissa >> k32, mantissa & low32
    place = exponent + 30  # digits before this one of 2/pi give multiples of 4
    at, shift = place // 32, np.uint64(place % 32)
    carry = before = a = b = c = np.uint64(0)  # a, b and c: 192 digits of the product
    for k in range(5, -1, -1):
        digits = ((_WORDS[at + k] << k32 | _WORDS[at + k + 1]) >> (k32 - shift)) & low32
        p, q = m_low * digits, m_high * before
        total = (p & low32) + (q & low32) + carry
        carry = (total >> k32) + (p >> k32) + (q >> k32)
        c = c >> k32 | b << k32
        b = b >> k32 | a << k32
        a = a >> k32 | total << k32
        before = digits
    n = (a + np.uint64(2**61)) >> np.uint64(62)
    a = a - (n << np.uint64(62))
    sign, scale = 1.0, 2.0**-30
    if a >> np.uint64(63):
        a, b, c, sign = ~a, ~b, ~c, -1.0
    high = low = 0.0
    for _ in range(6):
        part = np.float64(a >> k32) * scale
        total_of_parts = high + part
        low += part - (total_of_parts - high)
        high, scale = total_of_parts, scale * 2.0**-32
        a = a << k32 | b >> k32
        b = b << k32 | c >> k32
        c = c << k32
    first, second, _ = _HALF_PI
    high, low = sign * high, sign * low
    r = high * first
    return n & np.uint64(3), r, fma(high, first, -r) + fma(high, second, low * first)


def _define_sin(dtype: np.dtype[Any]) -> tuple[Any, Any]:
    """Return sin and cos, computed in float64 for either dtype."""
    real = dtype.type
    odd = polynomial(np.float64, [(-1) ** k / math.factorial(2 * k + 1) for k in range(1, 9)])
    even = polynomial(np.float64, [(-1) ** k / math.factorial(2 * k) for k in range(2, 9)])

    @inlined
    def of_quadrant(x, turned):  # type: ignore[no-untyped-def]
        """Return sin(x + turned pi/2), x >= 0."""
        if not x < np.inf:
            return np.nan
        n, r, rest = _reduce_near(x) if x < _NEAR else _reduce_far(x)
        n, q = n + turned, r * r
        if n & np.uint64(1):
            whole = 1.0 - 0.5 * q
            value = whole + (((1.0 - whole) - 0.5 * q) + fma(q * q, even(q), -r * rest))
        else:
            value = r + fma(r * q, odd(q), fma(-0.5 * q, rest, rest))
        return -value if n & np.uint64(2) else value

    def sin(x):  # type: ignore[no-untyped-def]
        value = of_quadrant(math.fabs(np.float64(x)), np.uint64(0))
        return real(-value if x < 0 else value)

    def cos(x):  # type: ignore[no-untyped-def]
        return real(of_quadrant(math.fabs(np.float64(x)), np.uint64(1)))

    return inlined(sin), inlined(cos)
