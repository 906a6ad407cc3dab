"""Runs the stages of a report, each in a separate process with a time limit, and keeps their results."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from gpubackprop._version import __version__
from gpubackprop.bench.environment import commit
from gpubackprop.bench.field.archive import impersonal, pack
from gpubackprop.bench.field.stages import SIZES, Stage, sizes_of, stages_of
from gpubackprop.bench.field.summary import summary_of
from gpubackprop.inspect.doctor import ended
from gpubackprop.machine.diagnosis import cuda_problem
from gpubackprop.machine.files import write_whole

LEAST_S = 5.0  # seconds too short for any stage
GRACE_S = 5.0  # seconds after an interruption to save finished results
OUTPUT = {"doctor": "doctor.json"}  # stages whose output is their result


@dataclass(frozen=True)
class Outcome:
    """How a stage ended: "cut" by its time limit or an interruption, with the results so far."""

    stage: str
    state: Literal["ok", "failed", "cut", "not run"]
    seconds: float = 0.0
    reason: str = ""


def field_report(device: str | None, file: Path, minutes: float = 10.0, *, quick: bool = False) -> int:
    """Run all stages on a device, and save their results in a zip file; return the exit status.

    The file is written after every stage; however this process ends, it holds the stages before. Until the end they are in
    a folder next to it.

    Parameters
    ----------
    device : str, optional
        The first GPU by default, or the CPU where there is none.
    file : Path
    minutes : float
        For all stages.
    quick : bool
        Tiny sizes, to check that it runs.

    Raises
    ------
    ValueError
        There is no such device, the file or its folder exists, or a number is out of range.
    """
    device = None if device is None else _checked(device)
    folder = _new_folder(file, minutes)
    all_devices = device is None
    if device is None:
        device = "cpu" if cuda_problem() else "cuda:0"
    unusable = device.startswith("cuda") and cuda_problem(int(device[5:])) is not None
    started = time.monotonic()
    facts: dict[str, Any] = {
        "gpubackprop": __version__, "commit": commit(), "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
        "device": device, "minutes": minutes, "quick": quick,
    }  # fmt: skip
    lines = (f"{suite} = {json.dumps(texts)}\n" for suite, texts in sizes_of(device, quick=quick).items())
    (folder / SIZES).write_text("".join(lines), encoding="utf-8")
    stages, outcomes = list(stages_of(device, folder, all_devices=all_devices, quick=quick)), []
    interrupted = False
    with _terminated_as_interrupted():
        for stage in stages:
            left = minutes * 60 - (time.monotonic() - started)
            if interrupted or left < LEAST_S or (unusable and stage.name != "doctor"):
                why = "interrupted" if interrupted else f"{device} cannot be used" if unusable else "no time left"
                outcome = Outcome(stage.name, "not run", reason=why)
            else:
                print(f"{stage.name}: {stage.title}, at most {max(LEAST_S, left * stage.share):.0f} s", flush=True)
                outcome = _run(stage, folder, max(LEAST_S, left * stage.share))
                interrupted = outcome.reason == "interrupted"
            outcomes.append(outcome)
            if outcome.state != "not run" or stage is stages[-1]:
                print(
                    f"  {outcome.state}, {outcome.seconds:.0f} s{'' if not outcome.reason else ': ' + outcome.reason}",
                    flush=True,
                )
                _keep(folder, file, facts, outcomes)
    print("\n" + (folder / "summary.txt").read_text(encoding="utf-8"))
    shutil.rmtree(folder)
    print(f"wrote {file}: send it back")
    return 130 if interrupted else 1 if any(one.state == "failed" for one in outcomes) else 0


def _new_folder(file: Path, minutes: float) -> Path:
    if file.suffix != ".zip":
        raise ValueError(f"--report is {str(file)!r}; name a file that ends with .zip")
    if not 0 < minutes < 24 * 60:
        raise ValueError(f"--minutes is {minutes:g}; it must be more than 0, and less than a day")
    folder = file.with_suffix(".parts")
    for path in (file, folder):
        if path.exists():
            raise ValueError(f"{str(path)!r} exists; name another file")
    folder.mkdir(parents=True)
    return folder


def _checked(device: str) -> str:
    """Return the full name of the device, "cuda:0" for "cuda"."""
    name, _, number = device.partition(":")
    if name in ("cuda", "gpu") and (not number or number.isdecimal()):
        return f"cuda:{int(number or 0)}"
    if device != "cpu":
        raise ValueError(f"--device is {device!r}; a report is of cpu, cuda or cuda:1")
    return device


def _run(stage: Stage, folder: Path, limit: float) -> Outcome:
    """Run a stage; at its time limit, interrupt it, so that it can save finished results, and then end it."""
    started = time.monotonic()
    log, output = folder / f"{stage.name}.log", folder / OUTPUT.get(stage.name, f"{stage.name}.log")
    reason = ""
    with log.open("ab") as errors, output.open("ab") as lines:
        process = subprocess.Popen(
            stage.command, stdin=subprocess.DEVNULL, stdout=lines, stderr=errors, start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            reason = f"the time limit of {limit:.0f} s"
        except KeyboardInterrupt:
            reason = "interrupted"
        finally:
            _end(process)
    seconds = time.monotonic() - started
    if reason:
        return Outcome(stage.name, "cut", seconds, reason)
    failure = ended(process.returncode, log.read_text(encoding="utf-8", errors="replace"))
    return Outcome(stage.name, "failed" if failure else "ok", seconds, impersonal(failure))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a process that still runs; then end it and its children."""
    if process.poll() is None:
        _signal(process, "SIGINT")
        with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.wait(GRACE_S)
    _signal(process, "SIGKILL")
    process.wait()


def _signal(process: subprocess.Popen[bytes], name: str) -> None:
    with suppress(OSError):
        if os.name == "posix":
            os.killpg(process.pid, getattr(signal, name))
        elif name == "SIGKILL":
            process.kill()


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Make SIGTERM act like Ctrl-C."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _keep(folder: Path, file: Path, facts: dict[str, Any], outcomes: list[Outcome]) -> None:
    """Save the results so far."""
    stages = [asdict(outcome) for outcome in outcomes]
    write_whole(folder / "stages.json", json.dumps({**facts, "stages": stages}, indent=1).encode())
    write_whole(folder / "summary.txt", impersonal(summary_of(folder, facts, stages)).encode())
    pack(folder, file)
