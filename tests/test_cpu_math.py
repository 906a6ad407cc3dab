"""exp, expm1, log1p, tanh and erf of the CPU kernels: within 2.5 units in the last place, and right at the limits."""

import math

import numba
import numpy as np
import pytest

from gpubackprop.kernels.cpu_compile import _OPTIONS
from gpubackprop.kernels.cpu_math import vector_math


def apply(name, x):
    function = getattr(vector_math(x.dtype), name)

    def loop(x, y):
        for i in range(x.size):
            y[i] = function(x[i])

    y = np.empty_like(x)
    numba.njit(**_OPTIONS)(loop)(x, y)
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
        10.0 ** -np.arange(30),
        rng.normal(size=5000),
    ]
    x = np.concatenate([*parts, -parts[2]]).astype(dtype)
    y = apply(name, x)
    with np.errstate(over="ignore", under="ignore"):
        exact = getattr(np, name)(x.astype(np.longdouble))
        rounded = exact.astype(dtype)
        error = np.abs(y.astype(np.longdouble) - exact) / np.spacing(np.abs(rounded)).astype(np.longdouble)
    normal = np.isfinite(rounded) & (np.abs(exact) > 8 * info.tiny)
    assert error[normal].max() < 2.5
    np.testing.assert_array_equal(np.isinf(y), np.isinf(rounded))
    assert (y[np.abs(exact) < info.tiny / 2] < info.tiny).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_limits_and_nan(dtype):
    x = np.array([np.nan, np.inf, -np.inf, 0.0], dtype)
    np.testing.assert_array_equal(apply("exp", x), np.array([np.nan, np.inf, 0, 1], dtype))
    np.testing.assert_array_equal(apply("expm1", x), np.array([np.nan, np.inf, -1, 0], dtype))
    np.testing.assert_array_equal(apply("tanh", x), np.array([np.nan, 1, -1, 0], dtype))
    np.testing.assert_array_equal(apply("log1p", x), np.array([np.nan, np.inf, np.nan, 0], dtype))
    np.testing.assert_array_equal(apply("log1p", np.array([-1, -1.5], dtype)), np.array([-np.inf, np.nan], dtype))
    np.testing.assert_array_equal(apply("erf", x), np.array([np.nan, 1, -1, 0], dtype))


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
