"""One training step: whole and in parts, against its products alone and the peers; with its ledger."""

from __future__ import annotations

from gpubackprop.bench.case import Cases, Prepared, Settings
from gpubackprop.bench.devices import Device
from gpubackprop.bench.ledger import ledger
from gpubackprop.bench.ours import entrants, parts, step_of
from gpubackprop.bench.peers import Problem
from gpubackprop.bench.suites import step_cases


def cases(device: Device, dtype: str, settings: Settings, suite: str = "step") -> Cases:
    """Yield a step of each size."""
    yield from step_cases(suite, device, dtype, settings, _prepare)


def _prepare(device: Device, problem: Problem, settings: Settings) -> Prepared:
    with device.scope():
        trained, prepared = entrants(device, problem, settings.libraries, slow=not settings.quick)
        mine = sum(one.name.startswith("gpubackprop") for one in trained)
        prepared.candidates = [*trained[:mine], *parts(device, problem), *trained[mine:]]
        step = step_of(problem, device.backend)
        prepared.flops, prepared.bytes = step.flops, step.bytes
        prepared.facts["ledger"] = ledger(device, step)
    return prepared
