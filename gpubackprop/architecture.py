"""The description of a network, one frozen value: enough to make it on any device, in another dtype, or from a file."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
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
    shown,
)
from gpubackprop.features import Features
from gpubackprop.initializers import INITIALIZERS, Initializer
from gpubackprop.labels import Label, check_classes, check_number_of_classes
from gpubackprop.losses import LOSSES, Loss
from gpubackprop.registry import Registry


@dataclass(frozen=True)
class Architecture:
    """Layer sizes, definitions and numbers of a network; everything but its device and the values of its parameters.

    Parameters
    ----------
    layer_sizes, activations, loss, dtype, seed, initializer, dropout, matmul_precision
        As in :class:`gpubackprop.MLP`: names are resolved here, and everything is checked. ``matmul_precision``, which
        only a GPU has, is kept for a later move to one.
    target_shape : tuple of int, optional
        The shape of one sample's y in the last ``fit``, None before.
    features : Features, optional
        What the inputs are made of, if they are not given as numbers that the network takes as they are.
    classes : tuple, optional
        The labels of the classes, if they are not 0, 1, 2, ....

    Raises
    ------
    ValueError
        For an unknown name or a size out of range.

    Examples
    --------
    >>> from dataclasses import replace
    >>> from gpubackprop.architecture import Architecture
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
    features: Features | None = None
    classes: tuple[Label, ...] | None = None

    def __post_init__(self) -> None:
        loss = _resolved("loss", LOSSES, self.loss, Loss)
        sizes = check_layer_sizes(self.layer_sizes, loss)
        check_precision(self.matmul_precision)
        shape = self.target_shape
        checked = {
            "layer_sizes": sizes,
            "activations": _per_hidden_layer(self.activations, len(sizes) - 2),
            "loss": loss,
            "dtype": check_dtype(self.dtype),
            "seed": check_seed(self.seed),
            "initializer": _resolved("initializer", INITIALIZERS, self.initializer, Callable),
            "dropout": float(check_number("dropout", self.dropout, lambda x: 0 <= x < 1, "in [0, 1)")),
            "target_shape": None
            if shape is None
            else tuple(check_count("target_shape", size) for size in _items("target_shape", shape)),
            "classes": None if self.classes is None else check_classes(self.classes),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.classes is not None:
            check_number_of_classes(self.classes, sizes[-1], loss)
        if self.features is not None:
            if not isinstance(self.features, Features):
                raise ValueError(f"features is {shown(self.features)}; give Features, or None")
            if self.features.inputs != sizes[0]:
                raise ValueError(
                    f"the features are {self.features}: {self.features.inputs} inputs; layer_sizes begins with {sizes[0]}: "
                    f"begin with {self.features.inputs}"
                )

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
        """Micro-batches of a multiple of it begin at a block of four random numbers in every hidden layer."""
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
            **({} if self.features is None else {"features": self.features.to_json()}),
            **({} if self.classes is None else {"classes": self.classes}),
        }

    @classmethod
    def from_json(cls, description: Mapping[str, Any]) -> Self:
        """Return the architecture of a description; entries that older files lack take their defaults.

        Raises
        ------
        ValueError
            A value is missing, unknown, of another kind or out of range: a description may come from anywhere.
        """
        given = _of_kinds("the description", description, KINDS, OPTIONAL)
        loss = _of_kinds("loss", given["loss"], DEFINITION | {"reduction": str})
        return cls(
            layer_sizes=given["layer_sizes"],
            activations=[_defined(ACTIVATIONS, _of_kinds("activation", a, DEFINITION)) for a in given["activation"]],  # type: ignore[arg-type]
            loss=_defined(LOSSES, loss)(reduction=loss["reduction"]),
            dtype=given["dtype"],
            seed=given["seed"],
            initializer=given.get("initializer") or "he_normal",  # type: ignore[arg-type]
            dropout=given["dropout"],
            matmul_precision=given.get("matmul_precision", "float32"),
            target_shape=given.get("target_shape"),
            features=Features.from_json(given["features"]) if "features" in given else None,
            classes=given.get("classes"),
        )


KINDS: dict[str, Any] = {
    "layer_sizes": list | tuple, "activation": list, "loss": dict, "dtype": str, "seed": int, "dropout": float | int,
}  # fmt: skip
OPTIONAL: dict[str, Any] = {
    "initializer": str | None, "matmul_precision": str, "target_shape": list | tuple | None, "features": dict,
    "classes": list | tuple,
}  # fmt: skip
DEFINITION: dict[str, Any] = {"name": str, "parameters": dict}


class Described:
    """Base class of what has an architecture: its fields, read-only."""

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
        """The activation of each hidden layer."""
        return self.architecture.activations

    @property
    def loss(self) -> Loss:
        """The loss."""
        return self.architecture.loss

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of activations and products."""
        return self.architecture.dtype

    @property
    def real(self) -> np.dtype[Any]:
        """The dtype of parameters, gradients and arithmetic."""
        return self.architecture.real

    @property
    def seed(self) -> int:
        """The seed of initial weights, order of the mini-batches and dropout."""
        return self.architecture.seed

    @property
    def initializer(self) -> Initializer:
        """The initializer of the weights."""
        return self.architecture.initializer

    @property
    def dropout(self) -> float:
        """The fraction of hidden units dropped in training."""
        return self.architecture.dropout

    @property
    def features(self) -> Features | None:
        """What the inputs are made of: columns, scaling, categories; None if X is taken as it is."""
        return self.architecture.features

    @property
    def classes(self) -> tuple[Label, ...] | None:
        """The labels of the classes, in the order of the outputs; None if they are 0, 1, 2, ...."""
        return self.architecture.classes

    @property
    def matmul_precision(self) -> str:
        """How float32 matrices are multiplied on a GPU; kept by ``to``, ``save`` and ``load``, also via the CPU."""
        return self.architecture.matmul_precision


def check_layer_sizes(layer_sizes: Sequence[int], loss: Loss) -> tuple[int, ...]:
    """Return the layer sizes as a tuple of at least two positive whole numbers."""
    sizes = tuple(plain(d) for d in _items("layer_sizes", layer_sizes))
    if len(sizes) < 2 or not all(type(d) is int and 1 <= d < 2**63 for d in sizes):
        raise ValueError(
            f"layer_sizes is {shown(list(sizes))}; give at least two whole numbers >= 1, inputs first, as in [784, 128, 10]"
        )
    if loss.family == "softmax" and sizes[-1] < 2:
        raise ValueError(f"{loss.name} needs at least 2 outputs, one per class; layer_sizes ends with {sizes[-1]}")
    return sizes


def _items(name: str, value: Any) -> tuple[Any, ...]:
    try:
        return tuple(value)
    except Exception:  # iterating over it may raise anything
        raise ValueError(f"{name} is {shown(value)}; it must be a sequence of whole numbers") from None


def _per_hidden_layer(activation: Any, n: int) -> tuple[Activation, ...]:
    if isinstance(activation, list | tuple):
        if len(activation) != n:
            raise ValueError(f"activation has {len(activation)} entries; there are {n} hidden layers: give one or {n}")
        return tuple(_resolved("activation", ACTIVATIONS, a, Activation) for a in activation)
    return (_resolved("activation", ACTIVATIONS, activation, Activation),) * n


def _resolved(name: str, registry: Registry[Any], value: Any, kind: Any) -> Any:
    """Return the definition of a name; a definition is returned as it is."""
    result = registry.resolve(value)
    if not isinstance(result, kind):
        raise ValueError(f"{name} is {shown(value)}; give a name, one of {', '.join(registry)}, or a definition")
    return result


def _described(definition: Definition) -> dict[str, Any]:
    return {"name": definition.name, "parameters": dict(definition.parameters)}


def _defined(registry: Registry[Any], description: Mapping[str, Any]) -> Any:
    entry, parameters = registry.resolve(description["name"]), description["parameters"]
    for name, value in parameters.items():
        if not isinstance(value, bool | int | float):
            raise ValueError(f"{entry.name}: {shown(name)} is {shown(value)}; it must be a number")
    try:
        return entry(**parameters) if parameters else entry
    except (TypeError, OverflowError) as error:  # an unknown parameter, or a number too large
        raise ValueError(f"{entry.name}: {error}") from None


def _of_kinds(
    what: str, given: Any, kinds: Mapping[str, Any], optional: Mapping[str, Any] | None = None
) -> Mapping[str, Any]:
    """Return a dictionary whose names are those of ``kinds`` and ``optional``, each with a value of its kind."""
    optional = optional or {}
    if not isinstance(given, Mapping):
        raise ValueError(f"{what} is {shown(given)}; it must be a dictionary of {', '.join(kinds)}")
    allowed = {**kinds, **optional}
    for name in kinds:
        if name not in given:
            raise ValueError(f"{what} has no {name}")
    for name, value in given.items():
        if name not in allowed:
            raise ValueError(f"{what} has {shown(name)}, which is unknown; it may have {', '.join(allowed)}")
        if not isinstance(value, allowed[name]) or isinstance(value, bool):
            raise ValueError(f"{name} in {what} is {shown(value)}, which has the wrong type")
    return given
