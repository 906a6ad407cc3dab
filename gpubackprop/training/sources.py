"""Sources of mini-batches: a data set on the device, or one on the host that is copied while the device computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpubackprop.backends.base import Run
from gpubackprop.definitions import Array, address, version_of
from gpubackprop.network import Data, Network
from gpubackprop.optimizers import Optimizer
from gpubackprop.step import Step
from gpubackprop.step.buffers import Memory
from gpubackprop.step.operations import Gather

KEPT = (
    64 << 20
)  # bytes that a network keeps from one fit to the next; where a step has more, compiling it hardly counts


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
    snapshots : list of Snapshot
        Memory for copies of what a step changes; empty until the first are made.
    """

    value: Array
    order: np.ndarray | None = None

    def __init__(self, data: Data, batch_size: int) -> None:
        self.data, self.rows = data, len(data.X)
        self.batch_size = min(batch_size, self.rows)
        self.snapshots: list[Any] = []

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


class Prepared:
    """The compiled steps on a data set, by their numbers of samples, with their memory.

    Parameters
    ----------
    network : Network
    data : Data
        On the network's device.
    sizes : sequence of int
        The largest first: the others share its memory.
    optimizer : Optimizer
    micro_batch_size : int or "auto", optional
        See :meth:`gpubackprop.MLP.step`.

    Attributes
    ----------
    runs : dict of int to Run
    order, value : array
        The order of the rows, and the losses, that the steps read and write.
    snapshots : list of Snapshot
        See :class:`Source`.
    """

    def __init__(
        self,
        network: Network,
        data: Data,
        sizes: Sequence[int],
        optimizer: Optimizer,
        micro_batch_size: int | str | None,
    ) -> None:
        self._backend, self._memory = network.backend, Memory()
        options = {"memory": self._memory, "data": data, "micro_batch_size": micro_batch_size}
        steps = {n: network.step(n, optimizer, **options) for n in sizes}  # type: ignore[arg-type]
        self.runs = {n: step.compile() for n, step in steps.items()}
        self._gathers = {n: _gathers(step) for n, step in steps.items()}
        self.order, self.value = data.order, self._memory.arrays["loss"]
        self._data = _arrays(data)
        self.snapshots: list[Any] = []

    def attach(self, data: Data) -> bool:
        """Read other data of the same shapes and dtypes; return whether the steps can."""
        self.order[...] = data.order
        return self._rebind(_arrays(data))

    def release(self) -> int:
        """Read one sample of zeros instead of the data, if the steps can; return the bytes that they hold."""
        zeros = self._backend.zeros
        self._rebind({name: zeros((1, *a.shape[1:]), a.dtype) for name, a in self._data.items()})
        held = [*self._memory.arrays.values(), *self._data.values()]
        return sum(int(a.nbytes) for a in (*held, *self.snapshots))

    def _rebind(self, arrays: dict[str, Array]) -> bool:
        if all(address(a) == address(self._data[name]) for name, a in arrays.items()):
            return True
        for n, run in self.runs.items():
            if not self._backend.rebind(run, {k: arrays[name] for k, name in self._gathers[n].items()}):
                return False
        self._data = arrays
        return True


def _gathers(step: Step) -> dict[int, str]:
    """Return the numbers of the operations that gather rows of the data, and from which array."""
    return {k: o.source.name for k, o in enumerate(step.operations) if isinstance(o, Gather)}


def _arrays(data: Data) -> dict[str, Array]:
    """Return the arrays that the steps gather from, by their names."""
    named = {"X_all": data.X, "y_all": data.y, "w_all": data.weight}
    return {name: a for name, a in named.items() if a is not None}


class Resident(Source):
    """A data set on the device: the step gathers its rows there.

    The compiled steps are kept with the network: the next fit with the same optimizer, on data of the same shapes, uses them again.

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
        self._network, self._backend = network, network.backend
        formulas = [version_of(d, network.real) for d in (*network.activations, network.loss, optimizer)]
        forms = [(a.shape, a.dtype) for a in _arrays(data).values()]
        state = address(network.state_of(optimizer).rate)  # of the same optimizer, as long as a step holds it
        self._kind = state, self.batch_size, micro_batch_size, forms, formulas
        kind, prepared = network.kept.pop("steps", (None, None))
        if kind != self._kind or not prepared.attach(data):
            prepared = Prepared(network, data, self.sizes, optimizer, micro_batch_size)
        self._prepared: Prepared = prepared
        self.value, self.snapshots = prepared.value, prepared.snapshots

    def begin(self, order: np.ndarray | None) -> None:
        if order is not None:
            self.order = order
            self._prepared.order[...] = self._backend.asarray(order)

    def run(self, n: int, times: int) -> None:
        self._prepared.runs[n](times)

    def close(self) -> None:
        """Keep the steps for the next fit, unless they take much memory."""
        if self._prepared.release() <= KEPT:
            self._network.kept["steps"] = self._kind, self._prepared


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
