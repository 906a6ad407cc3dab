"""Products on the CPU: every shape and order of memory, and the order of their sums."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpubackprop.kernels.cpu.gemm import (
    KC,
    MC,
    NC,
    PARTS,
    WIDE,
    WIDE_TRANSPOSED,
    compile_product,
    scratch_for,
    total_for,
)


def multiply(a, b, at, bt, shares=1):
    """Return a b from operands that lie in memory as at and bt say; nothing is written beyond it and the memory to pack in."""
    total = total_for(np.empty((a.shape[0], b.shape[1])), a.shape[1])
    a, b = np.ascontiguousarray(a.T if at else a), np.ascontiguousarray(b.T if bt else b)
    m, n = a.shape[1] if at else a.shape[0], b.shape[0] if bt else b.shape[1]
    memory = np.full(m * n + 64, np.nan, a.dtype)
    memory[m * n :] = 7
    out = memory[: m * n].reshape(m, n)
    scratch = scratch_for(a.dtype, 2)
    scratch.arrays[1] = 7
    entry, _, block = compile_product(a.dtype).bind((a, b, out, int(at), int(bt), scratch, total))
    for number in range(shares):
        entry(block.ctypes.data, number, shares)
    assert (scratch.arrays[1] == 7).all()
    assert (memory[m * n :] == 7).all()
    return out


def operands(m, n, k, dtype, seed=0):
    """Return matrices of whole numbers, whose product is exact in any order of summation."""
    rng = np.random.default_rng(seed)
    return rng.integers(-3, 4, (m, k)).astype(dtype), rng.integers(-3, 4, (k, n)).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_order_of_memory(dtype):
    for m, n, k in ((1, 1, 1), (5, 3, 7), (33, 17, 20)):
        a, b = operands(m, n, k, dtype)
        for at in (False, True):
            for bt in (False, True):
                np.testing.assert_array_equal(multiply(a, b, at, bt), a @ b)


@settings(deadline=None, max_examples=150)
@given(
    st.integers(1, 2 * MC + 9), st.integers(1, WIDE + 40), st.integers(1, 2 * KC + 9), st.booleans(), st.booleans(),
    st.integers(1, 4), st.sampled_from([np.float32, np.float64]),
)  # fmt: skip
def test_every_shape_in_any_number_of_shares(m, n, k, at, bt, shares, dtype):
    a, b = operands(m, n, k, dtype, m * n * k)
    np.testing.assert_array_equal(multiply(a, b, at, bt, shares), a @ b)


@pytest.mark.parametrize(("m", "n", "k"), [(MC + 1, NC + 17, KC + 1), (3, 2 * NC + 1, 5)])
def test_what_is_wider_than_a_packed_block(m, n, k):
    a, b = operands(m, n, k, np.float32)
    for at in (False, True):
        for bt in (False, True):
            np.testing.assert_array_equal(multiply(a, b, at, bt), a @ b)


@settings(deadline=None, max_examples=100)
@given(
    st.integers(1, 70), st.integers(1, 33), st.integers(1, 2 * KC + 9), st.booleans(), st.booleans(), st.integers(1, 4),
    st.sampled_from([np.float32, np.float64]),
)  # fmt: skip
def test_narrow_results_in_any_number_of_pieces(m, n, k, at, bt, shares, dtype):
    a, b = operands(m, n, k, dtype, m * n * k)
    np.testing.assert_array_equal(multiply(a, b, at, bt, shares), a @ b)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 200), st.integers(1, 260), st.integers(1, 700), st.booleans(), st.booleans(), st.integers(2, 5))
def test_shares_have_the_bits_of_the_whole(m, n, k, at, bt, shares):
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((m, k), (k, n)))
    whole = multiply(a, b, at, bt)
    np.testing.assert_array_equal(multiply(a, b, at, bt, shares), whole)
    # a sum of k terms in any order: k eps of the sum of the absolute terms (Higham (2002), section 3.1)
    bound = k * np.finfo(np.float32).eps * (abs(a).astype(np.float64) @ abs(b).astype(np.float64))
    assert (abs(whole - a.astype(np.float64) @ b.astype(np.float64)) <= bound).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("m", range(MC - 7, 2 * MC + 8, 5))
def test_packing_of_any_number_of_rows_stays_within_its_memory(m, dtype):
    for n, at in ((WIDE, False), (WIDE_TRANSPOSED, True)):
        a, b = operands(m, n, KC, dtype)
        np.testing.assert_array_equal(multiply(a, b, at, False), a @ b)


def test_nan_and_infinity_go_through():
    a, b = operands(7, 18, 5, np.float32)
    a[2, 3], a[5, 1] = np.nan, np.inf
    b[1] = 1
    out = multiply(a, b, False, False)
    assert np.isnan(out[2]).all()
    assert np.isinf(out[5]).all()
    assert np.isfinite(out[[0, 1, 3, 4, 6]]).all()


def by_definition(a, b):
    """Return a b, summed as the docstring of gemm.py defines; a and b have so few digits that float64 sums are exact."""
    k, total = a.shape[1], None
    parts = -(-k // KC)
    for group in range(0, parts, PARTS):
        sum_of_group = None
        for part in range(group, min(group + PARTS, parts)):
            s = np.zeros((len(a), b.shape[1]), a.dtype)
            for p in range(part * k // parts, (part + 1) * k // parts):
                s = (a[:, p, None].astype(np.float64) * b[p] + s).astype(a.dtype)  # one rounding
            sum_of_group = s if sum_of_group is None else sum_of_group + s
        total = sum_of_group.astype(np.float64) if total is None else total + sum_of_group
    return total.astype(a.dtype)


@pytest.mark.parametrize("k", [1, 31, KC, KC + 1, 3 * KC - 5, KC * PARTS + 1, 3 * KC * PARTS + 77])
def test_the_order_of_a_sum_is_the_one_defined(k):
    rng = np.random.default_rng(k)
    a = (rng.integers(-(2**20), 2**20, (9, k)) / 2**18).astype(np.float32)
    b = (rng.integers(-(2**12), 2**12, (k, 37)) / 2**10).astype(np.float32)
    a[:, ::7], expected = -0.0, None
    expected = by_definition(a, b)
    assert abs(a).max() * abs(b).max() * k < 2**53 / 2**28  # whole multiples of 2^-28 that float64 holds
    for at in (False, True):
        for bt in (False, True):
            for shares in (1, 3):
                out = multiply(a, b, at, bt, shares)
                np.testing.assert_array_equal(out.view(np.int32), expected.view(np.int32))


def test_a_sum_over_millions_of_rows_is_as_exact_as_one_over_hundreds():
    n = 1_500_000
    a, b = np.full((1, n), 0.1, np.float32), np.full((n, 3), 0.3, np.float32)
    exact = n * float(a[0, 0]) * float(b[0, 0])
    assert abs(multiply(a, b, False, False) / exact - 1).max() < KC * 2.0**-24
