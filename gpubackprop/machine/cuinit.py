"""Status codes of cuInit (CUresult, CUDA driver API), and what to do on this machine."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

NO_DRIVER, NO_DEVICE = 34, 100
NOT_AFTER_A_FORK = (
    "a process that is forked after CUDA was used cannot use it: start processes with multiprocessing.get_context('spawn'), "
    "or fork before CUDA is used"
)


class Answer(NamedTuple):
    """A status of cuInit: its name, its cause or what to do about it, and the command for that."""

    name: str
    advice: str
    command: str = ""


ANSWERS = {
    1: Answer("INVALID_VALUE", "restart the machine, or install the driver anew", "sudo reboot"),
    2: Answer("OUT_OF_MEMORY", "the device's memory is full; nvidia-smi shows by whom", "nvidia-smi"),
    3: Answer("NOT_INITIALIZED", NOT_AFTER_A_FORK),
    34: Answer("STUB_LIBRARY", "the libcuda found is the toolkit's, for linking only; take its folder 'stubs' out of "
               "LD_LIBRARY_PATH"),
    46: Answer("DEVICE_UNAVAILABLE", "the device is taken, or set so that none may use it; see 'nvidia-smi -q -d COMPUTE'",
               "sudo nvidia-smi --compute-mode=DEFAULT"),
    100: Answer("NO_DEVICE", "the driver shows no device; see nvidia-smi and CUDA_VISIBLE_DEVICES"),
    101: Answer("INVALID_DEVICE", "CUDA_VISIBLE_DEVICES or a MIG setting names a device that does not exist"),
    102: Answer("DEVICE_NOT_LICENSED", "the virtual GPU has no licence"),
    214: Answer("ECC_UNCORRECTABLE", "the device's memory is damaged; see 'nvidia-smi -q -d ECC', and restart the machine",
                "sudo reboot"),
    304: Answer("OPERATING_SYSTEM", "the files /dev/nvidia* may not be opened; a container needs them, as 'docker run "
                "--gpus all' gives"),
    800: Answer("NOT_PERMITTED", "this user may not use the device"),
    801: Answer("NOT_SUPPORTED", "this system does not support it"),
    802: Answer("SYSTEM_NOT_READY", "the fabric manager of machines with NVSwitch does not run",
                "sudo systemctl start nvidia-fabricmanager"),
    803: Answer("SYSTEM_DRIVER_MISMATCH", "the driver was updated, and its kernel module is the old one: restart the machine",
                "sudo reboot"),
    804: Answer("COMPAT_NOT_SUPPORTED_ON_DEVICE", "the libcuda of a package 'cuda-compat' does not serve this device: take "
                "it out of LD_LIBRARY_PATH, or uninstall it"),
    805: Answer("MPS_CONNECTION_FAILED", "the MPS server does not answer", "nvidia-cuda-mps-control -d"),
    999: Answer("UNKNOWN", "often the module nvidia_uvm is missing, or the machine has slept: load it, or restart",
                "sudo modprobe nvidia_uvm"),
}  # fmt: skip
_FOLDER = {34: "stubs", 804: "compat"}
"""Of LD_LIBRARY_PATH, which brings a libcuda that is not the driver's."""


def answer(status: int) -> Answer:
    """Return what a status of cuInit means here."""
    found = ANSWERS.get(status, Answer("?", "see CUresult in the documentation of the CUDA driver API"))
    if status in _FOLDER:
        return found._replace(command=_without(_FOLDER[status]))
    if status in (100, 101) and os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
        return found._replace(command="unset CUDA_VISIBLE_DEVICES")
    return found


def driver_command() -> str:
    """Return the command that installs the NVIDIA driver, or "" where this system's is not known."""
    if in_container():
        return ""  # the host has the driver
    if shutil.which("ubuntu-drivers"):
        return "sudo ubuntu-drivers install"
    return "sudo apt-get install nvidia-driver" if Path("/etc/debian_version").exists() else ""


def in_container() -> bool:
    """Return whether this is a container of Docker or Podman."""
    return Path("/.dockerenv").exists() or Path("/run/.containerenv").exists()


def cards() -> list[str]:
    """Return the addresses of NVIDIA's display controllers on the PCI bus, as far as the system tells."""
    found = []
    for device in sorted(Path("/sys/bus/pci/devices").glob("*")):
        try:
            vendor, kind = (device / "vendor").read_text().strip(), (device / "class").read_text().strip()
        except OSError:
            continue
        if vendor == "0x10de" and kind.startswith("0x03"):
            found.append(device.name)
    return found


def _without(folder: str) -> str:
    """Return the command that takes folders of this name out of LD_LIBRARY_PATH, or "" where there is none."""
    places = os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    kept = [place for place in places if folder not in Path(place).parts]
    if len(kept) == len(places):
        return ""
    return f"export LD_LIBRARY_PATH={shlex.quote(os.pathsep.join(kept))}" if kept else "unset LD_LIBRARY_PATH"
