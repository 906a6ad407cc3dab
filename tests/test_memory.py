"""Memory of a device: counted as it is allocated, refused before anything is done, split where it is too little."""

from __future__ import annotations

import gc
import pickle
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_within, eps

import gpubackprop as gb
from gpubackprop import network
from gpubackprop.backends.memory import BLOCK, choose_micro_batch, largest_that_fits, nbytes_of
from gpubackprop.eager import own_buffers
from gpubackprop.step import layout
from gpubackprop.step.buffers import Memory

SIZES = [12, 32, 7, 3]
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
EVERY_DEVICE = pytest.mark.parametrize("device", ["reference", "cpu", CUDA])


@pytest.fixture
def pool() -> Iterator[None]:
    """Let CuPy allocate from its pool, also where the tests run without; what earlier tests left is gone, and does not go now."""
    import cupy

    gc.collect()
    cupy.cuda.Device().synchronize()
    gc.disable()
    try:
        with cupy.cuda.using_allocator(cupy.get_default_memory_pool().malloc):
            yield
    finally:
        gc.enable()


def limit(monkeypatch: pytest.MonkeyPatch, model: Any, free: int) -> None:
    """Let the model's device say that so many bytes are free."""
    monkeypatch.setattr(model.backend, "memory", lambda wanted=0: (free, 1 << 40), raising=False)


def make(device: str, **options: Any) -> Any:
    return gb.MLP(SIZES, "tanh", device=device, seed=1, **options)


def batch(n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(n)
    return rng.normal(size=(n, SIZES[0])).astype(np.float32), rng.integers(0, SIZES[-1], n)


def step_bytes(model: Any, n: int, m: int | None = None, optimizer: Any = None, **options: Any) -> int:
    options = {"indices": True, "weighted": False} | options
    return sum(model.network.step_parts(n, m or n, optimizer=optimizer, **options).values())


def pass_bytes(model: Any, purpose: str, n: int) -> int:
    kind = model.network.eager.kind(purpose, n)
    given = layout.inputs(model.architecture, n, class_indices=True)
    return nbytes_of(own_buffers(layout.layout(model.architecture, given), kind))


# ------------------------------------------------------------------ the count is what is allocated


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.usefixtures("pool")
@pytest.mark.parametrize("device", [CUDA])
def test_the_pool_gives_exactly_what_was_counted(
    dtype: str, dropout: float, weighted: bool, keep: bool, device: str
) -> None:
    import cupy

    model = make(device, dtype=dtype, dropout=dropout)
    pool, optimizer = cupy.get_default_memory_pool(), gb.Adam()
    options = {"weighted": weighted, "keep": keep}
    for n, m in ((37, 37), (37, 8)):
        counted = step_bytes(model, n, m, optimizer, **options)
        before = pool.used_bytes()
        step = model.step(n, optimizer, micro_batch_size=m, **options)
        assert pool.used_bytes() - before == counted
        assert step_bytes(model, n, m, optimizer, **options) == counted - _once(model, optimizer, m < n, counted)
        del step
        model.network._optimizer_state = None
        model.network._sums = Memory()


def _once(model: Any, optimizer: Any, in_parts: bool, counted: int) -> int:
    """Return the bytes that a second step finds there: states, learning rate, sums over micro-batches."""
    flat = model.parameters.flat.nbytes
    return _blocks(optimizer.n_states * flat) + BLOCK + (in_parts and _blocks(flat) + BLOCK)


def _blocks(nbytes: int) -> int:
    return -(-nbytes // BLOCK) * BLOCK


def test_the_host_gives_what_was_counted(rng: np.random.Generator) -> None:
    n, arrays = 4000, 25
    model = make("cpu", dropout=0.25)
    counted = step_bytes(model, n, optimizer=gb.Adam())
    tracemalloc.start()
    step = model.step(n, "adam")
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(step.operations) > 10
    # an array on the host begins at a multiple of 64 bytes, is not rounded to blocks, and Python's objects take some kilobytes
    assert counted - arrays * BLOCK < taken < counted + 200_000
    assert counted > 2_000_000


@EVERY_DEVICE
def test_a_pass_is_counted_as_its_workspace_is(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (X, y) = make(device), batch(100)
    workspace = pass_bytes(model, "gradients", 100) + nbytes_of([model.network.buffers.gradients])
    data = X.nbytes + y.nbytes if device == "cuda" else 0
    limit(monkeypatch, model, workspace + data)
    model.loss_and_gradients(X, y)
    model = make(device)
    limit(monkeypatch, model, workspace + data - 1)
    with pytest.raises(gb.DeviceMemoryError, match=f"gradients over 100 samples needs {workspace + data:,} bytes more"):
        model.loss_and_gradients(X, y)


# ------------------------------------------------------------------ the largest that fits


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 2000), st.integers(1, 50), st.integers(0, 3000), st.integers(1, 64))
def test_the_largest_that_fits_fits_and_the_next_does_not(fixed: int, each: int, free: int, at_most: int) -> None:
    free *= 1000

    def parts(n: int) -> dict[str, int]:
        return {"fixed": fixed * 1000, "each": each * 1000 * n}

    def fits(n: int) -> bool:
        return sum(parts(n).values()) <= free - free // 8

    n = largest_that_fits(parts, free, at_most)
    assert n == 0 or fits(n)
    assert n == at_most or not fits(n + 1)


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 500), st.integers(1, 500), st.sampled_from([1, 2, 4]))
def test_micro_batches_are_the_fewest_that_fit(n: int, room: int, multiple: int) -> None:
    class Small:
        device = "small"

        def memory(self, wanted: int) -> tuple[int, int]:
            return 800 * room, 0  # an eighth stays free: room for `room` samples of 700 bytes

    def choose() -> int:
        return choose_micro_batch(Small(), "it", n, lambda m: {"workspace": 700 * m}, multiple)  # type: ignore[arg-type]

    if min(room, n) < min(multiple, n):
        with pytest.raises(gb.DeviceMemoryError, match="no micro-batch fits"):
            choose()
        return
    m = choose()
    assert m <= room
    if room >= n:
        assert m == n
    else:
        assert m % multiple == 0
        assert -(-n // m) == -(-n // (room // multiple * multiple))


# ------------------------------------------------------------------ refused, and nothing is half done

FREE, TOO_MANY = 120_000, 600
PASSES: dict[str, Callable[[Any, int], Any]] = {
    "forward": lambda model, n: model.forward(batch(n)[0]),
    "loss_and_gradients": lambda model, n: model.loss_and_gradients(*batch(n)),
    "trace": lambda model, n: model.trace(*batch(n)),
    "step": lambda model, n: model.step(n, "adam").compile()(),
    "fit": lambda model, n: model.fit(*batch(TOO_MANY), epochs=1, batch_size=n, progress=False),
    "fit, streamed": lambda model, n: model.fit(
        *batch(TOO_MANY), epochs=1, batch_size=n, progress=False, stream_data=True
    ),
}


@EVERY_DEVICE
@pytest.mark.parametrize("name", PASSES)
def test_the_error_names_a_batch_that_fits(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(device)
    limit(monkeypatch, model, FREE)
    before = model.backend.to_numpy(model.parameters.flat).copy()
    state = model.state_of(gb.SGD(0.1, momentum=0.5))
    state.counters[0] = 5
    with pytest.raises(gb.DeviceMemoryError) as caught:
        PASSES[name](model, TOO_MANY)
    error = caught.value
    assert isinstance(error, MemoryError)
    assert 0 < error.largest_batch < TOO_MANY
    assert error.free == FREE < error.needed
    for text in (
        f"{error.needed:,} bytes",
        "120,000 are free",
        f"the largest batch that fits is {error.largest_batch}",
    ):
        assert text in str(error)
    np.testing.assert_array_equal(model.backend.to_numpy(model.parameters.flat), before)
    assert model.optimizer_state is state
    assert int(state.counters[0]) == 5
    PASSES[name](model, error.largest_batch)
    with pytest.raises(gb.DeviceMemoryError):  # what stays free, and the rounding to blocks, is less than half of it
        PASSES[name](model, error.largest_batch * 3 // 2)


@EVERY_DEVICE
def test_predict_takes_its_batches_from_what_is_free(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(device)
    limit(monkeypatch, model, 60_000)
    with pytest.raises(gb.DeviceMemoryError, match="prediction over 1024 samples"):
        model.predict(batch(3000)[0])
    assert len(model.predict(batch(40)[0])) == 40


def test_older_workspaces_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("cpu")
    one, eager = pass_bytes(model, "forward", 50), model.network.eager
    free = [one]
    monkeypatch.setattr(
        model.backend, "memory", lambda wanted=0: (free[0] - one * len(list(eager.kept)), free[0]), raising=False
    )
    for n in (50, 49, 48):
        model.forward(batch(n)[0])
        last = model._thread.last
        assert last is not None
        assert last.run.kind.n == n
        eager.give(last.run)  # as the next forward does
        model._thread.last = None
        assert [kind.n for kind in eager.kept] == [n]


def test_parts_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("cpu")
    limit(monkeypatch, model, 1000)
    with pytest.raises(gb.DeviceMemoryError, match="no batch fits") as caught:
        model.step(64, "adam")
    for part in ("optimizer state", "mini-batch", "workspace"):
        assert f"{part} " in str(caught.value)
    assert caught.value.largest_batch == 0


# ------------------------------------------------------------------ "auto"


def gradients(model: Any, n: int, **options: Any) -> tuple[np.ndarray, Any]:
    X, y = batch(n)
    step = model.step(n, **options)
    step.names.array("X")[...] = model.backend.asarray(X, model.dtype)
    step.names.array("y")[...] = model.backend.asarray(y)
    step.compile()()
    return np.asarray(model.backend.to_numpy(model.gradients.flat), np.float64), step


def products(step: Any) -> int:
    return sum(operation.name == "matmul" for operation in step.operations)


@EVERY_DEVICE
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_a_step_is_split_into_the_fewest_parts_that_fit(
    device: str, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    n = 90
    whole, step = gradients(make(device, dropout=dropout), n)
    model = make(device, dropout=dropout)
    free = step_bytes(model, n, 24) * 8 // 7 + 8
    assert step_bytes(model, n, 28) > free - free // 8
    limit(monkeypatch, model, free)
    parts, split = gradients(model, n, micro_batch_size="auto")
    assert products(split) == 4 * products(step)  # of 24, or of 23 where there is no dropout
    # a gradient is a mean over n samples of terms below 10, each out of chains of 2 L products of fan-in at most 32
    assert_within(parts, whole, (n + 2 * sum(SIZES)) * eps("float32") * 10)
    assert np.abs(whole).max() > 0.01


@EVERY_DEVICE
@pytest.mark.parametrize("stream", [False, True])
def test_fit_is_split_and_learns_the_same(device: str, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = batch(300)
    results, sizes = [], []
    real = network.choose_micro_batch

    def choose(*arguments: Any) -> int:
        sizes.append(real(*arguments))
        return sizes[-1]

    monkeypatch.setattr(network, "choose_micro_batch", choose)
    for free in (1 << 40, 120_000):
        model = make(device, dtype="float64", dropout=0.25)
        limit(monkeypatch, model, free)
        model.fit(X, y, epochs=2, batch_size="auto", optimizer="sgd", progress=False, stream_data=stream)
        results.append(model.backend.to_numpy(model.parameters.flat))
    assert sizes[0] == 128
    assert sizes[1] < 128
    assert sizes[1] % 4 == 0
    # six steps; each passes a difference of the parameters on, at most ten times as large
    assert_within(results[1], results[0], 1e6 * (128 + 2 * sum(SIZES)) * eps("float64"))


def test_where_no_limit_is_known_nothing_is_split() -> None:
    model = make("cpu", dropout=0.25)
    assert products(model.step(90, micro_batch_size="auto")) == products(model.step(90))
    history = model.fit(*batch(90), epochs=1, batch_size="auto", micro_batch_size="auto", progress=False)
    assert len(history["loss"]) == 1


def test_lbfgs_has_no_batches_so_auto_is_as_good_as_a_number() -> None:
    history = make("cpu").fit(*batch(30), epochs=2, batch_size="auto", optimizer=gb.LBFGS(), progress=False)
    assert len(history["loss"]) == 2


def test_auto_is_the_only_word() -> None:
    for options in ({"batch_size": "all"}, {"micro_batch_size": "all"}):
        with pytest.raises(ValueError, match="'all'; it must be a whole number >= 1"):
            make("cpu").fit(*batch(20), progress=False, **options)


# ------------------------------------------------------------------ a device that is full


@pytest.mark.usefixtures("pool")
@pytest.mark.parametrize("device", [CUDA])
def test_a_full_device_is_told_and_a_smaller_batch_runs(device: str) -> None:
    import cupy

    model = gb.MLP([1000, 1000, 10], device=device)
    model.loss_and_gradients(np.zeros((4, 1000), np.float32), np.zeros(4, np.int64))  # kernels, cuBLAS
    pool = cupy.get_default_memory_pool()
    free = 24 << 20

    def leave() -> None:
        """Leave so many bytes beyond what is in use now, and beyond blocks of which a part is: then CuPy raises, as at the end."""
        model._thread.last = None
        model.network.eager.free_for(1 << 60)
        pool.free_all_blocks()
        pool.set_limit(size=pool.total_bytes() + free)

    leave()
    try:
        assert model.backend.memory(free + 1)[0] == free
        for n in (1 << 14, 1 << 30):
            with pytest.raises(gb.DeviceMemoryError, match="does not fit on cuda:0") as caught:
                model.backend.zeros((n, 1000), np.float32)
            assert caught.value.needed == n * 4000
        with pytest.raises(gb.DeviceMemoryError, match="the largest batch that fits is") as caught:
            model.step(20_000, "sgd")
        n = caught.value.largest_batch
        model.step(n, "sgd").compile()()
        model.backend.synchronize()
        with pytest.raises(gb.DeviceMemoryError) as caught:
            model.forward(np.zeros((20_000, 1000), np.float32))
        n = caught.value.largest_batch
        assert n > 100
        assert model.forward(np.zeros((n, 1000), np.float32)).shape == (n, 10)
        leave()
        X, y = np.ones((1900, 1000), np.float32), np.arange(1900) % 10
        options = {"epochs": 1, "batch_size": 1900, "optimizer": "sgd", "progress": False, "stream_data": False}
        with pytest.raises(gb.DeviceMemoryError, match="micro_batch_size='auto' to split the batch"):
            model.fit(X, y, **options)
        assert len(model.fit(X, y, micro_batch_size="auto", **options)["loss"]) == 1
    finally:
        pool.set_limit(size=0)


@pytest.mark.usefixtures("pool")
@pytest.mark.parametrize("device", [CUDA])
def test_the_memory_of_a_users_own_allocator_is_not_known(device: str) -> None:
    import cupy

    backend = gb.get_backend(device)
    free, total = backend.memory()
    assert 0 < free <= total
    with cupy.cuda.using_allocator(cupy.cuda.MemoryPool().malloc):
        assert backend.memory() is None
    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    pool.set_limit(size=pool.total_bytes() + 1000)
    try:
        assert backend.memory()[0] == 1000 + pool.free_bytes()
        assert backend.memory(2000 + pool.free_bytes())[0] == 1000
    finally:
        pool.set_limit(size=0)


def test_a_network_that_does_not_fit_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = gb.get_backend("reference")
    needed = 2 * _blocks(make("reference").parameters.flat.nbytes)
    monkeypatch.setattr(backend, "memory", lambda wanted=0: (needed - 1, 1 << 40), raising=False)
    with pytest.raises(gb.DeviceMemoryError, match=f"a network 12-32-7-3 needs {needed:,} bytes") as caught:
        make("reference")
    assert caught.value.largest_batch is None


def test_the_error_survives_a_journey_between_processes() -> None:
    error = gb.DeviceMemoryError("too little", 3, 2, 1)
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.needed, copy.free, copy.largest_batch) == ("too little", 3, 2, 1)
