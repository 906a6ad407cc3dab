"""A machine of a test's own making, from which it takes something away; and a driver that answers what it is told to."""

from __future__ import annotations

import shutil
import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from gpubackprop.machine import cuinit, diagnosis

PYPROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
GOOD = diagnosis.Machine(0, 12090, ((8, 0), (9, 0)), (), (75, 80, 90, 100, 120))


class Fake:
    """A machine with two good CUDA devices and everything installed; a test takes something away."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.machine = GOOD
        self.versions = {
            "cupy-cuda12x": "14.2.0", "numba-cuda": "0.30.4", "cuda-core": "1.0.0", "numba": "0.68.1", "numpy": "2.5.0",
            "cuda-bindings": "12.9.4", "nvidia-cublas-cu12": "12.9.1",
        }  # fmt: skip
        extras = PYPROJECT["project"]["optional-dependencies"]
        self.needs = {
            "gpubackprop": [f'{text}; extra == "{extra}"' for extra in ("cuda12", "cuda13") for text in extras[extra]],
            "numba-cuda": [
                "numba>=0.60",
                'cuda-bindings<13,>=12.9; extra == "cu12"',
                'cuda-bindings==13.*; extra == "cu13"',
            ],
            "numba": ["numpy<2.6"],
        }
        monkeypatch.setattr(diagnosis, "_driver", object)
        monkeypatch.setattr(diagnosis, "machine", lambda: self.machine)
        monkeypatch.setattr(diagnosis, "installed", lambda name: self.versions.get(name))
        monkeypatch.setattr(
            diagnosis, "cupy_wheels", lambda: [name for name in self.versions if name.startswith("cupy")]
        )
        monkeypatch.setattr(diagnosis, "requires", self.requires)
        monkeypatch.setattr(cuinit, "cards", lambda: ["0000:01:00.0"])
        monkeypatch.setattr(cuinit, "in_container", lambda: False)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.delenv("NUMBA_DISABLE_CUDA", raising=False)
        monkeypatch.delenv("NUMBA_ENABLE_CUDASIM", raising=False)

    def requires(self, name: str) -> list[str]:
        if name not in self.needs:
            raise PackageNotFoundError(name)
        return self.needs[name]

    def swap(self, gone: str, **new: str) -> None:
        del self.versions[gone]
        self.versions |= {name.replace("_", "-"): number for name, number in new.items()}


DRIVER = r"""
#include <stdlib.h>
static int number(const char *name, int otherwise) { const char *s = getenv(name); return s ? atoi(s) : otherwise; }
int cuInit(unsigned flags) { return number("STUB_INIT", 0); }
int cuDeviceGetCount(int *count) { *count = number("STUB_COUNT", 1); return 0; }
int cuDriverGetVersion(int *version) { *version = number("STUB_VERSION", 12090); return 0; }
int cuDeviceGetName(char *name, int length, int device) { name[0] = 0; return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute == 75 ? 8 : 0; return 0; }
"""


def make_driver(folder: Path) -> None:
    """Put a libcuda.so.1 into a folder; STUB_INIT, STUB_VERSION and STUB_COUNT say what it answers."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "driver.c").write_text(DRIVER)
    command = [
        compiler,
        "-shared",
        "-fPIC",
        "-Wl,-soname,libcuda.so.1",
        "-o",
        folder / "libcuda.so.1",
        folder / "driver.c",
    ]
    subprocess.run(command, check=True)
