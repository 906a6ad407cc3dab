"""``gpubackprop predict``."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from gpubackprop.cli.options import Device
from gpubackprop.cli.saved import DataPath, DelimiterOption, HeaderOption, RunPath

if TYPE_CHECKING:
    import numpy as np

    from gpubackprop.mlp import MLP


def predict(
    run: RunPath,
    data: DataPath,
    out: Annotated[
        Path | None, typer.Option(help="Write a .csv or .parquet file; by default CSV on standard output.")
    ] = None,
    probabilities: Annotated[bool, typer.Option("--probabilities", help="Add the probability of each class.")] = False,
    header: HeaderOption = None,
    delimiter: DelimiterOption = None,
    device: Device = "cpu",
) -> None:
    """Predict with a trained network, a row for each sample; columns may be in any order, a .csv file larger than the memory."""
    from gpubackprop.cli.saved import batches, open_saved

    saved = open_saved(run, device)
    model = saved.model
    if probabilities and model.loss.kind.mean.probabilities is None:
        raise ValueError(f"--probabilities: {model.loss.name} has none; predictions are numbers")
    if not saved.finished:
        print(f"{run} is not finished: the network of its last checkpoint predicts", file=sys.stderr)
    count, on_inputs = 0, saved.on_inputs()
    with _writer(out) as write:
        for X, _ in batches(data, saved, with_target=False, target=None, header=header, delimiter=delimiter):
            columns = _columns(on_inputs, X, probabilities=probabilities)
            write(columns)
            count += len(next(iter(columns.values())))
    if not count:
        raise ValueError(f"{data!r} has no samples")
    if out is not None:
        print(f"wrote {count:,} predictions to {out}")


def _columns(model: MLP, X: Any, *, probabilities: bool) -> dict[str, np.ndarray]:
    """Return the predictions of some samples, by column."""
    import numpy as np

    from gpubackprop.training.scores import of_each_class

    found = np.asarray(model.predict(X))
    found = found if found.ndim == 1 else found[:, 0] if found.shape[1] == 1 else found
    columns = {"prediction": found} if found.ndim == 1 else {f"prediction_{j + 1}": a for j, a in enumerate(found.T)}
    if probabilities:
        p = of_each_class(np.asarray(model.predict_proba(X)))
        labels = model.classes if model.classes is not None else range(p.shape[1])
        columns |= {f"probability_{label}": a for label, a in zip(labels, p.T, strict=True)}
    return columns


@contextmanager
def _writer(out: Path | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield a function that appends columns to a file, which is there whole at the end or not at all, or to standard output."""
    if out is None:
        yield _csv_writer(sys.stdout)
        return
    if out.suffix not in (".csv", ".parquet"):
        raise ValueError(f"--out is {str(out)!r}; it must end with .csv or .parquet")
    part = out.with_name(f"{out.name}.part")
    try:
        if out.suffix == ".csv":
            with part.open("w", encoding="utf-8", newline="") as file:
                yield _csv_writer(file)
        else:
            with closing(_Parquet(part)) as parquet:
                yield parquet.write
        if part.exists():  # something was written
            part.replace(out)
    finally:
        part.unlink(missing_ok=True)


def _csv_writer(file: TextIO) -> Callable[[dict[str, Any]], None]:
    writer = csv.writer(file, lineterminator="\n")
    begun: list[bool] = []

    def write(columns: dict[str, Any]) -> None:
        if not begun:
            writer.writerow(columns)
            begun.append(True)
        writer.writerows(zip(*(map(str, a) for a in columns.values()), strict=True))

    return write


class _Parquet:
    """A Parquet file, opened when its columns are known."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: Any = None

    def write(self, columns: dict[str, Any]) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        table = pa.table({name: pa.array(a.copy()) for name, a in columns.items()})
        if self._writer is None:
            self._writer = parquet.ParquetWriter(self._path, table.schema)
        self._writer.write_table(table)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
