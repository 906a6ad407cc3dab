"""The types of a kernel's parameters, declared once, as annotations; compilation, launches and the simulator follow from them.

    def kernel(z: P[S], out: P[S], scale: R, size: I) -> None: ...

An annotation names what varies with a dtype (``S``, ``R``) by a letter; :func:`declared` says what the letters stand for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import numpy as np

from gpubackprop.definitions import real_of
from gpubackprop.kernels.cuda.storage import storage_of

_T = TypeVar("_T")
_POINTER = "*"

P = Annotated[_T, _POINTER]
"""``P[S]``: a pointer to numbers of the type S."""
S = Annotated[Any, "S"]
"""A number as stored in memory: of the kernel's dtype."""
R = Annotated[Any, "R"]
"""A real number as the kernel computes with it: float32 for 16-bit dtypes, else the dtype."""
I = Annotated[Any, "i8"]  # noqa: E741
"""An int64."""
F8 = Annotated[Any, "f8"]
"""A float64, for any dtype."""
Y = Annotated[Any, "Y"]
"""A target: a class index or a real number."""
W = Annotated[Any, "W"]
"""A weight as stored in memory: 16 bits in mixed precision, else the dtype."""


def declared(kernel: Callable[..., Any], dtype: np.dtype[Any], **letters: str) -> dict[str, str]:
    """Return the storage types of a kernel's parameters by name, in their order; that of a pointer ends in ``*``.

    Parameters
    ----------
    kernel : callable
        Its parameters are annotated.
    dtype : numpy.dtype
        What S and R stand for.
    **letters : str
        What other letters stand for: ``Y="i8"``.
    """
    meaning = {"S": storage_of(dtype), "R": storage_of(real_of(dtype)), **letters}
    hints = get_type_hints(kernel, include_extras=True)
    types = {}
    for name in inspect.signature(kernel).parameters:
        if name not in hints:
            raise TypeError(f"the parameter {name} of a kernel has no annotation: P[S], R, I, ...")
        _, letter, *pointer = get_args(hints[name])
        types[name] = "".join([meaning.get(letter, letter), *pointer])
    return types
