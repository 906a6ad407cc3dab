"""The loop over epochs: steps in the order of the epoch, progress, validation, callbacks, checkpoints, and how it ends."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from gpubackprop.intake import Samples
from gpubackprop.network import Data
from gpubackprop.step.state import CURSOR, RATE, STEPS
from gpubackprop.training.callbacks import call
from gpubackprop.training.convergence import Convergence
from gpubackprop.training.divergence import DivergenceWarning, Guard, Stop
from gpubackprop.training.evaluation import evaluate
from gpubackprop.training.history import History, Training
from gpubackprop.training.progress import Progress, show_progress
from gpubackprop.training.run import Run
from gpubackprop.training.scores import metrics_on
from gpubackprop.training.snapshot import Position
from gpubackprop.training.sources import Source

CALLER = 7  # frames from a warning here to the line that calls MLP.fit
EndEpoch: TypeAlias = Callable[[float], bool]
"""Takes the loss of the finished epoch and returns whether to continue."""
Method: TypeAlias = Callable[[Training, Progress, EndEpoch], None]
"""Trains until ``training.epochs`` epochs are done."""


def train(
    training: Training,
    method: Method,
    samples: int,
    validation: Samples | None,
    callbacks: list[Any],
    metrics: Sequence[str] = (),
    *,
    progress: bool,
    criterion: Convergence | None = None,
    run: Run | None = None,
) -> History:
    """Train by a method, and write the history; Ctrl-C and a divergence end it and keep what was learned."""
    model, history = training.model, training.history

    def end_epoch(loss: float) -> bool:
        """Write the epoch's row, call the callbacks, and return whether to continue."""
        found = {}
        if validation is not None:
            found = evaluate(model.network, model.in_batches(validation.X), validation)
            found |= metrics_on(model, validation, metrics) if metrics else {}
        state = model.optimizer_state
        assert state is not None
        history.add(
            loss=loss,
            **{f"val_{name}": value for name, value in found.items()},
            learning_rate=float(state.scalars[RATE]),
            seconds=report.seconds(),
        )
        converged = criterion is not None and criterion.reached(loss)
        call(callbacks, "on_epoch_end", training)
        report.epoch_done(history)
        training.position = Position(training.epoch + 1)
        if converged or training.stop:
            history.stopped = "converged" if converged else "callback"
        elif run is not None and run.due(epochs=training.epoch + 1):
            run.write(training)
        return not history.stopped

    with show_progress(progress, training.epochs, samples, training.position.epoch) as report:
        call(callbacks, "on_train_begin", training)
        if run is not None:
            run.begin_callbacks(callbacks)
        if criterion is not None:
            for loss in history.get("loss", []):  # of a resumed run
                criterion.reached(loss)
        try:
            if run is None or not run.ends_only:
                history.stopped = ""
                method(training, report, end_epoch)
                history.stopped = history.stopped or "epochs"
        except KeyboardInterrupt:
            history.stopped = "interrupted"
        except Stop as stop:
            history.stopped, history.diverged = "diverged", stop.divergence
        whole = run is not None and (history.stopped != "interrupted" or run.interrupted)
        if run is not None and whole and not run.ends_only:
            # before on_train_end, which may restore the best parameters: the run may be resumed for more epochs
            run.write(training)
        call(callbacks, "on_train_end", training)
    if run is not None and whole:
        run.finish(training)
    _warn(history)
    return history


def _warn(history: History) -> None:
    advice = "a smaller learning rate, clip_norm or data of unit scale help"
    if history.diverged is not None:
        text = f"{history.diverged}; the parameters are those before step {history.diverged.kept}: {advice}"
        warnings.warn(text, DivergenceWarning, stacklevel=CALLER)
    elif history.skipped:
        text = f"{len(history.skipped)} mini-batches were skipped: {advice}; the first: {history.skipped[0]}"
        warnings.warn(text, DivergenceWarning, stacklevel=CALLER)


def descend(
    training: Training,
    report: Progress,
    end_epoch: EndEpoch,
    *,
    data: Data,
    open_source: Callable[[], Source],
    shuffle: bool,
    policy: str,
    run: Run | None,
) -> None:
    """Train by mini-batches; the loss of an epoch is the (weighted) mean of its samples' losses at their steps."""
    state, terms = training.model.optimizer_state, _terms(training, data)
    assert state is not None
    started = time.perf_counter()
    source = open_source()
    training.history.compile_seconds = time.perf_counter() - started
    guard, orders = Guard(training, source, data, policy), Orders(training.model.seed, source.rows) if shuffle else None
    if run is not None:
        run.begin(training, {"value": source.value})
    try:
        while training.position.epoch < training.epochs:
            training.epoch = training.position.epoch
            report.epoch_begins()
            _begin_epoch(training, source, orders)
            guard.mark()
            while (at := training.position).row < source.rows:
                n, steps = source.ahead(at.row)
                steps = min(steps, report.steps_at_once)
                if run is not None:
                    steps = int(min(steps, run.steps_left()))
                source.run(n, steps)
                training.position = Position(at.epoch, at.steps, at.row + n * steps, at.skipped)
                report.batches_done(steps, n, source.value)
                due = run is not None and run.due(steps=steps)
                guard.look(closely=due)
                if run is not None and due:
                    run.write(training)
            if orders is not None and training.epoch + 1 < training.epochs:
                orders.draw(at.steps + math.ceil(source.rows / source.batch_size))  # while a GPU takes the last steps
            guard.look(closely=True)
            counted = terms - training.position.skipped
            if not end_epoch(float(source.value[1]) / counted if counted > 0 else math.nan):
                return
    finally:
        source.close()


def _begin_epoch(training: Training, source: Source, orders: Orders | None) -> None:
    """Begin an epoch, or continue an interrupted one in the same order of rows."""
    state, position = training.model.optimizer_state, training.position
    assert state is not None
    if not position.row:
        training.position = position = Position(position.epoch, int(state.counters[STEPS]))
        state.counters[CURSOR] = 0
        source.value[...] = 0
    source.begin(None if orders is None else orders.after(position.steps))
    source.seek(position.row)


def _terms(training: Training, data: Data) -> float:
    """Return the divisor of an epoch's sum of losses: the number of samples, their weights, or 1 if the loss is a sum."""
    if training.model.loss.reduction == "sum":
        return 1.0
    return float(len(data.X) if data.weight is None else data.weight.sum(dtype=np.float64))


class Orders:
    """The order of n samples in each epoch, which depends on the seed and the steps before it: the same on every device.

    One generator is reused: creating one takes longer than drawing an order of some hundred samples.
    """

    def __init__(self, seed: int, n: int) -> None:
        key = np.array([seed, 0x6F72646572], np.uint64)  # a separate stream from the initial weights
        self._bits, self._n = np.random.Philox(key=key), n
        self._generator, self._state = np.random.Generator(self._bits), self._bits.state
        self._drawn = -1, np.empty(0, np.int64)

    def after(self, steps: int) -> np.ndarray:
        """Return the order of the epoch that begins after this many steps."""
        if self._drawn[0] != steps:
            self.draw(steps)
        return self._drawn[1]

    def draw(self, steps: int) -> None:
        """Draw the order of the epoch that will begin after this many steps, unless one is skipped."""
        # the low word of the counter runs within an epoch: with steps there, the numbers of two epochs would overlap
        self._state["state"]["counter"][:] = 0, steps, 0, 0
        self._bits.state = self._state
        self._drawn = steps, self._generator.permutation(self._n)
