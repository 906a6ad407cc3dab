"""Every gradient is the slope of the loss, by finite differences in float64; and it is what the equations give by hand."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import oracle
import pytest
from tolerances import assert_within

import gpubackprop as gb
from gpubackprop.activations import ACTIVATIONS, Activation
from gpubackprop.inspect.explain import random_batch
from gpubackprop.losses import LOSSES

RELATIVE = 1e-6  # the promise of the project; a wrong term of any equation is off by far more


def make(
    sizes: list[int], rng: np.random.Generator, activation: Any = "tanh", loss: Any = "mean_squared_error", **kw: Any
) -> gb.MLP:
    """Return a float64 network with random biases: zero biases sit on the kinks of relu and its kind."""
    kw = {"device": "reference", "dtype": "float64"} | kw
    model = gb.MLP(sizes, activation, loss, **kw)
    for b in model.parameters.b:
        b[...] = model.backend.asarray(rng.normal(size=b.shape) / 2)
    return model


@pytest.mark.parametrize("loss", sorted(LOSSES))
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_every_gradient_of_every_activation_with_every_loss(
    activation: str, loss: str, rng: np.random.Generator
) -> None:
    model = make([3, 5, 4, 3], rng, activation, loss)
    report = gb.check_gradients(model, *random_batch(model, 6, rng), tolerance=RELATIVE)
    assert report.ok, f"\n{report}"
    names = [check.name for check in report.checks]
    assert names == ["do", "db_o", "dW_o", "dh_2", "delta_2", "db_2", "dW_2", "dh_1", "delta_1", "db_1", "dW_1"]


PAIRS = [("tanh", "mean_squared_error"), ("relu", "softmax_cross_entropy"), ("gelu", "sigmoid_cross_entropy")]


@pytest.mark.parametrize("n", [1, 2, 7, 64])
@pytest.mark.parametrize("width", [1, 3, 17, 128])
@pytest.mark.parametrize("depth", [0, 1, 2, 3, 4])
def test_every_gradient_at_every_shape(depth: int, width: int, n: int, rng: np.random.Generator) -> None:
    activation, loss = PAIRS[(depth + width + n) % len(PAIRS)]
    model = make([width, *[width] * depth, 3], rng, activation, loss)
    report = gb.check_gradients(model, *random_batch(model, n, rng), tolerance=RELATIVE)
    assert report.ok, f"\n{report}"
    assert len(report.checks) == 3 + 4 * depth


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_gradients_of_weighted_losses(loss: str, reduction: str, rng: np.random.Generator) -> None:
    model = make([2, 4, 3], rng, "silu", LOSSES[loss](reduction=reduction))
    X, y = random_batch(model, 5, rng)
    report = gb.check_gradients(model, X, y, rng.uniform(0.1, 3.0, 5), tolerance=RELATIVE)
    assert report.ok, f"\n{report}"


@pytest.mark.parametrize(
    ("activation", "loss"),
    [
        (ACTIVATIONS["leaky_relu"](negative_slope=0.3), LOSSES["huber"](delta=0.2)),
        (ACTIVATIONS["elu"](alpha=0.7), LOSSES["softmax_cross_entropy"](label_smoothing=0.1)),
        (ACTIVATIONS["celu"](alpha=2.5), "kl_divergence"),
        (ACTIVATIONS["softplus"](beta=3.0), "poisson"),
        (ACTIVATIONS["squareplus"](b=0.5), "hinge"),
    ],
    ids=lambda d: d if isinstance(d, str) else d.label,
)
def test_gradients_with_parameters_that_are_not_the_defaults(
    activation: Any, loss: Any, rng: np.random.Generator
) -> None:
    model = make([3, 4, 3], rng, activation, loss)
    report = gb.check_gradients(model, *random_batch(model, 6, rng), tolerance=RELATIVE)
    assert report.ok, f"\n{report}"


def test_gradients_for_rows_of_probabilities(rng: np.random.Generator) -> None:
    model = make([3, 4, 3], rng, "tanh", "softmax_cross_entropy")
    y = rng.dirichlet(np.ones(3), 6)
    assert gb.check_gradients(model, rng.normal(size=(6, 3)), y, tolerance=RELATIVE).ok


def test_a_wrong_derivative_is_found(rng: np.random.Generator) -> None:
    def wrong(real: Any, m: Any) -> Any:
        one, tanh, off = real(1), m.tanh, real(1.00001)
        return (lambda z: tanh(z)), (lambda z, h: (one - h * h) * off)

    model = make([3, 4, 3], rng, Activation("wrong", wrong, needs="h"))
    report = gb.check_gradients(model, *random_batch(model, 6, rng), tolerance=RELATIVE)
    assert {check.name for check in report.checks if check.error > RELATIVE} == {"delta_1", "db_1", "dW_1"}
    assert not report.ok
    assert "WRONG" in str(report)


@pytest.mark.parametrize("loss", ["mean_squared_error", "softmax_cross_entropy"])
@pytest.mark.parametrize(
    ("device", "activation"),
    [
        *product(["reference", "cpu"], sorted(oracle.ACTIVATIONS)),
        *(pytest.param("cuda", name, marks=pytest.mark.gpu) for name in ("relu", "gelu")),
    ],
    indirect=["device"],
)
def test_loss_and_gradients_are_those_of_the_equations_by_hand(
    activation: str, loss: str, device: str, rng: np.random.Generator
) -> None:
    model = make([3, 4, 2, 3], rng, activation, loss, device=device)
    X, y = random_batch(model, 5, rng)
    host = model.state_dict()
    W = [host[f"layers.{i}.weight"].T.tolist() for i in range(3)]
    b = [host[f"layers.{i}.bias"].tolist() for i in range(3)]
    truth = oracle.backpropagate(W, b, [activation] * 2, loss, X.tolist(), y.tolist())
    trace = model.trace(X, y)
    # every number is a few sums of at most 5 products of numbers below 10: far fewer than 1000 roundings
    tolerance = 1000 * np.finfo(np.float64).eps
    assert_within(model.backend.to_numpy(trace.loss), truth.loss, tolerance)
    for i, layer in enumerate(trace.layers):
        assert_within(layer.z, [sample[i] for sample in truth.z], tolerance)
        assert_within(layer.h, [sample[i + 1] for sample in truth.h], tolerance)
        assert_within(layer.delta, [sample[i] for sample in truth.delta], tolerance)
        assert_within(layer.dW, truth.dW[i], tolerance)
        assert_within(layer.db, truth.db[i], tolerance)


@pytest.mark.parametrize("loss", ["mean_squared_error", "softmax_cross_entropy"])
def test_the_gradient_of_a_device_is_the_slope_of_its_own_loss(
    loss: str, device: str, rng: np.random.Generator
) -> None:
    model = make([4, 6, 3], rng, "tanh", loss, device=device)
    X, y = random_batch(model, 7, rng)
    _, gradients = model.loss_and_gradients(X, y)
    flat = model.parameters.flat
    v = np.zeros(flat.shape)
    v[: flat.size] = rng.normal(size=flat.size)
    start, g = model.backend.to_numpy(flat).copy(), np.asarray(gradients.flat)

    def loss_at(e: float) -> float:
        flat[...] = model.backend.asarray(start + e * v)
        return float(model.loss_and_gradients(X, y)[0])

    e = 1e-3
    slope = (8 * (loss_at(e) - loss_at(-e)) - (loss_at(2 * e) - loss_at(-2 * e))) / (12 * e)
    # truncation e^4 |f'''''| / 30 and rounding eps |f| / e are both near 1e-12 here
    assert slope == pytest.approx(float(g @ v), rel=1e-7)
