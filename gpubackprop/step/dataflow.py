"""What must be done before what: the tasks of a step, by the memory that they read and write."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from gpubackprop.definitions import Array, address

Span = tuple[int, int]


class Access(NamedTuple):
    """The memory that a task reads and writes, each span from its first address to the one after its last.

    ``nodes`` is the number of launches.
    """

    reads: tuple[Span, ...]
    writes: tuple[Span, ...]
    nodes: int = 1


def spans(arrays: Iterable[Array]) -> tuple[Span, ...]:
    """Return the memory of contiguous arrays."""
    return tuple((address(a), address(a) + a.nbytes) for a in arrays)


def conflicts(accesses: Sequence[Access]) -> list[set[int]]:
    """Return for each task the earlier ones that it must run after; those that they must run after themselves may be left out."""
    edges = sorted({edge for one in accesses for span in (*one.reads, *one.writes) for edge in span})
    cell = {edge: number for number, edge in enumerate(edges)}  # memory between two edges
    writer: dict[int, int] = {}
    readers: dict[int, list[int]] = {}  # since it was last written

    def cells(memory: tuple[Span, ...]) -> Iterable[int]:
        return (c for begin, end in memory for c in range(cell[begin], cell[end]))

    result = []
    for task, one in enumerate(accesses):
        found = {writer[c] for c in (*cells(one.reads), *cells(one.writes)) if c in writer}
        for c in cells(one.writes):
            found.update(readers.get(c, ()))
        for c in cells(one.reads):
            readers.setdefault(c, []).append(task)
        for c in cells(one.writes):
            writer[c], readers[c] = task, []
        result.append(found)
    return result


def dependencies(accesses: Sequence[Access]) -> list[tuple[tuple[int, int], ...]]:
    """Return, for each task of a step that is repeated, which others must be done before it begins.

    Each is (number, 1) for a task of the same step, and (number, 0) for one of the step before; those that must be done before one
    of them anyway are left out.
    """
    n, before = len(accesses), list[int]()  # for each task of two steps, the bits of all that is done when it is
    result = []
    for after in conflicts([*accesses, *accesses]):
        done, needed = 0, []
        for other in sorted(after, reverse=True):  # the latest has waited for many others
            if not done >> other & 1:
                needed.append((other % n, int(other >= n)))
                done |= before[other] | 1 << other
        before.append(done)
        result.append(tuple(needed))
    return result[n:]
