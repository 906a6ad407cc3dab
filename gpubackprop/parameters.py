"""All parameters of a network in one flat array, and all gradients in another: the layers hold views into them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from gpubackprop.backends.base import Backend
from gpubackprop.definitions import Array

ALIGNMENT = 64  # bytes; each W and b starts at a multiple, for vector loads and BLAS


class Parameters:
    """W_l and b_l of every layer as views into one array; also used for the gradients dW_l and db_l.

    Between two views there may be a few elements of padding, which are 0 and stay 0: their gradient is 0.

    Attributes
    ----------
    flat : array, shape (size,)
        All of them, with the padding.
    W : list of array, shape (d_{l-1}, d_l)
    b : list of array, shape (d_l,)
        ``W[0]``, ``b[0]`` belong to the first layer, ``W[-1]``, ``b[-1]`` to the output layer.
    """

    def __init__(self, layer_sizes: Sequence[int], flat: Array) -> None:
        self.layer_sizes = tuple(layer_sizes)
        self.flat = flat
        self.W: list[Array] = []
        self.b: list[Array] = []
        first = 0
        step = ALIGNMENT // flat.dtype.itemsize
        for d_in, d_out in pairwise(layer_sizes):
            self.W.append(flat[first : first + d_in * d_out].reshape(d_in, d_out))
            first += -(-d_in * d_out // step) * step
            self.b.append(flat[first : first + d_out])
            first += -(-d_out // step) * step

    @classmethod
    def zeros(cls, backend: Backend, layer_sizes: Sequence[int], dtype: np.dtype[Any]) -> Parameters:
        """Return parameters that are all 0."""
        return cls(layer_sizes, backend.zeros((flat_size(layer_sizes, dtype),), dtype))

    def copy(self) -> Parameters:
        """Return a copy that later passes leave alone."""
        return Parameters(self.layer_sizes, self.flat.copy())

    @property
    def count(self) -> int:
        """The number of parameters, without the padding."""
        return sum(a.size for a in (*self.W, *self.b))

    def __repr__(self) -> str:
        sizes = "-".join(map(str, self.layer_sizes))
        return f"Parameters({sizes}: {self.count:,} in one {self.flat.dtype} array)"


def flat_size(layer_sizes: Sequence[int], dtype: np.dtype[Any]) -> int:
    """Return the length of the flat array, padding included."""
    step = ALIGNMENT // dtype.itemsize
    return sum(-(-d_in * d_out // step) * step + -(-d_out // step) * step for d_in, d_out in pairwise(layer_sizes))
