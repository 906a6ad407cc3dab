"""What of a step can run side by side: the longest chain of its operations, and a second branch beside it.

Tasks conflict if one writes memory that the other reads or writes; conflicting tasks keep their order. All that a task declares is
that memory, scratch and workspace included, so whatever is recorded in a step is ordered correctly. The longest chain of
conflicting tasks is the main branch. Everything else, which the chain waits for later or not at all, is the side branch: mostly
the products dW_l, the sums after a loss and the schedule of the learning rate, all needed only by the update. A branch runs in the
order of the step. The branches follow from the step alone, and no bit of a result depends on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from gpubackprop.step.dataflow import Access, conflicts


class Place(NamedTuple):
    """Where a task runs: on the side branch or on the main one, after task ``wait`` of the other branch, if there is one."""

    side: bool
    wait: int | None


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
