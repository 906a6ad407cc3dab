"""Trained networks and data for them: what predict, evaluate, show and export share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

if TYPE_CHECKING:
    import numpy as np

    from gpubackprop.mlp import MLP
    from gpubackprop.training.history import History

RunPath = Annotated[
    Path, typer.Argument(metavar="RUN", help="The folder of a training (train --out), or a .safetensors file.")
]
DataPath = Annotated[
    str,
    typer.Argument(
        metavar="DATA", help="A .csv, .npz or IDX file, gzipped or not, 'digits', or - for CSV on standard input."
    ),
]
HeaderOption = Annotated[bool | None, typer.Option(help="Whether the first row of a .csv file is a header.")]
DelimiterOption = Annotated[str | None, typer.Option(help="Of a .csv file: , ; | or tab; detected by default.")]
TargetOption = Annotated[
    str | None,
    typer.Option(help="The target column of a .csv file, by name or number; that of the training by default."),
]
IMAGES = 4096  # samples of a block of images


class Saved(NamedTuple):
    """A trained network, and what 'gpubackprop train' stored with it."""

    model: MLP
    about: dict[str, Any]
    history: History | None
    finished: bool

    def on_inputs(self) -> MLP:
        """Return the network without its features, for what :func:`batches` yields."""
        return self.model.twin(features=None)


def open_saved(run: Path, device: str) -> Saved:
    """Return the network in a folder, at its last checkpoint where the training is not finished, or in a file.

    Raises
    ------
    FileNotFoundError
        There is none.
    """
    from gpubackprop.mlp import MLP, load
    from gpubackprop.training.checkpoint import load_training
    from gpubackprop.training.run import MODEL, Run

    if not run.exists():
        raise FileNotFoundError(f"no folder or file {str(run)!r}; give the folder of a training, as in train --out")
    if not run.is_dir():
        network, history = load_training(run, device)
        return Saved(MLP.of(network), {}, history or None, finished=True)
    try:
        found = Run.resumed(run, device)
    except FileNotFoundError:
        if not (run / MODEL).is_file():
            raise
        return Saved(load(run / MODEL, device), {}, None, finished=True)
    finished = (run / MODEL).is_file()
    assert found.network is not None
    return Saved(load(run / MODEL, device) if finished else MLP.of(found.network), found.about, found.history, finished)


def batches(
    data: str, saved: Saved, *, with_target: bool, target: str | None, header: bool | None, delimiter: str | None
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Yield (X, y) for consecutive samples of a file, X as the first layer takes it; y is None without a target.

    A .csv file is read a few megabytes at a time.

    Raises
    ------
    ValueError
        The file is damaged, or does not have the columns that the network takes; the message begins with its name.
    """
    from gpubackprop import csv_lines
    from gpubackprop.archives import open_unpacked
    from gpubackprop.csv_files import read_rows
    from gpubackprop.datasets import is_csv, load_arrays

    model, features = saved.model, saved.model.features
    kind = model.loss.kind
    if data == "-":
        data = "/dev/stdin"
    if data == "digits" or not is_csv(Path(data)):
        X, y = load_arrays(data, with_target=with_target, scale=None if features is None else features.scale)
        for first in range(0, len(X), IMAGES):
            part = X[first : first + IMAGES]
            yield (
                part if features is None else features.matrix(part, repr(data)),
                None if y is None else y[first : first + IMAGES],
            )
        return
    try:
        texts = [t is not None for t in features.categories] if features is not None else [False] * model.layer_sizes[0]
        names = features.names if features is not None else None
        with open_unpacked(Path(data)) as file:
            for table, y, _ in read_rows(
                csv_lines.stream(file), names=names, is_text=texts, with_target=with_target,
                target=target or saved.about.get("target"), classification=kind.numbered, header=header,
                delimiter=delimiter or saved.about.get("delimiter"),
            ):  # fmt: skip
                if len(table):
                    yield (table.numbers if features is None else features.matrix(table)), y
    except ValueError as error:
        raise ValueError(f"{data!r}: {str(error).removeprefix('X: ')}") from None
