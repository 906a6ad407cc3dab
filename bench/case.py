"""A case: one piece of work at one size on one device, its candidates, and its row of the report."""

from __future__ import annotations

import gc
from collections import ChainMap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpubackprop.bench import timing
from gpubackprop.bench.busy import add_busy
from gpubackprop.bench.peers import reason_of
from gpubackprop.bench.sizes import Sizes
from gpubackprop.bench.timing import Candidate, Sample, measure, ratio, summary

Row = dict[str, Any]

# how long threads that share the work run before a sample: the system takes some 20 ms to spread them over the cores
AGAIN_SECONDS = 0.1
AGAIN = ", again"  # the name of the base, made and timed once more, ends so: their ratio is noise


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
    warm_seconds : float
        How long the candidates of a case run before the first sample on a GPU.
    instances : int
        Processes that measure a case, each all rounds, with arrays at other addresses; 1: this one.
    busy : bool
        Steps and epochs are timed beside a busy program, too.
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
    warm_seconds: float = 0.5
    instances: int = 1
    busy: bool = False
    quick: bool = False
    dry: bool = False


def pause_of(threads: int, *, idle: bool) -> float:
    """Return the seconds before each sample: OpenBLAS's threads spin that long for more work; none unless ``idle`` matters."""
    return 0.2 if threads > 1 and idle else 0.0


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
    """What is measured, before anything is built.

    Parameters
    ----------
    threads : int, optional
        Threads of the CPU, if not those of the run: it is measured in a separate process.
    busy : bool
        Candidates that train are timed beside a busy program, too.
    """

    suite: str
    name: str
    device: str
    dtype: str
    prepare: Callable[[], Prepared]
    size: Row = field(default_factory=dict)
    threads: int | None = None
    busy: bool = False

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
    """Build, check and time the candidates of a case in this process; return its row."""
    return row_of([sampled(case, settings)])


def sampled(case: Case, settings: Settings, twin: Case | None = None) -> Row:
    """Build, check and time the candidates of a case; return its row with all samples, before they are compared.

    Parameters
    ----------
    twin : Case, optional
        The same case without peers: its first candidate takes part, to show what is noise.
    """
    prepared = case.prepare()
    if twin is not None and prepared.candidates:
        again = twin.prepare().candidates[0]
        again.name = prepared.candidates[0].name + AGAIN
        prepared.candidates.insert(1, again)
    if case.busy:
        add_busy(prepared.candidates)
    samples: dict[str, list[Sample]] = {}
    if prepared.candidates:
        if prepared.cold:
            samples = measure(prepared.candidates, settings.cold_rounds, 0.0, warm=False)
        else:
            warm = 0.0 if case.device == "cpu" else settings.warm_seconds
            shared = case.device == "cpu" and (case.threads or settings.threads) > 1
            samples = measure(
                prepared.candidates, settings.rounds, settings.seconds,
                warm_seconds=warm, pause=settings.pause, again=AGAIN_SECONDS if shared else 0.0,
            )  # fmt: skip
    row: Row = {
        "suite": case.suite, "case": case.name, "device": case.device, "dtype": case.dtype, "size": case.size,
        "flops": prepared.flops, "bytes": prepared.bytes, **prepared.facts,
        "base": prepared.candidates[0].name if prepared.candidates else None,
        "candidates": {c.name: _raw(c, samples[c.name]) for c in prepared.candidates},
        "left_out": prepared.left_out, "wrong": prepared.wrong,
    }  # fmt: skip
    del prepared
    gc.collect()
    return row


def _raw(candidate: Candidate, samples: list[Sample]) -> Row:
    return {
        "samples": [[sample.device, sample.wall] for sample in samples],
        "setup_seconds": candidate.setup_seconds, "units": candidate.units, "against": candidate.against,
    }  # fmt: skip


def row_of(raws: list[Row]) -> Row:
    """Return the row of a case from what one or more processes have sampled; a candidate takes part if it did in each."""
    row = dict(raws[0])
    entries = [raw["candidates"] for raw in raws]
    groups = {
        name: [[Sample(*sample) for sample in each[name]["samples"]] for each in entries]
        for name in entries[0]
        if all(name in each for each in entries)
    }
    row["base"] = base = next(iter(groups), None)
    row["instances"] = len(raws)
    row["left_out"] = dict(ChainMap(*(raw["left_out"] for raw in raws)))
    row["wrong"] = dict(ChainMap(*(raw["wrong"] for raw in raws)))
    again = groups.get(f"{base}{AGAIN}")
    row["noise_floor"] = timing.LEAST_FLOOR if again is None else timing.noise_floor(ratio(again, groups[str(base)]))
    row["candidates"] = {name: _entry(name, entries[0][name], groups, row) for name in groups}
    return row


def _entry(name: str, raw: Row, groups: dict[str, list[list[Sample]]], row: Row) -> Row:
    found = [sample for group in groups[name] for sample in group]
    device = timing.seconds_of(found, "device") if timing.clock_of(found) == "device" else None
    wall = timing.seconds_of(found, "wall")
    base = raw["against"] or row["base"]
    return {
        "device_seconds": None if device is None else {**summary(device), "samples": device},
        "wall_seconds": {**summary(wall), "samples": wall},
        "setup_seconds": raw["setup_seconds"],
        "units": raw["units"],
        "against": raw["against"],
        "over_base": None if name == base else ratio(groups[name], groups[base], row["noise_floor"]),
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
