"""The progress of a training: a bar that fits any terminal, or a line per epoch."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from rich import progress as rich_progress
from rich.console import Console

import gpubackprop as gb


def shown(monkeypatch: pytest.MonkeyPatch, width: int) -> list[str]:
    """Train in a terminal of this width; return the lines that the bar had, without control characters."""
    screen = io.StringIO()
    console = Console(file=screen, width=width, force_terminal=True, color_system=None)
    real = rich_progress.Progress

    def on_console(*columns: object, **options: object) -> rich_progress.Progress:
        return real(*columns, console=console, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(rich_progress, "Progress", on_console)
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(3000, 6)), rng.integers(0, 3, 3000)
    gb.MLP([6, 8, 3], device="reference").fit(X, y, epochs=120, batch_size=1500, validation_data=(X[:50], y[:50]))
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue()).replace("\r", "\n").splitlines()


@pytest.mark.parametrize(
    ("width", "has", "lacks"),
    [
        (60, ["loss"], ["val_accuracy", "samples/s"]),
        (80, ["loss", "val_loss", "val_accuracy"], ["samples/s"]),
        (120, ["loss", "val_loss", "val_accuracy", "samples/s"], []),
    ],
)
def test_the_bar_and_the_time_left_stay_visible(
    monkeypatch: pytest.MonkeyPatch, width: int, has: list[str], lacks: list[str]
) -> None:
    lines = [line for line in shown(monkeypatch, width) if line.strip()]
    assert lines
    assert max(map(len, lines)) <= width
    for line in lines:
        assert re.search(r"epoch \d+/120 [━╺╸ ]{8} .*(\d+:\d\d|-:--)\s*$", line), line
    for name in has:
        assert name in lines[-1]
    for name in lacks:
        assert not any(name in line for line in lines)


def test_a_pipe_gets_a_line_per_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    gb.MLP([2, 3, 2], device="reference").fit(np.eye(2), [0, 1], epochs=23, validation_data=(np.eye(2), [0, 1]))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 23
    assert re.fullmatch(r"epoch 23/23  loss \d\.\d{4}  val_loss \d\.\d{4}  val_accuracy \d\.\d{4}", lines[-1])
