"""What of a step can run side by side: the longest chain of its operations, and a second branch beside it.

Tasks conflict if one writes memory that the other reads or writes; conflicting tasks keep their order. All that a task declares is
that memory, scratch and workspace included, so whatever is recorded in a step is ordered correctly. The longest chain of
conflicting tasks is the main branch. Everything else, which the chain waits for later or not at all, is the side branch: mostly
the products dW_l, the sums after a loss and the schedule of the learning rate, all needed only by the update. A branch runs in the
order of the step. The branches follow from the step alone, and no bit of a result depends on them.
"""

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


class Place(NamedTuple):
    """Where a task runs: on the side branch or on the main one, after task ``wait`` of the other branch, if there is one."""

    side: bool
    wait: int | None


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


def schedule(accesses: Sequence[Access]) -> list[Place]:
    """Return where each task runs."""
    after = conflicts(accesses)
    length: list[int] = []  # launches of the longest chain that ends with a task
    for task, one in enumerate(accesses):
        length.append(one.nodes + max((length[other] for other in after[task]), default=0))

    main: set[int] = set()
    rest = set(range(len(accesses)))
    while rest:
        last = max(rest, key=lambda task: (length[task], task))
        main.add(last)
        rest = after[last]

    places = []
    waited = [-1, -1]  # the last task of the other branch that main, and side, have waited for
    for task in range(len(accesses)):
        side = task not in main
        wait = max((other for other in after[task] if (other not in main) != side), default=-1)
        places.append(Place(side, wait if wait > waited[side] else None))
        waited[side] = max(wait, waited[side])
    return places
