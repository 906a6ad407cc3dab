"""What ``gpubackprop info`` says of a machine, and the dtypes of its devices."""

from __future__ import annotations

import pytest
from fake_machine import Fake

import gpubackprop as gb
from gpubackprop.inspect import info
from gpubackprop.machine import diagnosis
from gpubackprop.machine.diagnosis import compute_capability, missing_dtypes


def test_a_machine_with_cards_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    Fake(monkeypatch)
    facts = info.info()
    assert facts["devices"] == "cpu, cuda:0, cuda:1"
    assert facts["device='auto'"].startswith("cuda:0")
    assert facts["CUDA"] == "driver for CUDA 12.9"


def test_what_is_wrong_with_cuda_is_said_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    Fake(monkeypatch).swap("numba-cuda")
    facts = info.info()
    assert facts["devices"] == "cpu"
    assert facts["CUDA"].startswith("numba-cuda is not installed; run: ")


def test_dtypes_that_a_device_lacks_have_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"nvmath-python": "1.0.0"}
    monkeypatch.setattr(diagnosis, "installed", versions.get)
    assert missing_dtypes((8, 0)) == {}
    assert missing_dtypes((7, 5)) == {"bfloat16": "it needs compute capability 8.0, this is 7.5"}
    versions.clear()
    assert missing_dtypes((8, 0)) == dict.fromkeys(("bfloat16", "float16"), "nvmath-python is missing")


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
