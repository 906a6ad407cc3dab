"""Arrays of the host: the common part of the backends that compute on it."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from gpubackprop.backends.base import Backend
from gpubackprop.backends.memory import not_allocated
from gpubackprop.definitions import Array, aligned_zeros


class HostBackend(Backend):
    """See :class:`gpubackprop.backends.base.Backend`."""

    xp: ModuleType = np

    def asarray(self, a: Any, dtype: npt.DTypeLike | None = None) -> Array:
        result = np.ascontiguousarray(a, dtype=dtype)
        # unaligned memory and other byte orders are copied, so that kernels can read them
        return (
            result if result.flags.aligned and result.dtype.isnative else result.astype(result.dtype.newbyteorder("="))
        )

    def to_numpy(self, a: Array) -> np.ndarray:
        return np.asarray(a)

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        return np.empty(shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        try:
            return aligned_zeros(shape, dtype)
        except MemoryError:
            needed = math.prod(shape) * np.dtype(dtype).itemsize
            advice = "; a smaller batch or network needs less"
            raise not_allocated(f"an array of shape {shape}", needed, self.device, advice) from None
