"""A training's history, and the training as callbacks see it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gpubackprop.backends.current import active
from gpubackprop.definitions import check_number
from gpubackprop.training.snapshot import Position

if TYPE_CHECKING:
    from gpubackprop.mlp import MLP
    from gpubackprop.training.divergence import Divergence


class History(dict[str, list[float]]):
    """One list per column, one entry per epoch: loss, val_loss, val_accuracy or val_r2, learning_rate, seconds."""

    stopped: str = ""
    """Why the training ended: "epochs" (all were done), "converged", "callback", "interrupted" or "diverged"; "" before."""
    compile_seconds: float = 0.0
    """Seconds spent compiling kernels, or loading them from disk, before the first epoch."""
    diverged: Divergence | None = None
    """The step that ended the training because its loss or update was not finite."""

    def __init__(self, *columns: dict[str, list[float]]) -> None:
        super().__init__(*columns)
        self.skipped: list[Divergence] = []
        """With ``on_divergence="skip"``: the steps that were undone."""
        self.determined_by: dict[str, str] = {}
        """What determines the bits of the result. The number of threads does not."""

    @property
    def interrupted(self) -> bool:
        """True if Ctrl-C ended the training."""
        return self.stopped == "interrupted"

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
    position: Position = field(default=Position())
    """The current position; its ``epoch`` counts the running one."""

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
