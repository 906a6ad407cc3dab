"""The package on this machine, in a few lines; ``gpubackprop doctor`` checks that it works."""

from __future__ import annotations

import platform

from gpubackprop._version import __version__
from gpubackprop.backends import available_devices, get_backend, meaning_of_auto
from gpubackprop.machine.cache import cache_folder, cache_problem
from gpubackprop.machine.diagnosis import cuda_problem, cuda_version


def info() -> dict[str, str]:
    """Return name and value of each fact; CUDA says either the driver's version or what is missing and how to fix it."""
    problem = cache_problem()
    return {
        "gpubackprop": f"{__version__}, Python {platform.python_version()} on {platform.platform()}",
        "devices": ", ".join(available_devices()),
        "device='auto'": meaning_of_auto(),
        "CUDA": cuda_problem() or f"driver for CUDA {cuda_version()}",
        "bits on the CPU": ", ".join(f"{name} {value}" for name, value in get_backend("cpu").decides_bits.items()),
        "kernel cache": f"not used: {problem}" if problem else str(cache_folder()),
    }
