"""Predictors: the outputs of ``forward``, for any number of samples, without a new array per batch; and warmup."""

import tracemalloc

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.activations import Activation
from gpubackprop.losses import LOSSES

DEVICES = ["reference", "cpu"]


def samples(n, d=12, dtype=np.float32):
    return np.random.default_rng(0).normal(size=(n, d)).astype(dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch_size", [1, 7])
def test_a_predictor_gives_the_outputs_of_forward(batch_size, device):
    model = gb.MLP([12, 20, 9, 3], "gelu", device=device, dtype="float64", dropout=0.5)
    model.parameters.flat[...] += 0.1  # biases that count
    X = samples(batch_size, dtype=np.float64)
    np.testing.assert_allclose(model.predictor(batch_size)(X), model.forward(X), rtol=1e-12)


def test_a_predictor_takes_one_sample_without_a_batch_axis():
    predictor = gb.MLP([12, 9, 3]).predictor()
    X = samples(2)
    first = predictor(X[0])
    assert first.shape == (1, 3)
    assert not np.array_equal(predictor(X[1]), first)
    np.testing.assert_array_equal(predictor(X[:1]), first)
    for wrong in (X[0, :5], X[0, :1], X, X[0, 0], X.T):
        with pytest.raises(ValueError, match="X has shape"):
            predictor(wrong)


def test_a_predictor_follows_the_parameters():
    model, X = gb.MLP([12, 9, 3]), samples(1)
    predictor = model.predictor()
    before = predictor(X).copy()
    model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()})
    assert not np.array_equal(predictor(X), before)
    np.testing.assert_allclose(predictor(X), model.forward(X), rtol=1e-5)


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, None])
def test_a_predictor_needs_a_number_of_samples(batch_size):
    with pytest.raises(ValueError, match="batch_size"):
        gb.MLP([12, 9, 3]).predictor(batch_size)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n", [1, 2, 3, 100, 1023, 1024, 1025, 2500])
def test_batches_cover_every_sample_once(n, device):
    model, X = gb.MLP([12, 20, 3], device=device, dtype="float64"), samples(n, dtype=np.float64)
    seen = np.zeros(n)
    for rows, o in model.outputs_in_batches(X):
        seen[rows] += 1
        np.testing.assert_allclose(o, model.forward(X[rows]), rtol=1e-11, atol=1e-13)
    assert (seen == 1).all()


def test_batches_allocate_no_arrays():
    model, X = gb.MLP([12, 256, 3]), samples(20 * 1024)
    for _ in model.outputs_in_batches(X):
        pass
    tracemalloc.start()
    for _ in model.outputs_in_batches(X):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 12 * 1024 * 4  # less than the inputs of one batch


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("device", DEVICES)
def test_warmup_changes_nothing(loss, device):
    model = gb.MLP([5, 4, 3], loss=loss, device=device)
    rng = np.random.default_rng(0)
    y = {"classes": rng.integers(0, 3, 20), "distribution": np.full((20, 3), 1 / 3), "signs": np.ones((20, 3))}
    targets = y.get(model.loss.targets, np.eye(3)[rng.integers(0, 3, 20)])
    other = gb.MLP([5, 4, 3], loss=loss, device=device)
    for one in (model, other):
        one.fit(samples(20, 5), targets, epochs=1, batch_size=10, progress=False)
        if one is model:
            one.warmup(10, "sgd")
            one.warmup(10, "adam", class_indices=False)
        one.fit(samples(20, 5), targets, epochs=1, batch_size=10, progress=False)
    np.testing.assert_array_equal(model.parameters.flat, other.parameters.flat)


def test_warmup_compiles_what_fit_and_evaluate_need(monkeypatch):
    from gpubackprop.kernels.cpu.compile import Kernel

    model, X, y = gb.MLP([5, 4, 3], "elu"), samples(20, 5), np.arange(20) % 3
    model.warmup(10, "rmsprop")
    monkeypatch.setattr(Kernel, "_compile", lambda kernel, kinds: pytest.fail(f"compiles {kernel.function.__name__}"))
    model.fit(X, y, epochs=1, batch_size=10, optimizer="rmsprop", validation_data=(X, y), progress=False)
    model.predict(X)


SLOPE = 1.0


def sloped(real, m):
    slope = real(SLOPE)

    def phi(z):
        return slope * z

    def dphi(z, h):
        return slope

    return phi, dphi


@pytest.mark.parametrize("device", DEVICES)
def test_predict_follows_an_edit_of_what_an_activation_reads(device, monkeypatch):
    model = gb.MLP([12, 3, 2], Activation("sloped", sloped), "mean_squared_error", device=device)
    X = samples(4)
    before = model.predict(X)
    monkeypatch.setitem(sloped.__globals__, "SLOPE", 2.0)
    np.testing.assert_array_equal(model.predict(X), 2 * before)
    np.testing.assert_array_equal(model.predict(X), model.forward(X))
