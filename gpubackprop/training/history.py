"""A training's history, and the training as callbacks see it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpubackprop.backends.current import active
from gpubackprop.definitions import check_number

if TYPE_CHECKING:
    from gpubackprop.mlp import MLP


class History(dict[str, list[float]]):
    """One list per column, one entry per epoch: loss, val_loss, val_accuracy or val_r2, learning_rate, seconds."""

    interrupted: bool = False
    """True if Ctrl-C ended the training."""
    compile_seconds: float = 0.0
    """Seconds spent on compiling kernels, or on loading them from disk, before the first epoch."""

    def add(self, **row: float) -> None:
        """Append one epoch."""
        for name, value in row.items():
            self.setdefault(name, []).append(float(value))


@dataclass
class Training:
    """A training as callbacks see it."""

    model: MLP
    history: History
    epochs: int
    epoch: int = 0
    stop: bool = False

    @property
    def learning_rate(self) -> float:
        """The base learning rate; a schedule multiplies it."""
        state = self.model.optimizer_state
        with active(self.model.backend):
            return float(state.rate[0]) if state is not None else 1.0

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        value = check_number("learning_rate", value, lambda x: 0 <= x < math.inf, "a number >= 0")
        if self.model.optimizer_state is not None:
            with active(self.model.backend):
                self.model.optimizer_state.rate[0] = value
