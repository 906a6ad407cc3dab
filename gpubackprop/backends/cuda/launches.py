"""What each operation launches on a CUDA device: its kernels on its arrays, see :mod:`gpubackprop.backends.cuda.launcher`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gpubackprop.backends.cuda.fusion import Fused, Gathers, WithDropout, WithProduct
from gpubackprop.backends.cuda.launcher import IN_A_ROW, LARGE, Grid, Launch, Launcher, at_least
from gpubackprop.definitions import Array, address, check_dtype, real_of
from gpubackprop.kernels.cuda import column_sums, minibatch, passes
from gpubackprop.kernels.cuda import dropout as cuda_dropout
from gpubackprop.kernels.cuda import loss as cuda_loss
from gpubackprop.kernels.cuda import softmax as cuda_softmax
from gpubackprop.kernels.cuda import softmax_rows as cuda_softmax_rows
from gpubackprop.kernels.cuda import training as cuda_training
from gpubackprop.kernels.cuda.compile import THREADS, Source
from gpubackprop.kernels.cuda.storage import STORAGE, VECTOR_BYTES
from gpubackprop.kernels.cuda.unroll import numbered
from gpubackprop.philox import keep_threshold, split_seed
from gpubackprop.step import operations as table
from gpubackprop.step.dataflow import Access, spans
from gpubackprop.step.state import FACTOR

if TYPE_CHECKING:
    from gpubackprop.losses import Loss


SUMS: dict[type[table.Operation], tuple[str, ...]] = {
    table.BiasActivationBackward: ("db",),
    table.BiasLoss: ("db", "value"),
}
"""The arrays of an operation that only the launches after its first one write."""


class Launches(Launcher):
    """A method for each operation of the table on arrays, all outputs given, on CuPy's current device.

    Parameters
    ----------
    device : cupy.cuda.Device
    finish : bool
        Add up the bias gradient in the launch that computes it, by the last block to finish, where a row of blocks spans whole
        rows; else in a separate launch.
    """

    def __init__(self, device: Any, finish: bool = False) -> None:
        super().__init__(device)
        self.finish = finish

    def of(self, item: table.Operation | Fused) -> list[Launch]:
        """Return the launches of an operation, or of several fused ones."""
        if isinstance(item, table.Operation):
            launches: list[Launch] = getattr(self, item.name)(item)
            return launches
        if isinstance(item, Gathers):
            return self.gather(*item.parts)
        if isinstance(item, WithProduct):
            return self.bias_activation_backward(item.operation, item.dropout, item.product)
        assert isinstance(item, WithDropout)
        if isinstance(item.operation, table.BiasActivationForward):
            return self.bias_activation_forward(item.operation, item.dropout, output=item.output)
        return self.bias_activation_backward(item.operation, item.dropout)

    def tasks(self, item: table.Operation | Fused) -> list[tuple[list[Launch], Access]]:
        """Return the launches of an operation with the memory that they read and write, those that finish its sums apart."""
        launches, parts = self.of(item), item.parts if isinstance(item, Fused) else (item,)
        scratch = spans(a for one in launches for a in one.scratch)
        written = item.written
        if isinstance(item, table.Clip) and not item.loss_scaling:  # it and the schedule write different scalars
            written = [item.scalars[FACTOR:]]
        if isinstance(item, table.Advance) and not item.loss_scaling:
            written = [item.counters, item.scalars[:FACTOR]]
        sums = [a for one in parts for a in (getattr(one, name) for name in SUMS.get(type(one), ()))]
        if len(launches) == 1 or not sums:
            return [(launches, Access(spans(item.read), spans(written) + scratch, len(launches)))]
        others = [a for a in written if not any(a is b for b in sums)]
        return [
            (launches[:1], Access(spans(item.read), spans(others) + scratch)),
            (launches[1:], Access(spans([*item.read, *others]), spans(sums) + scratch, len(launches) - 1)),
        ]

    def bias_activation_forward(
        self, o: table.BiasActivationForward, dropout: table.Dropout | None = None, *, output: bool = True
    ) -> list[Launch]:
        """``dropout`` is fused; ``output``: the activation before it is written too."""
        z, b, activation, out = o.z, o.b, o.activation, o.out
        (n, d), dtype = z.shape, z.dtype
        dropped = out if dropout is None else dropout.out
        width = passes.width_of(dtype, address(z), address(out), address(dropped))
        line = d * passes.rows_of_line(width, d)
        keep = address(out) != address(z)
        source = passes.bias_activation_forward(activation, dtype, width, keep, dropout is not None, output)
        grid, block = self._cut(n * d, line, width, dtype, 16)
        return [
            self._launch(
                source, grid, block, z=address(z), b=address(b), out=address(out), dropped=address(dropped),
                **self._mask(dtype, dropout), size=n * d, line=line, d=d,
            ),
        ]  # fmt: skip

    def matmul(self, o: table.Matmul) -> list[Launch]:
        """Return the launch of a narrow product, see :func:`~gpubackprop.backends.cuda.fusion.is_narrow`."""
        (n, d), inner, dtype = o.out.shape, o.a.shape[1], o.a.dtype
        width = passes.width_of(dtype, address(o.out))
        width = width if d % width == 0 else 1
        grid, block = self._cut(n * d, d, width, dtype, 16)
        return [
            self._launch(
                passes.narrow_product(dtype, width), grid, block,
                a=address(o.a), w=address(o.b), out=address(o.out), inner=inner, size=n * d, line=d,
            ),
        ]  # fmt: skip

    def bias_activation_backward(
        self,
        o: table.BiasActivationBackward,
        dropout: table.Dropout | None = None,
        product: table.Matmul | None = None,
    ) -> list[Launch]:
        """With ``dropout``, dh is masked first; with ``product`` it is computed first."""
        dh, activation, out, db = o.dh if dropout is None else dropout.x, o.activation, o.out, o.db
        (n, d), dtype = dh.shape, dh.dtype
        s, real = o.at, real_of(dtype)
        inner, factor, w = (0, dh, 0) if product is None else (product.a.shape[1], product.a, address(product.b))
        width = passes.width_of(dtype, *(() if inner else (address(dh),)), address(s), address(out))
        small = self._whole_columns(n, d, width, dtype)
        if small or inner:  # a line is one row
            width = width if d % width == 0 else 1
        rows = passes.rows_of_line(width, d)
        grid, block = small or self._cut(n * d, d * rows, width, dtype, 64 // dtype.itemsize, in_a_row=IN_A_ROW)
        whole = grid[1] * rows == 1
        finish = self.finish and rows == 1 and 1 < grid[1] <= block[1] * IN_A_ROW
        source = passes.bias_activation_backward(
            activation, dtype, width, dropout is not None, finish, product is not None
        )
        partial = db if whole else self.scratch(grid[1] * d * rows, real)
        tickets = self.scratch(grid[0], np.dtype(np.int64)) if finish else None
        launches = [
            self._launch(
                source, grid, block, dh=address(factor), w=w, inner=inner, s=address(s), delta=address(out),
                partial=address(partial), db=address(db), tickets=_address_or_0(tickets),
                **self._mask(dtype, dropout), size=n * d, line=d * rows,
                scratch=() if whole else (partial,) if tickets is None else (partial, tickets),
            ),
        ]  # fmt: skip
        if not (whole or finish):
            launches += self._column_sums(address(partial), address(db), grid[1] * rows, d, real)
        return launches

    def bias_loss(self, o: table.BiasLoss) -> list[Launch]:
        z, b, y, loss, weight, out = o.z, o.b, o.y, o.loss, o.weight, o.out
        db, value, scalars, samples, total = o.db, o.value, o.scalars, o.samples, o.total
        (n, d), dtype = z.shape, z.dtype
        real, softmax = real_of(dtype), loss.family == "softmax"
        indices = y.ndim == 1 and softmax
        variant = cuda_loss.Variant(indices, weight is not None, address(out) != address(z), scalars is not None)
        scale = loss.scale(samples or n, d, weight is not None)
        width = variant.width(dtype, address(z), address(out), address(y))
        arguments: dict[str, Any] = {
            "z": address(z), "b": address(b), "y": address(y), "weight": _address_or_0(weight), "out": address(out),
            "scalars": _address_or_0(scalars), "scale": real.type(scale), "d": d,
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
            source, grid, block, more = self._softmax(loss, dtype, n, d, width, variant, address(b))
            rows = grid[1]
            arguments |= {"u": real.type(1 / d), "n": n, **more}
        count, leaves_sums = grid[0] * grid[1], "partial" in source.parameters
        rows = rows if leaves_sums else 0
        scratch = self.scratch(rows * d + count, real)
        partial, losses = address(scratch), address(scratch) + rows * d * real.itemsize
        if leaves_sums:
            arguments["partial"] = partial
        first = [self._launch(source, grid, block, **arguments, losses=losses, scratch=(scratch,))]
        if leaves_sums:
            partial, rows, more_sums = self._shorten(partial, rows, d, real)
        else:
            partial, rows, more_sums = self._shorten(address(out), n, d, dtype, always=True)
        first += more_sums
        growth = 1.0 if loss.reduction == "sum" else float(samples or n) if total is None else 0.0
        columns, rows_at_once = passes.block_shape(d, column_sums.SUM_COLUMNS)
        finish = self._launch(
            cuda_loss.finish_loss(dtype), (-(-d // columns) + 1, 1), (columns, rows_at_once),
            partial=partial, db=address(db), losses=losses, value=address(value), weights=_address_or_0(total),
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
            down = at_least(down, n, at_once * IN_A_ROW)
            rows = min(most, -(-n // (down * at_once)) * at_once)
            source = cuda_softmax.softmax_loss_tile(loss, dtype, width, d, variant)
            return source, (1, min(down, -(-n // rows))), (lanes, at_once), {"rows": rows}
        width = width if d % width == 0 and b % VECTOR_BYTES == 0 else 1
        shape = cuda_softmax_rows.row_shape(dtype, width, d, not variant.indices)
        if shape is None:
            width = width if dtype.itemsize < 8 else 1  # two float64 at a time would take more than 64 registers
            source = cuda_softmax_rows.softmax_loss_long(loss, dtype, width, variant)
            return source, (1, at_least(min(n, self.blocks), n, IN_A_ROW)), (THREADS, 1), {}
        threads, _, rows = shape
        down = at_least(min(-(-n // rows), max(1, self.blocks * THREADS // threads)), n, rows * IN_A_ROW)
        return cuda_softmax_rows.softmax_loss_row(loss, dtype, width, shape, variant), (1, down), (threads, 1), {}

    def normalize_weights(self, o: table.NormalizeWeights) -> list[Launch]:
        weight, out = o.weight, o.out
        (n,), dtype = weight.shape, check_dtype(weight.dtype)
        total = self.scratch(1, np.dtype(np.float64)) if o.total is None else o.total
        source = minibatch.normalize_weights(dtype)
        return [
            self._launch(
                source, (1, 1), (THREADS, 1), weight=address(weight), out=address(out), total=address(total), n=n,
                scratch=(total,),
            ),
        ]  # fmt: skip

    def dropout(self, o: table.Dropout) -> list[Launch]:
        x, out = o.x, o.out
        size, dtype = x.size, check_dtype(x.dtype)
        width = passes.width_of(dtype, address(x), address(out))
        source = cuda_dropout.dropout(dtype, width)
        grid = (self._flat_grid(-(-size // width)), 1)
        return [
            self._launch(source, grid, (THREADS, 1), x=address(x), out=address(out), **self._mask(dtype, o), size=size)
        ]

    def accumulate(self, o: table.Accumulate) -> list[Launch]:
        total, term, out = o.total, o.term, o.out
        size, dtype = term.size, check_dtype(term.dtype)
        first, a = total is None, term if total is None else total
        width = passes.width_of(dtype, address(a), address(term), address(out))
        source = cuda_training.accumulate(dtype, width, first)
        grid = (self._flat_grid(-(-size // width)), 1)
        arrays = {"total": address(a), "term": address(term), "out": address(out)}
        return [self._launch(source, grid, (THREADS, 1), **arrays, size=size)]

    def gather(self, *several: table.Gather) -> list[Launch]:
        """Return one launch for gathers of the same rows from up to three arrays."""
        first = several[0]
        n, bx, by = len(first.out), 0, 0
        kinds: list[tuple[str, int]] = []
        arrays: dict[str, int] = {}
        blocks: list[int] = []
        for o, name in zip(several, ("x", "y", "w"), strict=False):
            nbytes = o.out.nbytes // n
            storage, width = _copy_unit(nbytes, address(o.source), address(o.out))
            d = nbytes // np.dtype(STORAGE[storage]).itemsize
            if not kinds:
                bx, by = passes.block_shape(-(-d // width))
            kinds.append((storage, width))
            blocks.append(-(-d // (bx * width)))
            arrays |= {name: address(o.source), f"{name}_out": address(o.out), f"{name}_d": d}
        for name in ("y", "w")[len(several) - 1 :]:
            arrays |= {name: 0, f"{name}_out": 0, f"{name}_d": 0}
        across = sum(blocks)
        down = max(1, min(self.blocks // across, -(-n // (by * minibatch.ROWS_AT_ONCE))))
        return [
            self._launch(
                minibatch.gather(*kinds), (across, down), (bx, by), order=address(first.order), counters=address(first.counters),
                size=len(first.order), rows=len(first.source), n=n, **arrays, x_blocks=blocks[0], y_blocks=sum(blocks[1:2]),
            ),
        ]  # fmt: skip

    def clip(self, o: table.Clip) -> list[Launch]:
        gradients, max_norm, scalars, loss_scaling = o.gradients, o.max_norm, o.scalars, o.loss_scaling
        size, dtype = gradients.size, check_dtype(gradients.dtype)
        if address(gradients) % VECTOR_BYTES:
            raise ValueError("gradients must be aligned to 16 bytes, as backend.zeros returns them")
        vectors = size * dtype.itemsize // VECTOR_BYTES + 1
        blocks = max(self._flat_grid(vectors), -(-vectors // (THREADS * IN_A_ROW)))
        partial = self.scratch(2 * blocks, dtype)
        block = (THREADS, 1)
        return [
            self._launch(
                cuda_training.sum_of_squares(dtype), (blocks, 1), block,
                g=address(gradients), partial=address(partial), size=size, scratch=(partial,),
            ),
            self._launch(
                cuda_training.clip(dtype, loss_scaling), (1, 1), block,
                partial=address(partial), scalars=address(scalars), max_norm=dtype.type(max_norm), count=blocks,
            ),
        ]  # fmt: skip

    def advance(self, o: table.Advance) -> list[Launch]:
        optimizer, rate, batch, counters, scalars, loss_scaling = (
            o.optimizer, o.rate, o.batch, o.counters, o.scalars, o.loss_scaling,
        )  # fmt: skip
        dtype = check_dtype(scalars.dtype)
        source = cuda_training.advance(optimizer, dtype, loss_scaling)
        return [
            self._launch(
                source, (1, 1), (1, 1), rate=address(rate), counters=address(counters), scalars=address(scalars), batch=int(batch),
                **numbered("numbers", [float(x) for x in optimizer.numbers]),
                **numbered("of_schedule", [float(x) for x in optimizer.schedule.numbers]),
            ),
        ]  # fmt: skip

    def update(self, o: table.Update) -> list[Launch]:
        optimizer, parameters, gradients, states, scalars, weights = (
            o.optimizer, o.parameters, o.gradients, o.states, o.scalars, o.weights,
        )  # fmt: skip
        size, dtype = parameters.size, check_dtype(parameters.dtype)
        arrays = {
            "parameters": address(parameters), "gradients": address(gradients),
            "states": address(states) if optimizer.n_states else 0, "copy": _address_or_0(weights),
        }  # fmt: skip
        width = cuda_training.update_width(optimizer, dtype, size, *arrays.values())
        source = cuda_training.update(optimizer, dtype, width, None if weights is None else weights.dtype)
        grid = (self._flat_grid(-(-size // width)), 1)
        limit, real = optimizer.clipping[1], dtype.type
        return [
            self._launch(
                source, grid, (THREADS, 1), **arrays, scalars=address(scalars), size=size,
                limit=real(0 if limit is None else limit), **numbered("numbers", [real(x) for x in optimizer.numbers]),
            ),
        ]  # fmt: skip

    def _mask(self, dtype: np.dtype[Any], dropout: table.Dropout | None) -> dict[str, Any]:
        """Return the arguments of a kernel's dropout mask; without dropout it reads none of them."""
        real = real_of(dtype).type
        if dropout is None:
            return {"counters": 0, "bound": 0, "scale": real(1), "low": 0, "high": 0, "layer": 0, "first": 0}
        low, high = split_seed(dropout.seed)
        return {
            "counters": address(dropout.counters), "bound": keep_threshold(dropout.rate), "scale": real(1 / (1 - dropout.rate)),
            "low": low, "high": high, "layer": dropout.layer, "first": dropout.first_block,
        }  # fmt: skip


def _copy_unit(nbytes: int, *addresses: int) -> tuple[str, int]:
    """Return (storage, width) of the widest access that rows of ``nbytes`` allow; bits are copied unchanged."""
    for size, unit in ((16, ("f4", 4)), (8, ("f8", 1)), (4, ("f4", 1))):
        if not any(number % size for number in (nbytes, *addresses)):
            return unit
    return "u2", 1


def _address_or_0(a: Array | None) -> int:
    return 0 if a is None else address(a)
