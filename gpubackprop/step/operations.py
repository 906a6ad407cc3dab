"""The operations of the two passes and the update: THE table, one class per operation.

An operation is a frozen dataclass over its arrays, the definitions it applies and numbers. Its arrays are buffers where a step is
recorded and arrays where it is bound to memory. From these classes come the printed step, what needs what, FLOP and bytes, the
checks of arrays, the eager methods of all backends, and the arguments of a backend's ``bind``.

Every array is C-contiguous, of the model's dtype ("storage") unless said otherwise, on the backend's device; ``matmul`` alone also
takes transposes. Rows are samples. Where the model's dtype has 16 bits, arithmetic is done in float32, and the gradients dW and
db, the parameters with their states, dense targets, sample weights and scalars ("real") are float32 too.

A label out of range is an error in an eager call on the host. On a GPU, where the host would have to wait to see it, and in a
compiled step it belongs to no class, as if the sample's row of targets were 0.
"""

from dataclasses import dataclass, field, fields
from functools import cache
from types import EllipsisType
from typing import Annotated, Any, ClassVar, NamedTuple, Self, TypeVar

from gpubackprop.activations import Activation
from gpubackprop.definitions import Definition, address
from gpubackprop.losses import Loss
from gpubackprop.optimizers import Optimizer
from gpubackprop.step.buffers import Buffer, Memory

Kind = TypeVar("Kind", bound="Operation")
Operand = Any
"""A Buffer in a recorded operation, an array in a bound one."""


class Spec(NamedTuple):
    """What an array of an operation must be.

    Attributes
    ----------
    shape : tuple
        A letter stands for the same number throughout an operation; ``...`` for any further dimensions.
    dtype : str
        "storage": that of the first array, one that the device computes in; "real": the dtype of its arithmetic;
        "either" of them; "data": that of the first array, which may also be int64; "weights": a copy in 16 bits; "int64";
        "float64".
    over : tuple of str
        Arrays whose memory it may reuse, in full; an output shares memory with no other array.
    optional : bool
        It may be None.
    transposed : bool
        It may be the transpose of a C-contiguous matrix.
    allocated : bool
        An eager call allocates it if it is omitted.
    """

    shape: tuple[str | int | EllipsisType, ...]
    dtype: str = "storage"
    over: tuple[str, ...] = ()
    optional: bool = False
    transposed: bool = False
    allocated: bool = False


def array(*shape: Any, **more: Any) -> Spec:
    """Declare a required array."""
    return Spec(shape, **more)


def optional(*shape: Any, **more: Any) -> Spec:
    """Declare an array that may be None."""
    return Spec(shape, optional=True, **more)


def result(*shape: Any, **more: Any) -> Spec:
    """Declare an output, which an eager call allocates if it is omitted."""
    return Spec(shape, allocated=True, **more)


OPERATIONS: dict[str, type["Operation"]] = {}
"""By the name of the eager method: ``"matmul"``, ..."""


@dataclass(frozen=True, eq=False, repr=False)
class Operation:
    """Base class of all operations.

    Attributes
    ----------
    name : str
        As its eager method is called: ``"bias_loss"``.
    arrays : dict of str to Spec
        What each array must be.
    reads, writes : tuple of str
        The fields that are read and written; z of ``bias_loss`` is both.
    returns : tuple of str
        The fields that an eager call returns.
    equation : str
        What it computes, in the symbols of its fields.
    flops : int
        2 m n k for a product; one per element for each addition, product and evaluation of a function.
    nbytes : int
        Each array that is read or written, once.
    phase : str
        "input", "forward", "loss", "backward" or "update", if it is part of a step.
    """

    phase: str = field(default="", kw_only=True)

    name: ClassVar[str]
    arrays: ClassVar[dict[str, Spec]]
    reads: ClassVar[tuple[str, ...]]
    writes: ClassVar[tuple[str, ...]]
    returns: ClassVar[tuple[str, ...]] = ()
    symbolic: ClassVar[str]

    def __init_subclass__(cls) -> None:
        cls.name = "".join("_" + c.lower() if c.isupper() else c for c in cls.__name__)[1:]

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.equation}>"

    @property
    def flops(self) -> int:
        """FLOP."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays it reads and writes."""
        return sum(a.nbytes for a in (*self.read, *self.written))

    @property
    def equation(self) -> str:
        """What it computes, in the names of its arrays."""
        return self.symbolic.format_map({f.name: _shown(getattr(self, f.name)) for f in fields(self)})

    @property
    def read(self) -> list[Operand]:
        """The arrays it reads."""
        return self._present(self.reads)

    @property
    def written(self) -> list[Operand]:
        """The arrays it writes; of two in the same memory, the one that remains."""
        found = self._present(self.writes)
        return [a for i, a in enumerate(found) if not any(_same_place(a, b) for b in found[i + 1 :])]

    def _present(self, names: tuple[str, ...]) -> list[Operand]:
        return [a for a in (getattr(self, name) for name in names) if a is not None]

    @property
    def result(self) -> Any:
        """What an eager call returns: an array, a tuple of them, or None."""
        found = tuple(getattr(self, name) for name in self.returns)
        return found if len(found) > 1 else found[0] if found else None

    def specs(self) -> dict[str, Spec]:
        """Return what each array must be; for a few operations it depends on the other arguments."""
        return self.arrays

    def bound(self, memory: Memory) -> Self:
        """Return the same operation on arrays."""
        buffers = {name: getattr(self, name) for name in self.arrays}
        return self.with_arrays({name: memory.array(buffer) for name, buffer in buffers.items() if buffer is not None})

    def with_arrays(self, arrays: dict[str, Operand]) -> Self:
        """Return the same operation with other arrays."""
        made = object.__new__(type(self))  # like dataclasses.replace, in a sixth of the time
        vars(made).update(vars(self), **arrays)
        return made


def operation(cls: type[Kind]) -> type[Kind]:
    """Enter an operation into the table."""
    hints = cls.__annotations__  # not strings: this module does not postpone annotations
    cls.arrays = {name: hint.__metadata__[0] for name, hint in hints.items() if hasattr(hint, "__metadata__")}
    OPERATIONS[cls.name] = cls
    return cls


def _shown(value: Any) -> str:
    if isinstance(value, Definition):
        return value.label
    return f"<array {value.shape}>" if hasattr(value, "shape") and not isinstance(value, Buffer) else str(value)


def _same_place(a: Operand, b: Operand) -> bool:
    if isinstance(a, Buffer):
        return a.within(b) and b.within(a)
    return address(a) == address(b)


@operation
@dataclass(frozen=True, eq=False, repr=False)
class Matmul(Operation):
    """out = a b.

    Shapes
    ------
    a : (m, k); b : (k, n); out : (m, n). ``h.T`` and ``W.T`` are views: nothing is copied.
    """

    a: Annotated[Operand, array("m", "k", transposed=True)]
    b: Annotated[Operand, array("k", "n", transposed=True)]
    out: Annotated[Operand, result("m", "n", dtype="either")] = None

    symbolic = "{out} = {a} {b}"
    reads, writes, returns = ("a", "b"), ("out",), ("out",)

    @property
    def flops(self) -> int:
        return int(2 * self.a.shape[0] * self.a.shape[1] * self.b.shape[1])


@operation
@dataclass(frozen=True, eq=False, repr=False)
class BiasActivationForward(Operation):
    """z <- z + b in place; out = phi(z). ``out`` may be ``z``: then only phi(z) is kept.

    Shapes
    ------
    z, out : (n, d); b : (d,)
    """

    z: Annotated[Operand, array("n", "d")]
    b: Annotated[Operand, array("d")]
    activation: Activation
    out: Annotated[Operand, result("n", "d", over=("z",))] = None

    symbolic = "{z} += {b};  {out} = {activation}({z})"
    reads, writes, returns = ("z", "b"), ("z", "out"), ("out",)

    @property
    def flops(self) -> int:
        return int(2 * self.z.size)


@operation
@dataclass(frozen=True, eq=False, repr=False)
class BiasActivationBackward(Operation):
    """delta = dh * phi'(z) and db = sum over rows of delta, in one pass over memory; the sums in a fixed order.

    ``activation.needs`` says which of ``z`` and ``h`` is read; the other may be None. ``out`` may be ``dh``.

    Shapes
    ------
    dh, z, h, out : (n, d); db : (d,); returns (delta, db)
    """

    dh: Annotated[Operand, array("n", "d")]
    z: Annotated[Operand, array("n", "d")]
    h: Annotated[Operand, array("n", "d")]
    activation: Activation
    out: Annotated[Operand, result("n", "d", over=("dh",))] = None
    db: Annotated[Operand, result("d", dtype="real")] = None

    symbolic = "{out} = {dh} ⊙ {activation}′({z});  {db} = Σ_rows {out}"
    writes, returns = ("out", "db"), ("out", "db")

    @property
    def at(self) -> Operand:
        """The one of z and h that phi' is computed from."""
        return self.h if self.activation.needs == "h" else self.z

    @property
    def read(self) -> list[Operand]:
        return [self.dh, self.at]

    def specs(self) -> dict[str, Spec]:
        return _without(self.name, "z" if self.activation.needs == "h" else "h")

    @property
    def flops(self) -> int:
        return int(3 * self.dh.size)


@operation
@dataclass(frozen=True, eq=False, repr=False)
class BiasLoss(Operation):
    """o = z + b; value = loss(o, y); do = d value / do; db = sum over rows of do, in one pass over the outputs.

    ``z`` becomes o in place, unless ``out`` is ``z``: then only do is kept. Under the reduction ``"mean"``, ``weight`` comes from
    ``normalize_weights``. The sum in ``value[1]`` grows by n times the mean, with ``total`` by ``total[0]`` times the mean, or by
    the sum. With ``scalars``, do and db, not the value, are multiplied by the loss scale ``scalars[SCALE]``. Where the rows are
    part of a mini-batch of ``samples`` samples, the mean is over those, and the value is this part's share.

    Shapes
    ------
    z, out : (n, d); b, db : (d,); y : (n, d) real, or (n,) int64 class indices; weight : (n,); value : (2,) float64;
    total : (1,) float64; returns (value, do, db)
    """

    z: Annotated[Operand, array("n", "d")]
    b: Annotated[Operand, array("d")]
    y: Annotated[Operand, array("n", "d", dtype="real")]
    loss: Loss
    weight: Annotated[Operand, optional("n", dtype="real")] = None
    out: Annotated[Operand, result("n", "d", over=("z",))] = None
    db: Annotated[Operand, result("d", dtype="real")] = None
    value: Annotated[Operand, result(2, dtype="float64")] = None
    scalars: Annotated[Operand, optional(8, dtype="real")] = None
    samples: int | None = None
    total: Annotated[Operand, optional(1, dtype="float64")] = None

    symbolic = "{z} += {b};  loss = {loss}({z}, y);  {out} = ∂loss/∂{z};  {db} = Σ_rows {out}"
    reads, writes = ("z", "b", "y", "weight", "scalars", "total"), ("z", "value", "out", "db")
    returns = ("value", "out", "db")

    def specs(self) -> dict[str, Spec]:
        indices = self.loss.family == "softmax" and getattr(self.y, "ndim", 0) == 1
        return _with_indices() if indices else self.arrays

    @property
    def flops(self) -> int:
        return int(5 * self.z.size)


@operation
@dataclass(frozen=True, eq=False, repr=False)
class NormalizeWeights(Operation):
    """out = weight / sum(weight), total[0] = sum(weight); out = 0 where all weights are 0, which adds nothing.

    No intermediate overflows or underflows, for weights of any size.

    Shapes
    ------
    weight, out : (n,); total : (1,) float64
    """

    weight: Annotated[Operand, array("n")]
    out: Annotated[Operand, result("n", over=("weight",))] = None
    total: Annotated[Operand, optional(1, dtype="float64")] = None

    symbolic = "{out} = {weight} / Σ {weight}"
    reads, writes, returns = ("weight",), ("out", "total"), ("out",)

    @property
    def flops(self) -> int:
        return int(2 * self.weight.size)


@operation
@dataclass(frozen=True, eq=False, repr=False)
class Dropout(Operation):
    """out = x / (1 - rate) where a random number of this step keeps the element, else 0. ``out`` may be ``x``.

    The mask depends only on seed, layer, ``counters[STEPS]`` and the element's position, so the backward pass applies the same
    operation to the gradient, and every device drops the same elements. Source: Srivastava et al. (2014), inverted; see
    :mod:`gpubackprop.philox`. Four elements share a block of random numbers; where x is part of a mini-batch, it
    begins at element 4 ``first_block`` of the whole.
    """

    x: Annotated[Operand, array(...)]
    rate: float
    seed: int
    layer: int
    counters: Annotated[Operand, array(2, dtype="int64")]
    out: Annotated[Operand, result(..., over=("x",))] = None
    first_block: int = 0

    symbolic = "{out} = dropout({x}, {rate})"
    reads, writes, returns = ("x", "counters"), ("out",), ("out",)

    @property
    def flops(self) -> int:
        return int(self.x.size)


@operation
@dataclass(frozen=True, eq=False, repr=False)
class Gather(Operation):
    """out[i] = source[order[counters[CURSOR] + i]]: the next mini-batch.

    Indices are clamped, so that nothing else is ever read: a position outside ``order`` becomes its first or last, and a row
    outside ``source`` its first or last.

    Shapes
    ------
    source : (N, ...); order : (N,) int64; out : (n, ...)
    """

    source: Annotated[Operand, array("N", ..., dtype="data")]
    order: Annotated[Operand, array("K", dtype="int64")]
    counters: Annotated[Operand, array(2, dtype="int64")]
    out: Annotated[Operand, array("n", ..., dtype="data")] = None

    symbolic = "{out} = {source}[{order}[t]]"
    reads, writes, returns = ("source", "order", "counters"), ("out",), ("out",)

    @property
    def flops(self) -> int:
        return 0

    @property
    def nbytes(self) -> int:
        return int(2 * self.out.nbytes + len(self.out) * self.order.dtype.itemsize)


@operation
@dataclass(frozen=True, eq=False, repr=False)
class Accumulate(Operation):
    """out = total + term, or term where there is no total yet; ``out`` may be either.

    Shapes
    ------
    total, term, out : (size,) real or float64
    """

    total: Annotated[Operand, optional("size")]
    term: Annotated[Operand, array("size")]
    out: Annotated[Operand, array("size", over=("total", "term"))] = None

    reads, writes, returns = ("total", "term"), ("out",), ("out",)

    @property
    def equation(self) -> str:
        return f"{self.out} = {self.term}" if self.total is None else f"{self.out} = {self.total} + {self.term}"

    @property
    def flops(self) -> int:
        return 0 if self.total is None else int(self.term.size)


@operation
@dataclass(frozen=True, eq=False, repr=False)
class Clip(Operation):
    """scalars[NORM] = |g|, scalars[FACTOR] = min(1, max_norm / (|g| + 1e-6)), as ``torch.nn.utils.clip_grad_norm_``.

    No square overflows: a finite gradient has a factor above 0. For an infinite one the factor is 0, for one with NaN it
    is NaN.

    With loss scaling, g is the gradient over the scale: scalars[NORM] = |g| / scale and scalars[FACTOR] holds 1 / scale too;
    scalars[SKIP] = 1 where |g| is infinite or NaN, else 0. ``max_norm`` may be infinite.

    Shapes
    ------
    gradients : (size,); scalars : (8,) real
    """

    gradients: Annotated[Operand, array("size")]
    max_norm: float
    scalars: Annotated[Operand, array(8, dtype="real")]
    loss_scaling: bool = False

    symbolic = "factor = min(1, {max_norm} / |∇|)"
    reads, writes = ("gradients",), ("scalars",)

    @property
    def flops(self) -> int:
        return int(2 * self.gradients.size)


@operation
@dataclass(frozen=True, eq=False, repr=False)
class Advance(Operation):
    """Advance the schedule: counters += (1, batch); scalars[RATE], [C1], [C2] for the new step count.

    With loss scaling, a skipped step counts no step and halves the scale; 2000 good steps in a row double it; it stays in
    [2^-24, 2^24].

    Shapes
    ------
    rate : (1,) float64; counters : (2,) int64; scalars : (8,) real
    """

    optimizer: Optimizer
    rate: Annotated[Operand, array(1, dtype="float64")]
    batch: int
    counters: Annotated[Operand, array(2, dtype="int64")]
    scalars: Annotated[Operand, array(8)]
    loss_scaling: bool = False

    symbolic = "t += 1;  η = η(t)"
    reads, writes = ("rate", "counters"), ("counters", "scalars")

    @property
    def flops(self) -> int:
        return 0


@operation
@dataclass(frozen=True, eq=False, repr=False)
class Update(Operation):
    """One step of the optimizer over all parameters at once; the gradient is clipped, not changed.

    With ``weights``, the 16-bit copy of the parameters that the products read, they are written in the same pass, and a step with
    scalars[SKIP] = 1 changes nothing.

    Shapes
    ------
    parameters, gradients, weights : (size,); states : (optimizer.n_states, size); scalars : (8,) real
    """

    optimizer: Optimizer
    parameters: Annotated[Operand, array("size")]
    gradients: Annotated[Operand, array("size")]
    states: Annotated[Operand, array("n_states", "size")]
    scalars: Annotated[Operand, array(8, dtype="real")]
    weights: Annotated[Operand, optional("size", dtype="weights")] = None

    reads, writes = ("parameters", "gradients", "states", "scalars"), ("parameters", "states", "weights")

    @property
    def equation(self) -> str:
        kind = type(self.optimizer).__name__
        return f"{self.parameters} ← {kind}({self.parameters}, {self.gradients})"

    def specs(self) -> dict[str, Spec]:
        return self.arrays if self.optimizer.n_states else _without(self.name, "states")

    @property
    def flops(self) -> int:
        return int((2 + 4 * self.optimizer.n_states) * self.parameters.size)


@cache
def _without(operation: str, unread: str) -> dict[str, Spec]:
    return {name: spec for name, spec in OPERATIONS[operation].arrays.items() if name != unread}


@cache
def _with_indices() -> dict[str, Spec]:
    return {**BiasLoss.arrays, "y": Spec(("n",), "int64")}
