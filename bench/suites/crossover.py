"""For which networks a GPU overtakes the CPU on this machine: the table that ``device="auto"`` reads."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from gpubackprop.bench.case import Cases, Prepared, Row, Settings, best_seconds
from gpubackprop.bench.devices import Device, device_of
from gpubackprop.bench.ours import Trained, compare, ours
from gpubackprop.bench.peers import Problem
from gpubackprop.bench.suites import NothingToMeasureError, step_cases
from gpubackprop.bench.timing import FASTER
from gpubackprop.machine.crossover import step_flops


def cases(device: Device, dtype: str, settings: Settings) -> Cases:
    """Yield a step of each size, on the CPU and on this GPU in turn."""
    if not device.on_gpu:
        raise NothingToMeasureError("there is nothing to overtake the CPU: no GPU was requested")
    if dtype not in device_of("cpu", settings.threads).backend.dtypes:
        raise NothingToMeasureError(f"the CPU does not compute in {dtype}")
    yield from step_cases("crossover", device, dtype, settings, _prepare)


def _prepare(device: Device, problem: Problem, settings: Settings) -> Prepared:
    prepared = Prepared([], flops=step_flops(problem.sizes, problem.batch))
    trained = [_fastest(device_of("cpu", settings.threads), replace(problem, device="cpu"))]
    with device.scope():
        trained.append(_fastest(device, problem))
        prepared.facts.update(compare(problem, trained, prepared))
    prepared.candidates = [one for one in trained if one.name not in prepared.wrong]
    return prepared


def _fastest(device: Device, problem: Problem) -> Trained:
    """Return the step as ``fit`` takes it: many to a call, where that is faster."""
    name = "gpubackprop, K steps" if device.on_gpu or problem.steps_per_call > 1 else "gpubackprop"
    trained = dict(ours(device, problem))[name]()
    trained.name = device.name
    return trained


def overtaking(rows: Iterable[Row], gpu: str) -> float:
    """Return the FLOP of a step above which the GPU is faster; infinity if it never is, 0 if it always is.

    Between the largest step that the CPU takes faster, or as fast, and the smallest of the larger ones: their geometric mean.
    """
    found = []
    for row in rows:
        if row["suite"] == "crossover" and row["device"] == gpu and set(row["candidates"]) == {"cpu", gpu}:
            entry = row["candidates"][gpu]
            faster = entry["over_base"]["verdict"] == FASTER
            found.append((row["flops"], faster, best_seconds(entry)))
    slower = [flops for flops, faster, _ in found if not faster]
    if not slower:
        return 0.0
    larger = [flops for flops, faster, _ in found if faster and flops > max(slower)]
    return math.sqrt(max(slower) * min(larger)) if larger else math.inf
