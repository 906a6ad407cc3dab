"""What the NVIDIA driver and the CUDA libraries of this machine answer, as JSON; run in a separate process.

``cuInit`` in a process leaves CUDA unusable in every process that is forked from it afterwards, and a loaded library stays, so
they are probed elsewhere. Nothing of the package is imported here.
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

LIBRARIES = ("nvvm", "nvrtc", "nvJitLink", "cublas", "cublasLt")
DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR


def ask_driver() -> dict[str, Any]:
    """Return what cuInit answers, the CUDA version of the driver, and the compute capability and name of each device."""
    driver = ctypes.CDLL(DRIVER)
    version, count, device = ctypes.c_int(0), ctypes.c_int(0), ctypes.c_int(0)
    driver.cuDriverGetVersion(ctypes.byref(version))
    status, capabilities, names = driver.cuInit(0), [], []
    if not status and not driver.cuDeviceGetCount(ctypes.byref(count)):
        for index in range(count.value):
            number, capability = ctypes.c_int(0), []
            driver.cuDeviceGet(ctypes.byref(device), index)
            for attribute in (MAJOR, MINOR):
                driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
                capability.append(number.value)
            capabilities.append(capability)
            name = ctypes.create_string_buffer(256)
            driver.cuDeviceGetName(name, len(name), device)
            names.append(name.value.decode(errors="replace"))
    return {"status": status, "version": version.value, "capabilities": capabilities, "names": names}


def ask_libraries() -> dict[str, Any]:
    """Return the CUDA libraries that are missing, those found, and the architectures NVRTC knows; {} without pathfinder."""
    try:
        from cuda import pathfinder
    except ImportError:
        return {}
    missing, found, architectures = [], {}, []
    for name in LIBRARIES:
        try:
            found[name] = pathfinder.load_nvidia_dynamic_lib(name).abs_path
        except Exception:  # pathfinder raises its own and RuntimeError, by version
            missing.append(name)
            continue
        if name == "nvrtc":
            nvrtc, count = ctypes.CDLL(found[name]), ctypes.c_int(0)
            if not nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count)):
                numbers = (ctypes.c_int * count.value)()
                nvrtc.nvrtcGetSupportedArchs(numbers)
                architectures = list(numbers)
    try:
        found["libdevice"] = str(pathfinder.find_bitcode_lib("device"))
    except AttributeError:  # an older pathfinder cannot tell
        pass
    except Exception:
        missing.append("libdevice")
    return {"missing": missing, "found": found, "architectures": architectures}


if __name__ == "__main__":
    print(json.dumps(ask_driver()), flush=True)  # printed first, in case loading a library kills the process
    print(json.dumps(ask_libraries()), flush=True)
