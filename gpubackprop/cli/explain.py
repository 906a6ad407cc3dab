"""``gpubackprop explain``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from gpubackprop.cli.options import Activation, LossName, Seed, parse_layers


def explain(
    layers: Annotated[str, typer.Option(help="Layer sizes, inputs first: 4-8-8-3.")] = "4-8-8-3",
    activation: Activation = "relu",
    loss: LossName = "softmax_cross_entropy",
    batch_size: Annotated[int, typer.Option(help="Samples in the mini-batch.")] = 5,
    seed: Seed = 0,
) -> None:
    """Print the forward and the backward phase of a network, operation by operation, and check each gradient."""
    from gpubackprop.inspect.explain import explain as explain_network

    per_layer: Any = activation.split(",") if "," in activation else activation
    explanation = explain_network(
        parse_layers(layers), activation=per_layer, loss=loss, batch_size=batch_size, seed=seed
    )
    print(explanation)
    if not explanation.ok:
        raise typer.Exit(1)
