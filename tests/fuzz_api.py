"""Hostile arguments for the fuzzer: one call of the public API, one argument of it that is anything."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import fractions
import functools
import random
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

import gpubackprop as gb
from gpubackprop.activations import ACTIVATIONS
from gpubackprop.architecture import Architecture
from gpubackprop.inspect.gradcheck import check_gradients
from gpubackprop.losses import LOSSES
from gpubackprop.optimizers import OPTIMIZERS
from gpubackprop.schedules import SCHEDULES

X = np.arange(12.0).reshape(4, 3) / 12
Y = np.array([0, 1, 1, 0])
T = np.array([[0.5, 1.0], [0.0, 1.0], [1.0, 0.5], [0.25, 0.0]])
LARGEST = 1e3  # numbers of at most this size give finite results


ALSO = {  # what a message may name instead of the argument
    "layer_sizes": ["activation"],
    "X": ["y has shape", "sample_weight has shape"],
    "y": ["X has shape"],
    "path": ["os.PathLike"],
    "callbacks": ["monitor", "on_", "history has"],
    "description": ["loss", "activation"],
    "validation_data": ["X has shape"],
}


class Raises:
    """Whatever numpy asks it for, it raises."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def __getattribute__(self, name: str) -> Any:
        names = object.__getattribute__(self, "names")
        if name in names:
            raise ZeroDivisionError(name)
        return object.__getattribute__(self, name)

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("__array__")

    def __len__(self) -> int:
        raise ZeroDivisionError("__len__")

    def __iter__(self) -> Any:
        raise ZeroDivisionError("__iter__")

    def __repr__(self) -> str:
        raise ZeroDivisionError("__repr__")


class Shaped:
    """It says that it is an array, and is none."""

    def __init__(self, shape: Any, dtype: Any) -> None:
        self.shape, self.dtype, self.ndim = shape, dtype, 2


class OnGpu:
    """It says that it is on a GPU."""

    __cuda_array_interface__: ClassVar = {"shape": (4, 3), "typestr": "<f4", "data": (1, False), "version": 3}


class Dlpack:
    """Its memory cannot be lent."""

    def __dlpack_device__(self) -> Any:
        return (1, 0)

    def __dlpack__(self, **_: Any) -> Any:
        raise ZeroDivisionError("__dlpack__")


class Text(str):
    """A string that is not quite one."""

    __slots__ = ()


class Whole(int):
    """A number that is not quite one."""


def masked() -> Any:
    return np.ma.masked_greater(X, 0.5)


SCALARS: list[Callable[[], Any]] = [
    lambda v=v: v
    for v in (
        None, True, False, 0, 1, -1, 2, 3, 1.5, -0.0, 1e-320, float("nan"), float("inf"), -float("inf"), 10**30,
        -(10**30), 10**400, 10**5000,
        2**31, 2**63, 2**64, 1e308, 1j, "", "relu", "adam", "cuda:99", "gpu:-1", "cpu", "reference:0", "auto", "5",
        "x" * 3000, "a\nb", "\0", "é" * 300,
        b"abc", bytearray(b"abc"), memoryview(b"abcdefghijkl"), [], {}, (), set(), [[]], [1, 2], [3, 4, 2], [3, 0, 2],
        [3, 2.0], [3, -4, 2],
        [3, 10**12, 2], [3, 10**20, 2], [3] * 400, (3, 2), {3: 2}, {"W": X}, range(3), range(10**12), slice(3),
        Ellipsis, NotImplemented, object, int,
        print, np.float32(2), np.int64(-3), np.bool_(True), np.float16("inf"), np.longdouble(3), np.complex64(2),
        np.str_("relu"), np.array(1.0),
        np.array(3), np.datetime64("2020-01-01"), np.timedelta64(3, "s"), np.dtype("f4"), decimal.Decimal(3),
        fractions.Fraction(1, 3),
        datetime.date(2020, 1, 1), Text("tanh"), Whole(3),
    )
]  # fmt: skip
OBJECTS: list[Callable[[], Any]] = [
    Raises, lambda: Raises("dtype"), lambda: Raises("shape", "__array__"), lambda: Raises("__dlpack__"),
    lambda: Raises("__iter__", "__next__"),
    lambda: Shaped((4, 3), np.dtype("f4")), lambda: Shaped((4, 3), "float32"), lambda: Shaped("ab", 3),
    lambda: Shaped((10**9, 3), np.dtype("f4")),
    lambda: Shaped(None, None), Dlpack, OnGpu, object, lambda: (row for row in X), lambda: iter([1, 2]),
    lambda: map(int, "12"), lambda: lambda x: x,
    lambda: [Raises()], lambda: {"a": Raises()}, lambda: [None, X], lambda: open, lambda: gb.SGD(0.1), lambda: gb.Adam,
    lambda: gb.Cosine(0.1, steps=5),
    lambda: ACTIVATIONS["tanh"], lambda: LOSSES["hinge"], lambda: gb.EarlyStopping(), lambda: gb.MLP,
    lambda: [gb.EarlyStopping(monitor="loss"), None],
    lambda: Architecture((3, 2)), lambda: (X, Y), lambda: (X, T), lambda: (X, Y, None), lambda: (None, Y),
    lambda: [X.tolist(), Y.tolist()],
]  # fmt: skip
ARRAYS: list[Callable[[], Any]] = [
    lambda: X, lambda: Y, lambda: T, lambda: X.tolist(), lambda: Y.tolist(), lambda: X[:2], lambda: X[:, :2],
    lambda: X[::-1, ::-1], lambda: X.T,
    lambda: X.astype("f2"), lambda: X.astype(">f8"), lambda: X.astype(">f4"), lambda: X.astype("g"),
    lambda: X.astype("c8"), lambda: X.astype(object),
    lambda: X.astype("S5"), lambda: X.astype("U9"), lambda: Y.astype("M8[s]"), lambda: Y.astype("m8[s]"),
    lambda: Y.astype("u8"), lambda: Y.astype("?"),
    lambda: Y.astype("f2"), lambda: Y.astype(">i2"), lambda: Y - 1, lambda: Y + 5, lambda: Y + 0.5, lambda: Y[:, None],
    lambda: Y[None], lambda: np.int64(2),
    lambda: X * np.nan, lambda: X * np.inf, lambda: X * 1e300, lambda: X * -1e-310,
    lambda: np.full((4, 3), np.iinfo("i8").max), lambda: X + 1e6,
    lambda: np.full(4, np.iinfo("u8").max, "u8"), lambda: np.full(4, -(2**63)),
    lambda: np.full((4, 3), np.longdouble("1e4000")), lambda: -T, lambda: T * 9,
    lambda: np.zeros((0, 3)), lambda: np.zeros((4, 0)), lambda: np.zeros(0), lambda: np.zeros((4, 3, 1)),
    lambda: np.zeros((1,) * 32), lambda: np.zeros(()),
    lambda: np.zeros((4, 3), [("a", "f4")]), lambda: np.zeros(4, "V8"), lambda: np.rec.fromarrays([X], names="x").x,
    lambda: np.matrix(X), masked,
    lambda: np.ma.masked_array(X), lambda: np.broadcast_to(np.float32(0), (10**9, 3)),
    lambda: np.broadcast_to(np.int64(0), (2**40,)),
    lambda: np.broadcast_to(X[0], (4, 3)), lambda: np.lib.stride_tricks.as_strided(X, (4, 3), (8, 8), writeable=False),
    lambda: np.ones(4), lambda: np.zeros(4),
    lambda: np.ones((4, 2)) / 2, lambda: np.ones((1, 3)), lambda: np.ones((5000, 3)), lambda: [[1, 2, 3], [4]],
    lambda: [[1, "a", 3]] * 4, lambda: [X, X],
    lambda: _read_only(X), lambda: np.frombuffer(b"\1" + X.tobytes(), np.uint8)[1:].view("f8").reshape(4, 3),
    lambda: np.char.array(["a", "b"]),
]  # fmt: skip


def _read_only(a: np.ndarray) -> np.ndarray:
    a = a.copy()
    a.setflags(write=False)
    return a


@functools.cache
def models(device: str) -> dict[str, tuple[gb.MLP, np.ndarray]]:
    """Return a few small networks on a device, each with its parameters."""
    made = {
        "classes": gb.MLP([3, 4, 2], "tanh", device=device, seed=1),
        "numbers": gb.MLP([3, 4, 2], "relu", "mean_squared_error", device, "float64", seed=1),
        "signs": gb.MLP([3, 4, 1], "tanh", "sigmoid_cross_entropy", device, seed=1, dropout=0.5),
    }
    return {name: (model, model.backend.to_numpy(model.parameters.flat).copy()) for name, model in made.items()}


Call = Callable[[gb.MLP, Any, Any], Any]  # of a network, its targets, and the hostile value


def _names(kind: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(kind)]


FIT: dict[str, Any] = {"epochs": 1, "batch_size": 2, "optimizer": gb.SGD(1e-3), "progress": False}


def _fit(name: str) -> Call:
    return lambda m, y, v: m.fit(X, y, **{**FIT, name: v})


def _made(kind: Any, name: str) -> Call:
    return lambda m, y, v: kind(**{name: v})


def _built(name: str) -> Call:
    def build(m: gb.MLP, y: Any, value: Any) -> Any:
        built = gb.MLP([3, 4, 2], **{"device": m.backend, name: value})
        return built.forward(X) if built.device == "reference" else None  # elsewhere a kernel is compiled for each

    return build


def _used(kind: str, name: str) -> Call:
    """Train with an optimizer that could be made: on the reference, where nothing is compiled for it."""

    def use(m: gb.MLP, y: Any, value: Any) -> None:
        optimizer: Any = OPTIMIZERS[kind](**{name: value})
        assert isinstance(hash(optimizer), int)
        reference, parameters = models("reference")["classes"]
        try:
            reference.fit(X, Y, **{**FIT, "optimizer": optimizer})
        finally:
            reference.parameters.flat[...] = parameters

    return use


def _scheduled(kind: str, name: str) -> Call:
    """Evaluate a schedule that could be made."""

    def evaluate(m: gb.MLP, y: Any, value: Any) -> None:
        made = SCHEDULES[kind]
        given = {"learning_rate": 0.1, **({"steps": 9} if "steps" in _names(made) else {}), name: value}
        for t in (0, 1, 8, 1000):
            assert made(**given).at(t) >= 0, f"eta({t}) is {made(**given).at(t)}"

    return evaluate


CALLS: dict[str, Call] = {
    "predict X": lambda m, y, v: m.predict(v),
    "predict_proba X": lambda m, y, v: m.predict_proba(v) if m.loss.name != "mean_squared_error" else None,
    "evaluate X": lambda m, y, v: m.evaluate(v, y),
    "evaluate y": lambda m, y, v: m.evaluate(X, v),
    "evaluate sample_weight": lambda m, y, v: m.evaluate(X, y, v),
    "forward X": lambda m, y, v: m.forward(v),
    "backward do": lambda m, y, v: (m.forward(X), m.backward(v)),
    "loss_and_gradients X": lambda m, y, v: m.loss_and_gradients(v, y),
    "loss_and_gradients y": lambda m, y, v: m.loss_and_gradients(X, v),
    "loss_and_gradients sample_weight": lambda m, y, v: m.loss_and_gradients(X, y, v),
    "trace X": lambda m, y, v: m.trace(v, y),
    "trace y": lambda m, y, v: m.trace(X, v),
    "fit X": lambda m, y, v: m.fit(v, y, **FIT),
    "fit y": lambda m, y, v: m.fit(X, v, **FIT),
    **{f"fit {name}": _fit(name) for name in (
        "batch_size", "optimizer", "validation_data", "sample_weight", "callbacks", "shuffle", "micro_batch_size",
        "stream_data", "progress", "on_divergence", "checkpoint_every", "overwrite",
        "standardize", "missing", "scale", "classes", "class_weight", "validation_split", "metrics",
    )},
    "fit epochs": lambda m, y, v: m.fit(X, y, **{**FIT, "epochs": v}) if not isinstance(v, int) or v < 100 else None,
    "step batch_size": lambda m, y, v: m.step(v).compile()() if not isinstance(v, int) or v < 2**20 else m.step(v),
    "step optimizer": lambda m, y, v: m.step(4, v),
    "step micro_batch_size": lambda m, y, v: m.step(4, micro_batch_size=v),
    "step weighted": lambda m, y, v: m.step(4, weighted=v),
    "step class_indices": lambda m, y, v: m.step(4, class_indices=v),
    "step keep": lambda m, y, v: m.step(4, keep=v),
    "predictor batch_size": lambda m, y, v: m.predictor(v),
    "predictor X": lambda m, y, v: m.predictor(4)(v),
    "load_state_dict state_dict whole": lambda m, y, v: m.load_state_dict(v),
    "load_state_dict layers.0.weight": lambda m, y, v: m.load_state_dict(m.state_dict() | {"layers.0.weight": v}),
    "load_state_dict layers.1.bias": lambda m, y, v: m.load_state_dict(m.state_dict() | {"layers.1.bias": v}),
    "load_state_dict state_dict": lambda m, y, v: m.load_state_dict({**m.state_dict(), **_keyed(v)}),
    "to device": lambda m, y, v: m.to(v),
    "twin dropout": lambda m, y, v: m.twin(dropout=v),
    "twin dtype": lambda m, y, v: m.twin(dtype=v),
    "twin layer_sizes": lambda m, y, v: m.twin(layer_sizes=v),
    "target_shape target_shape": lambda m, y, v: setattr(m, "target_shape", v),
    "diagnose X": lambda m, y, v: m.diagnose(v, y),
    "diagnose y": lambda m, y, v: m.diagnose(X, v),
    "diagnose sample_weight": lambda m, y, v: m.diagnose(X, y, v),
    "diagnose optimizer": lambda m, y, v: m.diagnose(X, y, optimizer=v),
    "every every": lambda m, y, v: gb.GradientFlow(X, y, every=v),
    "check_gradients X": lambda m, y, v: check_gradients(m, v, y),
    "check_gradients y": lambda m, y, v: check_gradients(m, X, v),
    "parity devices": lambda m, y, v: gb.parity(m, X, y, devices=v),
    "load path": lambda m, y, v: gb.load(v),
    "load device": lambda m, y, v: gb.get_backend(v),
    "MLP layer_sizes": lambda m, y, v: gb.MLP(v, device=m.backend),
    **{f"MLP {name}": _built(name) for name in (
        "activation", "loss", "device", "dtype", "seed", "initializer", "dropout", "matmul_precision",
    )},
    "MLP activations": lambda m, y, v: gb.MLP([3, 4, 4, 2], ["relu", v], device=m.backend),
    "Architecture description": lambda m, y, v: Architecture.from_json(v),
    "negative_slope negative_slope": lambda m, y, v: ACTIVATIONS["leaky_relu"](negative_slope=v),
    "delta delta": lambda m, y, v: LOSSES["huber"](delta=v),
    "reduction reduction": lambda m, y, v: LOSSES["huber"](reduction=v),
    "monitor monitor": lambda m, y, v: m.fit(X, y, **FIT, callbacks=[gb.EarlyStopping(monitor=v)]),
    **{f"EarlyStopping {name}": _made(gb.EarlyStopping, name) for name in ("patience", "min_delta", "restore_best")},
    **{f"ReduceOnPlateau {name}": _made(gb.ReduceOnPlateau, name) for name in ("factor", "patience", "min_rate")},
    **{f"{kind} {name}": _used(kind, name) for kind in OPTIMIZERS for name in _names(OPTIMIZERS[kind])},
    **{f"{kind} {name}": _scheduled(kind, name) for kind in SCHEDULES for name in _names(SCHEDULES[kind])},
}  # fmt: skip


def _keyed(value: Any) -> dict[Any, Any]:
    try:
        return {value: X}
    except Exception:  # it has no hash
        return {}


def case(rng: random.Random, device: str) -> None:
    """Run one call with one hostile argument; afterwards the network is as it was, and can be used."""
    name = rng.choice(list(CALLS))
    argument = name.split()[1]
    arrays = argument in ("X", "y", "do", "sample_weight", "validation_data") or argument.startswith("layers")
    pool = rng.choice(
        [ARRAYS, ARRAYS, ARRAYS, SCALARS, OBJECTS] if arrays else [SCALARS, SCALARS, SCALARS, ARRAYS, OBJECTS]
    )
    which = rng.choice(["classes", "numbers", "signs"])
    model, parameters = models(device)[which]
    y = {"classes": Y, "numbers": T, "signs": Y}[which]
    value = rng.choice(pool)()
    expected = model.predict(X)
    try:
        result = CALLS[name](model, y, value)
        if _moderate(value) and not isinstance(result, type(None) | tuple):
            _check_finite(result)
    except (ValueError, TypeError) as error:
        _check_error(str(error), name, argument, value)
        same = np.array_equal(model.backend.to_numpy(model.parameters.flat), parameters)
        if not same and argument not in ("callbacks", "monitor"):  # which are found at fault after an epoch
            raise AssertionError(f"{name}: half of a change was left") from error
        raise
    finally:
        model.describe_data(None, None)
        model.parameters.flat[...] = model.backend.asarray(parameters)
        model.network.changed()
        model.target_shape = None
    assert np.array_equal(model.predict(X), expected), f"{name}: the network has changed"


def _check_error(text: str, name: str, argument: str, value: Any) -> None:
    words = (argument.rstrip("s"), *ALSO.get(argument, ()))
    own = argument == "initializer" and callable(value)  # raised by what was given
    assert own or any(word in text for word in words), f"{name}: the message does not name it: {text[:300]}"


def _moderate(value: Any) -> bool:
    try:
        a = np.asarray(value, np.float64)
        return bool((np.abs(a) <= LARGEST).all())
    except Exception:
        return False


def _check_finite(result: Any) -> None:
    values = result.values() if isinstance(result, dict) else [result]
    for value in values:
        if isinstance(value, np.ndarray | float | list):
            assert np.isfinite(np.asarray(value, np.float64)).all(), "finite data gave NaN or infinity"
