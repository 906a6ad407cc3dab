"""The step as data: the operations of forward, loss, backward and update, recorded once, in order.

The passes in :mod:`gpubackprop.network` are written against the Backend protocol. Given a backend they compute; given a
:class:`Recorder`, which has the same methods, they leave a list of :class:`Operation`. Everything else reads that
list: ``backend.compile(step)`` runs it, ``explain`` prints it, the ledger adds it up, the gradient check walks through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gpubackprop.definitions import Array, address

if TYPE_CHECKING:
    from gpubackprop.activations import Activation
    from gpubackprop.backends.base import Backend, Run
    from gpubackprop.losses import Loss
    from gpubackprop.optimizers import Optimizer


class Names:
    """Names of arrays, by the identity of the view: z_1 and h_1 may share memory and are two views of it."""

    def __init__(self) -> None:
        self._named: dict[int, tuple[str, Array]] = {}  # holding the view keeps its id unique

    def __reduce__(self) -> Any:
        raise TypeError(
            "a step is bound to the memory of its network and cannot be copied; make one of the copy: copy.step(...)"
        )

    def __call__(self, name: str, array: Array) -> Array:
        """Return a new view of ``array`` called ``name``."""
        view = array.view()
        self._named[id(view)] = (name, view)
        return view

    def of(self, array: Array) -> str:
        """Return the name of a view."""
        return self._named[id(array)][0]

    def array(self, name: str) -> Array:
        """Return the view called ``name``."""
        return next(view for known, view in self._named.values() if known == name)

    def update(self, other: Names) -> None:
        """Take over the names of ``other``."""
        self._named.update(other._named)


@dataclass(frozen=True)
class Operation:
    """One call of a backend method.

    Parameters
    ----------
    name : str
        The method.
    arguments : dict
        Its arguments by name: arrays with fixed places, definitions, numbers.
    phase : str
        "input", "forward", "loss", "backward" or "update".
    equation : str
        What it computes, in the names of its arrays.
    reads, writes : tuple of str
        The names of the arrays it needs and gives.
    flops, bytes : int
        FLOP: 2 m n k for a product; one per element for each addition, product and evaluation of a function. Bytes:
        each array it reads or writes, once.
    """

    name: str
    arguments: dict[str, Any] = field(repr=False)
    phase: str
    equation: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    flops: int
    bytes: int


class Recorder:
    """Has the methods of a backend's hot path; each appends an operation and returns its outputs, unchanged."""

    def __init__(self, names: Names) -> None:
        self.names = names
        self.operations: list[Operation] = []
        self.phase = "forward"

    def _add(
        self,
        name: str,
        arguments: dict[str, Any],
        equation: str,
        reads: Sequence[Array | None],
        writes: Sequence[Array | None],
        flops: int,
    ) -> None:
        read = [a for a in reads if a is not None]
        written = [a for a in writes if a is not None]
        self.operations.append(
            Operation(
                name,
                arguments,
                self.phase,
                equation,
                tuple(self.names.of(a) for a in read),
                tuple(self.names.of(a) for a in written),
                flops,
                sum(a.nbytes for a in (*read, *written)),
            )
        )

    def matmul(self, a: Array, b: Array, out: Array) -> Array:
        of = self.names.of
        flops = 2 * a.shape[0] * a.shape[1] * b.shape[1]
        self._add("matmul", {"a": a, "b": b, "out": out}, f"{of(out)} = {of(a)} {of(b)}", [a, b], [out], flops)
        return out

    def bias_activation_forward(self, z: Array, b: Array, activation: Activation, out: Array) -> Array:
        of = self.names.of
        kept = [] if address(z) == address(out) else [z]
        equation = f"{of(z)} += {of(b)};  {of(out)} = {activation.label}({of(z)})"
        arguments = {"z": z, "b": b, "activation": activation, "out": out}
        self._add("bias_activation_forward", arguments, equation, [z, b], [*kept, out], 2 * z.size)
        return out

    def bias_activation_backward(
        self, dh: Array, z: Array | None, h: Array | None, activation: Activation, out: Array, db: Array
    ) -> tuple[Array, Array]:
        of = self.names.of
        at = h if activation.needs == "h" else z
        index = of(out).split("_")[1]
        equation = f"{of(out)} = {of(dh)} ⊙ {activation.label}′(z_{index});  {of(db)} = Σ_rows {of(out)}"
        arguments = {"dh": dh, "z": z, "h": h, "activation": activation, "out": out, "db": db}
        self._add("bias_activation_backward", arguments, equation, [dh, at], [out, db], 3 * dh.size)
        return out, db

    def bias_loss(
        self,
        z: Array,
        b: Array,
        y: Array,
        loss: Loss,
        weight: Array | None,
        out: Array,
        db: Array,
        value: Array,
        scalars: Array | None = None,
        samples: int | None = None,
        total: Array | None = None,
    ) -> tuple[Array, Array, Array]:
        of = self.names.of
        kept = [] if address(z) == address(out) else [z]
        equation = (
            f"{of(z)} += {of(b)};  loss = {loss.label}({of(z)}, y);  "
            f"{of(out)} = ∂loss/∂{of(z)};  {of(db)} = Σ_rows {of(out)}"
        )
        arguments = {
            "z": z, "b": b, "y": y, "loss": loss, "weight": weight, "out": out, "db": db, "value": value,
            "scalars": scalars, "samples": samples, "total": total,
        }  # fmt: skip
        self._add(
            "bias_loss", arguments, equation, [z, b, y, weight, scalars, total], [*kept, value, out, db], 5 * z.size
        )
        return value, out, db

    def normalize_weights(self, weight: Array, out: Array, total: Array | None = None) -> Array:
        equation = f"{self.names.of(out)} = {self.names.of(weight)} / Σ {self.names.of(weight)}"
        arguments = {"weight": weight, "out": out, "total": total}
        self._add("normalize_weights", arguments, equation, [weight], [out, total], 2 * weight.size)
        return out

    def dropout(
        self, x: Array, rate: float, seed: int, layer: int, counters: Array, out: Array, first_block: int = 0
    ) -> Array:
        equation = f"{self.names.of(out)} = dropout({self.names.of(x)}, {rate})"
        arguments = {
            "x": x, "rate": rate, "seed": seed, "layer": layer, "counters": counters, "out": out,
            "first_block": first_block,
        }  # fmt: skip
        self._add("dropout", arguments, equation, [x, counters], [out], x.size)
        return out

    def gather(self, source: Array, order: Array, counters: Array, out: Array) -> Array:
        of = self.names.of
        arguments = {"source": source, "order": order, "counters": counters, "out": out}
        self.operations.append(
            Operation(
                "gather",
                arguments,
                self.phase,
                f"{of(out)} = {of(source)}[{of(order)}[t]]",
                (of(source), of(order), of(counters)),
                (of(out),),
                0,
                2 * out.nbytes + len(out) * order.itemsize,
            )
        )
        return out

    def accumulate(self, total: Array | None, term: Array, out: Array) -> Array:
        of = self.names.of
        equation = f"{of(out)} = {of(term) if total is None else f'{of(total)} + {of(term)}'}"
        arguments = {"total": total, "term": term, "out": out}
        self._add("accumulate", arguments, equation, [total, term], [out], 0 if total is None else term.size)
        return out

    def clip(self, gradients: Array, max_norm: float, scalars: Array, loss_scaling: bool = False) -> None:
        arguments = {"gradients": gradients, "max_norm": max_norm, "scalars": scalars, "loss_scaling": loss_scaling}
        equation = f"factor = min(1, {max_norm} / |∇|)"
        self._add("clip", arguments, equation, [gradients], [scalars], 2 * gradients.size)

    def advance(
        self, optimizer: Optimizer, rate: Array, batch: int, counters: Array, scalars: Array, loss_scaling: bool = False
    ) -> None:
        arguments = {
            "optimizer": optimizer, "rate": rate, "batch": batch, "counters": counters, "scalars": scalars,
            "loss_scaling": loss_scaling,
        }  # fmt: skip
        self._add("advance", arguments, "t += 1;  η = η(t)", [rate, counters], [counters, scalars], 0)

    def update(
        self,
        optimizer: Optimizer,
        parameters: Array,
        gradients: Array,
        states: Array,
        scalars: Array,
        weights: Array | None = None,
    ) -> None:
        arguments = {
            "optimizer": optimizer, "parameters": parameters, "gradients": gradients, "states": states,
            "scalars": scalars, "weights": weights,
        }  # fmt: skip
        self._add(
            "update",
            arguments,
            f"θ ← {type(optimizer).__name__}(θ, ∇)",
            [parameters, gradients, states, scalars],
            [parameters, states, weights],
            (2 + 4 * optimizer.n_states) * parameters.size,
        )


@dataclass
class Step:
    """One training step: a flat list of operations on arrays with fixed places.

    Parameters
    ----------
    backend : Backend
    operations : list of Operation
    names : Names
        The arrays by name: ``step.names.array("X")`` is where the mini-batch goes.
    keep : bool
        Every intermediate has memory of its own and is there after the step; else a backend may leave out what nothing reads.
    """

    backend: Backend
    operations: list[Operation]
    names: Names
    keep: bool = False

    def compile(self) -> Run:
        """Return a function that runs the step, once or ``times`` times over, made by the backend."""
        return self.backend.compile(self)

    @property
    def flops(self) -> int:
        """FLOP of one step."""
        return sum(operation.flops for operation in self.operations)

    @property
    def bytes(self) -> int:
        """Bytes that the operations of one step read and write."""
        return sum(operation.bytes for operation in self.operations)

    def needs(self, operation: Operation) -> tuple[str, ...]:
        """Return the arrays that an operation needs and an earlier one gives: the relation A <= B of the dependency order."""
        earlier: set[str] = set()
        for other in self.operations:
            if other is operation:
                break
            earlier.update(other.writes)
        needed = [name.removesuffix("ᵀ") for name in operation.reads]
        if "∇" in needed:  # the flat array of all gradients
            needed += [name for name in sorted(earlier) if name.startswith(("dW_", "db_"))]
        return tuple(name for name in needed if name in earlier)

    def __str__(self) -> str:
        lines = []
        for number, operation in enumerate(self.operations, 1):
            needs = ", ".join(self.needs(operation)) or "-"
            lines.append(
                f"{number:3d}  {operation.phase:8s}  {operation.equation}\n"
                f"{'':15s}needs {needs};  {operation.flops:,} FLOP, {operation.bytes:,} bytes"
            )
        lines.append(f"total: {self.flops:,} FLOP, {self.bytes:,} bytes in {len(self.operations)} operations")
        return "\n".join(lines)
