"""``gpubackprop golden``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gpubackprop.activations import ACTIVATIONS
from gpubackprop.cli.options import LossName, loss_for, named, parse_layers


def golden(
    out: Annotated[Path, typer.Option(help="The .npz file; a .json file with the equations is written next to it.")],
    layers: Annotated[str, typer.Option(help="Layer sizes, inputs first.")] = "4-4-4-3",
    activation: Annotated[str, named(ACTIVATIONS)] = "tanh",
    loss: LossName = None,
    optimizer: Annotated[str, typer.Option(help="sgd, momentum or adam.")] = "sgd",
    samples: Annotated[int, typer.Option(help="Samples in the batch.")] = 5,
    seed: Annotated[int, typer.Option(help="Seed of inputs, targets and parameters.")] = 7,
) -> None:
    """Write every array of forward pass, backward pass and update in float64, to compare your implementation with."""
    from gpubackprop.inspect.golden import ITERATIONS, Problem, write_golden
    from gpubackprop.inspect.rehearsal import Rehearsal

    sizes = tuple(parse_layers(layers))
    problem = Problem(sizes, activation, loss_for(loss, sizes), optimizer, samples, seed)
    arrays = Rehearsal(problem, problem.given()).run()
    written = write_golden(out, problem, arrays)
    print(f"wrote {len(arrays)} arrays of {ITERATIONS} iterations into {' and '.join(map(str, written))}")
    print("'read_me' in the .json file says what to compute; then: gpubackprop grade YOURS " + str(out))
