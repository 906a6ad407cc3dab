"""``gpubackprop check``."""

from __future__ import annotations

from typing import Annotated

import typer

from gpubackprop.cli.options import Activation, Device, LossName, Seed, parse_layers


def check(
    layers: Annotated[str, typer.Option(help="Layer sizes, inputs first.")] = "17-33-8-5",
    activation: Activation = "tanh",
    loss: LossName = "softmax_cross_entropy",
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="float32 or float64.")] = "float32",
    seed: Seed = 0,
) -> None:
    """Check that a device computes what it should: gradients by finite differences, and each array against the reference."""
    import numpy as np

    from gpubackprop.inspect.explain import random_batch
    from gpubackprop.inspect.gradcheck import check_gradients
    from gpubackprop.inspect.parity import parity
    from gpubackprop.mlp import MLP

    model = MLP(parse_layers(layers), activation, loss, device, dtype, seed)
    X, y = random_batch(model, 37, np.random.default_rng(seed))
    gradients, devices = check_gradients(model, X, y), parity(model, X, y, [model.device])
    # an element is a sum of at most (fan-in + 1) or n products, through 2 passes over all layers
    bound = 8.0 * (max(*model.layer_sizes, 37) + 1) * len(model.layer_sizes)
    print(gradients)
    print(devices)
    ok = gradients.ok and devices.worst <= bound
    print(f"{model.device}: {'ok' if ok else 'WRONG'}: worst {devices.worst:.1f} ulps, bound {bound:.0f}")
    if not ok:
        raise typer.Exit(1)
