"""Backends by name: the one place where a device name becomes a backend."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from gpubackprop.definitions import shown
from gpubackprop.machine import crossover
from gpubackprop.machine.diagnosis import (
    DeviceUnavailableError,
    cuda_device_count,
    cuda_problem,
    fork_advice,
    start_problem,
)
from gpubackprop.registry import Registry

if TYPE_CHECKING:
    from gpubackprop.backends.base import Backend

__all__ = ["BACKENDS", "DeviceUnavailableError", "available_devices", "get_backend", "register_backend"]

BACKENDS: Registry[str] = Registry("device")
BACKENDS.update(
    reference="gpubackprop.backends.reference:ReferenceBackend",
    cpu="gpubackprop.backends.cpu:CpuBackend",
    cuda="gpubackprop.backends.cuda:CudaBackend",
)
_made: dict[tuple[Any, ...], Backend] = {}


def register_backend(name: str, target: str | Callable[..., Backend]) -> None:
    """Make ``device=name`` mean a custom backend.

    Parameters
    ----------
    name : str
        Letters, digits and underscores.
    target : str or callable
        ``"module:Class"``, imported on first use, or the class. It is called without arguments, or with the number after
        the colon in ``"name:1"``. Installed packages may use the entry-point group ``gpubackprop.backends`` instead.

    Raises
    ------
    ValueError
        The name has another form.
    """
    if not name.isidentifier():
        raise ValueError(f"backend name is {name!r}; use letters, digits and underscores")
    BACKENDS[name] = target  # type: ignore[assignment]
    for key in [key for key in _made if key[0] == name]:
        del _made[key]


def choose_device(layer_sizes: Sequence[int]) -> str:
    """Return what ``device="auto"`` means for a network: the first GPU, unless the CPU is known to train it faster here.

    That is known after ``gpubackprop bench --suite crossover``.
    """
    gpu = next((d for d in available_devices() if d.startswith("cuda")), None)
    if gpu is None:
        return "cpu"
    least = crossover.recall(gpu)
    return gpu if least is None or crossover.step_flops(layer_sizes) >= least else "cpu"


def takes_precision(device: str | Backend) -> bool:
    """Return whether a device, given by its name, can multiply matrices in another precision."""
    return isinstance(device, str) and device.partition(":")[0] in ("cuda", "gpu")


def meaning_of_auto() -> str:
    """Return in words how :func:`choose_device` decides here; ``model.device`` says what it chose."""
    gpu = next((d for d in available_devices() if d.startswith("cuda")), None)
    if gpu is None:
        return "cpu"
    least = crossover.recall(gpu)
    if least is None:
        return f"{gpu}, until 'gpubackprop bench --suite crossover' has measured which networks the CPU trains faster"
    return f"cpu where a step of 128 samples has less than {least:.3g} FLOP, as 'bench --suite crossover' measured, else {gpu}"


def get_backend(device: str | Any = "cpu", **options: Any) -> Backend:
    """Return the backend of a device.

    Parameters
    ----------
    device : str
        ``"reference"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"auto"`` (the first GPU, else the CPU; see ``choose_device``
        for a network) or a registered name; ``"gpu"`` is an alias of ``"cuda"``. A backend is returned as it is.
    **options
        Options of the backend's class, as in ``get_backend("cuda", matmul_precision="tf32")``.

    Raises
    ------
    ValueError
        The name is unknown.
    DeviceUnavailableError
        The device cannot be used; the message names the missing piece and the command that fixes it.
    """
    if not isinstance(device, str):
        from gpubackprop.backends.base import Backend  # loads the table of operations

        if not isinstance(device, Backend):
            raise ValueError(f"device is {shown(device)}; give a name, as in 'cpu' or 'cuda:0', or a backend")
        return device
    if device == "auto":
        device = next((d for d in available_devices() if d.startswith("cuda")), "cpu")
    name, _, index = device.partition(":")
    name = {"gpu": "cuda"}.get(name, name)
    if name not in BACKENDS:
        for entry in entry_points(group="gpubackprop.backends"):
            BACKENDS.setdefault(entry.name, entry.value)
    target = BACKENDS.resolve(name)
    if index and not index.isdecimal():
        raise ValueError(f"unknown device {device!r}; after the colon comes a number, as in 'cuda:0'")
    if index and name in ("cpu", "reference"):
        raise ValueError(f"unknown device {device!r}; there is only one {name}: device={name!r}")
    if name == "cuda":
        index = index or "0"
        if problem := cuda_problem(int(index)) or start_problem():
            raise DeviceUnavailableError(problem)
    key = (name, index, *sorted(options.items()))
    if key not in _made:
        make = pkgutil.resolve_name(target) if isinstance(target, str) else target
        try:
            made = _made[key] = make(*([int(index)] if index else []), **options)
            made.remake = _get_backend, (f"{name}:{index}" if index else name, options)
        except Exception as error:
            if name != "cuda" or not fork_advice():
                raise
            raise DeviceUnavailableError(f"{error}{fork_advice()}") from error
    return _made[key]


def _get_backend(device: str, options: dict[str, Any]) -> Backend:
    return get_backend(device, **options)


def available_devices() -> list[str]:
    """Return the devices that can be used here, as in ``["cpu", "cuda:0"]``; never raises, imports neither CuPy nor Numba."""
    if cuda_problem(0):
        return ["cpu"]
    return ["cpu", *(f"cuda:{i}" for i in range(cuda_device_count()))]
