"""CUDA kernels compiled and linked for five architectures, with gates on the code; see ``cuda_compile.py``.

Every kernel, with a few definitions of each kind; ``kernels/cuda/registers.csv``, which has all, must agree.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed; make test-all installs it")
pytest.importorskip("cuda.core", reason="cuda-core is not installed; make test-all installs it")

import cuda_compile

pytestmark = [pytest.mark.slow, pytest.mark.compilers]


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
            output, errors = running[current].communicate(timeout=1800)
            assert running[current].returncode == 0, errors
            done[current] = [json.loads(line) for line in output.splitlines()]
            start()
        return done[architecture]

    yield report
    for process in running.values():
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def table() -> dict[str, dict[str, int]]:
    """The registers of ``kernels/cuda/registers.csv``, by kernel and architecture."""
    _, *lines = cuda_compile.TABLE.read_text(encoding="utf-8").splitlines()
    rows = csv.DictReader(lines)
    return {row.pop("kernel"): {key[3:]: int(value) for key, value in row.items()} for row in rows}


@pytest.mark.parametrize("architecture", cuda_compile.ARCHITECTURES)
def test_kernels_link_and_keep_to_registers(architecture: str, reports: Any, table: Any) -> None:
    kernels = reports(architecture)
    assert len(kernels) >= 140
    assert len({kernel["name"] for kernel in kernels}) == len(kernels)
    same_compiler = cuda_compile.TABLE.read_text().split("\n")[0].endswith(cuda_compile.toolchain())
    for kernel in kernels:
        cuda_compile.check(kernel)
        if "registers" in kernel and same_compiler:
            stored = table[kernel["name"]][architecture]
            assert kernel["registers"] == stored, f"{kernel['name']}: run python tests/cuda_compile.py table"


def test_the_table_has_every_kernel_with_room_for_enough_threads(table: Any) -> None:
    every = [source for source, _ in cuda_compile.sources(True)]
    assert list(table) == [source.name for source in every]
    for source in every:
        row = table[source.name]
        assert tuple(row) == cuda_compile.ARCHITECTURES
        for architecture, registers in row.items():
            threads = cuda_compile.room(source, cuda_compile.capability_of(architecture))
            assert registers * threads <= cuda_compile.REGISTERS, source.name
