"""``gpubackprop explain``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gpubackprop.cli.options import Activation, LossName, Seed, loss_for, parse_layers


def explain(
    layers: Annotated[str, typer.Option(help="Layer sizes, inputs first: 4-8-8-3.")] = "4-8-8-3",
    activation: Activation = "relu",
    loss: LossName = None,
    batch_size: Annotated[int, typer.Option(help="Samples in the mini-batch.")] = 5,
    seed: Seed = 0,
    values: Annotated[bool, typer.Option("--values", help="Show the numbers in the arrays.")] = False,
    fused: Annotated[bool, typer.Option("--fused", help="Add the step as it runs, operation by operation.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write the page into this file, as HTML without scripts.")] = None,
    latex: Annotated[Path | None, typer.Option(help="Write the page into this file, as LaTeX.")] = None,
) -> None:
    """Follow the text on backpropagation, part by part, with the equations and numbers of a network, each derivative checked."""
    from gpubackprop.inspect.explain import explain as explain_network
    from gpubackprop.machine.files import write_whole

    per_layer: Any = activation.split(",") if "," in activation else activation
    sizes = parse_layers(layers)
    explanation = explain_network(
        sizes, activation=per_layer, loss=loss_for(loss, sizes), batch_size=batch_size, seed=seed
    )
    print(explanation.text(values=values))
    if fused:
        print(f"\nTHE STEP AS IT RUNS\n\n{explanation.fused()}")
    for path, write in ((html, explanation.html), (latex, explanation.latex)):
        if path is not None:
            write_whole(path, write(values=values).encode())
            print(f"wrote {path}")
    if not explanation.ok:
        raise typer.Exit(1)
