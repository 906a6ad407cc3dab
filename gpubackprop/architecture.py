"""What describes a network, in one place: to make it again on another device, in another dtype, or from a file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gpubackprop.backends import choose_device

if TYPE_CHECKING:
    from gpubackprop.backends.base import Backend
    from gpubackprop.mlp import MLP


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

    ``matmul_precision``, which only a GPU has, is kept for when the network goes on to one: with ``"tf32"`` it computes in float32
    on the CPU, and in TF32 again when it is back.
    """
    from gpubackprop.mlp import MLP

    arguments = dict(architecture)
    target_shape, precision = arguments.pop("target_shape", None), arguments.pop("matmul_precision", "float32")
    if device == "auto":
        device = choose_device(arguments["layer_sizes"])
    model = MLP(device=device, **arguments, **({"matmul_precision": precision} if takes_precision(device) else {}))
    if isinstance(device, str):  # a backend has a precision of its own
        model._matmul_precision = precision
    model.target_shape = target_shape
    return model


def takes_precision(device: str | Backend) -> bool:
    """Return whether a device, given by its name, multiplies matrices in another precision if it is asked to."""
    return isinstance(device, str) and device.partition(":")[0] in ("cuda", "gpu")
