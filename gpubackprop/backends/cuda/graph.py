"""A step as one CUDA graph: captured once, replayed with one launch; or 2, 4, 8, ... steps in one graph.

Everything that changes from step to step lives in arrays on the device, so the same graph serves every step, and a graph of K steps
is the same operations K times. Within a step a second branch runs beside its longest chain of operations, see
:mod:`gpubackprop.backends.cuda.branches`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from operator import methodcaller
from typing import TYPE_CHECKING, Any

import cupy

if TYPE_CHECKING:
    from gpubackprop.backends.cuda.branches import Place
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
    places : sequence of Place
        The branch of each call. Calls on different branches share no scratch unless one waits for the other.
    nodes : int
        Launches of a step.
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
        self,
        device: Any,
        calls: Sequence[Call],
        places: Sequence[Place],
        nodes: int,
        step: Step,
        ranged: Ranged[Any],
    ) -> None:
        self.device, self.calls, self.places, self.step = device, calls, places, step
        # for capture, which the default stream does not allow
        self.branches = [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]
        self._launch = ranged("graph launch", methodcaller("launch"))
        self.steps_per_launch = 1 << (max(1, min(MOST_STEPS, NODES // nodes)).bit_length() - 1)
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

    def graph(self, steps: int) -> Any:
        """Return the graph of some steps, captured at the first call."""
        if steps not in self._graphs:
            main = self.branches[0]
            with self.device, main:
                main.begin_capture()
                try:
                    for _ in range(steps):
                        self._queue_on_branches()
                except BaseException:
                    with contextlib.suppress(Exception):  # the first error is the one to report
                        main.end_capture()
                    raise
                self._graphs[steps] = main.end_capture()
        return self._graphs[steps]

    def _queue_on_branches(self) -> None:
        """Queue the step on both streams; the side begins after what is queued on the main one, and ends before what follows."""
        events = {place.wait: cupy.cuda.Event(disable_timing=True) for place in self.places if place.wait is not None}
        if any(place.side for place in self.places):
            self._join(1, 0)
        for task, ((function, arguments), place) in enumerate(zip(self.calls, self.places, strict=True)):
            stream = self.branches[place.side]
            if place.wait is not None:
                stream.wait_event(events[place.wait])
            with stream:
                function(*arguments)
            if task in events:
                events[task].record(stream)
        if any(place.side for place in self.places):
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
