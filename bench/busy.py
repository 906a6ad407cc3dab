"""A busy program beside the measured one: a loop in another process on one core, which runs only during the samples meant."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from gpubackprop.bench.timing import Candidate, Run, Sample, Timer

BESIDE = ", beside a busy program"

# It runs from one byte to the next, which it answers, and ends with its input: it cannot outlive its parent.
LOOP = """
import os, select
while os.read(0, 1):
    os.write(1, b"+")
    while not select.select([0], [], [], 0)[0]:
        for _ in range(100_000):
            pass
    if os.read(0, 1):
        os.write(1, b"-")
"""


class BusyProgram:
    """The program, on the first processor that this process may use."""

    def __init__(self) -> None:
        command = [sys.executable, "-I", "-S", "-c", LOOP]
        pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nowhere, bufsize=0)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(self._process.pid, {min(os.sched_getaffinity(0))})

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Return a context in which it computes."""
        self._turn()
        try:
            yield
        finally:
            self._turn()

    def _turn(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b".")
        if not self._process.stdout.read(1):
            raise RuntimeError("the busy program has ended")


@cache
def busy_program() -> BusyProgram:
    """Return the one busy program of this process."""
    return BusyProgram()


@dataclass
class BesideTimer:
    """Another timer, with the busy program running."""

    timer: Timer
    program: BusyProgram

    def __call__(self, run: Run, repeats: int) -> Sample:
        """Return the seconds of ``repeats`` runs."""
        with self.program.running():
            return self.timer(run, repeats)


def add_busy(candidates: list[Candidate]) -> None:
    """Add each candidate that trains once more, beside the busy program and compared with itself alone."""
    for one in [one for one in candidates if one.trains]:
        timer = BesideTimer(one.timer, busy_program())
        candidates.append(Candidate(one.name + BESIDE, one.run, timer, one.units, against=one.name))
