"""The environment that numbers depend on: processor, devices, clocks, libraries, threads, settings, commit."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from gpubackprop.bench.devices import Device, Gpu, cache_sizes, read
from gpubackprop.bench.threads import chosen
from gpubackprop.machine.diagnosis import cuda_version, cupy_wheels, installed
from gpubackprop.machine.host import blas, processor, usable

PACKAGES = (
    "gpubackprop", "numpy", "scipy", "numba", "llvmlite", "numba-cuda", "cuda-core", "nvmath-python", "nvidia-cublas-cu12",
    "nvidia-cublas", "ml-dtypes", "torch", "triton", "jax", "jaxlib", "scikit-learn", "thinc", "keras", "tinygrad",
)  # fmt: skip
CLOCKS = (
    "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "temperature.gpu", "power.draw",
    "power.limit", "clocks_throttle_reasons.active",
)  # fmt: skip


def environment(devices: list[Device], threads: int) -> dict[str, Any]:
    """Return the devices, the driver, the libraries and the settings that the numbers depend on."""
    return {
        "host": platform.node(),
        "cpu": {
            "name": processor(), "processors": usable(), "threads": threads, "pinned_to": chosen(threads),
            "cache_bytes": cache_sizes(),
            "megahertz": _megahertz(), "governor": read(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
            "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        },
        "gpus": [gpu(device) for device in devices if isinstance(device, Gpu)],
        "blas": blas(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: installed(name) for name in (*PACKAGES, *cupy_wheels())},
        "tf32": {"gpubackprop": "where the dtype is tf32", "cupy": os.environ.get("CUPY_TF32") == "1"},
        "commit": commit(),
    }  # fmt: skip


def gpu(device: Gpu) -> dict[str, Any]:
    """Return the properties of a GPU."""
    cupy, index = device.xp, device.index
    attributes, properties = cupy.cuda.Device(index).attributes, cupy.cuda.runtime.getDeviceProperties(index)
    runtime = cupy.cuda.runtime.runtimeGetVersion()
    return {
        "device": device.name,
        "name": properties["name"].decode(),
        "compute_capability": cupy.cuda.Device(index).compute_capability,
        "multiprocessors": attributes["MultiProcessorCount"],
        "l2_bytes": attributes["L2CacheSize"],
        "memory_bytes": properties["totalGlobalMem"],
        "clock_khz": attributes.get("ClockRate"),
        "memory_clock_khz": attributes.get("MemoryClockRate"),
        "now": clocks(cupy, index),
        "cuda_driver": cuda_version(),
        "cuda_runtime": f"{runtime // 1000}.{runtime % 1000 // 10}",
        "cublas": cupy.cuda.cublas.getVersion(cupy.cuda.device.get_cublas_handle()),
    }


def clocks(cupy: Any, index: int) -> dict[str, str] | None:
    """Return current clocks, temperature and power from ``nvidia-smi``, or None without it."""
    try:
        bus = cupy.cuda.runtime.deviceGetPCIBusId(index)
        command = ["nvidia-smi", f"--id={bus}", f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError, cupy.cuda.runtime.CUDARuntimeError):
        return None
    values = found.stdout.strip().split(", ")
    return dict(zip(CLOCKS, values, strict=True)) if len(values) == len(CLOCKS) else None


def commit() -> str | None:
    """Return the commit of the source tree, with ``+`` for uncommitted changes, or None outside one."""
    root = Path(__file__).parents[1]
    if not (root / "pyproject.toml").is_file():  # installed from a wheel, maybe inside somebody else's repository
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _megahertz() -> float | None:
    with contextlib.suppress(OSError, ValueError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        found = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
        return max(found, default=None)
    return None
