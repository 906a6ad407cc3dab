"""From the start of a process to its first training step: import, context, compilation. Each sample is a separate process."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np

from gpubackprop.bench import coldstart
from gpubackprop.bench.case import Cases, Prepared, Settings
from gpubackprop.bench.devices import Device
from gpubackprop.bench.peers import PEERS, Problem, reason_of
from gpubackprop.bench.peers.arrays import ArrayPeer
from gpubackprop.bench.suites import NothingToMeasureError, in_new_process, step_cases
from gpubackprop.bench.timing import Candidate, ReportedTimer

NOT_STARTED = ("numpy", "cupy", "torch graph", "torch compile+graph")  # too like others


def cases(device: Device, dtype: str, settings: Settings) -> Cases:
    """Yield the start with each size."""
    if dtype != settings.dtypes[0]:
        raise NothingToMeasureError("a start is measured in float32: see the first dtype")
    yield from step_cases("coldstart", device, "float32", settings, _prepare)


def _prepare(device: Device, problem: Problem, settings: Settings) -> Prepared:
    baseline = ArrayPeer(replace(problem, device="cpu", dtype="float64"), np)
    baseline.step()
    prepared = Prepared([], cold=True)
    phases: dict[str, list[Any]] = prepared.facts.setdefault("phases", {})
    who = ["gpubackprop", "gpubackprop, cold"]
    for name, entry in PEERS.items():
        if entry.library not in settings.libraries or entry.only_steps or name in NOT_STARTED:
            continue
        if settings.quick:
            prepared.left_out[name] = "left out of a quick run"
        elif find_spec(entry.module) is None:
            prepared.left_out[name] = "not installed"
        else:
            who.append(name)
    for name in who:
        start = _starting(name, problem, phases.setdefault(name, []))
        try:
            start()
        except Exception as error:  # whatever keeps a peer from running: it is listed with the reason
            prepared.left_out[name] = reason_of(error)
            continue
        loss, expected = phases[name].pop()["loss"], baseline.loss()
        if abs(loss - expected) > 1e-3 * max(1.0, abs(expected)):
            prepared.wrong[name] = f"its first loss is {loss:.6g}, not {expected:.6g}"
            continue
        prepared.candidates.append(Candidate(name, start, ReportedTimer()))
    return prepared


def _starting(name: str, problem: Problem, found: list[Any]) -> Callable[[], float]:
    module = PEERS[name].module if name in PEERS else "gpubackprop"
    layers = "-".join(map(str, problem.sizes))
    what = name, module, problem.device, problem.optimizer, layers, problem.batch, problem.threads

    def start() -> float:
        with tempfile.TemporaryDirectory() as empty:
            changed = {"GPUBACKPROP_CACHE_DIR": empty, "CUPY_CACHE_DIR": empty} if "cold" in name else {}
            result = in_new_process(coldstart.__file__, *what, repr(time.time()), **changed)
        found.append({**result["phases"], "loss": result["loss"]})
        return float(sum(result["phases"].values()))

    return start
