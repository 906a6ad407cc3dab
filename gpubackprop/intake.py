"""Inputs are converted, checked and sized here, once. The code below trusts its arrays."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, Self

import numpy as np

from gpubackprop.architecture import Architecture
from gpubackprop.backends import get_backend
from gpubackprop.backends.base import Backend
from gpubackprop.backends.memory import DeviceMemoryError, free_bytes, not_allocated
from gpubackprop.datasets import held_out
from gpubackprop.definitions import Array, check_number
from gpubackprop.frames import column_of
from gpubackprop.interop import as_array, bytes_to_copy, on_gpu, on_host, rows_of, to_backend
from gpubackprop.labels import indices_of, weights_of
from gpubackprop.losses import Loss

AT_ONCE = 64 << 20  # bytes of a data set copied from a device at a time, for its digest
LARGEST_SHARE = 0.5  # share of the free memory above which a data set stays on the host


@dataclass(frozen=True)
class Samples:
    """X, or X, y and perhaps sample weights: as given, or (:meth:`on`) as the passes read them.

    Parameters
    ----------
    X, y, weight : array
    name : str
        Prefix of error messages, as in ``"validation_data: "``.
    """

    X: Any
    y: Any = None
    weight: Any = None
    name: str = ""

    @classmethod
    def given(cls, X: Any, y: Any, weight: Any = None, *, by: Architecture | None = None, name: str = "") -> Self:
        """Return the caller's inputs as arrays of any library on any device.

        ``by`` says what the inputs are made of and what the classes are called; tables and text become numbers by it.

        Raises
        ------
        ValueError
            One of them is not an array, or not what ``by`` describes.
        """
        w = None if weight is None else as_array(weight, f"{name}sample_weight")
        y = column_of(y)
        if by is not None and by.classes is not None:
            y = indices_of(y, by.classes, name)
        return cls(_inputs(X, by, f"{name}X"), as_array(y, f"{name}y"), w, name)

    @classmethod
    def features(cls, X: Any, by: Architecture | None = None) -> Self:
        """Return X as :meth:`given` does, without y."""
        return cls(_inputs(X, by, "X"))

    def split(self, fraction: float, a: Architecture) -> tuple[Self, Self]:
        """Return a training and a validation set; which samples are which depends on their number and classes alone."""
        fraction = check_number("validation_split", fraction, lambda x: 0 < x < 1, "in (0, 1)")
        n = len(self)
        if n < 2:
            raise ValueError(f"validation_split needs at least 2 samples; there are {n}")
        y = np.asarray(on_host(self.y))
        labels = (
            y.reshape(-1).astype(np.int64) if a.loss.kind.numbered and y.size == n and y.dtype.kind in "biuf" else None
        )
        if labels is not None and labels.min() < 0:
            labels = None  # which the checks of the targets say
        taken = held_out(labels, n, fraction, np.random.default_rng(0), n - 1)
        return self._at(np.flatnonzero(~taken), self.name), self._at(np.flatnonzero(taken), "validation_split: ")

    def _at(self, rows: np.ndarray, name: str) -> Self:
        weight = None if self.weight is None else rows_of(self.weight, rows)
        return replace(self, X=rows_of(self.X, rows), y=rows_of(self.y, rows), weight=weight, name=name)

    def weighted(self, class_weight: Any, a: Architecture) -> Self:
        """Return them with weights of the classes of an architecture, times their own; see :func:`labels.weights_of`."""
        weight = weights_of(class_weight, self.y, len(self), a.classes, a.layer_sizes[-1], a.loss)
        if self.weight is not None:
            weight = weight * np.asarray(on_host(self.weight), np.float64)
        return replace(self, weight=weight)

    def __len__(self) -> int:
        return int(self.X.shape[0]) if self.X.ndim else 0

    def indices(self, loss: Loss) -> bool:
        """Return whether y holds class indices, as far as its shape tells."""
        return self.y is None or loss.kind.are_indices(self.y.shape)

    def nbytes(self, backend: Backend, a: Architecture) -> int:
        """Return the bytes that :meth:`on` allocates on the backend's device: none for arrays already there in the right form."""
        y_dtype = np.dtype(np.int64) if self.indices(a.loss) else a.real
        arrays = (self.X, a.dtype), (self.y, y_dtype), (self.weight, a.real)
        return sum(bytes_to_copy(backend, array, dtype) for array, dtype in arrays if array is not None)

    def home(self, backend: Backend, a: Architecture, stream: bool | None = None) -> Backend:
        """Return the backend that holds them while they are read: the device's, or the host's, which batches are copied from.

        ``stream`` decides; where it is None, arrays of the host stay there if they take more than half of the device's free memory.
        """
        if stream is False or backend.xp is np:
            return backend
        free = None if stream or on_gpu(self.X) else free_bytes(backend)
        large = free is not None and self.nbytes(backend, a) > free * LARGEST_SHARE
        return get_backend("reference") if stream or large else backend

    def on(self, backend: Backend, a: Architecture, *, finite: bool = True) -> Samples:
        """Return them on the backend's device in the dtypes of an architecture, checked; copied only where they must be.

        Raises
        ------
        ValueError
            For a wrong shape, labels out of range, or (X only if ``finite``) NaN and infinity.
        """
        try:
            X = check_features(backend, self.X, a.layer_sizes[0], a.dtype, finite=finite)
            y = None if self.y is None else check_targets(backend, self.y, len(X), a.layer_sizes[-1], a.loss, a.real)
            return Samples(X, y, check_weight(backend, self.weight, len(X), a.real, a.loss), self.name)
        except ValueError as error:
            raise ValueError(f"{self.name}{error}") from None

    def digest(self, backend: Backend) -> str:
        """Return the SHA-256 of all values, dtypes and shapes, in hexadecimal digits; they are on the backend's device."""
        found = hashlib.sha256()
        for array in (self.X, self.y, self.weight):
            if array is not None:
                found.update(f"{array.dtype.name} {array.shape}".encode())
                rows = max(1, AT_ONCE // max(1, array.nbytes // len(array)))
                for first in range(0, len(array), rows):
                    part = np.ascontiguousarray(backend.to_numpy(array[first : first + rows]))
                    found.update(part.reshape(-1).view(np.uint8).data)
        return found.hexdigest()

    def feed(self, arrays: Callable[[str], Array]) -> None:
        """Write them into the inputs of a step that has no data set: ``samples.feed(step.names.array)``."""
        for name, array in (("X", self.X), ("y", self.y), ("w", self.weight)):
            if array is not None:
                arrays(name)[...] = array


def _inputs(X: Any, by: Architecture | None, name: str) -> Any:
    """Return X as an array, made of the features that an architecture has."""
    return as_array(X, name) if by is None or by.features is None else by.features.matrix(X, name)


HINTS = {
    "lr": "the rate is the optimizer's: optimizer=gb.Adam(1e-3)",
    "learning_rate": "the rate is the optimizer's: optimizer=gb.Adam(1e-3)",
    "verbose": "progress=False is silent",
    "early_stopping": "callbacks=[gb.EarlyStopping(patience=5)]",
    "patience": "callbacks=[gb.EarlyStopping(patience=5)]",
    "validation_fraction": "validation_split=0.1",
    "loss": "the loss is the network's: gb.MLP(sizes, loss=...)",
    "max_iter": "epochs=100",
}
"""Options that other libraries have, and what there is instead."""


def check_options(function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raise TypeError for an unknown option of a function, with the names of its options."""
    known = _options_of(function)
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" ({HINTS[name]})" if name in HINTS else f" (did you mean {near[0]}?)" if near else ""
            raise TypeError(f"{function.__name__} takes no option {name!r}{hint}; it takes {', '.join(known)}")


@cache
def _options_of(function: Callable[..., Any]) -> list[str]:
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]


def check_features(
    backend: Backend, X: Any, d: int, dtype: np.dtype[Any], *, finite: bool = True, name: str = "X"
) -> Array:
    """Return X, an array, on the backend's device, shape (n, d), n >= 1, of the model's dtype, without NaN or infinity.

    Raises
    ------
    ValueError
        For another shape, no samples, values that are not numbers, or (``finite``) NaN and infinity.
    """
    X = _numbers(backend, name, X, dtype, overflow="ignore" if finite else "warn")
    if X.ndim != 2 or X.shape[1] != d:
        raise ValueError(f"{name} has shape {_shape(X)}; the network takes (samples, {d})")
    if X.shape[0] == 0:
        raise ValueError(f"{name} has shape {_shape(X)}: there are no samples")
    if finite:
        _check_finite(backend, name, X)
    return X


def check_targets(backend: Backend, y: Any, n: int, d: int, loss: Loss, dtype: np.dtype[Any]) -> Array:
    """Return y on the backend's device: (n,) int64 class indices, or (n, d) of the model's dtype.

    Raises
    ------
    ValueError
        For another shape, labels out of range, or values that the loss is not defined for.
    """
    kind, shape = loss.kind, tuple(int(s) for s in y.shape)
    indices = kind.are_indices(shape) and shape[0] == n
    if not indices and shape != (n, d) and not (d == 1 and shape == (n,)):
        takes = f"{loss.name} with {d} outputs and {n} samples takes {kind.shapes(n, d)}"
        raise ValueError(f"y has shape {_shape(y)}; {takes}")
    y = _numbers(backend, "y", y, None if indices else dtype).reshape((n,) if indices else (n, d))
    if y.dtype.kind == "f":
        _check_finite(backend, "y", y)
    kind.check(y, d, backend.xp, loss.name)
    if loss.family == "softmax" and not indices and float(abs(y.sum(axis=1) - 1).max()) > 1e-3:
        raise ValueError(f"the rows of y are not probabilities: they must sum to 1 for {loss.name}")
    return backend.asarray(y, np.int64) if indices else y


def check_weight(backend: Backend, weight: Any, n: int, dtype: np.dtype[Any], loss: Loss) -> Array | None:
    """Return sample weights (n,), finite, >= 0 and not all 0, or None.

    In a mean only their ratios matter: they are divided by a power of two, so that the largest is in [1/2, 1).
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
        raise ValueError(f"sample_weight goes up to {high:g}, which overflows {dtype}")
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
        array = _numbers(backend, name, as_array(value, name), real)
        if tuple(array.shape) != shape:
            raise ValueError(f"{name} has shape {_shape(array)}; this network has {shape}")
        if not bool(backend.xp.isfinite(array.astype(dtype)).all()):
            raise ValueError(f"{name} holds NaN or infinity, or numbers that overflow {dtype}")
    return array


def _numbers(
    backend: Backend, name: str, a: Any, dtype: Any, *, overflow: Literal["ignore", "warn"] = "ignore"
) -> Array:
    """Return an array of real numbers; values that overflow the dtype become infinite, which the caller checks."""
    try:
        array = to_backend(backend, a)
        if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":  # whose kind in NumPy is "V"
            raise TypeError
        with np.errstate(over=overflow):
            return backend.asarray(array, dtype)
    except MemoryError as error:
        if isinstance(error, DeviceMemoryError):
            raise
        needed = int(a.size) * np.dtype(dtype or a.dtype).itemsize
        advice = "; give an array of that dtype, or fewer samples at a time"
        raise not_allocated(f"{name} as {np.dtype(dtype or a.dtype)}", needed, backend.device, advice) from None
    except (TypeError, ValueError) as error:
        kind = getattr(a, "dtype", type(a).__name__)
        raise ValueError(f"{name} is not an array of real numbers: {kind}") from error


def _check_finite(backend: Backend, name: str, a: Array) -> None:
    bad = backend.count_not_finite(a)
    if bad:
        raise ValueError(f"{name} holds NaN or infinity ({bad} of {a.size} values); remove or replace them")


def _shape(a: Any) -> str:
    return str(tuple(int(s) for s in a.shape))
