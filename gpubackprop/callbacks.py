"""Callbacks: what happens between the epochs of ``fit``.

A callback is any object with one or more of the methods of :class:`Callback`; it is given the training as it stands.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from gpubackprop.definitions import Array, check_count, check_number

if TYPE_CHECKING:
    from gpubackprop.training import Training


class Callback:
    """Does nothing; override what is needed.

    ``training`` has ``model``, ``history``, ``epoch`` (from 0), ``epochs``, ``stop`` (set it to True to end after this epoch) and
    ``learning_rate`` (the base rate; may be set).
    """

    def on_train_begin(self, training: Training) -> None:
        """Run before the first epoch."""

    def on_epoch_end(self, training: Training) -> None:
        """Run after each epoch, when its row is in ``training.history``."""

    def on_train_end(self, training: Training) -> None:
        """Run after the last epoch, also after Ctrl-C."""


class _Monitor(Callback):
    """Watches one column of the history; accuracy and r2 are better when larger, everything else when smaller."""

    def __init__(self, monitor: str, patience: int, min_delta: float) -> None:
        self.monitor = monitor
        self.patience = check_count("patience", patience, " of epochs")
        self.min_delta = check_number("min_delta", min_delta, lambda x: 0 <= x < math.inf, "a number >= 0")

    def on_train_begin(self, training: Training) -> None:
        self.best = float("inf")
        self.since = 0

    def improved(self, training: Training) -> bool:
        """Return whether the watched value is better than ever, by more than ``min_delta``; NaN is never better."""
        name = self.monitor
        if not training.history.get(name):
            have = ", ".join(k for k, v in training.history.items() if v)
            hint = "; give fit validation_data" if name.startswith("val_") else ""
            raise ValueError(f"monitor is {name!r}; the history has {have}{hint}")
        value = training.history[name][-1]
        if name.endswith(("accuracy", "r2")):
            value = -value
        better = value < self.best - self.min_delta
        self.best = value if better else self.best
        self.since = 0 if better else self.since + 1
        return better


class EarlyStopping(_Monitor):
    """Stop when the watched value has not improved for ``patience`` epochs, and go back to the best parameters.

    Parameters
    ----------
    monitor : str
        A column of the history.
    patience : int
        Epochs without improvement.
    min_delta : float
        A change counts if it is larger, as in Keras and PyTorch.
    restore_best : bool
        End with the parameters of the best epoch.
    """

    def __init__(
        self, monitor: str = "val_loss", patience: int = 10, min_delta: float = 0.0, restore_best: bool = True
    ) -> None:
        super().__init__(monitor, patience, min_delta)
        self.restore_best = restore_best
        self._parameters: Array | None = None

    def on_epoch_end(self, training: Training) -> None:
        if self.improved(training) and self.restore_best:
            self._parameters = training.model.parameters.flat.copy()
        training.stop = training.stop or self.since >= self.patience

    def on_train_end(self, training: Training) -> None:
        if self._parameters is not None:
            training.model.parameters.flat[...] = self._parameters
            self._parameters = None


class ReduceOnPlateau(_Monitor):
    """Multiply the base learning rate by ``factor`` when the watched value has not improved for ``patience`` epochs.

    ``torch.optim.lr_scheduler.ReduceLROnPlateau``, with its defaults but for the absolute ``min_delta``. The rate never
    rises: one that is at ``min_rate`` or below is left as it is.

    Parameters
    ----------
    monitor : str
        A column of the history.
    factor : float
        In (0, 1).
    patience : int
        Epochs without improvement that are still borne.
    min_delta : float
        A change counts if it is larger.
    min_rate : float
        The base rate is not reduced below it.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        factor: float = 0.1,
        patience: int = 10,
        min_delta: float = 1e-4,
        min_rate: float = 0.0,
    ) -> None:
        super().__init__(monitor, patience, min_delta)
        self.factor = check_number("factor", factor, lambda x: 0 < x < 1, "in (0, 1)")
        self.min_rate = check_number("min_rate", min_rate, lambda x: 0 <= x < math.inf, "a number >= 0")

    def on_epoch_end(self, training: Training) -> None:
        if not self.improved(training) and self.since > self.patience:
            rate = training.learning_rate
            training.learning_rate = min(rate, max(rate * self.factor, self.min_rate))
            self.since = 0


def call(callbacks: Any, method: str, training: Training) -> None:
    """Call one method of each callback that has it."""
    for callback in callbacks:
        if hasattr(callback, method):
            getattr(callback, method)(training)
