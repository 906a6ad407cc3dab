"""Philox4x32-10: random numbers from a counter, so that a dropout mask is the same on every device and is never stored.

Source: Salmon, Moraes, Dror and Shaw (2011), "Parallel random numbers: as easy as 1, 2, 3", section 3.2; the known-answer
vectors of Random123 are in the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpubackprop.definitions import Array


def define_philox(u32: Any, u64: Any) -> Callable[..., Any]:
    """Return philox(c0, c1, c2, c3, k0, k1) -> four uint32, for scalars or arrays of uint32.

    Parameters
    ----------
    u32, u64 : callable
        Conversions to uint32 (keeping the low bits) and uint64 for the type of the computation.
    """
    m0, m1, high = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57), np.uint64(32)
    w0, w1 = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)

    def philox(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> Any:
        for _ in range(10):
            p0 = m0 * u64(c0)
            p1 = m1 * u64(c2)
            c0 = u32(u32(p1 >> high) ^ c1 ^ k0)
            c1 = u32(p1)
            c2 = u32(u32(p0 >> high) ^ c3 ^ k1)
            c3 = u32(p0)
            k0 = u32(k0 + w0)
            k1 = u32(k1 + w1)
        return c0, c1, c2, c3

    return philox


def split_seed(seed: int) -> tuple[int, int]:
    """Return the low and the high 32 bits of a seed: the key."""
    return seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF


def keep_threshold(rate: float) -> int:
    """Return the number below which a random uint32 keeps its element: (1 - rate) 2^32, at most 2^32 - 1."""
    return min(int((1.0 - rate) * 2.0**32), 0xFFFFFFFF)


def random_uint32(n: int, seed: int, step: int, stream: int, first_block: int = 0) -> Array:
    """Return n random uint32: element e is word e mod 4 of the block with counter (first_block + e // 4, step, stream), key seed.

    Shapes
    ------
    returns (n,) uint32
    """
    philox = define_philox(lambda x: x.astype(np.uint32), lambda x: x.astype(np.uint64))
    block = np.arange(first_block, first_block - (-n // 4), dtype=np.uint64)
    word = np.ones(1, np.uint32)
    low, high = split_seed(seed)
    words = philox(
        block.astype(np.uint32),
        (block >> np.uint64(32)).astype(np.uint32),
        word * np.uint32(step & 0xFFFFFFFF),
        word * np.uint32(stream),
        word * np.uint32(low),
        word * np.uint32(high),
    )
    return np.stack(words, axis=1).ravel()[:n]
