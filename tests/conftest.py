"""Fixtures of all tests: devices, random numbers, and what keeps one test from another."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.machine.diagnosis import cuda_problem

sys.path.insert(0, str(Path(__file__).parent))  # for oracle.py and tolerances.py: pytest's importlib mode leaves it out

DEVICES = ["reference", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def pytest_configure() -> None:
    """Let Ctrl-C work: a shell starts what it runs in the background with SIGINT ignored, which processes of tests inherit."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked ``gpu``, with the reason, where CUDA cannot be used: the one place that decides."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and (problem := cuda_problem(0)):
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=problem))


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Each device in turn."""
    return str(request.param)


@pytest.fixture
def backend(device: str) -> Any:
    """The backend of each device in turn."""
    return gb.get_backend(device)


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers, the same in every run."""
    return np.random.default_rng(20240229)


@pytest.fixture
def run(monkeypatch: Any, capsys: Any) -> Any:
    """Run the command line in this process; return (exit status, standard output, standard error)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        from gpubackprop.cli import main

        monkeypatch.setattr(sys, "argv", ["gpubackprop", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return call
