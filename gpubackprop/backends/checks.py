"""What the arrays of each operation must be, by the table of operations.

They are checked where an operation is bound to arrays, and in every eager call; a running step checks nothing. Kernels trust
shapes, dtypes and the order of memory: with other arrays they would read and write out of bounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np

from gpubackprop.definitions import Array, check_dtype, real_of
from gpubackprop.step.operations import BiasLoss, Clip, Dropout, Operation, Spec, Update

_INT64, _FLOAT64 = np.dtype(np.int64), np.dtype(np.float64)


def check_arrays(backend: Any, operation: Operation, *, bound: bool = False) -> dict[str, Array]:
    """Raise an error that names the argument, unless all arrays of an operation are what its kernels take.

    Parameters
    ----------
    backend : Backend
        They must be on its device.
    operation : Operation
    bound : bool
        All outputs are given; else omitted ones are allocated.

    Returns
    -------
    dict of str to array
        The allocated outputs.

    Raises
    ------
    TypeError
        One is not an array, or belongs to another library or device.
    ValueError
        For another shape, dtype or order of memory, or an output that is read-only or shares memory where it must not.
    """
    sizes: dict[Any, Any] = {"n_states": operation.optimizer.n_states} if isinstance(operation, Update) else {}
    specs, written = operation.specs(), operation.writes
    storage: np.dtype[Any] | None = None
    arrays: list[tuple[str, Spec, Array]] = []
    missing: list[tuple[str, Spec]] = []
    for name, spec in specs.items():
        a: Any = getattr(operation, name)
        if a is None and (spec.optional or (spec.allocated and not bound)):
            if spec.allocated:
                missing.append((name, spec))
            continue
        _check_kind(backend, name, a)
        dtype = a.dtype
        if spec.dtype == "storage" or spec.dtype == "data":
            if storage is None:
                storage = dtype
                _check_storage(backend, name, spec, dtype)
        elif storage is None and spec.dtype not in ("int64", "float64"):
            raise AssertionError(f"{operation.name} has {name} before the array that its dtype follows from")
        if not _dtype_fits(spec.dtype, dtype, storage, backend):
            expected = _expected_dtype(spec.dtype, storage)
            raise ValueError(f"{name} is an array of {dtype}; it must be one of {expected}")
        if not _shape_fits(spec.shape, a.shape, sizes):
            expected = _shape_text(spec.shape, sizes)
            raise ValueError(f"{name} has shape {a.shape}; it must be {expected} in this {operation.name}")
        _check_memory(name, spec, a, written=name in written)
        arrays.append((name, spec, a))
    for (first, _, a), (second, spec, b) in combinations(arrays, 2):
        if (first in written or second in written) and not _apart(first, a, spec, b):
            name, other = (second, first) if second in written else (first, second)
            raise ValueError(
                f"{name} shares memory with {other}; give it its own memory"
                + (f", or all of that of {' or '.join(spec.over)}" if spec.over else "")
            )
    return {name: _allocate(backend, spec, sizes, storage) for name, spec in missing}


def _allocate(backend: Any, spec: Spec, sizes: Mapping[Any, Any], storage: np.dtype[Any] | None) -> Array:
    shape: tuple[int, ...] = ()
    for letter in spec.shape:
        shape += sizes[...] if letter is ... else (sizes.get(letter, letter),)
    if spec.dtype == "float64":
        return backend.zeros(shape, _FLOAT64)  # sums grow from 0
    assert storage is not None
    return backend.empty(shape, real_of(storage) if spec.dtype == "real" else storage)


def check_values(backend: Any, operation: Operation) -> None:
    """Raise ValueError for indices out of range, in an eager call.

    Values on a GPU are not checked, since the host would have to wait for them; kernels stay within bounds.
    """
    if isinstance(operation, BiasLoss):
        y, (n, classes), samples = operation.y, operation.z.shape, operation.samples
        if samples is not None and samples < n:
            raise ValueError(f"samples is {samples!r}; z has {n} of these samples, so it must be at least {n}")
        # as unsigned, a negative number is a large one
        if y.ndim == 1 and y.dtype == _INT64 and backend.xp is np and y.view(np.uint64).max() >= classes:
            raise ValueError(
                f"y holds labels from {y.min()} to {y.max()}; for {classes} classes they are 0 to {classes - 1}"
            )
    elif isinstance(operation, Clip) and not operation.max_norm > 0:
        raise ValueError(f"max_norm is {operation.max_norm!r}; it must be a number > 0")
    elif isinstance(operation, Dropout) and not 0 <= operation.rate < 1:
        raise ValueError(f"rate is {operation.rate!r}; it must be in [0, 1)")


def _check_kind(backend: Any, name: str, a: Any) -> None:
    kind = type(a)
    xp = backend.xp
    if xp is np:
        if kind is np.ndarray or kind is np.memmap:
            return
    elif isinstance(a, xp.ndarray) and (backend.device.partition(":")[2] or "0") == str(a.device.id):
        return
    place = f" on cuda:{a.device.id}" if xp is not np and isinstance(a, xp.ndarray) else ""
    raise TypeError(
        f"{name} is {kind.__module__}.{kind.__qualname__}{place}; it must be a {xp.__name__}.ndarray on {backend.device}, "
        "as backend.asarray returns it"
    )


@cache
def _dtypes(names: tuple[str, ...]) -> frozenset[np.dtype[Any]]:
    """Return dtypes by name, cached, since NumPy builds a dtype's name at each access, slowly."""
    return frozenset(map(check_dtype, names))


def _check_storage(backend: Any, name: str, spec: Spec, dtype: np.dtype[Any]) -> None:
    allowed = tuple(backend.dtypes)
    if dtype in _dtypes(allowed) or (spec.dtype == "data" and dtype == _INT64):
        return
    raise ValueError(
        f"{name} is an array of {dtype}{'' if dtype.isnative else ' in another byte order'}; "
        f"{backend.device} computes in {', '.join(allowed)}"
    )


def _dtype_fits(kind: str, dtype: np.dtype[Any], storage: Any, backend: Any) -> bool:
    if kind in ("storage", "data"):
        return dtype is storage or dtype == storage
    if kind == "real":
        return dtype == real_of(storage)
    if kind == "either":
        return dtype == storage or dtype == real_of(storage)
    if kind == "weights":  # a copy in 16 bits
        return dtype.name in backend.dtypes and dtype.itemsize == 2
    return dtype == (_INT64 if kind == "int64" else _FLOAT64)


def _expected_dtype(kind: str, storage: Any) -> str:
    if kind == "either":
        return " or ".join(dict.fromkeys([storage.name, real_of(storage).name]))
    if kind in ("storage", "data"):
        return str(storage.name)
    return real_of(storage).name if kind == "real" else {"weights": "16 bits"}.get(kind, kind)


def _shape_fits(expected: tuple[Any, ...], shape: tuple[int, ...], sizes: dict[Any, Any]) -> bool:
    """Compare a shape, and record sizes seen for the first time."""
    if expected and expected[-1] is ...:
        head = expected[:-1]
        if len(shape) < len(head) or sizes.setdefault(..., shape[len(head) :]) != shape[len(head) :]:
            return False
        shape, expected = shape[: len(head)], head
    if len(shape) != len(expected):
        return False
    for size, letter in zip(shape, expected, strict=True):
        if size != (letter if isinstance(letter, int) else sizes.setdefault(letter, size)):
            return False
    return True


def _shape_text(expected: tuple[Any, ...], sizes: dict[Any, Any]) -> str:
    names: list[str] = []
    for letter in expected:
        if letter is ...:
            names += map(str, sizes.get(..., ("...",)))
        else:
            names.append(str(sizes.get(letter, letter)))
    return f"({', '.join(names)}{',' if len(names) == 1 else ''})"


def _check_memory(name: str, spec: Spec, a: Array, *, written: bool) -> None:
    flags = a.flags
    if a.size == 0:
        raise ValueError(f"{name} is empty: its shape is {a.shape}")
    if not (flags.c_contiguous or (spec.transposed and flags.f_contiguous)):
        also = " or the transpose of such an array" if spec.transposed else ""
        raise ValueError(
            f"{name} is not C-contiguous (strides {a.strides}); it must be{also}: xp.ascontiguousarray copies"
        )
    if isinstance(a, np.ndarray):
        if not flags.aligned:
            raise ValueError(f"{name} does not begin at a multiple of {a.itemsize} bytes; copy it")
        if written and not flags.writeable:
            raise ValueError(f"{name} is read-only; it is written to")


def _apart(first: str, a: Array, second: Spec, b: Array) -> bool:
    if a is b:
        return first in second.over
    if isinstance(a, np.ndarray):
        if not np.may_share_memory(a, b):
            return True
        return first in second.over and a.ctypes.data == b.ctypes.data
    begin, other = a.data.ptr, b.data.ptr
    if begin + a.nbytes <= other or other + b.nbytes <= begin:
        return True
    return first in second.over and begin == other
