"""Compiles CUDA kernels, links them and reports what the compiler says of them; no device and no driver is needed.

    python tests/cuda_compile.py 90 some     # for one architecture, as JSON lines: what test_kernels_cuda_compile.py runs
    python tests/cuda_compile.py table       # every kernel for every architecture: writes kernels/cuda/registers.csv
    python tests/cuda_compile.py table update_ advance_    # those whose names begin so; the other rows stay as they are

One architecture to a process, which keeps Numba's tables of compiled functions apart.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from gpubackprop import SGD, Adam, schedules
from gpubackprop.activations import ACTIVATIONS
from gpubackprop.definitions import check_dtype
from gpubackprop.kernels.cuda import column_sums, minibatch, passes
from gpubackprop.kernels.cuda import dropout as cuda_dropout
from gpubackprop.kernels.cuda import loss as cuda_loss
from gpubackprop.kernels.cuda import softmax as cuda_softmax
from gpubackprop.kernels.cuda import softmax_rows as cuda_softmax_rows
from gpubackprop.kernels.cuda import training as cuda_training
from gpubackprop.kernels.cuda.compile import Source, compile_ptx, link, resident
from gpubackprop.losses import LOSSES
from gpubackprop.optimizers import LBFGS, OPTIMIZERS
from gpubackprop.schedules import SCHEDULES

F4, F8, F2, BF16 = (check_dtype(name) for name in ("float32", "float64", "float16", "bfloat16"))
ARCHITECTURES = ("75", "80", "90", "100", "120")
REGISTERS = 65536  # of a multiprocessor
TABLE = Path(__file__).parents[1] / "kernels" / "cuda" / "registers.csv"
SOME = ("relu", "gelu", "tanh", "mish")  # a choice, erf, an approximation by parts, exp with divisions


def sources(complete: bool) -> Iterator[tuple[Source, int]]:
    """Yield kernels with the width in bytes that their loads must have, 0 where it does not matter."""
    for dtype in (F4, BF16, F2, F8):
        vector = 16 // dtype.itemsize
        yield from pass_sources(dtype, vector, complete and dtype != F2)
        yield from loss_sources(dtype, complete and dtype != F2)
        yield column_sums.column_sum(dtype), 0
        yield passes.narrow_product(dtype, vector), 0
        yield cuda_dropout.dropout(dtype, vector), 16
        yield cuda_dropout.dropout(dtype, 1), 0
    for dtype in (F4, F8):
        vector = 16 // dtype.itemsize
        yield cuda_loss.finish_loss(dtype), 0
        yield minibatch.normalize_weights(dtype), 0
        yield cuda_training.accumulate(dtype, vector, False), 16
        yield cuda_training.sum_of_squares(dtype), 16
        yield cuda_training.clip(dtype, dtype == F4), 0
        for cls in OPTIMIZERS.values():
            if cls is not LBFGS:
                width = cuda_training.update_width(cls(), dtype, 1024)
                yield cuda_training.update(cls(), dtype, width), 16 if width > 1 else 0
        yield cuda_training.update(SGD(momentum=0.9, nesterov=True, clip_value=1.0), dtype, 1), 0
        for schedule in SCHEDULES.values() if complete else (schedules.OneCycle,):
            yield cuda_training.advance(SGD(schedule(0.1)), dtype, dtype == F4), 0
    for dtype in (BF16, F2):
        yield cuda_training.update(Adam(), F4, 4, dtype), 16
    for storage, width in (("f4", 4), ("f8", 1), ("f4", 1), ("u2", 1)):
        yield minibatch.gather((storage, width)), 16 if width > 1 else 0
    yield minibatch.gather(("f4", 4), ("f8", 1)), 16
    yield minibatch.gather(("f4", 4), ("f4", 4), ("f4", 1)), 16


def pass_sources(dtype: np.dtype[Any], vector: int, complete: bool) -> Iterator[tuple[Source, int]]:
    """Yield the kernels of the two passes."""
    for activation in ACTIVATIONS.values():
        some = activation.name in SOME
        if not (complete or (some and (dtype == F4 or activation.name in ("relu", "tanh")))):
            continue
        for width in (vector, 1) if activation.name == "relu" else (vector,):
            wanted = 16 if width > 1 else 0
            yield passes.bias_activation_forward(activation, dtype, width, True), wanted
            if some:
                yield passes.bias_activation_forward(activation, dtype, width, False), wanted
            yield passes.bias_activation_backward(activation, dtype, width), wanted
        if some:  # dropout on the way, and the sums of the bias gradient in the same launch
            yield passes.bias_activation_forward(activation, dtype, vector, True, True, False), 16
            yield passes.bias_activation_backward(activation, dtype, vector, True, True), 16
        if activation.name in ("relu", "gelu"):
            yield passes.bias_activation_backward(activation, dtype, vector, product=True), 16
        if activation.name == "relu":
            yield passes.bias_activation_backward(activation, dtype, vector, True, True, True), 16


def loss_sources(dtype: np.dtype[Any], complete: bool) -> Iterator[tuple[Source, int]]:
    """Yield the kernels of the losses, as wide as a launch has them."""
    everything = cuda_loss.Variant(False, True, True, dtype == F2)
    for loss in LOSSES.values():
        if loss.family == "elementwise":
            if complete or loss.name in ("huber", "sigmoid_cross_entropy"):
                yield cuda_loss.elementwise_loss(loss, dtype, everything.width(dtype), everything), 16
                yield cuda_loss.elementwise_loss(loss, dtype, 1, cuda_loss.Variant()), 0
        elif complete or loss.targets == "classes":
            plain = cuda_loss.Variant(indices=loss.targets == "classes")
            widest = cuda_softmax.tile_columns(dtype)
            for d in (3, 10, 128, widest) if complete and dtype != F8 else (10, widest):
                variant = everything if d > 64 else plain
                yield cuda_softmax.softmax_loss_tile(loss, dtype, variant.width(dtype), d, variant), 16
            for d in (304, 4096 if dtype != F8 else 2048, 1001):
                variant = everything if d > 2000 else plain
                width = 1 if d == 1001 else variant.width(dtype)
                shape = cuda_softmax_rows.row_shape(dtype, width, d, not variant.indices)
                assert shape is not None
                yield cuda_softmax_rows.softmax_loss_row(loss, dtype, width, shape, variant), 16 if width > 1 else 0
            width = everything.width(dtype) if dtype != F8 else 1
            yield cuda_softmax_rows.softmax_loss_long(loss, dtype, width, everything), 16 if width > 1 else 0


def ptxas() -> str | None:
    """Return the assembler of the nvidia-cuda-nvcc wheel or of an installed toolkit."""
    spec = find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        for found in sorted(Path(folder).glob("*/bin/ptxas")):
            return str(found)
    return shutil.which("ptxas")


def facts(source: Source, width: int, capability: tuple[int, int], assembler: str | None) -> dict[str, Any]:
    """Return what the gates of the tests look at."""
    ptx = compile_ptx(source, capability)
    body = ptx[ptx.index("{") :]
    result: dict[str, Any] = {
        "name": source.name,
        "wanted": width,
        "room": room(source, capability),
        "linked": len(link(ptx, capability)),
        "local": ".local" in body,
        "f64": ".f64" in body,
        "widest": max(
            (load_width(*found) for found in re.findall(r"ld\.global(?:\.nc)?(\.v\d)?\.[a-z](\d+)", body)), default=0
        ),
    }
    if assembler:
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
            file.write(ptx)
            file.flush()
            command = [assembler, "-v", "-arch=sm_{}{}".format(*capability), file.name, "-o", "/dev/null"]
            report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        # the kernel's own lines: a function that is called (the slow path of sin) has lines of its own
        result["registers"] = int(re.findall(r"Used (\d+) registers", report)[0])
        result["spills"] = sum(map(int, re.findall(r"(\d+) bytes spill", report)))
    return result


def room(source: Source, capability: tuple[int, int]) -> int:
    """Return the threads of a kernel that a multiprocessor must have registers for."""
    return resident(source, capability) * source.threads


def load_width(vector: str, bits: str) -> int:
    """Return the bytes of one load: ``load_width(".v4", "32")`` is 16."""
    return int(vector[2:] or 1) * int(bits) // 8


def check(kernel: dict[str, Any]) -> None:
    """Assert what every kernel must keep to."""
    name = kernel["name"]
    assert kernel["linked"] > 0
    assert not kernel["local"] or reduces_large_angles(name), f"{name} keeps an array in local memory"
    assert not kernel["f64"] or uses_float64(name) or reduces_large_angles(name), f"{name} computes in float64"
    assert kernel["widest"] >= kernel["wanted"], f"{name} loads {kernel['widest']} bytes at a time"
    if "registers" in kernel:  # where there is an assembler
        assert kernel["spills"] == 0, f"{name} spills {kernel['spills']} bytes"
        assert kernel["registers"] * kernel["room"] <= REGISTERS, f"{name} uses {kernel['registers']} registers"


def uses_float64(name: str) -> bool:
    """Whether a kernel is meant to compute in float64: all of a float64 model's, the schedule, sums over an epoch, of weights."""
    return "_f8" in name or name.startswith(("advance_", "finish_loss", "normalize_weights"))


def reduces_large_angles(name: str) -> bool:
    """Whether a kernel calls sin or cos: libdevice reduces large arguments with a table in local memory, in float64."""
    return "_sin_" in name or name.startswith(("advance_sgd_cosine", "advance_sgd_onecycle"))


def report(architecture: str, complete: bool, prefixes: tuple[str, ...] = ("",)) -> None:
    """Print the facts of the kernels for an architecture."""
    assembler = ptxas()
    capability = capability_of(architecture)
    for source, wanted in sources(complete):
        if not source.name.startswith(prefixes):
            continue
        print(json.dumps(facts(source, wanted, capability, assembler)), flush=True)


def capability_of(architecture: str) -> tuple[int, int]:
    """Return (12, 0) of ``"120"``."""
    return int(architecture[:-1]), int(architecture[-1])


def toolchain() -> str:
    """Return the versions that registers depend on."""
    return " ".join(f"{name} {version(name)}" for name in ("numba-cuda", "nvidia-cuda-nvcc-cu12"))


def write_table(prefixes: list[str]) -> None:
    """Compile everything, two architectures at a time, and write the registers of each kernel, unless one fails a check.

    With prefixes, those whose names begin so; the others keep their rows.
    """
    failures: list[str] = []

    def registers(architecture: str) -> dict[str, int]:
        command = [sys.executable, __file__, architecture, "all", *prefixes]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        kernels = [json.loads(line) for line in lines]
        for kernel in kernels:
            try:
                check(kernel)
            except AssertionError as error:
                failures.append(f"sm_{architecture}: {error}")
        print(f"sm_{architecture}: {len(kernels)} kernels", flush=True)
        return {kernel["name"]: kernel["registers"] for kernel in kernels}

    with ThreadPoolExecutor(2) as pool:
        columns = list(pool.map(registers, ARCHITECTURES))
    if failures:
        sys.exit("\n".join(failures))
    kept: dict[str, list[str]] = {}
    if prefixes:
        _, _, *rows = csv.reader(TABLE.read_text(encoding="utf-8").splitlines())
        kept = {name: values for name, *values in rows}
    new = {name: [str(column[name]) for column in columns] for name in columns[0]}
    names = [source.name for source, _ in sources(True)]
    with TABLE.open("w", encoding="utf-8", newline="") as file:
        file.write(f"# registers of a thread by architecture; python tests/cuda_compile.py table; {toolchain()}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["kernel", *(f"sm_{number}" for number in ARCHITECTURES)])
        writer.writerows([name, *(new.get(name) or kept[name])] for name in names)


if __name__ == "__main__":
    if sys.argv[1] == "table":
        write_table(sys.argv[2:])
    else:
        report(sys.argv[1], sys.argv[2] == "all", tuple(sys.argv[3:]) or ("",))
