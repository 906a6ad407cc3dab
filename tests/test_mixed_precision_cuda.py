"""Training in bfloat16 and float16 on CUDA: the reference's numbers, the captured step, loss scaling; dropout in other launches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.definitions import check_dtype, eps_of
from gpubackprop.machine.diagnosis import installed
from gpubackprop.network import Data
from gpubackprop.step.state import SCALE

try:
    import ledger  # counts launches and bytes where the device is simulated; absent elsewhere
except ImportError:
    ledger = None

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(installed("nvmath-python") is None, reason="products of 16-bit numbers need nvmath-python"),
]
SIZES, SAMPLES, BATCH = [20, 32, 24, 5], 64, 32


def problem() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 5, SAMPLES)
    return (rng.normal(size=(SAMPLES, 20)) + 2 * rng.normal(size=(5, 20))[y]).astype(np.float32), y


def make(device: Any, dtype: str, optimizer: Any = "adam", **options: Any) -> tuple[Any, Any]:
    """Return a model and a step that takes the samples in order."""
    keep = options.pop("keep", False)
    model = gb.MLP(SIZES, options.pop("activation", "gelu"), device=device, dtype=dtype, **options)
    X, y = (model.backend.asarray(a) for a in problem())
    data = Data(X.astype(model.dtype), y, None, model.backend.asarray(np.arange(SAMPLES)))
    return model, model.step(BATCH, optimizer, data=data, keep=keep)


def bits(model: Any) -> np.ndarray:
    return model.backend.to_numpy(model.parameters.flat)


@pytest.mark.parametrize("loss", ["softmax_cross_entropy", "mean_squared_error"])
@pytest.mark.parametrize("activation", ["relu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_loss_and_gradients_agree_with_the_reference(dtype: str, activation: str, loss: str) -> None:
    X, y = problem()
    y = y if loss == "softmax_cross_entropy" else np.eye(5, dtype=np.float32)[y]
    results = {}
    for device in ("cuda", "reference"):
        model = gb.MLP(SIZES, activation, loss, device, dtype)
        results[device] = model.loss_and_gradients(X, y)
    (value, gradients), (expected_value, expected) = results["cuda"], results["reference"]
    # Both round the same numbers to 16 bits, but after sums in another order: where that crosses the middle between two
    # of them, they part by eps of the number; six layers of products and functions, each a sum of such, relative to the largest.
    bound = 6 * 4 * eps_of(dtype)
    assert abs(float(value) - float(expected_value)) <= bound * max(1.0, abs(float(expected_value)))
    for ours, theirs in zip((*gradients.W, *gradients.b), (*expected.W, *expected.b), strict=True):
        assert ours.dtype == theirs.dtype == np.float32
        assert np.abs(ours - theirs).max() <= bound * max(np.abs(theirs).max(), np.abs(expected.flat).max() / 16)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_eager_and_captured_steps_give_the_same_bits(dtype: str) -> None:
    optimizer = gb.Adam(1e-2, clip_norm=1.0)
    (one, first), (two, second) = (make("cuda", dtype, optimizer, dropout=0.25) for _ in range(2))
    eager, captured = first.compile(), second.compile()
    for _ in range(2):
        eager.eagerly()
        captured()
    np.testing.assert_array_equal(bits(one), bits(two))
    for model in (one, two):
        stored = model.backend.to_numpy(model.network.weights.flat)
        np.testing.assert_array_equal(stored, bits(model).astype(stored.dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_it_learns_as_the_reference_does(dtype: str) -> None:
    losses = {}
    for device in ("cuda", "reference"):
        model, step = make(device, dtype, gb.Adam(1e-2))
        run, value = step.compile(), step.names.array("loss")
        losses[device] = []
        for t in range(20):
            if t % 2 == 0:
                model.optimizer_state.counters[1] = 0
            run()
            losses[device].append(float(value[0]))
    assert losses["cuda"][-1] < 0.5 * losses["cuda"][0]
    # a step moves every parameter by 1e-2 at most, Adam's steps of opposite sign where a gradient is lost in its rounding:
    # of such parameters a share eps_of(dtype) * 4, whose effect on the loss is lr * |gradient| * sqrt(their number) a step
    bound = 20 * 1e-2 * 3 * np.sqrt(model.parameters.count * 4 * eps_of(dtype))
    np.testing.assert_allclose(losses["cuda"], losses["reference"], rtol=0, atol=bound)


def test_an_overflow_skips_the_step_and_halves_the_scale() -> None:
    model, step = make("cuda", "float16", gb.Adam(1e-2))
    run, state = step.compile(), model.optimizer_state
    state.scalars[SCALE] = 2.0**120  # do overflows float16
    before = bits(model)
    run()
    np.testing.assert_array_equal(bits(model), before)
    assert float(state.scalars[SCALE]) == 2.0**119
    assert int(state.counters[0]) == 0
    state.scalars[SCALE] = 1024
    run()
    assert (bits(model) != before).any()
    assert int(state.counters[0]) == 1


@pytest.mark.skipif(ledger is None or not ledger.available(), reason="no counts on this device")
def test_a_warm_step_is_one_graph_launch_and_nothing_else() -> None:
    model, step = make("cuda", "float16", gb.Adam(1e-2))
    run = step.compile()
    run()
    model.backend.synchronize()
    with ledger.record(level=1) as record:
        run()
    model.backend.synchronize()
    assert record.graph_launches == 1
    assert record.launches == record.allocations == record.synchronizations == record.memsets == 0
    assert record.copies_h2d == record.copies_d2h == record.copies_d2d == 0


@pytest.mark.parametrize("activation", ["tanh", "gelu"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_dropout_on_the_way_gives_the_bits_of_dropout_apart(activation: str, dtype: str) -> None:
    models, launched = [], []
    for keep in (False, True):  # a step that keeps every intermediate has dropout apart
        model, step = make("cuda", dtype, gb.SGD(0.1), dropout=0.3, activation=activation, keep=keep)
        run = step.compile()
        run()
        models.append(model)
        launched.append(len(run.calls))
    assert (
        launched[1] == launched[0] + 5
    )  # two hidden layers, forward and backward, and dh of the last, a narrow product
    np.testing.assert_array_equal(bits(models[0]), bits(models[1]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sums_in_one_launch_give_the_sums_of_two(dtype: str) -> None:
    from gpubackprop.activations import ACTIVATIONS
    from gpubackprop.backends.cuda.backend import CudaBackend

    rng = np.random.default_rng(1)
    one, two = CudaBackend(0, single_launch_sums=True), CudaBackend(0)
    for n, d in ((2000, 64), (1100, 264), (1, 8), (1030, 10)):
        dh, z = (one.asarray(rng.normal(size=(n, d)).astype(check_dtype(dtype))) for _ in range(2))
        results = []
        for backend in (one, one, two):
            delta, db = backend.bias_activation_backward(dh, z, None, ACTIVATIONS["tanh"])
            results.append((backend.to_numpy(delta), backend.to_numpy(db)))
        np.testing.assert_array_equal(results[0][0], results[2][0])
        np.testing.assert_array_equal(
            results[0][1], results[1][1]
        )  # the same bits in each call: its tickets are 0 again
        slack = (n + 1) * 2.0**-23 * np.abs(results[2][0].astype("f8")).sum(axis=0)
        assert (np.abs(results[0][1] - results[2][1]) <= slack).all()
