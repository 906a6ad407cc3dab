"""The benchmark runs, checks its contestants, and writes what it measured."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_cpu_benchmark_runs_and_writes_its_results(tmp_path):
    out = tmp_path / "r.json"
    command = [sys.executable, str(ROOT / "bench" / "cpu_step.py"), "--rounds", "3", "--cases", "0", "--out", str(out)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "8-16-3" in result.stdout
    (case,) = json.loads(out.read_text())["results"]
    assert case["microseconds"]["gpubackprop"] > 0
    assert case["peer_over_gpubackprop"]["numpy"] > 1
