"""Initial weights: their scale, their bounds, orthogonality; the same for every dtype and device."""

from __future__ import annotations

import numpy as np
import pytest
from tolerances import assert_within

import gpubackprop as gb
from gpubackprop.initializers import INITIALIZERS

FAN_IN, FAN_OUT, GAIN = 300, 200, 1.7
STD = {
    "he_normal": GAIN / FAN_IN**0.5, "he_uniform": GAIN / FAN_IN**0.5, "lecun_normal": 1 / FAN_IN**0.5,
    "lecun_uniform": 1 / FAN_IN**0.5, "glorot_normal": GAIN * (2 / (FAN_IN + FAN_OUT)) ** 0.5,
    "glorot_uniform": GAIN * (2 / (FAN_IN + FAN_OUT)) ** 0.5, "orthogonal": GAIN / FAN_IN**0.5,
}  # fmt: skip


def draw(name: str, fan_in: int = FAN_IN, fan_out: int = FAN_OUT) -> np.ndarray:
    """Return weights from a fixed seed."""
    return INITIALIZERS[name](np.random.default_rng(1), fan_in, fan_out, GAIN)


@pytest.mark.parametrize("name", sorted(INITIALIZERS))
def test_mean_and_standard_deviation(name: str) -> None:
    W = draw(name)
    assert W.shape == (FAN_IN, FAN_OUT)
    # the mean has standard error std / sqrt(N), the standard deviation std / sqrt(2 N) for a normal one, less otherwise
    assert abs(W.mean()) < 5 * STD[name] / W.size**0.5
    assert W.std() == pytest.approx(STD[name], rel=5 / (2 * W.size) ** 0.5)


@pytest.mark.parametrize("name", [name for name in sorted(INITIALIZERS) if name.endswith("uniform")])
def test_uniform_weights_fill_their_interval(name: str) -> None:
    bound = 3**0.5 * STD[name]
    largest = np.abs(draw(name)).max()
    assert bound * (1 - 20 / (FAN_IN * FAN_OUT)) < largest <= bound  # P(all below) = e^-20


@pytest.mark.parametrize("name", [name for name in sorted(INITIALIZERS) if name.endswith("normal")])
def test_normal_weights_have_the_tails_of_a_normal(name: str) -> None:
    share = np.mean(np.abs(draw(name)) > 2 * STD[name])
    assert share == pytest.approx(0.0455, abs=5 * (0.0455 / (FAN_IN * FAN_OUT)) ** 0.5)


@pytest.mark.parametrize(("fan_in", "fan_out"), [(7, 4), (4, 7), (5, 5), (1, 3)])
def test_orthogonal_weights_are_orthogonal(fan_in: int, fan_out: int) -> None:
    W = draw("orthogonal", fan_in, fan_out) / GAIN
    gram = W.T @ W if fan_in >= fan_out else W @ W.T
    assert_within(gram, np.eye(min(fan_in, fan_out)), 1e-14)


@pytest.mark.parametrize("name", sorted(INITIALIZERS))
def test_a_network_starts_with_them(name: str) -> None:
    model = gb.MLP([FAN_IN, FAN_OUT, 2], "relu", initializer=name, device="reference", dtype="float64")
    assert not any(b.any() for b in model.parameters.b)
    gain = 1 if name.startswith("lecun") else 2**0.5
    expected = STD[name] * gain / (1 if name.startswith("lecun") else GAIN)
    assert model.parameters.W[0].std() == pytest.approx(expected, rel=5 / (2 * FAN_IN * FAN_OUT) ** 0.5)
    single = gb.MLP([FAN_IN, FAN_OUT, 2], "relu", initializer=name, device="reference")
    assert np.array_equal(single.parameters.W[0], model.parameters.W[0].astype(np.float32))


def test_an_initializer_of_ones_own_is_a_function() -> None:
    model = gb.MLP(
        [3, 4, 2], initializer=lambda rng, fan_in, fan_out, gain: np.full((fan_in, fan_out), gain), device="reference"
    )
    assert (model.parameters.W[0] == np.float32(2**0.5)).all()
    assert (model.parameters.W[1] == 1).all()
