"""Many steps in one call: no Python between the operations of a step, nor between steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from gpubackprop.code_digest import fingerprint
from gpubackprop.kernels.cpu.compile import Kernel, on_disk, pointer
from gpubackprop.kernels.cpu.threads import barrier_wait, thread_team

Call = tuple[Kernel, tuple[Any, ...]]


@intrinsic  # type: ignore[untyped-decorator]
def _invoke(typingctx: Any, kernel: Any, block: Any, thread: Any, threads: Any) -> Any:
    """Call the machine code of a kernel; see :class:`gpubackprop.kernels.cpu.compile.Kernel`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = context.get_value_type(types.intp)
        function = ir.FunctionType(ir.VoidType(), [word] * 3)
        builder.call(builder.inttoptr(args[0], function.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), codegen


@cache
def _runner() -> Any:
    """Return run(table, calls, thread, threads, barrier, times); table and barrier are addresses, 0 means no barrier."""

    def run(table, calls, thread, threads, barrier, times):  # type: ignore[no-untyped-def]
        entries, goal = carray(pointer(table, np.int64), (calls, 2)), 0
        for _ in range(times):
            for k in range(calls):
                _invoke(entries[k, 0], entries[k, 1], thread, threads)
                if barrier:
                    goal += threads
                    if not barrier_wait(barrier, goal):
                        return

    return on_disk(run, 6, fingerprint(run)).call


class Program:
    """Calls of kernels on arrays at fixed addresses, run in order by compiled code.

    Parameters
    ----------
    calls : sequence of (kernel, arguments)

    Attributes
    ----------
    alone : callable
        ``alone(times)`` runs all calls ``times`` times in one thread.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = calls  # the arrays must live as long as their addresses
        bound = [kernel.bind(arguments) for kernel, arguments in calls]
        self._blocks = [block for _, _, block in bound]
        self._entries = np.array([(address, block.ctypes.data) for _, address, block in bound], np.int64)
        self._run = partial(_runner(), self._entries.ctypes.data, len(calls))
        self.alone: Callable[[int], None] = partial(self._run, 0, 1, 0)

    def __reduce__(self) -> Any:
        raise TypeError(
            "a compiled step holds addresses and cannot be copied; create one from the copy: copy.step(...).compile()"
        )

    def __call__(self, times: int = 1, threads: int = 1) -> None:
        """Run all calls ``times`` times, with a barrier after each call."""
        if threads == 1:
            self.alone(times)
        else:
            thread_team().run(self.run_share, times, threads)

    def run_share(self, thread: int, threads: int, barrier: int = 0, times: int = 1) -> None:
        """Run ``thread``'s share of ``threads``, in this thread; without a barrier only a program of one call.

        A thread that holds this method keeps the arrays alive; compiled code has only their addresses.
        """
        self._run(thread, threads, barrier, times)
