"""The benchmark of the CPU's limits runs, each part in a process of its own, and writes what it measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "bench" / "cpu_limits.py"


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="this system does not tell the largest resident set"
)
def test_latency_and_memory_are_measured(tmp_path):
    out = tmp_path / "limits.json"
    command = [sys.executable, str(SCRIPT), "--only", "latency", "memory", "--rounds", "2", "--threads", "1"]
    subprocess.run([*command, "--out", str(out)], check=True, capture_output=True, timeout=300)
    found = json.loads(out.read_text())
    assert found["latency, 1 thread"]["microseconds"]["least"] > 0
    memory = found["memory, 1 thread"]
    # the data are new pages; arrays of the allocator's own may be used again
    assert memory["increase of the resident set"] > 0.7 * memory["bytes"]["data"]
    assert memory["over the bytes"] < 1.2
