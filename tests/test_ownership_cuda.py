"""Who owns what on a GPU: scratch and workspaces, streams, the kernels of a capture, and the device that is current."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import warnings
from typing import Any

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.activations import ACTIVATIONS
from gpubackprop.features import Features
from gpubackprop.machine.diagnosis import installed

pytestmark = pytest.mark.gpu
planned = pytest.mark.skipif(installed("nvmath-python") is None, reason="products are planned with nvmath-python")


def data(rng: np.random.Generator, n: int = 8) -> tuple[np.ndarray, np.ndarray]:
    return rng.normal(size=(n, 3)).astype(np.float32), np.arange(n) % 2


def test_nothing_is_left_of_a_fit(rng: np.random.Generator) -> None:
    import cupy

    X, y = data(rng)
    model = gb.MLP([3, 4, 2], device="cuda")
    pool, used = cupy.get_default_memory_pool(), []
    for _ in range(5):
        model.fit(X, y, epochs=1, batch_size=3, progress=False)
        gc.collect()
        used.append(pool.used_bytes())
    assert used[-1] == used[1]
    assert not model.backend._launches._scratch
    assert len(model.backend._streams) <= 8


@planned
def test_a_step_has_scratch_and_workspace_of_its_own_and_no_more_than_its_products_need() -> None:
    backend: Any = gb.get_backend("cuda")

    def memory(run: Any) -> dict[int, int]:
        arrays = [f.workspace for f, _ in run.calls if hasattr(f, "workspace") and f.workspace is not None]
        arrays += [scratch for _, a in run.calls if a for one in a[0] for scratch in one.scratch]
        return {a.data.ptr: a.nbytes for a in arrays}

    runs = [gb.MLP([40, 24, 10], device=backend).step(33, "adam").compile() for _ in range(2)]
    first, second = map(memory, runs)
    assert first
    assert not set(first) & set(second)
    for side in (False, True):  # each branch has a workspace, and they are not the same
        products = [
            f for (f, a), place in zip(runs[0].calls, runs[0].places(), strict=True) if not a and place.side == side
        ]
        largest = max(f.plan.workspace for f in products)
        places = {f.workspace.data.ptr: f.workspace.nbytes for f in products if f.workspace is not None}
        assert sum(places.values()) <= -(-largest // 4096) * 4096
        others = [f.workspace for f, a in runs[0].calls if not a and f not in products and f.workspace is not None]
        assert not places.keys() & {a.data.ptr for a in others}


@pytest.mark.parametrize("ptds", [False, True])
def test_threads_on_one_stream_get_the_bits_they_get_alone(ptds: bool, rng: np.random.Generator) -> None:
    import cupy

    models = [gb.MLP([20, 16, 5], device="cuda", seed=seed) for seed in (1, 2)]
    X, y = rng.normal(size=(70, 20)).astype(np.float32), rng.integers(0, 5, 70)

    def results(model: Any) -> list[Any]:
        value, gradients = model.loss_and_gradients(X, y)
        return [float(value), gradients.flat.tobytes(), model.evaluate(X, y)["loss"], model.predict(X).tobytes()]

    expected = [results(model) for model in models]
    wrong: list[int] = []

    def work(i: int) -> None:
        with cupy.cuda.Stream.ptds if ptds else cupy.cuda.Stream.null:
            wrong.extend(i for _ in range(3) if results(models[i]) != expected[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@planned
def test_two_networks_on_two_streams_get_the_bits_they_get_alone(rng: np.random.Generator) -> None:
    import cupy

    X, y = rng.normal(size=(24, 20)).astype(np.float32), rng.integers(0, 5, 24)

    def prepared() -> tuple[Any, Any]:
        model = gb.MLP([20, 16, 5], device="cuda", dropout=0.25)
        step = model.step(24, "adam")
        step.names.array("X")[...] = model.backend.asarray(X)
        step.names.array("y")[...] = model.backend.asarray(y)
        return model, step.compile()

    alone, run = prepared()
    run(5)
    pairs = [prepared() for _ in range(2)]
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in pairs]
    alone.backend.synchronize()
    for _ in range(5):
        for (_, run), stream in zip(pairs, streams, strict=True):
            with stream:
                run()
    alone.backend.synchronize()
    for model, _ in pairs:
        np.testing.assert_array_equal(model.parameters.flat.get(), alone.parameters.flat.get())


def test_the_first_launch_of_a_thread_has_a_context(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpubackprop.backends.cuda import backend as cuda

    backend = cuda.CudaBackend(0)
    z, b, out = (backend.zeros(shape, np.float32) for shape in ((4, 3), (3,), (4, 3)))
    said: list[tuple[str, int]] = []
    launch = cuda.launch
    set_device = cuda.cupy.cuda.runtime.setDevice

    def run() -> None:
        backend.bias_activation_forward(z, b, ACTIVATIONS["tanh"], out=out)

    run()
    monkeypatch.setattr(cuda, "launch", lambda *a: (said.append(("launch", 0)), launch(*a))[1])
    monkeypatch.setattr(cuda.cupy.cuda.runtime, "setDevice", lambda i: (said.append(("device", i)), set_device(i))[1])
    for _ in range(2):
        thread = threading.Thread(target=lambda: (run(), run()))
        thread.start()
        thread.join()
        assert said == [("device", 0), ("launch", 0), ("launch", 0)]
        said.clear()


@planned
def test_what_a_capture_launches_has_been_loaded_before(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpubackprop.backends.cuda import backend as cuda
    from gpubackprop.backends.cuda import launcher
    from gpubackprop.backends.cuda import products as cublaslt

    backend = cuda.CudaBackend(0)
    loaded: set[Any] = set()
    get_function = launcher.driver.cuKernelGetFunction

    def note(kernel: Any) -> Any:
        loaded.add(int(kernel))
        return get_function(kernel)

    monkeypatch.setattr(launcher.driver, "cuKernelGetFunction", note)
    ran: list[str] = []
    call = cublaslt.Product.__call__
    monkeypatch.setattr(cublaslt.Product, "__call__", lambda self: (ran.append(self.plan.description), call(self))[1])
    models = [gb.MLP([6, 8, 3], "identity", device=backend) for _ in range(2)]
    run = models[0].step(16, "adam").compile()
    kernels = {int(one.kernel.handle) for _, arguments in run.calls if arguments for one in arguments[0]}
    assert kernels == loaded
    assert sorted(ran) == sorted({f.plan.description for f, a in run.calls if not a})
    ran.clear()
    models[1].step(16, "adam").compile()
    assert not ran  # of the second network nothing is new


@planned
def test_a_product_that_cublaslt_does_not_have_is_left_to_cublas_with_a_word(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    from gpubackprop.backends.cuda import backend as cuda
    from gpubackprop.backends.cuda import products as cublaslt

    X, y = data(rng, 12)

    def trained(backend: Any) -> Any:
        model = gb.MLP([3, 8, 2], device=backend)
        model.fit(X, y, epochs=2, batch_size=5, progress=False)
        return model.parameters.flat.get()

    expected = trained(cuda.CudaBackend(0))
    choose = cublaslt.Plan._choose

    def refuse(self: Any, alignment: int, workspace: int) -> None:
        if "(5x3) (3x8)" in self.description:
            raise cublaslt.UnsupportedProductError(f"cuBLASLt has no algorithm for {self.description}")
        choose(self, alignment, workspace)

    monkeypatch.setattr(cublaslt.Plan, "_choose", refuse)
    with pytest.warns(
        RuntimeWarning, match=r"no algorithm for \(5x3\) \(3x8\), float32 to float32.*cuBLAS computes it"
    ):
        result = trained(cuda.CudaBackend(0))
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6)


@planned
def test_an_epilogue_is_left_out_where_its_arrays_are_not_aligned(rng: np.random.Generator) -> None:
    from gpubackprop.backends.cuda import backend as cuda

    X, y = data(rng, 12)
    for dtype, micro in (("float32", 2), ("float32", 1), ("bfloat16", 2)):
        model = gb.MLP([3, 8, 2], "gelu_tanh", device=cuda.CudaBackend(0, epilogues="all"), dtype=dtype)
        reference = gb.MLP([3, 8, 2], "gelu_tanh", device="reference", dtype="float64")
        reference.load_state_dict(model.state_dict())
        options: Any = {"epochs": 1, "batch_size": 12, "micro_batch_size": micro, "optimizer": gb.SGD(0.1)}
        for one, inputs in ((model, X), (reference, X.astype(float))):
            one.fit(inputs, y, progress=False, shuffle=False, **options)
        # one step of SGD with rate 0.1: a gradient of size 1 with eps relative error moves by 0.1 eps
        slack = 1e-6 if dtype == "float32" else 1e-2
        assert np.abs(model.parameters.flat.get() - reference.parameters.flat).max() < slack


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_eager_products_take_transposed_views_and_refuse_others(dtype: str, rng: np.random.Generator) -> None:
    backend = gb.get_backend("cuda")
    a, b = (rng.integers(-3, 4, shape).astype(dtype) for shape in ((6, 10), (10, 8)))
    A, B = backend.asarray(a), backend.asarray(b)
    for left in (A, backend.asarray(a.T).T):
        for right in (B, backend.asarray(b.T).T):
            np.testing.assert_array_equal(backend.to_numpy(backend.matmul(left, right)), a @ b)
            np.testing.assert_array_equal(backend.to_numpy(backend.matmul(right.T, left.T)), b.T @ a.T)
    with pytest.raises(ValueError, match="not C-contiguous"):
        backend.matmul(A[:, ::2], B[::2])


def test_without_nvmath_products_are_float32_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpubackprop.backends.cuda import backend as cuda

    monkeypatch.setattr(cuda, "installed", lambda package: None)
    monkeypatch.setenv("CUPY_TF32", "1")
    import cupy
    from cupy._core._routines_linalg import COMPUTE_TYPE_TF32

    before = cupy._core.get_compute_type(np.float32)
    cupy._core.set_compute_type(np.float32, COMPUTE_TYPE_TF32)
    try:
        backend = cuda.CudaBackend(0)
        a = backend.asarray(np.full((128, 128), 1 + 2.0**-12, np.float32))
        product = backend.to_numpy(backend.matmul(a.T, backend.asarray(np.ones((128, 128), np.float32))))
        model = gb.MLP([128, 128], device=backend)
        model.parameters.W[0][...] = 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            predicted = model.predictor(128)(a).get()
    finally:
        cupy._core.set_compute_type(np.float32, before)
    np.testing.assert_array_equal(product, np.float32(128 + 128 * 2.0**-12))
    np.testing.assert_array_equal(predicted, product)


class Watch:
    """Counts what is put on the device, and how much of it while a backend's context is entered."""

    def __init__(self, record: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        from gpubackprop.backends.cuda import backend as cuda

        self.record, self.within, self.depth, self.started = record, 0, 0, 0
        enter, leave = cuda.Device.__enter__, cuda.Device.__exit__

        def entered(device: Any) -> Any:
            self.depth += 1
            if self.depth == 1:
                self.started = self.count()
            return enter(device)

        def left(device: Any, *error: Any) -> Any:
            self.depth -= 1
            if not self.depth:
                self.within += self.count() - self.started
            return leave(device, *error)

        monkeypatch.setattr(cuda.Device, "__enter__", entered)
        monkeypatch.setattr(cuda.Device, "__exit__", left)

    def count(self) -> int:
        r = self.record
        return int(
            r.launches
            + r.graph_launches
            + r.gemms
            + r.memsets
            + r.copies_h2d
            + r.copies_d2h
            + r.copies_d2d
            + r.allocations
        )


def test_everything_runs_with_the_networks_device_current(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator, tmp_path: Any
) -> None:
    ledger = pytest.importorskip("ledger", reason="counts need an emulated device")
    if not ledger.available():
        pytest.skip("counts need an emulated device")
    import os

    import cupy

    from gpubackprop.training.checkpoint import load_training, save
    from gpubackprop.training.history import Training

    if os.environ.get("EMULATOR_LAZY", "0") != "0":
        pytest.skip("work is counted where it is done, which is later")
    X, y = data(rng)
    weight = np.ones(8)
    C = cupy.asarray(X)
    with ledger.record(level=1) as record:
        watch = Watch(record, monkeypatch)

        def check(what: str, call: Any) -> Any:
            before, within = watch.count(), watch.within
            result = call()
            assert watch.count() - before == watch.within - within, what
            return result

        dtype = "bfloat16" if installed("nvmath-python") else "float32"
        model = check("MLP", lambda: gb.MLP([3, 4, 2], device="cuda", dtype=dtype, dropout=0.5))
        monitors = [gb.EarlyStopping(patience=1), gb.ReduceOnPlateau(patience=1)]
        options: Any = {"progress": False, "validation_data": (X, y), "callbacks": monitors}
        history = check("fit", lambda: model.fit(X, y, 2, 3, sample_weight=weight, **options))
        check("fit in parts", lambda: model.fit(X, y, 1, 4, micro_batch_size=2, progress=False))
        check("fit from the host", lambda: model.fit(X, y, 1, 4, stream_data=True, progress=False))
        C16 = C.astype(model.dtype)
        calls: dict[str, Any] = {
            "forward": lambda: model.forward(X),
            "forward of its own": lambda: model.forward(C),
            "backward": lambda: model.backward(np.ones((8, 2), np.float32)),
            "loss_and_gradients": lambda: model.loss_and_gradients(X, y, weight)[1].copy(),
            "trace": lambda: model.trace(X, y),
            "predict": lambda: model.predict(X),
            "predict_proba": lambda: model.predict_proba(C),
            "evaluate": lambda: model.evaluate(X, y, weight),
            "predictor": lambda: model.predictor(8)(X),
            "predictor of its own": lambda: model.predictor(8)(C),
            "in_batches": lambda: list(model.predictor(4).in_batches(C16)),
            "outputs_in_batches": lambda: list(model.outputs_in_batches(C16)),
            "describe_data": lambda: model.describe_data(Features((None,) * X.shape[1], scale=2.0), None),
            "predict by features": lambda: model.predict(X),
            "folded": lambda: model.folded(),
            "described again": lambda: model.describe_data(None, None),
            "summary": lambda: str(model.summary()),
            "diagnose": lambda: str(model.diagnose(X, y, weight)),
            "warmup": lambda: model.warmup(8),
            "to": lambda: model.to("cuda"),
            "load_state_dict": lambda: model.load_state_dict(model.state_dict()),
            "save": lambda: save(model, tmp_path / "m", history),
            "load": lambda: load_training(tmp_path / "m", "cuda"),
            "parity": lambda: gb.parity(model, X, y, ["cuda"]),
            "check_gradients": lambda: gb.check_gradients(model, X, y),
            "explain": lambda: gb.explain(model, X, y),
            "step": lambda: model.step(4, "sgd").compile()(2),
            "refresh": lambda: model.network.refresh(),
            "deepcopy": lambda: copy.deepcopy(model),
            "pickle": lambda: pickle.loads(pickle.dumps(model)),
        }
        for name, call in calls.items():
            check(name, call)
        training = Training(model, gb.History(), 1)
        check("learning_rate", lambda: setattr(training, "learning_rate", training.learning_rate / 2))
        other = gb.MLP([3, 4, 1], loss="mean_squared_error", device="cuda")
        target = rng.normal(size=(8, 1))
        check("LBFGS", lambda: other.fit(X, target, 2, optimizer=gb.LBFGS(), progress=False))
        check("regression", lambda: other.evaluate(X, target))
        public = {n for n in dir(gb.MLP) if not n.startswith("_") and callable(getattr(gb.MLP, n))}
    covered = {*calls, "fit", "state_dict", "predictor"}
    behind = {"of", "twin", "state_of"}
    assert public <= covered | behind, "a new public method is to be called here"


def test_an_iterators_caller_has_his_own_device_between_two_items() -> None:
    import cupy

    from gpubackprop.backends.cuda import backend as cuda

    depth: list[int] = []
    model = gb.MLP([3, 4, 2], device="cuda")
    X = cupy.zeros((2100, 3), np.float32)
    entered = [0]

    class Counting(cuda.Device):
        def __enter__(self) -> Any:
            entered[0] += 1
            return super().__enter__()

        def __exit__(self, *error: Any) -> None:
            entered[0] -= 1
            super().__exit__(*error)

    model.backend._device = Counting(0)
    try:
        depth += [entered[0] for _ in model.outputs_in_batches(X)]
    finally:
        model.backend._device = cuda.Device(0)
    assert depth == [0, 0, 0]


def test_a_queue_is_a_stream_or_a_thread_with_its_own() -> None:
    import cupy

    backend: Any = gb.get_backend("cuda")
    queues: list[Any] = []

    def look(stream: Any) -> None:
        with stream:
            queues.append(backend.queue())
            assert backend.queue() == queues[-1]

    streams = [cupy.cuda.Stream.null, cupy.cuda.Stream.ptds, cupy.cuda.Stream(non_blocking=True)]
    for stream in streams:
        for run in (look, lambda s: (t := threading.Thread(target=look, args=(s,))).start() or t.join()):
            run(stream)
    null, null_2, own, own_2, other, other_2 = queues
    assert null == null_2
    assert other == other_2
    assert len({null, own, own_2, other}) == 4


def test_a_predictor_keeps_passes_of_a_few_streams(rng: np.random.Generator) -> None:
    import cupy

    from gpubackprop import predictor as prediction

    X = cupy.asarray(rng.normal(size=(2, 3)).astype(np.float32))
    predictor = gb.MLP([3, 4, 2], device="cuda").predictor(2)
    expected = predictor(X).get()
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(prediction.QUEUES + 4)]
    for stream in streams:
        stream.wait_event(cupy.cuda.get_current_stream().record())
        with stream:
            np.testing.assert_array_equal(predictor(X).get(), expected)
    assert len(predictor._of_queues) == prediction.QUEUES


@planned
def test_a_network_is_trained_while_another_thread_captures(rng: np.random.Generator) -> None:
    import cupy

    X, y = data(rng)
    step = gb.MLP([3, 4, 2], device="cuda").step(8, "adam").compile()
    model, results = gb.MLP([3, 4, 2], device="cuda"), []

    def train() -> None:
        model.fit(X, y, epochs=2, batch_size=5, progress=False)
        results.append(model.evaluate(X, y)["loss"])

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        thread = threading.Thread(target=train)
        thread.start()
        thread.join()
        step.eagerly()
        stream.end_capture()
    other = gb.MLP([3, 4, 2], device="cuda")
    other.fit(X, y, epochs=2, batch_size=5, progress=False)
    assert results == [other.evaluate(X, y)["loss"]]


def test_an_option_that_cannot_be_had_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpubackprop.backends.cuda import backend as cuda

    with pytest.raises(ValueError, match="epilogues is 'some'; choose from auto, all, off"):
        cuda.CudaBackend(0, epilogues="some")
    monkeypatch.setattr(cuda, "installed", lambda package: None)
    for option in ({"epilogues": "all"}, {"matmul_precision": "tf32"}):
        with pytest.raises(gb.DeviceUnavailableError, match="needs nvmath-python"):
            cuda.CudaBackend(0, **option)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="epilogues is 'some'"):
        cuda.CudaBackend(0, epilogues="some")
