"""A training step as data: the operations of forward, loss, backward and update, in order.

Everything reads this list: ``backend.compile`` runs it, ``explain`` prints it, the ledger adds it up, the gradient check
walks through it. It is recorded without memory or device, for any number of samples; :meth:`Step.on` binds it to both.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from gpubackprop.definitions import Array
from gpubackprop.step import layout as buffers
from gpubackprop.step import passes
from gpubackprop.step.buffers import Buffer, Memory, roots
from gpubackprop.step.layout import Layout
from gpubackprop.step.operations import Operation

if TYPE_CHECKING:
    from gpubackprop.architecture import Architecture
    from gpubackprop.optimizers import Optimizer


class Run(Protocol):
    """A compiled step."""

    def __call__(self, times: int = 1) -> None:
        """Run the step ``times`` times; on a GPU, queue it and return."""
        ...


class Device(Protocol):
    """What a step needs from a backend."""

    def run(self, operation: Operation) -> Operation:
        """Check an operation's arrays, and run it."""
        ...

    def compile(self, step: Step) -> Run:
        """Return a function that runs the step."""
        ...


class Names:
    """The arrays of a step by name: ``step.names.array("X")`` is where the mini-batch goes."""

    def __init__(self, step: Step) -> None:
        self._step = step

    def buffer(self, name: str) -> Buffer:
        """Return the buffer of a name.

        Raises
        ------
        ValueError
            The step has none of that name.
        """
        try:
            return self._step.buffers[name]
        except KeyError:
            have = ", ".join(self._step.buffers)
            raise ValueError(f"this step has no array {name!r}; it has {have}") from None

    def array(self, name: str) -> Array:
        """Return the array of a name."""
        buffer = self.buffer(name)
        if self._step.memory is None:
            raise ValueError("this step has no memory; model.step(...) returns one with memory")
        return self._step.memory.array(buffer)


@dataclass(frozen=True, eq=False)
class Step:
    """One training step: a flat list of operations.

    Parameters
    ----------
    operations : tuple of Operation
    keep : bool
        Every intermediate has its own memory and is kept after the step; else a backend may omit what nothing reads.
    gradients : dict of str to str
        Each gradient that is computed, and of which array: ``{"dW_1": "W_1", "delta_1": "z_1", ...}``.
    backend : Device, optional
        A backend.
    memory : Memory, optional
        The arrays it runs on, at fixed addresses.
    """

    operations: tuple[Operation, ...]
    keep: bool = False
    gradients: dict[str, str] = field(default_factory=dict, repr=False)
    backend: Device | None = field(default=None, repr=False)
    memory: Memory | None = field(default=None, repr=False)

    def __reduce__(self) -> Any:
        if self.memory is None:
            return Step, (self.operations, self.keep, self.gradients)
        raise TypeError(
            "a step is bound to the memory of its network and cannot be copied; create one from the copy: copy.step(...)"
        )

    def on(self, backend: Device, memory: Memory) -> Step:
        """Return the step on a device, in memory with an array for each of its buffers."""
        return replace(self, backend=backend, memory=memory)

    @cached_property
    def buffers(self) -> dict[str, Buffer]:
        """All buffers by name, in the order in which the operations name them."""
        found: dict[str, Buffer] = {}
        for operation in self.operations:
            for name in operation.arrays:
                buffer = getattr(operation, name)
                if buffer is not None:
                    found.setdefault(buffer.own.name, buffer.own)
                    if not buffer.transposed:
                        found.setdefault(buffer.name, buffer)
        return found

    @property
    def roots(self) -> list[Buffer]:
        """The buffers with their own memory."""
        return list(roots(self.buffers.values()))

    @property
    def names(self) -> Names:
        """The arrays by name."""
        return Names(self)

    def bound(self) -> list[Operation]:
        """Return the operations on arrays."""
        if self.memory is None:
            raise ValueError("this step has no memory; model.step(...) returns one with memory")
        return [operation.bound(self.memory) for operation in self.operations]

    def compile(self) -> Run:
        """Return the backend's function that runs the step, once or ``times`` times."""
        if self.backend is None:
            raise ValueError("this step has no device; model.step(...) returns one with a device")
        return self.backend.compile(self)

    def run_eagerly(self) -> None:
        """Run the operations one by one, each checked and bound: the same bits as the compiled step."""
        for operation in self.bound():
            assert self.backend is not None
            self.backend.run(operation)

    @property
    def flops(self) -> int:
        """FLOP of one step."""
        return sum(operation.flops for operation in self.operations)

    @property
    def bytes(self) -> int:
        """Bytes that the operations of one step read and write."""
        return sum(operation.nbytes for operation in self.operations)

    def needs(self, operation: Operation) -> tuple[str, ...]:
        """Return the arrays that an operation needs and an earlier one writes: the relation A <= B of the dependency order."""
        earlier: dict[str, Buffer] = {}
        for other in self.operations:
            if other is operation:
                break
            earlier.update({buffer.name: buffer for buffer in other.written})
        found: dict[str, None] = {}
        for buffer in operation.read:
            if buffer.name in earlier:
                found[buffer.name] = None
            else:  # the array it is part of, or its parts: all gradients are one array
                whole = [name for name, b in earlier.items() if b.within(buffer) or buffer.within(b)]
                found.update(dict.fromkeys(whole))
        return tuple(found)

    def __str__(self) -> str:
        symbols = {buffer.name: str(buffer) for buffer in self.buffers.values()}
        lines = []
        for number, operation in enumerate(self.operations, 1):
            needs = ", ".join(symbols[name] for name in self.needs(operation)) or "-"
            lines.append(
                f"{number:3d}  {operation.phase:8s}  {operation.equation}\n"
                f"{'':15s}needs {needs};  {operation.flops:,} FLOP, {operation.nbytes:,} bytes"
            )
        lines.append(f"total: {self.flops:,} FLOP, {self.bytes:,} bytes in {len(self.operations)} operations")
        return "\n".join(lines)


def record(
    architecture: Architecture,
    n: int,
    optimizer: Optimizer | None = None,
    *,
    class_indices: bool = True,
    weighted: bool = False,
    keep: bool = False,
    micro_batch: int | None = None,
    rows: int | None = None,
) -> Step:
    """Return one training step over n samples as data, without memory or device.

    Parameters
    ----------
    architecture : Architecture
    n : int
    optimizer : Optimizer, optional
        Without one, the step ends with the gradients.
    class_indices, weighted, keep : bool
        See :meth:`gpubackprop.MLP.step`.
    micro_batch : int, optional
        Run the passes on this many samples at a time.
    rows : int, optional
        Rows of a data set from which the step first gathers its mini-batch.

    Examples
    --------
    >>> from gpubackprop.architecture import Architecture
    >>> record(Architecture((784, 4096, 4096, 10)), 10**6).flops
    114688500000000
    """
    a, tape, m = architecture, passes.Tape(), micro_batch or n
    fixed = buffers.fixed(a)
    given = buffers.inputs(a, n, class_indices=class_indices, weighted=weighted)
    training = optimizer is not None
    if rows is not None:
        passes.gather(given, rows, fixed, tape)
    if m < n and weighted and a.loss.reduction == "mean":
        tape.phase = "input"
        tape.normalize_weights(given.weight, out=given.normalized, total=given.total)
    gradients: dict[str, str] = {}
    for first in range(0, n, m):
        part = buffers.layout(a, given.rows(first, min(m, n - first)), dropout=True, keep=keep, first=first)
        gradients = gradients or part.gradients
        passes.forward(part, tape)
        scalars = fixed.scalars if training and a.loss_scaling else None  # do in float16 is scaled against underflow
        passes.loss(a, part, tape, scalars=scalars, samples=n if m < n else None)
        passes.backward(part, tape)
        if m < n:
            _add_up(a, part, tape, begins=first == 0, ends=first + m >= n)
    if optimizer is not None:
        passes.update(a, optimizer, n, tape)
    return Step(tuple(tape.operations), keep, gradients)


def record_forward(layout: Layout) -> Step:
    """Return the forward pass alone; it ends with o, bias included."""
    tape = passes.Tape()
    passes.forward(layout, tape)
    passes.output_bias(layout, tape)
    return Step(tuple(tape.operations))


def _add_up(a: Architecture, part: Layout, tape: passes.Tape, *, begins: bool, ends: bool) -> None:
    """Add loss and gradients of a micro-batch to the sums of the earlier ones, in order."""
    terms = buffers.fixed(a).gradients, part.value.view("loss[0]", (1,))
    for total, term in zip(buffers.sums(a), terms, strict=True):
        tape.accumulate(None if begins else total, term, out=term if ends else total)
