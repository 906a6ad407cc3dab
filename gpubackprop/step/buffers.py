"""Buffers: the arrays of a step by name and shape, before there is memory; and the memory they are bound to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpubackprop.definitions import Array


@dataclass(frozen=True)
class Buffer:
    """An array of a step: a name, a shape, a dtype, and a place in the memory of a root.

    Parameters
    ----------
    name : str
        For people: ``"z_1"``, ``"dW_o"``, ``"gradients"``.
    shape : tuple of int
    dtype : numpy.dtype
    symbol : str
        In equations: ``"δ_1"``, ``"∇"``; the name by default.
    root : Buffer, optional
        The buffer whose memory it is part of; None for a buffer with its own memory.
    offset : int
        Elements from the beginning of the root.
    transposed : bool
        It is the transpose of a C-contiguous matrix there.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    symbol: str = ""
    root: Buffer | None = field(default=None, repr=False)
    offset: int = 0
    transposed: bool = False

    def __str__(self) -> str:
        return self.symbol or self.name

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return self.size * self.dtype.itemsize

    @property
    def T(self) -> Buffer:  # noqa: N802  (as in NumPy)
        """The transpose, under the same name."""
        at = self.root or self
        return Buffer(
            self.name, self.shape[::-1], self.dtype, f"{self}ᵀ", at, self.offset, transposed=not self.transposed
        )

    @property
    def own(self) -> Buffer:
        """The buffer whose memory this is: its root, or itself."""
        return self.root or self

    def view(self, name: str, shape: tuple[int, ...], offset: int = 0, symbol: str = "") -> Buffer:
        """Return another buffer in this one's memory, ``offset`` elements from its beginning."""
        return Buffer(name, shape, self.dtype, symbol, self.own, self.offset + offset)

    def named(self, name: str, symbol: str = "") -> Buffer:
        """Return the same memory under another name."""
        return self.view(name, self.shape, symbol=symbol)

    def rows(self, first: int, n: int) -> Buffer:
        """Return ``n`` rows from ``first`` on; the name says which, unless they are all."""
        if (first, n) == (0, self.shape[0]):
            return self
        where, shape = f"[{first}:{first + n}]", (n, *self.shape[1:])
        return self.view(self.name + where, shape, first * math.prod(shape[1:]), f"{self}{where}")

    def within(self, other: Buffer) -> bool:
        """Return whether it covers exactly the other's memory."""
        last, end = self.offset + self.size, other.offset + other.size
        return self.own.name == other.own.name and other.offset <= self.offset and last <= end


class Memory:
    """Arrays by the names of their buffers.

    Parameters
    ----------
    arrays : mapping of str to array
        C-contiguous. One may be larger than its buffer, which then takes the first elements: steps of several sizes
        share the memory of the largest.
    """

    def __init__(self, arrays: Mapping[str, Array] | None = None) -> None:
        self.arrays = dict(arrays or {})
        self._views: dict[Buffer, Array] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def array(self, buffer: Buffer) -> Array:
        """Return the array of a buffer: a view of memory, the same one each time."""
        view = self._views.get(buffer)
        if view is None:
            view = self._views[buffer] = self._view(buffer)
        return view

    def _view(self, buffer: Buffer) -> Array:
        array = self.arrays[buffer.own.name]
        shape = buffer.shape[::-1] if buffer.transposed else buffer.shape
        if array.shape != shape or buffer.offset:
            array = array.reshape(-1)[buffer.offset : buffer.offset + buffer.size].reshape(shape)
        return array.T if buffer.transposed else array

    def allocate(self, buffers: Iterable[Buffer], zeros: Callable[[tuple[int, ...], np.dtype[Any]], Array]) -> Memory:
        """Allocate memory for the buffers that have none yet; returns itself."""
        for buffer in buffers:
            if buffer.name not in self.arrays:
                self.arrays[buffer.name] = zeros(buffer.shape, buffer.dtype)
        return self

    def but(self, *names: str, **others: Array) -> Memory:
        """Return the same memory with some arrays removed or replaced."""
        return Memory({name: a for name, a in self.arrays.items() if name not in names} | others)


def roots(buffers: Iterable[Buffer | None]) -> Iterator[Buffer]:
    """Yield the buffers with their own memory among these and their roots, each once."""
    seen: set[str] = set()
    for buffer in buffers:
        if buffer is not None and buffer.own.name not in seen:
            seen.add(buffer.own.name)
            yield buffer.own
