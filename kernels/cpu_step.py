"""Many steps in one compiled function: no Python between the operations of a step, nor between steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpubackprop.definitions import address
from gpubackprop.kernels.cpu_compile import compiled, digest_of, is_on_disk

Call = tuple[Callable[..., Any], tuple[Any, ...]]


class ComposedStep:
    """The calls of a step as one compiled function of (times, arguments...).

    Parameters
    ----------
    calls : sequence of (kernel, arguments)
        Kernels that :func:`gpubackprop.kernels.cpu_compile.compiled` made. Equal arguments are passed once.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        self.arguments: list[Any] = []
        places: dict[Any, int] = {}
        lines = []
        for number, (_, arguments) in enumerate(calls):
            names = []
            for argument in arguments:
                place = places.setdefault(_identity(argument), len(self.arguments))
                if place == len(self.arguments):
                    self.arguments.append(argument)
                names.append(f"a{place}")
            lines.append(f"        f{number}({', '.join(names)})")
        parameters = ", ".join(f"a{place}" for place in range(len(self.arguments)))
        source = f"def steps(times, {parameters}):\n    for _ in range(times):\n" + "\n".join(lines) + "\n"
        kernels = [kernel for kernel, _ in calls]
        namespace: dict[str, Any] = {f"f{number}": kernel for number, kernel in enumerate(kernels)}
        exec(compile(source, __file__, "exec"), namespace)
        self.function = compiled(namespace["steps"], source, [digest_of(kernel) for kernel in kernels])

    @property
    def is_cheap(self) -> bool:
        """True if it was compiled before, here or in another process, so that it only has to be loaded."""
        return bool(self.function.signatures) or is_on_disk(self.function)

    def __call__(self, times: int = 1) -> None:
        self.function(times, *self.arguments)


def _identity(argument: Any) -> Any:
    """Return a key that is equal for arguments that may be passed once: one memory, shape and order, or one number."""
    if isinstance(argument, np.ndarray):
        return address(argument), argument.shape, argument.strides, str(argument.dtype)
    return type(argument), argument
