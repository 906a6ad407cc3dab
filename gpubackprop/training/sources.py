"""Sources of mini-batches: a data set on the device, or one on the host that is copied while the device computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gpubackprop.backends.base import Run
from gpubackprop.definitions import Array
from gpubackprop.network import Data, Network
from gpubackprop.optimizers import Optimizer
from gpubackprop.step.buffers import Memory


class Source:
    """Takes the steps of an epoch on the mini-batches of a data set.

    Parameters
    ----------
    data : Data
    batch_size : int

    Attributes
    ----------
    rows, batch_size : int
        The size of the data set, and of every mini-batch of an epoch but perhaps the last.
    order : array or None
        The order of the rows in this epoch; None means that of ``data``.
    value : array, shape (2,)
        On the device: the loss of the last mini-batch, and the sum over all since it was set to 0.
    """

    value: Array
    order: np.ndarray | None = None

    def __init__(self, data: Data, batch_size: int) -> None:
        self.data, self.rows = data, len(data.X)
        self.batch_size = min(batch_size, self.rows)

    @property
    def sizes(self) -> list[int]:
        """The sizes of an epoch's mini-batches, the largest first."""
        rest = self.rows % self.batch_size
        return [self.batch_size, rest] if rest else [self.batch_size]

    def ahead(self, row: int) -> tuple[int, int]:
        """Return the size of the mini-batch that begins at a row of the epoch, and how many of that size follow."""
        full = (self.rows - row) // self.batch_size
        return (self.batch_size, full) if full else (self.rows - row, 1)

    def compiled(self, network: Network, optimizer: Optimizer, **options: Any) -> dict[int, Run]:
        """Return the compiled step of each size: the largest comes first, and the others share its memory."""
        return {n: network.step(n, optimizer, **options).compile() for n in self.sizes}

    def begin(self, order: np.ndarray | None) -> None:
        """Begin an epoch, with the rows in this order; None keeps the order."""
        raise NotImplementedError

    def seek(self, row: int) -> None:
        """Go to a row of the epoch; the caller sets the counters of the optimizer's state."""

    def run(self, n: int, times: int) -> None:
        """Queue ``times`` steps on the next mini-batches of n samples."""
        raise NotImplementedError

    def close(self) -> None:
        """Wait for work in the background."""


class Resident(Source):
    """A data set on the device: the step gathers its rows there.

    Parameters
    ----------
    network : Network
    data : Data
        On the network's device.
    batch_size : int
    optimizer : Optimizer
    micro_batch_size : int or "auto", optional
        See :meth:`gpubackprop.MLP.step`.
    """

    def __init__(
        self,
        network: Network,
        data: Data,
        batch_size: int,
        optimizer: Optimizer,
        micro_batch_size: int | str | None = None,
    ) -> None:
        super().__init__(data, batch_size)
        self._backend, memory = network.backend, Memory()
        self._runs = self.compiled(network, optimizer, memory=memory, data=data, micro_batch_size=micro_batch_size)
        self.value = memory.arrays["loss"]

    def begin(self, order: np.ndarray | None) -> None:
        if order is not None:
            self.order = order
            self.data.order[...] = self._backend.asarray(order)

    def run(self, n: int, times: int) -> None:
        self._runs[n](times)


@dataclass
class Slot:
    """One of the two buffers: on the device, in pinned memory, the events around its copy, and the step that reads it."""

    pinned: tuple[Array, ...]
    targets: tuple[Array, ...]
    copied: Any
    read: Any
    runs: dict[int, Run]


class Streamed(Source):
    """A data set on the host: its mini-batches are copied while the device computes, with the bits of :class:`Resident`.

    There are two buffers on the device, each with a buffer in pinned memory, and two compiled steps that share one workspace. While
    the device takes a step from one buffer, the host gathers the rows of the next mini-batch and a separate stream
    copies them into the other. Events order the two streams in both directions: a step waits for its copy, and a copy waits for the
    step that read the buffer before. The host waits only where it is two batches ahead: a pinned buffer must not be written
    to before its last copy is done.

    Parameters
    ----------
    network : Network
        On a CUDA device.
    data : Data
        With X, y and weight on the host, in the dtypes of the device.
    batch_size : int
    optimizer : Optimizer
    micro_batch_size : int or "auto", optional
        See :meth:`gpubackprop.MLP.step`.
    """

    def __init__(
        self,
        network: Network,
        data: Data,
        batch_size: int,
        optimizer: Optimizer,
        micro_batch_size: int | str | None = None,
    ) -> None:
        import cupy
        import cupyx

        super().__init__(data, batch_size)
        self._device = cupy.cuda.Device(int(network.device.partition(":")[2] or 0))
        self._current = cupy.cuda.get_current_stream
        self.sources = tuple(a for a in (data.X, data.y, data.weight) if a is not None)
        indices, weighted = data.y.ndim == 1, data.weight is not None
        self.slots: list[Slot] = []
        with self._device:
            self.stream = cupy.cuda.Stream(non_blocking=True)
            memory = Memory()
            for _ in range(2):
                memory = memory.but("X", "y", "w", "w_normalized", "w_sum")  # the rest is shared by both
                runs = self.compiled(
                    network, optimizer, memory=memory, class_indices=indices, weighted=weighted,
                    micro_batch_size=micro_batch_size,
                )  # fmt: skip
                targets = tuple(memory.arrays[name] for name in ("X", "y", "w") if name in memory)
                pinned = tuple(cupyx.empty_pinned(a.shape, a.dtype) for a in targets)
                events = [cupy.cuda.Event(disable_timing=True) for _ in range(2)]
                self.slots.append(Slot(pinned, targets, events[0], events[1], runs))
            for slot in self.slots:  # the first copy comes after the initial zeros of the buffers
                slot.read.record(self._current())
        self.value: Array = memory.arrays["loss"]
        self._next = self._cursor = 0

    def begin(self, order: np.ndarray | None) -> None:
        self.order = self.order if order is None else order
        self._cursor = 0

    def seek(self, row: int) -> None:
        self._cursor = row

    def run(self, n: int, times: int) -> None:
        order = self.data.order if self.order is None else self.order
        for _ in range(times):
            self.step(order[self._cursor : self._cursor + n])
            self._cursor += n

    def step(self, rows: np.ndarray) -> None:
        """Queue a training step on these rows of the data set."""
        slot, n = self.slots[self._next], len(rows)
        self._next = 1 - self._next
        if not slot.copied.done:  # True before the first copy
            slot.copied.synchronize()
        for source, pinned in zip(self.sources, slot.pinned, strict=True):
            np.take(source, rows, axis=0, out=pinned[:n], mode="clip")  # "raise" would go through a buffer
        with self._device:
            compute = self._current()
            self.stream.wait_event(slot.read)
            for target, pinned in zip(slot.targets, slot.pinned, strict=True):
                nbytes = n * (pinned.nbytes // len(pinned))
                target.data.copy_from_host_async(pinned.ctypes.data, nbytes, self.stream)
            slot.copied.record(self.stream)
            compute.wait_event(slot.copied)
            slot.runs[n]()
            slot.read.record(compute)

    def close(self) -> None:
        """Wait for the copies; after an interruption one may still be running, into memory that is about to be freed."""
        self.stream.synchronize()
