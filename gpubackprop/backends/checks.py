"""What the arrays of each operation must be: one table for all backends.

It is read where an operation is bound to arrays, and in every eager call; a running step checks nothing. Kernels take shapes,
dtypes and the order of memory on trust: with other arrays they would read and write outside.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache, wraps
from itertools import combinations
from types import EllipsisType, MethodType, SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import numpy as np

from gpubackprop.definitions import Array, check_dtype, real_of

Function = TypeVar("Function", bound=Callable[..., Any])
_INT64, _FLOAT64 = np.dtype(np.int64), np.dtype(np.float64)


class ArrayArgument(NamedTuple):
    """What one array must be.

    Attributes
    ----------
    name : str
    shape : tuple
        A letter stands for the same number throughout an operation; ``...`` for any further dimensions.
    dtype : str
        "storage": that of the first array, one that the device computes in; "real": what arithmetic is done in for it;
        "either" of them; "data": that of the first array, which may also be int64; "int64"; "float64".
    written : bool
    over : tuple of str
        Arrays whose memory it may have, all of it; no other memory is shared with an array that is written.
    optional : bool
        It may be None.
    transposed : bool
        It may be the transpose of a C-contiguous matrix.
    """

    name: str
    shape: tuple[str | int | EllipsisType, ...]
    dtype: str = "storage"
    written: bool = False
    over: tuple[str, ...] = ()
    optional: bool = False
    transposed: bool = False


def _reads(name: str, *shape: Any, dtype: str = "storage", **more: Any) -> ArrayArgument:
    return ArrayArgument(name, shape, dtype, **more)


def _writes(name: str, *shape: Any, dtype: str = "storage", **more: Any) -> ArrayArgument:
    return ArrayArgument(name, shape, dtype, written=True, **more)


_COUNTERS, _SCALARS = _reads("counters", 2, dtype="int64"), _writes("scalars", 8, dtype="real")

ARGUMENTS: dict[str, tuple[ArrayArgument, ...]] = {
    "matmul": (
        _reads("a", "m", "k", transposed=True),
        _reads("b", "k", "n", transposed=True),
        _writes("out", "m", "n", dtype="either"),
    ),
    "bias_activation_forward": (_writes("z", "n", "d"), _reads("b", "d"), _writes("out", "n", "d", over=("z",))),
    "bias_activation_backward": (
        _reads("dh", "n", "d"),
        _reads("z", "n", "d"),
        _reads("h", "n", "d"),
        _writes("out", "n", "d", over=("dh",)),
        _writes("db", "d", dtype="real"),
    ),
    "bias_loss": (
        _writes("z", "n", "d"),
        _reads("b", "d"),
        _reads("y", "n", "d", dtype="real"),
        _reads("weight", "n", dtype="real", optional=True),
        _writes("out", "n", "d", over=("z",)),
        _writes("db", "d", dtype="real"),
        _writes("value", 2, dtype="float64"),
        _reads("scalars", 8, dtype="real", optional=True),
        _reads("total", 1, dtype="float64", optional=True),
    ),
    "normalize_weights": (
        _reads("weight", "n"),
        _writes("out", "n", over=("weight",)),
        _writes("total", 1, dtype="float64", optional=True),
    ),
    "dropout": (_reads("x", ...), _COUNTERS, _writes("out", ..., over=("x",))),
    "gather": (
        _reads("source", "N", ..., dtype="data"),
        _reads("order", "K", dtype="int64"),
        _COUNTERS,
        _writes("out", "n", ..., dtype="data"),
    ),
    "accumulate": (
        _reads("total", "size", optional=True),
        _reads("term", "size"),
        _writes("out", "size", over=("total", "term")),
    ),
    "clip": (_reads("gradients", "size"), _SCALARS),
    "advance": (_SCALARS, _reads("rate", 1, dtype="float64"), _COUNTERS._replace(written=True)),
    "update": (
        _writes("parameters", "size"),
        _reads("gradients", "size"),
        _writes("states", "n_states", "size"),
        _SCALARS._replace(written=False),
        _writes("weights", "size", dtype="weights", optional=True),
    ),
}
_INDICES = _reads("y", "n", dtype="int64")


def checked(method: Function) -> Function:
    """Check the arrays of an eager method of a backend before each call; ``unchecked`` is the method without that."""
    name, parameters = method.__name__, tuple(inspect.signature(method).parameters)[1:]

    @wraps(method)
    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        given = dict(zip(parameters, arguments, strict=False)) | named
        check_arrays(self, name, given)
        check_values(self, name, given)
        return method(self, *arguments, **named)

    call.unchecked = method  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]


def unchecked(backend: Any) -> Any:
    """Return the operations of a backend without the checks, for arrays that are known to fit."""
    operations = SimpleNamespace()
    for name in ARGUMENTS:
        method = getattr(backend, name)
        without = getattr(method, "unchecked", None)
        setattr(operations, name, method if without is None else MethodType(without, backend))
    return operations


def check_arrays(backend: Any, operation: str, given: Mapping[str, Any], *, bound: bool = False) -> None:
    """Raise an error that names the argument, unless all arrays of an operation are what its kernels take.

    Parameters
    ----------
    backend : Backend
        On whose device they must lie.
    operation : str
        The method of the backend.
    given : mapping
        Its arguments by name.
    bound : bool
        All outputs are there; in an eager call those that are missing are allocated.

    Raises
    ------
    TypeError
        One is no array, or one of another library or device.
    ValueError
        For another shape or dtype, memory in another order, an output that is read-only or shares memory with what it must not.
    """
    sizes: dict[Any, Any] = {"n_states": given["optimizer"].n_states} if operation == "update" else {}
    allocated = () if bound or operation in ("gather", "accumulate") else _ALLOCATED
    storage: np.dtype[Any] | None = None
    arrays: list[tuple[ArrayArgument, Array]] = []
    for argument in _table(operation, given):
        a: Any = given.get(argument.name)
        if a is None and (argument.optional or (argument.written and argument.name in allocated)):
            continue
        _check_kind(backend, argument.name, a)
        dtype = a.dtype
        if storage is None:
            storage = dtype
            _check_storage(backend, argument, dtype)
        if not _dtype_fits(argument.dtype, dtype, storage, backend):
            expected = _expected_dtype(argument.dtype, storage)
            raise ValueError(f"{argument.name} is an array of {dtype}; it must be one of {expected}")
        if not _shape_fits(argument.shape, a.shape, sizes):
            expected = _shape_text(argument.shape, sizes)
            raise ValueError(f"{argument.name} has shape {a.shape}; it must be {expected} in this {operation}")
        _check_memory(argument, a)
        arrays.append((argument, a))
    for (first, a), (second, b) in combinations(arrays, 2):
        if (first.written or second.written) and not _apart(first, a, second, b):
            name, other = (second.name, first.name) if second.written else (first.name, second.name)
            raise ValueError(
                f"{name} shares memory with {other}; give it memory of its own"
                + (f", or all of that of {' or '.join(second.over)}" if second.over else "")
            )


_ALLOCATED = ("out", "db", "value")  # by an eager call, where they are not given


def check_values(backend: Any, operation: str, given: Mapping[str, Any]) -> None:
    """Raise ValueError for numbers that mean no row or class, in an eager call.

    Values on a GPU are not looked at, since the host would have to wait for them: what they do is bounded by the kernels.
    """
    if operation == "bias_loss":
        y, (n, classes), samples = given["y"], given["z"].shape, given.get("samples")
        if samples is not None and samples < n:
            raise ValueError(
                f"samples is {samples!r}; the {n} rows of z are a part of so many, so it must be at least {n}"
            )
        # a negative number is a large one without its sign
        if y.ndim == 1 and y.dtype == _INT64 and backend.xp is np and y.view(np.uint64).max() >= classes:
            raise ValueError(
                f"y holds labels from {y.min()} to {y.max()}; for {classes} classes they are 0 to {classes - 1}"
            )
    elif operation == "clip" and not given["max_norm"] > 0:
        raise ValueError(f"max_norm is {given['max_norm']!r}; it must be a number > 0")
    elif operation == "dropout" and not 0 <= given["rate"] < 1:
        raise ValueError(f"rate is {given['rate']!r}; it must be in [0, 1)")


def _table(operation: str, given: Mapping[str, Any]) -> tuple[ArrayArgument, ...]:
    """Return the arrays of an operation; a few depend on its other arguments."""
    table = ARGUMENTS[operation]
    if operation == "bias_activation_backward":
        unread = "z" if given["activation"].needs == "h" else "h"
        return tuple(argument for argument in table if argument.name != unread)
    if operation == "bias_loss":
        y = given.get("y")
        if given["loss"].family == "softmax" and getattr(y, "ndim", 0) == 1:
            return (*table[:2], _INDICES, *table[3:])
    if operation == "update" and not given["optimizer"].n_states:
        return tuple(argument for argument in table if argument.name != "states")
    return table


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
    """Return dtypes by their names, which NumPy makes anew, and slowly, wherever a dtype is asked for its name."""
    return frozenset(map(check_dtype, names))


def _check_storage(backend: Any, argument: ArrayArgument, dtype: np.dtype[Any]) -> None:
    allowed = tuple(backend.dtypes)
    if dtype in _dtypes(allowed) or (argument.dtype == "data" and dtype == _INT64):
        return
    raise ValueError(
        f"{argument.name} is an array of {dtype}{'' if dtype.isnative else ' in another byte order'}; "
        f"{backend.device} computes in {', '.join(allowed)}"
    )


def _dtype_fits(kind: str, dtype: np.dtype[Any], storage: np.dtype[Any], backend: Any) -> bool:
    if kind in ("storage", "data"):
        return dtype is storage or dtype == storage
    if kind == "real":
        return dtype == real_of(storage)
    if kind == "either":
        return dtype == storage or dtype == real_of(storage)
    if kind == "weights":  # a copy in 16 bits
        return dtype.name in backend.dtypes and dtype.itemsize == 2
    return dtype == (_INT64 if kind == "int64" else _FLOAT64)


def _expected_dtype(kind: str, storage: np.dtype[Any]) -> str:
    if kind == "either":
        return " or ".join(dict.fromkeys([storage.name, real_of(storage).name]))
    return {"storage": storage.name, "data": storage.name, "real": real_of(storage).name, "weights": "16 bits"}.get(
        kind, kind
    )


def _shape_fits(expected: tuple[Any, ...], shape: tuple[int, ...], sizes: dict[Any, Any]) -> bool:
    """Compare a shape, and note the sizes that are met here first."""
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


def _check_memory(argument: ArrayArgument, a: Array) -> None:
    flags, name = a.flags, argument.name
    if a.size == 0:
        raise ValueError(f"{name} is empty: its shape is {a.shape}")
    if not (flags.c_contiguous or (argument.transposed and flags.f_contiguous)):
        also = " or the transpose of such an array" if argument.transposed else ""
        raise ValueError(
            f"{name} is not C-contiguous (strides {a.strides}); it must be{also}: xp.ascontiguousarray copies"
        )
    if isinstance(a, np.ndarray):
        if not flags.aligned:
            raise ValueError(f"{name} does not begin at a multiple of {a.itemsize} bytes; a copy does")
        if argument.written and not flags.writeable:
            raise ValueError(f"{name} is read-only; it is written to")


def _apart(first: ArrayArgument, a: Array, second: ArrayArgument, b: Array) -> bool:
    if a is b:
        return first.name in second.over
    if isinstance(a, np.ndarray):
        if not np.may_share_memory(a, b):
            return True
        return first.name in second.over and a.ctypes.data == b.ctypes.data
    begin, other = a.data.ptr, b.data.ptr
    if begin + a.nbytes <= other or other + b.nbytes <= begin:
        return True
    return first.name in second.over and begin == other
