"""The buffers of a network for n samples: their names, shapes, and which of them share memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gpubackprop.activations import Activation, identity
from gpubackprop.step.buffers import Buffer, roots

if TYPE_CHECKING:
    from gpubackprop.architecture import Architecture
    from gpubackprop.optimizers import Optimizer

ALIGNMENT = 32  # elements; each W and b starts at a multiple: at least 64 bytes in every dtype
INT64, FLOAT64 = np.dtype(np.int64), np.dtype(np.float64)


class Mask(NamedTuple):
    """The random numbers of a layer's dropout, as the operation takes them."""

    rate: float
    seed: int
    layer: int
    counters: Buffer
    first_block: int


@dataclass(frozen=True)
class Layer:
    """One layer. ``name`` is "1", ..., or "o" for the output layer.

    Attributes
    ----------
    W, b, dW, db : Buffer
        Parts of the flat parameters and gradients.
    h_in : Buffer, shape (n, d_{l-1})
    z, h, dh, delta : Buffer, shape (n, d_l)
        h may share memory with z, and delta with dh, unless everything is kept.
    dropped, ddropped : Buffer, shape (n, d_l)
        h after dropout and its gradient; h and dh themselves without dropout.
    mask : Mask or None
        The mask of the dropout.
    """

    name: str
    activation: Activation
    W: Buffer
    b: Buffer
    dW: Buffer
    db: Buffer
    h_in: Buffer
    z: Buffer
    h: Buffer
    dh: Buffer
    delta: Buffer
    dropped: Buffer
    ddropped: Buffer
    mask: Mask | None = None


@dataclass(frozen=True)
class Inputs:
    """The inputs of a step: a mini-batch of n samples.

    Attributes
    ----------
    X : Buffer, shape (n, d_0)
    y : Buffer, shape (n,) for class indices, else (n, d_o)
    weight, normalized : Buffer, shape (n,), or None
        Sample weights, and the same divided by their sum.
    total : Buffer, shape (1,), float64, or None
        Their sum.
    """

    X: Buffer
    y: Buffer
    weight: Buffer | None = None
    normalized: Buffer | None = None
    total: Buffer | None = None

    @property
    def n(self) -> int:
        """The number of samples."""
        return len(self.X)

    def rows(self, first: int, n: int) -> Inputs:
        """Return n rows of them."""
        weight, normalized = (None if a is None else a.rows(first, n) for a in (self.weight, self.normalized))
        return Inputs(self.X.rows(first, n), self.y.rows(first, n), weight, normalized, self.total)

    def __iter__(self) -> Iterator[Buffer]:
        return roots((self.X, self.y, self.weight, self.normalized, self.total))


@dataclass(frozen=True)
class Fixed:
    """The arrays independent of the number of samples: parameters, gradients, and the small arrays of training."""

    parameters: Buffer
    gradients: Buffer
    weights: Buffer
    counters: Buffer
    scalars: Buffer

    @property
    def mixed(self) -> bool:
        """Whether the products read a copy of the parameters in 16 bits."""
        return self.weights is not self.parameters

    def __iter__(self) -> Iterator[Buffer]:
        return roots((self.parameters, self.gradients, self.weights, self.counters, self.scalars))


@dataclass(frozen=True)
class Layout:
    """The buffers of the passes over n samples."""

    inputs: Inputs
    layers: tuple[Layer, ...]
    value: Buffer

    @property
    def workspace(self) -> Iterator[Buffer]:
        """Those with their own memory, besides the inputs and the network's arrays."""
        each = ((a.z, a.h, a.dropped, a.dh, a.ddropped, a.delta) for a in self.layers)
        return roots((self.value, *(buffer for buffers in each for buffer in buffers)))

    @property
    def gradients(self) -> dict[str, str]:
        """The name of each gradient, and of what it is the gradient of: ``{"dW_o": "W_o", "do": "o", "delta_1": "z_1", ...}``."""
        found: dict[str, str] = {}
        for a in self.layers:
            found |= {a.dW.name: a.W.name, a.db.name: a.b.name}
            found |= {"do": "o"} if a.name == "o" else {a.dh.name: a.h.name, a.delta.name: a.z.name}
        return found


def fixed(architecture: Architecture) -> Fixed:
    """Return the buffers that do not depend on the number of samples."""
    a = architecture
    shape = (flat_size(a.layer_sizes),)
    parameters = Buffer("parameters", shape, a.real, "θ")
    return Fixed(
        parameters,
        gradients=Buffer("gradients", shape, a.real, "∇"),
        weights=parameters if a.dtype == a.real else Buffer("parameters_16", shape, a.dtype, "θ16"),
        counters=Buffer("counters", (2,), INT64, "t"),
        scalars=Buffer("scalars", (8,), a.real, "η"),
    )


def state(architecture: Architecture, optimizer: Optimizer) -> tuple[Buffer, Buffer]:
    """Return the buffers of an optimizer: its states and the base learning rate."""
    shape = (optimizer.n_states, flat_size(architecture.layer_sizes))
    return Buffer("states", shape, architecture.real), Buffer("rate", (1,), FLOAT64, "η_0")


def sums(architecture: Architecture) -> tuple[Buffer, Buffer]:
    """Return the buffers for the sums of gradients and losses over micro-batches."""
    shape = (flat_size(architecture.layer_sizes),)
    return Buffer("gradients_sum", shape, architecture.real, "Σ∇"), Buffer("loss_sum", (1,), FLOAT64, "Σloss")


def inputs(architecture: Architecture, n: int, *, class_indices: bool, weighted: bool = False) -> Inputs:
    """Return the buffers of a mini-batch of n samples."""
    a = architecture
    X = Buffer("X", (n, a.layer_sizes[0]), a.dtype)
    y = Buffer("y", (n,), INT64) if class_indices else Buffer("y", (n, a.layer_sizes[-1]), a.real)
    if not weighted:
        return Inputs(X, y)
    return Inputs(
        X, y, Buffer("w", (n,), a.real), Buffer("w_normalized", (n,), a.real, "w̄"), Buffer("w_sum", (1,), FLOAT64, "Σw")
    )


def layout(
    architecture: Architecture, inputs: Inputs, *, dropout: bool = False, keep: bool = False, first: int = 0
) -> Layout:
    """Return the buffers of the passes over a mini-batch.

    Parameters
    ----------
    architecture : Architecture
    inputs : Inputs
    dropout : bool
        Drop units, if the network does so in training.
    keep : bool
        Give z, h, dh, delta, o and do their own memory (for ``trace`` and the gradient check) instead of sharing it where
        possible.
    first : int
        The index of the first of these rows in their mini-batch.
    """
    a, n, everything = architecture, inputs.n, fixed(architecture)
    layers, h_in = [], inputs.X
    activations, places = (*a.activations, identity), list(offsets(a.layer_sizes))
    for number, (d_in, d) in enumerate(pairwise(a.layer_sizes)):
        output, activation, (at_W, at_b) = number == len(places) - 1, activations[number], places[number]
        name = "o" if output else str(number + 1)
        W, b = everything.weights.view(f"W_{name}", (d_in, d), at_W), everything.weights.view(f"b_{name}", (d,), at_b)
        dW = everything.gradients.view(f"dW_{name}", (d_in, d), at_W)
        db = everything.gradients.view(f"db_{name}", (d,), at_b)
        if output:
            z = h = dropped = dh = ddropped = Buffer("o", (n, d), a.dtype)
            delta, mask = Buffer("do", (n, d), a.dtype) if keep else z.named("do"), None
        else:
            z, dh = Buffer(f"z_{name}", (n, d), a.dtype), Buffer(f"dh_{name}", (n, d), a.dtype)
            shared = activation.needs == "h" and not keep
            h = z.named(f"h_{name}") if shared else Buffer(f"h_{name}", (n, d), a.dtype)
            names = f"delta_{name}", f"δ_{name}"
            delta = replace(dh, name=names[0], symbol=names[1]) if keep else dh.named(*names)
            dropped, ddropped, mask = h, dh, None
            if dropout and a.dropout:
                dropped, ddropped = Buffer(f"r_{name}", (n, d), a.dtype), dh.named(f"dr_{name}")
                mask = Mask(a.dropout, a.seed, number, everything.counters, first * d // 4)
        layers.append(
            Layer(
                name, activation, W=W, b=b, dW=dW, db=db, h_in=h_in, z=z, h=h, dh=dh, delta=delta,
                dropped=dropped, ddropped=ddropped, mask=mask,
            )
        )  # fmt: skip
        h_in = dropped
    return Layout(inputs, tuple(layers), Buffer("loss", (2,), FLOAT64))


def offsets(layer_sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield where W and b of each layer begin in the flat array of all parameters, in any dtype."""
    place = 0
    for d_in, d in pairwise(layer_sizes):
        yield place, place + _aligned(d_in * d)
        place += _aligned(d_in * d) + _aligned(d)


def flat_size(layer_sizes: Sequence[int]) -> int:
    """Return the length of the flat array, padding included."""
    return sum(_aligned(d_in * d) + _aligned(d) for d_in, d in pairwise(layer_sizes))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
