"""A case of the table of operations, run on a backend and compared with the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
from tolerances import assert_within

from gpubackprop.backends.cases import REFERENCE, Arrays, OpCase, copied
from gpubackprop.step.operations import BiasActivationBackward, BiasActivationForward


def wide(a: Arrays) -> Arrays:
    """Return copies in float64."""
    return copied(a, lambda array: array.astype(np.float64))


def filled(case: OpCase, rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Arrays:
    """Return the arrays of a case, with a NaN where it must stay in its row or column."""
    a = case.arrays(rng, shape, dtype)
    if case.kind in (BiasActivationForward, BiasActivationBackward):
        a["h" if "h" in a else "z"][0, 0] = np.nan
    return a


def compare(case: OpCase, dtype: str, given: Arrays, found: Arrays) -> None:
    """Assert that the arrays found are those of the reference, each output within its bound, and that no other was changed."""
    expected = copied(given, np.copy)
    REFERENCE.run(case.operation(expected))
    bounds = case.bounds(dtype, wide(given), wide(expected))
    for name, array in found.items():
        if name in case.over.values():
            continue  # it is the output's memory
        try:
            assert_within(array, expected[name], bounds.get(name, 0))
        except AssertionError as error:
            raise AssertionError(f"{case}, {dtype}, {name} {array.shape}: {error}") from None


def check(case: OpCase, backend: Any, shape: tuple[int, ...], dtype: str, rng: np.random.Generator) -> None:
    """Run a case twice on a backend: the same bits, within the bounds of the reference."""
    given = filled(case, rng, shape, dtype)
    runs = []
    for _ in range(2):
        here = copied(given, lambda a: backend.asarray(a.copy()))
        operation = case.operation(here)
        backend.run(operation)
        runs.append({name: backend.to_numpy(a) for name, a in here.items()})
    for name, a in runs[0].items():
        assert a.tobytes() == runs[1][name].tobytes(), f"{case}: {name} has other bits in another run"
    compare(case, dtype, given, runs[0])
