"""Why a CUDA device cannot be used, found without importing CuPy or Numba: the missing piece and the command that mends it."""

from __future__ import annotations

import ctypes
import sys
from importlib.metadata import PackageNotFoundError, distributions, version
from importlib.util import find_spec


class DeviceUnavailableError(RuntimeError):
    """A device cannot be used; the message names the missing piece and the command that mends it."""


BROKEN_CUPY = ("14.0.0", "14.1.0")


def _driver() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None


def cuda_device_count() -> int:
    """Return the number of CUDA devices the driver shows, 0 without a driver."""
    driver, count = _driver(), ctypes.c_int(0)
    if driver is None or driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


def cuda_version() -> str | None:
    """Return the CUDA version the driver supports, as in ``"12.9"``, or None."""
    driver, number = _driver(), ctypes.c_int(0)
    if driver is None or driver.cuDriverGetVersion(ctypes.byref(number)):
        return None
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


def compute_capability(index: int = 0) -> tuple[int, int]:
    """Return the compute capability of a CUDA device, (0, 0) if there is none."""
    driver, device, major, minor = _driver(), ctypes.c_int(0), ctypes.c_int(0), ctypes.c_int(0)
    if driver is not None and not driver.cuInit(0) and not driver.cuDeviceGet(ctypes.byref(device), index):
        for number, attribute in ((major, 75), (minor, 76)):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
            driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
    return major.value, minor.value


def missing_dtypes(capability: tuple[int, int]) -> dict[str, str]:
    """Return the dtypes that a CUDA device of this compute capability cannot compute in here, and why."""
    if (
        installed("nvmath-python") is None
    ):  # gradients of 16-bit products are float32, which CuPy's products cannot give
        return dict.fromkeys(("bfloat16", "float16"), "nvmath-python is missing")
    if capability < (8, 0):
        return {"bfloat16": f"it needs compute capability 8.0, this is {capability[0]}.{capability[1]}"}
    return {}


def cupy_wheels() -> list[str]:
    """Return the names of the installed CuPy distributions."""
    names = {(d.metadata["Name"] or "").lower() for d in distributions()}
    return sorted(n for n in names if n == "cupy" or n.startswith(("cupy-cuda", "cupy-rocm")))


def installed(package: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cuda_problem(index: int = 0) -> str | None:
    """Return what keeps CUDA device ``index`` from being used, with the command that mends it, or None."""
    major = (cuda_version() or "12").split(".")[0]
    extra = "cuda13" if int(major) >= 13 else "cuda12"
    install = f"pip install 'gpubackprop[{extra}]'"
    if _driver() is None:
        return "no NVIDIA driver (libcuda) on this machine; install the driver, or use device='cpu'"
    count = cuda_device_count()
    if count == 0:
        return "the NVIDIA driver shows no device; see 'nvidia-smi' and CUDA_VISIBLE_DEVICES, or use device='cpu'"
    if index >= count:
        names = ", ".join(f"cuda:{i}" for i in range(count))
        return f"device 'cuda:{index}' does not exist; there is {names}"
    wheels = cupy_wheels()
    if not wheels:
        return f"CuPy is not installed; run: {install}"
    if len(wheels) > 1:
        keep = "cupy-cuda13x" if extra == "cuda13" else "cupy-cuda12x"
        return (
            f"{len(wheels)} CuPy wheels are installed ({', '.join(wheels)}) and break each other; "
            f"run: pip uninstall -y {' '.join(wheels)} && pip install {keep}"
        )
    if (number := installed(wheels[0])) in BROKEN_CUPY:
        return f"CuPy {number} is a broken release; run: pip install -U {wheels[0]}"
    if installed("numba-cuda") is None:
        return f"the CUDA target built into Numba is too old: numba-cuda is not installed; run: {install}"
    if installed("cuda-core") is None:
        return f"cuda-core is not installed; run: {install}"
    for library, package in (
        ("nvvm", "nvidia-cuda-nvcc"),
        ("nvrtc", "nvidia-cuda-nvrtc"),
        ("nvJitLink", "nvidia-nvjitlink"),
    ):
        if not _library_found(library):
            return f"the CUDA library {library} was not found (wheel {package}-cu{major}); run: {install}"
    return None


def _library_found(name: str) -> bool:
    if find_spec("cuda") is None or find_spec("cuda.pathfinder") is None:
        return False
    from cuda.pathfinder import load_nvidia_dynamic_lib

    try:
        load_nvidia_dynamic_lib(name)
    except Exception:  # pathfinder raises its own and RuntimeError, by version
        return False
    return True
