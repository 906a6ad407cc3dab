"""CUDA kernels compiled and linked for five architectures, with gates on the code; see ``cuda_compile.py``.

Every kernel, with a few definitions of each kind; ``kernels/registers.csv`` must agree.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
pytest.importorskip("cuda.core", reason="cuda-core is not installed")

import cuda_compile

pytestmark = pytest.mark.slow

REGISTERS = 65536  # of a multiprocessor


@pytest.fixture(scope="module")
def reports() -> Any:
    """Kernels' facts by architecture; two compilers at a time."""
    script = Path(__file__).with_name("cuda_compile.py")
    waiting = list(cuda_compile.ARCHITECTURES)
    running: dict[str, Any] = {}

    def start() -> None:
        if waiting:
            architecture = waiting.pop(0)
            command = [sys.executable, str(script), architecture, "some"]
            running[architecture] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    start()
    start()
    done: dict[str, list[dict[str, Any]]] = {}

    def report(architecture: str) -> list[dict[str, Any]]:
        while architecture not in done:
            current = architecture if architecture in running else next(a for a in running if a not in done)
            output, errors = running[current].communicate(timeout=600)
            assert running[current].returncode == 0, errors
            done[current] = [json.loads(line) for line in output.splitlines()]
            start()
        return done[architecture]

    yield report
    for process in running.values():
        process.kill()
        process.communicate()


def uses_float64(name: str) -> bool:
    """Whether a kernel is meant to compute in float64: all of a float64 model's, the schedule, an epoch's sum of losses."""
    return "_f8" in name or name.startswith(("advance_", "finish_loss"))


def reduces_large_angles(name: str) -> bool:
    """Whether a kernel calls sin or cos: libdevice reduces large arguments with a table in local memory, in float64."""
    return "_sin_" in name or name.startswith(("advance_sgd_cosine", "advance_sgd_onecycle"))


def resident(name: str) -> int:
    """Return the threads that must fit a multiprocessor: half of what it holds, but for the longest rows in float64."""
    return 512 if "_f8_long_" in name else 1024


@pytest.fixture(scope="module")
def table() -> dict[str, dict[str, int]]:
    """The registers of ``kernels/registers.csv``, by kernel and architecture; none where it has not been written."""
    if not cuda_compile.TABLE.exists():
        return {}
    _, *lines = cuda_compile.TABLE.read_text(encoding="utf-8").splitlines()
    rows = csv.DictReader(lines)
    return {row.pop("kernel"): {key[3:]: int(value) for key, value in row.items()} for row in rows}


@pytest.mark.parametrize("architecture", cuda_compile.ARCHITECTURES)
def test_kernels_link_and_keep_to_registers(architecture: str, reports: Any, table: Any) -> None:
    kernels = reports(architecture)
    assert len(kernels) >= 140
    assert len({kernel["name"] for kernel in kernels}) == len(kernels)
    same_compiler = bool(table) and cuda_compile.TABLE.read_text().split("\n")[0].endswith(cuda_compile.toolchain())
    for kernel in kernels:
        name = kernel["name"]
        assert kernel["linked"] > 0
        assert not kernel["local"] or reduces_large_angles(name), f"{name} keeps an array in local memory"
        assert not kernel["f64"] or uses_float64(name) or reduces_large_angles(name), f"{name} computes in float64"
        assert kernel["widest"] >= kernel["wanted"], f"{name} loads {kernel['widest']} bytes at a time"
        if "registers" in kernel:  # where there is an assembler
            assert kernel["spills"] == 0, f"{name} spills {kernel['spills']} bytes"
            assert kernel["registers"] * resident(name) <= REGISTERS, f"{name} uses {kernel['registers']} registers"
            if same_compiler:
                stored = table[name][architecture]
                assert kernel["registers"] == stored, f"{name}: run python tests/cuda_compile.py table"


def test_the_table_has_every_kernel_with_room_for_half_the_threads(table: Any) -> None:
    if not table:
        pytest.skip("kernels/registers.csv is not there; run python tests/cuda_compile.py table")
    assert list(table) == [source.name for source, _ in cuda_compile.sources(False)]
    for name, row in table.items():
        assert tuple(row) == cuda_compile.ARCHITECTURES
        assert max(row.values()) * resident(name) <= REGISTERS, name
