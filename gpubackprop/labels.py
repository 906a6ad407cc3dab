"""Labels of classes: what the indices that a network learns and predicts stand for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from gpubackprop.definitions import Array, check_number, plain, shown
from gpubackprop.interop import on_host

Label: TypeAlias = str | int | float | bool


def is_text(y: Any) -> bool:
    """Return whether an array holds labels that are text."""
    return isinstance(y, np.ndarray) and (y.dtype.kind in "UST" or (y.dtype == object and isinstance(y.flat[0], str)))


def check_classes(classes: Any) -> tuple[Label, ...]:
    """Return labels, at least two, all different and of one kind: text, numbers or truth values.

    Raises
    ------
    ValueError
        They are not; the message says what is allowed.
    """
    allowed = "give at least two different labels, all text or all numbers, in the order of the outputs"
    try:
        found = tuple(map(plain, () if isinstance(classes, str) else classes))
    except Exception:  # iterating over it may raise anything
        raise ValueError(f"classes is {shown(classes)}; {allowed}") from None
    kinds = {type(label) for label in found}
    if len(found) < 2 or not (kinds <= {str} or kinds <= {bool} or kinds <= {int, float}):
        raise ValueError(f"classes is {shown(found)}; {allowed}")
    if len(set(found)) < len(found) or not all(isinstance(x, str) or math.isfinite(x) for x in found):
        raise ValueError(f"classes is {shown(found)}; {allowed}")
    return found


def classes_in(y: Any) -> tuple[Label, ...]:
    """Return the labels in text, sorted."""
    if y.ndim != 1 and y.shape != (len(y), 1):
        raise ValueError(f"y is text of shape {y.shape}; it must be one label for each sample")
    labels = _cells(y)
    for i, label in enumerate(labels):
        if not isinstance(label, str):
            raise ValueError(
                f"y of sample {i + 1} is {shown(label)}, and others are text: a label is missing or mixed up"
            )
    return check_classes(sorted(set(labels)))


def check_number_of_classes(classes: Sequence[Label], outputs: int, loss: Any) -> None:
    """Raise ValueError unless the outputs of a network are for these classes."""
    named = f"{len(classes)} classes ({', '.join(map(str, classes[:6]))}{', ...' * (len(classes) > 6)})"
    if not loss.kind.numbered:
        raise ValueError(f"{named} need a loss of classes, such as softmax_cross_entropy; the loss is {loss.name}")
    if loss.kind.takes_indices and outputs != len(classes):
        raise ValueError(f"there are {named}; layer_sizes ends with {outputs}: end with {len(classes)}")
    if not loss.kind.takes_indices and (outputs != 1 or len(classes) != 2):
        raise ValueError(f"there are {named}; {loss.name} has two, and one output: layer_sizes ends with {outputs}")


def indices_of(y: Any, classes: Sequence[Label], name: str = "") -> Any:
    """Return y as indices of classes; where classes are text and y is whole numbers, or rows of numbers, these are kept.

    Raises
    ------
    ValueError
        A label is none of the classes; the message names it.
    """
    if (hasattr(y, "ndim") and y.ndim == 2 and y.shape[1] > 1) or (not is_text(y) and isinstance(classes[0], str)):
        return y
    place = {label: i for i, label in enumerate(classes)}
    labels = _cells(y)
    try:
        return np.array([place[label] for label in labels], np.int64)
    except (KeyError, TypeError):
        i = next(i for i, label in enumerate(labels) if label not in place)
        raise ValueError(
            f"{name}y of sample {i + 1} is {shown(labels[i])}, which is none of the classes {shown(list(classes), 200)}"
        ) from None


def labels_of(indices: Any, classes: Sequence[Label]) -> np.ndarray:
    """Return the labels of predicted indices."""
    labels: np.ndarray = np.array(classes)[np.asarray(on_host(indices))]
    return labels


def weights_of(
    class_weight: Any, y: Array, n: int, classes: Sequence[Label] | None, outputs: int, loss: Any
) -> np.ndarray:
    """Return a weight for each sample: that of its class, or for "balanced" n / (k n_c), which makes all classes count alike.

    Parameters
    ----------
    class_weight : "balanced" or dict
        Weights by label, or by index; a class that is not named weighs 1.
    y : array, shape (n,)
        Class indices.

    Source: G. King, L. Zeng, "Logistic Regression in Rare Events Data" (2001), as scikit-learn's ``class_weight="balanced"``.
    """
    if not loss.kind.numbered:
        raise ValueError(
            f"class_weight needs a loss of classes, such as softmax_cross_entropy; the loss is {loss.name}"
        )
    labels: Sequence[Any] = range(max(outputs, 2)) if classes is None else classes
    y = np.asarray(on_host(y))
    if y.shape not in ((n,), (n, 1)) or y.dtype.kind not in "biuf":
        raise ValueError(f"class_weight needs one class for each sample; y has shape {y.shape}")
    y = y.reshape(-1).astype(np.int64)
    if y.min(initial=0) < 0 or y.max(initial=0) >= len(labels):
        raise ValueError(f"y holds labels from {y.min()} to {y.max()}; there are {len(labels)} classes")
    if isinstance(class_weight, str) and class_weight == "balanced":
        counts = np.bincount(y, minlength=len(labels))
        return (n / (np.count_nonzero(counts) * np.maximum(counts, 1)))[y]
    if not isinstance(class_weight, Mapping):
        raise ValueError(
            f"class_weight is {shown(class_weight)}; give 'balanced', or a weight for each class in a dictionary"
        )
    weights, place = np.ones(len(labels)), {label: i for i, label in enumerate(labels)}
    for label, weight in class_weight.items():
        if plain(label) not in place:
            raise ValueError(
                f"class_weight names {shown(label)}, which is none of the classes {shown(list(labels), 200)}"
            )
        weights[place[plain(label)]] = check_number(
            f"class_weight of {shown(label)}", weight, lambda x: 0 <= x < math.inf, "a number >= 0"
        )
    return weights[y]


def _cells(y: Any) -> list[Any]:
    cells: list[Any] = np.asarray(on_host(y)).reshape(-1).tolist()
    return cells
