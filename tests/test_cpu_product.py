"""Products on the CPU: every way, shape and order of memory; and the choice between the ways."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpubackprop.kernels.cpu_blas import FEW, TILES, Chooser, compile_blas, libraries, one_thread_each
from gpubackprop.kernels.cpu_product import BREADTH, DEPTH, HEIGHT, WIDE, WIDE_TRANSPOSED, compile_product, scratch_for
from gpubackprop.kernels.cpu_step import Program

WAYS = [None, *libraries()]


def multiply(library, a, b, at, bt, shares=1):
    """Return a b from operands that lie in memory as at and bt say; nothing is written beyond the memory for copies."""
    kernel = compile_product(a.dtype) if library is None else compile_blas(library, a.dtype)
    a, b = np.ascontiguousarray(a.T if at else a), np.ascontiguousarray(b.T if bt else b)
    out = np.full((a.shape[1] if at else a.shape[0], b.shape[0] if bt else b.shape[1]), np.nan, a.dtype)
    scratch = scratch_for(a.dtype, shares + 1)
    scratch[-1] = 7
    program = Program([(kernel, (a, b, out, int(at), int(bt), scratch[:-1]))])
    for number in range(shares):
        program.run_share(number, shares)
    assert (scratch[-1] == 7).all()
    return out


def operands(m, n, k, dtype, seed=0):
    """Return matrices of whole numbers, whose product is exact in any order of summation."""
    rng = np.random.default_rng(seed)
    return rng.integers(-3, 4, (m, k)).astype(dtype), rng.integers(-3, 4, (k, n)).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("library", WAYS, ids=lambda library: library.name if library else TILES)
def test_every_way_multiplies_every_order_of_memory(library, dtype):
    for m, n, k in ((1, 1, 1), (5, 3, 7), (33, 17, 20)):
        a, b = operands(m, n, k, dtype)
        for at in (False, True):
            for bt in (False, True):
                np.testing.assert_array_equal(multiply(library, a, b, at, bt), a @ b)


@settings(deadline=None, max_examples=150)
@given(
    st.integers(1, 2 * HEIGHT + 9), st.integers(1, WIDE + 40), st.integers(1, 2 * DEPTH + 9), st.booleans(), st.booleans(),
    st.integers(1, 4), st.sampled_from([np.float32, np.float64]),
)  # fmt: skip
def test_tiles_multiply_every_shape_in_any_number_of_shares(m, n, k, at, bt, shares, dtype):
    a, b = operands(m, n, k, dtype, m * n * k)
    np.testing.assert_array_equal(multiply(None, a, b, at, bt, shares), a @ b)


@pytest.mark.parametrize(("m", "n", "k"), [(HEIGHT + 1, BREADTH + 17, DEPTH + 1), (3, 2 * BREADTH + 1, 5)])
def test_tiles_multiply_what_is_wider_than_a_copy(m, n, k):
    a, b = operands(m, n, k, np.float32)
    for at in (False, True):
        for bt in (False, True):
            np.testing.assert_array_equal(multiply(None, a, b, at, bt), a @ b)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 200), st.integers(1, 260), st.integers(1, 700), st.booleans(), st.booleans(), st.integers(2, 5))
def test_shares_have_the_bits_of_the_whole(m, n, k, at, bt, shares):
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((m, k), (k, n)))
    whole = multiply(None, a, b, at, bt)
    np.testing.assert_array_equal(multiply(None, a, b, at, bt, shares), whole)
    # a sum of k terms in any order: k eps of the sum of the absolute terms (Higham (2002), section 3.1)
    bound = k * np.finfo(np.float32).eps * (abs(a).astype(np.float64) @ abs(b).astype(np.float64))
    assert (abs(whole - a.astype(np.float64) @ b.astype(np.float64)) <= bound).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("m", range(HEIGHT - 7, 2 * HEIGHT + 8, 5))
def test_copies_of_any_number_of_rows_stay_within_their_memory(m, dtype):
    for n, at in ((WIDE, False), (WIDE_TRANSPOSED, True)):
        a, b = operands(m, n, DEPTH, dtype)
        np.testing.assert_array_equal(multiply(None, a, b, at, False), a @ b)


def test_nan_and_infinity_go_through():
    a, b = operands(7, 18, 5, np.float32)
    a[2, 3], a[5, 1] = np.nan, np.inf
    b[1] = 1
    out = multiply(None, a, b, False, False)
    assert np.isnan(out[2]).all()
    assert np.isinf(out[5]).all()
    assert np.isfinite(out[[0, 1, 3, 4, 6]]).all()


def test_the_choice_is_kept_on_disk_and_a_broken_file_only_costs_a_measurement(tmp_path, monkeypatch):
    monkeypatch.setenv("GPUBACKPROP_CACHE_DIR", str(tmp_path))
    a, b, out = np.ones((FEW, 60), np.float32), np.ones((60, 50), np.float32), np.empty((FEW, 50), np.float32)
    first = Chooser()
    first.call(a, b, out, scratch_for(a.dtype, 1))
    (file,) = tmp_path.glob("cpu-products-*.json")
    assert json.loads(file.read_text()) == first.chosen
    assert Chooser().chosen == first.chosen
    file.write_text('{"384x50x60 float32 00": "a library that is gone"}')
    assert Chooser().chosen == {}
    file.write_text("{")
    Chooser().call(a, b, out, scratch_for(a.dtype, 1))
    assert json.loads(file.read_text())


def test_libraries_keep_to_one_thread_while_ours_share_and_get_their_threads_back():
    from threadpoolctl import threadpool_info

    def threads():
        return [entry["num_threads"] for entry in threadpool_info() if entry["user_api"] == "blas"]

    before = threads()
    with one_thread_each:
        with one_thread_each:
            assert set(threads()) == {1}
        assert set(threads()) == {1}  # the last one out gives them back
    assert threads() == before


def test_products_of_few_rows_are_not_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("GPUBACKPROP_CACHE_DIR", str(tmp_path))
    a, b, out = np.ones((4, 6), np.float32), np.ones((6, 5), np.float32), np.empty((4, 5), np.float32)
    kernel, _ = Chooser().call(a, b, out, scratch_for(a.dtype, 1))
    assert kernel is compile_product(a.dtype)
    assert not list(tmp_path.glob("*.json"))
