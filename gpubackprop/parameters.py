"""All parameters of a network in one flat array, and all gradients in another: the layers hold views into them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from gpubackprop.backends.base import Backend
from gpubackprop.definitions import Array

ALIGNMENT = 32  # elements; each W and b starts at a multiple: 64 bytes or more, whatever the dtype


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
        for d_in, d_out in pairwise(layer_sizes):
            self.W.append(flat[first : first + d_in * d_out].reshape(d_in, d_out))
            first += -(-d_in * d_out // ALIGNMENT) * ALIGNMENT
            self.b.append(flat[first : first + d_out])
            first += -(-d_out // ALIGNMENT) * ALIGNMENT

    @classmethod
    def zeros(cls, backend: Backend, layer_sizes: Sequence[int], dtype: np.dtype[Any]) -> Parameters:
        """Return parameters that are all 0."""
        return cls(layer_sizes, backend.zeros((flat_size(layer_sizes),), dtype))

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


def flat_size(layer_sizes: Sequence[int]) -> int:
    """Return the length of the flat array, padding included; the same for every dtype."""
    blocks = [size for d_in, d_out in pairwise(layer_sizes) for size in (d_in * d_out, d_out)]
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in blocks)
