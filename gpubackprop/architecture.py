"""What describes a network, in one place: to make it again on another device, in another dtype, or from a file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gpubackprop.backends import choose_device

if TYPE_CHECKING:
    from gpubackprop.backends.base import Backend
    from gpubackprop.mlp import MLP

DEVICE_OPTIONS = {"matmul_precision": ("cuda", "gpu")}
"""Options of a network that only some devices have."""


def architecture_of(model: MLP) -> dict[str, Any]:
    """Return all that describes a network but its device and the values of its parameters; see :func:`build`."""
    return {
        "layer_sizes": model.layer_sizes,
        "activation": model.activations,
        "loss": model.loss,
        "dtype": model.dtype,
        "seed": model.seed,
        "initializer": model.initializer,
        "dropout": model.dropout,
        "matmul_precision": model.matmul_precision,
        "target_shape": model.target_shape,
    }


def build(architecture: dict[str, Any], device: str | Backend) -> MLP:
    """Return a new network of an architecture on a device.

    An option that the device does not have is kept for when the network goes on to one that has it: a network with
    ``matmul_precision="tf32"`` computes in float32 on the CPU, and in TF32 again when it is back.
    """
    from gpubackprop.mlp import MLP

    arguments = dict(architecture)
    target_shape = arguments.pop("target_shape", None)
    if device == "auto":
        device = choose_device(arguments["layer_sizes"])
    kept = {}
    for name, devices in DEVICE_OPTIONS.items():
        if name in arguments and not takes(device, devices):
            kept[name] = arguments.pop(name)
    model = MLP(device=device, **arguments)
    if isinstance(device, str):  # a backend has options of its own
        for name, value in kept.items():
            setattr(model, f"_{name}", value)
    model.target_shape = target_shape
    return model


def takes(device: str | Backend, devices: tuple[str, ...]) -> bool:
    """Return whether a device, by name, is one of these kinds."""
    return isinstance(device, str) and device.partition(":")[0] in devices
