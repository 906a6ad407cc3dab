"""Why a CUDA device cannot be used, found without importing CuPy or Numba: the missing piece and the command that mends it."""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from importlib.metadata import PackageNotFoundError, distributions, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gpubackprop.machine import probe

if TYPE_CHECKING:
    from packaging.requirements import Requirement


class DeviceUnavailableError(RuntimeError):
    """A device cannot be used; the message names the missing piece and the command that mends it."""


BROKEN_CUPY = ("14.0.0", "14.1.0")
NOT_AFTER_A_FORK = (
    "a process that is forked after CUDA was used cannot use it: start processes with multiprocessing.get_context('spawn'), "
    "or fork before CUDA is used"
)
CUINIT = {
    1: ("INVALID_VALUE", "restart the machine, or install the driver anew"),
    2: ("OUT_OF_MEMORY", "the device's memory is full; see nvidia-smi"),
    3: ("NOT_INITIALIZED", NOT_AFTER_A_FORK),
    34: ("STUB_LIBRARY", "the libcuda found is the toolkit's, for linking only; take its folder 'stubs' out of LD_LIBRARY_PATH"),
    46: ("DEVICE_UNAVAILABLE", "the device is taken, or set so that none may use it; see 'nvidia-smi -q -d COMPUTE'"),
    100: ("NO_DEVICE", "the driver shows no device; see nvidia-smi and CUDA_VISIBLE_DEVICES"),
    101: ("INVALID_DEVICE", "CUDA_VISIBLE_DEVICES or a MIG setting names a device that does not exist"),
    102: ("DEVICE_NOT_LICENSED", "the virtual GPU has no licence"),
    214: ("ECC_UNCORRECTABLE", "the device's memory is damaged; see 'nvidia-smi -q -d ECC', and restart the machine"),
    304: ("OPERATING_SYSTEM", "the files /dev/nvidia* may not be opened; a container needs them, as 'docker run --gpus all' gives"),
    800: ("NOT_PERMITTED", "this user may not use the device"),
    801: ("NOT_SUPPORTED", "this system does not support it"),
    802: ("SYSTEM_NOT_READY", "the fabric manager of machines with NVSwitch does not run; 'systemctl start nvidia-fabricmanager'"),
    803: ("SYSTEM_DRIVER_MISMATCH", "the driver was updated, and its kernel module is the old one: restart the machine"),
    804: ("COMPAT_NOT_SUPPORTED_ON_DEVICE", "the libcuda of a package 'cuda-compat' does not serve this device: take it out of "
          "LD_LIBRARY_PATH, or uninstall it"),
    805: ("MPS_CONNECTION_FAILED", "the MPS server does not answer; 'nvidia-cuda-mps-control -d' starts it"),
    999: ("UNKNOWN", "often the module nvidia_uvm is missing, or the machine has slept: 'modprobe nvidia_uvm', or restart it"),
}  # fmt: skip
"""Names of what cuInit answers (CUresult, CUDA driver API), and what to do."""
LIBRARY_WHEELS = {
    "nvvm": {12: "nvidia-cuda-nvcc-cu12", 13: "nvidia-nvvm"},
    "libdevice": {12: "nvidia-cuda-nvcc-cu12", 13: "nvidia-nvvm"},
    "nvrtc": {12: "nvidia-cuda-nvrtc-cu12", 13: "nvidia-cuda-nvrtc"},
    "nvJitLink": {12: "nvidia-nvjitlink-cu12", 13: "nvidia-nvjitlink"},
    "cublas": {12: "nvidia-cublas-cu12", 13: "nvidia-cublas"},
    "cublasLt": {12: "nvidia-cublas-cu12", 13: "nvidia-cublas"},
}


# ---------------------------------------------------------------------- the machine


class Machine(NamedTuple):
    """What the driver and the CUDA libraries answer; all empty without a driver."""

    status: int = 0
    """Of cuInit."""
    version: int = 0
    """12090 for CUDA 12.9."""
    capabilities: tuple[tuple[int, int], ...] = ()
    """Of each device."""
    missing: tuple[str, ...] = ()
    """Libraries that were not found."""
    architectures: tuple[int, ...] = ()
    """That the CUDA compiler knows, as in 80; empty where it was not asked."""
    failure: str = ""
    """Of the process that asked."""


def _driver() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(probe.DRIVER)
    except OSError:
        return None


def machine() -> Machine:
    """Return what the driver and the CUDA libraries answer, asked once in a process of its own for each environment."""
    if _driver() is None:
        return Machine()
    return _ask(
        *(os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_PATH"))
    )


@cache
def _ask(*environment: str | None) -> Machine:
    if not sys.executable or getattr(sys, "frozen", False):  # no interpreter to ask with
        facts, failure = [probe.ask_driver(), probe.ask_libraries()], ""
    else:
        try:
            done = subprocess.run(
                [sys.executable, "-P", probe.__file__], capture_output=True, text=True, timeout=300, check=False
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            return Machine(failure=str(error))
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]  # an interpreter's start may print
        facts = [json.loads(line) for line in lines]
        failure = f"status {done.returncode}: {done.stderr.strip()[-200:]}" if done.returncode else ""
    said = {key: value for part in facts for key, value in part.items()}
    said["capabilities"] = tuple((major, minor) for major, minor in said.get("capabilities", ()))
    return Machine(
        **{**said, "missing": tuple(said.get("missing", ())), "architectures": tuple(said.get("architectures", ()))},
        failure=failure,
    )


def cuda_device_count() -> int:
    """Return the number of CUDA devices the driver shows, 0 without a driver."""
    return len(machine().capabilities)


def cuda_version() -> str | None:
    """Return the CUDA version the driver supports, as in ``"12.9"``, or None."""
    number = machine().version
    return f"{number // 1000}.{number % 1000 // 10}" if number else None


def compute_capability(index: int = 0) -> tuple[int, int]:
    """Return the compute capability of a CUDA device, (0, 0) if there is none."""
    capabilities = machine().capabilities
    return capabilities[index] if index < len(capabilities) else (0, 0)


def missing_dtypes(capability: tuple[int, int]) -> dict[str, str]:
    """Return the dtypes that a CUDA device of this compute capability cannot compute in here, and why."""
    if (
        installed("nvmath-python") is None
    ):  # gradients of 16-bit products are float32, which CuPy's products cannot give
        return dict.fromkeys(("bfloat16", "float16"), "nvmath-python is missing")
    if capability < (8, 0):
        return {"bfloat16": f"it needs compute capability 8.0, this is {capability[0]}.{capability[1]}"}
    return {}


# ---------------------------------------------------------------------- what is installed, and how to install


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


def _installer(verb: str) -> str:
    """Return the command that installs into this very environment, whatever made it."""
    python = shlex.quote(sys.executable or "python3")
    if find_spec("pip") is None and (uv := shutil.which("uv")):
        return f"{shlex.quote(uv)} pip {verb} --python {python}"
    command = f"{python} -m pip {verb}" + (" -y" if verb == "uninstall" else "")
    marker = Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED")
    if sys.prefix == sys.base_prefix and marker.exists():  # the system's own Python, where pip asks for this word
        command += " --break-system-packages"
    return command if find_spec("pip") else f"{python} -m ensurepip && {command}"


def _requirements(extra: str) -> list[Requirement]:
    """Return what an extra of this package asks for, as it was installed; so a command needs no package index that has it."""
    from packaging.requirements import Requirement

    try:
        every = [Requirement(text) for text in requires("gpubackprop") or ()]
    except PackageNotFoundError:
        return [Requirement(f"gpubackprop[{extra}]")]
    found = [
        r for r in every if r.marker and r.marker.evaluate({"extra": extra}) and not r.marker.evaluate({"extra": ""})
    ]
    for requirement in found:
        requirement.marker = None
    return found


def _install(extra: str, *, cupy: bool, upgrade: bool = False) -> str:
    """Return the command that installs an extra of this package, with or without CuPy."""
    wanted = [r for r in _requirements(extra) if cupy or not r.name.startswith("cupy")]
    return " ".join(
        [
            _installer("install"),
            *(["--upgrade"] if upgrade else []),
            *(shlex.quote(str(r).replace(" ", "")) for r in wanted),
        ]
    )


def _replace_cupy(wheels: list[str], extra: str) -> str:
    """Return the command that puts one CuPy in the place of others: they share files, so first all go."""
    return f"{_installer('uninstall')} {' '.join(wheels)} && {_install(extra, cupy=True)}"


def _unmet(extra: str) -> str | None:
    """Return which package of an extra is missing or has a version that another cannot work with.

    CUDA's own libraries are looked for as files, since they may come from elsewhere, and nvmath-python can be done without.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    waiting = [("gpubackprop", requirement) for requirement in _requirements(extra)]
    seen = set()
    while waiting:
        asking, requirement = waiting.pop(0)
        name = str(canonicalize_name(requirement.name))
        if name.startswith(("nvidia-", "cupy")) or name in ("cuda-toolkit", "nvmath-python", "gpubackprop"):
            continue
        number = installed(name)
        if number is None:
            return f"{name} is not installed"
        if not requirement.specifier.contains(number, prereleases=True):
            return f"{name} {number} is installed, and {asking} works with {name} {requirement.specifier}"
        if (key := (name, *sorted(requirement.extras))) in seen:
            continue
        seen.add(key)
        try:
            children = [Requirement(text) for text in requires(name) or ()]
        except PackageNotFoundError:
            continue
        extras = ("", *requirement.extras)
        waiting += [
            (name, c) for c in children if c.marker is None or any(c.marker.evaluate({"extra": e}) for e in extras)
        ]
    return None


# ---------------------------------------------------------------------- what keeps a device from being used


def cuda_problem(index: int = 0) -> str | None:
    """Return what keeps CUDA device ``index`` from being used, with the command that mends it, or None."""
    if _driver() is None:
        return "no NVIDIA driver (libcuda) on this machine; install the driver, or use device='cpu'"
    here = machine()
    if here.failure and not here.version:
        return f"the NVIDIA driver could not be asked, {here.failure}; see 'nvidia-smi', or use device='cpu'"
    if here.status:
        name, advice = CUINIT.get(here.status, ("?", "see CUresult in the documentation of the CUDA driver API"))
        return f"the NVIDIA driver cannot be used: cuInit answers {here.status}, CUDA_ERROR_{name}: {advice}"
    if not here.capabilities:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hidden = "CUDA_VISIBLE_DEVICES" if visible is None else f"CUDA_VISIBLE_DEVICES, which is {visible!r}"
        return f"the NVIDIA driver shows no device; see 'nvidia-smi' and {hidden}, or use device='cpu'"
    if index >= len(here.capabilities):
        names = ", ".join(f"cuda:{i}" for i in range(len(here.capabilities)))
        return f"device 'cuda:{index}' does not exist; there is {names}"
    if here.version < 12000:
        return f"the NVIDIA driver is one for CUDA {cuda_version()}; update it to 525 (CUDA 12.0) or later"
    for name in ("NUMBA_ENABLE_CUDASIM", "NUMBA_DISABLE_CUDA"):
        if os.environ.get(name, "0") not in ("", "0"):
            return f"{name} is set to {os.environ[name]!r}, so Numba does not use the device; unset it"
    return _package_problem(here, here.capabilities[index])


def _package_problem(here: Machine, capability: tuple[int, int]) -> str | None:
    """Return what is wrong with the packages that a device needs, or None."""
    mine = "{}.{}".format(*capability)
    wanted = "cuda13" if here.version >= 13000 and capability >= (7, 5) else "cuda12"
    wheels = cupy_wheels()
    if not wheels:
        old = here.version >= 13000 and capability < (7, 5)
        why = f" (CUDA 12, since CUDA 13 begins with compute capability 7.5 and this is {mine})" if old else ""
        return f"CuPy is not installed; run: {_install(wanted, cupy=True)}{why}"
    if len(wheels) > 1:
        names = ", ".join(wheels)
        return f"{len(wheels)} CuPy wheels are installed ({names}) and break each other; run: {_replace_cupy(wheels, wanted)}"
    [wheel] = wheels
    if wheel not in ("cupy", "cupy-cuda12x", "cupy-cuda13x"):
        return f"{wheel} is not one for CUDA 12 or 13; run: {_replace_cupy(wheels, wanted)}"
    if wheel == "cupy-cuda13x" and wanted == "cuda12":
        needs = (
            f"compute capability 7.5, this is {mine}"
            if here.version >= 13000
            else f"a driver for CUDA 13 (580 or later), this is one for CUDA {cuda_version()}"
        )
        return f"{wheel} needs {needs}; run: {_replace_cupy(wheels, wanted)}"
    extra = {"cupy-cuda12x": "cuda12", "cupy-cuda13x": "cuda13"}.get(wheel, wanted)  # "cupy" was built here
    for requirement in _requirements(extra):
        number = installed(wheel)
        if requirement.name == wheel and number and not requirement.specifier.contains(number, prereleases=True):
            what = (
                "is a broken release" if number in BROKEN_CUPY else f"is installed, {requirement.specifier} is needed"
            )
            return f"CuPy {number} {what}; run: {_installer('install')} --upgrade {shlex.quote(str(requirement))}"
    if unmet := _unmet(extra):
        return f"{unmet}; run: {_install(extra, cupy=False)}"
    major = int(extra[4:])
    if here.failure:
        return f"the CUDA libraries could not be loaded, {here.failure}; run: {_install(extra, cupy=False)}"
    for library in here.missing:
        package = LIBRARY_WHEELS[library][major]
        number = installed(package)
        again = f"{_installer('install')} --force-reinstall --no-deps {package}=={number}" if number else ""
        return (
            f"the CUDA library {library} was not found (wheel {package}); run: {again or _install(extra, cupy=False)}"
        )
    known, this = here.architectures, capability[0] * 10 + capability[1]
    if known and this not in known:
        if this < min(known):
            return (
                f"the CUDA compiler begins with compute capability {min(known) / 10}, this is {mine}; use device='cpu'"
            )
        newer = _install(extra, cupy=False, upgrade=True) if extra == wanted else _replace_cupy(wheels, wanted)
        return f"the CUDA compiler does not know compute capability {mine}, only up to {max(known) / 10}; run: {newer}"
    return None


_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def start_problem() -> str | None:
    """Return why CUDA does not start in this process although it does in others, or None."""
    driver = _driver()
    status = driver.cuInit(0) if driver else 0
    if not status:
        return None
    name, advice = CUINIT.get(status, ("?", "it does in another process"))
    return f"CUDA does not start in this process: cuInit answers {status}, CUDA_ERROR_{name}: {advice}"


def fork_advice() -> str:
    """Return what to say beside an error in a forked process, "" in others."""
    return f" (this process was forked; {NOT_AFTER_A_FORK})" if _forked else ""
