"""How good predictions are: the usual scores of classifications and regressions, by scikit-learn."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gpubackprop.definitions import shown
from gpubackprop.frames import column_of
from gpubackprop.intake import Samples
from gpubackprop.interop import on_host
from gpubackprop.labels import indices_of
from gpubackprop.targets import Kind

if TYPE_CHECKING:
    from gpubackprop.mlp import MLP

CLASSIFIED = ("accuracy", "balanced_accuracy", "precision", "recall", "f1", "log_loss", "roc_auc")
REAL = ("r2", "mae", "rmse")
MOST_SHOWN = 20  # classes in a printed confusion matrix


@dataclass(frozen=True)
class Scores:
    """Scores of predictions.

    Attributes
    ----------
    samples : int
    overall : dict
        Of a classification: accuracy, balanced_accuracy, precision, recall and f1 (means over the classes), log_loss where there
        are probabilities, and roc_auc if every class is present. Of a regression: r2, mae, rmse.
    classes : dict
        Of a classification, by label: precision, recall, f1 and the number of samples.
    confusion : list of list of int
        Rows are the true classes, columns the predicted ones, in the order of ``classes``.
    """

    samples: int
    overall: dict[str, float]
    classes: dict[str, dict[str, float]]
    confusion: list[list[int]]

    def __str__(self) -> str:
        lines = [f"{self.samples:,} sample{'s' * (self.samples != 1)}"]
        lines += [f"{name:18s} {value:.4f}" for name, value in self.overall.items()]
        if not self.classes:
            return "\n".join(lines)
        width = max(5, *(len(name) for name in self.classes))
        lines += ["", f"{'class':{width}s}  precision  recall      f1  samples"]
        lines += [
            f"{name:{width}s}  {row['precision']:9.4f}  {row['recall']:6.4f}  {row['f1']:6.4f}  {row['samples']:7,d}"
            for name, row in self.classes.items()
        ]
        if len(self.classes) > MOST_SHOWN:
            return "\n".join([*lines, "", f"the confusion matrix of {len(self.classes)} classes is in --json"])
        names = [name[:12] for name in self.classes]
        cell = max(len(str(max(map(max, self.confusion)))), *map(len, names))
        lines += ["", "rows: true class, columns: predicted"]
        lines += [f"{'':{width}s}  " + "  ".join(f"{name:>{cell}s}" for name in names)]
        for name, row in zip(self.classes, self.confusion, strict=True):
            lines.append(f"{name:{width}s}  " + "  ".join(f"{count:{cell},d}" for count in row))
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return plain data; what is not defined is None."""
        plain = {name: None if math.isnan(value) else value for name, value in self.overall.items()}
        return {"samples": self.samples, "overall": plain, "classes": self.classes, "confusion": self.confusion}


def score(model: MLP, X: Any, y: Any) -> Scores:
    """Return the scores of a network on a data set, as :func:`gpubackprop.training.scores.scores_of` defines them.

    Raises
    ------
    ValueError
        The data do not fit the network, or its loss has neither classes nor numbers as targets.
    """
    kind, truth = model.loss.kind, column_of(y)
    if model.classes is not None:
        truth = indices_of(truth, model.classes)
    probabilities = model.predict_proba(X) if kind.mean.probabilities is not None else None
    return scores_of(kind, truth, outputs_of(model, X), probabilities, model.classes)


def check_metrics(metrics: Any, kind: Kind) -> tuple[str, ...]:
    """Return names of scores, which this kind of targets must have."""
    names = CLASSIFIED if kind.numbered else REAL
    if (
        isinstance(metrics, str)
        or not isinstance(metrics, Sequence)
        or not all(isinstance(name, str) for name in metrics)
    ):
        raise ValueError(f"metrics is {shown(metrics)}; give names in a list: {', '.join(names)}")
    for name in metrics:
        if name.lower() not in names:
            raise ValueError(f"metrics has {shown(name)}; choose from {', '.join(names)}")
    return tuple(name.lower() for name in metrics)


def metrics_on(model: MLP, samples: Samples, names: Sequence[str]) -> dict[str, float]:
    """Return some scores of a network on checked samples; NaN for one that is not defined on them."""
    kind, xp, to_host = model.loss.kind, model.backend.xp, model.backend.to_numpy
    read = [kind.predict, *([kind.mean.probabilities] if kind.mean.probabilities is not None else [])]
    parts = [[to_host(f(o, xp)) for f in read] for _, o in model.in_batches(samples.X)]
    overall = scores_of(kind, samples.y, *(np.concatenate(part) for part in zip(*parts, strict=True))).overall
    return {name: overall.get(name, math.nan) for name in names}


def of_each_class(p: np.ndarray) -> np.ndarray:
    """Return probabilities with a column for each class; where there is one column, it is that of the second class."""
    return np.hstack([1 - p, p]) if p.shape[1] == 1 else p


def outputs_of(model: MLP, X: Any) -> np.ndarray:
    """Return predictions as numbers: class indices where the network has labels."""
    plain = model if model.classes is None else model.twin(classes=None)
    return np.asarray(on_host(plain.predict(X)))


def scores_of(
    kind: Kind, y: Any, predicted: np.ndarray, probabilities: Any = None, labels: Any = None
) -> Scores:  # fmt: skip
    """Return the scores of predictions.

    Parameters
    ----------
    kind : Kind
        Of targets, as the loss has it.
    y : array
        The targets; of classes their indices, or rows of probabilities, of which the largest counts.
    predicted : array
    probabilities : array, shape (n, classes) or (n, 1), optional
    labels : sequence, optional
        What the indices stand for.
    """
    from sklearn import metrics

    y, predicted = np.asarray(on_host(y)), np.asarray(on_host(predicted))
    if not kind.numbered:
        y, predicted = (a.reshape(len(a), -1).astype(np.float64) for a in (y, predicted))
        if y.shape != predicted.shape:
            raise ValueError(f"y has shape {y.shape}; the predictions have {predicted.shape}")
        spread = len(y) > 1 and bool((y != y[0]).any())
        overall = {
            "r2": float(metrics.r2_score(y, predicted)) if spread else math.nan,
            "mae": float(metrics.mean_absolute_error(y, predicted)),
            "rmse": math.sqrt(float(metrics.mean_squared_error(y, predicted))),
        }
        return Scores(len(y), overall, {}, [])
    if y.ndim == 2 and y.shape[1] > 1 and kind.takes_indices:
        y = y.argmax(axis=1)
    if y.ndim == 2 and y.shape[1] > 1:
        raise ValueError(f"y has {y.shape[1]} columns of classes; scores are of one class for each sample")
    y, predicted = y.reshape(-1).astype(np.int64), predicted.reshape(-1).astype(np.int64)
    p = None if probabilities is None else np.asarray(on_host(probabilities), np.float64)
    if p is not None:
        p = of_each_class(p)
    k = max(len(labels or ()), 0 if p is None else p.shape[1], int(y.max(initial=0)) + 1)
    names = [str(label) for label in (labels or range(k))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a class without samples has no recall: 0, as documented
        parts = metrics.precision_recall_fscore_support(y, predicted, labels=range(k), zero_division=0.0)
        overall = {
            "accuracy": float(metrics.accuracy_score(y, predicted)),
            "balanced_accuracy": float(metrics.balanced_accuracy_score(y, predicted)),
        } | {name: float(part.mean()) for name, part in zip(("precision", "recall", "f1"), parts, strict=False)}
    if p is not None:
        p = p / p.sum(axis=1, keepdims=True)  # they sum to 1 in the network's dtype, scikit-learn wants it in float64
        overall["log_loss"] = float(metrics.log_loss(y, p, labels=range(k)))
        if len(set(y.tolist())) == k:
            one = p[:, 1] if k == 2 else p
            overall["roc_auc"] = float(metrics.roc_auc_score(y, one, multi_class="ovr", labels=range(k)))
    rows = {
        name: {"precision": float(a), "recall": float(b), "f1": float(c), "samples": int(d)}
        for name, a, b, c, d in zip(names, *parts, strict=True)
    }
    return Scores(len(y), overall, rows, metrics.confusion_matrix(y, predicted, labels=range(k)).tolist())
