"""The fused kernels: cases of the table of operations, and the same in plain NumPy or CuPy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from gpubackprop.backends.cases import CASES, REFERENCE, Arrays, OpCase, copied
from gpubackprop.bench.unfused import UNFUSED
from gpubackprop.definitions import aligned_zeros, check_dtype, real_of
from gpubackprop.step.operations import Operation

PASSES = tuple(f"bias_activation_{way} {name}" for name in ("relu", "tanh") for way in ("forward", "backward"))
FEW = (*PASSES, "bias_loss softmax_cross_entropy", "update Adam", "clip", "dropout", "gather")
SEED = 1


@dataclass
class Kernel:
    """A case of an operation at one shape, and the same in the array module's own operations.

    Parameters
    ----------
    name : str
    case : OpCase
    shape : tuple of int
    dtype : str
    backend : Backend
    unfused : callable
        Does the same to the arrays, by name, with the array module's own operations.
    expected : callable, optional
        Does the same to the arrays, for the comparison, if ``unfused`` gives other numbers.
    """

    name: str
    case: OpCase
    shape: tuple[int, ...]
    dtype: str
    backend: Any
    unfused: Callable[[Arrays], None]
    expected: Callable[[Arrays], None] | None = None

    def make(self) -> Arrays:
        """Return new arrays on the device."""
        made = self.case.arrays(np.random.default_rng(SEED), self.shape, self.dtype)
        if self.case.absent == ("h",):  # plain operations have kept it
            made["h"] = self.case.numbers["activation"].phi(made["z"])
        return self.again(copied(made, self.backend.asarray))

    def again(self, a: Arrays) -> Arrays:
        """Return copies of the arrays, aligned as those of a step."""
        return copied(a, _aligned)

    def operation(self, a: Arrays) -> Operation:
        """Return the operation on the arrays."""
        return self.case.operation(a)

    def wide(self, a: Arrays) -> Arrays:
        """Return copies of the arrays, those of real numbers in float64."""
        return copied(a, self._wide)

    def _wide(self, array: Any) -> Any:
        if array.dtype.kind == "i":
            return array.copy()
        if array.dtype.itemsize == 2:  # CuPy does not convert every 16-bit type to float64
            return self.backend.asarray(self.backend.to_numpy(array).astype(np.float64))
        return array.astype(np.float64)


def kernels_of(backend: Any, dtype: str, shape: tuple[int, int], *, few: bool = False) -> Iterator[Kernel]:
    """Yield all kernels for a dtype, or some; where they take flat arrays, these have the elements of the shape."""
    real = real_of(check_dtype(dtype)).name
    for name in FEW if few else UNFUSED:
        case = (dtype != real and CASES.get(f"{name}, 16 bits")) or CASES[name]
        own = shape if len(case.shapes[-1]) == 2 else (shape[0] * shape[1],)
        plain = partial(UNFUSED[name], backend.xp)
        kernel = Kernel(name, case, own, dtype if dtype in case.dtypes else real, backend, plain)
        if name == "dropout":  # its plain version has other random numbers
            kernel.expected = partial(_on_the_host, kernel)
        yield kernel


def _aligned(array: Any) -> Any:
    if not isinstance(array, np.ndarray):
        return array.copy()
    made = aligned_zeros(array.shape, array.dtype)
    made[...] = array
    return made


def _on_the_host(kernel: Kernel, a: Arrays) -> None:
    on_host = copied(a, kernel.backend.to_numpy)
    REFERENCE.run(kernel.case.operation(on_host))
    for name in kernel.case.outputs:
        a[name][...] = kernel.backend.asarray(on_host[name])


def disagreement(kernel: Kernel, given: Arrays, found: Arrays, expected: Arrays, times: float) -> str | None:
    """Return how arrays differ from the expected ones, or None if they agree.

    The arrays given are those before; they and those expected are in float64. ``times`` multiplies the bound of
    the case, since the expression differs.
    """
    xp, bounds = kernel.backend.xp, kernel.case.bounds(kernel.dtype, given, expected)
    for name in kernel.case.outputs:
        difference = xp.abs(kernel.wide({name: found[name]})[name] - expected[name])
        over = float(xp.max(difference / (times * bounds[name] + 1e-30)))
        if not over <= 1:  # NaN does not agree either
            return f"{name} differs by {over:.3g} times what rounding explains"
    return None
