"""``gpubackprop grade``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def grade(
    mine: Annotated[
        Path, typer.Argument(help="Your arrays by the golden file's names, in .npz or .json; any of them.")
    ],
    golden: Annotated[
        Path | None, typer.Argument(help="The file from gpubackprop golden; by default that of its default options.")
    ] = None,
) -> None:
    """Compare the arrays of your implementation with a golden file: the first wrong one, and the likely cause."""
    from gpubackprop.inspect.golden import Problem, read_arrays, read_golden
    from gpubackprop.inspect.grade import grade as grade_arrays

    problem, given = (Problem(), None) if golden is None else read_golden(golden)
    arrays = read_arrays(mine)
    arrays.pop("about", None)  # an array of a golden file itself
    result = grade_arrays(arrays, problem, given)
    print(result)
    if not result.ok:
        raise typer.Exit(1)
