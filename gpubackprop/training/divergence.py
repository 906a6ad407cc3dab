"""When the loss becomes NaN, or a parameter NaN or infinite, the step is found, named, and undone.

A loss that is infinite while its gradient and the parameters are finite is only too large for its dtype, and the training goes on.

A step has no extra check. A NaN stays in the sum of the losses and in the parameters, so it is seen where the host looks
anyway: at the end of an epoch, before a checkpoint, on the CPU after each chunk of steps. Then the steps since the last good
copy are repeated one by one, with the same bits, to find the first bad one.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gpubackprop.backends.memory import RESERVE, DeviceMemoryError, free_bytes
from gpubackprop.network import Data
from gpubackprop.step.state import CURSOR, LEAST_SCALE, RATE, SCALE, SKIP, STEPS
from gpubackprop.training.snapshot import Snapshot, all_finite
from gpubackprop.training.sources import Source

if TYPE_CHECKING:
    from gpubackprop.training.history import Training

POLICIES = ("stop", "raise", "skip")
MARK_EVERY = 10.0  # seconds between two good copies within an epoch
MOST_SKIPPED = 100  # skipped mini-batches in a row after which a training stops


class Divergence(NamedTuple):
    """A step whose loss is NaN, or after which the parameters are not finite."""

    step: int
    """From 1."""
    epoch: int
    """From 1."""
    batch: int
    """The mini-batch of the epoch, from 1."""
    learning_rate: float
    what: str
    """The first value that is not finite, with its layer."""
    kept: int
    """The parameters are now those before this step: the last with a finite loss."""

    def __str__(self) -> str:
        return (
            f"training diverged at step {self.step} (epoch {self.epoch}, mini-batch {self.batch}) with learning rate "
            f"{self.learning_rate:g}: {self.what}"
        )


class DivergenceWarning(RuntimeWarning):
    """A training has stopped, or skipped a mini-batch, because a loss was NaN or a parameter not finite."""


class DivergenceError(ArithmeticError):
    """A loss is NaN or a parameter not finite, with ``on_divergence="raise"``; ``divergence`` says where."""

    def __init__(self, divergence: Divergence) -> None:
        super().__init__(f"{divergence}; the parameters are those before step {divergence.kept}")
        self.divergence = divergence


class Stop(Exception):  # noqa: N818  (not an error: it ends the loop over epochs)
    """The training ends before a step, with the last good parameters."""

    def __init__(self, divergence: Divergence) -> None:
        super().__init__(str(divergence))
        self.divergence = divergence


def ending(found: Divergence, policy: str) -> DivergenceError | Stop:
    """Return the exception that ends a training where the policy is not to skip, or no longer."""
    return DivergenceError(found) if policy == "raise" else Stop(found)


class Guard:
    """Checks that a training is finite, and finds the step after which it was not.

    Parameters
    ----------
    training : Training
    source : Source
    data : Data
    policy : {"stop", "raise", "skip"}
    """

    # [0]: the last finite state; [1]: the one before it, from which a step had a finite loss too; none where there is no memory
    _copies: list[Snapshot]

    def __init__(self, training: Training, source: Source, data: Data, policy: str) -> None:
        self._training, self._source, self._data, self._policy = training, source, data, policy
        self._network = training.model.network
        state = self._network.optimizer_state
        assert state is not None
        self._state, self._xp = state, self._network.backend.xp
        self._copies = source.snapshots
        self._copies += [] if self._copies else self._copy(2)
        if not self._copies and policy == "skip":
            raise DeviceMemoryError(
                "on_divergence='skip' keeps two copies of parameters and optimizer state, which do not fit"
            )
        self._sound = True  # the losses since the last mark were finite
        self._row, self._skipped, self._in_a_row, self._marked = 0, 0.0, 0, 0.0
        self._looks_often = self._xp is np  # where a check costs nothing

    def mark(self) -> None:
        """Record the current state as finite."""
        if self._copies:
            if self._sound:
                self._copies.reverse()
            self._copies[0].take()
        self._row, self._skipped = self._training.position.row, self._training.position.skipped
        self._marked = time.monotonic()

    def look(self, *, closely: bool = False) -> None:
        """Check that the losses, and if ``closely`` the parameters too, are finite; if not, apply the policy."""
        late = time.monotonic() - self._marked > MARK_EVERY
        if not (closely or late or self._looks_often):
            return
        self._sound = math.isfinite(float(self._source.value[1]))
        if not self._is_finite(closely=closely or late):
            self._go_again()
        elif late:
            self.mark()

    def _copy(self, count: int) -> list[Snapshot]:
        """Return so many copies of what a step changes, or none where they would take the device's last memory."""
        needed = count * sum(a.nbytes for a in Snapshot.arrays_of(self._network, self._source.value))
        free = free_bytes(self._network.backend, needed)
        fit = free is None or needed <= free - min(RESERVE, free // 8)
        return [Snapshot(self._network, self._source.value) for _ in range(count)] if fit else []

    def _is_finite(self, *, closely: bool) -> bool:
        return not math.isnan(float(self._source.value[1])) and (
            not closely or all_finite(self._network.parameters.flat, self._xp)
        )

    def _go_again(self) -> None:
        """Repeat the steps since the last good state, one by one."""
        training, counters, end = self._training, self._state.counters, self._training.position.row
        steps = self._copy(2) if self._copies else []
        if not steps:
            self._give_up()
        good, last_good = self._copies
        before, last = steps
        good.put_back(self._network)
        row, skipped = self._row, self._skipped
        self._source.seek(row)
        while row < end:
            n, _ = self._source.ahead(row)
            before.take()
            self._source.run(n, 1)
            if self._is_finite(closely=True):
                self._in_a_row = 0
                before, last = last, before
                if math.isfinite(float(self._source.value[0])):
                    last_good = last
            else:
                skipped += self._weight(row, n)
                if self._scaled_down():
                    self._source.value[1] = before.loss_sum
                else:
                    self._take_back(before, last_good, row, n)
                counters[CURSOR] = row + n
                self._source.seek(row + n)
            row += n
        training.position = training.position._replace(row=row, skipped=skipped)
        self.mark()

    def _scaled_down(self) -> bool:
        """Return whether loss scaling has skipped the step, as it is meant to."""
        scalars = self._state.scalars
        return (
            self._network.architecture.loss_scaling
            and float(scalars[SKIP]) == 1
            and float(scalars[SCALE]) > LEAST_SCALE
            and all_finite(self._network.parameters.flat, self._xp)
        )

    def _take_back(self, before: Snapshot, last_good: Snapshot, row: int, n: int) -> None:
        """Undo the step on these rows, and raise, stop or continue without it."""
        training, state, source = self._training, self._state, self._source
        rate, loss = float(state.scalars[RATE]), float(source.value[0])
        bad = [i for i, W in enumerate(self._network.parameters.W) if not all_finite(W, self._xp)]
        before.put_back(self._network)
        source.seek(row)
        step, cause = int(state.counters[STEPS]) + 1, self._cause(row, n, loss, bad)
        self._in_a_row += 1
        ends = self._policy != "skip" or self._in_a_row > MOST_SKIPPED
        if ends and not math.isfinite(loss):  # all that is known of the parameters is that they are finite
            last_good.put_back(self._network)
        found = Divergence(
            step, training.epoch + 1, row // source.batch_size + 1, rate, cause, kept=int(state.counters[STEPS]) + 1
        )
        training.position = training.position._replace(row=row)
        if ends:
            raise ending(found, self._policy)
        training.history.skipped.append(found)

    def _give_up(self) -> None:
        """End without having found the step, for want of memory to repeat steps in: at the last good state, if there is one."""
        step = int(self._state.counters[STEPS])
        for good in self._copies[:1]:
            good.put_back(self._network)
        what = "the loss or a parameter is not finite; there was no memory to find the first such step"
        what += "" if self._copies else ", nor to keep good parameters"
        found = Divergence(
            step, self._training.epoch + 1, self._training.position.row // self._source.batch_size,
            float(self._state.scalars[RATE]), what, kept=int(self._state.counters[STEPS]) + 1,
        )  # fmt: skip
        raise ending(found, self._policy)

    def _rows(self, row: int, n: int) -> Any:
        order = self._source.order
        return slice(row, row + n) if order is None else order[row : row + n]

    def _weight(self, row: int, n: int) -> float:
        """Return the weight of a mini-batch's rows in the loss of the epoch."""
        if self._network.loss.reduction == "sum":
            return 0.0
        weight = self._data.weight
        return float(n if weight is None else weight[self._rows(row, n)].sum(dtype=np.float64))

    def _cause(self, row: int, n: int, loss: float, bad: list[int]) -> str:
        """Return the first value that is not finite in the step on these rows, from the parameters before it, without dropout."""
        names = [*(f"layer {i + 1}" for i in range(len(self._network.activations))), "the output layer"]
        rows, data = self._rows(row, n), self._data
        try:
            trace = self._training.model.trace(
                data.X[rows], data.y[rows], None if data.weight is None else data.weight[rows]
            )
        except DeviceMemoryError:  # a diagnosis must not raise
            return f"the loss is {loss:g}"
        for name, layer in zip(names, trace.layers, strict=True):
            if not all_finite(layer.z, self._xp):
                return f"the outputs of {name} overflow"
        if not math.isfinite(loss):
            return f"the loss is {loss:g}, though all outputs are finite"
        for name, layer in reversed(list(zip(names, trace.layers, strict=True))):
            if not (all_finite(layer.dW, self._xp) and all_finite(layer.db, self._xp)):
                return f"the gradients of {name} overflow"
        return f"the update makes the parameters of {names[bad[0]] if bad else 'a layer'} infinite or NaN"
