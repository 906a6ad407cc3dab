"""Checks at the public edge: what was given, what is allowed. Everything behind them may trust its arrays."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from gpubackprop.backends.base import Backend
from gpubackprop.definitions import Array
from gpubackprop.interop import as_array, to_backend
from gpubackprop.losses import Loss


def check_options(function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raise TypeError for an option that a function does not take, with the names of those that it takes."""
    known = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise TypeError(f"{function.__name__} takes no option {name!r}{hint}; it takes {', '.join(known)}")


def check_features(backend: Backend, X: Any, d: int, dtype: np.dtype[Any], *, finite: bool = True) -> Array:
    """Return X on the backend's device, shape (n, d), n >= 1, of the model's dtype, without NaN or infinity.

    Raises
    ------
    ValueError
        For another shape, no samples, values that are not numbers, or (``finite``) NaN and infinity.
    """
    X = _numbers(backend, "X", X, dtype, overflow="ignore" if finite else "warn")
    if X.ndim != 2 or X.shape[1] != d:
        raise ValueError(f"X has shape {_shape(X)}; the network takes (samples, {d})")
    if X.shape[0] == 0:
        raise ValueError(f"X has shape {_shape(X)}: there are no samples")
    if finite:
        _check_finite(backend, "X", X)
    return X


def check_targets(backend: Backend, y: Any, n: int, d: int, loss: Loss, dtype: np.dtype[Any]) -> Array:
    """Return y on the backend's device: (n,) int64 class indices, or (n, d) of the model's dtype.

    Raises
    ------
    ValueError
        For another shape, labels out of range, or values that the loss has no meaning for.
    """
    given, kind = as_array(y, "y"), loss.kind
    shape = tuple(int(s) for s in given.shape)
    indices = kind.are_indices(shape) and shape[0] == n
    if not indices and shape != (n, d) and not (d == 1 and shape == (n,)):
        takes = f"{loss.name} with {d} outputs and {n} samples takes {kind.shapes(n, d)}"
        raise ValueError(f"y has shape {_shape(given)}; {takes}")
    y = _numbers(backend, "y", given, None if indices else dtype).reshape((n,) if indices else (n, d))
    if y.dtype.kind == "f":
        _check_finite(backend, "y", y)
    kind.check(y, d, backend.xp, loss.name)
    if loss.family == "softmax" and not indices and float(abs(y.sum(axis=1) - 1).max()) > 1e-3:
        raise ValueError(f"the rows of y are not probabilities: they must sum to 1 for {loss.name}")
    return backend.asarray(y, np.int64) if indices else y


def check_weight(backend: Backend, weight: Any, n: int, dtype: np.dtype[Any], loss: Loss) -> Array | None:
    """Return sample weights (n,), finite, >= 0 and not all 0, or None.

    Those of a mean, which only their ratios matter to, are divided by a power of two, so that the largest is in [1/2, 1).
    """
    if weight is None:
        return None
    weight = _numbers(backend, "sample_weight", weight, np.float64)
    if weight.shape != (n,):
        raise ValueError(f"sample_weight has shape {_shape(weight)}; there are {n} samples: it must be ({n},)")
    _check_finite(backend, "sample_weight", weight)
    low, high = float(weight.min()), float(weight.max())
    if low < 0 or high == 0:
        raise ValueError("sample_weight must be >= 0, and not all 0")
    if loss.reduction == "mean":
        weight = backend.xp.ldexp(weight, -math.frexp(high)[1])
    elif not 0 < float(dtype.type(high)) < math.inf:
        raise ValueError(f"sample_weight goes up to {high:g}, which {dtype} has no number for")
    return backend.asarray(weight, dtype)


def check_parameter(
    backend: Backend, name: str, value: Any, shape: tuple[int, ...], real: np.dtype[Any], dtype: np.dtype[Any]
) -> Array:
    """Return an array of parameters on the backend's device, in ``real``, finite also in ``dtype``, which products read.

    Raises
    ------
    ValueError
        For another shape, or values that are not real numbers or, once they have the dtype, not finite.
    """
    with np.errstate(over="ignore"):  # what overflows is found below
        array = _numbers(backend, name, value, real)
        if tuple(array.shape) != shape:
            raise ValueError(f"{name} has shape {_shape(array)}; this network has {shape}")
        if not bool(backend.xp.isfinite(array.astype(dtype)).all()):
            raise ValueError(f"{name} holds NaN or infinity, or numbers that overflow {dtype}")
    return array


def _numbers(
    backend: Backend, name: str, a: Any, dtype: Any, *, overflow: Literal["ignore", "warn"] = "ignore"
) -> Array:
    """Return an array of real numbers; what overflows the dtype is infinite, which the caller looks for unless it warns."""
    given = as_array(a, name)
    try:
        array = to_backend(backend, given)
        if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":  # which is of NumPy's kind "V"
            raise TypeError
        with np.errstate(over=overflow):
            return backend.asarray(array, dtype)
    except (TypeError, ValueError) as error:
        kind = getattr(a, "dtype", type(a).__name__)
        raise ValueError(f"{name} is not an array of real numbers: {kind}") from error


def _check_finite(backend: Backend, name: str, a: Array) -> None:
    # a sum is finite only if every term is (or it overflows: then look at every element)
    with np.errstate(over="ignore", invalid="ignore"):
        total = float(a.sum(dtype=np.float64))
    if not np.isfinite(total) and not bool(backend.xp.isfinite(a).all()):
        bad = int((~backend.xp.isfinite(a)).sum())
        raise ValueError(f"{name} holds NaN or infinity ({bad} of {a.size} values); remove or replace them")


def _shape(a: Any) -> str:
    return str(tuple(int(s) for s in a.shape))
