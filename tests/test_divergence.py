"""A training that diverges is stopped, raises or skips, at the step that is to blame, with parameters that are still of use."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.losses import LOSSES
from gpubackprop.training.divergence import Guard

SUM = LOSSES["softmax_cross_entropy"](reduction="sum")  # its gradients are large enough for one step to overflow
DEVICES = ["cpu", "reference", pytest.param("cuda", marks=pytest.mark.gpu)]


def data(n: int = 96) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, 8)).astype(np.float32), rng.integers(0, 3, n)


def fit(model: gb.MLP, X: Any, y: Any, **options: Any) -> tuple[gb.History, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", gb.DivergenceWarning)
        history = model.fit(X, y, progress=False, **options)
    assert {Path(w.filename).name for w in caught} <= {Path(__file__).name}  # the line that called fit
    return history, [str(w.message) for w in caught]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("epochs_before", [0, 2])
def test_the_step_is_named_and_undone(device: str, epochs_before: int) -> None:
    class Spoil(gb.Callback):
        """Makes the rate too large after some epochs."""

        def on_train_begin(self, training: Any) -> None:
            training.learning_rate = 1e38 if not epochs_before else 0.01

        def on_epoch_end(self, training: Any) -> None:
            if training.epoch == epochs_before - 1:
                training.learning_rate = 1e38

    X, y = data()
    model, whole = (gb.MLP([8, 16, 3], loss=SUM, device=device, seed=1) for _ in range(2))
    history, said = fit(model, X, y, epochs=9, batch_size=32, optimizer=gb.SGD(0.01), callbacks=Spoil())
    found = history.diverged
    assert found is not None
    assert history.stopped == "diverged"
    assert (found.epoch, found.batch, found.learning_rate) == (epochs_before + 1, 1, pytest.approx(1e38))
    assert found.step == found.kept == 3 * epochs_before + 1
    assert "the update makes the parameters of" in found.what
    assert str(found) in said[0]
    if epochs_before:  # what it had learned is there, bit for bit
        whole.fit(X, y, epochs=epochs_before, batch_size=32, optimizer=gb.SGD(0.01), progress=False)
    same = model.backend.to_numpy(model.parameters.flat) == whole.backend.to_numpy(whole.parameters.flat)
    assert same.all()
    assert math.isfinite(model.evaluate(X, y)["loss"])


@pytest.mark.parametrize("device", DEVICES)
def test_parameters_with_a_finite_loss_are_kept(device: str) -> None:
    X, y = data()
    model = gb.MLP([8, 16, 3], device=device)
    for batch_size in (32, 96):  # the step to blame is the one before that with NaN: in this epoch, or in the last
        history, _ = fit(model, X * 1e3, y, epochs=9, batch_size=batch_size, optimizer=gb.SGD(1e6))
        assert history.diverged is not None
        assert history.diverged.kept < history.diverged.step
        assert math.isfinite(model.evaluate(X[:32] * 1e3, y[:32])["loss"])


@pytest.mark.parametrize("device", DEVICES)
def test_it_raises_where_that_is_wanted(device: str) -> None:
    X, y = data()
    model = gb.MLP([8, 16, 3], loss=SUM, device=device)
    with pytest.raises(gb.DivergenceError, match=r"diverged at step 1 \(epoch 1, mini-batch 1\) with") as error:
        model.fit(X, y, batch_size=32, optimizer=gb.SGD(1e38), on_divergence="raise", progress=False)
    assert error.value.divergence.step == 1
    assert math.isfinite(model.evaluate(X, y)["loss"])


@pytest.mark.parametrize("device", DEVICES)
def test_a_mini_batch_is_skipped_as_if_it_were_not_there(device: str) -> None:
    X, y = data()
    spoiled, n = X.copy(), 32
    spoiled[40] = 3e38
    options = {"batch_size": n, "optimizer": gb.SGD(0.1), "shuffle": False}
    model, without = (gb.MLP([8, 16, 3], device=device, seed=1) for _ in range(2))
    history, said = fit(model, spoiled, y, epochs=2, on_divergence="skip", **options)
    rest = np.r_[0:32, 64:96]
    expected, _ = fit(without, X[rest], y[rest], epochs=2, **options)
    assert [(d.epoch, d.batch) for d in history.skipped] == [(1, 2), (2, 2)]
    assert "2 mini-batches were skipped" in said[0]
    np.testing.assert_allclose(history["loss"], expected["loss"], rtol=1e-12)
    assert np.array_equal(*(m.backend.to_numpy(m.parameters.flat) for m in (model, without)))


def test_skipping_has_an_end() -> None:
    X, y = data(n=200)
    history, said = fit(
        gb.MLP([8, 3]), X * 0 + 3e38, y, batch_size=1, epochs=3, on_divergence="skip", optimizer=gb.SGD(1.0)
    )
    assert history.stopped == "diverged"
    assert len(history.skipped) == 100
    assert f"diverged at step {history.skipped[-1].step} " in said[0]  # a skipped step does not count


@pytest.mark.parametrize("device", DEVICES)
def test_a_loss_that_is_only_too_large_for_its_dtype_is_no_divergence(device: str) -> None:
    model = gb.MLP([1, 1], loss="mean_squared_error", device=device)
    model.parameters.flat[...] = 0
    history, said = fit(model, np.ones((1, 1)), np.array([1e30]), epochs=1, optimizer=gb.SGD(1.0, clip_norm=1.0))
    assert history.stopped == "epochs"
    assert not said
    assert history["loss"] == [math.inf]
    flat = model.backend.to_numpy(model.parameters.flat).astype(np.float64)
    assert np.linalg.norm(flat) == pytest.approx(1, rel=1e-5)


def test_lbfgs_from_a_loss_that_is_nan() -> None:
    X, y = data()
    model = gb.MLP([8, 3], "tanh")
    model.parameters.flat[...] = 3e38
    history, said = fit(model, X, y, optimizer=gb.LBFGS())
    assert history.stopped == "diverged"
    assert "at the start" in said[0]
    with pytest.raises(gb.DivergenceError):
        model.fit(X, y, optimizer=gb.LBFGS(), on_divergence="raise", progress=False)


def test_a_policy_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="on_divergence is 'ignore'; choose from stop, raise, skip"):
        gb.MLP([8, 3]).fit(*data(), on_divergence="ignore")
    with pytest.raises(ValueError, match="LBFGS has no mini-batch to skip"):
        gb.MLP([8, 3]).fit(*data(), optimizer=gb.LBFGS(), on_divergence="skip")


@pytest.mark.parametrize("device", DEVICES)
def test_without_memory_for_copies_it_is_still_an_end(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = data()
    options = {"epochs": 3, "batch_size": 32, "optimizer": gb.SGD(1e38)}
    for enough in (0, 2):  # copies in all: none; those of the good states, but none to repeat steps in
        left, copy = [enough], Guard._copy

        def limited(self: Any, count: int, left: list[int] = left, copy: Any = copy) -> Any:
            left[0] -= count
            return copy(self, count) if left[0] >= 0 else []

        with monkeypatch.context() as patch:
            patch.setattr(Guard, "_copy", limited)
            model = gb.MLP([8, 16, 3], loss=SUM, device=device)
            history, said = fit(model, X, y, **options)
            assert history.stopped == "diverged"
            assert "there was no memory to find the first such step" in said[0]
            finite = np.isfinite(model.backend.to_numpy(model.parameters.flat)).all()
            assert finite == bool(enough)
            if not enough:
                with pytest.raises(gb.DeviceMemoryError, match="on_divergence='skip' keeps two copies"):
                    model.fit(X, y, on_divergence="skip", progress=False)
