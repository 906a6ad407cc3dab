"""``gpubackprop export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gpubackprop.cli.saved import RunPath


def export(
    run: RunPath,
    to: Annotated[
        Path,
        typer.Option(
            help=".safetensors: torch's names and layout; .npz: W_1, b_1, ...; .pkl: scikit-learn's estimator, pickled."
        ),
    ],
    fold: Annotated[
        bool, typer.Option("--fold", help="Fold the scaling of the features into the first layer.")
    ] = False,
) -> None:
    """Write a trained network for another program."""
    from gpubackprop.cli.saved import open_saved
    from gpubackprop.export import write

    model = open_saved(run, "cpu").model
    print(f"wrote {to}: {write(model.folded() if fold else model, to)}")
