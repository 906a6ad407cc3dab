"""The step of a golden file, run repeatedly with mistakes in it, each replacing an array where it is computed.

All later operations see the result of a mistake, so a run with it is the network of somebody who made it. The operations are
those of the reference backend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from gpubackprop.activations import ACTIVATIONS, Activation
from gpubackprop.architecture import Architecture
from gpubackprop.backends.reference import ReferenceBackend
from gpubackprop.definitions import Array
from gpubackprop.inspect.golden import ITERATIONS, OPTIMIZERS, Problem
from gpubackprop.network import Network
from gpubackprop.step.operations import BiasActivationBackward, BiasActivationForward, BiasLoss, Matmul, Operation


class Mistake(NamedTuple):
    """A way to compute something else: wrong values by the kind of array, as functions of the right one and its place."""

    name: str
    cause: str
    wrong: Mapping[str, Callable[[Array, Any], Array]]
    per_layer: bool = False
    """It may be in a single layer."""


Made = tuple[Mistake, str | None]
"""A mistake and the layer that it is in; None for all of them."""


class _StopRun(Exception):  # noqa: N818  (no error)
    """The rest cannot be computed from an array of a wrong shape, or is not wanted."""


class Rehearsal:
    """The network of a golden file, whose step can be run repeatedly, with or without mistakes."""

    def __init__(self, problem: Problem, given: Mapping[str, Array]) -> None:
        p, self.given = problem, dict(given)
        self.problem, self.names, self.L = p, p.names, len(p.layers) - 2
        described: dict[str, Any] = {"activations": p.activation, "loss": p.loss, "dtype": "float64"}
        network = Network(Architecture(p.layers, **described), "reference")
        self.backend = ReferenceBackend()
        self.activation, self.loss = ACTIVATIONS[p.activation], network.loss
        self.step = network.step(
            len(given["X"]), OPTIMIZERS[p.optimizer], class_indices=given["y"].ndim == 1, keep=True
        )
        for name in ("X", "y"):
            self.array(name)[...] = given[name]
        for m in self.names:
            for name in (f"W_{m}", f"b_{m}"):
                self.array(name)[...] = given[f"{name}.1"]
        self.operations = list(zip(self.step.operations, self.step.bound(), strict=True))
        self.begin = {name: self.array(name).copy() for name in ("parameters", "states", "counters", "scalars")}
        layers = list(enumerate(self.names, 1))
        self.places = {f"{kind}_{m}": (kind, l) for l, m in layers for kind in ("z", "dW", "dh")} | {
            "o": ("z", self.L + 1)
        }
        self.kept: dict[str, Array] = {}
        self.wanted: Callable[[str, Array], bool] | None = None
        self.mistakes: Sequence[Made] = ()
        self.arrays: dict[str, Array] = {}
        self.t = 1
        self.fits = True

    def array(self, name: str) -> Array:
        """Return an array of the step."""
        return self.step.names.array(name)

    def of_layer(self, kind: str, l: int) -> Array:
        """Return an array of layer l: h_0 is X, and the output layer L + 1 has z = h = o and dh = delta = do."""
        if (kind, l) == ("h", 0) or (kind, l) == ("z", 0):
            return self.array("X")
        if l > self.L and kind in ("z", "h", "dh", "delta"):
            return self.array("o" if kind in ("z", "h") else "do")
        return self.array(f"{kind}_{self.names[l - 1]}")

    def run(
        self, mistakes: Sequence[Made] = (), wanted: Callable[[str, Array], bool] | None = None
    ) -> dict[str, Array]:
        """Return all arrays by key, in the order in which they are computed.

        Parameters
        ----------
        mistakes : sequence of (Mistake, layer)
            A wrong shape stops the run where something is computed from it.
        wanted : callable, optional
            Of a key and its array: the run stops where it is False.
        """
        self.mistakes, self.kept, self.arrays, self.wanted = mistakes, {}, dict(self.given), wanted
        for name, value in self.begin.items():
            self.array(name)[...] = value
        with np.errstate(all="ignore"):
            try:
                self._probe()
                for self.t in range(1, ITERATIONS + 1):
                    self._iterate()
            except (_StopRun, ValueError, IndexError):
                pass
        return self.arrays

    # ------------------------------------------------------------------ an iteration

    def _iterate(self) -> None:
        self.fits = True
        for recorded, bound in self.operations:
            if recorded.phase == "update":
                break
            self.backend.execute(bound)
            match bound:
                case Matmul():
                    kind, l = self.places[recorded.out.name]  # type: ignore[attr-defined]
                    if kind != "z":
                        self._put(kind, l, bound.out)
                case BiasActivationForward():
                    self._forward(bound, self.places[recorded.z.name][1])  # type: ignore[attr-defined]
                case BiasLoss():
                    self._loss(bound)
                case BiasActivationBackward():
                    self._backward(bound, self.places[recorded.dh.name][1])  # type: ignore[attr-defined]
        self._update()

    def _wrong(self, kind: str, right: Array, at: At) -> Array:
        for mistake, layer in self.mistakes:
            if kind in mistake.wrong and layer in (None, at.layer):
                right = np.asarray(mistake.wrong[kind](right, at))
        return right

    def _keep(self, key: str, value: Array) -> None:
        self.arrays[key] = np.array(value)
        if self.wanted is not None and not self.wanted(key, value):
            raise _StopRun

    def _put(self, kind: str, l: int, array: Array) -> bool:
        """Replace an array by what the mistakes make of it, and keep it; returns whether it changed."""
        value = self._wrong(kind, array, At(self, l))
        self._keep(f"{kind}_{self.names[l - 1]}.{self.t}", value)
        if value is array:
            return False
        if value.shape == array.shape:
            array[...] = value
        elif kind in ("dW", "db"):
            self.fits = False  # only the update needs it
        else:
            raise _StopRun
        return True

    def _again(self, operation: Operation, **arrays: Array) -> None:
        """Run an operation with other arrays."""
        self.backend.execute(operation.with_arrays(arrays))

    def _forward(self, o: BiasActivationForward, l: int) -> None:
        if self._put("z", l, o.z):
            self._again(o, b=np.zeros_like(o.b))
        self._put("h", l, o.out)

    def _loss(self, o: BiasLoss) -> None:
        at, l = At(self, self.L + 1), self.L + 1
        outputs = self._wrong("o", self._wrong("z", o.z, at), at)
        y = self._wrong("y", o.y, at)
        if outputs.shape != o.z.shape:
            raise _StopRun
        o.z[...] = outputs
        self._again(o, b=np.zeros_like(o.b), y=y)
        self._keep(f"o.{self.t}", o.z)
        at = At(self, l, o.z, o.y)
        self._keep(f"loss.{self.t}", self._wrong("loss", o.value[:1].reshape(()), at))
        do = self._wrong("do", o.out, at)
        self._keep(f"do.{self.t}", do)
        if do.shape != o.out.shape:
            raise _StopRun
        o.out[...] = do
        o.db[...] = do.sum(axis=0)
        self._put("db", l, o.db)

    def _backward(self, o: BiasActivationBackward, l: int) -> None:
        slope = np.broadcast_to(self.activation.dphi(o.z, o.h), o.z.shape)
        wrong = self._wrong("dphi", slope, At(self, l))
        if wrong is not slope:
            o.out[...] = o.dh * wrong
        if self._put("delta", l, o.out) or wrong is not slope:
            o.db[...] = o.out.sum(axis=0)
        self._put("db", l, o.db)

    def _update(self) -> None:
        if not self.fits:
            raise _StopRun
        names = [f"{kind}_{m}" for m in self.names for kind in "Wb"]
        before = {name: self.array(name).copy() for name in names}
        self.take_step()
        for name in names:
            at = At(self, 0, name=name, before=before[name])
            value = self._wrong("update", self.array(name), at)
            self.array(name)[...] = value
            self._keep(f"{name}.{self.t + 1}", value)

    def take_step(self) -> None:
        """Run the optimizer's operations."""
        for recorded, bound in self.operations:
            if recorded.phase == "update":
                self.backend.execute(bound)

    def _probe(self) -> None:
        z, o, y = (self.given[name] for name in ("probe_z", "probe_o", "probe_y"))
        h = self.activation.phi(z)
        self._keep("probe_phi", h)
        self._keep(
            "probe_dphi",
            self._wrong(
                "dphi", np.broadcast_to(self.activation.dphi(z, h), z.shape), At(self, 0, z_given=z, h_given=h)
            ),
        )
        at = At(self, 0, o, y)
        value, do, _ = self.backend.bias_loss(o.copy(), np.zeros(o.shape[1]), self._wrong("y", y, at), self.loss)
        self._keep("probe_loss", self._wrong("loss", value[:1].reshape(()), at))
        self._keep("probe_do", self._wrong("do", do, at))


@dataclass(frozen=True)
class At:
    """The place of an array in a run, as a mistake sees it: what is computed so far."""

    run: Rehearsal
    l: int
    o: Any = None
    y: Any = None
    z_given: Any = None
    h_given: Any = None
    name: str = ""
    before: Any = None

    @property
    def layer(self) -> str:
        """The name of the layer; the probes have none."""
        return self.run.names[self.l - 1] if self.l else ""

    @property
    def above(self) -> At:
        """The same in the layer above."""
        return At(self.run, self.l + 1)

    @property
    def activation(self) -> Activation:
        """phi."""
        return self.run.activation

    @property
    def classes(self) -> int:
        """d_o."""
        return self.run.problem.layers[-1]

    @property
    def n(self) -> int:
        """The number of samples."""
        return len(self.o if self.o is not None else self.run.given["X"])

    @property
    def h_in(self) -> Array:
        """h_{l-1}."""
        return self.run.of_layer("h", self.l - 1)

    @property
    def z_in(self) -> Array:
        """z_{l-1}."""
        return self.run.of_layer("z", self.l - 1)

    @property
    def z(self) -> Array:
        """z_l."""
        return self.run.of_layer("z", self.l) if self.z_given is None else self.z_given

    @property
    def h(self) -> Array:
        """h_l."""
        return self.run.of_layer("h", self.l) if self.h_given is None else self.h_given

    @property
    def W(self) -> Array:  # noqa: N802  (the symbol)
        """W_l."""
        return self.run.of_layer("W", self.l)

    @property
    def b(self) -> Array:
        """b_l."""
        return self.run.of_layer("b", self.l)

    @property
    def dh(self) -> Array:
        """dh_l."""
        return self.run.of_layer("dh", self.l)

    @property
    def delta(self) -> Array:
        """delta_l."""
        return self.run.of_layer("delta", self.l)

    @property
    def gradient(self) -> Array:
        """Of the parameter ``name``."""
        return self.run.array(f"d{self.name}")

    @property
    def t(self) -> int:
        """The iteration, from 1."""
        return self.run.t

    def state(self, number: int) -> Array:
        """Return one of the optimizer's arrays for the parameter ``name``."""
        buffer = self.run.step.buffers[self.name]
        flat = self.run.array("states")[number]
        return flat[buffer.offset : buffer.offset + buffer.size].reshape(buffer.shape)

    def added_up(self, kind: str, right: Array) -> Array:
        """Return the sum of an array over the iterations so far."""
        name = f"{kind}_{self.layer}"
        self.run.kept[name] = self.run.kept.get(name, 0) + right
        return self.run.kept[name]

    def updated_W(self) -> Array:  # noqa: N802  (the symbol)
        """Return W_l after its update, which is undone again."""
        run, names = self.run, tuple(self.run.begin)
        before = {name: run.array(name).copy() for name in names}
        run.take_step()
        W = self.W.copy()
        for name in names:
            run.array(name)[...] = before[name]
        return W
