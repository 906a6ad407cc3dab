"""Progress of a training in the terminal: loss, metric, samples per second and time left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gpubackprop.definitions import Array

BAR, TIME_LEFT = 8, 7  # characters: of the bar, and of h:mm:ss
REFRESH = 0.2  # seconds between two reads of the loss on the device: each one waits


CHUNK = 0.1  # seconds of steps between two updates of the display or checks for an interruption
MOST_STEPS = 1024  # steps in a chunk: a GPU queues them without waiting, so the clock does not limit them


class Progress:
    """Shows nothing; times epochs, and says how many steps to run at once."""

    def __init__(self) -> None:
        self._epoch_started = self._chunk_started = time.perf_counter()
        self.steps_at_once = 1

    def epoch_begins(self) -> None:
        """Start the clock of an epoch."""
        self._epoch_started = self._chunk_started = time.perf_counter()

    def seconds(self) -> float:
        """Return the seconds since the epoch began."""
        return time.perf_counter() - self._epoch_started

    def batches_done(self, batches: int, n: int, value: Array) -> None:
        """Record batches of n samples; ``value`` is the loss of the last, on the device."""
        now = time.perf_counter()
        seconds = max(now - self._chunk_started, 1e-9)
        self._chunk_started = now
        if batches == self.steps_at_once or seconds > CHUNK:
            wanted = int(batches * CHUNK / seconds)
            self.steps_at_once = max(1, min(wanted, 2 * self.steps_at_once, MOST_STEPS))

    def epoch_done(self, history: dict[str, list[float]]) -> None:
        """Record an epoch, whose row is the last of the history."""


class LineProgress(Progress):
    """A line per epoch, for output that is not a terminal."""

    def __init__(self, epochs: int, done: int) -> None:
        super().__init__()
        self.epoch, self.epochs = done, epochs

    def epoch_done(self, history: dict[str, list[float]]) -> None:
        self.epoch += 1
        print("  ".join([f"epoch {self.epoch}/{self.epochs}", *_columns(history)]), flush=True)


class TerminalProgress(Progress):
    """A bar over all epochs."""

    def __init__(self, bar: Any, epochs: int, samples: int, done: int) -> None:
        super().__init__()
        self.bar, self.epochs, self.samples = bar, epochs, samples
        self.task = bar.add_task("", total=epochs * samples, epoch=f"{done + 1}/{epochs}", line="compiling")
        self.first = self.done = done * samples
        self.epoch = done
        self.started = self.next_look = 0.0

    def epoch_begins(self) -> None:
        super().epoch_begins()
        self.started = self.started or time.perf_counter()

    def batches_done(self, batches: int, n: int, value: Array) -> None:
        super().batches_done(batches, n, value)
        self.done += batches * n
        now = time.perf_counter()
        if now >= self.next_look:
            self.next_look = now + REFRESH
            self._show([f"loss {float(value[0]):.4f}"], now)

    def epoch_done(self, history: dict[str, list[float]]) -> None:
        self.epoch += 1
        self.done = self.epoch * self.samples
        self._show(_columns(history), time.perf_counter())

    def _show(self, columns: list[str], now: float) -> None:
        rate = (self.done - self.first) / max(now - self.started, 1e-9)
        epoch = f"{min(self.epoch + 1, self.epochs)}/{self.epochs}"
        room = self.bar.console.width - len(f"epoch {epoch} ") - BAR - 1 - TIME_LEFT - 1
        line = _fitting([*columns, f"{rate:,.0f} samples/s"], room)
        self.bar.update(self.task, completed=self.done, epoch=epoch, line=line)


def _columns(history: dict[str, list[float]]) -> list[str]:
    shown = [name for name in history if name not in ("learning_rate", "seconds")]
    return [f"{name} {history[name][-1]:.4f}" for name in shown]


def _fitting(columns: list[str], room: int) -> str:
    """Return as many columns as fit, from the first on, so that the bar and the time left stay on the line."""
    while columns and len("  ".join(columns)) > room:
        columns = columns[:-1]
    return "  ".join(columns)


@contextmanager
def show_progress(show: bool, epochs: int, samples: int, done: int = 0) -> Iterator[Progress]:
    """Yield a progress display for ``epochs`` epochs of ``samples`` samples, the first of which may be done, shown or not."""
    if not show:
        yield Progress()
        return
    from rich import progress

    columns = (
        progress.TextColumn("epoch {task.fields[epoch]}"),
        progress.BarColumn(bar_width=BAR),
        progress.TextColumn("{task.fields[line]}", markup=False),
        progress.TimeRemainingColumn(compact=True),
    )
    bar = progress.Progress(*columns, refresh_per_second=8)
    if not bar.console.is_terminal:
        yield LineProgress(epochs, done)
        return
    with bar:
        yield TerminalProgress(bar, epochs, samples, done)
