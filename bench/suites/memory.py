"""The memory of ``fit``: the growth of the resident set relative to the bytes needed. Each sample is a separate process.

    python -P memory.py LAYERS BATCH SAMPLES

prints as JSON the bytes of data, order of samples, parameters, gradients, optimizer state, the two copies that ``fit`` goes
back to when the loss diverges, and workspace, the growth of the resident set to its peak (VmHWM, reset after import and
compiling; only on Linux), and the seconds of ``fit``.
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import gpubackprop as gb
from gpubackprop.bench.case import Cases, Prepared, Settings
from gpubackprop.bench.devices import Device
from gpubackprop.bench.peers import Problem
from gpubackprop.bench.suites import NothingToMeasureError, in_new_process, step_cases
from gpubackprop.bench.timing import Candidate, ReportedTimer

RESET = Path("/proc/self/clear_refs")


def cases(device: Device, dtype: str, settings: Settings) -> Cases:
    """Yield a training of each size."""
    if device.on_gpu or dtype != "float32":
        raise NothingToMeasureError("memory is measured on the CPU in float32")
    if not RESET.exists():
        raise NothingToMeasureError("this system does not tell the largest resident set")
    yield from step_cases("memory", device, dtype, settings, _prepare)


def _prepare(device: Device, problem: Problem, settings: Settings) -> Prepared:
    prepared = Prepared([], cold=True)
    found: list[Any] = prepared.facts.setdefault("memory", [])
    given = "-".join(map(str, problem.sizes)), problem.batch, len(problem.X)

    def fit() -> float:
        found.append(in_new_process(__file__, *given))
        return float(found[-1].pop("seconds"))

    prepared.candidates.append(Candidate("gpubackprop", fit, ReportedTimer()))
    return prepared


def measured(layers: str, batch: int, samples: int) -> dict[str, Any]:
    """Return the bytes that a training in this process needs and takes, and its seconds."""
    sizes = tuple(map(int, layers.split("-")))
    rng = np.random.default_rng(0)
    fit = partial(gb.MLP.fit, epochs=2, batch_size=batch, progress=False)
    warm = gb.MLP(sizes)  # kept, so that its memory is not used again
    fit(warm, rng.standard_normal((batch, sizes[0]), np.float32), rng.integers(0, sizes[-1], batch))
    RESET.write_text("5", encoding="utf-8")
    before = _resident("VmRSS")
    X, y = rng.standard_normal((samples, sizes[0]), np.float32), rng.integers(0, sizes[-1], samples)
    model = gb.MLP(sizes)
    started = time.perf_counter()
    fit(model, X, y)
    seconds = time.perf_counter() - started
    grown, parameters = _resident("VmHWM") - before, model.parameters.flat.nbytes
    assert model.optimizer_state is not None
    states = model.optimizer_state.states.nbytes
    needed = {
        "data": X.nbytes + y.nbytes, "order": 8 * samples, "parameters": parameters, "gradients": parameters,
        "states": states, "copies": 2 * (parameters + states),
        "workspace": 4 * batch * (sizes[0] + 2 * sum(sizes[1:-1]) + sizes[-1]),
    }  # fmt: skip
    return {"needed_bytes": needed, "resident_bytes": grown, "seconds": seconds}


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


if __name__ == "__main__":
    print(json.dumps(measured(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
