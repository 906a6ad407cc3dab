"""What each operation launches on a CUDA device: its kernels, their grids, and the scratch memory between them.

Kernels take raw pointers: arrays have been checked by :mod:`gpubackprop.backends.checks`, or are a workspace's. Partial sums go to
scratch memory. That of an eager operation is its own, from CuPy's pool, which gives it to the next one on the same stream: two
threads may queue operations on one stream, in any order. That of a compiled step is the step's, and goes with it: its operations
come one after another and share it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import cupy
import numpy as np
from cuda.bindings import driver

from gpubackprop.definitions import Array, check_dtype, real_of
from gpubackprop.kernels.cuda import loss as cuda_loss
from gpubackprop.kernels.cuda import passes
from gpubackprop.kernels.cuda import softmax as cuda_softmax
from gpubackprop.kernels.cuda import softmax_rows as cuda_softmax_rows
from gpubackprop.kernels.cuda import training as cuda_training
from gpubackprop.kernels.cuda.access import STORAGE, VECTOR_BYTES
from gpubackprop.kernels.cuda.compile import THREADS, Source, launch_config, load
from gpubackprop.kernels.cuda.unroll import numbered
from gpubackprop.philox import keep_threshold, split_seed
from gpubackprop.step.operations import (
    Accumulate,
    Advance,
    BiasActivationBackward,
    BiasActivationForward,
    BiasLoss,
    Clip,
    Dropout,
    Gather,
    NormalizeWeights,
    Operation,
    Update,
)

if TYPE_CHECKING:
    from gpubackprop.losses import Loss

BLOCKS_PER_MULTIPROCESSOR = 4  # of 256 threads with up to 64 registers: one full wave, the rest by striding
SCRATCH_STEP = 4096  # elements; scratch grows in multiples of it
LARGE = 1 << 20
"""Bytes of a matrix from which on a block takes enough rows that its bias and sums are a few percent of the traffic; below it,
many blocks with few rows are done sooner."""
IN_A_ROW = 32
"""Terms that one thread adds up one after another in float32. Where terms are equal, each addition may round to the same side, so a
sum of many would lose digits: 32 lose 2^-20 at the very most, and sums of sums, each of so few, hardly more."""
MOST_BLOCKS = 65535  # CUDA's limit along y

Grid = tuple[int, int]


class Launch(NamedTuple):
    """A kernel, its grid and its arguments."""

    config: Any
    kernel: Any
    arguments: tuple[Any, ...]
    scratch: Array | None = None
    """Kept, since the arguments hold only its address."""


@dataclass(frozen=True, eq=False)
class WithDropout:
    """A pass and the dropout after it (forward) or before it (backward), in one launch and the same bits.

    ``output``: the activation before the dropout is written too.
    """

    operation: BiasActivationForward | BiasActivationBackward
    dropout: Dropout
    output: bool = True

    @property
    def name(self) -> str:
        """That of the pass."""
        return self.operation.name


def fuse_dropout(operations: Sequence[Operation]) -> list[Operation | WithDropout]:
    """Return operations with dropout done by the pass before or after it; an activation that only dropout reads is not written."""
    pending = list(operations)
    result: list[Operation | WithDropout] = []
    while pending:
        first = pending.pop(0)
        second = pending[0] if pending else None
        if isinstance(first, BiasActivationForward) and isinstance(second, Dropout):
            in_place = _at(first.out) in (_at(first.z), _at(second.out))
            result.append(WithDropout(first, second, first.activation.needs == "h" or in_place))
            pending.pop(0)
        elif isinstance(first, Dropout) and isinstance(second, BiasActivationBackward):
            result.append(WithDropout(second, first))
            pending.pop(0)
        else:
            result.append(first)
    return result


class Launches:
    """A method for each operation of the table on arrays, all outputs given, on CuPy's current device.

    Parameters
    ----------
    device : cupy.cuda.Device
    finish : bool
        Add up the bias gradient in the launch that makes it, by the last block that comes to its end, where a row of blocks
        spans whole rows; else in a launch of its own.
    """

    def __init__(self, device: Any, finish: bool = False) -> None:
        self.device, self.finish = device, finish
        capability = device.compute_capability
        self.capability = (int(capability[:-1]), int(capability[-1]))
        self.blocks = BLOCKS_PER_MULTIPROCESSOR * int(device.attributes["MultiProcessorCount"])
        self._kernels: dict[Source, Any] = {}
        self._shared = False
        self._scratch: dict[np.dtype[Any], Array] = {}

    def for_step(self) -> Launches:
        """Return the same for the operations of one step, which share scratch memory of their own."""
        own = copy.copy(self)
        own._shared, own._scratch = True, {}
        return own

    def of(self, item: Operation | WithDropout) -> list[Launch]:
        """Return the launches of an operation, or of a pass with dropout."""
        if isinstance(item, Operation):
            launches: list[Launch] = getattr(self, item.name)(item)
            return launches
        if isinstance(item.operation, BiasActivationForward):
            return self.bias_activation_forward(item.operation, item.dropout, output=item.output)
        return self.bias_activation_backward(item.operation, item.dropout)

    def bias_activation_forward(
        self, o: BiasActivationForward, dropout: Dropout | None = None, *, output: bool = True
    ) -> list[Launch]:
        """``dropout`` is done on the way; ``output``: the activation before it is written too."""
        z, b, activation, out = o.z, o.b, o.activation, o.out
        (n, d), dtype = z.shape, z.dtype
        dropped = out if dropout is None else dropout.out
        width = passes.width_of(dtype, _at(z), _at(out), _at(dropped))
        line = d * passes.rows_of_line(width, d)
        keep = _at(out) != _at(z)
        source = passes.bias_activation_forward(activation, dtype, width, keep, dropout is not None, output)
        grid, block = self._cut(n * d, line, width, dtype, 16)
        return [
            self._launch(
                source, grid, block, z=_at(z), b=_at(b), out=_at(out), dropped=_at(dropped),
                **self._mask(dtype, dropout), size=n * d, line=line, d=d,
            ),
        ]  # fmt: skip

    def bias_activation_backward(self, o: BiasActivationBackward, dropout: Dropout | None = None) -> list[Launch]:
        """With ``dropout``, that is done to dh first."""
        dh, activation, out, db = o.dh if dropout is None else dropout.x, o.activation, o.out, o.db
        (n, d), dtype = dh.shape, dh.dtype
        s, real = o.at, real_of(dtype)
        width = passes.width_of(dtype, _at(dh), _at(s), _at(out))
        rows = passes.rows_of_line(width, d)
        grid, block = self._cut(n * d, d * rows, width, dtype, 64 // dtype.itemsize, in_a_row=IN_A_ROW)
        whole = grid[1] * rows == 1
        finish = self.finish and rows == 1 and 1 < grid[1] <= block[1] * IN_A_ROW
        source = passes.bias_activation_backward(activation, dtype, width, dropout is not None, finish)
        partial = db if whole else self.room(grid[1] * d * rows, real)
        tickets = self.room(grid[0], np.dtype(np.int64)) if finish else None
        launches = [
            self._launch(
                source, grid, block, dh=_at(dh), s=_at(s), delta=_at(out), partial=_at(partial), db=_at(db),
                tickets=_at_or_0(tickets), **self._mask(dtype, dropout), size=n * d, line=d * rows,
                scratch=(partial, tickets),
            ),
        ]  # fmt: skip
        if not (whole or finish):
            launches += self._column_sums(_at(partial), _at(db), grid[1] * rows, d, real)
        return launches

    def bias_loss(self, o: BiasLoss) -> list[Launch]:
        z, b, y, loss, weight, out = o.z, o.b, o.y, o.loss, o.weight, o.out
        db, value, scalars, samples, total = o.db, o.value, o.scalars, o.samples, o.total
        (n, d), dtype = z.shape, z.dtype
        real, softmax = real_of(dtype), loss.family == "softmax"
        indices = y.ndim == 1 and softmax
        variant = cuda_loss.Variant(indices, weight is not None, _at(out) != _at(z), scalars is not None)
        scale = loss.scale(samples or n, d, weight is not None)
        # dense targets are real: where z has 16 bits, a thread takes as many as 16 bytes of targets hold
        width = passes.width_of(dtype if indices else real, _at(z), _at(out), 0 if indices else _at(y))
        arguments: dict[str, Any] = {
            "z": _at(z), "b": _at(b), "y": _at(y), "weight": _at_or_0(weight), "out": _at(out),
            "scalars": _at_or_0(scalars), "scale": real.type(scale), "d": d,
        }  # fmt: skip
        if not softmax:
            width = 1 if weight is not None and d % width else width
            repeat = passes.rows_of_line(width, d)
            # a thread also adds up the losses of a line's ``width`` numbers, one after another
            grid, block = self._cut(n * d, d * repeat, width, dtype, 32, 1, in_a_row=IN_A_ROW // width)
            source = cuda_loss.elementwise_loss(loss, dtype, width, variant)
            rows = grid[1] * repeat
            arguments |= {"size": n * d, "line": d * repeat}
        else:
            source, grid, block, more = self._softmax(loss, dtype, n, d, width, variant, _at(b))
            rows = grid[1]
            arguments |= {"u": real.type(1 / d), "n": n, **more}
        count, long = grid[0] * grid[1], "_long_" in source.name
        rows = 0 if long else rows
        room = self.room(rows * d + count, real)
        partial, losses = _at(room), _at(room) + rows * d * real.itemsize
        if not long:
            arguments["partial"] = partial
        first = [self._launch(source, grid, block, **arguments, losses=losses, scratch=room)]
        if long:  # its kernel leaves the sums over columns to another
            partial, rows, sums = self._shorten(_at(out), n, d, dtype, always=True)
        else:
            partial, rows, sums = self._shorten(partial, rows, d, real)
        first += sums
        growth = 1.0 if loss.reduction == "sum" else float(samples or n) if total is None else 0.0
        columns, rows_at_once = passes.block_shape(d, passes.SUM_COLUMNS)
        finish = self._launch(
            cuda_loss.finish_loss(dtype), (-(-d // columns) + 1, 1), (columns, rows_at_once),
            partial=partial, db=_at(db), losses=losses, value=_at(value), weights=_at_or_0(total),
            scale=float(scale), growth=growth, rows=rows, d=d, count=count,
        )  # fmt: skip
        return [*first, finish]

    def _softmax(
        self, loss: Loss, dtype: np.dtype[Any], n: int, d: int, width: int, variant: cuda_loss.Variant, b: int
    ) -> tuple[Source, Grid, Grid, dict[str, int]]:
        """Return kernel, grid, block and the arguments that only this kernel takes."""
        if d <= cuda_softmax.tile_columns(dtype):
            lanes = cuda_softmax.lanes_of(d)
            at_once, most = THREADS // lanes, cuda_softmax.tile_rows(dtype, d)
            down = min(self.blocks, -(-n // at_once))
            if n * d * dtype.itemsize >= LARGE:
                down = min(down, n // 64)
            down = _at_least(down, n, at_once * IN_A_ROW)
            rows = min(most, -(-n // (down * at_once)) * at_once)
            source = cuda_softmax.softmax_loss_tile(loss, dtype, width, d, variant)
            return source, (1, min(down, -(-n // rows))), (lanes, at_once), {"rows": rows}
        width = width if d % width == 0 and b % VECTOR_BYTES == 0 else 1
        shape = cuda_softmax_rows.row_shape(dtype, width, d, not variant.indices)
        if shape is None:
            width = (
                width if dtype.itemsize < 8 else 1
            )  # two numbers of float64 at a time would take more than 64 registers
            return (
                cuda_softmax_rows.softmax_loss_long(loss, dtype, width, variant),
                (1, _at_least(min(n, self.blocks), n, IN_A_ROW)),
                (THREADS, 1),
                {},
            )
        threads, _, rows = shape
        down = _at_least(min(-(-n // rows), max(1, self.blocks * THREADS // threads)), n, rows * IN_A_ROW)
        return cuda_softmax_rows.softmax_loss_row(loss, dtype, width, shape, variant), (1, down), (threads, 1), {}

    def normalize_weights(self, o: NormalizeWeights) -> list[Launch]:
        weight, out = o.weight, o.out
        (n,), dtype = weight.shape, check_dtype(weight.dtype)
        total = self.room(1, np.dtype(np.float64)) if o.total is None else o.total
        source = cuda_training.normalize_weights(dtype)
        return [
            self._launch(
                source, (1, 1), (THREADS, 1), weight=_at(weight), out=_at(out), total=_at(total), n=n, scratch=total,
            ),
        ]  # fmt: skip

    def dropout(self, o: Dropout) -> list[Launch]:
        x, out = o.x, o.out
        size, dtype = x.size, check_dtype(x.dtype)
        width = passes.width_of(dtype, _at(x), _at(out))
        source = cuda_training.dropout(dtype, width)
        grid = (self._flat_grid(-(-size // width)), 1)
        return [self._launch(source, grid, (THREADS, 1), x=_at(x), out=_at(out), **self._mask(dtype, o), size=size)]

    def accumulate(self, o: Accumulate) -> list[Launch]:
        total, term, out = o.total, o.term, o.out
        size, dtype = term.size, check_dtype(term.dtype)
        first, a = total is None, term if total is None else total
        width = passes.width_of(dtype, _at(a), _at(term), _at(out))
        source = cuda_training.accumulate(dtype, width, first)
        grid = (self._flat_grid(-(-size // width)), 1)
        return [self._launch(source, grid, (THREADS, 1), total=_at(a), term=_at(term), out=_at(out), size=size)]

    def gather(self, o: Gather) -> list[Launch]:
        source, order, counters, out = o.source, o.order, o.counters, o.out
        size, rows, n = len(order), len(source), len(out)
        nbytes = out.nbytes // n
        storage, width = _copy_unit(nbytes, _at(source), _at(out))
        d = nbytes // np.dtype(STORAGE[storage]).itemsize
        bx, by = passes.block_shape(-(-d // width))
        across = -(-d // (bx * width))
        down = max(1, min(self.blocks // across, -(-n // (by * cuda_training.ROWS_AT_ONCE))))
        kernel = cuda_training.gather(storage, width)
        return [
            self._launch(
                kernel, (across, down), (bx, by), source=_at(source), order=_at(order), counters=_at(counters),
                out=_at(out), size=size, rows=rows, n=n, d=d,
            ),
        ]  # fmt: skip

    def clip(self, o: Clip) -> list[Launch]:
        gradients, max_norm, scalars, loss_scaling = o.gradients, o.max_norm, o.scalars, o.loss_scaling
        size, dtype = gradients.size, check_dtype(gradients.dtype)
        if _at(gradients) % VECTOR_BYTES:
            raise ValueError("gradients must be aligned to 16 bytes, as backend.zeros gives them")
        vectors = size * dtype.itemsize // VECTOR_BYTES + 1
        blocks = max(self._flat_grid(vectors), -(-vectors // (THREADS * IN_A_ROW)))
        partial = self.room(2 * blocks, dtype)
        block = (THREADS, 1)
        return [
            self._launch(
                cuda_training.sum_of_squares(dtype), (blocks, 1), block,
                g=_at(gradients), partial=_at(partial), size=size, scratch=partial,
            ),
            self._launch(
                cuda_training.clip(dtype, loss_scaling), (1, 1), block,
                partial=_at(partial), scalars=_at(scalars), max_norm=dtype.type(max_norm), count=blocks,
            ),
        ]  # fmt: skip

    def advance(self, o: Advance) -> list[Launch]:
        optimizer, rate, batch, counters, scalars, loss_scaling = (
            o.optimizer, o.rate, o.batch, o.counters, o.scalars, o.loss_scaling,
        )  # fmt: skip
        dtype = check_dtype(scalars.dtype)
        source = cuda_training.advance(optimizer, dtype, loss_scaling)
        return [
            self._launch(
                source, (1, 1), (1, 1), rate=_at(rate), counters=_at(counters), scalars=_at(scalars), batch=int(batch),
                **numbered("numbers", [float(x) for x in optimizer.numbers]),
                **numbered("of_schedule", [float(x) for x in optimizer.schedule.numbers]),
            ),
        ]  # fmt: skip

    def update(self, o: Update) -> list[Launch]:
        optimizer, parameters, gradients, states, scalars, weights = (
            o.optimizer, o.parameters, o.gradients, o.states, o.scalars, o.weights,
        )  # fmt: skip
        size, dtype = parameters.size, check_dtype(parameters.dtype)
        arrays = {
            "parameters": _at(parameters), "gradients": _at(gradients),
            "states": _at(states) if optimizer.n_states else 0, "copy": _at_or_0(weights),
        }  # fmt: skip
        width = cuda_training.update_width(optimizer, dtype, size, *arrays.values())
        source = cuda_training.update(optimizer, dtype, width, None if weights is None else weights.dtype)
        grid = (self._flat_grid(-(-size // width)), 1)
        limit, real = optimizer.clipping[1], dtype.type
        return [
            self._launch(
                source, grid, (THREADS, 1), **arrays, scalars=_at(scalars), size=size,
                limit=real(0 if limit is None else limit), **numbered("numbers", [real(x) for x in optimizer.numbers]),
            ),
        ]  # fmt: skip

    # Grids, scratch, checks.

    def _launch(self, kernel: Source, grid: Grid, block: Grid, /, *, scratch: Any = None, **arguments: Any) -> Launch:
        """Return the launch of a kernel on arguments by the names of its parameters."""
        return Launch(launch_config(grid, block), self._kernel(kernel), kernel.arguments(arguments), scratch)

    def _kernel(self, source: Source) -> Any:
        """Return a kernel whose code is on the device: its first launch may be captured, when loading may not be allowed."""
        kernel = self._kernels.get(source)
        if kernel is None:
            kernel = load(source, self.capability)
            # a new thread has no context, which the driver's functions need
            cupy.cuda.runtime.setDevice(self.device.id)
            error, function = driver.cuKernelGetFunction(kernel.handle)
            if not error:  # a driver that loads lazily does it to answer such a question
                error, _ = driver.cuFuncGetAttribute(driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NUM_REGS, function)
            if error:
                raise RuntimeError(f"the driver cannot load the kernel {source.name}: {error.name}")
            self._kernels[source] = kernel
        return kernel

    def _cut(
        self, size: int, line: int, width: int, dtype: np.dtype[Any], least: int, in_flight: int = 0, in_a_row: int = 0
    ) -> tuple[Grid, Grid]:
        """Return grid and block for a matrix, see :mod:`gpubackprop.kernels.cuda.passes`.

        A large matrix has at least ``least`` lines to a block, and where ``in_a_row`` is given at most that many to a thread.
        """
        bx, by = passes.block_shape(-(-line // width))
        across, lines = -(-line // (bx * width)), -(-size // line)
        in_flight = in_flight or passes.lines_in_flight(dtype, width)
        down = min(self.blocks // across, -(-lines // (by * in_flight)))
        if size * dtype.itemsize >= LARGE:
            down = min(down, lines // least)
        if in_a_row:
            down = _at_least(down, lines, by * in_a_row)
        return (across, max(1, down)), (bx, by)

    def _flat_grid(self, threads: int) -> int:
        return max(1, min(2 * self.blocks, -(-threads // THREADS)))

    def _column_sums(self, a: int, out: int, n: int, d: int, dtype: np.dtype[Any]) -> list[Launch]:
        """Return the launches for out = sums over the rows of a (n, d)."""
        a, n, first = self._shorten(a, n, d, dtype)
        real, (bx, by) = real_of(dtype) if first else dtype, passes.block_shape(d, passes.SUM_COLUMNS)
        return [*first, self._launch(passes.column_sum(real), (-(-d // bx), 1), (bx, by), a=a, out=out, n=n, d=d)]

    def _shorten(
        self, a: int, n: int, d: int, dtype: np.dtype[Any], *, always: bool = False
    ) -> tuple[int, int, list[Launch]]:
        """Return address and rows of a matrix of real numbers with the column sums of a (n, d), and the launches that make it.

        It has so few rows that one row of blocks can add them up; a itself is returned if it has, unless ``always``.
        """
        bx, by = passes.block_shape(d, passes.SUM_COLUMNS)
        at_once = passes.SUM_ROWS * by
        if n <= at_once * IN_A_ROW and not always:
            return a, n, []
        across, real = -(-d // bx), real_of(dtype)
        down = _at_least(min(max(1, self.blocks // across), -(-n // at_once)), n, at_once * IN_A_ROW)
        room = self.room(down * d, real, apart=True)
        first = self._launch(
            passes.column_sum(dtype), (across, down), (bx, by), a=a, out=_at(room), n=n, d=d, scratch=room
        )
        sums, rows, more = self._shorten(_at(room), down, d, real)
        return sums, rows, [first, *more]

    def _mask(self, dtype: np.dtype[Any], dropout: Dropout | None) -> dict[str, Any]:
        """Return the arguments by which kernels make a mask; they read none of them without dropout."""
        real = real_of(dtype).type
        if dropout is None:
            return {"counters": 0, "bound": 0, "scale": real(1), "low": 0, "high": 0, "layer": 0, "first": 0}
        low, high = split_seed(dropout.seed)
        return {
            "counters": _at(dropout.counters), "bound": keep_threshold(dropout.rate), "scale": real(1 / (1 - dropout.rate)),
            "low": low, "high": high, "layer": dropout.layer, "first": dropout.first_block,
        }  # fmt: skip

    def room(self, size: int, dtype: np.dtype[Any], *, apart: bool = False) -> Array:
        """Return scratch for ``size`` numbers; that of whole numbers is 0, and its user leaves it so.

        An operation that needs two at once takes the second ``apart``.
        """
        new = cupy.zeros if dtype.kind == "i" else cupy.empty
        if apart or not self._shared:
            return new(size, dtype)
        room = self._scratch.get(dtype)
        if room is None or room.size < size:
            room = self._scratch[dtype] = new(-(-size // SCRATCH_STEP) * SCRATCH_STEP, dtype)
        return room


def _copy_unit(nbytes: int, *addresses: int) -> tuple[str, int]:
    """Return (storage, width) of the widest access that rows of ``nbytes`` allow; bits are copied, whatever they mean."""
    for size, unit in ((16, ("f4", 4)), (8, ("f8", 1)), (4, ("f4", 1))):
        if not any(number % size for number in (nbytes, *addresses)):
            return unit
    return "u2", 1


def _at_least(blocks: int, n: int, of_block: int) -> int:
    """Return ``blocks``, or more where n would be more than ``of_block`` for each."""
    return min(MOST_BLOCKS, max(1, blocks, -(-n // of_block)))


def _at(a: Array | None) -> int:
    assert a is not None
    return int(a.data.ptr)


def _at_or_0(a: Array | None) -> int:
    return 0 if a is None else _at(a)
