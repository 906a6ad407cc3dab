"""Our training step as candidates: whole, in parts, its products alone; and the check that all train alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

import gpubackprop as gb
from gpubackprop.bench.case import Prepared, Settings
from gpubackprop.bench.devices import Call, Device, in_turn, keeping
from gpubackprop.bench.peers import LEARNING_RATE, LONG_STEP, CannotTakePartError, Peer, Problem, make_peers, reason_of
from gpubackprop.bench.peers.arrays import ArrayPeer
from gpubackprop.bench.timing import Candidate, Run
from gpubackprop.step import Step
from gpubackprop.step.operations import Operation

MOST_COMPARED = 1600  # steps
TOLERANCE = {"float64": 1e-6, "float32": 2e-3, "tf32": 1e-2, "float16": 2e-2, "bfloat16": 5e-2}
"""Tolerance of losses after the compared steps, relative to the first loss: rounding of the products, over steps."""


@dataclass
class Trained(Candidate):
    """A candidate that takes steps: ``run`` queues ``units`` of them, ``loss`` waits for the loss of the last one."""

    trains: bool = True
    loss: Callable[[], float] = field(kw_only=True)


def optimizer_of(problem: Problem) -> Any:
    """Return our optimizer for a problem."""
    return gb.SGD(LEARNING_RATE) if problem.optimizer == "sgd" else gb.Adam(LEARNING_RATE)


def model_of(problem: Problem, backend: Any) -> gb.MLP:
    """Return our network with the weights of a problem."""
    if problem.dtype == "tf32":
        backend = gb.get_backend(problem.device, matmul_precision="tf32")
    model = gb.MLP(problem.sizes, device=backend, dtype=problem.storage)
    model.load_state_dict(problem.state)
    return model


def step_of(problem: Problem, backend: Any, optimizer: Any = None) -> Step:
    """Return our step, with the mini-batch in its arrays; with another optimizer than the problem's if given."""
    model = model_of(problem, backend)
    step = model.step(problem.batch, optimizer or optimizer_of(problem))
    X, y = step.names.array("X"), step.names.array("y")
    host_X, host_y = problem.of_batch()
    X[...] = model.backend.asarray(host_X.astype(X.dtype))
    y[...] = model.backend.asarray(host_y)
    return step


def ours(device: Device, problem: Problem) -> Iterator[tuple[str, Callable[[], Trained]]]:
    """Yield our step: one call per step, K steps per call, and one call per operation."""

    def trained(name: str, make: Callable[[Any], tuple[Run, int]]) -> Trained:
        started = time.perf_counter()
        step = step_of(problem, device.backend)
        run, units = make(step)
        value = step.names.array("loss")
        seconds = time.perf_counter() - started
        return Trained(name, run, device.timer(), units, seconds, loss=lambda: float(value[0]))

    def one(step: Step) -> tuple[Run, int]:
        return finish(step.compile()), 1

    def many(step: Step) -> tuple[Run, int]:
        run: Any = step.compile()
        units = getattr(run, "steps_per_launch", problem.steps_per_call)
        if units == 1:
            raise CannotTakePartError(LONG_STEP)
        finish(run, units)
        return lambda: run(units), units

    def eager(step: Step) -> tuple[Run, int]:
        run: Any = step.compile()
        return getattr(run, "eagerly", None) or in_turn(calls_of(step)), 1

    yield "gpubackprop", lambda: trained("gpubackprop", one)
    yield "gpubackprop, K steps", lambda: trained("gpubackprop, K steps", many)
    yield "gpubackprop, eager", lambda: trained("gpubackprop, eager", eager)


def finish(run: Any, units: int = 1) -> Any:
    """Capture a step now, which the backend would do later."""
    if hasattr(run, "graph"):
        run.graph(units)
    return run


def calls_of(step: Step) -> list[Call]:
    """Return the calls of a step's operations."""
    backend: Any = step.backend
    return [backend.bind(operation) for operation in step.bound()]


def captures(device: Device) -> bool:
    """Return whether whole steps can be captured here: on a GPU, with nvmath-python."""
    return getattr(device.backend, "_products", None) is not None


def parts(device: Device, problem: Problem) -> list[Candidate]:
    """Return the products alone, and forward, backward and update: each is one call, as the whole step is.

    On a GPU without captured steps it is one call per operation.
    """
    step = step_of(problem, device.backend)
    calls = dict(zip(map(id, step.operations), calls_of(step), strict=True))
    in_turn([calls[id(operation)] for operation in step.operations])()  # so that the parts see the numbers of a step
    device.synchronize()
    groups: dict[str, list[Operation]] = {"products": [o for o in step.operations if o.name == "matmul"]}
    for name, phases in (("forward", ("forward", "loss")), ("backward", ("backward",)), ("update", ("update",))):
        groups[f"  {name} alone"] = [o for o in step.operations if o.phase in phases]
    result = []
    for name, operations in groups.items():
        chosen = [calls[id(operation)] for operation in operations]
        if not device.on_gpu:
            run = finish(replace(step, operations=tuple(operations)).compile())
            result.append(Candidate(name, run, device.timer()))
        elif not captures(device):
            result.append(Candidate(name, in_turn(chosen), device.timer()))
        else:
            result.append(device.queue(name, chosen))
        result[-1].run = keeping(result[-1].run, step)
    if captures(device):
        K = step.compile().steps_per_launch  # type: ignore[attr-defined]
        chosen = [calls[id(operation)] for operation in groups["products"]]
        result.append(device.queue("products, K steps", chosen * K, K))
        result[-1].run = keeping(result[-1].run, step)
    return result


def entrants(
    device: Device, problem: Problem, libraries: tuple[str, ...], *, slow: bool
) -> tuple[list[Trained], Prepared]:
    """Build and check all candidates that train; return those that agree, and a case with the names of the others."""
    prepared = Prepared([])
    trained: list[Trained] = []
    for name, make in ours(device, problem):
        try:
            trained.append(make())
        except Exception as error:  # a failure of one way to run the step must not lose the others
            prepared.left_out[name] = reason_of(error)
    for name, peer in make_peers(problem, libraries, slow=slow):
        if isinstance(peer, Peer):
            trained.append(Trained(name, peer.step, peer.timer, peer.units, peer.setup_seconds, loss=peer.loss))
        else:
            prepared.left_out[name] = peer
    prepared.facts.update(compare(problem, trained, prepared))
    return [one for one in trained if one.name not in (*prepared.wrong, *prepared.left_out)], prepared


def whole_peers(problem: Problem, settings: Settings, prepared: Prepared) -> Iterator[tuple[str, Peer]]:
    """Yield the peers except those that differ from another only in K steps per call; list those left out."""
    for name, peer in make_peers(problem, settings.libraries, slow=not settings.quick, only_steps=False):
        if isinstance(peer, str):
            prepared.left_out[name] = peer
        else:
            yield name, peer


def compare(problem: Problem, trained: list[Trained], prepared: Prepared) -> dict[str, Any]:
    """Train plain NumPy in float64 until its loss has moved, the others as long; mark those that end elsewhere as wrong.

    The tolerance is relative to the first loss, and the loss has to move by four times as much: a candidate that stands still
    or takes another path is found.
    """
    wide = replace(problem, dtype="float64", device="cpu")
    baseline = ArrayPeer(wide, np)
    baseline.step()
    first, steps = baseline.loss(), 1
    allowed = TOLERANCE[problem.dtype] * max(1.0, abs(first))
    units = int(np.lcm.reduce([one.units for one in trained] or [1]))
    while steps % units or (abs(baseline.loss() - first) < 4 * allowed and steps < MOST_COMPARED):
        baseline.step()
        steps += 1
    expected = baseline.loss()
    if abs(expected - first) < 4 * allowed:
        raise RuntimeError(f"the loss moves from {first} to {expected} in {steps} steps: too little to compare by")
    for one in trained:
        try:
            for _ in range(steps // one.units):
                one.run()
            loss = one.loss()
        except Exception as error:  # whatever keeps a peer from running: it is listed with the reason
            prepared.left_out[one.name] = reason_of(error)
            continue
        if not abs(loss - expected) <= allowed:
            prepared.wrong[one.name] = f"its loss after {steps} steps is {loss:.6g}, not {expected:.6g}"
    return {"compared_steps": steps, "first_loss": first, "last_loss": expected}
