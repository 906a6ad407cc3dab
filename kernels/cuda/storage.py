"""Numbers in memory: storage types by name, their compute types, and accesses to them.

The compute type is the storage type, but float32 for the 16-bit types: "f2" is IEEE half, "bf16" is bfloat16 behind a pointer to
uint16, rounded to nearest even with NaN kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

VECTOR_BYTES = 16
WARP = 32
STORAGE = {"f4": np.float32, "f8": np.float64, "f2": np.float16, "bf16": np.uint16, "u2": np.uint16, "i8": np.int64}
"""The element type of memory by the name of the storage; "u2" is 16 bits that are only copied."""


def compute_type(storage: str) -> Any:
    """Return the NumPy scalar type that a kernel computes with."""
    return np.float32 if storage in ("f2", "bf16") else STORAGE[storage]


def storage_of(dtype: np.dtype[Any]) -> str:
    """Return the storage name of an array's dtype: ``"f4"`` for float32."""
    return "bf16" if dtype.name == "bfloat16" else dtype.str[1:]


class Access(NamedTuple):
    """Vector and scalar loads and stores for one storage type and width."""

    load: Any
    """load(buffer, offset, p, i): buffer[offset : offset + width] = p[i : i + width]"""
    store: Any
    """store(p, i, buffer, offset): p[i : i + width] = buffer[offset : offset + width]"""
    load1: Any
    """load1(p, i) -> the element p[i]"""
    store1: Any
    """store1(p, i, x): p[i] = x"""
    rounded: Any
    """rounded(x) -> x as it would come back from memory"""
