"""What there is on this machine: devices, versions, and which pieces are missing."""

from __future__ import annotations

import os
import platform
import sys

from gpubackprop._version import __version__
from gpubackprop.backends import available_devices
from gpubackprop.backends.diagnosis import cuda_problem, cuda_version, cupy_wheels, installed
from gpubackprop.cache import cache_folder

PACKAGES = ("numpy", "scipy", "numba", "llvmlite", "numba-cuda", "cuda-core", "nvmath-python", "scikit-learn", "mpi4py")


def info() -> dict[str, str]:
    """Return name and value of each fact; CUDA says either the driver's version or what is missing and how to mend it."""
    facts = {
        "gpubackprop": __version__,
        "devices": ", ".join(available_devices()),
        "CUDA": cuda_problem() or f"driver for CUDA {cuda_version()}",
        "Python": f"{sys.version.split()[0]} on {platform.platform()}",
        "processors": f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} usable",
        "kernel cache": str(cache_folder()),
        "TF32": "off unless asked for: matmul_precision='tf32'",
        "16 bits": "dtype='bfloat16' or 'float16' on device='reference' only, so far",
        "CUDA graphs": "yes"
        if installed("nvmath-python")
        else "no: nvmath-python is missing, a step is one call per operation",
    }
    for name in (*PACKAGES, *cupy_wheels()):
        facts[name] = installed(name) or "not installed"
    return facts
