"""Copies: what pickle and copy.deepcopy give is whole and independent, and its views are views."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from typing import Any

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.activations import ACTIVATIONS, Activation, activation
from gpubackprop.definitions import Definition
from gpubackprop.losses import LOSSES
from gpubackprop.network import OptimizerState
from gpubackprop.optimizers import OPTIMIZERS
from gpubackprop.schedules import SCHEDULES

WAYS = {"pickle": lambda a: pickle.loads(pickle.dumps(a)), "deepcopy": copy.deepcopy}
BOTH = pytest.mark.parametrize("way", WAYS)


@activation
def tripled(real: Any, m: Any, by: float = 3.0) -> Any:
    """phi(z) = 3 z."""
    three = real(by)
    return lambda z: three * z, lambda z, h: three


def _doubled(real: Any, m: Any) -> Any:
    two = real(2)
    return lambda z: two * z, lambda z, h: two


DOUBLED = Activation("doubled", _doubled)
del ACTIVATIONS["tripled"]  # not for other tests


class Named(gb.MLP):
    """A subclass with an attribute and another constructor."""

    def __init__(self, name: str) -> None:
        super().__init__([5, 6, 3], device="reference")
        self.name = name


def task() -> tuple[np.ndarray, np.ndarray]:
    return np.random.default_rng(0).normal(size=(30, 5)), np.arange(30) % 3


def fit(model: Any, epochs: int = 2) -> Any:
    return model.fit(
        *task(), epochs=epochs, batch_size=7, optimizer=gb.AdamW(gb.Cosine(0.01, steps=40)), progress=False
    )


def host(model: Any, a: Any) -> np.ndarray:
    return np.array(model.backend.to_numpy(a))


@BOTH
@pytest.mark.parametrize("used", [False, True])
def test_a_network_and_the_state_of_its_training(device: str, used: bool, way: str) -> None:
    options = {"dtype": "bfloat16"} if device == "reference" and used else {}
    model = gb.MLP([5, 8, 3], tripled(by=0.5), LOSSES["focal"](gamma=1.5) if "focal" in LOSSES else "softmax_cross_entropy",
                   device=device, seed=4, dropout=0.25, initializer="glorot_normal", **options)  # fmt: skip
    if used:
        fit(model)
        model.forward(task()[0])
    other = WAYS[way](model)
    assert other.backend is model.backend
    assert other.loss == model.loss
    assert other.activations == model.activations
    assert other.initializer is model.initializer
    assert other.target_shape == model.target_shape
    np.testing.assert_array_equal(other.forward(task()[0]), model.forward(task()[0]))
    before = host(model, model.parameters.flat)
    fit(other)
    np.testing.assert_array_equal(host(model, model.parameters.flat), before)
    fit(model)  # with the same moments, counters and rate
    np.testing.assert_array_equal(host(model, model.parameters.flat), host(other, other.parameters.flat))
    other.parameters.W[0][...] = 0
    other.parameters.flat[...] *= 0
    assert not np.any(other.forward(task()[0]))


@BOTH
def test_a_subclass_and_ones_own_attributes(way: str) -> None:
    model = Named("first")
    model.parameters.b[1][...] = 5
    model.note = ["mine"]  # type: ignore[attr-defined]
    other: Any = WAYS[way](model)
    assert (type(other), other.name, other.note) == (Named, "first", ["mine"])
    assert other.note is not model.note  # type: ignore[attr-defined]
    assert (other.parameters.b[1] == 5).all()


@BOTH
def test_parameters_and_gradients_stay_views(way: str) -> None:
    model = gb.MLP([5, 8, 3], device="reference")
    _, gradients = model.loss_and_gradients(*task())
    for given in (gradients, model.parameters, model.gradients):
        other = WAYS[way](given)
        np.testing.assert_array_equal(other.flat, given.flat)
        other.flat[:] = 7
        assert all((a == 7).all() for a in (*other.W, *other.b))
        assert not np.shares_memory(other.flat, given.flat)


@BOTH
def test_definitions_optimizers_schedules_and_histories(way: str) -> None:
    model = gb.MLP([5, 8, 3], device="reference")
    history = fit(model)
    loss = LOSSES["huber"](delta=2.0, reduction="sum")
    definitions = [
        *ACTIVATIONS.values(),
        *LOSSES.values(),
        ACTIVATIONS["leaky_relu"](negative_slope=0.2),
        loss,
        tripled,
        DOUBLED,
    ]
    optimizers = [kind() for kind in OPTIMIZERS.values() if kind.__module__.startswith("gpubackprop")]
    schedules = [gb.Cosine(0.1, steps=9), gb.LinearWarmup(0.1, steps=3), SCHEDULES["constant"](0.2)]
    for given in [*definitions, *optimizers, *schedules]:
        other = WAYS[way](given)
        assert other == given
        if isinstance(given, Definition):
            assert other.fingerprint == given.fingerprint
    other = WAYS[way](history)
    assert other == history
    assert vars(other) == vars(history)
    assert type(other) is gb.History
    state = WAYS[way](model.optimizer_state)
    assert isinstance(state, OptimizerState)
    np.testing.assert_array_equal(state.states, model.optimizer_state.states)  # type: ignore[union-attr]


@BOTH
@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_predictors_traces_and_backends(way: str, device: str) -> None:
    model = gb.MLP([5, 8, 3], device=device)
    X, y = task()
    X = X.astype(np.float32)
    predictor = model.predictor(30)
    np.testing.assert_array_equal(WAYS[way](predictor)(X), predictor(X))
    trace = model.trace(X, y)
    np.testing.assert_array_equal(WAYS[way](trace).layers[1].dW, trace.layers[1].dW)
    assert WAYS[way](model.backend) is model.backend


@BOTH
@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_steps_say_that_they_cannot_be_copied(way: str, device: str) -> None:
    step = gb.MLP([5, 8, 3], device=device).step(4)
    with pytest.raises(TypeError, match=r"create one from the copy: copy.step"):
        WAYS[way](step)
    if device == "cpu":
        with pytest.raises(TypeError, match=r"holds addresses.*copy.step\(...\).compile"):
            WAYS[way](step.compile())


def test_a_local_activation_says_why_it_cannot_be_pickled() -> None:
    def define(real: Any, m: Any) -> Any:
        return _doubled(real, m)

    model = gb.MLP([5, 8, 3], Activation("mine", define), device="reference")
    with pytest.raises(pickle.PicklingError, match=r"activation 'mine' cannot be pickled: .*top level of a module"):
        pickle.dumps(model)
    with pytest.raises(pickle.PicklingError, match="activation 'named' cannot be pickled"):
        pickle.dumps(Activation("named", lambda real, m: _doubled(real, m)))
    np.testing.assert_array_equal(copy.deepcopy(model).forward(task()[0]), model.forward(task()[0]))


def train(model: Any) -> Any:
    """Train a little more; runs in another process."""
    fit(model)
    return model


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_network_goes_to_another_process_and_back(method: str) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    model = gb.MLP([5, 8, 3], "tanh", device="cpu")
    fit(model)
    with multiprocessing.get_context(method).Pool(1) as pool:
        other = pool.apply_async(train, (model,)).get(timeout=100)
    fit(model)
    np.testing.assert_array_equal(other.parameters.flat, model.parameters.flat)
