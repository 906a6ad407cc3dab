"""Fixtures of all tests: devices, random numbers, and what keeps one test from another."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.machine.diagnosis import cuda_problem

sys.path.insert(0, str(Path(__file__).parent))  # for oracle.py and tolerances.py: pytest's importlib mode leaves it out

DEVICES = ["reference", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Each device in turn; CUDA is skipped, with the reason, where it cannot be used."""
    if request.param == "cuda" and (problem := cuda_problem(0)):
        pytest.skip(problem)
    return str(request.param)


@pytest.fixture
def backend(device: str) -> Any:
    """The backend of each device in turn."""
    return gb.get_backend(device)


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers, the same in every run."""
    return np.random.default_rng(20240229)
