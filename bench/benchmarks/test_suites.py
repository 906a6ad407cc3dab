"""The suites under pytest-benchmark, for developers: ``pytest bench/ --benchmark-only``.

What ``gpubackprop bench`` times in turn is timed here one by one, with pytest-benchmark's options to save, compare and profile.
Sizes are those of a quick run; ours alone take part.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from gpubackprop.backends import available_devices
from gpubackprop.bench import threads
from gpubackprop.bench.case import Case, Settings
from gpubackprop.bench.devices import device_of
from gpubackprop.bench.sizes import QUICK
from gpubackprop.bench.suites import NothingToMeasureError, cases_of

threads.limit(1)
SETTINGS = Settings(QUICK, (), quick=True)
SUITES = ("transfer", "bandwidth", "gemm", "kernels", "step", "epoch", "latency")


def cases() -> Iterator[Case]:
    for name in available_devices():
        for suite in SUITES:
            try:
                yield from cases_of(suite, device_of(name, 1), "float32", SETTINGS)
            except NothingToMeasureError:
                continue


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: f"{case.suite}-{case.device}-{case.name}")
def test_case(case: Case, benchmark: Any) -> None:
    prepared = case.prepare()
    assert prepared.wrong == {}
    first = prepared.candidates[0]
    first.timer(first.run, 1)
    benchmark(first.timer, first.run, 1)
    benchmark.extra_info.update({"units": first.units, "flops": prepared.flops, "bytes": prepared.bytes})
