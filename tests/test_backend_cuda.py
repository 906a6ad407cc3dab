"""The CUDA backend: each case of the table of operations against the reference, sums, streams and traffic; needs a device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from operation_checks import check
from tolerances import assert_within, eps, sum_tolerance

import gpubackprop as gb
from gpubackprop.activations import ACTIVATIONS
from gpubackprop.backends import get_backend
from gpubackprop.backends.cases import CASES, REFERENCE, OpCase
from gpubackprop.definitions import check_dtype, eps_of
from gpubackprop.losses import LOSSES
from gpubackprop.step.state import GOOD, GROW_AFTER, SCALE, SKIP

try:
    import ledger  # counts launches and bytes where the device is simulated; absent elsewhere
except ImportError:
    ledger = None

pytestmark = pytest.mark.gpu
counted = pytest.mark.skipif(ledger is None or not ledger.available(), reason="no counts on this device")


@pytest.fixture(scope="module")
def cuda() -> Any:
    return get_backend("cuda")


def close(actual: Any, expected: np.ndarray, cuda: Any, extra: Any = 0.0) -> None:
    """Assert equality within 16 eps of the largest element, plus ``extra``."""
    finite = np.abs(expected[np.isfinite(expected)].astype(np.float64))
    scale = max(float(finite.max(initial=0.0)), 1e-30)
    assert_within(cuda.to_numpy(actual), expected, 16 * eps_of(expected.dtype) * scale + extra)


def normal(rng: np.random.Generator, shape: Any, dtype: Any) -> np.ndarray:
    return (2 * rng.standard_normal(shape)).astype(check_dtype(dtype))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [pytest.param(case, dtype, id=f"{case}-{dtype}") for case in CASES.values() for dtype in case.dtypes],
)
def test_operations_are_those_of_the_reference(case: OpCase, dtype: str, cuda: Any, rng: Any) -> None:
    for shape in case.shapes:
        check(case, cuda, shape, dtype, rng)


def test_sums_over_many_rows_keep_their_digits(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal terms round to the same side again and again: a device of one block stands for millions of rows.

    No thread adds up more than 32 terms in a row, each to half a unit of the sum so far: 2^-20 if all of them erred to one side.
    """
    monkeypatch.setattr(cuda._launches, "blocks", 1)
    n, d, tenth = 10_000, 10, float(np.float32(0.1))
    tenths, bias = cuda.asarray(np.full((n, d), tenth, np.float32)), cuda.asarray(np.zeros(d, np.float32))
    _, db = cuda.bias_activation_backward(tenths.copy(), None, tenths, ACTIVATIONS["relu"])
    np.testing.assert_allclose(cuda.to_numpy(db), n * tenth, rtol=2**-20)

    o = cuda.asarray(np.zeros((n, d), np.float32))
    value, _, db = cuda.bias_loss(o, bias, tenths, LOSSES["mean_squared_error"](reduction="sum"))
    np.testing.assert_allclose(float(value[0]), n * d * tenth**2, rtol=2**-20)
    np.testing.assert_allclose(cuda.to_numpy(db), -2 * n * tenth, rtol=2**-20)

    for d in (10, 160):  # a kernel of tiles, and one of rows
        row = np.linspace(0, 0.3, d, dtype=np.float32)
        o, y = cuda.asarray(np.tile(row, (n, 1))), cuda.asarray(np.zeros(n, np.int64))
        bias = cuda.asarray(np.zeros(d, np.float32))
        value, do, db = cuda.bias_loss(o, bias, y, LOSSES["softmax_cross_entropy"](reduction="sum"))
        wide = row.astype(np.float64)
        np.testing.assert_allclose(float(value[0]), n * (np.log(np.exp(wide).sum()) - wide[0]), rtol=2**-20)
        np.testing.assert_allclose(cuda.to_numpy(db), n * cuda.to_numpy(do)[0].astype(np.float64), rtol=2**-20)


@pytest.mark.parametrize("columns", [3, 40, 300])
def test_a_nan_output_makes_the_loss_and_its_own_row_nan(columns: int, cuda: Any, rng: Any) -> None:
    z = normal(rng, (5, columns), "float32")
    z[2, 1] = np.nan
    y = cuda.asarray(rng.integers(0, columns, 5))
    value, do, _ = cuda.bias_loss(cuda.asarray(z), cuda.zeros((columns,), "f4"), y, LOSSES["softmax_cross_entropy"])
    assert np.isnan(cuda.to_numpy(value)).all()
    np.testing.assert_array_equal(np.isnan(cuda.to_numpy(do)).any(axis=1), [False, False, True, False, False])


@pytest.mark.parametrize("storage", ["bfloat16", "float16"])
def test_loss_scaling_and_weights_in_16_bits_agree_with_the_reference(storage: str, cuda: Any, rng: Any) -> None:
    optimizer, size = gb.Adam(0.1), 1000
    p, states = normal(rng, size, "float32"), np.zeros((2, size), np.float32)
    weights = p.astype(check_dtype(storage))
    rate, counters, scalars = np.array([0.1]), np.zeros(2, np.int64), np.ones(8, np.float32)
    scalars[[SCALE, GOOD]] = 1024, GROW_AFTER - 2
    on = [cuda.asarray(a.copy()) for a in (p, states, rate, counters, scalars, weights)]
    history = []
    for factor in (1.0, 1.0, np.inf, np.nan, 1.0):
        g = normal(rng, size, "float32") * np.float32(factor)
        for backend, (p_, s_, rate_, counters_, scalars_, w_), g_ in (
            (REFERENCE, (p, states, rate, counters, scalars, weights), g),
            (cuda, on, cuda.asarray(g)),
        ):
            backend.clip(g_, 1.0, scalars_, True)
            backend.advance(optimizer, rate_, 3, counters_, scalars_, True)
            backend.update(optimizer, p_, g_, s_, scalars_, w_)
        np.testing.assert_array_equal(cuda.to_numpy(on[3]), counters)
        here = cuda.to_numpy(on[4])
        history.append(float(here[SCALE]))
        np.testing.assert_array_equal(here[[SCALE, GOOD, SKIP]], scalars[[SCALE, GOOD, SKIP]])
    assert history == [1024, 2048, 1024, 512, 512]
    close(on[0], p, cuda, 64 * eps("f4") * 0.1)
    close(on[1], states, cuda)
    np.testing.assert_array_equal(cuda.to_numpy(on[5]), cuda.to_numpy(on[0]).astype(weights.dtype))


def test_unaligned_views_take_the_scalar_kernels(cuda: Any, rng: Any) -> None:
    room = cuda.zeros((4 * 8 + 1,), "float32")
    z = room[1:].reshape(4, 8)
    z[...] = cuda.asarray(normal(rng, (4, 8), "float32"))
    expected = np.tanh(cuda.to_numpy(z))
    close(cuda.bias_activation_forward(z, cuda.zeros((8,), "f4"), ACTIVATIONS["tanh"]), expected, cuda)


def test_kernels_are_not_handed_arrays_that_they_cannot_read(cuda: Any) -> None:
    z, b, relu = cuda.zeros((4, 8), "float32"), cuda.zeros((8,), "float32"), ACTIVATIONS["relu"]
    for bad, message in (
        (cuda.zeros((7,), "float32"), r"b has shape \(7,\); it must be \(8,\) in this bias_activation_forward"),
        (cuda.zeros((8,), "float64"), "b is an array of float64; it must be one of float32"),
        (cuda.zeros((16,), "float32")[::2], r"b is not C-contiguous \(strides \(8,\)\); it must be"),
    ):
        with pytest.raises(ValueError, match=message):
            cuda.bias_activation_forward(z, bad, relu)
    with pytest.raises(TypeError, match=r"b is numpy\.ndarray; it must be a cupy\.ndarray on cuda:0"):
        cuda.bias_activation_forward(z, np.zeros(8, "f4"), relu)
    with pytest.raises(ValueError, match="is empty"):
        cuda.bias_activation_forward(cuda.zeros((0, 8), "float32"), b, relu)
    with pytest.raises(ValueError, match="z is an array of int32; cuda:0 computes in"):
        cuda.bias_activation_forward(cuda.zeros((4, 8), "int32"), b, relu)


def test_work_goes_on_the_current_stream(cuda: Any, rng: Any) -> None:
    stream = cuda.xp.cuda.Stream(non_blocking=True)
    z = normal(rng, (64, 48), "float32")
    with stream:
        on = cuda.asarray(z)
        dh, db = cuda.bias_activation_backward(on, on, None, ACTIVATIONS["tanh"])
        result = cuda.to_numpy(dh), cuda.to_numpy(db)
    delta, sums = REFERENCE.bias_activation_backward(z, z, None, ACTIVATIONS["tanh"])
    close(cuda.asarray(result[0]), delta, cuda)
    close(cuda.asarray(result[1]), sums, cuda, sum_tolerance(delta, "f4", axis=0))


def arrays_of_a_step(cuda: Any, rng: Any, n: int, d: int) -> dict[str, Any]:
    names = ("z", "h", "dh", "delta", "do")
    arrays = {name: cuda.asarray(normal(rng, (n, d), "float32")) for name in names}
    arrays |= {"b": cuda.zeros((d,), "f4"), "db": cuda.zeros((d,), "f4"), "value": cuda.zeros((2,), "f8")}
    arrays |= {
        "y": cuda.asarray(rng.integers(0, d, n)),
        "counters": cuda.zeros((2,), "i8"),
        "rate": cuda.zeros((1,), "f8"),
    }
    arrays |= {
        "scalars": cuda.zeros((8,), "f4"),
        "p": cuda.zeros((n * d,), "f4"),
        "states": cuda.zeros((2, n * d), "f4"),
    }
    return arrays


def run_hot_methods(cuda: Any, a: dict[str, Any]) -> None:
    tanh, adam, g = ACTIVATIONS["tanh"], gb.Adam(), a["delta"].reshape(-1)
    cuda.bias_activation_forward(a["z"], a["b"], tanh, out=a["h"])
    cuda.dropout(a["h"], 0.5, 1, 0, a["counters"], out=a["h"])
    cuda.bias_loss(a["z"], a["b"], a["y"], LOSSES["softmax_cross_entropy"], out=a["do"], db=a["db"], value=a["value"])
    cuda.bias_activation_backward(a["dh"], a["z"], a["h"], tanh, out=a["delta"], db=a["db"])
    cuda.advance(adam, a["rate"], 1, a["counters"], a["scalars"])
    cuda.clip(g, 1.0, a["scalars"])
    cuda.update(adam, a["p"], g, a["states"], a["scalars"])


@pytest.mark.parametrize(("n", "d"), [(64, 40), (300, 264)])
def test_methods_with_all_outputs_given_allocate_nothing(
    n: int, d: int, cuda: Any, rng: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        cuda, "_launches", cuda._launches.for_step()
    )  # whose scratch stays; that of an eager call does not
    arrays = arrays_of_a_step(cuda, rng, n, d)
    run_hot_methods(cuda, arrays)  # compiles, and makes the scratch
    cuda.matmul(arrays["dh"].T, arrays["delta"], out=cuda_square(arrays, d))

    class Refuse(cuda.xp.cuda.MemoryHook):  # type: ignore[misc, name-defined]
        name = "refuse"

        def malloc_preprocess(self, **_: Any) -> None:
            raise AssertionError("an array was allocated")

    with Refuse():
        run_hot_methods(cuda, arrays)
        cuda.matmul(arrays["dh"].T, arrays["delta"], out=cuda_square(arrays, d))


def cuda_square(arrays: dict[str, Any], d: int) -> Any:
    return arrays["p"][: d * d].reshape(d, d)


@counted
def test_a_step_waits_for_nothing_and_copies_nothing(cuda: Any, rng: Any) -> None:
    arrays = arrays_of_a_step(cuda, rng, 64, 40)
    run_hot_methods(cuda, arrays)
    cuda.synchronize()  # what was queued before does not count
    with ledger.record(level=1) as r:
        run_hot_methods(cuda, arrays)
        cuda.synchronize()
    assert r.synchronizations == 1  # the one above
    assert r.allocations == r.copies_h2d == r.copies_d2h == r.copies_d2d == r.memsets == 0
    # forward 1, dropout 1, loss 2, backward 1 (64 rows are within a block), advance 1, clip 2, update 1
    assert r.launches == 9


@counted
def test_the_backward_pass_moves_each_byte_once(cuda: Any, rng: Any) -> None:
    n, d = 1024, 512
    dh, z = (cuda.asarray(normal(rng, (n, d), "float32")) for _ in range(2))
    out, db = cuda.zeros((n, d), "f4"), cuda.zeros((d,), "f4")
    cuda.bias_activation_backward(dh, z, None, ACTIVATIONS["tanh"], out=out, db=db)
    cuda.synchronize()  # what was queued before does not count
    with ledger.record() as r:
        cuda.bias_activation_backward(dh, z, None, ACTIVATIONS["tanh"], out=out, db=db)
        cuda.synchronize()
    kernel = r.kernels["bias_activation_backward"]
    moved = sum(k.bytes_read + k.bytes_written for k in (kernel, r.kernels["column_sum"]))
    floor = dh.nbytes + z.nbytes + out.nbytes + db.nbytes
    assert moved <= 1.05 * floor
    assert kernel.reread == 1.0
    assert kernel.coalescing >= 0.95
    assert kernel.local_accesses == 0
    assert kernel.read_widths.keys() == {16}
