"""Timing of candidates against each other: interleaved rounds, medians and quartiles, ratios with their uncertainty.

Knows no device: a timer runs a candidate and says how long it took; see ``WallTimer`` here and ``CudaTimer`` in
:mod:`gpubackprop.bench.devices`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np

Clock = Callable[[], float]
Run = Callable[[], object]

seconds_now: Clock = time.perf_counter

MOST_REPEATS = 10_000
WARM_UP = 3  # some libraries compile in the first call and again in the second
RESAMPLES = 2_000

FASTER, SLOWER, SAME, AMBIGUOUS = "FASTER", "SLOWER", "SAME", "AMBIGUOUS"
LEAST_FLOOR = 1.01  # a smaller difference is none, however often it is measured: the next build or process has another


@dataclass(frozen=True)
class Sample:
    """Seconds of some runs: between two events on the device (None without events), and wall time."""

    device: float | None
    wall: float

    @property
    def best(self) -> float:
        """The device time if known, else the wall time."""
        return self.wall if self.device is None else self.device

    def per(self, units: int) -> Sample:
        """Return the seconds of one unit of work."""
        return Sample(None if self.device is None else self.device / units, self.wall / units)


class Timer(Protocol):
    """Runs a function several times and returns the seconds of all runs, including the wait."""

    def __call__(self, run: Run, repeats: int) -> Sample:
        """Return the seconds of ``repeats`` runs."""
        ...


class WallTimer:
    """Wall time only, for work that is done when ``synchronize`` returns.

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
        """Return the seconds of ``repeats`` runs, after waiting for earlier work."""
        self.synchronize()
        started = self.clock()
        for _ in range(repeats):
            run()
        self.synchronize()
        return Sample(None, self.clock() - started)


class ReportedTimer:
    """Takes the seconds that a run returns, for work in a separate process."""

    def __call__(self, run: Run, repeats: int) -> Sample:
        """Return the seconds of ``repeats`` runs."""
        return Sample(None, sum(cast("float", run()) for _ in range(repeats)))


@dataclass
class Candidate:
    """Something to be timed.

    Parameters
    ----------
    name : str
    run : callable
        Queues the work.
    timer : Timer
    units : int
        How often one run does the work: times are per unit.
    setup_seconds : float, optional
        Time to compile or capture, which is in no other time.
    against : str, optional
        The candidate it is compared with, if not the first one.
    trains : bool
        It does whole steps of training, so it can be timed beside a busy program.
    """

    name: str
    run: Run
    timer: Timer
    units: int = 1
    setup_seconds: float | None = None
    against: str | None = None
    trains: bool = False


def measure(
    candidates: Sequence[Candidate],
    rounds: int,
    seconds: float,
    *,
    warm: bool = True,
    warm_seconds: float = 0.0,
    pause: float = 0.0,
    again: float = 0.0,
    clock: Clock = seconds_now,
) -> dict[str, list[Sample]]:
    """Return the samples of each candidate, one per round and for one unit of work.

    Each round times all candidates one after the other, so that a slow moment affects all of them; every other round
    backwards, so that drift within a round cancels. Before the first
    round each runs ``WARM_UP`` times, to compile and to find how many runs fill ``seconds``, and all again until they have
    taken ``warm_seconds``, in which the clock of an idle card rises. Before a sample there is a pause, since another's threads may
    spin for some time after their last work; after it a candidate runs for ``again`` seconds, until threads that have slept are on
    their cores, else once before a sample of several runs, since others have filled the caches. Unless ``warm``, each sample is
    one run after a pause.
    """
    repeats = dict.fromkeys((one.name for one in candidates), 1)
    before = dict.fromkeys(repeats, 0)
    started = clock()
    while warm:
        for one in candidates:
            for _ in range(WARM_UP):
                once = one.timer(one.run, 1).best
            n = repeats[one.name] = repeats_for(once, seconds)
            before[one.name] = repeats_for(once, again) if again else int(n > 1)
        warm = clock() - started < warm_seconds
    samples: dict[str, list[Sample]] = {one.name: [] for one in candidates}
    for i in range(rounds):
        for one in reversed(candidates) if i % 2 else candidates:
            n = repeats[one.name]
            time.sleep(pause)
            if before[one.name]:
                one.timer(one.run, before[one.name])
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


def clock_of(*runs: Sequence[Sample]) -> str:
    """Return ``"device"`` if every sample has a device time, else ``"wall"``."""
    return "device" if all(sample.device is not None for run in runs for sample in run) else "wall"


def seconds_of(samples: Sequence[Sample], clock: str) -> list[float]:
    """Return the seconds of the samples by one clock."""
    return [float(getattr(sample, clock)) for sample in samples]


Instances = Sequence[Sequence[Sample]]
"""The samples of a candidate by process."""


def ratio(a: Instances, b: Instances, floor: float = LEAST_FLOOR) -> dict[str, Any]:
    """Return how many times longer a takes than b, timed in the same rounds of the same processes.

    It is the median over processes of the median over rounds, ``low`` and ``high`` its 95 % interval. Both are device times
    if both are known, else wall times; ``clock`` says which.
    """
    clock = clock_of(*a, *b)
    ratios = np.array(
        [np.array(seconds_of(x, clock)) / np.maximum(seconds_of(y, clock), 1e-12) for x, y in zip(a, b, strict=True)]
    )
    low, high = interval_of_medians(ratios)
    return {
        "median": float(np.median(np.median(ratios, axis=1))), "low": low, "high": high,
        "verdict": verdict(low, high, floor), "clock": clock,
    }  # fmt: skip


def noise_floor(found: dict[str, Any]) -> float:
    """Return the factor between times that differ by noise alone, from the ratio of a candidate to itself."""
    return float(max(LEAST_FLOOR, found["high"], 1 / max(found["low"], 1e-12)))


def verdict(low: float, high: float, floor: float) -> str:
    """Return what the interval of a ratio of times says, if noise alone makes a factor of ``floor``.

    FASTER and SLOWER if the whole interval lies beyond the floor, SAME if all of it lies within, else AMBIGUOUS.
    """
    if high < 1 / floor:
        return FASTER
    if low > floor:
        return SLOWER
    return SAME if 1 / floor <= low and high <= floor else AMBIGUOUS


def interval_of_medians(values: np.ndarray) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the median over processes, the rows, of medians over rounds, the columns.

    Processes are resampled, and rounds within each of them (Davison, Hinkley (1997), section 3.8).
    """
    rng, (instances, rounds) = np.random.default_rng(0), values.shape
    chosen = rng.integers(0, instances, (RESAMPLES, instances, 1))
    medians = np.median(values[chosen, rng.integers(0, rounds, (RESAMPLES, instances, rounds))], axis=2)
    low, high = np.quantile(np.median(medians, axis=1), (0.025, 0.975))
    return float(low), float(high)
