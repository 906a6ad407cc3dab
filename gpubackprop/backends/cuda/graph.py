"""A step as one CUDA graph: captured once, replayed with one launch; or several steps in one graph.

Everything that changes from step to step lives in arrays on the device, so the same graph serves every step, and a graph of K steps
is the same operations K times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import methodcaller
from typing import TYPE_CHECKING, Any

import cupy

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
    step : Step
        Kept, since the calls hold only the addresses of its arrays.
    ranged : callable
        See :mod:`gpubackprop.backends.cuda.nvtx`.
    """

    def __init__(self, device: Any, calls: Sequence[Call], step: Step, ranged: Ranged[Any]) -> None:
        self.device, self.calls, self.step = device, calls, step
        self.stream = cupy.cuda.Stream(non_blocking=True)  # for capture, which the default stream does not allow
        self._launch = ranged("graph launch", methodcaller("launch"))
        self.steps_per_launch = max(1, min(MOST_STEPS, NODES // (2 * len(calls))))
        self._graphs: dict[int, Any] = {}

    def __call__(self, times: int = 1) -> None:
        """Queue the step ``times`` times."""
        with self.device:
            many, rest = divmod(times, self.steps_per_launch)
            for _ in range(many):
                self._launch(self.graph(self.steps_per_launch))
            for _ in range(rest):
                self._launch(self.graph(1))

    def graph(self, steps: int) -> Any:
        """Return the graph of some steps, captured at the first call."""
        if steps not in self._graphs:
            with self.device, self.stream:
                self.stream.begin_capture()
                try:
                    for _ in range(steps):
                        for function, arguments in self.calls:
                            function(*arguments)
                finally:
                    graph = self.stream.end_capture()
            self._graphs[steps] = graph
        return self._graphs[steps]

    def eagerly(self) -> None:
        """Queue the step once, one operation at a time, on CuPy's current stream: the same kernels, the same bits."""
        with self.device:
            for function, arguments in self.calls:
                function(*arguments)
