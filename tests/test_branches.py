"""The two branches of a captured step: whatever conflicts keeps its order, and the longest chain waits for nothing else."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("cupy", reason="CuPy is not installed; make test-all installs it")

from gpubackprop.backends.cuda.branches import Place, schedule
from gpubackprop.step.dataflow import Access


def meet(a: tuple[tuple[int, int], ...], b: tuple[tuple[int, int], ...]) -> bool:
    return any(begin < other_end and other_begin < end for begin, end in a for other_begin, other_end in b)


def conflict(a: Access, b: Access) -> bool:
    return meet(a.writes, b.reads + b.writes) or meet(a.reads, b.writes)


def before(places: list[Place]) -> np.ndarray:
    """Return [i, j]: task i has ended when task j begins, by the order of the branches and what waits for what."""
    order = np.eye(len(places), dtype=bool)
    for j, place in enumerate(places):
        same = [i for i in range(j) if places[i].side == place.side]
        for i in (*same[-1:], *([] if place.wait is None else [place.wait])):
            assert i in same or places[i].side != place.side
            order[:, j] |= order[:, i]
    return order


def random_step(rng: np.random.Generator, tasks: int) -> list[Access]:
    def spans(count: int) -> tuple[tuple[int, int], ...]:
        begins = rng.integers(0, 24, count)
        return tuple((int(b), int(b + rng.integers(1, 6))) for b in begins)

    return [Access(spans(rng.integers(0, 3)), spans(rng.integers(1, 3)), int(rng.integers(1, 3))) for _ in range(tasks)]


def test_what_conflicts_keeps_its_order_on_two_branches() -> None:
    rng = np.random.default_rng(0)
    used = 0
    for _ in range(200):
        step = random_step(rng, int(rng.integers(1, 24)))
        places = schedule(step)
        order = before(places)
        for j, b in enumerate(step):
            for i, a in enumerate(step[:j]):
                assert order[i, j] or not conflict(a, b), (step, places)
        used += any(place.side for place in places)
    assert used > 100


def test_the_longest_chain_is_the_main_branch_and_waits_only_where_it_must() -> None:
    x, h, dh, dw, w, t = ((i, i + 1) for i in range(6))
    step = [
        Access((x, w), (h,)),  # h = x w
        Access((h,), (dw,)),  # a gradient
        Access((h,), (dh,)),
        Access((dh,), (x,), 2),
        Access((), (t,)),  # the schedule
        Access((dw, t), (w,)),  # the update
    ]
    main, side = Place(False, None), Place(True, None)
    assert schedule(step) == [main, Place(True, 0), main, main, side, side]
    step.append(Access((w, x), (h,)))  # the next pass waits for both
    assert schedule(step)[-1] == Place(False, 5)


def test_memory_that_overlaps_only_in_part_is_enough_and_none_is_not() -> None:
    assert schedule([Access((), ((0, 8),)), Access((), ((4, 12),))])[0] == Place(False, None)
    assert not schedule([Access((), ((0, 8),)), Access(((7, 9),), ((20, 21),))])[1].side
    assert [place.side for place in schedule([Access((), ((0, 8),)), Access(((8, 9),), ((20, 21),))])] == [True, False]
