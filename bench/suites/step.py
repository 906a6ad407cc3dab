"""One training step: whole and in parts, against its products alone and the peers; with its ledger."""

from __future__ import annotations

from gpubackprop.bench.case import Cases, Prepared, Settings
from gpubackprop.bench.devices import Device
from gpubackprop.bench.ledger import ledger
from gpubackprop.bench.ours import field, parts, step_of
from gpubackprop.bench.peers import make_problem
from gpubackprop.bench.sizes import StepSize
from gpubackprop.bench.suites import step_cases


def cases(device: Device, dtype: str, settings: Settings, suite: str = "step") -> Cases:
    """Yield a step of each size."""
    yield from step_cases(suite, device, dtype, settings, _prepare)


def _prepare(device: Device, dtype: str, size: StepSize, settings: Settings) -> Prepared:
    problem = make_problem(size.layers, size.batch, device.name, dtype, settings.optimizer, settings.threads)
    with device.scope():
        trained, prepared = field(device, problem, settings.libraries, slow=not settings.quick)
        contestants = [one.contestant() for one in trained]
        mine = sum(c.name.startswith("gpubackprop") for c in contestants)
        prepared.contestants = [*contestants[:mine], *parts(device, problem), *contestants[mine:]]
        step = step_of(problem, device.backend)
        prepared.flops, prepared.bytes = step.flops, step.bytes
        prepared.facts["ledger"] = ledger(device, step)
    return prepared
