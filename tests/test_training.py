"""Training: history, learning, callbacks, interruption, the order of the samples, dropout, L-BFGS; the same seed, the same bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tolerances import assert_within

import gpubackprop as gb
from gpubackprop.step.operations import Dropout
from gpubackprop.step.state import STEPS
from gpubackprop.training.callbacks import Callback, EarlyStopping, ReduceOnPlateau
from gpubackprop.training.history import History, Training
from gpubackprop.training.loop import Orders


def clusters(rng: np.random.Generator, n: int = 60, d: int = 8, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Return points around well separated centres, and the number of the centre: what any classifier must learn."""
    y = rng.integers(0, classes, n)
    y[:classes] = range(classes)
    return 4 * np.eye(d)[y] + rng.normal(size=(n, d)) / 2, y


def fit(model: gb.MLP, X: Any, y: Any, **options: Any) -> Any:
    """Train without a display."""
    return model.fit(X, y, **({"progress": False} | options))


def parameters(model: gb.MLP) -> np.ndarray:
    """Return a copy of the parameters on the host."""
    return model.backend.to_numpy(model.parameters.flat).copy()


def test_a_network_learns(device: str, rng: np.random.Generator) -> None:
    X, y = clusters(rng)
    model = gb.MLP([8, 16, 3], device=device)
    history = fit(model, X, y, epochs=5, batch_size=15, optimizer=gb.Adam(0.02))
    assert history["loss"][-1] < history["loss"][0] / 3
    assert model.evaluate(X, y)["accuracy"] == 1.0
    assert np.array_equal(model.predict(X), y)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "rmsprop", "adagrad", "lion"])
def test_every_optimizer_lowers_the_loss(name: str, rng: np.random.Generator) -> None:
    X, y = clusters(rng)
    history = fit(gb.MLP([8, 16, 3], "gelu", device="reference"), X, y, epochs=10, batch_size=20, optimizer=name)
    assert history["loss"][-1] < history["loss"][0]


def test_history_has_one_entry_for_each_epoch_in_each_column(rng: np.random.Generator) -> None:
    X, y = clusters(rng)
    history = fit(gb.MLP([8, 3]), X, y, epochs=3, validation_data=(X[:20], y[:20]))
    assert set(history) == {"loss", "val_loss", "val_accuracy", "learning_rate", "seconds"}
    assert {len(column) for column in history.values()} == {3}
    assert not history.interrupted
    plain = fit(gb.MLP([8, 2], loss="mean_squared_error"), X, X[:, :2], epochs=2, validation_data=(X, X[:, :2]))
    assert set(plain) == {"loss", "val_loss", "val_r2", "learning_rate", "seconds"}


def test_the_loss_of_an_epoch_is_the_mean_over_its_samples(device: str, rng: np.random.Generator) -> None:
    X, y = clusters(rng, n=10)
    model = gb.MLP([8, 3], device=device, dtype="float64")
    expected = float(model.loss_and_gradients(X, y)[0])
    # a rate so small that the network stays as it is: batches of 4, 4 and 2
    history = fit(model, X, y, epochs=1, batch_size=4, optimizer=gb.SGD(1e-300))
    assert history["loss"][0] == pytest.approx(expected, rel=1e-14)


def test_a_last_batch_may_be_short_and_a_batch_larger_than_the_data(device: str, rng: np.random.Generator) -> None:
    X, y = clusters(rng, n=10)
    steps = {}
    for batch_size in (4, 10, 64):
        model = gb.MLP([8, 3], device=device)
        fit(model, X, y, epochs=2, batch_size=batch_size)
        steps[batch_size] = int(model.optimizer_state.counters[STEPS])
    assert steps == {4: 6, 10: 2, 64: 2}


def test_an_epoch_by_hand_gives_the_same_bits(device: str, rng: np.random.Generator) -> None:
    X, y = clusters(rng, n=10)
    X = X.astype(np.float32)
    trained = gb.MLP([8, 5, 3], "tanh", device=device, seed=3)
    fit(trained, X, y, epochs=1, batch_size=5, optimizer=gb.SGD(0.1, momentum=0.9))
    model = gb.MLP([8, 5, 3], "tanh", device=device, seed=3)
    step = model.step(5, gb.SGD(0.1, momentum=0.9))
    order = Orders(3, 10).after(0)
    for rows in (order[:5], order[5:]):  # eagerly, operation by operation
        step.names.array("X")[...] = model.backend.asarray(X[rows])
        step.names.array("y")[...] = model.backend.asarray(y[rows])
        step.run_eagerly()
    assert np.array_equal(parameters(trained), parameters(model))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_same_seed_gives_the_same_bits(dropout: float, device: str, rng: np.random.Generator) -> None:
    X, y = clusters(rng, n=22)
    runs = []
    for seed in (5, 5, 6):
        model = gb.MLP([8, 6, 3], "silu", device=device, seed=seed, dropout=dropout)
        history = fit(model, X, y, epochs=2, batch_size=8)
        runs.append((parameters(model), history["loss"]))
    assert np.array_equal(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]
    assert not np.array_equal(runs[0][0], runs[2][0])


def test_the_devices_agree_after_training(device: str, rng: np.random.Generator) -> None:
    X, y = clusters(rng, n=22)
    results = []
    for name in (device, "reference"):
        model = gb.MLP([8, 6, 3], "tanh", device=name, dtype="float64", dropout=0.3)
        fit(model, X, y, epochs=2, batch_size=8, optimizer=gb.SGD(0.1, momentum=0.9))
        results.append(parameters(model))
    # a different mask or batch would move a weight by 0.1; roundings of 6 steps stay far below
    assert_within(results[0], results[1], 1e-12)


def test_the_order_depends_on_the_seed_and_the_epoch_alone() -> None:
    first = Orders(3, 100).after(0)
    assert np.array_equal(first, Orders(3, 100).after(0))
    assert sorted(first) == list(range(100))
    assert not np.array_equal(first, Orders(3, 100).after(1))
    assert not np.array_equal(first, Orders(4, 100).after(0))


def test_an_order_drawn_ahead_is_that_of_its_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    orders = Orders(3, 100)
    orders.draw(7)
    assert np.array_equal(orders.after(4), Orders(3, 100).after(4))  # the epoch had other steps: one was skipped
    orders.draw(7)
    monkeypatch.setattr(orders, "draw", lambda steps: pytest.fail("it has been drawn"))
    assert np.array_equal(orders.after(7), Orders(3, 100).after(7))


@pytest.mark.parametrize("steps", [1, 2, 8, 100])
def test_the_orders_of_two_epochs_are_independent(steps: int) -> None:
    n = 1000
    places = [np.argsort(Orders(0, n).after(s)) for s in (3, 3 + steps)]
    # the correlation of two independent orders has standard deviation 1 / sqrt(n - 1) = 0.032
    assert abs(np.corrcoef(*places)[0, 1]) < 5 / np.sqrt(n - 1)
    assert np.mean(places[0] == places[1]) < 0.01  # one place is expected to agree


def test_without_shuffling_the_order_is_that_of_the_data(rng: np.random.Generator) -> None:
    X, y = clusters(rng, n=10)
    model = gb.MLP([8, 3], device="reference")
    fit(model, X, y, epochs=1, batch_size=5, shuffle=False, optimizer=gb.SGD(0.1))
    by_hand = gb.MLP([8, 3], device="reference")
    for rows in (slice(0, 5), slice(5, 10)):
        _, gradients = by_hand.loss_and_gradients(X[rows], y[rows])
        by_hand.parameters.flat -= np.float32(0.1) * gradients.flat
    assert_within(parameters(model), parameters(by_hand), 1e-6)  # one rounding of numbers near 1


def test_training_goes_on_where_it_ended(device: str, rng: np.random.Generator) -> None:
    X, y = clusters(rng, n=22)
    whole, halves = (gb.MLP([8, 6, 3], device=device, dropout=0.2) for _ in range(2))
    optimizer = gb.Adam(gb.Cosine(0.05, steps=12))
    fit(whole, X, y, epochs=4, batch_size=8, optimizer=optimizer)
    for _ in range(2):
        fit(halves, X, y, epochs=2, batch_size=8, optimizer=optimizer)
    assert np.array_equal(parameters(whole), parameters(halves))
    assert int(halves.optimizer_state.counters[STEPS]) == 12
    fit(halves, X, y, epochs=1, batch_size=8, optimizer=gb.SGD(0.1))
    assert int(halves.optimizer_state.counters[STEPS]) == 3  # another optimizer starts anew


def test_a_sample_weight_of_two_is_the_sample_twice(device: str, rng: np.random.Generator) -> None:
    X, y = clusters(rng, n=8)
    times = np.array([1, 2, 1, 3, 0, 1, 1, 2])
    a, b = (gb.MLP([8, 6, 3], "tanh", device=device, dtype="float64") for _ in range(2))
    fit(a, X, y, epochs=3, batch_size=8, sample_weight=times, optimizer=gb.SGD(0.1))
    fit(b, np.repeat(X, times, axis=0), np.repeat(y, times), epochs=3, batch_size=11, optimizer=gb.SGD(0.1))
    assert_within(parameters(a), parameters(b), 1e-13)


def test_weights_follow_their_samples_when_shuffled(rng: np.random.Generator) -> None:
    X, y = clusters(rng, n=60)
    wrong = y.copy()
    wrong[::2] = (y[::2] + 1) % 3
    model = gb.MLP([8, 3])
    fit(model, X, wrong, epochs=30, batch_size=20, sample_weight=(wrong == y) + 1e-6, optimizer=gb.Adam(0.05))
    assert np.array_equal(model.predict(X), y)


def test_the_learning_rate_of_the_history_is_that_of_the_last_step(rng: np.random.Generator) -> None:
    X, y = clusters(rng, n=10)
    schedule = gb.Exponential(0.1, gamma=0.5)
    history = fit(gb.MLP([8, 3], dtype="float64"), X, y, epochs=3, batch_size=5, optimizer=gb.SGD(schedule))
    assert history["learning_rate"] == pytest.approx([schedule.at(1), schedule.at(3), schedule.at(5)], rel=1e-15)


# ---------------------------------------------------------------------- callbacks


class Recording(Callback):
    """Notes what it is called with."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def on_train_begin(self, training: Any) -> None:
        self.calls.append("begin")

    def on_epoch_end(self, training: Any) -> None:
        self.calls.append((training.epoch, len(training.history["loss"]), training.epochs))

    def on_train_end(self, training: Any) -> None:
        self.calls.append("end")


@pytest.mark.parametrize("optimizer", [gb.Adam(), gb.LBFGS()], ids=["Adam", "LBFGS"])
def test_callbacks_are_called_around_every_epoch(optimizer: Any, rng: np.random.Generator) -> None:
    X, y = clusters(rng)
    seen = Recording()
    fit(gb.MLP([8, 3], dtype="float64"), X, y, epochs=2, optimizer=optimizer, callbacks=[seen])
    assert seen.calls == ["begin", (0, 1, 2), (1, 2, 2), "end"]


class Only:
    """Has one of the methods and no base class; stops, or is interrupted, after an epoch."""

    def __init__(self, epoch: int, interrupt: bool) -> None:
        self.epoch, self.interrupt = epoch, interrupt

    def on_epoch_end(self, training: Any) -> None:
        if training.epoch == self.epoch:
            if self.interrupt:
                raise KeyboardInterrupt
            training.stop = True


@pytest.mark.parametrize("optimizer", [gb.Adam(), gb.LBFGS()], ids=["Adam", "LBFGS"])
@pytest.mark.parametrize("interrupt", [False, True])
def test_training_ends_early_with_what_it_has_learned(
    interrupt: bool, optimizer: Any, rng: np.random.Generator
) -> None:
    X, y = clusters(rng)
    model, short = (gb.MLP([8, 3], dtype="float64") for _ in range(2))
    seen = Recording()
    history = fit(model, X, y, epochs=9, optimizer=optimizer, callbacks=[Only(1, interrupt), seen])
    fit(short, X, y, epochs=2, optimizer=optimizer)
    assert len(history["loss"]) == 2
    assert history.interrupted is interrupt
    assert seen.calls[-1] == "end"
    assert np.array_equal(parameters(model), parameters(short))


class Spoil(Callback):
    """Remembers the parameters after each epoch, and spoils them for the next."""

    def __init__(self) -> None:
        self.parameters: list[np.ndarray] = []

    def on_epoch_end(self, training: Any) -> None:
        self.parameters.append(parameters(training.model))
        if training.epoch >= 2:
            training.model.parameters.flat[...] += 3


@pytest.mark.parametrize("restore", [False, True])
def test_early_stopping_ends_with_the_best_parameters(restore: bool, device: str, rng: np.random.Generator) -> None:
    X, y = clusters(rng)
    model, spoil = gb.MLP([8, 4, 3], device=device), Spoil()
    stop = EarlyStopping(patience=2, restore_best=restore)
    history = fit(model, X, y, epochs=20, validation_data=(X, y), callbacks=[stop, spoil], optimizer=gb.SGD(0.01))
    best = int(np.argmin(history["val_loss"]))
    assert best == 2
    assert len(history["loss"]) == 5
    assert np.array_equal(parameters(model), spoil.parameters[2]) is restore


def test_early_stopping_knows_that_accuracy_is_better_when_larger(rng: np.random.Generator) -> None:
    X, y = clusters(rng)
    stop = EarlyStopping("val_accuracy", patience=3)
    history = fit(gb.MLP([8, 3]), X, y, epochs=50, validation_data=(X, y), callbacks=[stop], optimizer=gb.Adam(0.05))
    best = max(history["val_accuracy"])
    assert len(history["val_accuracy"]) == history["val_accuracy"].index(best) + 4


def test_the_rate_is_reduced_on_a_plateau(rng: np.random.Generator) -> None:
    X, y = clusters(rng)
    reduce = ReduceOnPlateau("loss", factor=0.5, patience=2, min_delta=100, min_rate=0.03)
    history = fit(gb.MLP([8, 3], dtype="float64"), X, y, epochs=10, callbacks=[reduce], optimizer=gb.SGD(0.1))
    # the first epoch is better than nothing; then after more than 2 epochs without improvement, as PyTorch's
    expected = [0.1, 0.1, 0.1, 0.1, 0.05, 0.05, 0.05, 0.03, 0.03, 0.03]
    assert history["learning_rate"] == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (
            lambda: EarlyStopping(),
            "monitor is 'val_loss'; the history has loss, learning_rate, seconds; give fit validation_data",
        ),
        (lambda: EarlyStopping("lass"), "monitor is 'lass'; the history has loss"),
        (lambda: EarlyStopping(patience=0), "patience is 0; it must be a whole number of epochs >= 1"),
        (lambda: ReduceOnPlateau(factor=1.0), r"factor is 1\.0; it must be in \(0, 1\)"),
    ],
)
def test_a_callback_that_cannot_work_says_why(callback: Any, message: str, rng: np.random.Generator) -> None:
    X, y = clusters(rng)
    with pytest.raises(ValueError, match=message):
        fit(gb.MLP([8, 3], device="reference"), X, y, epochs=1, callbacks=[callback()])


# ---------------------------------------------------------------------- dropout, L-BFGS, display


def test_dropout_is_for_training_only(device: str, rng: np.random.Generator) -> None:
    X, y = clusters(rng, n=12)
    plain, dropping = (gb.MLP([8, 64, 3], device=device, dropout=p) for p in (0.0, 0.5))
    assert np.array_equal(plain.forward(X), dropping.forward(X))
    assert float(plain.loss_and_gradients(X, y)[0]) == float(dropping.loss_and_gradients(X, y)[0])
    a, b = (fit(m, X, y, epochs=1, batch_size=12, optimizer=gb.SGD(1e-30))["loss"][0] for m in (plain, dropping))
    assert a != b


def test_the_backward_mask_is_the_forward_mask(device: str, rng: np.random.Generator) -> None:
    model = gb.MLP([8, 50, 3], "identity", device=device, dropout=0.5)
    step = model.step(6, keep=True)
    step.names.array("X")[...] = model.backend.asarray(rng.normal(size=(6, 8)).astype(np.float32))
    step.names.array("y")[...] = model.backend.asarray(np.arange(6) % 3)
    seen = {}
    for operation in step.bound():
        model.backend.run(operation)
        if isinstance(operation, Dropout):
            seen[operation.phase] = model.backend.to_numpy(operation.out) == 0
    assert np.array_equal(seen["forward"], seen["backward"])
    # 300 elements, each dropped with probability 1/2: 5 standard deviations are 43
    assert abs(int(seen["forward"].sum()) - 150) < 43


def test_the_gradient_of_a_dropout_step_is_the_slope_of_its_loss(rng: np.random.Generator) -> None:
    model = gb.MLP([4, 9, 9, 3], "tanh", device="reference", dtype="float64", dropout=0.3)
    step = model.step(5)
    step.names.array("X")[...] = rng.normal(size=(5, 4))
    step.names.array("y")[...] = np.arange(5) % 3
    run, theta, loss = step.compile(), model.parameters.flat, step.names.array("loss")
    run()
    start, gradient = theta.copy(), model.gradients.flat.copy()
    v, e = rng.normal(size=theta.size) * (start != 0), 1e-5
    values = []
    for sign in (1, -1):
        theta[...] = start + sign * e * v
        run()
        values.append(float(loss[0]))
    assert (values[0] - values[1]) / (2 * e) == pytest.approx(float(gradient @ v), rel=1e-7)


def test_lbfgs_finds_the_least_squares_solution(rng: np.random.Generator) -> None:
    X = rng.normal(size=(40, 5))
    y = X @ rng.normal(size=(5, 2)) + 0.3 + rng.normal(size=(40, 2)) / 10
    model = gb.MLP([5, 2], loss="mean_squared_error", dtype="float64")
    history = fit(model, X, y, epochs=100, optimizer=gb.LBFGS(tolerance=1e-12))
    solution, *_ = np.linalg.lstsq(np.column_stack([X, np.ones(40)]), y, rcond=None)
    # the loss is flat to a relative 1e-12 (ftol) within about sqrt(1e-12) of its minimum
    assert_within(model.parameters.W[0], solution[:5], 1e-5)
    assert_within(model.parameters.b[0], solution[5], 1e-5)
    assert history["loss"] == sorted(history["loss"], reverse=True)
    assert len(history["loss"]) < 100


def test_lbfgs_with_dropout_is_an_error(rng: np.random.Generator) -> None:
    X, y = clusters(rng)
    model, seen = gb.MLP([8, 4, 3], dropout=0.5), Recording()
    with pytest.raises(ValueError, match=r"dropout is 0\.5: set it to 0"):
        fit(model, X, y, optimizer="lbfgs", callbacks=seen)
    assert seen.calls == []  # nothing has begun
    assert model.optimizer_state is None


def test_progress_shows_the_loss_and_the_metric(capsys: pytest.CaptureFixture[str], rng: np.random.Generator) -> None:
    X, y = clusters(rng)
    fit(gb.MLP([8, 3]), X, y, epochs=2, validation_data=(X, y), progress=True)
    shown = capsys.readouterr().out
    assert "epoch 2/2" in shown
    assert "val_accuracy" in shown
    fit(gb.MLP([8, 3]), X, y, epochs=1)
    assert capsys.readouterr().out == ""


def test_the_data_are_not_changed(device: str, rng: np.random.Generator) -> None:
    X, y = clusters(rng, n=12)
    X = X.astype(np.float32)
    kept_X, kept_y = X.copy(), y.copy()
    fit(gb.MLP([8, 4, 3], device=device), X, y, epochs=1, batch_size=12, validation_data=(X, y))
    assert np.array_equal(X, kept_X)
    assert np.array_equal(y, kept_y)


@pytest.mark.parametrize("rate", [1e-6, gb.Cosine(1e-6, steps=100)])
def test_reduce_on_plateau_never_raises_the_rate(rate: Any, rng: np.random.Generator) -> None:
    X, y = rng.normal(size=(16, 3)), np.arange(16) % 2
    model = gb.MLP([3, 2], device="reference")
    reduce = ReduceOnPlateau("loss", patience=1, min_delta=100, min_rate=np.float32(1e-2))
    history = model.fit(X, y, epochs=6, optimizer=gb.SGD(rate), callbacks=[reduce], progress=False)
    assert history["learning_rate"] == sorted(history["learning_rate"], reverse=True)
    assert history["learning_rate"][0] == pytest.approx(1e-6)
    assert model.optimizer_state is not None
    assert model.optimizer_state.rate[0] == 1e-6


def test_an_improvement_is_more_than_min_delta() -> None:
    stop = EarlyStopping("loss", patience=9, min_delta=0.5)
    model = gb.MLP([3, 2], device="reference")
    training = Training(model, History(), 9)
    stop.on_train_begin(training)
    improved = []
    for value in (4.0, 3.5, 3.25, float("nan"), 2.0, float("-inf"), float("-inf")):
        training.history.add(loss=value)
        improved.append(stop.improved(training))
    assert improved == [True, False, True, False, True, True, False]


@pytest.mark.parametrize("rate", [-1.0, float("nan"), float("inf"), "0.1", True])
def test_a_callback_cannot_set_a_rate_that_is_none(rate: Any, rng: np.random.Generator) -> None:
    class Set(gb.Callback):
        def on_epoch_end(self, training: Any) -> None:
            training.learning_rate = rate

    model = gb.MLP([3, 2], device="reference")
    with pytest.raises(ValueError, match=r"learning_rate is .*; it must be a number >= 0"):
        model.fit(rng.normal(size=(8, 3)), np.arange(8) % 2, epochs=1, callbacks=[Set()], progress=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EarlyStopping(patience=True), "patience is True"),
        (lambda: EarlyStopping(patience=2.5), r"patience is 2\.5; it must be a whole number of epochs >= 1"),  # type: ignore[arg-type]
        (lambda: EarlyStopping(min_delta=-0.1), r"min_delta is -0\.1; it must be a number >= 0"),
        (lambda: ReduceOnPlateau(factor=float("nan")), r"factor is nan; it must be in \(0, 1\)"),
        (lambda: ReduceOnPlateau(min_rate=-1), "min_rate is -1; it must be a number >= 0"),
    ],
)
def test_callbacks_check_their_numbers(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_validation_data_may_have_weights(device: str, rng: np.random.Generator) -> None:
    X, y = clusters(rng)
    weight = rng.random(60)
    model = gb.MLP([8, 3], device=device)
    history = fit(model, X, y, epochs=2, validation_data=(X, y, weight))
    expected = model.evaluate(X, y, weight)
    assert history["val_loss"][-1] == expected["loss"]
    assert history["val_accuracy"][-1] == expected["accuracy"]
    assert expected != model.evaluate(X, y)


class Once(Callback):
    """Stops after the first epoch."""

    def on_epoch_end(self, training: Any) -> None:
        training.stop = True


def test_one_callback_needs_no_list(rng: np.random.Generator) -> None:
    X, y = clusters(rng)
    for callbacks in (Once(), [Once()], (Once(),), iter([Once()])):
        assert len(fit(gb.MLP([8, 3]), X, y, epochs=3, callbacks=callbacks)["loss"]) == 1
    assert len(fit(gb.MLP([8, 3]), X, y, epochs=3, callbacks=None)["loss"]) == 3


def test_a_method_that_is_never_called_is_named(rng: np.random.Generator) -> None:
    X, y = clusters(rng)
    for name, message in (
        ("on_epoch_ends", r"callback Mine has on_epoch_ends, which fit does not call \(did you mean on_epoch_end\?\)"),
        ("on_batch_end", "has on_batch_end, which fit does not call"),
        (
            "epoch_end",
            "callback Mine has no method that fit calls; it calls on_train_begin, on_epoch_end, on_train_end",
        ),
    ):
        for base in (Callback, object):
            mine = type("Mine", (base,), {name: lambda self, training: None})()
            with pytest.raises(ValueError, match=message):
                fit(gb.MLP([8, 3]), X, y, callbacks=[mine])
    for method in (lambda self: None, 3):
        mine = type("Mine", (), {"on_epoch_end": method})()
        with pytest.raises(ValueError, match="on_epoch_end of callback Mine must be a method with one argument"):
            fit(gb.MLP([8, 3]), X, y, callbacks=mine)


def test_parameters_kept_in_a_training_that_was_broken_off_are_not_restored_in_the_next(
    rng: np.random.Generator,
) -> None:
    X, y = clusters(rng)
    stopping = EarlyStopping("loss")

    def fail(training: Any) -> None:
        raise KeyError

    with pytest.raises(KeyError):
        fit(gb.MLP([8, 3]), X, y, callbacks=[stopping, type("Fails", (), {"on_epoch_end": staticmethod(fail)})()])
    stopping.on_train_begin(None)
    stopping.on_train_end(None)  # would write to the network of the first training


@pytest.mark.parametrize("optimizer", ["sgd", "lbfgs"])
def test_what_a_callback_raises_reaches_the_caller_and_the_network_stays_usable(
    optimizer: str, rng: np.random.Generator
) -> None:
    X, y = clusters(rng)
    for raised, seen in ((KeyError("mine"), KeyError), (StopIteration(), RuntimeError)):
        mine = type("Mine", (), {"on_epoch_end": lambda self, training, raised=raised: (_ for _ in ()).throw(raised)})()
        model = gb.MLP([8, 3])
        with pytest.raises(seen):
            fit(model, X, y, epochs=3, optimizer=optimizer, callbacks=mine)
        assert len(fit(model, X, y, epochs=1, optimizer=optimizer)["loss"]) == 1


@pytest.mark.parametrize(
    ("loss", "outputs", "values"),
    [
        ("mean_squared_error", 1, [0, 1]),
        ("sigmoid_cross_entropy", 1, [0, 1]),
        ("hinge", 1, [-1, 1]),
        ("softmax_cross_entropy", 2, [0, 1]),
    ],
)
def test_predictions_have_the_shape_of_the_targets(
    loss: str, outputs: int, values: list[int], device: str, tmp_path: Any, rng: np.random.Generator
) -> None:
    X, y = rng.normal(size=(6, 4)), np.array(values * 3)
    model = gb.MLP([4, outputs], loss=loss, device=device)
    untrained = model.predict(X)
    assert untrained.shape == ((6,) if outputs > 1 else (6, 1))
    for shape in ((6,), (6, 1)):
        fit(model, X, y.reshape(shape), epochs=1)
        assert model.predict(X).shape == shape
        assert model.to("reference").predict(X).shape == shape
        model.save(tmp_path / "net.safetensors")
        assert gb.load(tmp_path / "net.safetensors").predict(X).shape == shape
