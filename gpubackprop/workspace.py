"""The workspace: every array of a step, allocated once for a batch size, each with a name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpubackprop.activations import Activation
from gpubackprop.backends.base import Backend
from gpubackprop.definitions import Array
from gpubackprop.parameters import Parameters
from gpubackprop.step import Names


@dataclass(frozen=True)
class Layer:
    """One layer: views into the flat parameters and gradients. ``name`` is "1", ..., or "o" for the output layer."""

    name: str
    activation: Activation
    W: Array
    W_T: Array
    b: Array
    dW: Array
    db: Array


@dataclass
class LayerArrays:
    """The intermediates of one layer for one batch size.

    Attributes
    ----------
    h_in, h_in_T : array, shape (n, d_{l-1}) and its transpose, a view
    z, h, dh, delta : array, shape (n, d_l)
        h may share memory with z, and delta with dh, unless the workspace keeps everything.
    dropped, ddropped : array, shape (n, d_l)
        h after dropout and its gradient; h and dh themselves without dropout.
    """

    h_in: Array
    h_in_T: Array
    z: Array
    h: Array
    dh: Array
    delta: Array
    dropped: Array
    ddropped: Array


def make_layers(
    parameters: Parameters, gradients: Parameters, activations: Sequence[Activation], names: Names
) -> tuple[Layer, ...]:
    """Return the layers of a network, their arrays named W_1, b_1, dW_1, ..., W_o, b_o, dW_o, db_o."""
    layers = []
    for i, activation in enumerate(activations):
        name = "o" if i == len(activations) - 1 else str(i + 1)
        W = names(f"W_{name}", parameters.W[i])
        layers.append(
            Layer(
                name,
                activation,
                W,
                names(f"W_{name}ᵀ", W.T),
                names(f"b_{name}", parameters.b[i]),
                names(f"dW_{name}", gradients.W[i]),
                names(f"db_{name}", gradients.b[i]),
            )
        )
    return tuple(layers)


class Inputs:
    """Where a mini-batch of n samples goes.

    Attributes
    ----------
    X : array, shape (n, d_0)
    y : array, shape ``y_shape``
    weight, normalized : array, shape (n,), or None
        Sample weights, and the same over their sum.
    total : array, shape (1,), float64, or None
        Their sum.
    """

    def __init__(
        self,
        backend: Backend,
        X: tuple[tuple[int, ...], np.dtype[Any]],
        y: tuple[tuple[int, ...], np.dtype[Any]],
        real: np.dtype[Any],
        *,
        weighted: bool = False,
    ) -> None:
        self.n = X[0][0]
        self.names = names = Names()
        self.X = names("X", backend.zeros(*X))
        self.y = names("y", backend.zeros(*y))
        self.weight = names("w", backend.zeros((self.n,), real)) if weighted else None
        self.normalized = names("w̄", backend.zeros((self.n,), real)) if weighted else None
        self.total = names("Σw", backend.zeros((1,), np.dtype(np.float64))) if weighted else None

    def rows(self, first: int, n: int) -> Inputs:
        """Return views of n rows; names say which."""
        part = object.__new__(Inputs)
        part.n, part.names = n, Names()
        whole = first == 0 and n == self.n
        for field in ("X", "y", "weight", "normalized"):
            array = getattr(self, field)
            if array is not None:
                name = self.names.of(array)
                array = part.names(name if whole else f"{name}[{first}:{first + n}]", array[first : first + n])
            setattr(part, field, array)
        part.total = None if self.total is None else part.names("Σw", self.total)
        return part


class Workspace:
    """The arrays of one pass over n samples.

    Parameters
    ----------
    inputs : Inputs
        Where the mini-batch lies.
    layers : sequence of Layer
        Their gradients are where the passes over this workspace leave them.
    keep : bool
        Give z, h, dh, delta, o and do memory of their own (for ``trace`` and the gradient check) instead of sharing it
        where the mathematics allows.
    """

    def __init__(
        self,
        backend: Backend,
        layers: Sequence[Layer],
        inputs: Inputs,
        *,
        dropout: float = 0.0,
        keep: bool = False,
    ) -> None:
        self.n = n = inputs.n
        self.parameters = layers  # what the passes read, and the gradients that they write
        self.gradients: Parameters | None = None  # all of those in one, while they are this workspace's
        self.samples: int | None = None  # of the mini-batch that these n are a part of
        self.first = 0  # the place of the first of them
        self.names = names = Names()
        dtype = layers[0].W.dtype

        def new(*shape: int) -> Array:
            return backend.zeros(shape, dtype)

        names.update(inputs.names)
        self.X, self.y, self.weight, self.normalized = inputs.X, inputs.y, inputs.weight, inputs.normalized
        self.total = inputs.total
        self.value = names("loss", backend.zeros((2,), np.float64))
        self.layers: list[LayerArrays] = []
        h_in = self.X
        for layer in layers:
            name, d, output = layer.name, layer.b.shape[0], layer.name == "o"
            z = names("o" if output else f"z_{name}", new(n, d))
            share = not keep and (output or layer.activation.needs == "h")
            h = z if output else names(f"h_{name}", z if share else new(n, d))
            dropped = names(f"r_{name}", new(n, d)) if dropout and not output else h
            dh = z if output else names(f"dh_{name}", new(n, d))
            ddropped = names(f"dr_{name}", dh) if dropout and not output else dh
            delta = names("do" if output else f"δ_{name}", new(n, d) if keep else dh)
            self.layers.append(
                LayerArrays(h_in, names(f"{names.of(h_in)}ᵀ", h_in.T), z, h, dh, delta, dropped, ddropped)
            )
            h_in = dropped

    def part(self, inputs: Inputs, samples: int | None = None, first: int = 0) -> Workspace:
        """Return a workspace in the same memory that reads ``inputs``, as many rows as those have.

        With ``samples``, they are the rows from ``first`` on of a mini-batch of so many.
        """
        part = object.__new__(Workspace)
        part.n, part.samples, part.first, part.parameters = inputs.n, samples, first, self.parameters
        part.names = names = Names()
        names.update(inputs.names)
        part.X, part.y, part.weight, part.normalized = inputs.X, inputs.y, inputs.weight, inputs.normalized
        part.total = inputs.total
        part.value = names("loss", self.value)
        views: dict[int, Array] = {id(self.layers[0].h_in): inputs.X}

        def rows(a: Array) -> Array:
            if id(a) not in views:
                views[id(a)] = names(self.names.of(a), a[: part.n])
            return views[id(a)]

        part.layers = []
        for a in self.layers:
            h_in = rows(a.h_in)
            part.layers.append(
                LayerArrays(
                    h_in, names(f"{names.of(h_in)}ᵀ", h_in.T), rows(a.z), rows(a.h), rows(a.dh), rows(a.delta),
                    rows(a.dropped), rows(a.ddropped),
                )
            )  # fmt: skip
        return part

    @property
    def o(self) -> Array:
        """The outputs, shape (n, d_o)."""
        return self.layers[-1].z

    @property
    def do(self) -> Array:
        """d loss / d o, shape (n, d_o)."""
        return self.layers[-1].delta

    def feed(self, X: Array, y: Array | None = None, weight: Array | None = None) -> None:
        """Read these arrays, without a copy."""
        self.X = self.layers[0].h_in = X
        self.layers[0].h_in_T = None if X is None else X.T
        self.y, self.weight = y, weight


class Pool:
    """Workspaces, and gradients, that nobody uses. A pass takes one for itself: threads that share a network share no memory.

    It has no lock, since single operations on lists and dicts are atomic, and a lock may be taken for ever in a forked process.

    Parameters
    ----------
    keys : int
        How many kinds are kept; the kind that was not used for the longest time goes first.
    """

    MOST = 16  # of a kind: no more threads than that find theirs ready

    def __init__(self, keys: int) -> None:
        self._keys = keys
        self._free: dict[tuple[Any, ...], list[Any]] = {}

    def take(self, key: tuple[Any, ...]) -> Any:
        """Return one of a kind, which is then the caller's alone, or None where there is none."""
        try:
            return self._free[key].pop()
        except (KeyError, IndexError):
            return None

    def give(self, key: tuple[Any, ...], item: Any) -> None:
        """Take one back."""
        free = self._free.pop(key, [])  # and in again, as the one that was used last
        if len(free) < self.MOST:
            free.append(item)
        self._free[key] = free
        for old in list(self._free)[: -self._keys]:
            self._free.pop(old, None)

    def forget_oldest(self) -> None:
        """Let the memory of one kind go."""
        for old in list(self._free)[:1]:
            self._free.pop(old, None)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return iter([key for key, free in list(self._free.items()) if free])

    def __bool__(self) -> bool:
        return bool(self._free)
