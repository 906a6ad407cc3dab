"""Tolerances with their derivation, and comparisons that say where they fail."""

from __future__ import annotations

from typing import Any

import numpy as np


def eps(dtype: Any) -> float:
    """Return the distance from 1 to the next number: a rounding is wrong by at most half of it, relatively."""
    return float(np.finfo(dtype).eps)


def assert_within(actual: Any, expected: Any, tolerance: Any) -> None:
    """Assert |actual - expected| <= tolerance, elementwise; NaN equals NaN, an infinity itself only."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    tolerance = np.broadcast_to(np.asarray(tolerance, np.float64), expected.shape)
    same = (actual == expected) | (np.isnan(actual) & np.isnan(expected))
    with np.errstate(invalid="ignore"):
        bad = ~same & ~(np.abs(actual - expected) <= tolerance)
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        raise AssertionError(
            f"{int(bad.sum())} of {bad.size} differ; first at {where}: {actual[where]!r} is not {expected[where]!r} "
            f"within {tolerance[where]:.3g}"
        )


def sum_tolerance(terms: Any, dtype: Any, axis: int | None = None) -> Any:
    """Return n eps sum |terms|: what any order of adding n rounded terms can be wrong by (Higham (2002), eq. 4.4)."""
    terms = np.abs(np.asarray(terms, np.float64))
    n = terms.size if axis is None else terms.shape[axis]
    return (n + 1) * eps(dtype) * terms.sum(axis=axis)


def matmul_tolerance(a: Any, b: Any, dtype: Any) -> Any:
    """Return k eps |a| |b|: what any order of the sums of a product can be wrong by."""
    a, b = np.abs(np.asarray(a, np.float64)), np.abs(np.asarray(b, np.float64))
    return (a.shape[1] + 1) * eps(dtype) * (a @ b)
