"""Many steps in one call: no Python between the operations of a step, nor between steps.

A step is a list of tasks, each a call of a kernel, cut into pieces by its shape: no bit depends on who does which. Several threads
walk through the tasks of all steps in their order. At each, a thread waits for the tasks that this one depends on, takes pieces,
first those of its own range, until none is left, and goes on without waiting for the pieces that others have in hand. So there is
no barrier: a thread whose core is taken by another program holds up only what depends on the one piece it has; when it is back, it
finds everything taken and runs through to where the others are. One thread alone could do all of the work.

The counters of a task, of the pieces taken and done, count on from step to step. A piece is taken by compare-and-swap, since with
an addition a thread that is late would take one of a later step. The last piece of a task wakes the threads that sleep.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gpubackprop.definitions import Array, address, aligned_zeros
from gpubackprop.kernels.cpu import atomics
from gpubackprop.kernels.cpu.compile import Kernel, compiled, helper
from gpubackprop.kernels.cpu.threads import Crew, crew

APART = 128  # bytes between two counters: caches fetch lines in pairs
LOOKS = 2000  # at a counter before a thread sleeps, some 30 microseconds, about what it takes to wake it
STEPS, WANTED, SLEEPERS, BELL = range(
    4
)  # the counters after those of the tasks: steps done and wanted, threads asleep, wakings


class Task(NamedTuple):
    """A call of a kernel in a step.

    Attributes
    ----------
    kernel : Kernel
    arguments : tuple
    pieces : int
        The number of shares that threads take.
    after : tuple of (int, int)
        The tasks, by number, that must be done before: of this step (1) or of the one before (0).
    """

    kernel: Kernel
    arguments: tuple[Any, ...]
    pieces: int = 1
    after: tuple[tuple[int, int], ...] = ()


@intrinsic  # type: ignore[untyped-decorator]
def _invoke(typingctx: Any, kernel: Any, block: Any, piece: Any, pieces: Any) -> Any:
    """Call the machine code of a kernel; see :class:`gpubackprop.kernels.cpu.compile.Kernel`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = context.get_value_type(types.intp)
        function = ir.FunctionType(ir.VoidType(), [word] * 3)
        builder.call(builder.inttoptr(args[0], function.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), codegen


@helper
def _wait(counter, goal, bell):  # type: ignore[no-untyped-def]
    """Wait until a counter has reached ``goal``."""
    for _ in range(LOOKS):
        if atomics.load(counter) >= goal:
            return
        atomics.pause()
    sleepers = bell + (SLEEPERS - BELL) * APART
    atomics.add(sleepers, 1)  # who finishes a task after this rings; what was finished before is seen below
    while True:
        rung = atomics.load(bell)
        if atomics.load(counter) >= goal:
            break
        atomics.sleep(bell, rung)
    atomics.add(sleepers, -1)


@helper
def _count(counter, goal, bell):  # type: ignore[no-untyped-def]
    """Count a piece that is done; the last of a task wakes the sleepers."""
    if atomics.add(counter, 1) + 1 == goal and atomics.load(bell + (SLEEPERS - BELL) * APART) > 0:
        atomics.add(bell, 1)
        atomics.wake(bell)


@helper
def _take(counter, low, high):  # type: ignore[no-untyped-def]
    """Take the next number from ``low`` to below ``high``, less ``low``; return -1 if all are taken."""
    while True:
        number = atomics.load(counter)
        if number >= high:
            return -1
        if atomics.swap(counter, number, number + 1):
            return number - low


@cache
def _runners() -> tuple[Kernel, Kernel]:
    """Return two kernels that run a program.

    alone(entries), whose last arguments are how often and 0; and together(entries, begins, after, counters, calls), whose last
    arguments are the number of the thread and, in the caller, number 0, how often.

    entries[k, thread] are the address of task k's machine code and of its arguments. begins[k, thread] is the first piece of the
    thread's own range, begins[k, -1] the number of pieces. after[k] is as in Task, ended by -1.
    """

    def alone(entries, times, nothing):  # type: ignore[no-untyped-def]
        for _ in range(times):
            for k in range(entries.shape[0]):
                _invoke(entries[k, 0, 0], entries[k, 0, 1], 0, 1)

    def together(entries, begins, after, counters, calls, thread, times):  # type: ignore[no-untyped-def]
        tasks, threads = entries.shape[0], entries.shape[1]
        place = counters.ctypes.data
        done = place + (np.arange(tasks) * (threads + 1)) * APART
        control = place + tasks * (threads + 1) * APART
        bell = control + BELL * APART
        first = atomics.load(control + STEPS * APART)
        if thread == 0:
            atomics.store(control + WANTED * APART, first + times)
            atomics.add(calls.ctypes.data, 1)
            atomics.wake(calls.ctypes.data)
        last = atomics.load(control + WANTED * APART)
        for step in range(first, last):
            for k in range(tasks):
                pieces = begins[k, threads]
                if atomics.load(done[k]) >= (step + 1) * pieces:
                    continue
                n = 0
                while after[k, n, 0] >= 0:
                    other = after[k, n, 0]
                    goal = (step + after[k, n, 1]) * begins[other, threads]
                    if atomics.load(done[other]) < goal:
                        _wait(done[other], goal, bell)
                    n += 1
                for turn in range(threads):
                    whose = (thread + turn) % threads
                    begin, size = begins[k, whose], begins[k, whose + 1] - begins[k, whose]
                    taken = done[k] + (1 + whose) * APART
                    piece = _take(taken, step * size, (step + 1) * size)
                    while piece >= 0:
                        _invoke(entries[k, thread, 0], entries[k, thread, 1], begin + piece, pieces)
                        _count(done[k], (step + 1) * pieces, bell)
                        piece = _take(taken, step * size, (step + 1) * size)
        if thread == 0:
            for k in range(tasks):
                _wait(done[k], last * begins[k, threads], bell)
            atomics.store(control + STEPS * APART, last)

    return compiled(alone), compiled(together)


class Program:
    """Calls of kernels on arrays at fixed addresses, run in order by compiled code.

    Parameters
    ----------
    tasks : sequence of Task
    threads : int
        How many threads share them.
    written : sequence of (int, int)
        The memory that they write, each part from its first address to the one after its last.
    """

    def __init__(self, tasks: Sequence[Task], threads: int = 1, written: Sequence[tuple[int, int]] = ()) -> None:
        self._written = np.array(written, np.int64).reshape(-1, 2).T
        self.tasks, self.threads = tuple(tasks), threads  # the arrays must live as long as their addresses
        bound = [[task.kernel.bind(task.arguments, thread) for thread in range(threads)] for task in tasks]
        entries = [[(code, block.ctypes.data) for _, code, block in of_task] for of_task in bound]
        self._entries = np.array(entries, np.int64).reshape(len(tasks), threads, 2)
        alone, self._together = _runners()
        self._run_alone, _, self._block_alone = alone.bind((self._entries,))
        self._bound = bound
        self._crew: Crew | None = None  # the threads whose counters these are

    def __reduce__(self) -> Any:
        raise TypeError(
            "a compiled step holds addresses and cannot be copied; create one from the copy: copy.step(...).compile()"
        )

    def __call__(self, times: int = 1) -> None:
        """Run all tasks ``times`` times, in this thread alone while others are busy with another program."""
        if self.threads == 1:
            self.alone(times)
            return
        others = crew()
        if not others.lock.acquire(blocking=False):
            self.alone(times)
            return
        try:
            if others is not self._crew:
                self._join(others)
            others.begin(self, self.threads)
            self._walk(0, times)
        finally:
            others.end()
            others.lock.release()

    def replace(self, number: int, source: Array) -> None:
        """Give a task another array of the same dtype and dimensions as its first argument, while no run is under way."""
        task, words = self.tasks[number], (address(source), *source.shape)
        task = task._replace(arguments=(source, *task.arguments[1:]))
        self.tasks = (*self.tasks[:number], task, *self.tasks[number + 1 :])
        for _, _, block in self._bound[number]:
            block[: len(words)] = words

    def writes(self, begin: int, end: int) -> bool:
        """Return whether a task writes to memory between two addresses."""
        first, after_last = self._written
        return bool(((first < end) & (begin < after_last)).any())

    def alone(self, times: int = 1) -> None:
        """Run all tasks ``times`` times in this thread."""
        self._run_alone(self._block_alone.ctypes.data, times, 0)

    def help(self, thread: int) -> None:
        """Take part in a run that another thread has begun."""
        if thread < self.threads:
            self._walk(thread, 0)

    def _walk(self, thread: int, times: int) -> None:
        self._run(self._block.ctypes.data, thread, times)

    def _join(self, others: Crew) -> None:
        """Count from 0, with these threads: the first ones, or in a forked process its own."""
        begins = [[thread * task.pieces // self.threads for thread in range(self.threads + 1)] for task in self.tasks]
        most = 1 + max((len(task.after) for task in self.tasks), default=0)
        after = np.full((len(self.tasks), most, 2), -1)
        for k, task in enumerate(self.tasks):
            after[k, : len(task.after)] = np.array(task.after, np.int64).reshape(-1, 2)
        counters: Array = aligned_zeros(((len(self.tasks) * (self.threads + 1) + 4) * APART // 8,), np.int64)
        arguments = self._entries, np.array(begins, np.int64), after, counters, others.calls
        self._run, _, self._block = self._together.bind(arguments)
        self._bound_together, self._crew = arguments, others
