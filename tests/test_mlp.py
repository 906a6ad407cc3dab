"""The network: forward, trace, predictions, parameters, devices, other libraries' arrays; the same bits in every run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tolerances import assert_within, eps, matmul_tolerance

import gpubackprop as gb
from gpubackprop.activations import ACTIVATIONS
from gpubackprop.inspect.explain import random_batch
from gpubackprop.losses import LOSSES


def host(model: gb.MLP, a: Any) -> np.ndarray:
    """Return an array of the model on the host."""
    return np.asarray(model.backend.to_numpy(a))


class OnlyDLPack:
    """An array of which only the exchange protocol is known."""

    def __init__(self, a):
        self.a = a

    def __dlpack__(self, **options):
        return self.a.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.a.__dlpack_device__()


def test_an_object_that_has_only_dlpack_is_taken_as_an_array():
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(6, 4)).astype(np.float32), rng.integers(0, 3, 6)
    model = gb.MLP([4, 5, 3], device="reference")
    np.testing.assert_array_equal(model.forward(OnlyDLPack(X)), model.forward(X))
    assert model.evaluate(OnlyDLPack(X), OnlyDLPack(y)) == model.evaluate(X, y)


def test_forward_is_the_equations(device: str, rng: np.random.Generator) -> None:
    model = gb.MLP([5, 7, 3], "tanh", device=device, dtype="float64")
    X = rng.normal(size=(4, 5))
    state = model.state_dict()
    h = np.tanh(X @ state["layers.0.weight"].T + state["layers.0.bias"])
    o = h @ state["layers.1.weight"].T + state["layers.1.bias"]
    assert_within(model.forward(X), o, 100 * eps("float64"))  # sums of 7 terms near 1


def test_forward_leaves_its_input_and_earlier_results_alone(device: str, rng: np.random.Generator) -> None:
    model = gb.MLP([3, 3], "relu", device=device)
    X = rng.normal(size=(4, 3)).astype(np.float32)
    before = X.copy()
    first = model.forward(X)
    kept = first.copy()
    model.forward(X + 1)
    assert np.array_equal(X, before)
    assert np.array_equal(first, kept)


def test_trace_holds_every_equation(device: str, rng: np.random.Generator) -> None:
    model = gb.MLP([4, 6, 5, 3], ["tanh", "gelu"], device=device)
    for b in model.parameters.b:
        b[...] = model.backend.asarray(rng.normal(size=b.shape).astype(np.float32))
    X, y = random_batch(model, 7, rng)
    trace = model.trace(X, y)
    state = model.state_dict()
    h, u = X.astype(np.float32), eps("float32")
    for i, layer in enumerate(trace.layers):
        W, b = state[f"layers.{i}.weight"].T, state[f"layers.{i}.bias"]
        assert np.array_equal(layer.h_in, h)
        z = h.astype(np.float64) @ W + b
        assert_within(layer.z, z, matmul_tolerance(h, W, "float32") + u * (np.abs(z) + np.abs(b)))
        if i < 2:
            phi = ACTIVATIONS[("tanh", "gelu")[i]]
            z64 = layer.z.astype(np.float64)
            assert_within(layer.h, phi.phi(z64), 16 * u * (1 + np.abs(z64)))
            above = trace.layers[i + 1]
            W_above = state[f"layers.{i + 1}.weight"]
            dh = above.delta.astype(np.float64) @ W_above
            assert_within(layer.dh, dh, matmul_tolerance(above.delta, W_above, "float32"))
            assert_within(layer.delta, layer.dh * phi.dphi(z64), 32 * u * np.abs(layer.dh) * (1 + np.abs(z64)))
        dW = layer.h_in.astype(np.float64).T @ layer.delta
        assert_within(layer.dW, dW, matmul_tolerance(layer.h_in.T, layer.delta, "float32"))
        assert_within(layer.db, layer.delta.astype(np.float64).sum(axis=0), 8 * u * np.abs(layer.delta).sum(axis=0))
        h = layer.h
    last = trace.layers[-1]
    assert np.array_equal(trace.o, last.z)
    assert np.array_equal(trace.o, last.h)
    assert np.array_equal(trace.do, last.delta)
    assert np.array_equal(trace.do, last.dh)
    assert np.array_equal(trace.X, X.astype(np.float32))
    value, _ = LOSSES["softmax_cross_entropy"].per_sample(trace.o.astype(np.float64), y)
    assert float(trace.loss) == pytest.approx(value.mean(), rel=20 * u)


def test_trace_loss_and_gradients_and_step_agree_to_the_bit(device: str, rng: np.random.Generator) -> None:
    model = gb.MLP([4, 6, 3], "gelu", device=device)
    X, y = random_batch(model, 7, rng)
    loss, gradients = model.loss_and_gradients(X, y)
    trace = model.trace(X, y)
    step = model.step(7)
    step.names.array("X")[...] = model.backend.asarray(X.astype(np.float32))
    step.names.array("y")[...] = model.backend.asarray(y)
    step.compile()()
    assert float(loss) == float(trace.loss) == float(step.names.array("loss")[0])
    for i, layer in enumerate(trace.layers):
        assert np.array_equal(gradients.W[i], layer.dW)
        assert np.array_equal(gradients.b[i], layer.db)
    assert np.array_equal(gradients.flat, host(model, model.gradients.flat))


def test_backward_takes_the_gradient_of_ones_own_loss(device: str, rng: np.random.Generator) -> None:
    model = gb.MLP([4, 6, 3], "tanh", "mean_squared_error", device, "float64")
    X, y = random_batch(model, 5, rng)
    _, expected = model.loss_and_gradients(X, y)
    o = model.forward(X)
    gradients = model.backward(2 * (o - y) / o.size)
    assert_within(gradients.flat, expected.flat, 1e-14)
    with pytest.raises(ValueError, match=r"do has 4 rows; the last forward\(X\) had 5"):
        model.backward(np.zeros((4, 3)))
    with pytest.raises(ValueError, match=r"call forward\(X\) first"):
        gb.MLP([4, 3], device=device).backward(np.zeros((1, 3)))


def test_the_sum_over_samples_of_single_gradients_is_the_gradient(device: str, rng: np.random.Generator) -> None:
    model = gb.MLP([4, 5, 3], "silu", LOSSES["softmax_cross_entropy"](reduction="sum"), device, "float64")
    X, y = random_batch(model, 4, rng)
    _, whole = model.loss_and_gradients(X, y)
    parts = sum(model.loss_and_gradients(X[i : i + 1], y[i : i + 1])[1].flat for i in range(4))
    assert_within(parts, whole.flat, 1e-14 * 10)


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_predictions_read_the_outputs_as_the_loss_means_them(loss: str, rng: np.random.Generator) -> None:
    model = gb.MLP([4, 5, 3], "tanh", loss, dtype="float64")
    X = rng.normal(size=(9, 4))
    o = model.forward(X)
    got = model.predict(X)
    kind = LOSSES[loss].targets
    expected = {"classes": o.argmax(axis=1), "distribution": o.argmax(axis=1), "binary": (o > 0).astype(int),
                "signs": np.where(o > 0, 1, -1), "counts": np.exp(o), "real": o}[kind]  # fmt: skip
    assert_within(got, expected, 0 if kind != "counts" else 4 * eps("float64") * expected)
    if LOSSES[loss].mean_function == "softmax":
        p = model.predict_proba(X)
        assert_within(p.sum(axis=1), np.ones(9), 8 * eps("float64"))
        assert_within(p, np.exp(o) / np.exp(o).sum(axis=1, keepdims=True), 16 * eps("float64"))
    elif kind == "binary":
        assert_within(model.predict_proba(X), 1 / (1 + np.exp(-o)), 8 * eps("float64"))
    else:
        with pytest.raises(ValueError, match=f"{loss} gives no probabilities"):
            model.predict_proba(X)


def test_predictions_in_batches_are_those_of_one_pass(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    model = gb.MLP([4, 5, 3], "tanh", dtype="float64", device="reference")
    X, y = random_batch(model, 23, rng)
    whole, at_once = model.predict_proba(X), model.evaluate(X, y)
    monkeypatch.setattr("gpubackprop.mlp.EVALUATION_BATCH", 5)
    assert_within(model.predict_proba(X), whole, 16 * eps("float64"))
    batched = model.evaluate(X, y)
    assert batched["accuracy"] == at_once["accuracy"]
    assert batched["loss"] == pytest.approx(at_once["loss"], rel=1e-14)


@pytest.mark.parametrize(
    "loss", ["mean_squared_error", "softmax_cross_entropy", "sigmoid_cross_entropy", "hinge", "poisson"]
)
def test_evaluate_is_the_loss_and_the_metric(loss: str, rng: np.random.Generator) -> None:
    model = gb.MLP([4, 5, 3], "tanh", loss, dtype="float64")
    X, y = random_batch(model, 11, rng)
    w = rng.uniform(0.1, 2, 11)
    for weight, v in ((None, np.ones(11)), (w, w)):
        metrics = model.evaluate(X, y, weight)
        assert metrics["loss"] == pytest.approx(float(model.loss_and_gradients(X, y, weight)[0]), rel=1e-13)
        o = model.forward(X)
        if loss == "mean_squared_error":
            mean = (v[:, None] * y).sum(axis=0) / v.sum()
            spread = (v[:, None] * (y - mean) ** 2).sum()
            assert metrics["r2"] == pytest.approx(1 - (v[:, None] * (y - o) ** 2).sum() / spread, rel=1e-12)
        elif loss == "poisson":
            assert set(metrics) == {"loss"}
        else:
            right = (o.argmax(axis=1) == y) if y.ndim == 1 else ((o > 0) == (y > 0)).mean(axis=1)
            assert metrics["accuracy"] == pytest.approx((v * right).sum() / v.sum(), rel=1e-14)


def test_parameters_are_views_into_one_array(device: str) -> None:
    model = gb.MLP([5, 3, 2], device=device)
    p = model.parameters
    assert [W.shape for W in p.W] == [(5, 3), (3, 2)]
    assert [b.shape for b in p.b] == [(3,), (2,)]
    assert p.count == 5 * 3 + 3 + 3 * 2 + 2
    p.flat[...] = 3
    assert all((host(model, a) == 3).all() for a in (*p.W, *p.b))
    p.W[1][...] = 4
    assert int((host(model, p.flat) == 4).sum()) == 6


def test_the_same_seed_gives_the_same_weights_on_every_device(device: str) -> None:
    here, reference = gb.MLP([5, 7, 2], seed=3, device=device), gb.MLP([5, 7, 2], seed=3, device="reference")
    assert np.array_equal(host(here, here.parameters.flat), reference.parameters.flat)
    other = gb.MLP([5, 7, 2], seed=4, device=device)
    assert not np.array_equal(host(other, other.parameters.flat), reference.parameters.flat)


def test_two_runs_give_the_same_bits(device: str, rng: np.random.Generator) -> None:
    model = gb.MLP([13, 37, 5], "silu", device=device)
    X, y = random_batch(model, 33, rng)
    loss, gradients = model.loss_and_gradients(X, y)
    again, gradients2 = model.loss_and_gradients(X, y)
    assert float(loss) == float(again)
    assert np.array_equal(gradients.flat, gradients2.flat)


def test_a_network_moves_to_another_device_and_back(device: str, rng: np.random.Generator) -> None:
    model = gb.MLP([4, 5, 2], "elu", "mean_squared_error", dtype="float64", seed=7, dropout=0.25)
    there = model.to(device)
    assert there.device == gb.get_backend(device).device
    assert (there.dropout, there.seed, there.loss, there.activations) == (0.25, 7, model.loss, model.activations)
    X = rng.normal(size=(3, 4))
    assert_within(there.forward(X), model.forward(X), 1e-14 * 10)
    assert np.array_equal(there.to("cpu").parameters.flat, model.parameters.flat)


def test_a_network_without_hidden_layers_is_linear(device: str, rng: np.random.Generator) -> None:
    model = gb.MLP([4, 3], loss="mean_squared_error", device=device, dtype="float64")
    X = rng.normal(size=(5, 4))
    assert_within(model.forward(X), X @ host(model, model.parameters.W[0]), 1e-14)
    assert "no hidden layer" in repr(model)


def test_one_activation_for_each_layer(device: str, rng: np.random.Generator) -> None:
    leaky = ACTIVATIONS["leaky_relu"](negative_slope=0.5)
    model = gb.MLP([4, 3, 3, 3, 2], ["relu", leaky, "sin"], device=device, dtype="float64")
    trace = model.trace(*random_batch(model, 5, rng))
    z = [layer.z for layer in trace.layers]
    assert np.array_equal(trace.layers[0].h, np.maximum(z[0], 0))
    assert np.array_equal(trace.layers[1].h, np.where(z[1] > 0, z[1], 0.5 * z[1]))
    assert_within(trace.layers[2].h, np.sin(z[2]), 4 * eps("float64"))
    assert "relu, leaky_relu(negative_slope=0.5), sin" in repr(model)


# ---------------------------------------------------------------------- other libraries


def test_torch_tensors_in_torch_tensors_out(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    model = gb.MLP([4, 5, 3])
    X, y = random_batch(model, 6, rng)
    x = torch.tensor(X, dtype=torch.float32, requires_grad=True)
    o = model.forward(x)
    assert isinstance(o, torch.Tensor)
    assert np.array_equal(o.numpy(), model.forward(X))
    assert isinstance(model.predict(x), torch.Tensor)
    loss, gradients = model.loss_and_gradients(x, torch.tensor(y))
    assert isinstance(gradients.W[0], torch.Tensor)
    assert float(loss) == float(model.loss_and_gradients(X, y)[0])


def test_state_dict_fits_torch(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")

    class Theirs(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Linear(4, 5), torch.nn.Linear(5, 3)])

        def forward(self, x: Any) -> Any:
            return self.layers[1](torch.tanh(self.layers[0](x)))

    torch.manual_seed(0)
    theirs, model = Theirs(), gb.MLP([4, 5, 3], "tanh")
    X = rng.normal(size=(6, 4)).astype(np.float32)
    theirs.load_state_dict({name: torch.from_numpy(a) for name, a in model.state_dict().items()})
    tolerance = 32 * eps("float32")  # sums of 5 terms near 1, twice
    assert_within(theirs(torch.from_numpy(X)).detach().numpy(), model.forward(X), tolerance)
    other = Theirs()
    model.load_state_dict(other.state_dict())
    assert_within(other(torch.from_numpy(X)).detach().numpy(), model.forward(X), tolerance)


def test_training_is_that_of_pytorch(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    model = gb.MLP([4, 6, 3], "tanh", dtype="float64", device="reference")
    X, y = random_batch(model, 8, rng)
    state = model.state_dict()
    theirs = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)).double()
    theirs.load_state_dict(
        {f"{2 * i}.{k}": torch.from_numpy(state[f"layers.{i}.{k}"]) for i in (0, 1) for k in ("weight", "bias")}
    )
    optimizer = torch.optim.Adam(theirs.parameters(), lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(theirs(torch.from_numpy(X)), torch.from_numpy(y)).backward()
        optimizer.step()
    model.fit(X, y, epochs=20, batch_size=8, optimizer=gb.Adam(0.01), progress=False)
    # Adam divides by the gradient's size, so a rounding of a small gradient counts; 20 steps of 0.01
    assert_within(model.state_dict()["layers.0.weight"], theirs[0].weight.detach().numpy(), 1e-10)


def test_lists_and_integers_are_taken(device: str) -> None:
    model = gb.MLP([2, 3, 2], device=device)
    assert model.forward([[1, 2], [3, 4]]).shape == (2, 2)
    assert model.forward(np.array([[1, 2], [3, 4]], np.uint8)).dtype == np.float32
    fortran = np.asfortranarray(np.arange(6.0).reshape(3, 2))
    assert np.array_equal(model.forward(fortran), model.forward(np.ascontiguousarray(fortran)))
    assert np.array_equal(model.forward(fortran[::2]), model.forward(fortran[::2].copy()))


def test_nan_in_the_input_is_nan_in_the_output(device: str) -> None:
    model = gb.MLP([2, 3, 2], "relu", device=device)
    o = model.forward(np.array([[np.nan, 1.0], [1.0, 1.0]], np.float32))
    assert np.isnan(o).tolist() == [[True, True], [False, False]]


def test_load_state_dict_takes_all_or_nothing(device: str) -> None:
    model = gb.MLP([2, 3, 2], device=device)
    before = host(model, model.parameters.flat).copy()
    good = model.state_dict()
    cases = [
        ({k: v for k, v in good.items() if k != "layers.1.bias"}, r"missing \['layers.1.bias'\], not expected none"),
        ({**good, "layers.2.bias": np.zeros(2)}, r"missing none, not expected \['layers.2.bias'\]"),
        ({**good, "layers.1.bias": np.zeros(3)}, r"layers.1.bias has shape \(3,\); this network has \(2,\)"),
        ({**good, "layers.0.weight": np.ones((3, 2)), "layers.1.bias": np.full(2, np.nan)}, "layers.1.bias holds NaN"),
    ]
    for state, message in cases:
        with pytest.raises(ValueError, match=message):
            model.load_state_dict(state)
        assert np.array_equal(host(model, model.parameters.flat), before)


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (np.array([1e300, 0.0]), "layers.0.bias holds NaN or infinity, or numbers that overflow float32"),
        (np.array([np.nan, 0.0]), "layers.0.bias holds NaN or infinity"),
        (np.array([1 + 2j, 0]), "layers.0.bias is not an array of real numbers: complex128"),
        (np.array(["1", "2"]), "layers.0.bias is not an array of real numbers"),
        (np.array([1.0, None], object), "layers.0.bias is not an array of real numbers"),
        (np.ones((2, 1)), r"layers.0.bias has shape \(2, 1\); this network has \(2,\)"),
        ([[1.0], [2.0, 3.0]], "layers.0.bias is not an array"),
    ],
)
def test_parameters_are_taken_over_all_or_none(bias: Any, message: str) -> None:
    model = gb.MLP([2, 2], device="reference")
    before = model.parameters.flat.copy()
    state = {"layers.0.weight": np.ones((2, 2)), "layers.0.bias": bias}
    with pytest.raises(ValueError, match=message):
        model.load_state_dict(state)
    assert np.array_equal(model.parameters.flat, before)


def test_parameters_are_numbers_of_any_kind() -> None:
    model = gb.MLP([2, 2], device="reference")
    model.load_state_dict({"layers.0.weight": [[1, 2], [3, 4]], "layers.0.bias": np.array([1, 0], np.int8)})
    assert model.parameters.W[0].tolist() == [[1, 3], [2, 4]]
    assert model.parameters.b[0].tolist() == [1, 0]
    with pytest.raises(ValueError, match="holds NaN or infinity, or numbers that overflow float16"):
        gb.MLP([2, 2], device="reference", dtype="float16").load_state_dict(
            model.state_dict() | {"layers.0.bias": [7e4, 0]}
        )
    for names in ({"x": 1, 2: 3}, None, ["layers.0.weight"]):
        with pytest.raises(ValueError, match="state_dict does not fit: missing"):
            model.load_state_dict(names)  # type: ignore[arg-type]


def test_numpy_scalars_describe_a_network(tmp_path: Path) -> None:
    activation = gb.activations.ACTIVATIONS["elu"](alpha=np.float32(0.5))
    loss = gb.losses.LOSSES["softmax_cross_entropy"](label_smoothing=np.float32(0.25))
    sizes = np.array([5, 4, 2], np.int32)
    model = gb.MLP(sizes, activation, loss, "reference", seed=np.int64(3), dropout=np.float32(0.5))
    model.save(tmp_path / "net.safetensors")
    again = gb.load(tmp_path / "net.safetensors", device="reference")
    assert (again.layer_sizes, again.seed, again.dropout) == ((5, 4, 2), 3, 0.5)
    assert again.activations[0] == gb.activations.ACTIVATIONS["elu"](alpha=0.5)
    assert again.loss == gb.losses.LOSSES["softmax_cross_entropy"](label_smoothing=0.25)
    for bad in ({"seed": True}, {"seed": 1.0}, {"dropout": True}, {"dropout": "0.5"}):
        with pytest.raises(ValueError, match="it must be"):
            gb.MLP([5, 2], device="reference", **bad)
    with pytest.raises(ValueError, match="layer_sizes is"):
        gb.MLP([5, True], device="reference")


@pytest.mark.parametrize("weight", [None, np.array([0.0, 0.1, 0.2, 0.3, 0.7])])
def test_r2_of_targets_that_are_all_equal_is_0(weight):
    """Their mean, rounded, is another number, which left a spread of 1e-33 to divide by."""
    model = gb.MLP([1, 2], loss="mean_squared_error", dtype="float64", device="reference")
    y = np.full((5, 2), [0.1, -7.7])
    if weight is not None:
        y[0] = 3  # does not count
    assert model.evaluate(np.zeros((5, 1)), y, weight)["r2"] == 0
