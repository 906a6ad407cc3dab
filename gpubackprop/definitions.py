"""How a formula is defined once, on scalars, and used on every device.

A definition is a function ``define(real, m, **parameters)`` that returns scalar functions. ``real`` is the
type of its constants (``numpy.float32`` or ``numpy.float64``) and ``m`` is a :class:`Math`: the functions the
formula may use. The CPU and CUDA kernels compile the scalar functions; the reference backend calls same
functions on whole arrays, with ``m = NUMPY``.

Two rules keep a formula fast and safe everywhere: every constant goes through ``real(...)`` (a bare ``1.0`` would
put double-precision instructions into a float32 kernel), and a choice is written ``m.where(condition, a, b)``.
Comparisons are turned so that NaN stays NaN.
"""

from __future__ import annotations

import importlib
import inspect
import math
import operator
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import wraps
from types import CellType, FunctionType
from typing import Any, NamedTuple, Self, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from gpubackprop.code_digest import Digest, Watch, fingerprint

Array: TypeAlias = Any
"""A NumPy or CuPy array; the docstring gives its shape."""

DTYPES = ("float32", "float64", "bfloat16", "float16")
ALIGNMENT = 64  # bytes: a cache line, and the widest vector register


def address(a: Array) -> int:
    """Return where an array's memory begins: arrays at the same address share memory."""
    return int(a.ctypes.data) if isinstance(a, np.ndarray) else int(a.data.ptr)


def aligned_zeros(shape: tuple[int, ...], dtype: npt.DTypeLike) -> np.ndarray:
    """Return a new array of zeros that begins at a cache line."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize  # Python's integers: NumPy's would wrap around
    block = np.zeros(nbytes + ALIGNMENT, np.uint8)
    first = -block.ctypes.data % ALIGNMENT
    return block[first : first + nbytes].view(dtype).reshape(shape)


class Math(NamedTuple):
    """The functions that a definition may use: of one real argument, a choice without a branch, a whole power, and x y + z.

    ``erfcx(x)`` is e^(x^2) erfc(x) for x >= 0, which neither cancels nor underflows where erf(x) nears 1. ``power(x, n)`` is x^n in
    float64 for numbers x and n, n whole and >= 0; it is for values computed once per step. ``fma(x, y, z)`` is x y + z in one
    instruction and one rounding; on the CPU, whose bits are guaranteed, an operation is fused only where ``fma`` is written. The
    reference backend rounds twice.
    """

    exp: Callable[[Any], Any]
    expm1: Callable[[Any], Any]
    log: Callable[[Any], Any]
    log1p: Callable[[Any], Any]
    tanh: Callable[[Any], Any]
    sin: Callable[[Any], Any]
    cos: Callable[[Any], Any]
    sqrt: Callable[[Any], Any]
    fabs: Callable[[Any], Any]
    erf: Callable[[Any], Any]
    erfcx: Callable[[Any], Any]
    where: Callable[[Any, Any, Any], Any]
    power: Callable[[Any, Any], Any]
    fma: Callable[[Any, Any, Any], Any]


def _erf(x: Any) -> Any:
    from scipy.special import erf  # SciPy is loaded only where erf is used

    return erf(x)


def _erfcx(x: Any) -> Any:
    from scipy.special import erfcx

    return erfcx(x)


def power(x: Any, n: Any) -> Any:
    """Return x^n by squaring: only products, so the bits are the same on every device; their libraries differ."""
    result, k = 1.0, int(n)
    while k > 0:
        if k & 1:
            result = result * x
        x, k = x * x, k >> 1
    return result


def _fma(x: Any, y: Any, z: Any) -> Any:
    return x * y + z


NUMPY = Math(
    exp=np.exp,
    expm1=np.expm1,
    log=np.log,
    log1p=np.log1p,
    tanh=np.tanh,
    sin=np.sin,
    cos=np.cos,
    sqrt=np.sqrt,
    fabs=np.fabs,
    erf=_erf,
    erfcx=_erfcx,
    where=np.where,
    power=power,
    fma=_fma,
)


def check_dtype(dtype: npt.DTypeLike) -> np.dtype[Any]:
    """Return ``dtype`` as a NumPy dtype if the kernels exist for it.

    Raises
    ------
    ValueError
        It is not one of float32, float64, bfloat16, float16.
    """
    try:
        if str(dtype) == "bfloat16":
            import ml_dtypes

            dtype = ml_dtypes.bfloat16
        result = np.dtype(dtype)
    except Exception:  # an object that is not a dtype may raise anything
        result = None
    if result is None or result.name not in DTYPES:
        raise ValueError(f"unknown dtype {shown(dtype)}; choose from {', '.join(DTYPES)}")
    return result


def plain(value: Any) -> Any:
    """Return a value with NumPy's scalars, and those in tuples and lists, as Python's own numbers, for JSON."""
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        number = value.item()
        return (
            float(number) if isinstance(number, np.floating) else number
        )  # of longer numbers, item() makes the same again
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    return value


def one_line(text: str, most: int = 80) -> str:
    """Return a text on one line, shortened."""
    text = " ".join(text[: 10 * most].split())
    return text if len(text) <= most else f"{text[:most]}..."


def shown(value: Any, most: int = 80) -> str:
    """Return any value as messages show it: on one line, shortened."""
    try:
        return one_line(repr(value), most)
    except Exception:  # a number of too many digits, or an object whose repr fails
        return f"<{type(value).__name__}>"


def check_number(name: str, value: Any, within: Callable[[float], bool], allowed: str) -> float:
    """Return a real number as Python's own; NumPy's scalars are numbers, truth values and text are not.

    Raises
    ------
    ValueError
        ``within(value)`` is false, or ``value`` is not a number: "name is value; it must be allowed".
    """
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, int | float) or not within(number):
        raise ValueError(f"{name} is {shown(number)}; it must be {allowed}")
    if isinstance(number, int) and abs(number) >= 2**1024:
        raise ValueError(f"{name} is {shown(number)}, which is too large for float64")
    return number


def check_count(name: str, value: Any, of: str = "", least: int = 1) -> int:
    """Return a whole number >= ``least``; ``of`` completes the message, as in "a whole number of steps >= 1"."""
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, int) or number < least:
        raise ValueError(f"{name} is {shown(number)}; it must be a whole number{of} >= {least}")
    if number >= 2**63:
        raise ValueError(f"{name} is {shown(number)}; it must be a whole number{of} below 2^63")
    return number


def check_seed(value: Any) -> int:
    """Return a seed in [0, 2^64)."""
    allowed = "a whole number in [0, 2^64)"
    return int(check_number("seed", value, lambda x: isinstance(x, int) and 0 <= x < 2**64, allowed))


def check_flag(name: str, value: Any) -> bool:
    """Return True or False, as Python's own."""
    flag = plain(value)
    if not isinstance(flag, bool):
        raise ValueError(f"{name} is {shown(flag)}; it must be True or False")
    return flag


def constant(real: Any, name: str, value: float) -> Any:
    """Return real(value), a number of a formula.

    Raises
    ------
    ValueError
        In this dtype it would be infinite, or 0 although it is not.
    """
    with np.errstate(over="ignore", under="ignore"):
        number = real(value)
    if not np.isfinite(number) or (number == 0) != (value == 0):
        raise ValueError(
            f"{name} is {shown(value)}, which {np.dtype(real)} has no number for: it would be {float(number)}"
        )
    return number


PRECISIONS = ("float32", "tf32")


def check_precision(matmul_precision: str) -> None:
    """Raise ValueError unless ``matmul_precision`` is "float32" or "tf32"."""
    if not isinstance(matmul_precision, str) or matmul_precision not in PRECISIONS:
        raise ValueError(f"unknown matmul_precision {shown(matmul_precision)}; choose from {', '.join(PRECISIONS)}")


def real_of(dtype: npt.DTypeLike) -> np.dtype[Any]:
    """Return the dtype of arithmetic: float32 for 16-bit arrays, else the same."""
    dtype = np.dtype(dtype)
    return np.dtype(np.float32) if dtype.itemsize == 2 else dtype


def eps_of(dtype: npt.DTypeLike) -> float:
    """Return the distance from 1 to the next number of a dtype."""
    return {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 2.0**-23, "float64": 2.0**-52}[np.dtype(dtype).name]


@dataclass(frozen=True)
class Definition:
    """A named formula and the values of its parameters.

    Parameters
    ----------
    name : str
        The registry's name.
    define : callable
        ``define(real, m, **parameters)``, see the module's docstring.
    parameters : tuple of (str, value)
        Values that differ from the defaults of ``define``.
    """

    name: str
    define: Callable[..., Any] = field(repr=False)
    parameters: tuple[tuple[str, Any], ...] = ()

    def __call__(self, **parameters: Any) -> Self:
        """Return this definition with other parameters, as in ``leaky_relu(negative_slope=0.2)``.

        Raises
        ------
        TypeError
            A parameter does not exist.
        """
        allowed = list(inspect.signature(self.define).parameters)[2:]
        for name in parameters:
            if name not in allowed:
                raise TypeError(f"{self.name} has no parameter {name!r}; it takes {', '.join(allowed) or 'none'}")
        changed = dict(self.parameters) | {name: plain(value) for name, value in parameters.items()}
        result = replace(self, parameters=tuple(sorted(changed.items())))
        result.scalars(np.dtype(np.float64), NUMPY)  # a bad value is an error here, not in a kernel
        return result

    def __deepcopy__(self, memo: Any) -> Self:
        return self  # it never changes

    def __reduce__(self) -> Any:
        """Pickle by the place of ``define`` in its module, as Python's own functions are; a process that reads it imports that."""
        module, path = self.define.__module__, self.define.__qualname__
        try:
            found = operator.attrgetter(path)(sys.modules[module])
        except (AttributeError, KeyError):
            found = None
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "define"}
        if isinstance(found, Definition) and found.define is self.define:  # a decorator has replaced it
            values = {name: value for name, value in values.items() if getattr(found, name) != value}
        elif found is not self.define:
            raise pickle.PicklingError(
                f"{type(self).__name__.lower()} {self.name!r} cannot be pickled: {module}.{path} is not found by that name; "
                "define it at the top level of a module"
            )
        return _restore, (type(self), module, path, values)

    def scalars(self, dtype: np.dtype[Any], m: Math) -> Any:
        """Return the scalar functions for constants of ``dtype`` and the functions ``m``."""
        return self.define(dtype.type, m, **dict(self.parameters))

    @property
    def origin(self) -> Any:
        """What :meth:`scalars` depends on besides its arguments; None if that is too much to watch."""
        return self.define, self.parameters

    @property
    def label(self) -> str:
        """The name with parameters, as in ``huber(delta=2.0)``."""
        values = ", ".join(f"{name}={value}" for name, value in self.parameters)
        return f"{self.name}({values})" if values else self.name

    def made_of(self, dtype: np.dtype[Any], m: Math) -> tuple[Any, ...]:
        """Return everything that kernels for a dtype read of this definition."""
        return self.name, self.scalars(real_of(dtype), m)

    @property
    def fingerprint(self) -> Digest:
        """A digest of the formula with its parameters: the same in every process, changed by any edit of what it reads."""
        return fingerprint(self.made_of(np.dtype(np.float64), NUMPY))


def _check_compilable(item: Any) -> None:
    """Raise ValueError where a scalar function reads ``m`` itself, which compiled code cannot."""
    for one in item if isinstance(item, tuple) else ():
        _check_compilable(one)
    if not isinstance(item, FunctionType) or item.__closure__ is None:
        return
    for name, cell in zip(item.__code__.co_freevars, item.__closure__, strict=True):
        if cell != CellType() and isinstance(cell.cell_contents, Math):
            used = [attribute for attribute in item.__code__.co_names if attribute in Math._fields] or ["exp"]
            raise ValueError(
                f"{item.__name__} reads {name}.{used[0]}, but it is compiled with functions alone: write, before def "
                f"{item.__name__}, " + ", ".join(f"{one} = {name}.{one}" for one in used)
            )


Made = TypeVar("Made")


def per_definition(math: Callable[[np.dtype[Any]], Math]) -> Callable[[Callable[..., Made]], Callable[..., Made]]:
    """Cache ``make(definition, dtype, ...)`` by what the definition computes at the call, not by object identity.

    A definition may read a global, a module's constant or an attribute that has changed since. ``math`` returns the functions
    that definitions are given for a dtype.
    """

    def decorate(make: Callable[..., Made]) -> Callable[..., Made]:
        origins: dict[Any, tuple[Watch, Digest]] = {}
        watches: dict[Any, Watch] = {}
        made: dict[Any, Made] = {}

        def digest_of(definition: Any, dtype: np.dtype[Any]) -> Digest:
            m = math(dtype)
            parts = definition.made_of(dtype, m)
            watch = watches.get((definition, dtype))
            if watch is None or not watch.holds_for(parts):
                _check_compilable(parts)
                known = {id(function): name for name, function in m._asdict().items()}
                watch = watches[definition, dtype] = Watch(parts, known)
            return watch.digest

        @wraps(make)
        def get(definition: Any, dtype: np.dtype[Any], *rest: Any, **options: Any) -> Made:
            origin, found = definition.origin, origins.get((definition, dtype))
            if found is not None and found[0].holds_for(origin):
                digest = found[1]  # without making the scalar functions
            elif origin is None or (found is not None and not found[0].possible):
                digest = digest_of(definition, dtype)
            else:
                watch = Watch(origin, {}, results=True)  # before they are made, so that no change is missed
                digest = digest_of(definition, dtype)
                origins[definition, dtype] = watch, digest
            key = digest, dtype, rest, tuple(sorted(options.items()))
            if key not in made:
                made[key] = make(definition, dtype, *rest, **options)
            return made[key]

        return get

    return decorate


def _restore(kind: type[Definition], module: str, path: str, values: dict[str, Any]) -> Definition:
    found = operator.attrgetter(path)(importlib.import_module(module))
    return replace(found, **values) if isinstance(found, Definition) else kind(define=found, **values)


@per_definition(lambda dtype: NUMPY)
def version_of(definition: Definition, dtype: np.dtype[Any]) -> object:
    """Return an object that is replaced when a definition computes something else than before."""
    return object()
