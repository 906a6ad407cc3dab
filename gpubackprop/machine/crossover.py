"""Where a GPU overtakes the CPU on this machine: measured by ``gpubackprop bench``, read by ``device="auto"``."""

from __future__ import annotations

import itertools
import json
import os
import platform
from collections.abc import Sequence

from gpubackprop.code_digest import fingerprint
from gpubackprop.machine.diagnosis import cuda_version

BATCH = 128  # samples in a mini-batch if unknown: the default of ``fit``


def step_flops(layer_sizes: Sequence[int], batch: int = BATCH) -> int:
    """Return the FLOP of the products of a training step: 2 m n k for each of three per layer."""
    return 6 * batch * sum(a * b for a, b in itertools.pairwise(layer_sizes))


def remember(device: str, flops: float) -> None:
    """Store the FLOP of a step above which a device is faster than the CPU."""
    from gpubackprop.machine import cache

    cache.write(_file(), json.dumps({**_stored(), device: flops}).encode())


def recall(device: str) -> float | None:
    """Return the FLOP of a step above which a device is faster than the CPU, or None if it was not measured."""
    found = _stored().get(device)
    return float(found) if isinstance(found, int | float) else None


def _stored() -> dict[str, float]:
    from gpubackprop.machine import cache

    try:
        found = json.loads(cache.read(_file()) or b"{}")
    except ValueError:  # damaged: treat as not measured
        return {}
    return found if isinstance(found, dict) else {}


def _file() -> str:
    """Return the name of the file, one per machine and driver."""
    return f"crossover-{fingerprint(platform.node(), platform.processor(), os.cpu_count(), cuda_version())}.json"
