"""What describes a network, in one frozen value: to make it on a device, again on another, in another dtype, or from a file."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from gpubackprop.activations import ACTIVATIONS, Activation
from gpubackprop.definitions import (
    Definition,
    check_count,
    check_dtype,
    check_number,
    check_precision,
    check_seed,
    plain,
    real_of,
)
from gpubackprop.initializers import INITIALIZERS, Initializer
from gpubackprop.losses import LOSSES, Loss
from gpubackprop.registry import Registry


@dataclass(frozen=True)
class Architecture:
    """Layer sizes, definitions and numbers of a network; everything but its device and the values of its parameters.

    Parameters
    ----------
    layer_sizes, activations, loss, dtype, seed, initializer, dropout, matmul_precision
        As :class:`gpubackprop.MLP` takes them: names are resolved here, and everything is checked. ``matmul_precision``, which
        only a GPU has, is kept for when the network goes on to one.
    target_shape : tuple of int, optional
        The shape of one sample's y in the last ``fit``, None before.

    Raises
    ------
    ValueError
        For an unknown name or a size out of range.

    Examples
    --------
    >>> from dataclasses import replace
    >>> twin = replace(Architecture((4, 8, 3)), dtype="float64", dropout=0.0)
    """

    layer_sizes: tuple[int, ...]
    activations: tuple[Activation, ...] = "relu"  # type: ignore[assignment]  # a name, or one for each hidden layer
    loss: Loss = "softmax_cross_entropy"  # type: ignore[assignment]
    dtype: np.dtype[Any] = "float32"  # type: ignore[assignment]
    seed: int = 0
    initializer: Initializer = "he_normal"  # type: ignore[assignment]
    dropout: float = 0.0
    matmul_precision: str = "float32"
    target_shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        loss = LOSSES.resolve(self.loss)
        sizes = check_layer_sizes(self.layer_sizes, loss)
        check_precision(self.matmul_precision)
        shape = self.target_shape
        checked = {
            "layer_sizes": sizes,
            "activations": _per_hidden_layer(self.activations, len(sizes) - 2),
            "loss": loss,
            "dtype": check_dtype(self.dtype),
            "seed": check_seed(self.seed),
            "initializer": INITIALIZERS.resolve(self.initializer),
            "dropout": float(check_number("dropout", self.dropout, lambda x: 0 <= x < 1, "in [0, 1)")),
            "target_shape": None if shape is None else tuple(check_count("target_shape", size) for size in shape),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def real(self) -> np.dtype[Any]:
        """The dtype of arithmetic, parameters and gradients."""
        return real_of(self.dtype)

    @property
    def loss_scaling(self) -> bool:
        """Whether gradients are scaled against underflow."""
        return self.dtype.name == "float16"

    @property
    def micro_batch_multiple(self) -> int:
        """A micro-batch that is a multiple of it begins where a block of four random numbers does, in every hidden layer."""
        hidden = self.layer_sizes[1:-1] if self.dropout else ()
        return next(k for k in (1, 2, 4) if all(k * d % 4 == 0 for d in hidden))

    def __str__(self) -> str:
        sizes = "-".join(map(str, self.layer_sizes))
        hidden = ", ".join(dict.fromkeys(a.label for a in self.activations)) or "no hidden layer"
        return f"{sizes}, {hidden}, {self.loss.label}, {self.dtype}"

    def to_json(self) -> dict[str, Any]:
        """Return what :meth:`from_json` takes; an initializer that is not registered has no name, which a warning says."""
        initializer = next((name for name, one in INITIALIZERS.items() if one is self.initializer), None)
        if initializer is None:
            warnings.warn(
                "the network's initializer is not registered, so the file cannot name it; a network from the file has the saved "
                "parameters, and 'he_normal' for new ones. Decorate the function with gpubackprop.initializers.initializer",
                stacklevel=4,
            )  # fmt: skip
        return {
            "layer_sizes": self.layer_sizes,
            "activation": [_described(a) for a in self.activations],
            "loss": _described(self.loss) | {"reduction": self.loss.reduction},
            "dtype": self.dtype.name,
            "seed": self.seed,
            "initializer": initializer,
            "dropout": self.dropout,
            "matmul_precision": self.matmul_precision,
            "target_shape": self.target_shape,
        }

    @classmethod
    def from_json(cls, description: Mapping[str, Any]) -> Self:
        """Return the architecture of a description; what older files do not have takes its default."""
        loss = description["loss"]
        return cls(
            layer_sizes=description["layer_sizes"],
            activations=[_defined(ACTIVATIONS, a) for a in description["activation"]],  # type: ignore[arg-type]
            loss=_defined(LOSSES, loss)(reduction=loss["reduction"]),
            dtype=description["dtype"],
            seed=description["seed"],
            initializer=description.get("initializer") or "he_normal",  # type: ignore[arg-type]
            dropout=description["dropout"],
            matmul_precision=description.get("matmul_precision", "float32"),
            target_shape=description.get("target_shape"),
        )


class Described:
    """A base of what has an architecture: its fields, to be read."""

    @property
    def architecture(self) -> Architecture:
        """What describes it."""
        raise NotImplementedError

    @property
    def layer_sizes(self) -> tuple[int, ...]:
        """Inputs, hidden layers, outputs."""
        return self.architecture.layer_sizes

    @property
    def activations(self) -> tuple[Activation, ...]:
        """One for each hidden layer."""
        return self.architecture.activations

    @property
    def loss(self) -> Loss:
        """The loss."""
        return self.architecture.loss

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of activations and products."""
        return self.architecture.dtype

    @property
    def real(self) -> np.dtype[Any]:
        """Of parameters, gradients and arithmetic."""
        return self.architecture.real

    @property
    def seed(self) -> int:
        """Of initial weights, order of the mini-batches and dropout."""
        return self.architecture.seed

    @property
    def initializer(self) -> Initializer:
        """What made the initial weights."""
        return self.architecture.initializer

    @property
    def dropout(self) -> float:
        """The share of hidden units dropped in training."""
        return self.architecture.dropout

    @property
    def matmul_precision(self) -> str:
        """How float32 matrices are multiplied on a GPU; kept by ``to``, ``save`` and ``load``, also by way of the CPU."""
        return self.architecture.matmul_precision


def check_layer_sizes(layer_sizes: Sequence[int], loss: Loss) -> tuple[int, ...]:
    """Return the layer sizes as a tuple of at least two positive whole numbers."""
    sizes = tuple(plain(d) for d in layer_sizes)
    if len(sizes) < 2 or not all(type(d) is int and d >= 1 for d in sizes):
        raise ValueError(
            f"layer_sizes is {list(sizes)!r}; give at least two whole numbers >= 1, inputs first, as in [784, 128, 10]"
        )
    if loss.family == "softmax" and sizes[-1] < 2:
        raise ValueError(f"{loss.name} needs at least 2 outputs, one per class; layer_sizes ends with {sizes[-1]}")
    return sizes


def _per_hidden_layer(activation: Any, n: int) -> tuple[Activation, ...]:
    if isinstance(activation, list | tuple):
        if len(activation) != n:
            raise ValueError(f"activation has {len(activation)} entries; there are {n} hidden layers: give one or {n}")
        return tuple(ACTIVATIONS.resolve(a) for a in activation)
    return (ACTIVATIONS.resolve(activation),) * n


def _described(definition: Definition) -> dict[str, Any]:
    return {"name": definition.name, "parameters": dict(definition.parameters)}


def _defined(registry: Registry[Any], description: Mapping[str, Any]) -> Any:
    entry = registry.resolve(description["name"])
    return entry(**description["parameters"]) if description["parameters"] else entry
