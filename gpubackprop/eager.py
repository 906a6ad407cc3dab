"""Passes that are run operation by operation: what ``forward``, ``backward``, ``loss_and_gradients`` and ``trace`` do.

A pass has its own memory for one number of samples, and one caller at a time: threads that share a network share no
memory. Passes are kept and reused; so are the gradients, which passes of all sizes share in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from gpubackprop.activations import identity
from gpubackprop.backends.memory import check_memory, fits, nbytes_of
from gpubackprop.definitions import Array, version_of
from gpubackprop.parameters import Parameters
from gpubackprop.step import layout, passes
from gpubackprop.step.buffers import Buffer, Memory, roots
from gpubackprop.step.operations import Operation

if TYPE_CHECKING:
    from gpubackprop.architecture import Architecture
    from gpubackprop.backends.base import Backend


class Kind(NamedTuple):
    """The purpose of a pass and its queue of the device: nothing orders the work of two queues.

    ``purpose`` is "forward", to be followed by a backward pass for a loss of the caller, or "gradients", for the network's loss.
    """

    purpose: str
    n: int
    class_indices: bool
    weighted: bool
    keep: bool
    queue: Hashable


class Pool:
    """Idle objects, by kind.

    It has no lock: single operations on lists and dicts are atomic, and a lock could stay taken for ever in a forked process.

    Parameters
    ----------
    kinds : int
        How many kinds are kept; the least recently used is dropped first.
    """

    MOST = 16  # idle objects kept per kind

    def __init__(self, kinds: int) -> None:
        self._kinds = kinds
        self._free: dict[Hashable, list[Any]] = {}

    def take(self, kind: Hashable) -> Any:
        """Return one of a kind for the caller alone, or None if there is none."""
        try:
            return self._free[kind].pop()
        except (KeyError, IndexError):
            return None

    def give(self, kind: Hashable, item: Any) -> None:
        """Take one back."""
        free = self._free.pop(kind, [])  # reinsert it as the most recently used
        if len(free) < self.MOST:
            free.append(item)
        self._free[kind] = free
        for old in list(self._free)[: -self._kinds]:
            self._free.pop(old, None)

    def forget_oldest(self) -> None:
        """Drop the objects of one kind."""
        for old in list(self._free)[:1]:
            self._free.pop(old, None)

    def __iter__(self) -> Iterator[Any]:
        return iter([kind for kind, free in list(self._free.items()) if free])

    def __bool__(self) -> bool:
        return bool(self._free)


class Pass:
    """The operations and the memory of an eager pass.

    Attributes
    ----------
    kind : Kind
    layout : Layout
    gradients : Parameters or None
        Where it writes them, while they are lent to it.
    """

    def __init__(self, a: Architecture, backend: Backend, fixed: Mapping[str, Array], kind: Kind) -> None:
        self.kind, self._backend, forward_only = kind, backend, kind.purpose == "forward"
        given = layout.inputs(a, kind.n, class_indices=kind.class_indices, weighted=kind.weighted)
        self.layout = layout.layout(a, given, keep=kind.keep)
        self._memory = Memory(fixed).allocate(own_buffers(self.layout, kind), backend.zeros)
        self.gradients: Parameters | None = None
        first, then = passes.Tape(), passes.Tape()
        passes.forward(self.layout, first)
        if forward_only:
            passes.output_bias(self.layout, first)
            output = self.layout.layers[-1]
            do = Buffer("do_given", output.delta.shape, output.delta.dtype)
            then.bias_activation_backward(do, None, do, identity, out=output.delta, db=output.db)
        else:
            passes.loss(a, self.layout, first)
        passes.backward(self.layout, then)
        self._forward, self._backward = _Prepared(first.operations), _Prepared(then.operations)
        self._dtype = a.dtype
        self._definitions = list(dict.fromkeys([*a.activations, *([] if forward_only else [a.loss])]))
        self._formulas: list[object] = []

    def lend(self, gradients: Parameters | None) -> None:
        """Set the gradients to write to, or None."""
        self.gradients = gradients
        if gradients is not None and self._memory.arrays["gradients"] is not gradients.flat:
            self._memory = Memory(self._memory.arrays | {"gradients": gradients.flat})
            self._forget()

    def forward(self, **given: Array) -> None:
        """Run the forward pass, for "gradients" with the loss; ``given`` are arrays in the places of the inputs."""
        self._run(self._forward, given)

    def backward(self, **given: Array) -> None:
        """Run the backward pass, for "forward" starting from ``do_given``."""
        self._run(self._backward, given)

    def array(self, buffer: Buffer) -> Array:
        """Return the array of a buffer that is not an input."""
        return self._memory.array(buffer)

    def _run(self, operations: _Prepared, given: dict[str, Array]) -> None:
        formulas = [version_of(definition, self._dtype) for definition in self._definitions]
        if formulas != self._formulas:  # a value that an activation or a loss reads has changed
            self._forget()
            self._formulas = formulas
        operations.run(self._backend, self._memory, given)

    def _forget(self) -> None:
        self._forward.forget()
        self._backward.forget()


class _Prepared:
    """Operations that are bound once, except those on arrays passed to each call."""

    def __init__(self, operations: list[Operation]) -> None:
        self._operations = [(o, {b.name for b in roots(getattr(o, name) for name in o.arrays)}) for o in operations]
        self.forget()

    def forget(self) -> None:
        """Bind them again after their memory or formulas have changed."""
        self._ready: list[Callable[[], None] | None] = []

    def run(self, backend: Backend, memory: Memory, given: dict[str, Array]) -> None:
        """Run them in order."""
        if not self._ready:
            fixed = [names.isdisjoint(given) for _, names in self._operations]
            bound = [o.bound(memory) for (o, _), is_fixed in zip(self._operations, fixed, strict=True) if is_fixed]
            prepared = iter(backend.prepare(bound))
            self._ready = [next(prepared) if is_fixed else None for is_fixed in fixed]
        there = Memory(memory.arrays | given) if given else memory
        for ready, (operation, _) in zip(self._ready, self._operations, strict=True):
            if ready is not None:
                ready()
            else:
                backend.execute(operation.bound(there))


class EagerPasses:
    """The passes that a network keeps, within the device's memory.

    Parameters
    ----------
    architecture : Architecture
    backend : Backend
    fixed : mapping of str to array
        The arrays of the network that do not depend on the number of samples.
    """

    def __init__(self, architecture: Architecture, backend: Backend, fixed: Mapping[str, Array]) -> None:
        self._architecture, self._backend, self._fixed = architecture, backend, fixed
        self.kept = Pool(6)
        self.gradients = Pool(6)

    def kind(
        self, purpose: str, n: int, *, class_indices: bool = True, weighted: bool = False, keep: bool = False
    ) -> Kind:
        """Return the kind of a pass on the current queue of the device."""
        return Kind(purpose, n, class_indices, weighted, keep, self._backend.queue())

    def take(self, kind: Kind) -> Pass:
        """Return a pass for the caller alone, with gradients if it computes any; the last few kinds are kept."""
        taken: Pass | None = self.kept.take(kind)
        if taken is None:
            self.check_memory_for(kind)
            taken = Pass(self._architecture, self._backend, self._fixed, kind)
        if kind.purpose == "gradients":
            self.lend_gradients(taken)
        return taken

    def give(self, taken: Pass) -> None:
        """Take a pass back from its caller; not after an exception, since work may still write to it."""
        self.take_gradients(taken)
        self.kept.give(taken.kind, taken)

    def lend_gradients(self, to: Pass) -> None:
        """Give a pass memory for gradients."""
        a, gradients = self._architecture, self.gradients.take(to.kind.queue)
        to.lend(gradients or Parameters.zeros(self._backend, a.layer_sizes, a.real))

    def take_gradients(self, of: Pass) -> None:
        """Take the gradients back."""
        if of.gradients is not None:
            self.gradients.give(of.kind.queue, of.gradients)
            of.lend(None)

    def check_memory_for(self, kind: Kind, data: int = 0) -> None:
        """Raise DeviceMemoryError if a new pass and this many bytes of data do not fit, even without the older passes."""
        a, n = self._architecture, kind.n
        new = kind.purpose == "gradients" and kind.queue not in self.gradients
        gradients = nbytes_of([layout.fixed(a).gradients]) if new else 0

        def memory_plan(k: int) -> dict[str, int]:
            given = layout.inputs(a, k, class_indices=kind.class_indices, weighted=kind.weighted)
            workspace = nbytes_of(own_buffers(layout.layout(a, given, keep=kind.keep), kind))
            return {"data": -(-data * k // n), "workspace": workspace, "gradients": gradients}

        self.free_for(sum(memory_plan(kind.n).values()))
        check_memory(self._backend, f"{kind.purpose} over {kind.n} samples", kind.n, memory_plan)

    def free_for(self, wanted: int) -> None:
        """Drop passes, the oldest first, until this many bytes can be allocated."""
        while self.kept and not fits(self._backend, wanted):
            self.kept.forget_oldest()
            self.gradients.forget_oldest()


def own_buffers(of: layout.Layout, kind: Kind) -> list[Buffer]:
    """Return the buffers that a pass has memory for: for "gradients" it reads the caller's X, y and weights."""
    given = of.inputs
    mine = [given.X] if kind.purpose == "forward" else []
    return [*mine, *(b for b in (given.normalized, given.total) if b is not None), *of.workspace]
