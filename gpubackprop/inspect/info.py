"""What there is on this machine: devices, versions, and which pieces are missing."""

from __future__ import annotations

import os
import pkgutil
import platform
import sys

from gpubackprop._version import __version__
from gpubackprop.backends import BACKENDS, available_devices, meaning_of_auto
from gpubackprop.definitions import DTYPES
from gpubackprop.machine.cache import cache_folder, cache_problem
from gpubackprop.machine.diagnosis import (
    compute_capability,
    cuda_problem,
    cuda_version,
    cupy_wheels,
    installed,
    missing_dtypes,
)

PACKAGES = ("numpy", "scipy", "numba", "llvmlite", "numba-cuda", "cuda-core", "nvmath-python", "scikit-learn")


def info() -> dict[str, str]:
    """Return name and value of each fact; CUDA says either the driver's version or what is missing and how to mend it."""
    problem = cuda_problem()
    lost = "no: nvmath-python is missing; a step is one call per operation, and there is no TF32, 16 bits or epilogue"
    facts = {
        "gpubackprop": __version__,
        "devices": ", ".join(available_devices()),
        "device='auto'": meaning_of_auto(),
        "CUDA": problem or f"driver for CUDA {cuda_version()}",
        "Python": f"{sys.version.split()[0]} on {platform.platform()}",
        "processors": f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} usable",
        "kernel cache": _cache(),
        **{f"dtypes, {device}": _dtypes(device) for device in available_devices()},
        "CUDA graphs": "no: no CUDA device" if problem else "yes" if installed("nvmath-python") else lost,
        "TF32": "off unless asked for: matmul_precision='tf32', from compute capability 8.0 on",
        "epilogues": "the bias of identity layers; get_backend('cuda', epilogues='off') or 'all', see backends/cuda/epilogues.py",
        "NVTX ranges": f"GPUBACKPROP_NVTX is {os.environ.get('GPUBACKPROP_NVTX') or 'not set'}; 1 turns them on",
    }
    for name in (*PACKAGES, *cupy_wheels()):
        facts[name] = installed(name) or "not installed"
    return facts


def _cache() -> str:
    """Return the folder of compiled kernels, or why they are not kept."""
    problem = cache_problem()
    return f"not used: {problem}" if problem else str(cache_folder())


def _dtypes(device: str) -> str:
    """Return the dtypes of a device, and why it lacks the others."""
    name, _, index = device.partition(":")
    if name == "cuda":
        missing = missing_dtypes(compute_capability(int(index)))
    else:
        allowed = pkgutil.resolve_name(BACKENDS[name]).dtypes
        missing = {dtype: "the reference has it" for dtype in DTYPES if dtype not in allowed}
    return ", ".join(f"no {d} ({missing[d]})" if d in missing else d for d in DTYPES)
