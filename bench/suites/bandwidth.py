"""A copy from the device to itself: the baseline bandwidth, from cache to memory.

On the CPU a dot product of as many bytes shows the speed of reading alone.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from gpubackprop.bench.case import Case, Cases, Prepared, Settings
from gpubackprop.bench.devices import Device, copy_pair, in_turn, level
from gpubackprop.bench.suites import NothingToMeasureError
from gpubackprop.bench.timing import Candidate

READ = "dot product"


def cases(device: Device, dtype: str, settings: Settings) -> Cases:
    """Yield a copy of each size; the bytes are those read and written."""
    if dtype != settings.dtypes[0]:
        raise NothingToMeasureError("bytes have no dtype: see the first")
    for text in settings.sizes["bandwidth"]:
        prepare = partial(_prepare, device, int(text))
        yield Case("bandwidth", f"{int(text):,} bytes", device.name, dtype, prepare, {"bytes": int(text)})


def _prepare(device: Device, nbytes: int) -> Prepared:
    with device.scope():
        target, source = copy_pair(device, nbytes)
        prepared = Prepared([], bytes=2 * source.nbytes)
        prepared.facts["level"] = level(device, prepared.bytes)
        for name, copy in device.copiers().items():
            target.fill(0)
            copy(target, source)
            device.synchronize()
            if not bool((target == 1).all()):
                prepared.wrong[name] = "the copy differs"
                continue
            prepared.candidates.append(Candidate(name, in_turn([(copy, (target, source))]), device.timer()))
        if not device.on_gpu:
            x, y = (np.ones(source.nbytes // 4, np.float32) for _ in range(2))
            if np.dot(x, y) == x.size:  # exact below 2^24; above, half of the bits of a sum of ones are 0
                prepared.candidates.append(Candidate(READ, in_turn([(np.dot, (x, y))]), device.timer()))
    return prepared
