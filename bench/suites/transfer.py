"""Copies between host and device, from pageable and from pinned memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from gpubackprop.bench.case import Case, Cases, Prepared, Settings
from gpubackprop.bench.devices import Device, Gpu
from gpubackprop.bench.suites import NothingToMeasureError
from gpubackprop.bench.timing import Candidate


def cases(device: Device, dtype: str, settings: Settings) -> Cases:
    """Yield both directions of each size."""
    if not isinstance(device, Gpu):
        raise NothingToMeasureError("the CPU has nothing to transfer")
    if dtype != settings.dtypes[0]:
        raise NothingToMeasureError("bytes have no dtype: see the first")
    for text in settings.sizes["transfer"]:
        for to_device in (True, False):
            name = f"{text} bytes {'to' if to_device else 'from'} the device"
            prepare = partial(_prepare, device, int(text), to_device)
            yield Case("transfer", name, device.name, dtype, prepare, {"bytes": int(text)})


def _prepare(device: Gpu, nbytes: int, to_device: bool) -> Prepared:
    import cupyx

    prepared = Prepared([], bytes=nbytes)
    content = np.random.default_rng(0).integers(0, 256, nbytes, np.uint8)
    hosts = {"pinned": cupyx.empty_pinned(nbytes, np.uint8), "pageable": np.empty(nbytes, np.uint8)}
    for name, host in hosts.items():
        with device.scope():
            there = device.xp.zeros(nbytes, np.uint8)
            run = _copy(device, host, there, to_device)
            host[...] = content if to_device else 0
            there[...] = device.xp.asarray(np.zeros_like(content) if to_device else content)
            run()
            device.synchronize()
            if not np.array_equal(device.xp.asnumpy(there), host) or not np.array_equal(host, content):
                prepared.wrong[name] = "what arrives is not what was sent"
                continue
        prepared.candidates.append(Candidate(name, run, device.timer()))
    return prepared


def _copy(device: Gpu, host: Any, there: Any, to_device: bool) -> Any:
    def run() -> None:
        if to_device:
            there.set(host, stream=device.stream)
        else:
            there.get(stream=device.stream, out=host, blocking=False)

    return run
