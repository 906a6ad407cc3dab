"""Losses: golden values, PyTorch's values and gradients, weights, reductions, label smoothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tolerances import assert_within, eps

import gpubackprop as gb
from gpubackprop.inspect.explain import random_batch
from gpubackprop.losses import LOSSES, Loss, loss

GOLDEN = json.loads((Path(__file__).parent / "golden" / "golden.json").read_text(encoding="utf-8"))
NAMES = sorted(LOSSES)
ROWS = [[0.5, -1.25, 2.0], [80.0, -80.0, 0.0], [1000.0, 999.0, 998.0], [-3.0, -3.0, -3.0]]
DISTRIBUTIONS = [[0.25, 0.25, 0.5], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.5, 0.0, 0.5]]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", sorted(GOLDEN["elementwise"]))
def test_elementwise_losses_have_their_golden_values(name: str, dtype: str) -> None:
    o, t, ell, dell = np.array([[float(value) for value in row] for row in GOLDEN["elementwise"][name]]).T
    value, gradient = LOSSES[name].per_sample(o[:, None].astype(dtype), t[:, None].astype(dtype))
    # four roundings of terms up to max(|o|, |o t|, ell); sigmoid(o) - t cancels to within a rounding of 1
    assert_within(value, ell, 8 * eps(dtype) * (1e-30 + np.abs(ell) + np.abs(o * t)))
    assert_within(gradient[:, 0], dell, 8 * eps(dtype) * (np.abs(dell) + np.abs(t) + (name == "sigmoid_cross_entropy")))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("key", sorted(GOLDEN["softmax"]))
def test_softmax_losses_have_their_golden_values(key: str, dtype: str) -> None:
    name, smoothing = key.split()
    entry = LOSSES[name] if name == "kl_divergence" else LOSSES[name](label_smoothing=float(smoothing))
    value, do = entry.per_sample(np.array(ROWS, dtype), np.array(DISTRIBUTIONS, dtype))
    # log softmax is rounded relative to the largest |o_j - max o|, up to 160 here
    spread = np.ptp(np.array(ROWS), axis=1) + 1
    assert_within(value, [float(row[0]) for row in GOLDEN["softmax"][key]], 8 * eps(dtype) * spread)
    expected = [[float(v) for v in row[1]] for row in GOLDEN["softmax"][key]]
    assert_within(do, expected, 8 * eps(dtype) * spread[:, None])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", NAMES)
def test_nan_in_the_outputs_is_nan_in_the_loss(name: str, dtype: str) -> None:
    model = gb.MLP([1, 3], "relu", name, "reference")
    _, y = random_batch(model, 2, np.random.default_rng(0))
    o = np.array([[0.5, np.nan, 0.25], [1.0, 2.0, 0.5]], dtype)
    value, do = LOSSES[name].per_sample(o, y if y.ndim == 1 else y.astype(dtype))
    assert np.isnan(value).tolist() == [True, False]
    assert np.isnan(do[0, 1])
    assert np.isfinite(do[1]).all()


def theirs(torch: Any, name: str, reduction: str) -> Any:
    """Return PyTorch's loss of (o, t); kl_divergence is its own mean over the batch."""
    nn = torch.nn.functional
    if name == "kl_divergence":
        name_of_theirs = {"mean": "batchmean", "sum": "sum"}[reduction]
        return lambda o, t: nn.kl_div(nn.log_softmax(o, 1), t, reduction=name_of_theirs)
    functions = {
        "mean_squared_error": nn.mse_loss, "mean_absolute_error": nn.l1_loss, "huber": nn.huber_loss,
        "softmax_cross_entropy": nn.cross_entropy, "sigmoid_cross_entropy": nn.binary_cross_entropy_with_logits,
    }  # fmt: skip
    if name == "poisson":
        return lambda o, t: nn.poisson_nll_loss(o, t, reduction=reduction)
    if name == "hinge":
        return lambda o, t: getattr(torch, reduction)(torch.clamp(1 - o * t, min=0))
    return lambda o, t, **kw: functions[name](o, t, reduction=reduction, **kw)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_are_those_of_pytorch(name: str, reduction: str, rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    model = gb.MLP([4, 3], "relu", LOSSES[name](reduction=reduction), "reference", "float64")
    X, y = random_batch(model, 9, rng)
    value, gradients = model.loss_and_gradients(X, y)
    W = torch.tensor(model.parameters.W[0], requires_grad=True)
    expected = theirs(torch, name, reduction)(torch.tensor(X) @ W, torch.tensor(y))
    expected.backward()
    assert float(value) == pytest.approx(expected.item(), rel=1e-14)  # 27 terms in another order
    assert_within(gradients.W[0], W.grad.numpy(), 1e-14 * 9 * 10)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("dense", [False, True])
def test_label_smoothing_is_that_of_pytorch(smoothing: float, dense: bool, rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    o = rng.normal(size=(6, 4)) * 3
    y = rng.dirichlet(np.ones(4), 6) if dense else rng.integers(0, 4, 6)
    x = torch.tensor(o, requires_grad=True)
    expected = torch.nn.functional.cross_entropy(x, torch.tensor(y), label_smoothing=smoothing, reduction="sum")
    expected.backward()
    value, do = LOSSES["softmax_cross_entropy"](label_smoothing=smoothing).per_sample(o, y)
    assert value.sum() == pytest.approx(expected.item(), rel=1e-14)
    assert_within(do, x.grad.numpy(), 16 * eps("float64"))


@pytest.mark.parametrize("delta", [0.25, 3.0])
def test_huber_with_another_delta_is_that_of_pytorch(delta: float, rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    o, t = rng.normal(size=(2, 6, 4)) * 3
    expected = torch.nn.functional.huber_loss(torch.tensor(o), torch.tensor(t), delta=delta, reduction="none").sum(1)
    assert_within(LOSSES["huber"](delta=delta).per_sample(o, t)[0], expected.numpy(), 1e-13)


def test_indices_and_one_hot_rows_give_the_same_bits(device: str, rng: np.random.Generator) -> None:
    model = gb.MLP([3, 4, 5], device=device)
    X, y = rng.normal(size=(8, 3)), rng.integers(0, 5, 8)
    a, ga = model.loss_and_gradients(X, y)
    b, gb_ = model.loss_and_gradients(X, np.eye(5)[y])
    assert float(a) == float(b)
    assert np.array_equal(ga.flat, gb_.flat)


@pytest.mark.parametrize("name", ["mean_squared_error", "softmax_cross_entropy"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_weight_of_two_is_the_sample_twice(name: str, reduction: str, device: str, rng: np.random.Generator) -> None:
    model = gb.MLP([3, 4, 3], "tanh", LOSSES[name](reduction=reduction), device, "float64")
    X, y = random_batch(model, 6, rng)
    times = np.array([1, 2, 0, 3, 1, 1])
    weighted, g1 = model.loss_and_gradients(X, y, sample_weight=times.astype(float))
    repeated, g2 = model.loss_and_gradients(np.repeat(X, times, axis=0), np.repeat(y, times, axis=0))
    assert float(weighted) == pytest.approx(float(repeated), rel=1e-14)
    assert_within(g1.flat, g2.flat, 1e-13)  # sums of 8 terms below 5


def test_the_mean_does_not_depend_on_the_scale_of_the_weights(device: str, rng: np.random.Generator) -> None:
    model = gb.MLP([3, 4, 3], device=device, dtype="float64")
    X, y = random_batch(model, 6, rng)
    plain, g = model.loss_and_gradients(X, y)
    scaled, g7 = model.loss_and_gradients(X, y, sample_weight=np.full(6, 7.0))
    assert float(scaled) == pytest.approx(float(plain), rel=1e-14)
    assert_within(g7.flat, g.flat, 1e-14)


def test_kl_divergence_is_cross_entropy_minus_entropy(rng: np.random.Generator) -> None:
    o, t = rng.normal(size=(5, 4)), rng.dirichlet(np.ones(4), 5)
    cross, do = LOSSES["softmax_cross_entropy"].per_sample(o, t)
    kl, do_kl = LOSSES["kl_divergence"].per_sample(o, t)
    assert_within(kl, cross + (t * np.log(t)).sum(axis=1), 32 * eps("float64"))
    assert np.array_equal(do, do_kl)
    assert (kl > 0).all()


def test_the_loss_of_one_class_far_ahead_is_exact_and_finite() -> None:
    o = np.array([[1e4, 0.0], [0.0, 1e4]], np.float32)
    value, do = LOSSES["softmax_cross_entropy"].per_sample(o, np.array([0, 0]))
    assert value.tolist() == [0.0, 1e4]
    assert do.tolist() == [[0.0, 0.0], [-1.0, 1.0]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LOSSES["huber"](delta=0), "delta is 0; it must be a number > 0"),
        (
            lambda: LOSSES["softmax_cross_entropy"](label_smoothing=1.0),
            r"label_smoothing is 1\.0; it must be in \[0, 1\)",
        ),
        (lambda: LOSSES["huber"](reduction="max"), "unknown reduction 'max'; choose from mean, sum"),
        (lambda: LOSSES.resolve("mze"), "unknown loss 'mze'.*; choose from mean_squared_error"),
    ],
)
def test_errors_say_what_is_allowed(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_loss_of_ones_own_drops_in(device: str, rng: np.random.Generator) -> None:
    @loss()
    def log_cosh(real: Any, m: Any) -> Any:
        exp, log1p, tanh, fabs, two, log_2 = m.exp, m.log1p, m.tanh, m.fabs, real(2), real(np.log(2))

        def ell(o: Any, t: Any) -> Any:
            r = fabs(o - t)
            return r + log1p(exp(-two * r)) - log_2

        def dell(o: Any, t: Any) -> Any:
            return tanh(o - t)

        return ell, dell

    try:
        model = gb.MLP([3, 4, 2], "tanh", "log_cosh", device, "float64")
        X, y = rng.normal(size=(5, 3)), rng.normal(size=(5, 2))
        assert float(model.loss_and_gradients(X, y)[0]) == pytest.approx(
            np.log(np.cosh(model.forward(X) - y)).mean(), rel=1e-13
        )
        assert gb.check_gradients(model, X, y).ok
        assert set(model.evaluate(X, y)) == {"loss", "r2"}
    finally:
        del LOSSES["log_cosh"]


LENGTHS = [4, 300, 8200]  # of rows, one for each of the kernels of a GPU


@pytest.mark.parametrize("d", LENGTHS)
def test_a_number_added_to_all_outputs_changes_nothing(d: int, backend: Any, rng: np.random.Generator) -> None:
    o = rng.integers(-8, 9, size=(3, d)).astype(np.float32)
    y, no_bias = backend.asarray(np.array([0, 2, 3])), backend.zeros((d,), np.float32)
    results = []
    for added in (0, 2**20):  # exactly, as is the difference from the largest
        given = backend.asarray(o + np.float32(added))
        value, do, _ = backend.bias_loss(given, no_bias, y, LOSSES["softmax_cross_entropy"])
        results.append((backend.to_numpy(value)[0], backend.to_numpy(do)))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])


@pytest.mark.parametrize("d", LENGTHS)
def test_a_logit_of_minus_infinity_leaves_the_loss_of_other_classes_finite(d: int, backend: Any, rng: Any) -> None:
    o = rng.normal(size=(3, d)).astype(np.float32)
    o[:, 1] = -np.inf
    y, entry = np.array([0, 2, 3]), LOSSES["softmax_cross_entropy"]
    e = np.exp(o.astype(np.float64) - o.max(axis=1, keepdims=True))
    p = e / e.sum(axis=1, keepdims=True)
    no_bias = backend.zeros((d,), np.float32)
    targets = [backend.asarray(y), backend.asarray(np.eye(d, dtype=np.float32)[y])]
    for given in targets:
        value, do, _ = backend.bias_loss(backend.asarray(o.copy()), no_bias, given, entry)
        # log softmax is right to a few roundings of the spread of the outputs, about 8
        assert float(backend.to_numpy(value)[0]) == pytest.approx(-np.log(p[np.arange(3), y]).mean(), abs=1e-5)
        assert_within(backend.to_numpy(do), (p - np.eye(d)[y]) / 3, 1e-6)
    value, do, _ = backend.bias_loss(backend.asarray(o.copy()), no_bias, targets[1], LOSSES["kl_divergence"])
    assert np.isfinite(backend.to_numpy(value)).all()
    # a target on the class itself: the limit; no class possible, or a certain one beyond all numbers: not a number
    value, do, _ = backend.bias_loss(backend.asarray(o.copy()), no_bias, backend.asarray(np.array([1, 0, 0])), entry)
    assert float(backend.to_numpy(value)[0]) == np.inf
    assert np.isfinite(backend.to_numpy(do)).all()
    for limit in (np.full((3, d), -np.inf, np.float32), np.where(np.arange(d) == 2, np.float32(np.inf), o)):
        value, do, _ = backend.bias_loss(backend.asarray(limit), no_bias, targets[0], entry)
        assert np.isnan(backend.to_numpy(value)[0])
        assert np.isnan(backend.to_numpy(do)).any(axis=1).all()


INFINITE = [  # o, t, ell, dell
    ("sigmoid_cross_entropy", np.inf, 1.0, 0.0, 0.0), ("sigmoid_cross_entropy", np.inf, 0.0, np.inf, 1.0),
    ("sigmoid_cross_entropy", -np.inf, 0.0, 0.0, 0.0), ("sigmoid_cross_entropy", -np.inf, 0.5, np.inf, -0.5),
    ("sigmoid_cross_entropy", 60.0, 1.0, 8.75651076269652e-27, -8.75651076269652e-27),
    ("sigmoid_cross_entropy", -60.0, 0.0, 8.75651076269652e-27, 8.75651076269652e-27),
    ("poisson", np.inf, 2.0, np.inf, np.inf), ("poisson", -np.inf, 0.0, 0.0, 0.0), ("poisson", -np.inf, 2.0, np.inf, -2.0),
    ("poisson", 1e4, 3.0, np.inf, np.inf), ("hinge", np.inf, 1.0, 0.0, 0.0), ("hinge", np.inf, -1.0, np.inf, 1.0),
    ("huber", 1e30, 0.0, 1e30, 1.0), ("huber", -np.inf, 0.0, np.inf, -1.0), ("mean_absolute_error", np.inf, 1.0, np.inf, 1.0),
    ("mean_squared_error", np.inf, 1.0, np.inf, np.inf), ("mean_squared_error", 1e15, 0.0, 1e30, 2e15),
]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_losses_have_their_limits(dtype: str, backend: Any) -> None:
    for name, o, t, ell, dell in INFINITE:
        outputs, targets = (backend.asarray(np.array([[v]], dtype)) for v in (o, t))
        value, do, _ = backend.bias_loss(outputs, backend.zeros((1,), dtype), targets, LOSSES[name])
        assert_within(backend.to_numpy(value)[0], ell, 0 if np.isinf(ell) else 4 * eps(dtype) * abs(ell))
        assert_within(backend.to_numpy(do)[0, 0], dell, 0 if np.isinf(dell) else 4 * eps(dtype) * abs(dell))


def test_the_two_strings_of_a_loss_are_asked_each_for_itself(rng: np.random.Generator) -> None:
    define = LOSSES["mean_squared_error"].define
    X, o = rng.normal(size=(9, 3)), np.array([[-2.0, 0.5]])
    expected = {None: o, "identity": o, "exp": np.exp(o), "sigmoid": [[0, 1]], "softmax": [1]}
    for targets in ("real", "counts", "binary", "signs", "classes", "distribution"):
        for mean_function, prediction in expected.items():
            mine: Any = Loss("mine", define, mean_function=mean_function, targets=targets)  # type: ignore[arg-type]
            signs = targets == "signs" and mean_function not in ("sigmoid", "softmax")
            np.testing.assert_array_equal(mine.kind.predict(o, np), [[-1, 1]] if signs else prediction)
            y = mine.kind.random(rng, 9, 2)
            mine.kind.check(y, 2, np, "mine")
            model = gb.MLP([3, 2], loss=mine, device="reference")
            assert model.predict(X).shape == ((9,) if mean_function == "softmax" else (9, 2))
    for strings in ({"targets": "labels"}, {"mean_function": "logit"}):
        with pytest.raises(ValueError, match=f"unknown {next(iter(strings))} .*; choose from "):
            _ = Loss("mine", define, **strings).kind  # type: ignore[arg-type]
