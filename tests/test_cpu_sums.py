"""Sums of the CPU kernels: in orders that are defined, with hardly a digit lost, and without overflow."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.activations import ACTIVATIONS
from gpubackprop.kernels.cpu import passes as cpu
from gpubackprop.kernels.cpu.vector import LANES, define_sum
from gpubackprop.losses import LOSSES
from gpubackprop.step.state import FACTOR, NORM

BOTH = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def in_lanes(x: Any, scale: float | None = None) -> float:
    """Return what define_sum's docstring says, in plain NumPy; x so short of digits that x + scale x^2 is exact in float64."""
    x = np.concatenate([x.astype(np.float64), np.zeros(-len(x) % LANES)])
    lanes = np.zeros(LANES)
    for row in (x if scale is None else (x * scale) ** 2).reshape(-1, LANES):
        lanes = lanes + row
    while len(lanes) > 1:
        lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
    return float(lanes[0])


@BOTH
def test_the_order_of_a_sum_in_lanes_is_the_one_defined(dtype: Any) -> None:
    plain, squares = (define_sum(np.dtype(dtype), squares) for squares in (False, True))
    plain_of = numba.njit(lambda x: plain(x.ctypes.data, x.size, 1.0))
    squares_of = numba.njit(lambda x, scale: squares(x.ctypes.data, x.size, scale))
    rng = np.random.default_rng(0)
    for n in (0, 1, LANES - 1, LANES, LANES + 1, 1000):
        x = (rng.integers(-(2**20), 2**20, n) * 2.0 ** rng.integers(-20, 20, n)).astype(dtype)
        assert plain_of(x) == in_lanes(x)
        assert squares_of(x, 0.5) == in_lanes(x, 0.5)


@pytest.mark.parametrize("n", [1, cpu.ROWS, cpu.ROWS + 1, 7 * cpu.ROWS - 3])
def test_the_order_of_a_column_sum_is_the_one_defined(n: int) -> None:
    rng = np.random.default_rng(n)
    dh, h = rng.standard_normal((n, 5)).astype(np.float32), np.ones((n, 5), np.float32)
    sums = []
    for first in range(0, n, cpu.ROWS):
        total = np.zeros(5, np.float32)
        for row in dh[first : first + cpu.ROWS]:
            total = total + row
        sums.append(total)
    while len(sums) > 1:
        sums = [sum(sums[k : k + 2][1:], sums[k]) for k in range(0, len(sums), 2)]
    for shares in (1, 2, 3):
        kernel = cpu.compile_bias_activation_backward(ACTIVATIONS["identity"], np.dtype(np.float32), False)
        out, db = np.empty_like(dh), np.empty(5, np.float32)
        memory = np.empty((cpu.shares_of(n), 5), np.float32), np.zeros(1, np.int64)
        entry, _, block = kernel.bind((dh, h, out, db, *memory))
        for number in range(shares):
            entry(block.ctypes.data, number, shares)
        np.testing.assert_array_equal(db.view(np.int32), sums[0].view(np.int32))


def test_sums_over_millions_of_rows_lose_hardly_a_digit() -> None:
    n = 1_000_000
    model = gb.MLP([1, 3, 1], loss="mean_squared_error", device="cpu")
    model.parameters.flat[:] = 0
    for W in model.parameters.W:
        W[...] = 1
    loss, gradients = model.loss_and_gradients(np.full((n, 1), 0.1, np.float32), np.zeros(n, np.float32))
    x = float(np.float32(0.1))
    # the output is 3 x, up to two roundings; ROWS equal numbers in order lose at most half a unit each
    assert loss == pytest.approx(9 * x * x, rel=4e-7)
    assert gradients.b[0] == pytest.approx(np.full(3, 6 * x), rel=1e-6)
    assert gradients.b[1] == pytest.approx(6 * x, rel=1e-6)
    assert gradients.W[0] == pytest.approx(np.full((1, 3), 6 * x * x), rel=2e-5)  # KC products in order


def test_the_loss_of_many_classes_is_as_exact_as_of_few() -> None:
    n, classes = 3, 200_000
    o, b = np.zeros((n, classes), np.float32), np.zeros(classes, np.float32)
    value, do, _ = gb.get_backend("cpu").bias_loss(o, b, np.arange(n), LOSSES["softmax_cross_entropy"])
    assert value[0] == pytest.approx(np.log(classes), rel=1e-6)
    assert do[0, 1] == pytest.approx(1 / classes / n, rel=1e-6)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(np.float32, 1e20), (np.float32, 1e37), (np.float64, 1e200), (np.float64, 1e308), (np.float64, 1e-200)],
)
def test_a_finite_gradient_is_clipped_however_large(dtype: Any, size: float) -> None:
    g, scalars = np.full(40, size, dtype), np.zeros(8, dtype)
    g[::2] = 0
    g[1] *= -1
    gb.get_backend("cpu").clip(g, 2.0, scalars)
    norm = size * 20**0.5
    factor = min(1.0, 2.0 / (norm + 1e-6)) if norm < 1e300 else 2.0 / size / 20**0.5
    assert scalars[FACTOR] == pytest.approx(factor, rel=4 * float(np.finfo(dtype).eps))
    if norm < np.finfo(dtype).max and norm > 1e-100:
        assert scalars[NORM] == pytest.approx(norm, rel=4 * float(np.finfo(dtype).eps))


@BOTH
def test_what_is_not_finite_stays_so(dtype: Any) -> None:
    for value in (np.inf, -np.inf, np.nan):
        g, scalars = np.array([1, value, 3], dtype), np.zeros(8, dtype)
        gb.get_backend("cpu").clip(g, 1.0, scalars)
        assert np.isnan(scalars[FACTOR]) if np.isnan(value) else scalars[FACTOR] == 0  # and 0 times infinity is NaN


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_a_weight_gradient_over_millions_of_rows_is_as_exact_as_over_thousands(device: str) -> None:
    n = 2_000_000
    model = gb.MLP([1, 1], loss="mean_absolute_error", device=device)
    model.parameters.W[0][...] = 1
    _, gradients = model.loss_and_gradients(np.full((n, 1), 0.1, np.float32), np.zeros(n, np.float32))
    # the mean of x sign(x): 320 or 4096 terms of 1 / n at most are added without a digit more
    assert gradients.W[0][0, 0] == pytest.approx(float(np.float32(0.1)), rel=3e-5)
