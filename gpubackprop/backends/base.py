"""The base class of all backends: a device, its memory, and one eager method for each operation of the table.

A backend says how it binds an operation to arrays and how it compiles a step; what the operations mean, and what their arrays
must be, is in :mod:`gpubackprop.step.operations`. Arrays are checked in eager calls and where a step is compiled, never while it
runs.

An eager call allocates the outputs that are omitted. Given all outputs, a method allocates only scratch memory, which a compiled
step owns and an eager call on a GPU takes from CuPy's pool. Only ``to_numpy``, ``synchronize`` and ``asarray`` wait for the device.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from gpubackprop.backends.checks import check_arrays, check_values
from gpubackprop.definitions import DTYPES, Array
from gpubackprop.step import operations as table
from gpubackprop.step.operations import OPERATIONS, Operation

# for steps written by hand: the entries of the small arrays
from gpubackprop.step.state import C1, C2, CURSOR, FACTOR, GOOD, NORM, RATE, SCALE, SKIP, STEPS
from gpubackprop.step.step import Run, Step

if TYPE_CHECKING:
    import numpy as np

__all__ = ["C1", "C2", "CURSOR", "FACTOR", "GOOD", "NORM", "RATE", "SCALE", "SKIP", "STEPS", "Backend", "Call", "Run"]

Call = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function and its arguments."""


def eager(kind: type[Operation]) -> Callable[..., Any]:
    """Return the method of a backend that checks an operation's arrays, allocates omitted outputs, and runs it."""

    def method(self: Backend, *arguments: Any, **named: Any) -> Any:
        return self.run(kind(*arguments, **named)).result

    own = [p for p in inspect.signature(kind).parameters.values() if p.name != "phase"]
    method.__name__, method.__qualname__, method.__doc__ = kind.name, f"Backend.{kind.name}", kind.__doc__
    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    method.__signature__ = inspect.Signature([this, *own])  # type: ignore[attr-defined]
    return method


class Backend(ABC):
    """One device, and the operations of forward, loss, backward and update on it.

    A custom backend has ``device``, ``asarray``, ``to_numpy``, ``empty``, ``zeros``, ``bind`` and ``compile``; everything else has
    a default. The simplest is a subclass of :class:`gpubackprop.backends.reference.ReferenceBackend` that
    overrides ``do_matmul(self, o)``, ....
    """

    def __init_subclass__(cls) -> None:
        for name in OPERATIONS.keys() & vars(cls).keys():
            raise TypeError(
                f"{cls.__name__}.{name} would be used in eager calls and not in steps; override bind, or do_{name} of the reference"
            )

    device: str
    """``"reference"``, ``"cpu"`` or ``"cuda:0"``."""
    xp: ModuleType
    """The array module, ``numpy`` or ``cupy``, for code that is not hot."""
    dtypes: tuple[str, ...] = DTYPES
    """The dtypes a model may have here."""
    matmul_precision: str = "float32"
    """How float32 matrices are multiplied."""
    precisions: ClassVar[tuple[str, ...]] = ("float32",)
    """The precisions it supports."""
    remake: tuple[Any, ...] = ()
    """What pickle calls to get the backend in another process; set by ``get_backend``."""

    @cached_property
    def decides_bits(self) -> dict[str, str]:
        """What determines the bits of a result besides data, seed and architecture: hardware and versions."""
        return {}

    @abstractmethod
    def asarray(self, a: Any, dtype: npt.DTypeLike | None = None) -> Array:
        """Return ``a`` as a C-contiguous array on this device, copied only if it must be."""

    @abstractmethod
    def to_numpy(self, a: Array) -> np.ndarray:
        """Return ``a`` on the host, after waiting for the work that computes it."""

    def count_not_finite(self, a: Array) -> int:
        """Return how many numbers are NaN or infinite."""
        with np.errstate(over="ignore", invalid="ignore"):
            # finite only if every term is; or it overflows: then look at every element
            total = float(a.sum(dtype=np.float64))
        return 0 if np.isfinite(total) else int((~self.xp.isfinite(a)).sum())

    @abstractmethod
    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Return a new, uninitialized array on this device."""

    @abstractmethod
    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Return a new array of zeros on this device, aligned to 64 bytes, or raise DeviceMemoryError."""

    @abstractmethod
    def bind(self, operation: Operation) -> Call:
        """Return the function of an operation on arrays, and its arguments; all that can be decided once is decided here."""

    @abstractmethod
    def compile(self, step: Step) -> Run:
        """Return a function that runs the step's operations; all that can be decided once is decided here."""

    def rebind(self, run: Run, sources: Mapping[int, Array]) -> bool:
        """Let ``gather`` operations of a compiled step, by their numbers, read other arrays; return whether the device can."""
        return False

    def execute(self, operation: Operation) -> None:
        """Run an operation whose arrays are known to fit."""
        function, arguments = self.bind(operation)
        function(*arguments)

    def prepare(self, operations: Sequence[Operation]) -> list[Callable[[], None]]:
        """Return functions that run operations on these arrays repeatedly, with their current formulas.

        Any thread may call them, one at a time.
        """
        return [partial(self.execute, operation) for operation in operations]

    def run(self, operation: Operation) -> Operation:
        """Check an operation's arrays, allocate omitted outputs, run it, and return it with all its arrays."""
        allocated = check_arrays(self, operation)
        check_values(self, operation)
        if allocated:
            operation = operation.with_arrays(allocated)
        self.execute(operation)
        return operation

    matmul = eager(table.Matmul)
    bias_activation_forward = eager(table.BiasActivationForward)
    bias_activation_backward = eager(table.BiasActivationBackward)
    bias_loss = eager(table.BiasLoss)
    normalize_weights = eager(table.NormalizeWeights)
    dropout = eager(table.Dropout)
    gather = eager(table.Gather)
    accumulate = eager(table.Accumulate)
    clip = eager(table.Clip)
    advance = eager(table.Advance)
    update = eager(table.Update)

    # Optional abilities.

    def synchronize(self) -> None:
        """Wait until the device has done all work queued so far."""
        return

    def memory(self, wanted: int = 0) -> tuple[int, int] | None:
        """Return the bytes that can still be allocated on this device and its total, or None where no limit is known.

        The host has no known limit, nor a GPU where CuPy allocates through another library or from managed memory. If
        ``wanted`` bytes are free only together with the blocks that the pool caches, the pool frees them first: then all free
        memory can be had in any sizes.
        """
        return None

    def active(self) -> AbstractContextManager[Any]:
        """Return a context in which this device is the current one; see :mod:`gpubackprop.backends.current`."""
        return _HOST

    def queue(self) -> Hashable:
        """Return what orders work queued on this device now, or None where all work runs in order."""
        return None

    def __deepcopy__(self, memo: Any) -> Backend:
        return self  # shared by all networks of a process

    def __reduce__(self) -> Any:
        return self.remake or (type(self), ())


_HOST: AbstractContextManager[Any] = nullcontext()
