"""A step as one CUDA graph: captured once, replayed with one launch; or 2, 4, 8, ... steps in one graph.

Everything that changes from step to step lives in arrays on the device, so the same graph serves every step, and a graph of K steps
is the same operations K times. A second branch runs beside the longest chain of operations, see
:mod:`gpubackprop.backends.cuda.branches`; it may begin with the next step while this one ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from operator import methodcaller
from typing import TYPE_CHECKING, Any

import cupy

from gpubackprop.backends.cuda.branches import Place, schedule
from gpubackprop.step.dataflow import Access

if TYPE_CHECKING:
    from gpubackprop.backends.cuda.nvtx import Ranged
    from gpubackprop.step import Step

Call = tuple[Callable[..., Any], tuple[Any, ...]]

NODES = 512  # of a graph of several steps: beyond it the launch is no longer the cost of a step
MOST_STEPS = 32  # steps in a graph, so that Ctrl-C and the progress display need not wait long


class CapturedStep:
    """Runs a step, or many, by launching graphs on CuPy's current stream.

    Parameters
    ----------
    device : cupy.cuda.Device
    calls : sequence of (function, arguments)
        The operations; they must not allocate or wait, and launch only loaded kernels.
    accesses : sequence of Access
        The memory of each call.
    step : Step
        Kept, since the calls hold only the addresses of its arrays.
    ranged : callable
        See :mod:`gpubackprop.backends.cuda.nvtx`.

    Attributes
    ----------
    steps_per_launch : int
        The most steps in a graph, a power of two.
    """

    def __init__(
        self, device: Any, calls: Sequence[Call], accesses: Sequence[Access], step: Step, ranged: Ranged[Any]
    ) -> None:
        self.device, self.calls, self.accesses, self.step = device, calls, accesses, step
        # for capture, which the default stream does not allow
        self.branches = [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]
        self._launch = ranged("graph launch", methodcaller("launch"))
        most = min(MOST_STEPS, NODES // sum(access.nodes for access in accesses))
        self.steps_per_launch = 1 << (max(1, most).bit_length() - 1)
        self._graphs: dict[int, Any] = {}

    def __call__(self, times: int = 1) -> None:
        """Queue the step ``times`` times, in graphs of as many steps as the binary digits of ``times`` say."""
        with self.device:
            many, rest = divmod(times, self.steps_per_launch)
            for _ in range(many):
                self._launch(self.graph(self.steps_per_launch))
            for digit in reversed(range(rest.bit_length())):
                if rest >> digit & 1:
                    self._launch(self.graph(1 << digit))

    def places(self, steps: int = 1) -> list[Place]:
        """Return the branch of each call of some steps, one step after another."""
        return schedule([*self.accesses] * steps)

    def graph(self, steps: int) -> Any:
        """Return the graph of some steps, captured at the first call."""
        if steps not in self._graphs:
            main = self.branches[0]
            with self.device, main:
                main.begin_capture()
                try:
                    self._queue_on_branches(steps)
                except BaseException:
                    with contextlib.suppress(Exception):  # the first error is the one to report
                        main.end_capture()
                    raise
                self._graphs[steps] = main.end_capture()
        return self._graphs[steps]

    def _queue_on_branches(self, steps: int) -> None:
        """Queue some steps on both streams; the side begins after what is queued on the main one, and ends before what follows."""
        places = self.places(steps)
        events = {place.wait: cupy.cuda.Event(disable_timing=True) for place in places if place.wait is not None}
        self._join(1, 0)
        for task, ((function, arguments), place) in enumerate(zip([*self.calls] * steps, places, strict=True)):
            stream = self.branches[place.side]
            if place.wait is not None:
                stream.wait_event(events[place.wait])
            with stream:
                function(*arguments)
            if task in events:
                events[task].record(stream)
        self._join(0, 1)

    def _join(self, waiting: int, other: int) -> None:
        """Let a branch wait for what is queued on the other."""
        event = cupy.cuda.Event(disable_timing=True)
        event.record(self.branches[other])
        self.branches[waiting].wait_event(event)

    def eagerly(self) -> None:
        """Queue the step once, one operation at a time, on CuPy's current stream: the same kernels, the same bits."""
        with self.device:
            for function, arguments in self.calls:
                function(*arguments)
