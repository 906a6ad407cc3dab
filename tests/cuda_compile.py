"""Compiles CUDA kernels for one architecture, links them and prints what the compiler reports, as JSON lines.

Run by ``test_kernels_cuda_compile.py``: ``python cuda_compile.py 90 all``. No device and no driver is needed. One
architecture to a process, which keeps Numba's tables of compiled functions apart.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba import cuda

from gpubackprop import SGD, schedules
from gpubackprop.activations import ACTIVATIONS
from gpubackprop.kernels import cuda as passes
from gpubackprop.kernels import cuda_loss, cuda_softmax, cuda_training
from gpubackprop.kernels.cuda_launch import Source, compile_ptx, link
from gpubackprop.kernels.cuda_unroll import static_range, unrolled
from gpubackprop.kernels.cuda_vector import access
from gpubackprop.losses import LOSSES
from gpubackprop.optimizers import LBFGS, OPTIMIZERS
from gpubackprop.schedules import SCHEDULES

F4, F8 = np.dtype(np.float32), np.dtype(np.float64)
SOME = ("relu", "gelu", "tanh", "mish")  # a choice, erf, an approximation by parts, exp with divisions


def copy_kernel(storage: str, width: int) -> Source:
    """A kernel that only loads and stores, to check the access to 16-bit storage."""
    load, store, _, _ = access(storage, width)
    real = numba.float32

    @unrolled
    def kernel(source, out, n):  # type: ignore[no-untyped-def]
        r = cuda.local.array(width, real)
        i = cuda.grid(1) * width
        if i < n:
            load(r, 0, source, i)
            for k in static_range(width):
                r[k] = r[k] + r[k]
            store(out, i, r, 0)

    return Source(f"copy_{storage}_v{width}", kernel, f"{storage}* {storage}* i8")


def sources(complete: bool) -> Iterator[tuple[Source, int]]:
    """Yield kernels with the width in bytes that their loads must have, 0 where it does not matter."""
    for dtype in (F4, F8):
        vector = 16 // dtype.itemsize
        for activation in ACTIVATIONS.values():
            if complete or (activation.name in SOME and (dtype == F4 or activation.name == "tanh")):
                for width in (vector, 1) if activation.name == "relu" else (vector,):
                    wanted = 16 if width > 1 else 0
                    yield passes.bias_activation_forward(activation, dtype, width, True), wanted
                    if activation.name in SOME:
                        yield passes.bias_activation_forward(activation, dtype, width, False), wanted
                    yield passes.bias_activation_backward(activation, dtype, width), wanted
        for loss in LOSSES.values():
            if loss.family == "elementwise":
                if complete or loss.name in ("huber", "sigmoid_cross_entropy"):
                    yield cuda_loss.elementwise_loss(loss, dtype, vector, True, True), 16
                    yield cuda_loss.elementwise_loss(loss, dtype, 1, False, False), 0
            elif complete or dtype == F4:
                for d in (3, 32, 128, 256) if complete and loss.targets == "classes" else (10, 256):
                    indices = loss.targets == "classes"
                    yield cuda_softmax.softmax_loss_warp(loss, dtype, d, indices, d > 64, d > 64), 0
                yield cuda_softmax.softmax_loss_block(loss, dtype, vector, False, True, True), 16
                yield cuda_softmax.softmax_loss_block(loss, dtype, 1, True, False, False), 0
        yield cuda_loss.finish_loss(dtype), 0
        yield passes.column_sum(dtype), 0
        yield cuda_training.normalize_weights(dtype), 0
        yield cuda_training.dropout(dtype, vector), 16
        yield cuda_training.dropout(dtype, 1), 0
        yield cuda_training.gather(dtype.str[1:], vector), 16
        yield cuda_training.sum_of_squares(dtype), 16
        yield cuda_training.clip(dtype), 0
        for cls in OPTIMIZERS.values():
            if cls is not LBFGS:
                yield cuda_training.update(cls(), dtype, vector), 16
        yield cuda_training.update(SGD(momentum=0.9, nesterov=True, clip_value=1.0), dtype, 1), 0
        for schedule in SCHEDULES.values() if complete else (schedules.OneCycle,):
            yield cuda_training.advance(SGD(schedule(0.1)), dtype), 0
    for storage in ("f2", "bf16"):
        yield copy_kernel(storage, 8), 16


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


def load_width(vector: str, bits: str) -> int:
    """Return the bytes of one load: ``load_width(".v4", "32")`` is 16."""
    return int(vector[2:] or 1) * int(bits) // 8


if __name__ == "__main__":
    number, assembler = sys.argv[1], ptxas()
    for source, wanted in sources(sys.argv[2] == "all"):
        print(json.dumps(facts(source, wanted, (int(number[:-1]), int(number[-1])), assembler)), flush=True)
