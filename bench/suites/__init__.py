"""The suites: each a function that yields the cases of a device and a dtype."""

from __future__ import annotations

import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from gpubackprop.bench.case import Case, Cases, Prepared, Row, Settings
from gpubackprop.bench.peers import Problem, make_problem
from gpubackprop.bench.sizes import SUITES, StepSize, parse_step

if TYPE_CHECKING:
    from gpubackprop.bench.devices import Device

Prepare = Callable[["Device", Problem, Settings], Prepared]


class NothingToMeasureError(Exception):
    """A suite has nothing to do with a device or dtype; the message says why."""


def cases_of(suite: str, device: Device, dtype: str, settings: Settings) -> Cases:
    """Yield the cases of a suite.

    Raises
    ------
    NothingToMeasureError
        There are none.
    """
    assert suite in SUITES
    cases = cast(
        "Callable[[Device, str, Settings], Cases]", pkgutil.resolve_name(f"gpubackprop.bench.suites.{suite}:cases")
    )
    return cases(device, dtype, settings)


def step_cases(suite: str, device: Device, dtype: str, settings: Settings, prepare: Prepare, prefix: str = "") -> Cases:
    """Yield a case of each size that a suite has, where sizes are those of a step."""

    def prepared(size: StepSize) -> Prepared:
        samples = size.samples or (16 if suite in ("epoch", "memory") else 1) * size.batch
        given = size.layers, size.batch, device.name, dtype, settings.optimizer, settings.threads, samples
        return prepare(device, make_problem(*given), settings)

    for text in settings.sizes[suite]:
        size = parse_step(text)
        found: Row = {"layers": list(size.layers), "batch": size.batch, "optimizer": settings.optimizer}
        if size.samples is not None:
            found["samples"] = size.samples
        yield Case(suite, prefix + text, device.name, dtype, partial(prepared, size), found, busy=settings.busy)


def in_new_process(file: str, *arguments: object, **variables: str) -> Any:
    """Run a Python file with these arguments and variables of the environment, and return what it prints last, as JSON."""
    command = [sys.executable, "-P", file, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables}, check=False)
    if done.returncode:
        raise RuntimeError(next(iter(done.stderr.strip().splitlines()[-1:]), "it ended without a word"))
    return json.loads(done.stdout.strip().splitlines()[-1])
