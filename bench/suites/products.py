"""A step against its matrix products alone by NumPy or CuPy, in preallocated memory: the least time of a step of their calls."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

import gpubackprop as gb
from gpubackprop.bench.case import Cases, Prepared, Settings, admit
from gpubackprop.bench.devices import Device, in_turn
from gpubackprop.bench.ours import TOLERANCE, finish, step_of
from gpubackprop.bench.peers import Problem
from gpubackprop.bench.peers.arrays import ArrayPeer
from gpubackprop.bench.suites import NothingToMeasureError, step_cases
from gpubackprop.bench.timing import Candidate
from gpubackprop.step import Step
from gpubackprop.step.operations import Matmul

RATE = 1e-7  # learning rate: thousands of steps on one mini-batch do not reach subnormal numbers, which are slow


def cases(device: Device, dtype: str, settings: Settings, suite: str = "products") -> Cases:
    """Yield a step of each size, with both optimizers; with only SGD in ``scaling``."""
    if dtype not in ("float32", "float64"):
        raise NothingToMeasureError(f"there are no plain products in {dtype}")
    optimizers: dict[str, gb.Optimizer] = {"sgd": gb.SGD(RATE)}
    if suite == "products":
        optimizers["adam"] = gb.Adam(RATE)
    yield from step_cases(suite, device, dtype, settings, partial(_prepare, optimizers))


def _prepare(optimizers: dict[str, gb.Optimizer], device: Device, problem: Problem, settings: Settings) -> Prepared:
    """Check only the first loss of all candidates: there are many large steps here, and ``step`` compares whole trainings."""
    exact = ArrayPeer(replace(problem, dtype="float64", device="cpu"), np)
    exact.step()
    expected = np.array(exact.loss())
    with device.scope():
        step = step_of(problem, device.backend, optimizers["sgd"])
        prepared = Prepared([_plain(device, step)], flops=step.flops, bytes=step.bytes)
        for name, optimizer in optimizers.items():
            step = step_of(problem, device.backend, optimizer)
            run, value = finish(step.compile()), step.names.array("loss")

            def first_loss(run: Any = run, value: Any = value) -> np.ndarray:
                run()
                return np.array(float(value[0]))

            candidate = Candidate(f"gpubackprop, {name}", run, device.timer())
            admit(prepared, candidate, first_loss, expected, TOLERANCE[problem.dtype] * max(1.0, float(expected)))
    return prepared


def _plain(device: Device, step: Step) -> Candidate:
    """Return the products of a step by the array module, on the numbers of a step."""
    step.compile()()
    device.synchronize()
    products = [operation for operation in step.bound() if isinstance(operation, Matmul)]
    calls: list[Any] = [(partial(device.xp.matmul, out=o.out), (o.a, o.b)) for o in products]
    return Candidate("plain products", in_turn(calls), device.timer())
