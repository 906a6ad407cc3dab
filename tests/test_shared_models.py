"""One network in many threads: each call has its own memory, and a network in a fit refuses what would change it."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop import eager


@pytest.fixture(autouse=True)
def _threads_change_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def in_threads(*functions: Callable[[], Any]) -> None:
    """Run all at the same time, and raise what any of them raises."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(functions))

    def run(function: Callable[[], Any]) -> None:
        try:
            start.wait(10)
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


def task(n: int = 30, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 5)).astype(np.float32), np.arange(n) % 3


def flat(parameters: Any) -> np.ndarray:
    flat: np.ndarray = parameters.flat
    return flat


def make(device: str, **options: Any) -> Any:
    return gb.MLP([5, 16, 3], "gelu", device=device, **options)


CALLS: dict[str, Callable[[Any, Any, Any], np.ndarray]] = {
    "forward": lambda model, X, y: model.forward(X),
    "predict": lambda model, X, y: model.predict(X),
    "predict_proba": lambda model, X, y: model.predict_proba(X),
    "evaluate": lambda model, X, y: np.array(list(model.evaluate(X, y).values())),
    "loss_and_gradients": lambda model, X, y: flat(model.loss_and_gradients(X, y)[1]),
    "trace": lambda model, X, y: model.trace(X, y).layers[0].dW,
    "backward": lambda model, X, y: (model.forward(X), flat(model.backward(np.tile(X[:, :1], 3))))[1],
    "outputs": lambda model, X, y: np.concatenate([model.backend.to_numpy(o) for _, o in model.outputs_in_batches(X)]),
    "predictor": lambda model, X, y: model.shared(X[:7]),
}


@pytest.mark.parametrize("name", CALLS)
def test_threads_share_a_network(name: str, device: str) -> None:
    model, times = make(device), 3 if device == "cuda" else 25
    model.shared = model.predictor(7)
    data = [task(20 + 10 * (i % 3), i) for i in range(4)]
    expected = [CALLS[name](model, X, y) for X, y in data]

    def work(i: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(times):
                np.testing.assert_array_equal(CALLS[name](model, *data[i]), expected[i])

        return run

    in_threads(*map(work, range(4)))


def test_a_batch_iterator_is_not_disturbed_by_a_prediction() -> None:
    model, (X, _) = make("cpu"), task(3000)
    whole = model.forward(X)
    kept = []
    for rows, o in model.outputs_in_batches(X):
        model.predict(X[::-1])
        np.testing.assert_allclose(o, whole[rows], rtol=1e-5, atol=1e-6)
        kept.append(o)
    np.testing.assert_allclose(np.concatenate(kept), whole, rtol=1e-5, atol=1e-6)


def test_a_warm_call_takes_what_was_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (X, y) = make("cpu"), task()
    model.loss_and_gradients(X, y)
    monkeypatch.setattr(eager, "Pass", lambda *arguments: pytest.fail("allocates a workspace"))
    model.loss_and_gradients(X, y)


def test_backward_is_of_the_forward_of_its_thread() -> None:
    model, (X, _) = make("cpu"), task()
    do = np.ones((30, 3), np.float32)
    model.forward(X)
    expected = flat(model.backward(do))

    def other() -> None:
        with pytest.raises(ValueError, match="in this thread"):
            model.backward(do)
        model.forward(2 * X)

    model.forward(X)
    in_threads(other)
    np.testing.assert_array_equal(flat(model.backward(do)), expected)


@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_backward_is_right_when_the_inputs_were_refilled(device: str) -> None:
    model, (X, _) = make(device), task()
    do = np.tile(X[:, :1], 3)
    model.forward(X.copy())
    expected = flat(model.backward(do))
    buffer = X.copy()
    model.forward(buffer)
    buffer[...] = np.nan
    np.testing.assert_array_equal(flat(model.backward(do)), expected)


def test_backward_after_the_parameters_changed_is_refused() -> None:
    model, (X, y) = make("reference"), task()
    for change in (
        lambda: model.load_state_dict(model.state_dict()),
        lambda: in_threads(lambda: model.fit(X, y, epochs=1, progress=False)),
    ):
        model.forward(X)
        change()
        with pytest.raises(ValueError, match="have changed since forward"):
            model.backward(np.ones((30, 3)))


@pytest.mark.parametrize("device", ["reference", "cpu"])
@pytest.mark.parametrize("name", ["forward", "loss_and_gradients", "trace", "evaluate", "predict"])
def test_no_call_keeps_the_callers_arrays(name: str, device: str) -> None:
    model, (X, y) = make(device), task()
    X, y = X.view(), y.copy()
    CALLS[name](model, X, y)
    references = [weakref.ref(X), weakref.ref(y)]
    del X, y
    gc.collect()
    assert [reference() for reference in references] == [None, None]


@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_no_result_is_overwritten_by_a_later_call(device: str) -> None:
    model = make(device, dtype="float64")
    model.shared = model.predictor(7)
    first, second = task(40, 1), task(40, 2)
    results = [call(model, *first) for call in CALLS.values()] + [model.state_dict()["layers.0.weight"]]
    copies = [result.copy() for result in results]
    for call in CALLS.values():
        call(model, *second)
    model.fit(*second, epochs=1, progress=False)
    for result, copy in zip(results, copies, strict=True):
        np.testing.assert_array_equal(result, copy)


# ------------------------------------------------------------------ a network in a fit


class Meanwhile:
    """A callback that does something in the first epoch."""

    def __init__(self, do: Callable[[], Any]) -> None:
        self.do, self.done = do, False

    def on_epoch_end(self, training: Any) -> None:
        if not self.done:
            self.do()
            self.done = True


def fit(model: Any, *callbacks: Any, optimizer: Any = "adam") -> Any:
    return model.fit(*task(), epochs=2, batch_size=10, progress=False, optimizer=optimizer, callbacks=callbacks)


@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_a_network_in_a_fit_refuses_another(device: str) -> None:
    model, undisturbed = make(device), make(device)
    fit(undisturbed)

    def from_a_callback() -> None:
        with pytest.raises(RuntimeError, match=r"this thread, from a callback.*copy.deepcopy\(model\).fit"):
            fit(model)
        with pytest.raises(RuntimeError, match="another optimizer would discard"):
            model.step(4, gb.SGD(0.1))

    def from_a_thread() -> None:
        for change in (
            lambda: fit(model),
            lambda: model.load_state_dict(model.state_dict()),
            lambda: model.step(4),
            lambda: model.state_of("sgd"),
        ):
            with pytest.raises(RuntimeError, match="another thread"):
                change()
        model.predict(task()[0])  # these leave it as it is
        model.loss_and_gradients(*task())

    fit(model, Meanwhile(from_a_callback), Meanwhile(lambda: in_threads(from_a_thread)))
    np.testing.assert_array_equal(model.parameters.flat, undisturbed.parameters.flat)


def test_callbacks_may_predict_evaluate_save_and_load(tmp_path: Any) -> None:
    model, (X, y) = make("cpu"), task()

    def use() -> None:
        assert model.evaluate(X, y)["loss"] > 0
        model.predict(X)
        model.save(tmp_path / "net.safetensors")
        model.load_state_dict(model.state_dict())

    plain = make("cpu")
    fit(plain)
    fit(model, Meanwhile(use))
    np.testing.assert_array_equal(model.parameters.flat, plain.parameters.flat)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("of a callback"), SystemExit])
def test_a_network_is_free_again_after_an_error(error: Any) -> None:
    def fail() -> None:
        raise error

    model = make("reference")
    with suppress(RuntimeError, SystemExit):
        fit(model, Meanwhile(fail))
    fit(model)
    with pytest.raises(ValueError, match="epochs"):
        model.fit(*task(), epochs=0)
    fit(model)


def test_of_fits_in_several_threads_one_trains() -> None:
    model, trained = make("cpu"), []

    def run() -> None:
        with suppress(RuntimeError):
            model.fit(*task(), epochs=200, batch_size=10, progress=False)
            trained.append(True)

    in_threads(run, run, run)
    assert trained
    assert model.optimizer_state.counters[0] == 600 * len(trained)


def test_what_a_pass_has_prepared_shares_no_scratch_with_the_thread_that_prepared_it() -> None:
    model, (X, y) = make("cpu"), task()
    model.loss_and_gradients(X, y)
    backend: Any = model.backend
    for dtype in (np.dtype(np.float32), np.dtype(np.float64)):
        of_thread = backend._scratch.of(dtype)
        (kind,) = model.network.eager.kept
        taken = model.network.eager.kept.take(kind)
        ready = [*taken._forward._ready, *taken._backward._ready]
        held = [argument for run in ready if run is not None for argument in run.__defaults__[0][0]]
        assert len(held) > 20
        assert not any(argument is of_thread for argument in held)
        model.network.eager.give(taken)
