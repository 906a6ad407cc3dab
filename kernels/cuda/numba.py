"""All imports from numba-cuda, in one place: its releases end with 0.30, while NumPy moves on.

NumPy 2.5 has no ``row_stack``, which numba-cuda uses when its target starts, and warns about a timedelta without a unit,
which it creates. Both are patched while its modules are imported; NumPy is unchanged afterwards.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import Any

import numpy as np
from numba import config

SIMULATED = bool(config.ENABLE_CUDASIM)
"""Kernels run in Numba's simulator (``NUMBA_ENABLE_CUDASIM=1``)."""

types: Any
intrinsic: Any
_lacks_row_stack = not hasattr(np, "row_stack")
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "The 'generic' unit", DeprecationWarning)
    if _lacks_row_stack:
        vars(np)["row_stack"] = np.vstack
    try:
        from numba import cuda

        if SIMULATED:
            types, intrinsic = None, None  # the simulator has neither
        else:
            import_module("numba.cuda.np.arrayobj")  # needs row_stack; else imported with the first kernel
            types, intrinsic = import_module("numba.cuda.types"), import_module("numba.cuda.extending").intrinsic
    finally:
        if _lacks_row_stack:
            del vars(np)["row_stack"]

__all__ = ["SIMULATED", "cuda", "intrinsic", "types"]
