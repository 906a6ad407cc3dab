"""The loop over epochs: steps in the order of the epoch, progress, validation, callbacks, and the end by stop or Ctrl-C."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from gpubackprop.intake import Samples
from gpubackprop.network import Data
from gpubackprop.step.state import CURSOR, RATE, STEPS
from gpubackprop.training.callbacks import call
from gpubackprop.training.evaluation import evaluate
from gpubackprop.training.history import History, Training
from gpubackprop.training.progress import Progress, show_progress
from gpubackprop.training.sources import Source

EndEpoch: TypeAlias = Callable[[float], bool]
"""Takes the loss of the epoch that ends and returns whether to go on."""
Method: TypeAlias = Callable[[Training, Progress, EndEpoch], None]
"""Trains for up to ``training.epochs`` epochs."""


def train(
    training: Training,
    method: Method,
    samples: int,
    validation: Samples | None,
    callbacks: list[Any],
    *,
    progress: bool,
) -> History:
    """Train by a method, and write the history; Ctrl-C ends it with what was learned."""
    model, history = training.model, training.history

    def end_epoch(loss: float) -> bool:
        """Write the epoch's row, call the callbacks, and return whether to go on."""
        metrics = {}
        if validation is not None:
            metrics = evaluate(model.network, model.outputs_in_batches(validation.X), validation)
        state = model.optimizer_state
        assert state is not None
        history.add(
            loss=loss,
            **{f"val_{name}": value for name, value in metrics.items()},
            learning_rate=float(state.scalars[RATE]),
            seconds=report.seconds(),
        )
        call(callbacks, "on_epoch_end", training)
        report.epoch_done(history)
        return not training.stop

    with show_progress(progress, training.epochs, samples) as report:
        call(callbacks, "on_train_begin", training)
        try:
            method(training, report, end_epoch)
        except KeyboardInterrupt:
            history.interrupted = True
        call(callbacks, "on_train_end", training)
    return history


def descend(
    training: Training,
    report: Progress,
    end_epoch: EndEpoch,
    *,
    data: Data,
    open_source: Callable[[], Source],
    shuffle: bool,
) -> None:
    """Train by mini-batches; the loss of an epoch is the (weighted) mean over its samples, as they were met."""
    model, N = training.model, len(data.X)
    state, terms = model.optimizer_state, _terms(training, data)
    assert state is not None
    started = time.perf_counter()
    source = open_source()
    training.history.compile_seconds = time.perf_counter() - started
    try:
        for epoch in range(training.epochs):
            training.epoch = epoch
            report.epoch_begins()
            source.begin(epoch_order(model.seed, int(state.counters[STEPS]), N) if shuffle else None)
            state.counters[CURSOR] = 0
            source.value[...] = 0
            for n, left in source.batches:
                while left:
                    chunk = min(left, report.steps_at_once)
                    source.run(n, chunk)
                    left -= chunk
                    report.batches_done(chunk, n, source.value)
            if not end_epoch(float(source.value[1]) / terms):
                return
    finally:
        source.close()


def _terms(training: Training, data: Data) -> float:
    """Return what the sum of an epoch's losses is divided by: the samples, or their weights, or 1 where the loss is a sum."""
    if training.model.loss.reduction == "sum":
        return 1.0
    return float(len(data.X) if data.weight is None else data.weight.sum(dtype=np.float64))


def epoch_order(seed: int, steps: int, n: int) -> np.ndarray:
    """Return the order of the samples in the epoch that begins after ``steps`` steps: the same on every device."""
    key = np.array([seed, 0x6F72646572], np.uint64)  # a stream of its own, apart from the initial weights
    # the low word of the counter runs within an epoch: with steps there, the numbers of two epochs would overlap
    counter = np.array([0, steps, 0, 0], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter)).permutation(n)
