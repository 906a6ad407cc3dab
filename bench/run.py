"""A run: all cases of the suites asked for, on every device and in every dtype, each kept as soon as it is measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from gpubackprop.bench.case import Row, Settings, run_case
from gpubackprop.bench.devices import Device
from gpubackprop.bench.peers import reason_of
from gpubackprop.bench.report import Report, add_row, keys, write_report
from gpubackprop.bench.sizes import SUITES
from gpubackprop.bench.suites import NothingToMeasureError, cases_of
from gpubackprop.bench.suites.crossover import overtaking
from gpubackprop.machine.crossover import remember

QUICK_SECONDS = 45.0  # after which a quick run begins no case
COLD_SECONDS = 30.0  # that a cold start takes longer than other cases: it begins new processes, and we compile


def run(
    report: Report,
    suites: list[str],
    devices: list[Device],
    settings: Settings,
    folder: Path,
    show: Callable[[Row], None],
    say: Callable[[str], None],
) -> None:
    """Measure what is not in the report yet; write it after every case, and show each row.

    Ctrl-C ends the run; what was measured is kept, and the report says that it was interrupted.
    """
    started = time.monotonic()
    done = keys(report)
    try:
        for suite in with_limits(suites):
            for device in devices:
                for dtype in settings.dtypes:
                    _run_suite(report, suite, device, dtype, settings, folder, show, say, started, done)
                if suite == "crossover" and device.on_gpu and not settings.dry:
                    _remember(report, device.name, say)
    except KeyboardInterrupt:
        report["interrupted"] = True
    report["seconds"] += time.monotonic() - started
    write_report(report, folder)


def with_limits(suites: list[str]) -> list[str]:
    """Return the suites in order; with those that show the machine's limits where a floor is to be given."""
    needed = {"step": ("bandwidth", "gemm"), "latency": ("bandwidth", "gemm"), "kernels": ("bandwidth",)}
    wanted = {name for suite in suites for name in (suite, *needed.get(suite, ()))}
    return [suite for suite in SUITES if suite in wanted]


def _run_suite(
    report: Report,
    suite: str,
    device: Device,
    dtype: str,
    settings: Settings,
    folder: Path,
    show: Callable[[Row], None],
    say: Callable[[str], None],
    started: float,
    done: set[tuple[str, str, str, str]],
) -> None:
    def leave_out(reason: str, case: str | None = None, *, failed: bool = False) -> None:
        where = {"suite": suite, "device": device.name, "dtype": dtype, "case": case}
        report["left_out"].append({**where, "reason": reason, "failed": failed})
        say(f"{suite}, {device.name}, {dtype}{'' if case is None else ', ' + case}: left out: {reason}")

    if ("float32" if dtype == "tf32" else dtype) not in device.backend.dtypes or (
        dtype == "tf32" and not device.on_gpu
    ):
        leave_out(f"{device.name} does not compute in it")
        return
    try:
        for case in cases_of(suite, device, dtype, settings):
            if case.key in done:
                continue
            latest = QUICK_SECONDS - (COLD_SECONDS if suite == "coldstart" else 0.0)
            if settings.quick and time.monotonic() - started > latest:
                leave_out("no time left in a quick run", case.name)
                continue
            try:
                row = run_case(case, settings)
            except Exception as error:  # one case, too large for the memory say, is no reason to lose the others
                leave_out(reason_of(error), case.name, failed=not isinstance(error, MemoryError))
                continue
            finally:
                _release(device)
            add_row(report, row)
            write_report(report, folder)
            show(row)
    except NothingToMeasureError as nothing:
        leave_out(str(nothing))


def _release(device: Device) -> None:
    """Give the memory of the last case back."""
    if device.on_gpu:
        device.xp.get_default_memory_pool().free_all_blocks()


def _remember(report: Report, gpu: str, say: Callable[[str], None]) -> None:
    rows = [row for row in report["rows"] if row["suite"] == "crossover" and row["dtype"] == "float32"]
    if not any(row["device"] == gpu for row in rows):
        return
    flops = overtaking(rows, gpu)
    remember(gpu, flops)
    text = "never among these sizes" if flops == float("inf") else f"from {flops:.3g} FLOP per step on"
    say(f"{gpu} overtakes the CPU {text}; device='auto' now knows")
    report["crossover"] = {**report.get("crossover", {}), gpu: None if flops == float("inf") else flops}
