"""The workspace: every array of a step, allocated once for a batch size, each with a name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpubackprop.activations import Activation
from gpubackprop.backends.base import Backend
from gpubackprop.definitions import Array, address
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
) -> list[Layer]:
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
    return layers


class Workspace:
    """The arrays of one pass over n samples.

    Parameters
    ----------
    n : int
        Samples in a batch.
    keep : bool
        Give z, h, dh, delta, o and do memory of their own (for ``trace`` and the gradient check) instead of sharing it
        where the mathematics allows.
    y_shape, y_dtype
        Of the targets.
    """

    def __init__(
        self,
        backend: Backend,
        layers: Sequence[Layer],
        n: int,
        y_shape: tuple[int, ...],
        y_dtype: np.dtype[Any],
        *,
        dropout: float = 0.0,
        weighted: bool = False,
        keep: bool = False,
    ) -> None:
        self.n = n
        self.names = names = Names()
        dtype, real = layers[0].W.dtype, layers[0].dW.dtype

        def new(*shape: int) -> Array:
            return backend.zeros(shape, dtype)

        self.X = names("X", new(n, layers[0].W.shape[0]))
        self.y = names("y", backend.zeros(y_shape, y_dtype))
        self.weight = names("w", backend.zeros((n,), real)) if weighted else None
        self.normalized = names("w̄", backend.zeros((n,), real)) if weighted else None
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

    @property
    def o(self) -> Array:
        """The outputs, shape (n, d_o)."""
        return self.layers[-1].z

    @property
    def do(self) -> Array:
        """d loss / d o, shape (n, d_o)."""
        return self.layers[-1].delta

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        distinct = {address(a): a.nbytes for layer in self.layers for a in vars(layer).values()}
        return int(sum(distinct.values()) + self.y.nbytes)
