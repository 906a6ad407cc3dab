"""Times of the fused kernels: against a copy of as many bytes, and against the same mathematics in plain CuPy.

Kernel, copy and CuPy's kernels are each captured in a graph that takes several sets of arrays in turn, together larger than
the L2 cache: the times are those of the device, without the host's part, and of arrays that come from memory. What cannot
be captured is timed as the host launches it, and says so. ``eager`` is our kernel launched from the host.
"""

from __future__ import annotations

import time
from typing import Any

import cupy
import numpy as np
from gpu_device import CudaTimer, capture, copies_beyond_cache, copy_graph, own_pool
from gpu_kernels import Case, copied, disagreement
from timing import Contestant, measure, ratio, summaries

MOST_COPIES = 128


def time_kernel(
    backend: Any, case: Case, stream: Any, bandwidth: float, rounds: int, seconds: float, *, dry: bool
) -> dict[str, Any]:
    """Check a case, then time it; return its row of the report.

    Returns
    -------
    dict
        ``error`` where the kernel is wrong: it then has no times. ``left_out`` names the contestants that have none, and
        the reason of each.
    """
    with stream:  # it does not wait for the default stream
        a = case.make()
    operation = case.operation(a)
    row: dict[str, Any] = {"kernel": case.name, "shape": list(case.shape), "bytes": operation.bytes, "left_out": {}}
    wrong, plain_wrong = check(backend, case, a, stream)
    if wrong:
        return {**row, "error": wrong}
    copies = 2 if dry else copies_beyond_cache(operation.bytes, MOST_COPIES)
    row["copies"] = copies
    with own_pool(), stream:
        sets = [case.make() for _ in range(copies)]
        for each in sets:
            if "b" in each:
                each["b"].fill(0)  # z += b in every run would carry z away
        calls = [backend.bind(case.operation(each)) for each in sets]
        fused = _in_graph("fused", stream, calls)

        def eager() -> None:
            for function, arguments in calls:
                function(*arguments)

        contestants = [fused, Contestant("eager", eager, CudaTimer(stream), copies)]
        graph, kept = copy_graph(stream, operation.bytes, copies)
        contestants.append(Contestant("copy", graph.launch, CudaTimer(stream), copies))
        if plain_wrong:
            row["left_out"]["unfused"] = plain_wrong
        else:
            contestants.append(_unfused(case, stream, sets, row))
        samples = measure(contestants, rounds, seconds)
        stream.synchronize()
    row["times"] = {name: summaries(found) for name, found in samples.items()}
    speed = operation.bytes / max(row["times"]["fused"]["device_seconds"]["median"], 1e-12)
    row["bytes_per_second"], row["share_of_copy_bandwidth"] = speed, speed / bandwidth
    row["share_of_equal_copy"] = ratio(samples["copy"], samples["fused"])
    if "unfused" in samples:
        row["unfused_over_fused"] = ratio(samples["unfused"], samples["fused" if row["unfused_captured"] else "eager"])
    del kept, sets
    return row


def check(backend: Any, case: Case, a: dict[str, Any], stream: Any) -> tuple[str | None, str | None]:
    """Return what is wrong with our kernel, and with plain CuPy's arithmetic, against the expression in float64."""
    with stream:
        expected = copied(a, np.dtype(np.float64))
        if case.expected is None:
            case.unfused(expected)
        else:
            expected = copied(a)
            case.expected(expected)
            expected = copied(expected, np.dtype(np.float64))
        fused = copied(a)
        function, arguments = backend.bind(case.operation(fused))
        function(*arguments)
        wrong = disagreement(case, fused, expected)
        try:
            plain = copied(a)
            case.unfused(plain)
            # random numbers of its own cannot agree; it is enough that it runs
            plain_wrong = None if case.expected else disagreement(case, plain, expected)
        except Exception as error:  # CuPy may lack a function for a dtype: the reason belongs in the report
            plain_wrong = _short(error)
        stream.synchronize()
    return wrong, plain_wrong


def _in_graph(name: str, stream: Any, calls: list[Any]) -> Contestant:
    """Return the calls as one graph; they run once before, to be compiled."""
    for function, arguments in calls:
        function(*arguments)
    stream.synchronize()
    started = time.perf_counter()
    graph = capture(stream, calls)
    return Contestant(name, graph.launch, CudaTimer(stream), len(calls), time.perf_counter() - started)


def _unfused(case: Case, stream: Any, sets: list[dict[str, Any]], row: dict[str, Any]) -> Contestant:
    """Return plain CuPy in a graph if it can be captured, else launched from the host."""
    calls = [(case.unfused, (each,)) for each in sets]
    row["unfused_captured"] = True
    try:
        return _in_graph("unfused", stream, calls)
    except Exception as error:  # CuPy refuses some of its functions under capture (random numbers)
        row["unfused_captured"] = False
        row["left_out"]["unfused in a graph"] = _short(error)

    def run() -> None:
        for function, arguments in calls:
            function(*arguments)

    return Contestant("unfused", run, CudaTimer(stream), len(sets))


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]


def release() -> None:
    """Give the memory of the last case back."""
    cupy.get_default_memory_pool().free_all_blocks()
