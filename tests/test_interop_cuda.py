"""Arrays of other libraries on a GPU: taken where they are, after the work that makes them, and given back in kind.

The order of streams shows where work is done as late as streams allow it, on an emulated device in its lazy mode; elsewhere the
tests of it cannot fail.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.interop import as_array, kind_of, to_backend

pytestmark = pytest.mark.gpu
SIZES = [6, 8, 3]


class OnlyInterface:
    """Has ``__cuda_array_interface__``, version 3, and nothing else."""

    def __init__(self, array: Any, stream: Any = None) -> None:
        self.array, self.stream = array, stream

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        stream = None if self.stream is None else self.stream.ptr or 1
        return dict(self.array.__cuda_array_interface__, stream=stream)


class OnlyDlpack:
    """Has ``__dlpack__``, of the time before its second version, and orders the consumer's stream after its own."""

    def __init__(self, array: Any, stream: Any = None) -> None:
        import cupy

        self.array, self.stream = array, stream or cupy.cuda.Stream.null

    def __dlpack__(self, stream: int | None = None) -> Any:
        with self.stream:
            return self.array.__dlpack__(stream=stream)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


class Tensor:
    """Behaves as a torch tensor on a GPU where gpubackprop looks."""

    __module__ = "torch"

    def __init__(self, array: Any, requires_grad: bool = False) -> None:
        self.array, self.requires_grad, self.shape, self.ndim = array, requires_grad, array.shape, array.ndim
        self.device = SimpleNamespace(type="cuda")
        self.dtype = f"torch.{array.dtype.name}"

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, rows: slice) -> Any:
        return type(self)(self.array[rows])

    def reshape(self, *shape: int) -> Any:
        return type(self)(self.array.reshape(*shape))

    def detach(self) -> Tensor:
        return Tensor(self.array)

    def to(self, device: Any) -> Tensor:
        assert device.type == "cuda"
        return self

    def cpu(self) -> Any:
        raise AssertionError("a tensor on the GPU was copied to the host")

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        raise RuntimeError("Can't get __cuda_array_interface__ on Variable that requires grad.")

    def __dlpack__(self, *, stream: int | None = None, **options: Any) -> Any:
        if self.requires_grad:
            raise BufferError("Can't export tensors that require gradient, use tensor.detach()")
        return self.array.__dlpack__(stream=stream, **options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


class ArrayImpl(Tensor):
    """Behaves as a JAX array on a GPU: immutable, so without ``detach``, and called by its numpy module's names."""

    __module__ = "jaxlib._jax"
    detach = to = None  # type: ignore[assignment]

    def __init__(self, array: Any) -> None:
        super().__init__(array)
        self.dtype = array.dtype


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``torch`` and ``jax`` be modules that make the arrays above."""
    import cupy

    torch, jax = ModuleType("torch"), ModuleType("jax")
    torch.from_dlpack = lambda a: Tensor(cupy.from_dlpack(a))  # type: ignore[attr-defined]
    jax.numpy = SimpleNamespace(from_dlpack=lambda a: ArrayImpl(cupy.from_dlpack(a)))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "jax", jax)


def external_stream(handle: int) -> Any:
    """Return CuPy's stream for a handle of another library."""
    import cupy

    if not hasattr(cupy.cuda.Stream, "from_external"):  # before CuPy 14
        return cupy.cuda.ExternalStream(handle)
    return cupy.cuda.Stream.from_external(SimpleNamespace(__cuda_stream__=lambda: (0, handle)))


def data(dtype: Any = np.float32) -> Any:
    import cupy

    return cupy.asarray(np.random.default_rng(0).normal(size=(40, 6)), dtype)


def numba_array(array: Any) -> Any:
    from gpubackprop.kernels.cuda.numba import cuda

    return cuda.as_cuda_array(array, sync=False)


PRODUCERS: dict[str, Callable[[Any], Any]] = {
    "cupy": lambda a: a,
    "interface": OnlyInterface,
    "dlpack": OnlyDlpack,
    "numba": numba_array,
    "torch": Tensor,
    "torch with a gradient": lambda a: Tensor(a, requires_grad=True),
    "jax": ArrayImpl,
}
KINDS = {"torch": Tensor, "torch with a gradient": Tensor, "jax": ArrayImpl}


@pytest.mark.parametrize("name", PRODUCERS)
def test_an_array_on_the_gpu_is_taken_where_it_is(name: str) -> None:
    X = data()
    taken = to_backend(gb.get_backend("cuda"), as_array(PRODUCERS[name](X)))
    assert taken.data.ptr == X.data.ptr
    assert taken.shape == X.shape
    assert taken.dtype == X.dtype


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("name", PRODUCERS)
def test_what_comes_out_is_of_the_kind_that_came_in_and_never_left_the_gpu(name: str) -> None:
    import cupy

    X, y = data(), np.arange(40) % 3
    model = gb.MLP(SIZES, "tanh", device="cuda", seed=3)
    expected = gb.MLP(SIZES, "tanh", device="cuda", seed=3).forward(X)
    given = PRODUCERS[name](X)
    results = [model.forward(given), model.predict(given), model.loss_and_gradients(given, y)[1].flat]
    for result in results:
        assert type(result) is KINDS.get(name, cupy.ndarray)
    np.testing.assert_array_equal(cupy.asnumpy(getattr(results[0], "array", results[0])), cupy.asnumpy(expected))


def test_nothing_is_copied_to_the_host_and_the_host_does_not_wait() -> None:
    import cupy

    ledger = pytest.importorskip("ledger", reason="counts need an emulated device")
    if not ledger.available():
        pytest.skip("counts need an emulated device")
    model, X, other = gb.MLP(SIZES, device="cuda"), data(), cupy.cuda.Stream(non_blocking=True)
    for make in (OnlyInterface, OnlyDlpack):
        model.forward(make(X, other))
        with ledger.record(level=1) as record:
            model.forward(make(X, other))
            counts = record.to_dict()["host"]
        assert counts["event_waits"] == 1
        for name in ("synchronizations", "copies_d2h", "copies_h2d"):
            assert counts.get(name, 0) == 0, (make, name)


@pytest.mark.parametrize("make", [OnlyInterface, OnlyDlpack])
@pytest.mark.parametrize("ours", [False, True])
def test_a_pass_comes_after_the_work_that_makes_its_input(make: Any, ours: bool) -> None:
    import cupy

    values, y = data(), np.arange(40) % 3
    model = gb.MLP(SIZES, "tanh", device="cuda", seed=3)
    expected = cupy.asnumpy(model.forward(values)), model.loss_and_gradients(values, y)[1].flat.get()
    X, other = cupy.zeros_like(values), cupy.cuda.Stream(non_blocking=True)
    model.backend.synchronize()
    with cupy.cuda.Stream(non_blocking=True) if ours else cupy.cuda.Stream.null as stream:
        for compute, result in zip(
            (model.forward, lambda given: model.loss_and_gradients(given, y)[1].flat), expected, strict=True
        ):
            with other:
                X[...] = values
            out = compute(make(X, other))
            stream.synchronize()
            np.testing.assert_array_equal(cupy.asnumpy(out), result)
            X[...] = 0
            stream.synchronize()


def test_a_stream_made_elsewhere_is_used_as_cupys_current_one() -> None:
    import cupy

    X, theirs = data(), cupy.cuda.Stream(non_blocking=True)
    model = gb.MLP(SIZES, device="cuda", seed=3)
    expected = cupy.asnumpy(model.forward(X))
    model.backend.synchronize()
    with external_stream(theirs.ptr):
        out = model.forward(X)
    theirs.synchronize()
    np.testing.assert_array_equal(cupy.asnumpy(out), expected)


@pytest.mark.usefixtures("libraries")
def test_bfloat16_tensors_are_taken_where_they_are() -> None:
    from gpubackprop.definitions import check_dtype

    X = data(check_dtype("bfloat16"))
    backend = gb.get_backend("cuda")
    assert to_backend(backend, Tensor(X), X.dtype).data.ptr == X.data.ptr
    out = gb.MLP(SIZES, device="cuda", dtype="bfloat16").forward(Tensor(X, requires_grad=True))
    assert out.dtype == "torch.float32"
    assert out.shape == (40, 3)


@pytest.mark.parametrize("make", [OnlyInterface, OnlyDlpack, numba_array])
def test_a_network_on_the_cpu_takes_them_too_and_gives_them_back_on_the_gpu(make: Any) -> None:
    import cupy

    X = data()
    out = gb.MLP(SIZES, device="cpu", seed=3).forward(make(X))
    assert type(out) is cupy.ndarray
    np.testing.assert_array_equal(out.get(), gb.MLP(SIZES, device="cpu", seed=3).forward(X.get()))


def test_fit_takes_them_with_labels_and_weights_on_the_gpu() -> None:
    import cupy

    X, y, w = data(), cupy.arange(40) % 3, cupy.linspace(0.1, 1, 40)
    results = []
    for make in (cupy.asnumpy, OnlyInterface, OnlyDlpack):
        model = gb.MLP(SIZES, device="cuda", seed=3)
        model.fit(make(X), make(y), epochs=1, batch_size=16, sample_weight=make(w), progress=False)
        results.append(model.parameters.flat.get())
    np.testing.assert_array_equal(results[1], results[0])
    np.testing.assert_array_equal(results[2], results[0])


def test_kinds() -> None:
    X = data()
    kinds = {name: kind_of(make(X)) for name, make in PRODUCERS.items()}
    assert kinds == {
        "cupy": "cupy", "interface": "cupy", "dlpack": "cupy", "numba": "cupy", "torch": "torch",
        "torch with a gradient": "torch", "jax": "jax",
    }  # fmt: skip
    assert kind_of([1, 2]) == kind_of(np.float32(1)) == kind_of(np.ones(2)) == "numpy"


def test_a_tensor_for_a_network_on_the_cpu_takes_the_way_of_its_own_library(monkeypatch: pytest.MonkeyPatch) -> None:
    X = data()
    host = SimpleNamespace(dtype="torch.float32", numpy=lambda: X.get())
    monkeypatch.setattr(Tensor, "cpu", lambda self: host)
    taken = to_backend(gb.get_backend("cpu"), Tensor(X, requires_grad=True))
    np.testing.assert_array_equal(taken, X.get())
