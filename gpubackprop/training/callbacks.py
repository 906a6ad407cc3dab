"""Callbacks: what happens between the epochs of ``fit``.

A callback is any object with one or more of the methods of :class:`Callback`; it receives the current training. One
with state that lasts from epoch to epoch also has ``state_dict`` and ``load_state_dict``, so that a training can be resumed.
"""

from __future__ import annotations

import difflib
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gpubackprop.definitions import Array, check_count, check_flag, check_number, plain, shown
from gpubackprop.training.history import is_better_larger

if TYPE_CHECKING:
    from gpubackprop.training.history import Training


METHODS = ("on_train_begin", "on_epoch_end", "on_train_end")
State = dict[str, Any]
"""The state of a callback, by name: arrays, and JSON values (numbers, strings, lists, None)."""


class Callback:
    """Base class of callbacks; override the methods you need.

    ``training`` has ``model``, ``history``, ``epoch`` (from 0), ``epochs``, ``stop`` (set it to True to end after this epoch) and
    ``learning_rate`` (the base rate; may be set).
    """

    def on_train_begin(self, training: Training) -> None:
        """Called before the first epoch."""

    def on_epoch_end(self, training: Training) -> None:
        """Called after each epoch, once its row is in ``training.history``."""

    def on_train_end(self, training: Training) -> None:
        """Called after the last epoch, also after Ctrl-C."""

    def state_dict(self) -> State:
        """Return the state that the next epoch depends on, for a checkpoint."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """Load what :meth:`state_dict` returned; called after :meth:`on_train_begin` of a resumed training."""


class _Monitor(Callback):
    """Watches one column of the history; accuracy and r2 are better when larger, everything else when smaller."""

    def __init__(self, monitor: str, patience: int, min_delta: float) -> None:
        if not isinstance(monitor, str):
            raise ValueError(
                f"monitor is {shown(monitor)}; it must be the name of a column of the history, as in 'val_loss'"
            )
        self.monitor = monitor
        self.patience = check_count("patience", patience, " of epochs")
        self.min_delta = check_number("min_delta", min_delta, lambda x: 0 <= x < math.inf, "a number >= 0")

    def on_train_begin(self, training: Training) -> None:
        self.best = float("inf")
        self.since = 0

    def state_dict(self) -> State:
        return {"best": self.best, "since": self.since}

    def load_state_dict(self, state: State) -> None:
        self.best, self.since = float(state["best"]), int(state["since"])

    def improved(self, training: Training) -> bool:
        """Return whether the watched value has improved by more than ``min_delta``; NaN never has."""
        name = self.monitor
        if not training.history.get(name):
            have = ", ".join(k for k, v in training.history.items() if v)
            hint = "; give fit validation_data" if name.startswith("val_") else ""
            raise ValueError(f"monitor is {shown(name)}; the history has {have}{hint}")
        value = training.history[name][-1]
        if is_better_larger(name):
            value = -value
        better = value < self.best - self.min_delta
        self.best = value if better else self.best
        self.since = 0 if better else self.since + 1
        return better


class EarlyStopping(_Monitor):
    """Stop when the watched value has not improved for ``patience`` epochs, and restore the best parameters.

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
        self.restore_best = check_flag("restore_best", restore_best)
        self._parameters: Array | None = None

    def state_dict(self) -> State:
        return {**super().state_dict(), "parameters": self._parameters}

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        self._parameters = state["parameters"]

    def on_train_begin(self, training: Training) -> None:
        super().on_train_begin(training)
        self._parameters = None  # those of an aborted training are of no use

    def on_epoch_end(self, training: Training) -> None:
        if self.improved(training) and self.restore_best:
            self._parameters = training.model.parameters.flat.copy()
        training.stop = training.stop or self.since >= self.patience

    def on_train_end(self, training: Training) -> None:
        if self._parameters is not None:
            training.model.parameters.flat[...] = training.model.backend.asarray(self._parameters)
            self._parameters = None


class ReduceOnPlateau(_Monitor):
    """Multiply the base learning rate by ``factor`` when the watched value has not improved for ``patience`` epochs.

    ``torch.optim.lr_scheduler.ReduceLROnPlateau``, with its defaults but for the absolute ``min_delta``. The rate never
    rises: at or below ``min_rate`` it stays as it is.

    Parameters
    ----------
    monitor : str
        A column of the history.
    factor : float
        In (0, 1).
    patience : int
        Epochs without improvement to tolerate.
    min_delta : float
        A change counts if it is larger.
    min_rate : float
        Lower bound of the base rate.
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


def as_callbacks(given: Any) -> list[Any]:
    """Return one callback, or several, as a list.

    Raises
    ------
    ValueError
        One has none of the methods that ``fit`` calls, or a similarly named one that it does not call.
    """
    try:
        lone = given is not None and (isinstance(given, type) or not hasattr(given, "__iter__"))
        callbacks = [given] if lone else list(() if given is None else given)
    except Exception as error:  # iterating over it may raise anything
        raise ValueError(f"callbacks is {shown(given)}; give a callback or a list of them") from error
    for callback in callbacks:
        name = callback.__name__ if isinstance(callback, type) else type(callback).__name__
        if isinstance(callback, type):
            raise ValueError(f"callbacks holds the class {name}; make one, as in {name}(...)")
        for method in dir(callback):
            if method.startswith("on_") and method not in METHODS and callable(getattr(callback, method)):
                near = difflib.get_close_matches(method, METHODS, n=1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                raise ValueError(
                    f"callback {name} has {method}, which fit does not call{hint}; it calls {', '.join(METHODS)}"
                )
        for method in METHODS:
            if hasattr(callback, method) and not _takes_one(getattr(callback, method)):
                raise ValueError(f"{method} of callback {name} must be a method with one argument, the training")
        if not any(_overrides(callback, method) for method in METHODS) and type(callback) is not Callback:
            raise ValueError(f"callback {name} has no method that fit calls; it calls {', '.join(METHODS)}")
    return callbacks


def _overrides(callback: Any, method: str) -> bool:
    """Return whether a callback defines a method, rather than inheriting the empty one of :class:`Callback`."""
    own = getattr(callback, method, None)
    return callable(own) and getattr(own, "__func__", own) is not getattr(Callback, method)


def _takes_one(method: Any) -> bool:
    try:
        inspect.signature(method).bind(None)
    except TypeError:
        return False
    except ValueError:  # compiled, without a signature: checked when called
        return True
    return True


def call(callbacks: list[Any], method: str, training: Training) -> None:
    """Call one method of each callback that has it."""
    for callback in callbacks:
        if hasattr(callback, method):
            try:
                getattr(callback, method)(training)
            except StopIteration as error:  # SciPy would take it as a request to stop
                raise RuntimeError(f"{method} of {type(callback).__name__} raised StopIteration") from error


OWN: dict[str, type[_Monitor]] = {kind.__name__: kind for kind in (EarlyStopping, ReduceOnPlateau)}
"""Callbacks that a description is enough for; :func:`matching` recreates them."""


def described(
    callbacks: Sequence[Any], to_numpy: Callable[[Array], Array]
) -> tuple[list[dict[str, Any]], dict[str, Array]]:
    """Return a description of each callback with its state as JSON values, and the arrays of these states by name.

    Raises
    ------
    ValueError
        A state holds a value that is neither an array nor a JSON value.
    """
    words: list[dict[str, Any]] = []
    arrays: dict[str, Array] = {}
    for i, callback in enumerate(callbacks):
        state = dict(callback.state_dict()) if hasattr(callback, "state_dict") else {}
        held = {name: value for name, value in state.items() if getattr(value, "ndim", 0)}
        arrays |= {f"callbacks.{i}.{name}": to_numpy(value) for name, value in held.items()}
        rest = {name: plain(value) for name, value in state.items() if name not in held}
        for name, value in rest.items():
            try:
                json.dumps(value)
            except (TypeError, ValueError):
                raise ValueError(
                    f"state_dict of callback {type(callback).__name__} has {name!r}, a {type(value).__name__}; a checkpoint holds "
                    "arrays, numbers, strings, lists, dictionaries and None"
                ) from None
        words.append(
            {"name": type(callback).__name__, "settings": _settings(callback), "state": rest, "arrays": sorted(held)}
        )
    return words, arrays


def _settings(callback: Any) -> dict[str, Any] | None:
    """Return the settings that recreate a callback, None for one that is not of this module."""
    if type(callback) is not OWN.get(type(callback).__name__):
        return None
    return {name: plain(getattr(callback, name)) for name in inspect.signature(type(callback)).parameters}


def restored(callbacks: Sequence[Any], words: Sequence[Mapping[str, Any]], arrays: Mapping[str, Array]) -> None:
    """Restore the state of each callback as :func:`described` returned it."""
    for i, (callback, said) in enumerate(zip(callbacks, words, strict=True)):
        state = {**said["state"], **{name: arrays[f"callbacks.{i}.{name}"] for name in said["arrays"]}}
        if state and not hasattr(callback, "load_state_dict"):
            raise ValueError(f"callback {said['name']} has state in the checkpoint, but no load_state_dict")
        if hasattr(callback, "load_state_dict"):
            callback.load_state_dict(state)


def matching(given: Any, words: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return the callbacks of a resumed training: those given, which must match the described ones, or recreated ones.

    Raises
    ------
    ValueError
        They differ; or none are given, and one is not of this module.
    """
    names = [said["name"] for said in words]
    if given is None:
        unknown = [said["name"] for said in words if said["settings"] is None]
        if unknown:
            raise ValueError(
                f"the run has custom callbacks, {', '.join(unknown)}: give callbacks=[...] as in its first fit"
            )
        return [OWN[said["name"]](**said["settings"]) for said in words]
    callbacks = as_callbacks(given)
    if [type(callback).__name__ for callback in callbacks] != names:
        have = ", ".join(type(callback).__name__ for callback in callbacks) or "none"
        raise ValueError(f"callbacks are {have}; the run has {', '.join(names) or 'none'}, in this order")
    for callback, said in zip(callbacks, words, strict=True):
        if _settings(callback) != said["settings"]:
            raise ValueError(f"{said['name']} has {_settings(callback)}; in the run it has {said['settings']}")
    return callbacks
