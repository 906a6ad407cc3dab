"""All parameters of a network in one flat array, and all gradients in another: the layers hold views into them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from gpubackprop.backends.base import Backend
from gpubackprop.definitions import Array, shown
from gpubackprop.interop import device_of
from gpubackprop.step.layout import flat_size, offsets

if TYPE_CHECKING:
    from gpubackprop.architecture import Architecture


class SetOnce:
    """Base class whose public attributes are set once, since compiled code relies on them. Arrays are written into, never replaced.

    Compiled steps hold the addresses of these arrays, and sizes and dtypes say how far they reach.
    """

    advice: ClassVar[str] = "write into it: {name}[...] = value"
    """What to do instead, for the error message."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not self._fixed(name):
            super().__setattr__(name, value)
        elif getattr(self, name) is not value:  # the same one comes back from ``flat += 1``
            raise AttributeError(f"{type(self).__name__}.{name} cannot be replaced; {self._advice(name)}")

    def __delattr__(self, name: str) -> None:
        if self._fixed(name):
            raise AttributeError(f"{type(self).__name__}.{name} cannot be deleted")
        super().__delattr__(name)

    def _fixed(self, name: str) -> bool:
        of_class = getattr(type(self), name, None)
        if of_class is not None:
            return isinstance(of_class, property) and of_class.fset is None
        return not name.startswith("_") and name in vars(self)

    def _advice(self, name: str) -> str:
        return self.advice.format(name=name)


class Views(tuple[Array, ...]):
    """The views of all layers: an array may be written into, not replaced."""

    def __setitem__(self, l: int, value: Any) -> None:  # noqa: E741  (the layer)
        if value is not self[l]:  # the same one comes back from ``W[l] += 1``
            raise TypeError(
                f"entry {l} cannot be replaced, since steps and layers hold its memory; write into it, as in "
                f"model.parameters.W[{l}][...] = value"
            )


class Parameters(SetOnce):
    """W_l and b_l of every layer as views into one array; also used for the gradients dW_l and db_l.

    Between two views there may be a few elements of padding, which are 0 and stay 0: their gradient is 0. None of these
    arrays can be replaced; write into them, as in ``model.parameters.W[l][...] = value``.

    Attributes
    ----------
    flat : array, shape (size,)
        All of them, with the padding.
    W : tuple of array, shape (d_{l-1}, d_l)
    b : tuple of array, shape (d_l,)
        ``W[0]``, ``b[0]`` belong to the first layer, ``W[-1]``, ``b[-1]`` to the output layer.
    """

    def __init__(self, layer_sizes: Sequence[int], flat: Array) -> None:
        self.layer_sizes = tuple(layer_sizes)
        self.flat = flat
        pairs = list(zip(pairwise(self.layer_sizes), offsets(self.layer_sizes), strict=True))
        self.W = Views(flat[W : W + d_in * d].reshape(d_in, d) for (d_in, d), (W, _) in pairs)
        self.b = Views(flat[b : b + d] for (_, d), (_, b) in pairs)

    @classmethod
    def zeros(cls, backend: Backend, layer_sizes: Sequence[int], dtype: np.dtype[Any]) -> Parameters:
        """Return parameters that are all 0."""
        return cls(layer_sizes, backend.zeros((flat_size(layer_sizes),), dtype))

    def copy(self) -> Parameters:
        """Return a copy that later passes do not change."""
        with device_of(self.flat):
            return Parameters(self.layer_sizes, self.flat.copy())

    advice = "write into the arrays: model.parameters.W[l][...] = value"

    def __reduce__(self) -> Any:
        return Parameters, (self.layer_sizes, self.flat)  # the views are recreated

    @property
    def count(self) -> int:
        """The number of parameters, without the padding."""
        return sum(a.size for a in (*self.W, *self.b))

    def __repr__(self) -> str:
        sizes = "-".join(map(str, self.layer_sizes))
        return f"Parameters({sizes}: {self.count:,} in one {self.flat.dtype} array)"


def initial_parameters(architecture: Architecture) -> np.ndarray:
    """Return the flat array of the parameters that a new network begins with, the same for every device."""
    a = architecture
    rng = np.random.Generator(np.random.Philox(key=a.seed))
    flat = np.zeros(flat_size(a.layer_sizes), a.real)
    gains = [activation.gain for activation in a.activations] + [1.0]
    for W, gain in zip(Parameters(a.layer_sizes, flat).W, gains, strict=True):
        made = np.asarray(a.initializer(rng, W.shape[0], W.shape[1], gain))
        fits = made.shape == W.shape and made.dtype.kind in "biuf"
        with np.errstate(over="ignore"):  # overflow is checked below
            W[...] = made if fits else np.nan
        if not np.isfinite(W).all():
            raise ValueError(f"initializer returned {shown(made)}; it must return finite numbers of shape {W.shape}")
    return flat
