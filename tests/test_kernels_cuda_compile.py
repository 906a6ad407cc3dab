"""Every CUDA kernel compiled and linked for four architectures, with gates on the code; see ``cuda_compile.py``.

For sm_90 the full set; for the others, whose compilers differ, every kernel with a few definitions of each kind.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
pytest.importorskip("cuda.core", reason="cuda-core is not installed")

pytestmark = pytest.mark.slow

MOST_REGISTERS = 128  # with 256 threads, two blocks to a multiprocessor: enough loads under way for its bandwidth
ARCHITECTURES = {"75": "some", "80": "some", "120": "some", "90": "all"}


@pytest.fixture(scope="module")
def reports() -> Any:
    """Kernels' facts by architecture; two compilers at a time, the longest from the beginning."""
    script = Path(__file__).with_name("cuda_compile.py")
    waiting = sorted(ARCHITECTURES, key=ARCHITECTURES.get)  # "all" comes before "some"
    running: dict[str, Any] = {}

    def start() -> None:
        if waiting:
            architecture = waiting.pop(0)
            command = [sys.executable, str(script), architecture, ARCHITECTURES[architecture]]
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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_link_and_keep_to_registers(architecture: str, reports: Any) -> None:
    kernels = reports(architecture)
    assert len(kernels) >= 60
    assert len({kernel["name"] for kernel in kernels}) == len(kernels)
    for kernel in kernels:
        name = kernel["name"]
        assert kernel["linked"] > 0
        assert not kernel["local"] or reduces_large_angles(name), f"{name} keeps an array in local memory"
        assert not kernel["f64"] or uses_float64(name) or reduces_large_angles(name), f"{name} computes in float64"
        assert kernel["widest"] >= kernel["wanted"], f"{name} loads {kernel['widest']} bytes at a time"
        assert kernel.get("spills", 0) == 0, f"{name} spills {kernel['spills']} bytes"
        assert kernel.get("registers", 0) <= MOST_REGISTERS, f"{name} uses {kernel['registers']} registers"
