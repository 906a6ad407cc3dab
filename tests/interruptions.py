"""Interrupts trainings at random instants, resumes them, and compares the files with those of trainings that were left alone.

    python tests/interruptions.py [COUNT [SEED]]

Each training is a process of its own, ended by SIGINT, SIGTERM or kill -9, resumed, perhaps ended again, and at last resumed to its
end. model.safetensors, history.json and checkpoint.safetensors must have the bytes of the undisturbed run. On POSIX systems.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import gpubackprop as gb
from gpubackprop.cli import main as command_line
from gpubackprop.datasets import load_dataset
from gpubackprop.training.run import CHECKPOINT, HISTORY, MODEL

FILES = (MODEL, HISTORY, CHECKPOINT)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
ENDED = 2  # status of a process that had nothing to resume: all was written when the signal came
FORK = multiprocessing.get_context("fork")

# by the command line: options; in Python: a dictionary
SETTINGS: dict[str, Any] = {
    "command line, Adam": ["--epochs", "100"],
    "command line, patience": [
        "--epochs", "200", "--patience", "200", "--optimizer", "sgd", "--schedule", "cosine", "--learning-rate", "0.3",
    ],
    "command line, L-BFGS": ["--epochs", "60", "--optimizer", "lbfgs", "--dtype", "float64"],
    "dropout, micro-batches": {"epochs": 40, "optimizer": "adamw", "dropout": 0.2, "micro_batch_size": 16},
    "weights, plateau": {"epochs": 60, "optimizer": gb.RMSprop(0.01), "weighted": True, "plateau": True},
    "one long epoch": {"epochs": 1, "batch_size": 1, "optimizer": gb.SGD(0.01, momentum=0.9), "repeat": 12},
}  # fmt: skip


def begin(name: str, folder: Path) -> None:
    """Train in this process."""
    setting = SETTINGS[name]
    if isinstance(setting, list):
        shell("--out", str(folder), "--checkpoint-every", "0.02s", *setting)
    else:
        X, y, given, dropout = parts(name)
        model = gb.MLP([64, 64, 32, 10], "tanh", dropout=dropout, seed=7)
        callbacks = [gb.ReduceOnPlateau(patience=2), gb.EarlyStopping(patience=50)] if setting.get("plateau") else []
        leave(
            model.fit(X, y, checkpoint=folder, checkpoint_every="0.02s", callbacks=callbacks, progress=False, **given)
        )


def go_on(name: str, folder: Path) -> None:
    """Resume in this process."""
    if isinstance(SETTINGS[name], list):
        shell("--resume", str(folder))
    else:
        X, y, given, _ = parts(name)
        data = {key: given[key] for key in ("validation_data", "sample_weight") if key in given}
        try:
            leave(gb.resume(folder, checkpoint_every="0.02s").fit(X, y, progress=False, **data))
        except gb.RunError as error:
            print(error)
            sys.exit(ENDED)  # as the command line does


def leave(history: gb.History) -> None:
    """Tell by the exit status whether a fit was interrupted; the command line does so itself."""
    sys.exit(130 if history.interrupted else 0)


def shell(*arguments: str) -> None:
    sys.argv = ["gpubackprop", "train", "--quiet", *arguments]
    command_line()


def parts(name: str) -> tuple[np.ndarray, np.ndarray, dict[str, Any], float]:
    d, given = load_dataset("digits"), dict(SETTINGS[name])
    repeat = given.pop("repeat", 1)
    X, y = np.tile(d.X, (repeat, 1)), np.tile(d.y, repeat)
    given["validation_data"] = d.X_test, d.y_test
    if given.pop("weighted", False):
        given["sample_weight"] = np.linspace(0.5, 2, len(X))
    given.pop("plateau", None)
    dropout = given.pop("dropout", 0.0)
    return X, y, {"batch_size": 32, **given}, dropout


def process(work: Any, name: str, folder: Path) -> Any:
    """Start one of the two above; what it prints, a traceback for one, goes to a file beside its folder."""

    def quietly() -> None:
        said = os.open(said_by(folder), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where this is a background job
        work(name, folder)

    child = FORK.Process(target=quietly)
    child.start()
    return child


def said_by(folder: Path) -> Path:
    return folder.with_name(f"{folder.name} said.txt")


def interrupted(name: str, folder: Path, seconds: float, numbers: random.Random) -> list[str]:
    """Train with one to three interruptions; return the signals, with the statuses of the processes that they ended."""
    ended: list[str] = []
    for attempt in range(numbers.choice((1, 1, 2, 3))):
        child = process(go_on if attempt else begin, name, folder)
        while not (folder / CHECKPOINT).exists() and child.is_alive():
            time.sleep(0.001)
        time.sleep(numbers.uniform(0, seconds))
        number = numbers.choice(SIGNALS)
        if child.is_alive():
            os.kill(child.pid, number)
        child.join()
        early = number == signal.SIGINT  # while it was being resumed, say
        assert child.exitcode != 1 or early, f"{name}, {', '.join(ended)}:\n{said_by(folder).read_text()}"
        if child.exitcode == 0 or (attempt and child.exitcode == ENDED):
            break
        ended.append(f"{number.name} {child.exitcode}")
    else:
        child = process(go_on, name, folder)
        child.join()
        assert child.exitcode in (0, ENDED), (
            f"{name}, {', '.join(ended)}; resumed, status {child.exitcode}:\n{said_by(folder).read_text()}"
        )
    return ended


def main(count: int = 200, seed: int = 0, report: Any = print) -> int:
    """Return how many of so many trainings ended with other bytes."""
    numbers, wrong, by_signal = random.Random(seed), 0, dict.fromkeys((n.name for n in SIGNALS), 0)
    with tempfile.TemporaryDirectory() as scratch:
        whole, seconds = {}, {}
        for name in SETTINGS:
            for _ in range(2):  # kernels are compiled in the first
                folder = Path(scratch, f"whole {len(list(Path(scratch).iterdir()))}")
                child, started = process(begin, name, folder), time.monotonic()
                while not (folder / CHECKPOINT).exists() and child.is_alive():
                    time.sleep(0.001)
                started = time.monotonic()
                child.join()
                seconds[name] = time.monotonic() - started
                assert child.exitcode == 0, name
            whole[name] = [(folder / file).read_bytes() for file in FILES]
        for i in range(count):
            name, folder = list(SETTINGS)[i % len(SETTINGS)], Path(scratch, f"run {i}")
            ended = interrupted(name, folder, seconds[name], numbers)
            for text in ended:
                by_signal[text.split()[0]] += 1
            different = [file for file, b in zip(FILES, whole[name], strict=True) if (folder / file).read_bytes() != b]
            wrong += bool(different)
            if different:
                report(f"WRONG: {name}, {', '.join(ended)}: {', '.join(different)} differ")
    signals = ", ".join(f"{number} {name}" for name, number in by_signal.items())
    interruptions = sum(by_signal.values())
    report(
        f"{count - wrong} of {count} trainings ended with the same bytes, after {interruptions} interruptions ({signals})"
    )
    return wrong


if __name__ == "__main__":
    sys.exit(bool(main(*map(int, sys.argv[1:3]))))
