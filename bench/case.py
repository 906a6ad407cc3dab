"""A case: one piece of work at one size on one device, its candidates, and its row of the report."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpubackprop.bench.peers import reason_of
from gpubackprop.bench.sizes import Sizes
from gpubackprop.bench.timing import Candidate, Sample, clock_of, measure, ratio, seconds_of, summary

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """The settings of a run.

    Parameters
    ----------
    rounds, cold_rounds : int
        Samples of each time; and if each is a separate process.
    seconds : float
        How long a sample lasts, if one run is shorter.
    pause : float
        Seconds before each sample.
    """

    sizes: Sizes
    libraries: tuple[str, ...]
    dtypes: tuple[str, ...] = ("float32",)
    optimizer: str = "sgd"
    threads: int = 1
    rounds: int = 25
    cold_rounds: int = 5
    seconds: float = 0.01
    pause: float = 0.0
    quick: bool = False
    dry: bool = False


@dataclass
class Prepared:
    """The candidates of a case, built and checked; the first is the baseline.

    Parameters
    ----------
    left_out, wrong : dict
        Candidates left out, and why; candidates whose result differs from the reference, and how: they are not timed.
    flops, bytes : int
        Of one unit of work.
    facts : dict
        Further entries of the row.
    cold : bool
        Every run is a sample, the first one too.
    """

    candidates: list[Candidate]
    left_out: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    flops: int = 0
    bytes: int = 0
    facts: Row = field(default_factory=dict)
    cold: bool = False


@dataclass(frozen=True)
class Case:
    """What is measured, before anything is built."""

    suite: str
    name: str
    device: str
    dtype: str
    prepare: Callable[[], Prepared]
    size: Row = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What distinguishes the case from all others of a report."""
        return self.suite, self.device, self.dtype, self.name


Cases = Iterator[Case]


def key_of(row: Row) -> tuple[str, str, str, str]:
    """Return the key of a row's case."""
    return row["suite"], row["device"], row["dtype"], row["case"]


def is_ours(name: str, row: Row) -> bool:
    """Return whether a candidate is of this package."""
    return name.startswith("gpubackprop") or bool(name == row["device"])


def run_case(case: Case, settings: Settings) -> Row:
    """Build, check and time the candidates of a case; return its row."""
    prepared = case.prepare()
    samples: dict[str, list[Sample]] = {}
    if prepared.candidates:
        if prepared.cold:
            samples = measure(prepared.candidates, settings.cold_rounds, 0.0, warm=False)
        else:
            samples = measure(prepared.candidates, settings.rounds, settings.seconds, pause=settings.pause)
    row: Row = {
        "suite": case.suite, "case": case.name, "device": case.device, "dtype": case.dtype, "size": case.size,
        "flops": prepared.flops, "bytes": prepared.bytes, **prepared.facts,
        "base": prepared.candidates[0].name if prepared.candidates else None,
        "candidates": {c.name: _entry(c, samples, prepared.candidates[0].name) for c in prepared.candidates},
        "left_out": prepared.left_out, "wrong": prepared.wrong,
    }  # fmt: skip
    del prepared
    gc.collect()
    return row


def _entry(candidate: Candidate, samples: dict[str, list[Sample]], base: str) -> Row:
    found = samples[candidate.name]
    device = seconds_of(found, "device") if clock_of(found) == "device" else None
    wall = seconds_of(found, "wall")
    return {
        "device_seconds": None if device is None else {**summary(device), "samples": device},
        "wall_seconds": {**summary(wall), "samples": wall},
        "setup_seconds": candidate.setup_seconds,
        "units": candidate.units,
        "over_base": None if candidate.name == base else ratio(found, samples[base]),
    }


def best_seconds(entry: Row) -> Row:
    """Return the summary of a candidate's device time if known, else of its wall time."""
    found: Row = entry["device_seconds"] or entry["wall_seconds"]
    return found


def admit(
    prepared: Prepared, candidate: Candidate, result: Callable[[], np.ndarray], expected: np.ndarray, allowed: float
) -> None:
    """Add a candidate if it computes what is expected; else list it with the reason.

    Parameters
    ----------
    result : callable
        Does the work once and returns the result to compare.
    """
    try:
        off = float(np.abs(result() - expected).max())
    except Exception as error:  # whatever keeps a peer from running: it is listed with the reason
        prepared.left_out[candidate.name] = reason_of(error)
        return
    if off <= allowed:  # False for NaN
        prepared.candidates.append(candidate)
    else:
        prepared.wrong[candidate.name] = f"its result differs from the reference by {off:.3g}"
