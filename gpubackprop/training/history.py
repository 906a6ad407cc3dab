"""A training's history, and the training as callbacks see it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from gpubackprop.backends.current import active
from gpubackprop.definitions import check_number
from gpubackprop.training.snapshot import Position
from gpubackprop.training.tables import html_table

if TYPE_CHECKING:
    from gpubackprop.mlp import MLP
    from gpubackprop.training.curves import Picture
    from gpubackprop.training.divergence import Divergence


def is_better_larger(name: str) -> bool:
    """Return whether larger values of a column are better: accuracy and r2, but no loss."""
    return name.endswith(("accuracy", "r2", "precision", "recall", "f1", "roc_auc"))


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

    def plot(self, path: str | Path | None = None) -> Picture:
        """Return the learning curve as a matplotlib figure, which a notebook shows.

        Parameters
        ----------
        path : str or Path, optional
            Write it into this file too; the name says the format, as in ``"curve.png"`` or ``"curve.svg"``.
        """
        from gpubackprop.training.curves import learning_curve  # loads matplotlib

        return learning_curve(self).write(path)

    def __repr__(self) -> str:
        epochs = len(self.get("loss", []))
        last = "".join(
            f", {name} {self[name][-1]:.4g}" for name in self if name not in ("seconds", "learning_rate") and self[name]
        )
        ended = f", stopped: {self.stopped}" if self.stopped not in ("", "epochs") else ""
        return f"History({epochs} epoch{'s' * (epochs != 1)}{last}{ended})"

    def _repr_html_(self) -> str:
        rows = [["", "first", "best", "in epoch", "last"]]
        for name, column in self.items():
            if name != "seconds" and column:
                best = max(column) if is_better_larger(name) else min(column)
                numbers = [f"{column[0]:.4g}", f"{best:.4g}", str(column.index(best) + 1), f"{column[-1]:.4g}"]
                rows.append([name, *(numbers if name != "learning_rate" else [numbers[0], "", "", numbers[3]])])
        return html_table(rows, repr(self))

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
