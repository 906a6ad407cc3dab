"""The backend contract: each method of each device against the reference, on ragged shapes; names, errors, one's own backend."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerances import assert_within, eps, matmul_tolerance, sum_tolerance

import gpubackprop as gb
from gpubackprop.activations import ACTIVATIONS
from gpubackprop.backends import BACKENDS, register_backend
from gpubackprop.backends.reference import ReferenceBackend
from gpubackprop.inspect.explain import random_batch
from gpubackprop.losses import LOSSES
from gpubackprop.step.operations import Matmul
from gpubackprop.step.state import C1, C2, CURSOR, FACTOR, NORM, RATE, STEPS

REFERENCE = gb.get_backend("reference")
# the devices under test are made once, and hypothesis may call a test body many times with one fixture
PROPERTY = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
CPU = gb.get_backend("cpu")
SIZES = st.integers(1, 40)
SEEDS = st.integers(0, 2**32 - 1)
FAST = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)


def on(backend: Any, *arrays: np.ndarray | None) -> list[Any]:
    """Return copies of arrays on a device."""
    return [None if a is None else backend.asarray(a.copy()) for a in arrays]


def host(backend: Any, *arrays: Any) -> list[np.ndarray]:
    """Return arrays on the host."""
    return [backend.to_numpy(a) for a in arrays]


def check_forward(backend: Any, entry: Any, z: np.ndarray, b: np.ndarray, in_place: bool) -> None:
    """Compare z + b and phi(z + b) with the reference."""
    z_here, b_here = on(backend, z, b)
    out = z_here if in_place else backend.zeros(z.shape, z.dtype)
    assert backend.bias_activation_forward(z_here, b_here, entry, out=out) is out
    pre = z + b
    expected = entry.phi(pre)
    # the same formula with other roundings: at most 16 of terms up to max(1, |z|) and |h|
    assert_within(host(backend, out)[0], expected, 16 * eps(z.dtype) * (1 + np.abs(pre) + np.abs(expected)))
    if not in_place:
        assert np.array_equal(host(backend, z_here)[0], pre)


def check_backward(backend: Any, entry: Any, dh: np.ndarray, z: np.ndarray, in_place: bool) -> None:
    """Compare delta and db with the reference; give only what ``needs`` names."""
    h = entry.phi(z)
    dh_here, at = on(backend, dh, h if entry.needs == "h" else z)
    out = dh_here if in_place else backend.zeros(dh.shape, dh.dtype)
    db = backend.zeros((dh.shape[1],), dh.dtype)
    db[...] = 7  # what was there must not matter
    z_and_h = (None, at) if entry.needs == "h" else (at, None)
    delta, db = host(backend, *backend.bias_activation_backward(dh_here, *z_and_h, entry, out=out, db=db))
    expected, _ = REFERENCE.bias_activation_backward(dh.copy(), z, h, entry)
    # phi' has terms up to max(1, |z|), at most 16 of them, each times dh
    assert_within(delta, expected, 32 * eps(dh.dtype) * np.abs(dh) * (1 + np.abs(z)))
    assert_within(db, delta.astype(np.float64).sum(axis=0), sum_tolerance(delta, dh.dtype, axis=0))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_fused_activation_is_that_of_the_reference(name: str, dtype: str, rng: np.random.Generator) -> None:
    backend, entry = gb.get_backend("cpu"), ACTIVATIONS[name]
    z, b, dh = (rng.normal(size=s).astype(dtype) * 4 for s in ((13, 21), 21, (13, 21)))
    check_forward(backend, entry, z, b, in_place=entry.needs == "h")  # as a step calls them
    check_backward(backend, entry, dh, z, in_place=True)


@settings(PROPERTY)
@given(n=SIZES, d=SIZES, in_place=st.booleans(), dtype=st.sampled_from(["float32", "float64"]), seed=SEEDS)
@pytest.mark.parametrize("name", ["softplus", "gelu"])  # one that needs h, one that needs z
def test_fused_activation_at_any_shape(name: str, n: int, d: int, in_place: bool, dtype: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    z, b, dh = (rng.normal(size=s).astype(dtype) * 3 for s in ((n, d), d, (n, d)))
    check_forward(CPU, ACTIVATIONS[name], z, b, in_place)
    check_backward(CPU, ACTIVATIONS[name], dh, z, in_place)


def check_loss(backend: Any, loss: Any, rng: np.random.Generator, n: int, d: int, dtype: str, **kind: bool) -> None:
    """Compare value, do, db (and o, where it is kept) with the reference."""
    model = gb.MLP([1, d], "relu", loss, "reference")
    _, y = random_batch(model, n, rng)
    if loss.targets == "classes" and not kind["indices"]:
        y = rng.dirichlet(np.ones(d), n)
    y = y if y.ndim == 1 else y.astype(dtype)
    z, b = (2 * rng.normal(size=s).astype(dtype) for s in ((n, d), d))
    weight = None
    if kind["weighted"]:
        weight = rng.uniform(0.1, 2, n).astype(dtype)
        weight /= weight.sum() if loss.reduction == "mean" else 1
    z_here, b_here, y_here, w_here = on(backend, z, b, y, weight)
    out = z_here if kind["in_place"] else backend.zeros(z.shape, dtype)
    value = backend.zeros((2,), np.float64)
    value[1] = 100.0
    result = backend.bias_loss(
        z_here, b_here, y_here, loss, w_here, out=out, db=backend.zeros((d,), dtype), value=value
    )
    value, do, db = host(backend, *result)

    o = z.copy()
    true_value, true_do, _ = REFERENCE.bias_loss(o, b, y, loss, weight)
    u = eps(dtype)
    ell, row_do = loss.per_sample(o, y)
    scale = loss.scale(n, d, kind["weighted"]) * (1 if weight is None else weight)
    # a row sums d terms of at most 1 + |o| + |t| log-probabilities each; then a few roundings of everything
    row = (d + 32) * u * (1 + np.abs(o).max(axis=1)) * (1 + np.abs(ell) + np.abs(row_do).sum(axis=1))
    assert_within(value[0], true_value[0], float(np.sum(scale * row)) + sum_tolerance(scale * ell, dtype))
    elements = (d + 32) * u * (1 + np.abs(o) + np.abs(row_do)) * np.broadcast_to(np.atleast_1d(scale)[:, None], (n, 1))
    assert_within(do, true_do, elements)
    assert_within(db, do.astype(np.float64).sum(axis=0), sum_tolerance(do, dtype, axis=0))
    grows = value[0] * (n if loss.reduction == "mean" else 1)
    assert value[1] == pytest.approx(100.0 + grows, rel=1e-14)  # one float64 sum of two numbers
    if not kind["in_place"]:
        assert np.array_equal(host(backend, z_here)[0], o)


LOSS_CASES = [(name, dtype) for name in sorted(LOSSES) for dtype in ("float32", "float64")]


@pytest.mark.parametrize(("name", "dtype"), LOSS_CASES)
def test_fused_loss_is_that_of_the_reference(name: str, dtype: str, rng: np.random.Generator) -> None:
    weighted = dtype == "float64"
    kind = {"in_place": True, "weighted": weighted, "indices": True}
    check_loss(gb.get_backend("cpu"), LOSSES[name](reduction="sum" if weighted else "mean"), rng, 11, 5, dtype, **kind)


@settings(PROPERTY)
@given(n=SIZES, d=st.integers(2, 40), in_place=st.booleans(), weighted=st.booleans(), indices=st.booleans(), seed=SEEDS)
@pytest.mark.parametrize("name", ["softmax_cross_entropy", "huber"])
def test_fused_loss_at_any_shape(
    name: str, n: int, d: int, in_place: bool, weighted: bool, indices: bool, seed: int
) -> None:
    kind = {"in_place": in_place, "weighted": weighted, "indices": indices}
    check_loss(CPU, LOSSES[name], np.random.default_rng(seed), n, d, "float32", **kind)


@settings(PROPERTY)
@given(
    m=SIZES,
    k=SIZES,
    n=SIZES,
    a_t=st.booleans(),
    b_t=st.booleans(),
    dtype=st.sampled_from(["float32", "float64"]),
    seed=SEEDS,
)
def test_matmul_takes_transposed_views(m: int, k: int, n: int, a_t: bool, b_t: bool, dtype: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(k, m) if a_t else (m, k)).astype(dtype)
    b = rng.normal(size=(n, k) if b_t else (k, n)).astype(dtype)
    a_here, b_here = on(CPU, a, b)
    a, a_here = (a.T, a_here.T) if a_t else (a, a_here)
    b, b_here = (b.T, b_here.T) if b_t else (b, b_here)
    out = CPU.zeros((m, n), dtype)
    assert CPU.matmul(a_here, b_here, out=out) is out
    expected = a.astype(np.float64) @ b.astype(np.float64)
    assert_within(host(CPU, out)[0], expected, matmul_tolerance(a, b, dtype))
    assert_within(host(CPU, CPU.matmul(a_here, b_here))[0], expected, matmul_tolerance(a, b, dtype))


@settings(PROPERTY)
@given(n=SIZES, N=SIZES, d=st.integers(0, 40), first=st.integers(0, 40), seed=SEEDS)
def test_gather_takes_the_rows_in_order(n: int, N: int, d: int, first: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    source = rng.normal(size=(N, d) if d else N).astype(np.float32)
    order = rng.integers(0, N, first + n)
    counters = np.array([3, first])
    source_here, order_here, counters_here = on(CPU, source, order, counters)
    out = CPU.zeros((n, d) if d else (n,), np.float32)
    CPU.gather(source_here, order_here, counters_here, out=out)
    assert np.array_equal(host(CPU, out)[0], source[order[first : first + n]])
    assert np.array_equal(host(CPU, counters_here)[0], counters)


@FAST
@pytest.mark.parametrize(("n", "d"), [(1, 1), (3, 37)])
def test_ragged_shapes_on_every_device(n: int, d: int, backend: Any, rng: np.random.Generator) -> None:
    z, b, dh = (rng.normal(size=s).astype(np.float32) * 3 for s in ((n, d), d, (n, d)))
    for name in ("tanh", "gelu"):
        check_forward(backend, ACTIVATIONS[name], z, b, in_place=name == "tanh")
        check_backward(backend, ACTIVATIONS[name], dh, z, in_place=name == "tanh")
    kind = {"in_place": d == 1, "weighted": d == 1, "indices": d > 1}
    check_loss(backend, LOSSES["softmax_cross_entropy"], rng, n, d + 1, "float32", **kind)
    check_loss(backend, LOSSES["huber"], rng, n, d, "float32", **kind)
    x_here, w_here = on(backend, z, dh)
    out = host(backend, backend.matmul(x_here.T, w_here))[0]
    assert_within(out, z.astype(np.float64).T @ dh, matmul_tolerance(z.T, dh, np.float32))


def test_gather_of_class_indices(backend: Any) -> None:
    source, order, counters = on(backend, np.array([5, 6, 7, 8]), np.array([3, 1, 0, 2]), np.array([0, 1]))
    out = backend.zeros((3,), np.int64)
    backend.gather(source, order, counters, out=out)
    assert host(backend, out)[0].tolist() == [6, 5, 7]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n", [1, 15, 1000])
def test_accumulate_adds_a_term_to_the_total(n: int, dtype: str, backend: Any, rng: np.random.Generator) -> None:
    total, term = rng.standard_normal((2, n)).astype(dtype)
    total_here, term_here, out = on(backend, total, term, np.zeros_like(term))
    backend.accumulate(None, term_here, out)
    np.testing.assert_array_equal(*host(backend, out, term_here))
    backend.accumulate(total_here, term_here, total_here)
    np.testing.assert_array_equal(host(backend, total_here)[0], total + term)


@FAST
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 1000])
def test_clip_has_the_norm_of_the_gradient(n: int, dtype: str, backend: Any, rng: np.random.Generator) -> None:
    g = rng.normal(size=n).astype(dtype)
    norm = float(np.sqrt(np.sum(g.astype(np.float64) ** 2)))
    for limit in (norm / 3, norm * 3):
        (g_here,) = on(backend, g)
        scalars = backend.zeros((8,), dtype)
        backend.clip(g_here, limit, scalars)
        got = host(backend, scalars)[0]
        assert got[NORM] == pytest.approx(norm, rel=(n + 4) * eps(dtype))
        assert got[FACTOR] == pytest.approx(min(1.0, limit / (norm + 1e-6)), rel=(n + 4) * eps(dtype))


@FAST
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_finite_gradient_is_clipped_whatever_its_size(dtype: str, backend: Any, rng: np.random.Generator) -> None:
    if backend.device == "cpu":
        pytest.skip("its kernel of the norm is another matter")
    top, unit = float(np.finfo(dtype).max), rng.uniform(0.5, 1, 37) * rng.choice([-1, 1], 37)
    for size in (top, top**0.75, top**0.5, 1.0, 0.0):
        g = (unit * size).astype(dtype)
        g_here, scalars = backend.asarray(g), backend.zeros((8,), dtype)
        backend.clip(g_here, 2.0, scalars)
        factor = float(host(backend, scalars)[0][FACTOR])
        u = max(size, 1.0)
        exact = min(1.0, 2 / u / (np.linalg.norm(g.astype(np.float64) / u) + 1e-6 / u))
        assert factor == pytest.approx(exact, rel=41 * eps(dtype), abs=float(np.finfo(dtype).smallest_subnormal))
        assert factor > 0
    for bad, expected in ((np.inf, 0.0), (np.nan, np.nan)):  # as in PyTorch
        g_here[5:6] = bad
        backend.clip(g_here, 2.0, scalars)
        assert_within(host(backend, scalars)[0][[NORM, FACTOR]], [bad, expected], 0)


WEIGHTS = [
    np.array([1.0, 3.0, 0.0, 4.0]), np.array([3e38, 1e38, 3e38, 2e38]), np.array([1e-45, 4e-45, 0.0, 3e-45]),
    np.array([1e-38, 1e38, 1e38, 0.0]), np.zeros(4), np.array([0.0, 0.0, 1e-45, 0.0]),
]  # fmt: skip


@FAST
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_weights_are_normalized_whatever_their_size(dtype: str, backend: Any) -> None:
    top = np.finfo(dtype).max
    for weights in (*WEIGHTS, np.full(4, top), np.full(4, float(np.finfo(dtype).smallest_subnormal))):
        weight = weights.astype(dtype)
        here, total = backend.asarray(weight), backend.zeros((1,), np.float64)
        got = host(backend, backend.normalize_weights(here, total=total))[0]
        exact = [Fraction(float(w)) for w in weight]
        expected = np.array([float(w / (sum(exact) or 1)) for w in exact])
        tiny = float(np.finfo(dtype).smallest_subnormal)
        assert_within(got, expected, 2 * eps(dtype) * expected + tiny)
        in_range = sum(exact) < Fraction(np.finfo(np.float64).max)
        assert host(backend, total)[0][0] == pytest.approx(float(sum(exact)) if in_range else np.inf, rel=1e-15)


@pytest.mark.parametrize("micro", [None, 2])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_mini_batch_of_weights_0_adds_nothing(reduction: str, micro: int | None, device: str, rng: Any) -> None:
    X, y = rng.normal(size=(12, 3)).astype(np.float32), np.arange(12) % 2
    weight = np.array([0.5, 1, 0, 2, 0, 0, 0, 0, 1, 0, 3, 1]) * (1e-300 if reduction == "mean" else 1)
    loss = gb.losses.LOSSES["softmax_cross_entropy"](reduction=reduction)
    model = gb.MLP([3, 4, 2], "tanh", loss, device)
    before = {name: value.copy() for name, value in model.state_dict().items()}
    expected = model.evaluate(X, y, sample_weight=weight)
    _, g = model.loss_and_gradients(X[8:], y[8:], sample_weight=weight[8:])
    options = {"batch_size": 4, "sample_weight": weight, "shuffle": False, "progress": False, "micro_batch_size": micro}
    history = model.fit(X, y, epochs=1, optimizer=gb.SGD(1e-9), **options)
    # the mean of the epoch is that over the samples with their weights, however they are spread over mini-batches
    assert history["loss"][0] == pytest.approx(expected["loss"], rel=1e-5)
    model.load_state_dict(before)
    start = model.backend.to_numpy(model.parameters.flat).copy()
    model.fit(X[4:], y[4:], epochs=1, optimizer=gb.SGD(0.5), **options | {"sample_weight": weight[4:]})
    moved = model.backend.to_numpy(model.parameters.flat) - start
    assert_within(moved, -0.5 * g.flat, 1e-6)


def test_column_sums_of_many_rows_are_exact_to_a_few_roundings(rng: np.random.Generator) -> None:
    # each term is lost, or rounded the same way, where it is added to a float32 sum of all before
    reference = gb.get_backend("reference")
    n, d = 300_000, 2
    delta = np.full((n, d), 1 + 2**-20, np.float32)
    delta[0, 1] = 2**24
    _, db = reference.bias_activation_backward(delta, None, delta, gb.activations.ACTIVATIONS["identity"])
    assert_within(db, delta.sum(axis=0, dtype=np.float64), eps("float32") * db)
    y = delta - 0.5
    _, _, db = reference.bias_loss(
        delta.copy(), np.zeros(d, np.float32), y, gb.losses.LOSSES["mean_squared_error"](reduction="sum")
    )
    assert_within(db, np.full(d, n), [2**-22 * n, 4 + 2**-22 * n])


@FAST
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_normalized_weights_sum_to_one(dtype: str, backend: Any, rng: np.random.Generator) -> None:
    weight = rng.uniform(0, 3, 37).astype(dtype)
    (here,) = on(backend, weight)
    got = host(backend, backend.normalize_weights(here))[0]
    assert_within(got, weight / weight.astype(np.float64).sum(), 40 * eps(dtype) * got)


@FAST
@pytest.mark.parametrize(("n", "d"), [(1, 1), (3, 5), (16, 16), (7, 33)])
def test_dropout_drops_the_same_elements_as_the_reference(
    n: int, d: int, backend: Any, rng: np.random.Generator
) -> None:
    x = rng.normal(size=(n, d)).astype(np.float32)
    for seed, layer, step in ((0, 0, 0), (2**63 + 5, 2, 2**31 + 1)):
        x_here, counters = on(backend, x, np.array([step, 0]))
        expected = REFERENCE.dropout(x, 0.3, seed, layer, np.array([step, 0]))
        assert np.array_equal(host(backend, backend.dropout(x_here, 0.3, seed, layer, counters))[0], expected)
        backend.dropout(x_here, 0.3, seed, layer, counters, out=x_here)
        assert np.array_equal(host(backend, x_here)[0], expected)


def run_optimizer(
    backend: Any, optimizer: Any, theta: np.ndarray, gradients: list[np.ndarray]
) -> tuple[np.ndarray, ...]:
    """Return parameters, states, scalars and counters after one step for each gradient."""
    dtype = theta.dtype
    p, counters = on(backend, theta, np.zeros(2, np.int64))
    rate = backend.asarray(np.array([optimizer.schedule.learning_rate]))
    scalars, states = backend.zeros((8,), dtype), backend.zeros((optimizer.n_states, len(theta)), dtype)
    scalars[FACTOR] = 1
    for gradient in gradients:
        g = backend.asarray(gradient.copy())
        if optimizer.clipping[0] is not None:
            backend.clip(g, optimizer.clipping[0], scalars)
        backend.advance(optimizer, rate, 4, counters, scalars)
        backend.update(optimizer, p, g, states, scalars)
        assert np.array_equal(backend.to_numpy(g), gradient)  # clipped, not changed
    return tuple(host(backend, p, states, scalars, counters))


OPTIMIZERS = [
    gb.SGD(0.1), gb.SGD(gb.Cosine(0.1, steps=4), momentum=0.9, nesterov=True, weight_decay=0.1),
    gb.Adam(0.1, amsgrad=True, clip_norm=0.5), gb.AdamW(gb.OneCycle(0.1, steps=5)), gb.Lion(0.1, clip_value=0.3),
    gb.RMSprop(0.1, centered=True, momentum=0.5), gb.Adagrad(0.1, lr_decay=0.5),
]  # fmt: skip


@FAST
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: type(o).__name__)
def test_update_is_that_of_the_reference(optimizer: Any, dtype: str, backend: Any, rng: np.random.Generator) -> None:
    theta = rng.normal(size=33).astype(dtype)
    gradients = [rng.normal(size=33).astype(dtype) for _ in range(5)]
    p, states, scalars, counters = run_optimizer(backend, optimizer, theta, gradients)
    true_p, true_states, true_scalars, true_counters = run_optimizer(REFERENCE, optimizer, theta, gradients)
    assert counters.tolist() == true_counters.tolist() == [5, 20]
    assert counters[STEPS] == 5
    assert counters[CURSOR] == 20
    # 5 steps of at most 20 roundings; centered RMSprop divides by sqrt(v - m^2), which may lose a factor of 10
    tolerance = 1000 * eps(dtype)
    assert_within(
        scalars[[RATE, C1, C2, FACTOR]],
        true_scalars[[RATE, C1, C2, FACTOR]],
        tolerance * np.abs(true_scalars[[RATE, C1, C2, FACTOR]]),
    )
    assert_within(p, true_p, tolerance * (1 + np.abs(true_p)))
    assert_within(states, true_states, tolerance * (1 + np.abs(true_states)))


def test_zeros_are_aligned_to_64_bytes(backend: Any) -> None:
    for shape in ((1,), (3, 5), (0, 4), (2, 7)):
        for dtype in (np.float32, np.float64, np.int64):
            a = backend.zeros(shape, dtype)
            pointer = a.ctypes.data if isinstance(a, np.ndarray) else a.data.ptr
            assert a.size == 0 or pointer % 64 == 0
            assert a.shape == shape
            assert a.dtype == dtype
            assert not host(backend, a)[0].any()


def test_asarray_copies_only_what_it_must(backend: Any) -> None:
    here = backend.asarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    assert backend.asarray(here) is here or backend.asarray(here).base is here.base
    assert backend.asarray(here.T).flags.c_contiguous
    assert backend.asarray(here, np.float64).dtype == np.float64
    assert host(backend, backend.asarray([[1, 2]], np.float32))[0].tolist() == [[1.0, 2.0]]


def test_results_without_out_are_those_with_out(backend: Any, rng: np.random.Generator) -> None:
    tanh, loss = ACTIVATIONS["tanh"], LOSSES["mean_squared_error"]
    z, dh, y = (rng.normal(size=(3, 4)).astype(np.float32) for _ in range(3))
    b = rng.normal(size=4).astype(np.float32)
    first, second = on(backend, z, z)
    b_here, y_here = on(backend, b, y)
    h = backend.bias_activation_forward(first, b_here, tanh)
    assert np.array_equal(*host(backend, h, backend.bias_activation_forward(second, b_here, tanh, out=second)))
    d1, d2, z_here = on(backend, dh, dh, z)
    delta, db = backend.bias_activation_backward(d1, z_here, None, tanh)
    delta2, db2 = backend.bias_activation_backward(d2, z_here, None, tanh, out=d2)
    assert np.array_equal(*host(backend, delta, delta2))
    assert np.array_equal(*host(backend, db, db2))
    z1, z2 = on(backend, z, z)
    value, do, db = backend.bias_loss(z1, b_here, y_here, loss)
    value2, do2, db2 = backend.bias_loss(z2, b_here, y_here, loss, out=z2)
    for a, b in ((value, value2), (do, do2), (db, db2)):
        assert np.array_equal(*host(backend, a, b))


def test_nan_of_one_sample_stays_in_its_row(backend: Any) -> None:
    z = np.ones((3, 2), np.float32)
    z[1, 0] = np.nan
    (z_here,) = on(backend, z)
    h = host(backend, backend.bias_activation_forward(z_here, backend.zeros((2,), np.float32), ACTIVATIONS["relu"]))[0]
    assert np.isnan(h).tolist() == [[False, False], [True, False], [False, False]]


# ---------------------------------------------------------------------- names, errors, a custom backend


def test_devices_have_their_names(device: str, backend: Any) -> None:
    assert backend.device == {"cuda": "cuda:0"}.get(device, device)
    assert gb.get_backend(device) is backend
    assert gb.get_backend(backend) is backend


@pytest.mark.gpu
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_gpu_is_an_alias_of_cuda(backend: Any, device: str) -> None:
    assert gb.get_backend("gpu") is backend
    assert "cuda:0" in gb.available_devices()
    assert gb.get_backend("auto") is backend


def test_an_unknown_device_is_an_error_that_names_the_known() -> None:
    with pytest.raises(
        ValueError, match=r"unknown device 'cppu' \(did you mean 'cpu'\?\); choose from .*reference.*cuda"
    ):
        gb.get_backend("cppu")
    with pytest.raises(ValueError, match="unknown device 'cuda:x'; after the colon comes a number"):
        gb.get_backend("cuda:x")


def test_auto_is_the_cpu_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpubackprop.backends.cuda_problem", lambda index=0: "none")
    assert gb.get_backend("auto").device == "cpu"


class Counting(ReferenceBackend):
    """A custom backend: the reference, counting its products."""

    device = "counting"

    def __init__(self, index: int = 0) -> None:
        self.index = index
        self.products = 0

    def do_matmul(self, o: Matmul) -> None:
        self.products += 1
        super().do_matmul(o)


def test_a_backend_that_overrides_an_eager_method_is_told_what_to_override() -> None:
    with pytest.raises(
        TypeError, match=r"Wrong\.matmul would be used in eager calls and not in steps; override bind, or do_matmul"
    ):
        type("Wrong", (ReferenceBackend,), {"matmul": lambda self, a, b: a @ b})


@pytest.mark.parametrize("by_name", [False, True])
def test_a_backend_of_ones_own_drops_in(by_name: bool, rng: np.random.Generator) -> None:
    module = type("Module", (), {"Counting": Counting})
    import sys

    sys.modules["backend_of_ones_own"] = module  # type: ignore[assignment]
    try:
        register_backend("counting", "backend_of_ones_own:Counting" if by_name else Counting)
        model = gb.MLP([3, 4, 2], device="counting:7")
        assert model.backend.index == 7
        assert model.device == "counting"
        X, y = rng.normal(size=(10, 3)), rng.integers(0, 2, 10)
        model.fit(X, y, epochs=2, batch_size=5, progress=False)
        assert model.backend.products == 2 * 2 * 5  # two epochs of two steps of five products
        model.step(5, gb.SGD(0.1)).compile()()
        assert gb.get_backend("counting") is gb.get_backend("counting")
    finally:
        BACKENDS.pop("counting", None)
        del sys.modules["backend_of_ones_own"]


def test_a_backend_name_with_a_colon_is_an_error() -> None:
    with pytest.raises(ValueError, match="backend name is 'my:gpu'; use letters, digits and underscores"):
        register_backend("my:gpu", Counting)
