"""``gpubackprop check``."""

from __future__ import annotations

from typing import Annotated

import typer

from gpubackprop.cli.options import Activation, Device, LossName, Seed, loss_for, parse_layers


def check(
    layers: Annotated[str, typer.Option(help="Layer sizes, inputs first.")] = "17-33-8-5",
    activation: Activation = "tanh",
    loss: LossName = None,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="float32 or float64.")] = "float32",
    seed: Seed = 0,
) -> None:
    """Check that a device computes what it should: gradients by finite differences, and each array against the reference."""
    from gpubackprop.inspect.check import check_device
    from gpubackprop.mlp import MLP

    per_layer = activation.split(",") if "," in activation else activation
    sizes = parse_layers(layers)
    found = check_device(MLP(sizes, per_layer, loss_for(loss, sizes), device, dtype, seed), seed)
    print(found)
    if not found.ok:
        raise typer.Exit(1)
