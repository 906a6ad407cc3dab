"""What a CUDA device needs, checked without importing CuPy or Numba: each missing piece, and the command that fixes it."""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, distributions, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gpubackprop.machine import cuinit, probe
from gpubackprop.machine.finding import Finding, State

if TYPE_CHECKING:
    from packaging.requirements import Requirement


class DeviceUnavailableError(RuntimeError):
    """A device cannot be used; the message names the missing piece and the command that fixes it."""


BROKEN_CUPY = ("14.0.0", "14.1.0")
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
    found: tuple[tuple[str, str], ...] = ()
    """Libraries that were found, and their files."""
    names: tuple[str, ...] = ()
    """Of the devices."""


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
    if not sys.executable or getattr(sys, "frozen", False):  # no interpreter to run
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
    said["found"] = tuple((name, file) for name, file in said.get("found", {}).items())
    lists = {name: tuple(said.get(name, ())) for name in ("missing", "architectures", "names")}
    return Machine(**{**said, **lists}, failure=failure)


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
    """Return the command that installs into this environment, however it was created."""
    python = shlex.quote(sys.executable or "python3")
    if find_spec("pip") is None and (uv := shutil.which("uv")):
        return f"{shlex.quote(uv)} pip {verb} --python {python}"
    command = f"{python} -m pip {verb}" + (" -y" if verb == "uninstall" else "")
    marker = Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED")
    if sys.prefix == sys.base_prefix and marker.exists():  # the system's Python, where pip requires this option
        command += " --break-system-packages"
    return command if find_spec("pip") else f"{python} -m ensurepip && {command}"


def _requirements(extra: str) -> list[Requirement]:
    """Return the requirements of an extra of this package, or "" for its own, as installed: no command needs an index with it."""
    from packaging.requirements import Requirement

    try:
        every = [Requirement(text) for text in requires("gpubackprop") or ()]
    except PackageNotFoundError:
        return [Requirement(f"gpubackprop[{extra}]" if extra else "gpubackprop")]
    found = [r for r in every if r.marker is None or r.marker.evaluate({"extra": ""})]
    if extra:
        found = [r for r in every if r not in found and r.marker and r.marker.evaluate({"extra": extra})]
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


def unmet(extra: str = "") -> Finding | None:
    """Return which package of an extra, or of this package itself, is missing or has a version that another cannot work with.

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
            return Finding("packages", "missing", f"{name} is not installed", command=_install(extra, cupy=False))
        if not requirement.specifier.contains(number, prereleases=True):
            text = f"{name} {number} is installed, and {asking} works with {name} {requirement.specifier}"
            return Finding("packages", "wrong", text, command=_install(extra, cupy=False))
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


# ---------------------------------------------------------------------- what a device needs


def cuda_problem(index: int = 0) -> str | None:
    """Return what keeps CUDA device ``index`` from being used, with the command that fixes it, or None."""
    return next((found.message for found in cuda_findings(index) if found.fails), None)


def cuda_findings(index: int = 0) -> Iterator[Finding]:
    """Yield what each check of CUDA device ``index`` finds: the driver, and if that shows the device, what the packages need."""
    here = machine()
    driver = _driver_finding(here, index)
    yield driver
    if driver.fails:
        return
    for name in ("NUMBA_ENABLE_CUDASIM", "NUMBA_DISABLE_CUDA"):
        if os.environ.get(name, "0") not in ("", "0"):
            text = f"{name} is set to {os.environ[name]!r}, so Numba does not use the device"
            yield Finding(name, "wrong", text, "unset it", f"unset {name}")
    capability = here.capabilities[index]
    wanted = "cuda13" if here.version >= 13000 and capability >= (7, 5) else "cuda12"
    wheels = cupy_wheels()
    matching = {"cupy-cuda12x": "cuda12", "cupy-cuda13x": "cuda13"}  # "cupy" was built here
    extra = matching.get(wheels[0], wanted) if len(wheels) == 1 else wanted
    yield _cupy_finding(here, capability, wheels, wanted)
    numbers = ", ".join(f"{name} {installed(name)}" for name in ("numba-cuda", "cuda-core", "cuda-bindings"))
    yield unmet(extra) or Finding("packages", "ok", numbers)
    yield from _library_findings(here, extra)
    yield _nvmath_finding(extra)
    yield _capability_finding(here, index, wheels, wanted, extra)


def _driver_finding(here: Machine, index: int) -> Finding:
    """Return whether the driver shows the device; "missing" where there is no driver, or no device at all."""

    def found(state: State, text: str, advice: str, command: str = "") -> Finding:
        return Finding("driver", state, text, advice, command)

    if _driver() is None:
        text, cards = "no NVIDIA driver (libcuda) on this machine", cuinit.cards()
        if cards and cuinit.in_container():
            return found("missing", text, "start the container with 'docker run --gpus all', or use device='cpu'")
        advice = "install the driver, or use device='cpu'"
        return found("missing", text, advice, cuinit.driver_command() if cards else "")
    if here.failure and not here.version:
        text = f"the NVIDIA driver could not be asked, {here.failure}"
        return found("wrong", text, "see 'nvidia-smi', or use device='cpu'")
    if here.status:
        name, advice, command = cuinit.answer(here.status)
        text = f"the NVIDIA driver cannot be used: cuInit answers {here.status}, CUDA_ERROR_{name}"
        absent = here.status in (cuinit.NO_DRIVER, cuinit.NO_DEVICE)
        return found("missing" if absent else "wrong", text, advice, command)
    if not here.capabilities:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hidden = "CUDA_VISIBLE_DEVICES" if visible is None else f"CUDA_VISIBLE_DEVICES, which is {visible!r}"
        advice = f"see 'nvidia-smi' and {hidden}, or use device='cpu'"
        return found("missing", "the NVIDIA driver shows no device", advice, cuinit.answer(cuinit.NO_DEVICE).command)
    names = ", ".join(f"cuda:{i}" for i in range(len(here.capabilities)))
    if index >= len(here.capabilities):
        return found("wrong", f"device 'cuda:{index}' does not exist", f"there is {names}")
    if here.version < 12000:
        text = f"the NVIDIA driver is one for CUDA {cuda_version()}"
        return found("wrong", text, "update it to 525 (CUDA 12.0) or later", cuinit.driver_command())
    return found("ok", f"for CUDA {cuda_version()}, cuInit answers 0, shows {names}", "")


def _cupy_finding(here: Machine, capability: tuple[int, int], wheels: list[str], wanted: str) -> Finding:
    """Return whether there is one CuPy, whole, for this driver and device."""

    def wrong(text: str, command: str) -> Finding:
        return Finding("CuPy", "wrong", text, command=command)

    mine, new_driver = "{}.{}".format(*capability), here.version >= 13000
    if not wheels:
        old = new_driver and capability < (7, 5)
        why = (
            f" (the one for CUDA 12, since CUDA 13 begins with compute capability 7.5 and this is {mine})"
            if old
            else ""
        )
        return Finding("CuPy", "missing", f"CuPy is not installed{why}", command=_install(wanted, cupy=True))
    if len(wheels) > 1:
        text = f"{len(wheels)} CuPy wheels are installed ({', '.join(wheels)}) and break each other"
        return wrong(text, _replace_cupy(wheels, wanted))
    [wheel] = wheels
    if wheel not in ("cupy", "cupy-cuda12x", "cupy-cuda13x"):
        return wrong(f"{wheel} is not one for CUDA 12 or 13", _replace_cupy(wheels, wanted))
    if wheel == "cupy-cuda13x" and wanted == "cuda12":
        driver = f"a driver for CUDA 13 (580 or later), this is one for CUDA {cuda_version()}"
        needs = f"compute capability 7.5, this is {mine}" if new_driver else driver
        return wrong(f"{wheel} needs {needs}", _replace_cupy(wheels, wanted))
    number = installed(wheel)
    for requirement in [r for e in ("cuda12", "cuda13") for r in _requirements(e) if r.name == wheel]:
        if number and not requirement.specifier.contains(number, prereleases=True):
            what = (
                "is a broken release" if number in BROKEN_CUPY else f"is installed, {requirement.specifier} is needed"
            )
            return wrong(f"CuPy {number} {what}", f"{_installer('install')} --upgrade {shlex.quote(str(requirement))}")
    return Finding("CuPy", "ok", f"{wheel} {number}")


def _library_findings(here: Machine, extra: str) -> Iterator[Finding]:
    """Yield for each CUDA library whether it was found, and where."""
    if here.failure:
        text = f"the CUDA libraries could not be loaded, {here.failure}"
        yield Finding("CUDA libraries", "wrong", text, command=_install(extra, cupy=False))
    for library in here.missing:
        package = LIBRARY_WHEELS[library][int(extra[4:])]
        number = installed(package)
        again = f"{_installer('install')} --force-reinstall --no-deps {package}=={number}" if number else ""
        text = f"the CUDA library {library} was not found (wheel {package})"
        yield Finding(library, "missing", text, command=again or _install(extra, cupy=False))
    for library, file in here.found:
        yield Finding(library, "ok", file)


def _nvmath_finding(extra: str) -> Finding:
    """Return whether there is nvmath-python, and what is lost without it."""
    if number := installed("nvmath-python"):
        return Finding("nvmath-python", "ok", f"{number}: CUDA graphs, epilogues, TF32 and 16 bits")
    text = "nvmath-python is missing: a step is one call per operation, and there is no TF32, 16 bits or epilogue"
    wanted = [shlex.quote(str(r)) for r in _requirements(extra) if r.name == "nvmath-python"] or ["nvmath-python"]
    return Finding("nvmath-python", "warning", text, command=f"{_installer('install')} {wanted[0]}")


def _capability_finding(here: Machine, index: int, wheels: list[str], wanted: str, extra: str) -> Finding:
    """Return whether the CUDA compiler knows the device."""
    name, known, (major, minor) = f"cuda:{index}", here.architectures, here.capabilities[index]
    mine, this = f"{major}.{minor}", major * 10 + minor
    called = f"{here.names[index]}, " if index < len(here.names) else ""
    if not known:
        return Finding(name, "ok", f"{called}compute capability {mine}")
    if this in known:
        text = f"{called}compute capability {mine}; the CUDA compiler knows up to {max(known) / 10}"
        return Finding(name, "ok", text)
    if this < min(known):
        text = f"the CUDA compiler begins with compute capability {min(known) / 10}, this is {mine}"
        return Finding(name, "wrong", text, "use device='cpu'")
    newer = _install(extra, cupy=False, upgrade=True) if extra == wanted else _replace_cupy(wheels, wanted)
    text = f"the CUDA compiler does not know compute capability {mine}, only up to {max(known) / 10}"
    return Finding(name, "wrong", text, command=newer)


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
    name, advice, _ = cuinit.answer(status)
    return f"CUDA does not start in this process: cuInit answers {status}, CUDA_ERROR_{name}; {advice}"


def fork_advice() -> str:
    """Return a remark for an error in a forked process, "" in others."""
    return f" (this process was forked; {cuinit.NOT_AFTER_A_FORK})" if _forked else ""
