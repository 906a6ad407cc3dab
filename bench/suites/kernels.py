"""Each fused kernel against a copy of as many bytes, and against the same mathematics in plain NumPy or CuPy.

Several sets of arrays are used in turn, together twice as large as the cache, so arrays come from memory; the smallest would need
too many, and the report names the cache that they come from. On a
GPU kernel, copy and CuPy's kernels are each captured in a graph, without the host's part; work that cannot be captured is timed as
launched from the host, and says so. ``gpubackprop, eager`` is our kernel launched from the host.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from gpubackprop.bench.case import Case, Cases, Prepared, Settings
from gpubackprop.bench.devices import Device, copies_beyond_cache, copy_pair, in_turn, level
from gpubackprop.bench.kernels import Kernel, disagreement, kernels_of
from gpubackprop.bench.peers import reason_of
from gpubackprop.bench.sizes import parse_shape
from gpubackprop.bench.suites import NothingToMeasureError
from gpubackprop.bench.timing import Candidate

MOST_COPIES = 1024


def cases(device: Device, dtype: str, settings: Settings) -> Cases:
    """Yield every kernel at each shape."""
    if dtype == "tf32":
        raise NothingToMeasureError("no kernel but the products knows TF32")
    for text in settings.sizes["kernels"]:
        n, d = parse_shape(text, 2)
        for kernel in kernels_of(device.backend, dtype, (n, d), few=settings.quick):
            name = f"{kernel.name}, {'x'.join(map(str, kernel.shape))}"
            prepare = partial(_prepare, device, kernel, settings)
            yield Case("kernels", name, device.name, dtype, prepare, {"shape": list(kernel.shape)})


def _prepare(device: Device, kernel: Kernel, settings: Settings) -> Prepared:
    with device.scope():
        a = kernel.make()
        operation = kernel.operation(a)
        prepared = Prepared([], flops=operation.flops, bytes=operation.nbytes)
        plain = "plain CuPy" if device.on_gpu else "plain NumPy"
        wrong, plain_wrong = check(device, kernel, a)
        if wrong:
            prepared.wrong["gpubackprop"] = wrong
            return prepared
        copies = 2 if settings.dry else copies_beyond_cache(device, operation.nbytes, MOST_COPIES)
        prepared.facts.update(sets_of_arrays=copies, level=level(device, copies * operation.nbytes))
        sets = [kernel.again(a) for _ in range(copies)]
        for each in sets:
            if "b" in each:
                each["b"].fill(0)  # z += b in every run would make z grow
        calls = [device.backend.bind(kernel.operation(each)) for each in sets]
        prepared.candidates.append(device.queue("gpubackprop", calls, copies))
        if device.on_gpu:
            prepared.candidates.append(Candidate("gpubackprop, eager", in_turn(calls), device.timer(), copies))
        prepared.candidates.append(_copy(device, operation.nbytes, copies))
        if plain_wrong:
            prepared.wrong[plain] = plain_wrong
        else:
            prepared.candidates.append(_unfused(device, kernel, sets, plain, prepared))
    return prepared


def check(device: Device, kernel: Kernel, a: dict[str, Any]) -> tuple[str | None, str | None]:
    """Return what is wrong with our kernel, and with the plain arithmetic, against the expression in float64."""
    given = kernel.wide(a)
    expected = kernel.again(given)
    if kernel.expected is None:
        kernel.unfused(expected)
    else:
        expected = kernel.again(a)
        kernel.expected(expected)
        expected = kernel.wide(expected)
    fused = kernel.again(a)
    device.backend.execute(kernel.operation(fused))
    wrong = disagreement(kernel, given, fused, expected, times=2)
    try:
        plain = kernel.again(a)
        kernel.unfused(plain)
        # its own random numbers cannot agree; it is enough that it runs
        plain_wrong = None if kernel.expected else disagreement(kernel, given, plain, expected, times=100)
    except Exception as error:  # the array module may lack a function for a dtype: the reason belongs in the report
        plain_wrong = reason_of(error)
    device.synchronize()
    return wrong, plain_wrong


def _copy(device: Device, nbytes: int, copies: int) -> Candidate:
    copy = next(iter(device.copiers().values()))
    pairs = [copy_pair(device, nbytes) for _ in range(copies)]
    return device.queue("copy of as many bytes", [(copy, pair) for pair in pairs], copies)


def _unfused(device: Device, kernel: Kernel, sets: list[dict[str, Any]], name: str, prepared: Prepared) -> Candidate:
    """Return plain array expressions, in a graph if they can be captured, else launched from the host."""
    calls = [(kernel.unfused, (each,)) for each in sets]
    try:
        return device.queue(name, calls, len(sets))
    except Exception as error:  # CuPy refuses some of its functions under capture (random numbers)
        prepared.left_out[f"{name}, in a graph"] = reason_of(error)
        return Candidate(name, in_turn(calls), device.timer(), len(sets))
