"""The functions of the CPU kernels: within 2.5 units in the last place, right at the limits, the same bits on every machine."""

import hashlib
import math
from fractions import Fraction
from functools import cache

import numba
import numpy as np
import pytest

from gpubackprop.definitions import NUMPY
from gpubackprop.kernels.cpu.compile import _OPTIONS
from gpubackprop.kernels.cpu.math import vector_math

# of the functions' bits on a fixed set of numbers; they change where a definition does, and never with the machine
DIGESTS = {np.float32: "ad845b2534b046c2", np.float64: "fe490eb9e393ec80"}


@cache
def loop_of(name, dtype):
    function = getattr(vector_math(dtype), name)

    def loop(x, y):
        for i in range(x.size):
            y[i] = function(x[i])

    return numba.njit(**_OPTIONS)(loop)


def apply(name, x):
    y = np.empty_like(x)
    loop_of(name, x.dtype)(x, y)
    return y


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["exp", "expm1", "tanh"])
def test_functions_are_right_to_a_few_units_in_the_last_place(name, dtype):
    # the exponent's reduction, 8 or 13 terms and the final products round about 4 times; tanh adds a sum and a quotient
    rng = np.random.default_rng(0)
    info = np.finfo(dtype)
    end = np.log(info.max)
    parts = [
        np.linspace(-end - 20, end + 20, 40_001),
        np.linspace(-1, 1, 20_001),
        2.0 ** -np.arange(150 if dtype == np.float32 else 1075),
        rng.normal(size=5000),
    ]
    x = np.concatenate([*parts, -parts[2]]).astype(dtype)
    y = apply(name, x)
    with np.errstate(over="ignore", under="ignore"):
        exact = getattr(np, name)(x.astype(np.longdouble))
        rounded = exact.astype(dtype)
        error = np.abs(y.astype(np.longdouble) - exact) / np.spacing(np.abs(rounded)).astype(np.longdouble)
    assert error[np.isfinite(rounded)].max() < 2.5  # also of results below the smallest normal number
    np.testing.assert_array_equal(np.isinf(y), np.isinf(rounded))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_limits_and_nan(dtype):
    x = np.array([np.nan, np.inf, -np.inf, 0.0], dtype)
    np.testing.assert_array_equal(apply("exp", x), np.array([np.nan, np.inf, 0, 1], dtype))
    np.testing.assert_array_equal(apply("expm1", x), np.array([np.nan, np.inf, -1, 0], dtype))
    np.testing.assert_array_equal(apply("tanh", x), np.array([np.nan, 1, -1, 0], dtype))
    np.testing.assert_array_equal(apply("log1p", x), np.array([np.nan, np.inf, np.nan, 0], dtype))
    np.testing.assert_array_equal(apply("log1p", np.array([-1, -1.5], dtype)), np.array([-np.inf, np.nan], dtype))
    np.testing.assert_array_equal(apply("erf", x), np.array([np.nan, 1, -1, 0], dtype))
    np.testing.assert_array_equal(apply("log", x), np.array([np.nan, np.inf, np.nan, -np.inf], dtype))
    np.testing.assert_array_equal(apply("log", np.array([-1e-40, 1], dtype)), np.array([np.nan, 0], dtype))
    np.testing.assert_array_equal(apply("sin", x), np.array([np.nan, np.nan, np.nan, 0], dtype))
    np.testing.assert_array_equal(apply("cos", x), np.array([np.nan, np.nan, np.nan, 1], dtype))


def errors(name, x, exact):
    """Return the errors in units in the last place."""
    return np.abs(apply(name, x).astype(np.longdouble) - exact) / np.spacing(np.abs(exact.astype(x.dtype)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_log1p(dtype):
    # the sum of n ln 2, log(1 + f) and the correction: two roundings, and those of its terms, which are smaller
    parts = [
        np.linspace(-0.999, 3, 40_001),
        np.linspace(-1e-3, 1e-3, 20_001),
        10.0 ** np.arange(-37, 38),
        np.linspace(0, 1, 9999),
    ]
    x = np.concatenate(parts).astype(dtype)
    assert errors("log1p", x, np.log1p(x.astype(np.longdouble))).max() < 2.5


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_erf(dtype):
    # Horner's rule on an alternating series whose terms are at most 1.13, or one minus at most 0.16
    x = np.concatenate([np.linspace(-7, 7, 4001), np.linspace(-1.1, 1.1, 2001), 10.0 ** -np.arange(30)]).astype(dtype)
    exact = np.array(
        [math.erf(v) for v in x.tolist()], np.longdouble
    )  # itself right to a unit in the last place of a float64
    assert errors("erf", x, exact).max() < (2.5 if dtype == np.float32 else 3.5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_erfcx(dtype):
    # a polynomial whose argument, rounded, moves it by up to twice as much, a quotient and their product; and SciPy's own error,
    # which is up to 9 units in the last place of a float64
    end = float(np.finfo(dtype).max) / 2
    x = np.concatenate([np.linspace(0, 30, 9001), [1e-300, 1e10, end], 10.0 ** -np.arange(30)]).astype(dtype)
    exact = NUMPY.erfcx(x.astype(np.float64)).astype(np.longdouble)
    assert errors("erfcx", x, exact).max() < (5 if dtype == np.float32 else 14)
    np.testing.assert_array_equal(apply("erfcx", np.array([np.nan, np.inf], dtype)), np.array([np.nan, 0], dtype))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_log(dtype):
    info = np.finfo(dtype)
    rng = np.random.default_rng(0)
    parts = [
        np.linspace(1e-3, 3, 40_001),
        1 + np.linspace(-1e-3, 1e-3, 2001),
        2.0 ** rng.uniform(info.minexp - 20, info.maxexp, 9999),
    ]
    x = np.concatenate(parts).astype(dtype)
    assert errors("log", x, np.log(x.astype(np.longdouble))).max() < 2.5


# sin and cos by mpmath with 400 digits: near to multiples of pi/2, and where n pi/2 needs all digits of 2/pi
LARGE = {
    6381956970095103.0 * 2.0**797: (1.0, -4.687165924254628e-19),
    1e300: (-0.8178819121159085, -0.5753861119575491),
    2.0**30: (-0.6173264150460421, 0.7867071229411882),
    1e10: (-0.4875060250875107, 0.873119622676856),
    2.0**100: (-0.8721836054182673, 0.48917865697472146),
}


def test_sin_and_cos():
    x = np.concatenate([np.linspace(-30, 30, 20_001), 10.0 ** np.arange(-30, 10)])
    for name in ("sin", "cos"):
        exact = getattr(np, name)(x)  # itself right to less than a unit
        assert (abs(apply(name, x) - exact) <= 2 * np.spacing(abs(exact))).all()
        y = x.astype(np.float32)
        exact = getattr(np, name)(y.astype(np.float64))
        assert (abs(apply(name, y) - exact) <= 0.51 * np.spacing(abs(exact.astype(np.float32)))).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_sin_and_cos_of_large_numbers(sign):
    x = np.array(list(LARGE))
    expected = np.array(list(LARGE.values()))
    np.testing.assert_allclose(apply("sin", sign * x), sign * expected[:, 0], rtol=3e-16)
    np.testing.assert_allclose(apply("cos", sign * x), expected[:, 1], rtol=3e-16)


def test_a_power_is_one_of_products_alone():
    compiled = vector_math(np.dtype(np.float64)).power
    power = numba.njit(**_OPTIONS)(lambda x, n: compiled(x, n))
    for x in (0.9, 0.999, 1.0, 0.0, 0.5):
        for n in (0, 1, 2, 3, 10, 1000, 12345):
            exact = float(Fraction(x) ** n) if n < 2000 else x**n
            assert power(x, float(n)) == NUMPY.power(x, float(n)) == pytest.approx(exact, rel=n * 2.0**-52, abs=1e-300)


def digest(dtype):
    """Return a digest of all functions' bits, one NaN for all."""
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(-100, 100, 5000), rng.uniform(-3, 3, 5000), 2.0 ** rng.integers(-149, 128, 500)])
    x = np.concatenate([x, -x, [np.nan, np.inf, 0.0]]).astype(dtype)
    result = hashlib.sha256()
    for name in ("exp", "expm1", "log", "log1p", "tanh", "sin", "cos", "sqrt", "fabs", "erf", "erfcx"):
        y = apply(name, x)
        result.update(np.where(np.isnan(y), dtype(7), y).tobytes())
    return result.hexdigest()[:16]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bits_are_those_of_every_other_machine(dtype):
    assert digest(dtype) == DIGESTS[dtype]


@pytest.mark.parametrize("real", [np.float32, np.float64])
def test_fma_rounds_once(real):
    function, eps = vector_math(np.dtype(real)).fma, np.finfo(real).eps
    fma = numba.njit(**_OPTIONS)(lambda x, y, z: function(x, y, z))
    x = real(1) + eps
    z = -(x + eps)  # x x is 1 + 2 eps + eps^2, and rounded -z
    assert fma(x, x, z) == eps * eps
    assert NUMPY.fma(x, x, z) == 0
