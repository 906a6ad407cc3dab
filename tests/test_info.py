"""What ``gpubackprop info`` says of a machine."""

from __future__ import annotations

from typing import Any

import pytest

import gpubackprop as gb
from gpubackprop.inspect import info
from gpubackprop.machine import diagnosis
from gpubackprop.machine.diagnosis import compute_capability, missing_dtypes


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the machine have a GPU and packages that a test may take away."""
    versions = {"nvmath-python": "1.0.0"}
    monkeypatch.setattr(info, "available_devices", lambda: ["cpu", "cuda:0"])
    monkeypatch.setattr(info, "compute_capability", lambda index: (8, 0))
    monkeypatch.setattr(info, "cuda_problem", lambda: None)
    monkeypatch.setattr(info, "installed", versions.get)
    monkeypatch.setattr(diagnosis, "installed", versions.get)
    return versions


def test_a_whole_machine_has_every_dtype(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPUBACKPROP_NVTX", raising=False)
    facts = info.info()
    assert facts["dtypes, cuda:0"] == "float32, float64, bfloat16, float16"
    assert facts["dtypes, cpu"].startswith(", ".join(gb.get_backend("cpu").dtypes))
    assert facts["CUDA graphs"] == "yes"
    assert "not set" in facts["NVTX ranges"]


def test_what_is_lost_without_nvmath_is_said(gpu: Any) -> None:
    gpu.clear()
    facts = info.info()
    why = "nvmath-python is missing"
    assert facts["dtypes, cuda:0"] == f"float32, float64, no bfloat16 ({why}), no float16 ({why})"
    for lost in ("nvmath-python is missing", "one call per operation", "TF32", "16 bits", "epilogue"):
        assert lost in facts["CUDA graphs"]


def test_an_old_device_lacks_bfloat16_and_the_reason_is_said(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "compute_capability", lambda index: (7, 5))
    said = info.info()["dtypes, cuda:0"]
    assert said == "float32, float64, no bfloat16 (it needs compute capability 8.0, this is 7.5), float16"


def test_without_a_driver_there_is_no_compute_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "_driver", lambda: None)
    assert compute_capability(0) == (0, 0)


@pytest.mark.gpu
def test_a_device_has_the_dtypes_that_are_said() -> None:
    import cupy

    text = cupy.cuda.Device(0).compute_capability
    assert compute_capability(0) == (int(text[:-1]), int(text[-1]))
    missing = missing_dtypes(compute_capability(0))
    assert set(gb.get_backend("cuda").dtypes) | set(missing) == {"float32", "float64", "bfloat16", "float16"}
    assert not set(gb.get_backend("cuda").dtypes) & set(missing)
