"""How kernels are launched on a CUDA device: loaded once, on grids that fill it, with scratch memory between them.

Kernels take raw pointers: arrays have been checked by :mod:`gpubackprop.backends.checks`, or are a workspace's. Partial sums go to
scratch memory. An eager operation takes its own from CuPy's pool, which reuses it for the next one on the same stream: two threads
may queue operations on one stream, in any order. A compiled step owns its scratch, which its operations share: they run one after
another, also on two branches, since what uses the same memory does.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple, Self

import cupy
import numpy as np
from cuda.bindings import driver

from gpubackprop.definitions import Array, address, real_of
from gpubackprop.kernels.cuda import column_sums, passes
from gpubackprop.kernels.cuda.compile import THREADS, Source, launch_config, load

BLOCKS_PER_MULTIPROCESSOR = 4  # blocks of 256 threads with up to 64 registers: one full wave, the rest by striding
SCRATCH_STEP = 4096  # elements; scratch grows in multiples of it
LARGE = 1 << 20
"""Bytes of a matrix above which a block takes enough rows that its bias and sums are a few percent of the traffic; below, many
blocks with few rows are faster."""
IN_A_ROW = 32
"""Terms that one thread adds up in a row in float32. Equal terms may all round to the same side, so a long sum would lose digits:
32 lose at most 2^-20, and sums of such sums hardly more."""
SMALL_ROWS = 1024
"""Rows up to which a block takes whole columns of a matrix of less than :data:`LARGE` bytes, so that its sums are complete: that
saves a launch, which takes longer than a block's few trips."""
SECTOR = 32  # bytes: the least that memory moves
MOST_BLOCKS = 65535  # CUDA's limit along y

Grid = tuple[int, int]


class Launch(NamedTuple):
    """A kernel, its grid and its arguments."""

    config: Any
    kernel: Any
    arguments: tuple[Any, ...]
    scratch: tuple[Array, ...] = ()
    """Kept, since the arguments hold only its address."""


class Launcher:
    """Launches of kernels, and the sums that follow some of them, on CuPy's current device.

    Parameters
    ----------
    device : cupy.cuda.Device
    """

    def __init__(self, device: Any) -> None:
        self.device = device
        capability = device.compute_capability
        self.capability = (int(capability[:-1]), int(capability[-1]))
        self.blocks = BLOCKS_PER_MULTIPROCESSOR * int(device.attributes["MultiProcessorCount"])
        self._kernels: dict[Source, Any] = {}
        self._shared = False
        self._scratch: dict[np.dtype[Any], Array] = {}

    def for_step(self) -> Self:
        """Return a launcher for the operations of one step, which share their own scratch memory."""
        own = copy.copy(self)
        own._shared, own._scratch = True, {}
        return own

    def _launch(self, kernel: Source, grid: Grid, block: Grid, /, *, scratch: Any = (), **arguments: Any) -> Launch:
        """Return the launch of a kernel, with arguments by parameter name."""
        return Launch(launch_config(grid, block), self._kernel(kernel), kernel.arguments(arguments), scratch)

    def _kernel(self, source: Source) -> Any:
        """Return a kernel whose code is on the device: its first launch may be captured, when loading may not be allowed."""
        kernel = self._kernels.get(source)
        if kernel is None:
            kernel = load(source, self.capability)
            # a new thread has no context, which the driver's functions need
            cupy.cuda.runtime.setDevice(self.device.id)
            error, function = driver.cuKernelGetFunction(kernel.handle)
            if not error:  # this query makes a driver that loads lazily load it
                error, _ = driver.cuFuncGetAttribute(driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NUM_REGS, function)
            if error:
                raise RuntimeError(f"the driver cannot load the kernel {source.name}: {error.name}")
            self._kernels[source] = kernel
        return kernel

    def _cut(
        self, size: int, line: int, width: int, dtype: np.dtype[Any], least: int, in_flight: int = 0, in_a_row: int = 0
    ) -> tuple[Grid, Grid]:
        """Return grid and block for a matrix, see :mod:`gpubackprop.kernels.cuda.passes`.

        A large matrix has at least ``least`` lines to a block, and with ``in_a_row`` at most that many to a thread.
        """
        bx, by = passes.block_shape(-(-line // width))
        across, lines = -(-line // (bx * width)), -(-size // line)
        in_flight = in_flight or passes.lines_in_flight(dtype, width)
        down = min(self.blocks // across, -(-lines // (by * in_flight)))
        if size * dtype.itemsize >= LARGE:
            down = min(down, lines // least)
        if in_a_row:
            down = at_least(down, lines, by * in_a_row)
        return (across, max(1, down)), (bx, by)

    def _whole_columns(self, n: int, d: int, width: int, dtype: np.dtype[Any]) -> tuple[Grid, Grid] | None:
        """Return grid and block for a matrix (n, d) whose columns are each within one block, or None for large ones.

        A block is one sector wide, so that many of them share the device. A line is one row; where d is no multiple of the width,
        that is 1.
        """
        width = width if d % width == 0 else 1
        widest = max(1, min(column_sums.SUM_COLUMNS, SECTOR // (width * dtype.itemsize)))
        bx, by = passes.block_shape(d // width, widest)
        if n * d * dtype.itemsize >= LARGE or n > min(SMALL_ROWS, by * IN_A_ROW):
            return None
        return (-(-d // (bx * width)), 1), (bx, by)

    def _flat_grid(self, threads: int) -> int:
        return max(1, min(2 * self.blocks, -(-threads // THREADS)))

    def _column_sums(self, a: int, out: int, n: int, d: int, dtype: np.dtype[Any]) -> list[Launch]:
        """Return the launches for out = sums over the rows of a (n, d)."""
        a, n, first = self._shorten(a, n, d, dtype)
        real, (bx, by) = real_of(dtype) if first else dtype, passes.block_shape(d, column_sums.SUM_COLUMNS)
        return [*first, self._launch(column_sums.column_sum(real), (-(-d // bx), 1), (bx, by), a=a, out=out, n=n, d=d)]

    def _shorten(
        self, a: int, n: int, d: int, dtype: np.dtype[Any], *, always: bool = False
    ) -> tuple[int, int, list[Launch]]:
        """Return address and rows of a matrix of real numbers with the column sums of a (n, d), and the launches that make it.

        It has few enough rows for one row of blocks to add up; if a itself has, it is returned, unless ``always``.
        """
        bx, by = passes.block_shape(d, column_sums.SUM_COLUMNS)
        at_once = column_sums.SUM_ROWS * by
        if n <= at_once * IN_A_ROW and not always:
            return a, n, []
        across, real = -(-d // bx), real_of(dtype)
        down = at_least(min(max(1, self.blocks // across), -(-n // at_once)), n, at_once * IN_A_ROW)
        scratch = self.scratch(down * d, real, apart=True)
        first = self._launch(
            column_sums.column_sum(dtype),
            (across, down),
            (bx, by),
            a=a,
            out=address(scratch),
            n=n,
            d=d,
            scratch=(scratch,),
        )
        shorter, rows, more = self._shorten(address(scratch), down, d, real)
        return shorter, rows, [first, *more]

    def scratch(self, size: int, dtype: np.dtype[Any], *, apart: bool = False) -> Array:
        """Return scratch for ``size`` numbers; integer scratch is 0, and its user leaves it so.

        An operation that needs two at once takes the second ``apart``.
        """
        new = cupy.zeros if dtype.kind == "i" else cupy.empty
        if apart or not self._shared:
            return new(size, dtype)
        scratch = self._scratch.get(dtype)
        if scratch is None or scratch.size < size:
            scratch = self._scratch[dtype] = new(-(-size // SCRATCH_STEP) * SCRATCH_STEP, dtype)
        return scratch


def at_least(blocks: int, n: int, of_block: int) -> int:
    """Return ``blocks``, or more where n would be more than ``of_block`` for each."""
    return min(MOST_BLOCKS, max(1, blocks, -(-n // of_block)))
