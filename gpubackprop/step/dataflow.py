"""What must be done before what: the operations of a step, by the memory that they read and write."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gpubackprop.definitions import Array, address

Arrays = tuple[Sequence[Array], Sequence[Array]]


def dependencies(operations: Sequence[Arrays]) -> list[tuple[tuple[int, int], ...]]:
    """Return, for each operation of a step that is repeated, which others must be done before it begins.

    An operation is given by the arrays that it reads and those that it writes. Each result is (number, 1) for an operation of the
    same step, and (number, 0) for one of the step before: those that write what this one reads or writes, or read what it
    writes, without those that must be done before one of them anyway.
    """
    n, clashes = len(operations), _clashes(operations)
    before: list[int] = []  # for each operation of two steps, the bits of all that is done when it is
    result = []
    for v in range(2 * n):
        done, direct = 0, []
        for u in range(v - 1, max(v - n, 0) - 1, -1):  # the latest first: it has waited for many others
            if clashes[u % n, v % n] and not done >> u & 1:
                direct.append((u % n, int(u >= n)))
                done |= before[u] | 1 << u
        before.append(done)
        result.append(tuple(direct))
    return result[n:]


def _clashes(operations: Sequence[Arrays]) -> np.ndarray:
    """Return whether one operation writes to memory that another reads or writes, for each pair of them."""
    read, written = (
        np.array([(address(a), address(a) + a.nbytes, k) for k, of_one in enumerate(each) for a in of_one], np.int64)
        for each in zip(*operations, strict=True)
    )
    touched = np.concatenate([read, written])
    overlap = (written[:, None, 0] < touched[None, :, 1]) & (touched[None, :, 0] < written[:, None, 1])
    first, second = np.nonzero(overlap)
    found = np.zeros((len(operations), len(operations)), bool)
    found[written[first, 2], touched[second, 2]] = True
    return found | found.T
