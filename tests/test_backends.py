"""The backend contract: each method of each device against the reference, on ragged shapes; names, errors, a custom backend."""

from __future__ import annotations

from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operation_checks import check, filled
from tolerances import assert_within, eps

import gpubackprop as gb
from gpubackprop.activations import ACTIVATIONS
from gpubackprop.backends import BACKENDS, register_backend
from gpubackprop.backends.cases import CASES, OpCase, cases, copied
from gpubackprop.backends.cpu import CpuBackend
from gpubackprop.backends.reference import ReferenceBackend
from gpubackprop.losses import LOSSES
from gpubackprop.step.operations import OPERATIONS, BiasLoss, Matmul
from gpubackprop.step.state import CURSOR, FACTOR, NORM

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


def on_the_cpu() -> list[Any]:
    """Return (case, dtype) for the CPU; of most losses one variant for each dtype, since kernels are compiled."""
    return [
        pytest.param(case, dtype, id=f"{case}-{dtype}")
        for case in CASES.values()
        for dtype in ("float32", "float64")
        if dtype in case.dtypes
        and (case.kind is not BiasLoss or "huber" in case.name or ("weighted" in case.name) == (dtype == "float64"))
    ]


@pytest.mark.parametrize(("case", "dtype"), on_the_cpu())
def test_operations_are_those_of_the_reference(case: OpCase, dtype: str, rng: np.random.Generator) -> None:
    for shape in case.shapes:
        check(case, CPU, shape, dtype, rng)


@pytest.mark.parametrize(("case", "dtype"), on_the_cpu())
def test_an_operation_has_the_same_bits_when_threads_share_it(
    case: OpCase, dtype: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, found = filled(case, rng, case.shapes[-1], dtype), []
    for threads in (1, 3):
        monkeypatch.setattr("gpubackprop.kernels.cpu.threads.available_threads", lambda threads=threads: threads)
        for limit in ("SHARED_CALL", "GRAIN", "LEAST"):
            monkeypatch.setattr(f"gpubackprop.backends.cpu.{limit}", 1)
        backend = CpuBackend()
        for prepared in (False, True):
            arrays = copied(given, np.copy)
            operation = case.operation(arrays)
            for run in backend.prepare([operation]) if prepared else [partial(backend.execute, operation)]:
                run()
            found.append({name: a.tobytes() for name, a in arrays.items()})
    assert found[1:] == 3 * found[:1]


def test_large_eager_calls_are_shared_by_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpubackprop.kernels.cpu.threads.available_threads", lambda: 2)
    shared, backend = [], CpuBackend()
    share = CpuBackend._shared

    def count(self: Any, operation: Any, *rest: Any) -> Any:
        shared.append(operation.out.shape)
        return share(self, operation, *rest)

    monkeypatch.setattr(CpuBackend, "_shared", count)
    for n in (40, 400):
        a = np.ones((n, n), np.float32)
        backend.matmul(a, a)
    assert shared == [(400, 400)]


@settings(PROPERTY)
@given(rows=st.integers(1, 9), width=st.integers(60, 300), samples=st.integers(1, 20), seed=SEEDS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_long_rows_are_gathered(dtype: str, rows: int, width: int, samples: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    source, order = rng.standard_normal((samples, width)).astype(dtype), rng.integers(-2, samples + 2, 12)
    counters, out = np.zeros(2, np.int64), np.zeros((rows, width), dtype)
    counters[CURSOR] = cursor = rng.integers(0, 12)
    CPU.gather(source, order, counters, out=out)
    at = order[np.minimum(cursor + np.arange(rows), 11)].clip(0, samples - 1)
    np.testing.assert_array_equal(out, source[at])


def test_every_operation_has_a_case() -> None:
    assert {case.kind for case in CASES.values()} == set(OPERATIONS.values())
    assert len(CASES) == len(list(cases()))  # each has its own name


@settings(PROPERTY)
@given(data=st.data(), dtype=st.sampled_from(["float32", "float64"]), seed=SEEDS)
@pytest.mark.parametrize("name", [
    *(f"bias_activation_{name}" for name in ("forward softplus", "forward softplus, otherwise", "forward gelu",
    "forward gelu, otherwise", "backward softplus", "backward softplus, in place", "backward gelu", "backward gelu, in place")),
    "bias_loss huber", "bias_loss huber, weighted", "bias_loss huber, part", "matmul", "matmul, a.T", "matmul, b.T",
    "matmul, a.T, b.T", "gather",
])  # fmt: skip
def test_operations_at_any_shape(name: str, data: Any, dtype: str, seed: int) -> None:
    case = CASES[name]
    shape = tuple(data.draw(st.tuples(*[SIZES] * len(case.shapes[-1]))))
    check(case, CPU, shape, dtype, np.random.default_rng(seed))


@settings(PROPERTY)
@given(n=SIZES, d=st.integers(2, 40), seed=SEEDS)
@pytest.mark.parametrize("variant", ["", ", weighted", ", dense", ", dense, weighted"])
def test_the_softmax_loss_at_any_shape(variant: str, n: int, d: int, seed: int) -> None:
    check(CASES["bias_loss softmax_cross_entropy" + variant], CPU, (n, d), "float32", np.random.default_rng(seed))


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
