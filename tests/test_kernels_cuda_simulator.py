"""The CUDA kernels' logic in Numba's simulator, on ragged shapes; see ``cuda_simulator.py``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpubackprop.step.operations import OPERATIONS

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed; make test-all installs it")

pytestmark = pytest.mark.compilers


ON_THE_WAY = ["dropout_on_the_way", "products_on_the_way", "gathers_on_the_way"]
CHECKS = [*(name for name in OPERATIONS if name != "matmul"), *ON_THE_WAY, "extremes", "storage"]


@pytest.mark.parametrize("check", CHECKS)
def test_kernels_in_the_simulator_agree_with_the_reference(check: str) -> None:
    script = Path(__file__).with_name("cuda_simulator.py")
    result = subprocess.run(
        [sys.executable, str(script), check],
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"},
        capture_output=True,
        text=True,
        timeout=900,  # 10 s on an idle machine
    )
    assert result.returncode == 0, result.stderr
