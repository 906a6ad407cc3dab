"""Activations: golden values, PyTorch's values, NaN and infinity, gains, parameters, custom activations."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tolerances import assert_within, eps

import gpubackprop as gb
from gpubackprop.activations import ACTIVATIONS, Activation, activation
from gpubackprop.definitions import NUMPY
from gpubackprop.losses import LOSSES

GOLDEN = json.loads((Path(__file__).parent / "golden" / "golden.json").read_text(encoding="utf-8"))["activations"]
NAMES = sorted(ACTIVATIONS)


def golden(name: str, dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return z, phi(z), phi'(z); z is exact in both dtypes."""
    table = np.array([[float(value) for value in row] for row in GOLDEN[name]])
    return table[:, 0].astype(dtype), table[:, 1], table[:, 2]


def tolerance(name: str, z: np.ndarray, exact: np.ndarray, dtype: str, ulps: int, terms: bool = False) -> np.ndarray:
    """Return ``ulps`` units in the last place of the result, however small it is.

    A function of the library is within 2.5 (erfcx 5), its square twice that, and there are a few roundings more. e^-2u of gelu_tanh
    is as wrong as 2 u is, by up to two roundings of it. With ``terms``: those of phi' are below 2, and may cancel.
    """
    z = z.astype(np.float64)
    if name == "gelu_tanh":
        x = np.clip(np.abs(z), 0, 30)
        ulps = ulps + 2 * 2 * (2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)  # type: ignore[assignment]
    with np.errstate(under="ignore"):
        result = ulps * np.maximum(eps(dtype) * np.abs(exact), float(np.finfo(dtype).smallest_subnormal))
    if terms and name in ("gelu", "gelu_tanh", "silu", "mish"):
        result += 2 * eps(dtype) * ((z > -2) & (z < 0))  # about their 0
    return result


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", NAMES)
def test_phi_has_its_golden_values(name: str, dtype: str) -> None:
    z, h, _ = golden(name, dtype)
    computed = ACTIVATIONS[name].phi(z)
    assert computed.dtype == dtype
    assert_within(computed, h, tolerance(name, z, h, dtype, 6))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", NAMES)
def test_dphi_has_its_golden_values(name: str, dtype: str) -> None:
    z, _, expected = golden(name, dtype)
    computed = np.broadcast_to(ACTIVATIONS[name].dphi(z), z.shape)
    assert computed.dtype == dtype
    assert_within(computed, expected, tolerance(name, z, expected, dtype, 8, terms=True))


WITH_TAILS = ("elu", "gelu", "gelu_tanh", "mish", "sigmoid", "silu", "softplus", "tanh")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", WITH_TAILS)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_devices_have_the_golden_values(name: str, dtype: str, backend: Any) -> None:
    z, h, expected = golden(name, dtype)
    entry, column = ACTIVATIONS[name], backend.asarray(z[:, None].copy())
    out = backend.bias_activation_forward(
        column, backend.zeros((1,), dtype), entry, out=backend.zeros(column.shape, dtype)
    )
    assert_within(backend.to_numpy(out)[:, 0], h, tolerance(name, z, h, dtype, 8))
    ones = backend.asarray(np.ones((len(z), 1), dtype))
    delta, _ = backend.bias_activation_backward(ones, column, out, entry)
    assert_within(backend.to_numpy(delta)[:, 0], expected, tolerance(name, z, expected, dtype, 10, terms=True))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", NAMES)
def test_h_serves_the_derivative_as_well_as_z(name: str, dtype: str) -> None:
    entry = ACTIVATIONS[name]
    z = np.linspace(-8, 8, 401).astype(dtype)
    h = entry.phi(z)
    unused = np.full_like(z, np.nan)
    given = entry.dphi(unused, h) if entry.needs == "h" else entry.dphi(z, unused)
    assert np.array_equal(np.broadcast_to(given, z.shape), np.broadcast_to(entry.dphi(z, h), z.shape))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", NAMES)
def test_nan_stays_nan(name: str, dtype: str) -> None:
    assert np.isnan(ACTIVATIONS[name].phi(np.array([np.nan, 1.0], dtype))).tolist() == [True, False]


LIMITS = {  # phi at -inf and inf; NaN where PyTorch has NaN too, for z times 0 has no limit in floating point
    "identity": (-np.inf, np.inf), "relu": (0, np.inf), "leaky_relu": (-np.inf, np.inf), "elu": (-1, np.inf),
    "selu": (-1.7580993408473766, np.inf), "celu": (-1, np.inf), "sigmoid": (0, 1), "tanh": (-1, 1),
    "softplus": (0, np.inf), "softsign": (np.nan, np.nan), "gelu": (np.nan, np.inf), "gelu_tanh": (np.nan, np.inf),
    "silu": (np.nan, np.inf), "mish": (np.nan, np.inf), "hard_sigmoid": (0, 1), "hard_swish": (np.nan, np.inf),
    "squareplus": (0, np.inf), "sin": (np.nan, np.nan),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_phi_at_infinity_is_its_limit(name: str) -> None:
    with np.errstate(invalid="ignore"):
        h = ACTIVATIONS[name].phi(np.array([-np.inf, np.inf]))
    assert_within(h, LIMITS[name], 2 * eps("float64"))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", NAMES)
def test_the_largest_numbers_give_no_nan(name: str, dtype: str) -> None:
    top = float(np.finfo(dtype).max)
    z = np.array([-top, -(top**0.5) * 4, -(top ** (1 / 3)) * 4, top ** (1 / 3) * 4, top**0.5 * 4, top], dtype)
    h = ACTIVATIONS[name].phi(z)
    assert not np.isnan(h).any()
    if name != "selu":  # its slope is above 1
        assert np.isfinite(h).all()
    dphi = np.broadcast_to(ACTIVATIONS[name].dphi(z, h), z.shape)
    assert np.isfinite(dphi).all()
    assert (np.abs(dphi) < 1.2).all()


TORCH = {
    "relu": "ReLU", "leaky_relu": "LeakyReLU", "elu": "ELU", "selu": "SELU", "celu": "CELU", "sigmoid": "Sigmoid",
    "tanh": "Tanh", "softsign": "Softsign", "gelu": "GELU", "silu": "SiLU", "mish": "Mish", "identity": "Identity",
    "hard_sigmoid": "Hardsigmoid", "hard_swish": "Hardswish", "softplus": "Softplus",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "parameters"),
    [*((name, {}) for name in sorted(TORCH)), ("leaky_relu", {"negative_slope": 0.2}), ("elu", {"alpha": 1.5}),
     ("celu", {"alpha": 0.5}), ("softplus", {"beta": 2.0})],
)  # fmt: skip
def test_values_and_derivatives_are_those_of_pytorch(name: str, parameters: dict[str, float]) -> None:
    torch = pytest.importorskip("torch")
    z = np.concatenate([np.linspace(-12, 12, 97), [0.0, -3.0, 3.0, 1e-9, -1e-9]])
    x = torch.tensor(z, requires_grad=True)
    exact = {"threshold": 1000.0} if name == "softplus" else {}  # PyTorch's default replaces softplus(20) by 20
    expected = getattr(torch.nn, TORCH[name])(**parameters, **exact)(x)
    expected.sum().backward()
    entry = ACTIVATIONS[name](**parameters) if parameters else ACTIVATIONS[name]
    # 16 roundings of numbers up to max(1, |z|) on both sides
    tolerance = 16 * eps("float64") * np.maximum(1, np.abs(z))
    assert_within(entry.phi(z), expected.detach().numpy(), tolerance)
    if name == "hard_sigmoid":  # PyTorch has 1/6 as a float32, also in float64
        tolerance = tolerance + eps("float32") / 6
    assert_within(np.broadcast_to(entry.dphi(z), z.shape), x.grad.numpy(), tolerance)


def test_gelu_tanh_is_that_of_pytorch() -> None:
    torch = pytest.importorskip("torch")
    z = np.linspace(-6, 6, 97)
    x = torch.tensor(z, requires_grad=True)
    expected = torch.nn.GELU("tanh")(x)
    expected.sum().backward()
    assert_within(ACTIVATIONS["gelu_tanh"].phi(z), expected.detach().numpy(), 64 * eps("float64"))
    assert_within(ACTIVATIONS["gelu_tanh"].dphi(z), x.grad.numpy(), 64 * eps("float64"))


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "selu", "tanh", "sigmoid", "identity"])
def test_gain_is_that_of_pytorch(name: str) -> None:
    torch = pytest.importorskip("torch")
    theirs = {"identity": "linear"}.get(name, name)
    assert ACTIVATIONS[name].gain == pytest.approx(torch.nn.init.calculate_gain(theirs), rel=1e-15)
    if name == "leaky_relu":
        expected = torch.nn.init.calculate_gain(name, 0.3)
        assert ACTIVATIONS[name](negative_slope=0.3).gain == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("name", ["gelu", "silu", "softplus", "sin"])
def test_gain_keeps_the_second_moment_of_a_normal_variable(name: str) -> None:
    # midpoint rule on [-12, 12] of a smooth integrand that vanishes at its ends: exact to rounding
    z = np.linspace(-12, 12, 20001)
    density = np.exp(-z * z / 2) / np.sqrt(2 * np.pi)
    moment = float(np.sum(density * ACTIVATIONS[name].phi(z) ** 2) * (z[1] - z[0]))
    assert ACTIVATIONS[name].gain ** 2 * moment == pytest.approx(1.0, rel=1e-9)


def test_gain_by_quadrature_is_he_et_al_for_relu() -> None:
    entry = Activation("relu_without_a_known_gain", ACTIVATIONS["relu"].define, needs="h")
    # relu^2 has a kink in its first derivative, where the quadrature converges as 1/nodes^(3/2) only
    assert entry.gain == pytest.approx(math.sqrt(2), rel=1e-3)


def test_golden_values_exist_for_every_activation() -> None:
    assert sorted(GOLDEN) == NAMES


def test_parameters_change_the_label_and_the_values() -> None:
    leaky = ACTIVATIONS["leaky_relu"](negative_slope=0.25)
    assert leaky.label == "leaky_relu(negative_slope=0.25)"
    assert leaky.phi(np.array([-4.0])).tolist() == [-1.0]
    assert leaky.fingerprint != ACTIVATIONS["leaky_relu"].fingerprint


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("leaky_relu", {"negative_slope": -0.1}, r"negative_slope is -0\.1; it must be a number >= 0"),
        ("elu", {"alpha": float("inf")}, "alpha is inf"),
        ("celu", {"alpha": 0.0}, r"alpha is 0\.0; it must be a number > 0"),
        ("softplus", {"beta": -1.0}, "beta is -1.0"),
        ("squareplus", {"b": float("nan")}, "b is nan"),
    ],
)
def test_a_parameter_out_of_range_is_an_error(name: str, parameters: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ACTIVATIONS[name](**parameters)


def test_an_unknown_parameter_is_an_error_that_names_the_known() -> None:
    with pytest.raises(TypeError, match="elu has no parameter 'slope'; it takes alpha"):
        ACTIVATIONS["elu"](slope=1.0)
    with pytest.raises(TypeError, match="it takes none"):
        ACTIVATIONS["tanh"](alpha=1.0)


def test_an_unknown_name_is_an_error_that_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown activation 'rleu' \(did you mean 'relu'\?\); choose from .*tanh"):
        ACTIVATIONS.resolve("rleu")


def test_needs_other_than_z_and_h_is_an_error() -> None:
    with pytest.raises(ValueError, match="needs is 'o'; choose 'h'"):
        activation(needs="o")  # type: ignore[arg-type]


@pytest.fixture
def cube(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A custom activation, registered for one test: phi(z) = c z^3."""
    monkeypatch.delitem(ACTIVATIONS, "cube", raising=False)

    @activation
    def cube(real: Any, m: Any, c: float = 1.0) -> Any:
        c, three = real(c), real(3)

        def phi(z: Any) -> Any:
            return c * z * z * z

        def dphi(z: Any, h: Any) -> Any:
            return c * three * z * z

        return phi, dphi

    yield cube
    del ACTIVATIONS["cube"]


def test_an_activation_of_ones_own_drops_in(cube: Any, device: str, rng: np.random.Generator) -> None:
    model = gb.MLP([3, 4, 2], "cube", "mean_squared_error", device, "float64")
    X, y = rng.normal(size=(5, 3)), rng.normal(size=(5, 2))
    h = model.trace(X, y).layers[0]
    assert_within(h.h, np.asarray(h.z) ** 3, 8 * eps("float64") * np.abs(np.asarray(h.z) ** 3))
    assert gb.check_gradients(model, X, y).ok
    assert gb.MLP([3, 4, 2], cube(c=0.5), "mean_squared_error", device).activations[0].label == "cube(c=0.5)"


@pytest.mark.parametrize(
    ("item", "wrong"),
    [
        (lambda: ACTIVATIONS["leaky_relu"](negative_slope=1e300), "negative_slope is 1e\\+300"),
        (lambda: ACTIVATIONS["squareplus"](b=1e-60), "b / 4 is 2.5e-61"),
        (lambda: LOSSES["softmax_cross_entropy"](label_smoothing=1e-60), "label_smoothing is 1e-60"),
    ],
)
def test_a_number_of_a_formula_that_float32_has_not_is_named(item, wrong):
    with pytest.raises(ValueError, match=f"{wrong}, which float32 has no number for"):
        item().scalars(np.dtype(np.float32), NUMPY)


def test_squareplus_takes_no_b_above_which_it_would_be_wrong():
    with pytest.raises(ValueError, match=r"b is 1e\+31; it must be in \(0, 1e14\]"):
        ACTIVATIONS["squareplus"](b=1e31)


def test_a_definition_that_reads_m_inside_its_functions_is_told_what_to_write() -> None:
    def wave(real: Any, m: Any) -> Any:
        def phi(z: Any) -> Any:
            return z + m.sin(z) * m.exp(z)

        return phi, lambda z, h: h

    model = gb.MLP([2, 3, 2], Activation("wave", wave), device="cpu")
    with pytest.raises(ValueError, match=r"write, before def phi, sin = m\.sin, exp = m\.exp"):
        model.forward(np.ones((1, 2), np.float32))
