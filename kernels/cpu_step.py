"""Many steps in one call: no Python between the operations of a step, nor between steps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gpubackprop.kernels.cpu_compile import Kernel, on_disk
from gpubackprop.kernels.cpu_threads import meet, team

Call = tuple[Kernel, tuple[Any, ...]]

NOBODY = np.zeros(16, np.int64)  # where one thread meets itself


@intrinsic  # type: ignore[untyped-decorator]
def _invoke(typingctx: Any, kernel: Any, block: Any, thread: Any, threads: Any) -> Any:
    """Call the machine code of a kernel; see :class:`gpubackprop.kernels.cpu_compile.Kernel`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = context.get_value_type(types.intp)
        function = ir.FunctionType(ir.VoidType(), [word] * 3)
        builder.call(builder.inttoptr(args[0], function.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), codegen


@cache
def _runner() -> Any:
    def run(times, table, thread, threads, meeting):  # type: ignore[no-untyped-def]
        goal, at = 0, meeting.ctypes.data
        for _ in range(times):
            for k in range(table.shape[0]):
                _invoke(table[k, 0], table[k, 1], thread, threads)
                if threads > 1 and meeting.size:
                    goal += threads
                    if not meet(at, goal):
                        return

    result = on_disk(run)
    words, places = types.int64[:, ::1], types.int64[::1]
    result.compile((types.intp, words, types.intp, types.intp, places))
    return result


class Program:
    """Calls of kernels on arrays with fixed places, run in order by compiled code.

    Parameters
    ----------
    calls : sequence of (kernel, arguments)
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = calls  # the arrays must live as long as their addresses
        bound = [kernel.bind(arguments) for kernel, arguments in calls]
        self._blocks = [block for _, _, block in bound]
        self._table = np.array([(address, block.ctypes.data) for _, address, block in bound], np.int64)
        self._run = _runner()
        self._around = next((kernel.around for kernel, _ in calls if kernel.around is not None), None)

    def __call__(self, times: int = 1, threads: int = 1) -> None:
        """Run all calls ``times`` times over; between two of them all threads meet."""
        if self._around is not None:
            with self._around:
                self._start(times, threads)
        else:
            self._start(times, threads)

    def _start(self, times: int, threads: int) -> None:
        if threads == 1:
            self._run(times, self._table, 0, 1, NOBODY)
        else:
            team().run(self._run, times, self._table, threads=threads)

    def run_share(self, thread: int, threads: int) -> None:
        """Do the share of one thread of so many, in this thread and without waiting for others: for a single call."""
        self._run(1, self._table, thread, threads, NOBODY[:0])
