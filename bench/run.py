"""A run: all cases of the requested suites, on every device and in every dtype, each saved as soon as it is measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from gpubackprop.bench.case import Case, Row, Settings, run_case
from gpubackprop.bench.devices import Device
from gpubackprop.bench.instance import in_instances
from gpubackprop.bench.peers import reason_of
from gpubackprop.bench.report import Report, add_row, keys, write_report
from gpubackprop.bench.sizes import SUITES
from gpubackprop.bench.suites import NothingToMeasureError, cases_of
from gpubackprop.bench.suites.crossover import overtaking
from gpubackprop.bench.threads import pinned
from gpubackprop.machine.crossover import remember

QUICK_SECONDS = 45.0  # after which a quick run starts no case
COLD = ("coldstart", "memory")  # suites in which each sample is a process
COLD_SECONDS = 30.0  # extra seconds of a cold start: it starts new processes, and we compile


@dataclass
class Run:
    """A run: the report that it fills, its folder, and the callbacks for each row and for what is left out."""

    report: Report
    settings: Settings
    folder: Path
    show: Callable[[Row], object]
    say: Callable[[str], object]

    def __post_init__(self) -> None:
        self._started, self._done = time.monotonic(), keys(self.report)

    def measure(self, suites: list[str], devices: list[Device]) -> None:
        """Measure what is not in the report yet; write it after every case.

        Ctrl-C ends the run; the measurements are kept, and the report says that it was interrupted.
        """
        try:
            for suite in with_ceilings(suites):
                for device in devices:
                    for dtype in self.settings.dtypes:
                        self._measure_suite(suite, device, dtype)
                    if suite == "crossover" and device.on_gpu and not self.settings.dry:
                        self._remember(device.name)
        except KeyboardInterrupt:
            self.report["interrupted"] = True
        self.report["seconds"] += time.monotonic() - self._started
        write_report(self.report, self.folder)

    def _measure_suite(self, suite: str, device: Device, dtype: str) -> None:
        def leave_out(reason: str, case: str | None = None, *, failed: bool = False) -> None:
            where = {"suite": suite, "device": device.name, "dtype": dtype, "case": case}
            self.report["left_out"].append({**where, "reason": reason, "failed": failed})
            self.say(f"{suite}, {device.name}, {dtype}{'' if case is None else ', ' + case}: left out: {reason}")

        storage = "float32" if dtype == "tf32" else dtype
        if storage not in device.backend.dtypes or (dtype == "tf32" and not device.on_gpu):
            leave_out(f"{device.name} does not compute in it")
            return
        try:
            for case in cases_of(suite, device, dtype, self.settings):
                if case.key not in self._done:
                    self._measure_case(case, device, leave_out)
        except NothingToMeasureError as nothing:
            leave_out(str(nothing))

    def _measure_case(self, case: Case, device: Device, leave_out: Callable[..., None]) -> None:
        latest = QUICK_SECONDS - (COLD_SECONDS if case.suite == "coldstart" else 0.0)
        if self.settings.quick and time.monotonic() - self._started > latest:
            leave_out("no time left in a quick run", case.name)
            return
        try:
            row = self._row(case, device)
        except Exception as error:  # one failing case, say too large for the memory, must not lose the others
            leave_out(reason_of(error), case.name, failed=not isinstance(error, MemoryError))
            return
        finally:
            if device.on_gpu:
                device.xp.get_default_memory_pool().free_all_blocks()
        add_row(self.report, row)
        write_report(self.report, self.folder)
        self.show(row)

    def _row(self, case: Case, device: Device) -> Row:
        if case.threads is not None or (self.settings.instances > 1 and case.suite not in COLD):
            return in_instances(case, self.settings)
        with nullcontext() if device.on_gpu else pinned(self.settings.threads):
            return run_case(case, self.settings)

    def _remember(self, gpu: str) -> None:
        rows = [row for row in self.report["rows"] if row["suite"] == "crossover" and row["dtype"] == "float32"]
        if not any(row["device"] == gpu for row in rows):
            return
        flops = overtaking(rows, gpu)
        remember(gpu, flops)
        text = "never among these sizes" if flops == float("inf") else f"from {flops:.3g} FLOP per step on"
        self.say(f"{gpu} overtakes the CPU {text}; device='auto' now knows")
        known = self.report.setdefault("crossover", {})
        known[gpu] = None if flops == float("inf") else flops


def with_ceilings(suites: list[str]) -> list[str]:
    """Return the suites in order, with those that measure the machine's ceilings if a floor is needed."""
    needed = {"step": ("bandwidth", "gemm"), "latency": ("bandwidth", "gemm"), "kernels": ("bandwidth",)}
    wanted = {name for suite in suites for name in (suite, *needed.get(suite, ()))}
    return [suite for suite in SUITES if suite in wanted]
