"""Data that stays on the host: the same bits as data on the GPU, and nothing waits but what must."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.machine.diagnosis import installed

gpu = [
    pytest.mark.gpu,
]
GPU = pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])


def train(device: str, X: Any, y: Any, **options: Any) -> tuple[np.ndarray, list[float]]:
    model = gb.MLP([6, 8, 3], "tanh", device=device, seed=2, dropout=0.25)
    history = model.fit(X, y, **({"epochs": 2, "batch_size": 8, "progress": False} | options))
    return model.backend.to_numpy(model.parameters.flat), history["loss"]


@GPU
@pytest.mark.parametrize(
    "n", [5, 8, 29, 40]
)  # one short batch; one; an even and an odd number, with and without a rest
@pytest.mark.parametrize("options", [{}, {"weighted": True, "micro_batch_size": 4}])
def test_streamed_data_gives_the_same_bits(device: str, n: int, options: Any, rng: np.random.Generator) -> None:
    X, y = rng.normal(size=(n, 6)).astype(np.float32), np.arange(n) % 3
    options = dict(options)
    if options.pop("weighted", False):
        options["sample_weight"] = rng.uniform(0.1, 2, n)
    streamed = train(device, X, y, stream_data=True, **options)
    resident = train(device, X, y, stream_data=False, **options)
    np.testing.assert_array_equal(streamed[0], resident[0])
    assert streamed[1] == resident[1]


@GPU
def test_a_data_set_of_half_the_memory_stays_on_the_host(
    device: str, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    from gpubackprop.training import sources

    made = []

    def refuse(*_: Any, **__: Any) -> None:
        made.append(1)
        raise KeyError

    monkeypatch.setattr(sources.Streamed, "__init__", refuse)
    X, y = rng.normal(size=(2000, 6)).astype(np.float32), np.arange(2000) % 3
    backend = gb.get_backend(device)
    monkeypatch.setattr(type(backend), "memory", lambda self, wanted=0: (2 * (X.nbytes + y.nbytes), 1 << 40))
    train(device, X, y, epochs=1, batch_size=40)
    assert not made
    monkeypatch.setattr(type(backend), "memory", lambda self, wanted=0: (2 * (X.nbytes + y.nbytes) - 1, 1 << 40))
    with pytest.raises(KeyError):
        train(device, X, y, epochs=1, batch_size=40)


@GPU
def test_what_is_larger_than_the_device_is_evaluated_and_predicted_from_the_host(
    device: str, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    X, y = rng.normal(size=(3000, 6)).astype(np.float32), rng.integers(0, 3, 3000)
    w = rng.uniform(0.1, 2, 3000)
    model = gb.MLP([6, 8, 3], device=device)

    def everything() -> list[Any]:
        other = gb.MLP([6, 8, 3], device=device)
        history = other.fit(X[:64], y[:64], validation_data=(X, y, w), epochs=2, batch_size=32, progress=False)
        outputs = [model.backend.to_numpy(o) for _, o in model.outputs_in_batches(X)]
        return [
            model.predict(X), model.predict_proba(X), *outputs, model.evaluate(X, y, w), model.evaluate(X, y), history["val_loss"],
            history["val_accuracy"],
        ]  # fmt: skip

    whole, copied = everything(), []
    asarray = type(model.backend).asarray

    def watch(self: Any, a: Any, dtype: Any = None) -> Any:
        copied.append(getattr(a, "shape", ()))
        return asarray(self, a, dtype)

    # there is room for a batch, a network and its step, but not for three thousand samples
    monkeypatch.setattr(type(model.backend), "memory", lambda self, wanted=0: (max(100_000, wanted), 1 << 40))
    monkeypatch.setattr(type(model.backend), "asarray", watch)
    for expected, actual in zip(whole, everything(), strict=True):
        np.testing.assert_array_equal(actual, expected)
    assert max(shape[0] for shape in copied if len(shape) == 2) == 1024


@GPU
@pytest.mark.skipif(installed("nvmath-python") is None, reason="a captured step needs nvmath-python")
def test_a_warm_streamed_step_copies_its_batch_launches_one_graph_and_waits_for_nothing(
    device: str, rng: np.random.Generator
) -> None:
    ledger = pytest.importorskip("ledger", reason="counts need an emulated device")
    if not ledger.available():
        pytest.skip("counts need an emulated device")
    from gpubackprop.network import Data
    from gpubackprop.training.sources import Streamed

    X, y = rng.normal(size=(64, 6)).astype(np.float32), np.arange(64) % 3
    model = gb.MLP([6, 8, 3], device=device)
    batches = Streamed(model.network, Data(X, y, None, np.arange(64)), 16, model.state_of("adam").optimizer)
    rows = [np.arange(i, i + 16) for i in range(0, 64, 16)]
    with ledger.record(level=1) as record:
        for r in rows[:2]:
            batches.step(r)
        model.backend.synchronize()
    # the first copies too wait: for the zeros that their buffers began with
    assert record.event_waits == 4
    with ledger.record(level=1) as record:
        for r in rows:
            batches.step(r)
        waits = record.to_dict()["host"]
        model.backend.synchronize()  # copies and steps are counted where they are done
        counts = record.to_dict()["host"]
    assert counts["graph_launches"] == 4
    assert counts["copies_h2d"] == 8  # X and y
    assert counts["bytes_h2d"] == 64 * (6 * 4 + 8)
    assert counts["event_records"] == 8  # after each copy, after each step
    assert counts["event_waits"] == 8
    for name in ("launches", "pageable_copies", "allocations", "frees", "pinned_allocations", "copies_d2h", "memsets"):
        assert counts.get(name, 0) == 0, name
    # sync_event: the host waits for a copy two batches ago before it writes to that pinned buffer, and only if it is not done
    for name in ("sync_stream", "sync_context", "sync_implicit"):
        assert waits.get(name, 0) == 0, name
    assert waits.get("sync_event", 0) <= 4


@GPU
def test_without_graphs_streamed_data_gives_the_same_bits(
    device: str, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    from gpubackprop.backends.cuda import backend as cuda

    X, y = rng.normal(size=(29, 6)).astype(np.float32), np.arange(29) % 3
    with monkeypatch.context() as patch:
        patch.setattr(cuda, "installed", lambda package: None)
        backend: Any = cuda.CudaBackend(0)
    streamed, resident = (train(backend, X, y, stream_data=stream) for stream in (True, False))
    np.testing.assert_array_equal(streamed[0], resident[0])


@GPU
def test_an_interrupted_fit_leaves_no_copy_behind(
    device: str, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    from gpubackprop.training.sources import Streamed

    closed: list[bool] = []
    close = Streamed.close

    def interrupt(self: Any, rows: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Streamed, "step", interrupt)
    monkeypatch.setattr(Streamed, "close", lambda self: closed.append(close(self) is None))
    X, y = rng.normal(size=(20, 6)).astype(np.float32), np.arange(20) % 3
    assert gb.MLP([6, 8, 3], device=device).fit(X, y, epochs=1, stream_data=True, progress=False).interrupted
    assert closed == [True]


def test_on_the_cpu_data_is_used_where_it_is(rng: np.random.Generator) -> None:
    X, y = rng.normal(size=(20, 6)).astype(np.float32), np.arange(20) % 3
    np.testing.assert_array_equal(train("cpu", X, y, stream_data=True)[0], train("cpu", X, y)[0])
