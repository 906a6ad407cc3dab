"""What ``diagnose`` and ``GradientFlow`` say about a network: numbers by NumPy, causes where they are known."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.inspect.diagnose import Diagnosis
from gpubackprop.inspect.gradient_flow import EDGES, histogram

DEVICES = ["reference", pytest.param("cuda", marks=pytest.mark.gpu)]  # nothing here is compiled anew on the CPU


@pytest.fixture
def data(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    X = rng.normal(size=(60, 5)).astype(np.float32)
    return X, (X[:, 0] > 0).astype(np.int64)


@pytest.fixture(params=DEVICES)
def where(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_dead_and_saturated_units_are_those_that_were_made(where: str, data: Any) -> None:
    X, y = data
    model = gb.MLP([5, 8, 4, 2], ["relu", "tanh"], device=where)
    b_1, b_2 = model.parameters.b[:2]
    b_1[:3] = -100  # never above 0: dead
    b_2[0] = 3  # phi'(3) is 0.01: saturated, and passes something on
    model.parameters.W[1][:, 0] = 0
    first, second, last = model.diagnose(X, y).layers
    assert [first.name, second.name, last.name] == ["1", "2", "o"]
    assert first.dead == 3 / 8
    assert (second.dead, second.saturated) == (0, 1 / 4)
    assert np.isnan(last.dead)
    assert last.activation == "identity"


def test_shares_are_those_of_the_slopes_by_numpy(data: Any) -> None:
    X, y = data
    model = gb.MLP([5, 40, 2], "relu", device="reference", seed=3)
    model.parameters.b[0][...] = np.linspace(-8, 1, 40)
    active = (X @ model.parameters.W[0] + model.parameters.b[0] > 0).mean(axis=0)
    (first, _) = model.diagnose(X, y).layers
    assert first.dead == (active == 0).mean() > 0
    assert first.saturated == ((active > 0) & (active <= 0.1)).mean() > 0


def test_gradients_and_updates_are_those_by_hand(where: str, data: Any) -> None:
    X, y = data
    model = gb.MLP([5, 8, 2], "tanh", device=where)
    found = model.diagnose(X, y, optimizer=gb.SGD(0.1))
    loss, gradients = model.loss_and_gradients(X, y)
    assert found.loss == pytest.approx(float(loss), rel=1e-6)
    assert found.samples == 60
    for layer, W, dW in zip(found.layers, model.parameters.W, gradients.W, strict=True):
        W, dW = model.backend.to_numpy(W), np.asarray(dW)
        assert layer.gradient_norm == pytest.approx(np.linalg.norm(dW), rel=1e-6)
        assert layer.gradient_rms == pytest.approx(np.sqrt((dW.astype(np.float64) ** 2).mean()), rel=1e-6)
        assert layer.update_ratio == pytest.approx(0.1 * np.linalg.norm(dW) / np.linalg.norm(W), rel=1e-4)
    assert found.largest_input == pytest.approx(np.sqrt((X.astype(np.float64) ** 2).mean(axis=0)).max(), rel=1e-6)


def test_the_next_step_is_that_of_the_last_fit_and_nothing_changes(data: Any) -> None:
    X, y = data
    model = gb.MLP([5, 8, 2], device="reference")
    model.fit(X, y, epochs=3, optimizer=gb.SGD(0.5, momentum=0.9), progress=False)
    before = gb.fingerprint(model), model.optimizer_state.arrays[0].copy()  # type: ignore[union-attr]
    found = model.diagnose(X, y)
    assert (gb.fingerprint(model), found.optimizer) == (before[0], "SGD(learning_rate=0.5)")
    np.testing.assert_array_equal(model.optimizer_state.arrays[0], before[1])  # type: ignore[union-attr]
    twin = copy.deepcopy(model)
    twin.fit(X, y, epochs=1, batch_size=60, optimizer=gb.SGD(0.5, momentum=0.9), shuffle=False, progress=False)
    moved = twin.parameters.W[0] - model.parameters.W[0]
    expected = np.linalg.norm(moved) / np.linalg.norm(model.parameters.W[0])
    assert found.layers[0].update_ratio == pytest.approx(expected, rel=1e-5)


def test_it_can_be_asked_between_epochs(data: Any) -> None:
    X, y = data
    found: list[Diagnosis] = []

    class Asks(gb.Callback):
        def on_epoch_end(self, training: Any) -> None:
            found.append(training.model.diagnose(X, y))

    model, without = (gb.MLP([5, 8, 2], device="reference") for _ in range(2))
    model.fit(X, y, epochs=3, batch_size=20, optimizer=gb.SGD(0.2), callbacks=Asks(), progress=False)
    without.fit(X, y, epochs=3, batch_size=20, optimizer=gb.SGD(0.2), progress=False)
    assert gb.fingerprint(model) == gb.fingerprint(without)
    assert [a.optimizer for a in found] == ["SGD(learning_rate=0.2)"] * 3
    assert found[-1].loss == pytest.approx(model.evaluate(X, y)["loss"], rel=1e-6)


def diagnosis(
    *sizes: int, activation: str = "relu", scale: float = 1.0, rate: float = 0.01, **changed: Any
) -> Diagnosis:
    rng = np.random.default_rng(0)
    X = scale * rng.normal(size=(200, sizes[0]))
    model = gb.MLP(sizes, activation, device="reference")
    for name, factor in changed.items():
        getattr(model.parameters, name[0])[int(name[1:])][...] *= factor
    return model.diagnose(X, (X[:, 0] > 0).astype(int), optimizer=gb.SGD(rate))


@pytest.mark.parametrize(
    ("found", "cause"),
    [
        (lambda: diagnosis(5, 16, 16, 2), None),
        (lambda: diagnosis(5, 16, 2, scale=100), "inputs are large (input"),
        (lambda: diagnosis(5, 16, 2, activation="tanh", W0=40), "of layer 1 are saturated"),
        (lambda: diagnosis(5, *[16] * 9, 2, activation="sigmoid"), "gradients vanish"),
        (lambda: diagnosis(5, 16, 2, rate=10), "a step changes weights by"),
        (lambda: diagnosis(5, 16, 2, rate=1e-8), "at most: a larger learning rate"),
        (lambda: diagnosis(5, 16, 2, W1=1e30, W0=1e30), "not finite"),
        (lambda: diagnosis(5, 16, 2, W1=0), "the weights of layer o are all 0"),
        (lambda: diagnosis(5, 16, 16, 2, W1=0), "of layer 2 are all 0"),
        (lambda: diagnosis(5, 16, 2, W0=0), "units of layer 1 all have the same weights"),
    ],
)  # fmt: skip
def test_the_first_cause_is_what_was_done_wrong(found: Any, cause: str | None) -> None:
    causes = found().causes
    assert (cause is None) == (not causes)
    assert cause is None or cause in causes[0]


def test_dead_layers_are_the_first_cause(data: Any) -> None:
    X, y = data
    model = gb.MLP([5, 8, 2], device="reference")
    model.parameters.b[0][:] = -100
    text = str(model.diagnose(X, y))
    assert "likely cause: 100% of the units of layer 1 are dead (relu passes no gradient" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["1", "relu", "8", "100%", "0%", "0.00e+00", "0.00e+00", "0.00e+00"] in rows
    assert "also:" not in text


def test_it_takes_what_fit_takes(data: Any) -> None:
    import pandas as pd

    X, y = data
    df, labels = pd.DataFrame(X * 1000, columns=list("abcde")), np.where(y, "yes", "no")
    model = gb.MLP([5, 8, 2], device="reference")
    model.fit(df, labels, standardize=True, epochs=2, progress=False)
    found = model.diagnose(df, labels, np.ones(60))
    assert found.largest_input == pytest.approx(1, rel=1e-5)
    assert found.optimizer == "Adam(learning_rate=0.001)"
    plain = gb.MLP([5, 8, 2], device="reference")
    plain.fit(df, labels, epochs=1, progress=False)
    assert "inputs are large ('" in plain.diagnose(df, labels).causes[0]


def test_a_diagnosis_is_a_table_in_a_notebook(data: Any) -> None:
    found = gb.MLP([5, 8, 2], device="reference").diagnose(*data)
    assert found._repr_html_().startswith("<table><caption>loss")
    assert found._repr_html_().endswith("<p>nothing stands out</p>")


def test_a_histogram_counts_by_decades() -> None:
    counts = histogram(np.array([[0.0, 1e-20], [1e-3, -1e-3], [1.1, 1e9], [np.inf, np.nan]]))
    assert counts.sum() == 8
    assert counts[0] == 2
    assert counts[-1] == 3
    assert counts[np.searchsorted(EDGES, 0.0)] == 1  # log10(1.1), just above 0
    near = np.searchsorted(EDGES, -3.0)
    assert counts[near - 1 : near + 1].sum() == 2


@pytest.mark.parametrize("every", [1, 2])
def test_gradient_flow_has_the_gradients_of_each_epoch(data: Any, every: int) -> None:
    X, y = data
    flow, seen = gb.GradientFlow(X[:30], y[:30], every=every), []

    class Seen(gb.Callback):
        def on_train_begin(self, training: Any) -> None:
            seen.append([np.linalg.norm(a) for a in training.model.loss_and_gradients(X[:30], y[:30])[1].W])

        def on_epoch_end(self, training: Any) -> None:
            self.on_train_begin(training)

    model = gb.MLP([5, 8, 2], device="reference")
    model.fit(X, y, epochs=4, batch_size=20, callbacks=[flow, Seen()], progress=False)
    assert flow.epochs == list(range(0, 5, every))
    np.testing.assert_allclose(flow.norms, seen[::every], rtol=1e-6)
    assert flow.histograms.shape == (len(flow.epochs), 2, len(EDGES) - 1)
    assert flow.histograms.sum(axis=2).tolist() == [[40, 16]] * len(flow.epochs)
    without = gb.MLP([5, 8, 2], device="reference")
    without.fit(X, y, epochs=4, batch_size=20, progress=False)
    assert gb.fingerprint(model) == gb.fingerprint(without)


def test_gradient_flow_is_resumed(data: Any, tmp_path: Path) -> None:
    X, y = data
    whole, half, rest = (gb.GradientFlow(X, y) for _ in range(3))
    gb.MLP([5, 8, 2], device="reference").fit(X, y, epochs=4, callbacks=whole, progress=False)
    model = gb.MLP([5, 8, 2], device="reference")
    model.fit(X, y, epochs=2, callbacks=half, checkpoint=tmp_path / "run", progress=False)
    gb.resume(tmp_path / "run").fit(X, y, epochs=4, callbacks=rest, progress=False)
    assert rest.epochs == whole.epochs
    np.testing.assert_array_equal(rest.norms, whole.norms)
    np.testing.assert_array_equal(rest.histograms, whole.histograms)
