"""Timing of contestants against each other: interleaved rounds, medians and quartiles, ratios with their uncertainty.

Knows no device: a timer runs a contestant and says how long it took; see ``WallTimer`` here and ``CudaTimer`` in
:mod:`gpubackprop.bench.gpu_device`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Clock = Callable[[], float]
Run = Callable[[], object]

seconds_now: Clock = time.perf_counter

MOST_REPEATS = 10_000
RESAMPLES = 2_000


@dataclass(frozen=True)
class Sample:
    """Seconds of some runs: between two events on the device (None where there are none to record), and on the wall."""

    device: float | None
    wall: float

    @property
    def best(self) -> float:
        """The device's seconds where they are known, else those on the wall."""
        return self.wall if self.device is None else self.device

    def per(self, units: int) -> Sample:
        """Return the seconds of one unit of work."""
        return Sample(None if self.device is None else self.device / units, self.wall / units)


class Timer(Protocol):
    """Runs something some times over and returns the seconds of all of them, waited for."""

    def __call__(self, run: Run, repeats: int) -> Sample:
        """Return the seconds of ``repeats`` runs."""
        ...


class WallTimer:
    """Wall time alone, for work that is done when ``synchronize`` returns.

    Parameters
    ----------
    synchronize : callable
        Waits for the work that the runs have queued.
    clock : callable
        Returns seconds.
    """

    def __init__(self, synchronize: Run, clock: Clock = seconds_now) -> None:
        self.synchronize, self.clock = synchronize, clock

    def __call__(self, run: Run, repeats: int) -> Sample:
        """Return the seconds of ``repeats`` runs, after waiting for what was queued before."""
        self.synchronize()
        started = self.clock()
        for _ in range(repeats):
            run()
        self.synchronize()
        return Sample(None, self.clock() - started)


@dataclass
class Contestant:
    """Something to be timed.

    Parameters
    ----------
    name : str
    run : callable
        Queues the work.
    timer : Timer
    units : int
        How often one run does the work: times are given for one unit.
    setup_seconds : float, optional
        What compiling or capturing took, which is in no other time.
    """

    name: str
    run: Run
    timer: Timer
    units: int = 1
    setup_seconds: float | None = None


def measure(contestants: Sequence[Contestant], rounds: int, seconds: float) -> dict[str, list[Sample]]:
    """Return the samples of each contestant, one per round and for one unit of work.

    Each round times all contestants one after the other, so that a slow moment falls on all of them. Before the first
    round each runs twice, to be warm and to find how many runs fill ``seconds``.
    """
    repeats = {}
    for one in contestants:
        one.timer(one.run, 1)
        repeats[one.name] = repeats_for(one.timer(one.run, 1).best, seconds)
    samples: dict[str, list[Sample]] = {one.name: [] for one in contestants}
    for _ in range(rounds):
        for one in contestants:
            n = repeats[one.name]
            samples[one.name].append(one.timer(one.run, n).per(n * one.units))
    return samples


def repeats_for(once: float, seconds: float) -> int:
    """Return how many runs of ``once`` seconds fill ``seconds``: at least 1, at most ``MOST_REPEATS``."""
    return max(1, min(MOST_REPEATS, int(seconds / max(once, 1e-9))))


def summary(values: Sequence[float]) -> dict[str, float]:
    """Return median, quartiles and number of the values."""
    if len(values) == 1:
        return {"median": values[0], "q1": values[0], "q3": values[0], "n": 1}
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3, "n": len(values)}


def summaries(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return the summaries of device time, None where it is not known, and of wall time, in seconds."""
    device = [sample.device for sample in samples if sample.device is not None]
    return {
        "device_seconds": summary(device) if len(device) == len(samples) else None,
        "wall_seconds": summary([sample.wall for sample in samples]),
    }


def ratio(a: Sequence[Sample], b: Sequence[Sample]) -> dict[str, Any]:
    """Return how many times longer a takes than b: the median over rounds, and where 95 % of resampled medians lie.

    Both are device times where both are known, else wall times. ``clock`` says which; ``significant`` is False where the
    interval holds 1.
    """
    on_device = all(s.device is not None for s in (*a, *b))
    pairs = [(x.device, y.device) if on_device else (x.wall, y.wall) for x, y in zip(a, b, strict=True)]
    ratios = np.array([x / max(y, 1e-12) for x, y in pairs if x is not None and y is not None])
    chosen = np.random.default_rng(0).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(ratios[chosen], axis=1), [0.025, 0.975])
    return {
        "median": float(np.median(ratios)), "low": float(low), "high": float(high),
        "significant": not low <= 1 <= high, "clock": "device" if on_device else "wall",
    }  # fmt: skip
