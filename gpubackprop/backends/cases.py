"""Cases of every operation: THE table that the tests, the simulator of CUDA and the benchmark of the kernels go through.

A case is an operation with its numbers and how its arrays are filled; shapes and dtypes come from the table of operations. The
reference backend says what is expected, and :meth:`OpCase.bounds` how far rounding may take another backend from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from gpubackprop import schedules
from gpubackprop.activations import ACTIVATIONS, Activation
from gpubackprop.backends.reference import ReferenceBackend
from gpubackprop.definitions import DTYPES, check_dtype, eps_of, real_of
from gpubackprop.losses import LOSSES, Loss
from gpubackprop.optimizers import LBFGS, OPTIMIZERS, SGD, Adagrad, Adam, Optimizer, RMSprop
from gpubackprop.step.operations import (
    Accumulate,
    Advance,
    BiasActivationBackward,
    BiasActivationForward,
    BiasLoss,
    Clip,
    Dropout,
    Gather,
    Matmul,
    NormalizeWeights,
    Operation,
    Update,
)
from gpubackprop.step.state import FACTOR, GOOD, GROW_AFTER, SCALE, SKIP

Arrays = dict[str, Any]
Shape = tuple[int, ...]
Rng = np.random.Generator

REFERENCE = ReferenceBackend()
BOTH_PLACES = ("relu", "softplus", "gelu")
"""Activations whose passes run in place and apart; the others as a step has them."""
LETTERS: dict[type[Operation], tuple[str, ...]] = {
    Matmul: ("m", "k", "n"), Accumulate: ("size",), Clip: ("size",), Update: ("size",), NormalizeWeights: ("n",), Advance: (),
}  # fmt: skip
"""What the numbers of a shape are in an operation's specs; ("n", "d") for the others."""
IN_REAL = (NormalizeWeights, Accumulate, Clip, Advance, Update)
"""Operations whose first array is real, also where the model's dtype has 16 bits."""
RAGGED = ((1, 1), (1, 7), (5, 1), (128, 10), (33, 257), (70, 64))
FLAT = ((1,), (7,), (17,), (1001,), (1024,))
NOT_READ = 7.0
"""What an output holds before."""


@dataclass(frozen=True, eq=False)
class OpCase:
    """An operation, its numbers, and its arrays for a shape and a dtype.

    Parameters
    ----------
    name : str
    kind : type of Operation
    shapes : tuple of tuple of int
        On which it is tested: ragged ones.
    numbers : mapping
        The fields that are no arrays.
    fill : mapping of str to callable
        ``fill[name](case, rng, shape, dtype, a)`` returns an array, given those before it; others hold normal numbers.
    over : mapping of str to str
        An output that has the memory of another array.
    absent : tuple of str
        Arrays that are None.
    dtypes : tuple of str
        The model's.
    of : mapping of str to str
        The dtype of an array, ``"real"`` or ``"int64"``, where its spec allows several.
    transposed : tuple of str
        Arrays that are transposes.
    """

    name: str
    kind: type[Operation]
    shapes: tuple[Shape, ...]
    numbers: Mapping[str, Any] = field(default_factory=dict)
    fill: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    over: Mapping[str, str] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = DTYPES
    of: Mapping[str, str] = field(default_factory=dict)
    transposed: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name

    def sizes(self, shape: Shape) -> dict[Any, Any]:
        """Return what the letters of the specs stand for."""
        if self.kind is Dropout:
            return {...: shape}
        if self.kind is Gather:  # from twice as many rows
            return {"n": shape[0], "N": 2 * shape[0], "K": 2 * shape[0], ...: shape[1:]}
        optimizer = self.numbers.get("optimizer")
        states = {"n_states": optimizer.n_states} if optimizer else {}
        return dict(zip(LETTERS.get(self.kind, ("n", "d")), shape, strict=True)) | states

    def arrays(self, rng: Rng, shape: Shape, dtype_name: str) -> Arrays:
        """Return new arrays on the host by name; two names may have the same array."""
        dtype, sizes = check_dtype(dtype_name), self.sizes(shape)
        a: Arrays = {}
        for name, spec in self.kind.arrays.items():
            if name in self.absent:
                continue
            if name in self.over:
                a[name] = a[self.over[name]]
                continue
            full: Shape = ()
            for letter in spec.shape:
                full += sizes[...] if letter is ... else (sizes.get(letter, letter),)
            fill = self.fill.get(name) or FILL.get(name) or (_outdated if name in self.kind.writes else normal)
            made = fill(self, rng, full[::-1] if name in self.transposed else full, self._dtype(name, dtype), a)
            a[name] = made.T if name in self.transposed else made
        return a

    def operation(self, a: Arrays) -> Operation:
        """Return the operation on arrays."""
        fields: dict[str, Any] = {name: a.get(name) for name in self.kind.arrays} | dict(self.numbers)
        return self.kind(**fields)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The arrays that are written; of two in one place the last."""
        written = [name for name in self.kind.writes if name not in self.absent]
        return tuple(name for name in written if name not in self.over.values())

    def bounds(self, dtype_name: str, given: Arrays, expected: Arrays) -> Arrays:
        """Return how far rounding may take each output from what is expected.

        Parameters
        ----------
        dtype_name : str
            The model's dtype.
        given, expected : dict of str to array
            The arrays before and after, in float64, of any array module.
        """
        if self.kind in EXACT:
            return dict.fromkeys(self.outputs, 0.0)
        if self.kind in RELATIVE:
            units = RELATIVE[self.kind]
            return {name: units * self._eps(name, dtype_name) * abs(expected[name]) for name in self.outputs}
        # the same formula, on scalars instead of arrays, with another library's functions: 16 units of the largest number cover
        # the longest with a factor of two to spare
        found = {name: 16 * self._eps(name, dtype_name) * _largest(expected[name]) for name in self.outputs}
        if self.kind in SUMS:
            found |= SUMS[self.kind](self, partial(self._eps, dtype_name=dtype_name), found, given, expected)
        return found

    def _dtype(self, name: str, dtype: np.dtype[Any]) -> np.dtype[Any]:
        """Return the dtype of an array where the model has this one."""
        storage = real_of(dtype) if self.kind in IN_REAL else dtype
        kind = self.of.get(name, self.kind.arrays[name].dtype)
        if kind in ("int64", "float64"):
            return np.dtype(kind)
        return real_of(dtype) if kind == "real" else dtype if kind == "weights" else storage

    def _eps(self, name: str, dtype_name: str) -> float:
        dtype = self._dtype(name, check_dtype(dtype_name))
        return 0.0 if dtype.kind == "i" else eps_of(dtype)


def copied(a: Arrays, copy: Callable[[Any], Any]) -> Arrays:
    """Return copies of arrays; one array under two names stays one, and a transpose a transpose."""
    done: dict[int, Any] = {}
    for array in a.values():
        if id(array) not in done:
            done[id(array)] = copy(array) if array.flags.c_contiguous else copy(array.T).T
    return {name: done[id(array)] for name, array in a.items()}


# ---------------------------------------------------------------------- what arrays hold


def normal(case: OpCase, rng: Rng, shape: Shape, dtype: np.dtype[Any], a: Arrays) -> Any:
    """Return 2 N(0, 1)."""
    drawn = np.float64 if dtype.itemsize == 8 else np.float32
    return (rng.standard_normal(shape, drawn) * drawn(2)).astype(dtype)


def _outdated(case: OpCase, rng: Rng, shape: Shape, dtype: np.dtype[Any], a: Arrays) -> Any:
    return np.full(shape, NOT_READ, dtype)


def _filled(*values: float) -> Callable[..., Any]:
    return lambda case, rng, shape, dtype, a: np.array(values, dtype)


def _h(case: OpCase, rng: Rng, shape: Shape, dtype: np.dtype[Any], a: Arrays) -> Any:
    z = normal(case, rng, shape, real_of(dtype), a)
    return case.numbers["activation"].phi(z).astype(dtype)


def _y(case: OpCase, rng: Rng, shape: Shape, dtype: np.dtype[Any], a: Arrays) -> Any:
    kind = case.numbers["loss"].kind
    if kind.takes_indices and "y" not in case.of:  # a row of probabilities for each sample
        kind = LOSSES["kl_divergence"].kind
    y = kind.random(rng, *a["z"].shape)
    return y if y.dtype.kind == "i" else y.astype(dtype)


def _weight(case: OpCase, rng: Rng, shape: Shape, dtype: np.dtype[Any], a: Arrays) -> Any:
    return rng.random(shape).astype(dtype)


def _order(case: OpCase, rng: Rng, shape: Shape, dtype: np.dtype[Any], a: Arrays) -> Any:
    return rng.permutation(shape[0])


def _cursor(case: OpCase, rng: Rng, shape: Shape, dtype: np.dtype[Any], a: Arrays) -> Any:
    return np.array([3, len(a["source"]) // 4])


def _scalars(case: OpCase, rng: Rng, shape: Shape, dtype: np.dtype[Any], a: Arrays) -> Any:
    """Return the scalars of a step whose gradient is clipped to half, with a loss scale that is a power of two."""
    scalars = np.zeros(8, dtype)
    optimizer = case.numbers.get("optimizer")
    if optimizer is not None:
        rate, counters = np.array([optimizer.schedule.learning_rate]), np.array([_steps(a) if a else 0, 0])
        REFERENCE.advance(optimizer, rate, 1, counters, scalars)
    scalars[[FACTOR, SCALE, GOOD]] = 0.5, 64, 1
    return scalars


def _steps(a: Arrays) -> int:
    """Return how many steps of an optimizer came before: 0, 1 or 2."""
    return int(a["parameters"].size % 3) if "parameters" in a else 2


def _states(case: OpCase, rng: Rng, shape: Shape, dtype: np.dtype[Any], a: Arrays) -> Any:
    """Return the states that some steps leave."""
    states, scalars, optimizer = np.zeros(shape, dtype), np.ones(8, dtype), case.numbers["optimizer"]
    for _ in range(_steps(a)):
        g = normal(case, rng, shape[1:], dtype, a)
        REFERENCE.update(optimizer, a["parameters"].copy(), g, states, scalars)
    return states


FILL: dict[str, Callable[..., Any]] = {
    "h": _h, "y": _y, "weight": _weight, "order": _order, "counters": _filled(7, 2), "scalars": _scalars, "states": _states,
    "value": _filled(NOT_READ, 5), "rate": _filled(0.1),
}  # fmt: skip
"""By the names of arrays, which mean the same in every operation."""

# ---------------------------------------------------------------------- how far rounding may go


def _largest(x: Any) -> Any:
    x = abs(x)
    finite = x[x < np.inf]
    return finite.max() if finite.size else 0.0


def _sum(count: int, magnitudes: Any, eps: float) -> Any:
    """Return what a sum of rounded terms may be wrong by.

    At most n eps sum |terms|, in any order (Higham (2002), eq. 4.4), and rarely more than 4 sqrt(n) of them.
    """
    return min(count + 1, 32 + 4 * count**0.5) * eps * magnitudes


def _of_matmul(case: OpCase, eps: Any, found: Arrays, given: Arrays, expected: Arrays) -> Arrays:
    a, b = given["a"], given["b"]
    products = _sum(a.shape[1], abs(a) @ abs(b), eps_of(np.float64) if eps("a") < 1e-9 else eps_of(np.float32))
    return {"out": products + eps("out") * abs(expected["out"])}


def _of_backward(case: OpCase, eps: Any, found: Arrays, given: Arrays, expected: Arrays) -> Arrays:
    delta = abs(expected["out"])
    return {"db": found["db"] + _sum(len(delta), delta.sum(axis=0), eps("db"))}


def _of_loss(case: OpCase, eps: Any, found: Arrays, given: Arrays, expected: Arrays) -> Arrays:
    loss, (n, d), y = case.numbers["loss"], given["z"].shape, given["y"]
    softmax, real, gradient = loss.family == "softmax", eps("db"), abs(expected["out"])
    outputs = _largest(given["z"]) + _largest(given["b"])
    # a long row is read again as it was stored, and its column sums are of what was stored
    long = softmax and d > (2048 if real < 1e-9 else 8192)
    stored = eps("z") * outputs * long
    db = _sum(n, gradient.sum(axis=0), real) + (stored + eps("z") * long) * gradient.sum(axis=0)
    # every sample's loss is a sum over d outputs of numbers as large as 2 max |o|; their sum is taken in two levels
    weights = given["weight"].sum() if "weight" in given else n
    scale = weights * loss.scale(case.numbers.get("samples") or n, d, "weight" in given)
    of_sample = outputs if softmax else d * outputs * (1 + _largest(y))
    value = (32 + d) * real * (abs(expected["value"][0]) + scale * of_sample) + scale * stored
    grown = given["total"][0] if "total" in given else n if loss.reduction == "mean" else 1
    both = abs(expected["value"]) * eps_of(np.float64)
    both[0] += value
    both[1] += value * grown
    return {"out": found["out"] + stored * gradient, "db": found["db"] + db, "value": both}


def _of_weights(case: OpCase, eps: Any, found: Arrays, given: Arrays, expected: Arrays) -> Arrays:
    of_sum = _sum(len(given["weight"]), 1.0, eps_of(np.float64))
    of_total = {"total": of_sum * abs(expected["total"])} if "total" in expected else {}
    return {"out": (2 * eps("out") + of_sum) * expected["out"], **of_total}


EXACT = (Dropout, Gather, Accumulate)
"""What copies, adds or multiplies once, without a rounding that could be another."""
RELATIVE: dict[type[Operation], float] = {Clip: 40, Advance: 16}
"""Where numbers are unlike each other: units of eps of each. The sum of squares is taken in threads, and its root halves errors."""
SUMS: dict[type[Operation], Callable[..., Arrays]] = {
    Matmul: _of_matmul, BiasActivationBackward: _of_backward, BiasLoss: _of_loss, NormalizeWeights: _of_weights,
}  # fmt: skip
"""Where outputs are sums."""

# ---------------------------------------------------------------------- the table


def cases() -> Iterator[OpCase]:
    """Yield all cases; those of a plain name are what a step of a model has."""
    yield from _products()
    for activation in ACTIVATIONS.values():
        yield from _passes(activation)
    for loss in LOSSES.values():
        yield from _losses(loss)
    for optimizer in optimizers():
        yield from _updates(optimizer)
    yield from _others()


def _products() -> Iterator[OpCase]:
    shapes = ((1, 1, 1), (1, 7, 1), (5, 3, 4), (33, 65, 17), (3, 40, 37))
    for transposed in ((), ("a",), ("b",), ("a", "b")):
        yield OpCase(
            ", ".join(["matmul", *(f"{name}.T" for name in transposed)]), Matmul, shapes, transposed=transposed
        )
    yield OpCase("matmul, dW", Matmul, shapes, transposed=("a",), of={"out": "real"}, dtypes=HALVES)


def _passes(activation: Activation) -> Iterator[OpCase]:
    name, both = activation.name, activation.name in BOTH_PLACES
    shapes = RAGGED if both else ((9, 64), (33, 257))
    # the formulas in float16 are those in bfloat16: both are computed in float32
    more: Any = {"numbers": {"activation": activation}, "dtypes": DTYPES if both else DTYPES[:3]}
    as_in_step = {"out": "z"} if activation.needs == "h" else {}
    yield OpCase(f"bias_activation_forward {name}", BiasActivationForward, shapes, over=as_in_step, **more)
    if both:
        other = {} if as_in_step else {"out": "z"}
        yield OpCase(f"bias_activation_forward {name}, otherwise", BiasActivationForward, shapes, over=other, **more)
    unread = ("z",) if activation.needs == "h" else ("h",)
    for label, over in (("", {}), (", in place", {"out": "dh"})):
        yield OpCase(
            f"bias_activation_backward {name}{label}", BiasActivationBackward, shapes, over=over, absent=unread, **more
        )


def _losses(loss: Loss) -> Iterator[OpCase]:
    softmax = loss.family == "softmax"
    few = ((33, 10), (4, 304)) if softmax else ((70, 64), (33, 257), (1, 1))
    for indices in (True, False) if loss.kind.takes_indices else (False,):
        of = {"y": "int64"} if indices else {}
        label = f"bias_loss {loss.name}" + (", dense" if loss.kind.takes_indices and not indices else "")
        # every width and cut of a row; longer than a block holds in its registers
        long = ((3, 2051), (3, 8200))
        shapes = few + ((*RAGGED, (140, 260), (5, 1100), (3, 4100), *long) if indices else ())
        absent = ("weight", "scalars", "total")
        make = partial(OpCase, kind=BiasLoss, of=of)
        yield make(label, shapes=shapes, numbers={"loss": loss}, over={"out": "z"}, absent=absent)
        weighted = loss(reduction="sum") if indices or loss.name == "huber" else loss
        weighted = weighted(label_smoothing=0.1) if loss.kind.takes_indices else weighted
        shapes = few + (long if indices else ())
        yield make(f"{label}, weighted", shapes=shapes, numbers={"loss": weighted}, absent=absent[1:])
        if loss.name in ("softmax_cross_entropy", "huber"):
            numbers = {"loss": loss, "samples": 500}
            yield make(f"{label}, scaled", shapes=few, numbers=numbers, absent=absent[2:], dtypes=HALVES)
            yield make(f"{label}, part", shapes=few, numbers=numbers, absent=("scalars",), fill={"total": _filled(3.5)})


def optimizers() -> list[Optimizer]:
    """Return every optimizer, some with other choices that are compiled."""
    return [
        *(cls() for cls in OPTIMIZERS.values() if cls not in (SGD, LBFGS)),
        SGD(schedules.LinearWarmup(0.1, steps=9)),
        SGD(0.1, momentum=0.9),
        SGD(schedules.StepDecay(0.1, step_size=2), momentum=0.9, nesterov=True, weight_decay=0.1, clip_value=0.5),
        Adam(schedules.OneCycle(0.1, steps=5), amsgrad=True, weight_decay=0.1),
        RMSprop(schedules.Cosine(0.1, steps=4), centered=True, momentum=0.9),
        Adagrad(schedules.Exponential(0.1, gamma=0.9), lr_decay=0.1),
    ]


def _updates(optimizer: Optimizer) -> Iterator[OpCase]:
    label, schedule = type(optimizer).__name__, type(optimizer.schedule).__name__
    label += (
        " momentum" if schedule == "Schedule" and label == "SGD" else "" if schedule == "Schedule" else f" {schedule}"
    )
    numbers, of_step = {"optimizer": optimizer}, {"optimizer": optimizer, "batch": 5}
    yield OpCase(f"update {label}", Update, FLAT, numbers, absent=("weights",), dtypes=REAL)
    yield OpCase(f"advance {label}", Advance, ((),), of_step, dtypes=REAL)
    if label in ("SGD momentum", "Adam", "AdamW"):
        yield OpCase(f"update {label}, 16 bits", Update, FLAT, numbers, dtypes=HALVES)
    if label == "Adam":
        skipped = {"scalars": partial(_with_scaling, good=1, skip=1)}
        grows = {"scalars": partial(_with_scaling, good=GROW_AFTER - 1, skip=0)}
        yield OpCase(f"update {label}, skipped", Update, FLAT, numbers, skipped, dtypes=HALVES)
        for name, fill in ((", scaled", {}), (", scale grows", grows), (", skipped", skipped)):
            yield OpCase(
                f"advance {label}{name}", Advance, ((),), of_step | {"loss_scaling": True}, fill, dtypes=HALVES
            )


def _with_scaling(
    case: OpCase, rng: Rng, shape: Shape, dtype: np.dtype[Any], a: Arrays, *, good: float, skip: float
) -> Any:
    scalars = _scalars(case, rng, shape, dtype, a)
    scalars[[GOOD, SKIP]] = good, skip
    return scalars


def _others() -> Iterator[OpCase]:
    for max_norm, label in ((1.0, "clip"), (1e6, "clip, not reached")):
        yield OpCase(label, Clip, (*FLAT, (15,), (16,), (40000,)), {"max_norm": max_norm}, dtypes=REAL)
    scaled = {"max_norm": 1.0, "loss_scaling": True}
    yield OpCase("clip, scaled", Clip, FLAT, scaled, dtypes=HALVES)
    yield OpCase("accumulate", Accumulate, FLAT, dtypes=REAL)
    yield OpCase("accumulate, first", Accumulate, FLAT, absent=("total",), dtypes=REAL)
    yield OpCase("accumulate, in place", Accumulate, FLAT, over={"out": "total"}, dtypes=REAL)
    yield OpCase("normalize_weights", NormalizeWeights, FLAT, absent=("total",), dtypes=REAL)
    yield OpCase("normalize_weights, in place", NormalizeWeights, FLAT, over={"out": "weight"}, dtypes=REAL)
    for label, rate, seed, step in (("", 0.25, 2**63 + 5, 7), (", none", 0.0, 1, 0), (", most", 0.9, 3, 2**32 + 1)):
        numbers = {"rate": rate, "seed": seed, "layer": 2, "first_block": 5 if label else 0}
        over = {"out": "x"} if label else {}
        shapes = ((1, 1), (3, 1), (3, 5), (16, 16), (7, 33), (1003, 1))
        yield OpCase(f"dropout{label}", Dropout, shapes, numbers, {"counters": _filled(step, 0)}, over)
    yield OpCase("gather", Gather, ((9,), (9, 1), (9, 7), (9, 64)), fill={"counters": _cursor})
    labels = {"source": "int64", "out": "int64"}
    labelled = {"counters": _cursor, "source": _order}
    yield OpCase("gather, labels", Gather, ((9,),), fill=labelled, of=labels, dtypes=REAL[:1])


REAL, HALVES = DTYPES[:2], DTYPES[2:]
CASES: dict[str, OpCase] = {case.name: case for case in cases()}
"""By name."""
