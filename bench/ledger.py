"""The ledger of a step, from its list of operations: what it does, and the least time this machine needs for it."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterable, Sequence
from typing import Any

from gpubackprop.bench.case import Row, best_seconds
from gpubackprop.bench.devices import MEMORY, Device, Gpu
from gpubackprop.bench.ours import captures
from gpubackprop.step import Step
from gpubackprop.step.operations import Operation


def ledger(device: Device, step: Step) -> Row:
    """Return what a step does on a device.

    Returns
    -------
    dict
        ``flops`` and ``bytes`` as the operations count them, also by phase and as a list per operation; ``launches`` of kernels
        and calls of products by the host, without a graph; ``graph_launches`` with one, else None; ``synchronizations``,
        which are 0 where the step can be captured, since a graph holds none, and None if unknown;
        ``allocations``: on a GPU how many, on the CPU bytes at most at a time, of a warm step.
    """
    run: Any = step.compile()
    run()
    phases: dict[str, Row] = {}
    for operation in step.operations:
        phase = phases.setdefault(operation.phase, {"flops": 0, "bytes": 0, "operations": 0})
        phase["flops"] += operation.flops
        phase["bytes"] += operation.nbytes
        phase["operations"] += 1
    captured = captures(device)
    return {
        "flops": step.flops,
        "bytes": step.bytes,
        "phases": phases,
        "operations": [[o.name, o.phase, o.equation, o.flops, o.nbytes] for o in step.operations],
        "launches": sum(_launches(device, operation) for operation in step.bound()),
        "graph_launches": 1 if captured else None,
        "steps_per_graph": getattr(run, "steps_per_launch", None),
        "synchronizations": 0 if captured or not device.on_gpu else None,
        "allocations": _allocations(device, run),
    }


def _launches(device: Device, operation: Operation) -> int:
    """Return how many kernels an operation launches, a product counting as one; on the CPU how many calls it is."""
    if not device.on_gpu or operation.name == "matmul":
        return 1
    backend: Any = device.backend
    _, (launches, *_) = backend.bind(operation)
    return len(launches)


def _allocations(device: Device, run: Any) -> int:
    if isinstance(device, Gpu):
        with _Counting(device.xp) as hook:
            getattr(run, "eagerly", run)()
            device.xp.cuda.Device().synchronize()
        return hook.count
    tracemalloc.start()
    try:
        run()  # what Python itself keeps for the first call
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        run()
        return max(0, tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()


class _Counting:
    """Counts the requests to CuPy's allocator."""

    def __init__(self, cupy: Any) -> None:
        outer = self

        class Hook(cupy.cuda.MemoryHook):  # type: ignore[misc]
            name = "counting"

            def malloc_preprocess(self, **arguments: Any) -> None:
                outer.count += 1

        self.count, self._hook = 0, Hook()

    def __enter__(self) -> _Counting:
        self._hook.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.__exit__(*error)


def ceilings(rows: Iterable[Row], device: str, dtype: str) -> Row | None:
    """Return the limits of a machine as the rows of ``gemm`` and ``bandwidth`` show them, or None if they are missing.

    Returns
    -------
    dict
        ``flops_per_second``: of the fastest sample of any product in this dtype; ``copies``: [bytes touched, bytes per
        second] of the fastest sample of each size.
    """
    rows = [row for row in rows if row["device"] == device and row["candidates"]]
    products = [row["flops"] / _fastest(row) for row in rows if row["suite"] == "gemm" and row["dtype"] == dtype]
    copies = sorted([row["bytes"], row["bytes"] / _fastest(row)] for row in rows if row["suite"] == "bandwidth")
    if not products or not copies:
        return None
    return {"flops_per_second": max(products), "copies": copies}


def bandwidth_of(ceilings: Row, nbytes: int) -> float:
    """Return the best bandwidth for this many bytes or more, or of the next smaller size measured."""
    smaller = max((size for size, _ in ceilings["copies"] if size <= nbytes), default=0)
    return float(max(speed for size, speed in ceilings["copies"] if size >= smaller))


def floor_seconds(ceilings: Row, operations: Iterable[Sequence[Any]]) -> float:
    """Return the least time for operations one after another: each at the peak of products or at a copy's bandwidth.

    Source: Williams, Waterman, Patterson (2009), the roofline, for each operation by itself. An operation whose arrays fit
    a cache is given that cache's bandwidth.
    """
    total = 0.0
    for *_, flops, nbytes in operations:
        total += max(flops / ceilings["flops_per_second"], nbytes / bandwidth_of(ceilings, nbytes))
    return total


def _fastest(row: Row) -> float:
    samples = [sample for entry in row["candidates"].values() for sample in best_seconds(entry)["samples"]]
    return max(1e-12, float(min(samples)))


def annotate(row: Row, rows: list[Row]) -> None:
    """Add to a row how close it comes to the limits in earlier rows: to the floor, or to the fastest traffic with memory."""
    limits = ceilings([*rows, row], row["device"], row["dtype"])
    if not row["candidates"]:
        return
    seconds = best_seconds(row["candidates"][row["base"]])["median"]
    if "ledger" in row and limits is not None:
        row["ceilings"] = limits
        row["floor_seconds"] = floor_seconds(limits, row["ledger"]["operations"])
        row["share_of_floor"] = row["floor_seconds"] / seconds
    if row["suite"] == "kernels":
        row["bytes_per_second"] = row["bytes"] / seconds
        if row["level"] == MEMORY:
            moved = [r for r in (*rows, row) if r["suite"] in ("bandwidth", "kernels") and r["device"] == row["device"]]
            row["share_of_memory"] = row["bytes_per_second"] / max(map(_fastest_with_memory, moved))


def _fastest_with_memory(row: Row) -> float:
    """Return the bytes per second of the fastest candidate of a row, 0 if its arrays are in a cache."""
    if row["level"] != MEMORY:
        return 0.0
    return max((row["bytes"] / best_seconds(entry)["median"] for entry in row["candidates"].values()), default=0.0)
