"""The compiled step that a network keeps from one fit to the next: used again with the same bits, and holding no data."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.training import sources


def data(n: int = 50, seed: int = 0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, 6)).astype(np.float32), rng.integers(0, 3, n)


def fit(model: gb.MLP, X: Any, y: Any, **options: Any) -> list[float]:
    options = {"optimizer": gb.Adam(1e-2), "epochs": 2, "batch_size": 16, "progress": False} | options
    losses: list[float] = model.fit(X, y, **options)["loss"]
    return losses


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows with each preparation of steps."""
    made: list[int] = []
    prepare = sources.Prepared.__init__

    def count(self: Any, network: Any, data: Any, sizes: Any, *rest: Any) -> None:
        made.append(sizes[0])
        prepare(self, network, data, sizes, *rest)

    monkeypatch.setattr(sources.Prepared, "__init__", count)
    return made


def test_the_next_fit_of_the_same_shapes_uses_the_step_again(compiled: list[int]) -> None:
    model, other = (gb.MLP([6, 5, 3], seed=0, device="cpu") for _ in range(2))
    for seed in range(3):
        other.network.kept.clear()
        assert fit(model, *data(seed=seed)) == fit(other, *data(seed=seed))
    np.testing.assert_array_equal(model.parameters.flat, other.parameters.flat)
    assert compiled == [16] + 3 * [16]


def test_shared_steps_are_used_again_with_the_same_bits(compiled: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for threads in (1, 3):
        monkeypatch.setattr("gpubackprop.kernels.cpu.threads.available_threads", lambda threads=threads: threads)
        monkeypatch.setattr("gpubackprop.backends.cpu.SHARED", 0)
        model = gb.MLP([6, 40, 3], seed=0, device="cpu")
        for seed in range(3):
            fit(model, *data(seed=seed))
        results.append(model.parameters.flat.copy())
    np.testing.assert_array_equal(*results)
    assert compiled == [16, 16]


@pytest.mark.parametrize("change", ["rows", "batch", "optimizer", "weights", "micro"])
def test_another_step_is_compiled_where_something_else_is_asked(compiled: list[int], change: str) -> None:
    model = gb.MLP([6, 5, 3], seed=0, device="cpu")
    fit(model, *data())
    X, y = data(49 if change == "rows" else 50)
    options: dict[str, dict[str, Any]] = {
        "batch": {"batch_size": 17}, "optimizer": {"optimizer": gb.Adam(2e-2)}, "weights": {"sample_weight": np.ones(50)},
        "micro": {"micro_batch_size": 8},
    }  # fmt: skip
    fit(model, X, y, **options.get(change, {}))
    assert len(compiled) == 2


def test_a_changed_formula_is_seen(compiled: list[int]) -> None:
    factor = 1.0

    def define(real: Any, m: Any) -> Any:
        c = real(factor)

        def phi(z: Any) -> Any:
            return c * z

        def dphi(z: Any, h: Any) -> Any:
            return c

        return phi, dphi

    activation = gb.Activation("scaled", define, needs="z", known_gain=1.0)
    model = gb.MLP([6, 5, 3], activation=activation, seed=0, device="cpu")
    fit(model, *data())
    factor = 2.0
    fit(model, *data())
    assert len(compiled) == 2


def test_the_data_are_released_after_a_fit() -> None:
    model, (X, y) = gb.MLP([6, 5, 3], device="cpu"), data()
    fit(model, X, y)
    alive = weakref.ref(X)
    del X
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("device", ["cpu", "reference", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_fitted_network_goes_with_its_last_reference(device: str) -> None:
    model, (X, y) = gb.MLP([6, 5, 3], device=device), data()
    fit(model, X, y)
    model.predict(X)
    gc.collect()
    gc.disable()  # what is in a cycle stays
    try:
        alive = [weakref.ref(a) for a in (model.network, model.network.parameters)]
        del model
        assert [a() for a in alive] == [None, None]
    finally:
        gc.enable()


def test_nothing_large_is_kept(compiled: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "KEPT", 1000)
    model = gb.MLP([6, 5, 3], device="cpu")
    fit(model, *data())
    assert not model.network.kept
    fit(model, *data())
    assert len(compiled) == 2


def test_a_network_with_a_kept_step_can_be_copied() -> None:
    model = gb.MLP([6, 5, 3], seed=0, device="cpu")
    fit(model, *data())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert fit(other, *data(seed=1)) == fit(copy.deepcopy(model), *data(seed=1))


def test_data_in_the_memory_of_the_network_are_read_before_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for threads in (1, 3):
        monkeypatch.setattr("gpubackprop.kernels.cpu.threads.available_threads", lambda threads=threads: threads)
        monkeypatch.setattr("gpubackprop.backends.cpu.SHARED", 0)
        model = gb.MLP([6, 64, 3], seed=0, device="cpu")
        fit(model, *data(64))
        X = model.parameters.flat[:384].reshape(64, 6)
        fit(model, X, data(64)[1])
        results.append(model.parameters.flat.copy())
    np.testing.assert_array_equal(*results)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_networks_of_16_bits_are_fitted_again(dtype: str, compiled: list[int]) -> None:
    model = gb.MLP([6, 5, 3], seed=0, device="cuda", dtype=dtype)
    for _ in range(2):
        fit(model, *data())
    assert compiled == [16, 16]


@pytest.mark.gpu
def test_a_graph_is_used_again_for_data_at_the_same_place(compiled: list[int]) -> None:
    import cupy

    model, other = (gb.MLP([6, 5, 3], seed=0, device="cuda") for _ in range(2))
    X, y = map(cupy.asarray, data())
    for _ in range(3):
        other.network.kept.clear()
        assert fit(model, X, y) == fit(other, X, y)
    np.testing.assert_array_equal(model.parameters.flat.get(), other.parameters.flat.get())
    assert compiled == [16] + 3 * [16]
    fit(model, X.copy(), y)
    assert len(compiled) == 5
