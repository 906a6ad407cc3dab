"""What a training shows in the terminal: loss, metric, samples per second and time left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gpubackprop.definitions import Array

REFRESH = 0.2  # seconds between two looks at the loss on the device: each look waits for it


class Progress:
    """Shows nothing; counts the seconds of an epoch."""

    def __init__(self) -> None:
        self._epoch_started = time.perf_counter()

    def epoch_begins(self) -> None:
        """Start the clock of an epoch."""
        self._epoch_started = time.perf_counter()

    def seconds(self) -> float:
        """Return the seconds since the epoch began."""
        return time.perf_counter() - self._epoch_started

    def batch_done(self, n: int, value: Array) -> None:
        """Note a batch of n samples; ``value`` is its loss, on the device."""

    def epoch_done(self, history: dict[str, list[float]]) -> None:
        """Note an epoch, whose row is the last of the history."""


class TerminalProgress(Progress):
    """A bar over all epochs, or a few lines where the output is not a terminal."""

    def __init__(self, bar: Any, task: Any, epochs: int, samples: int) -> None:
        super().__init__()
        self.bar, self.task, self.epochs, self.samples = bar, task, epochs, samples
        self.done = self.seen = 0
        self.epoch = 0
        self.started = self.next_look = time.perf_counter()

    def batch_done(self, n: int, value: Array) -> None:
        self.done += n
        now = time.perf_counter()
        if now >= self.next_look:
            self.next_look = now + REFRESH
            self._show(f"loss {float(value[0]):.4f}", now)

    def epoch_done(self, history: dict[str, list[float]]) -> None:
        self.epoch += 1
        self.done = self.epoch * self.samples
        columns = [f"{name} {history[name][-1]:.4f}" for name in history if name not in ("learning_rate", "seconds")]
        line = "  ".join(columns)
        self._show(line, time.perf_counter())
        if not self.bar.console.is_terminal and self.epoch % max(1, self.epochs // 10) == 0:
            self.bar.console.print(f"epoch {self.epoch}/{self.epochs}  {line}", highlight=False)

    def _show(self, line: str, now: float) -> None:
        rate = self.done / max(now - self.started, 1e-9)
        self.bar.update(
            self.task, completed=self.done, epoch=f"{min(self.epoch + 1, self.epochs)}/{self.epochs}",
            line=line, rate=f"{rate:,.0f} samples/s",
        )  # fmt: skip


@contextmanager
def show_progress(show: bool, epochs: int, samples: int) -> Iterator[Progress]:
    """Yield a progress display for ``epochs`` epochs of ``samples`` samples, shown or not."""
    if not show:
        yield Progress()
        return
    from rich import progress

    columns = (
        progress.TextColumn("epoch {task.fields[epoch]}"),
        progress.BarColumn(bar_width=12),
        progress.TextColumn("{task.fields[line]}"),
        progress.TextColumn("{task.fields[rate]}", style="dim"),
        progress.TimeRemainingColumn(compact=True),
    )
    with progress.Progress(*columns, refresh_per_second=8) as bar:
        task = bar.add_task("", total=epochs * samples, epoch=f"1/{epochs}", line="", rate="")
        yield TerminalProgress(bar, task, epochs, samples)
