"""Whole trainings on the CPU have the bits that tests/golden/digests.json names, on every machine."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent / "golden" / "make_digests.py"


def _script() -> Any:
    spec = importlib.util.spec_from_file_location("make_digests", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_digests"] = module  # its classes look for it
    spec.loader.exec_module(module)
    return module


golden = _script()
DIGESTS = json.loads(golden.PATH.read_text())


@pytest.mark.parametrize("name", golden.TRAININGS)
def test_a_training_has_the_bits_of_every_other_machine(name: str) -> None:
    # a change that changes bits on purpose: python tests/golden/make_digests.py
    assert golden.digest(golden.TRAININGS[name]) == DIGESTS[name]


@pytest.mark.slow
@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="compiles for x86-64")
@pytest.mark.parametrize(("cpu", "features"), [("haswell", "+avx,+avx2,+fma"), ("nehalem", "+sse4.2")])
def test_code_for_another_cpu_has_the_same_bits(cpu: str, features: str, tmp_path: Path) -> None:
    environment = os.environ | {
        "NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features, "GPUBACKPROP_CACHE_DIR": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--print"], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == DIGESTS
