"""``gpubackprop evaluate``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from gpubackprop.cli.options import Device
from gpubackprop.cli.saved import DataPath, DelimiterOption, HeaderOption, RunPath, TargetOption


def evaluate(
    run: RunPath,
    data: DataPath,
    target: TargetOption = None,
    header: HeaderOption = None,
    delimiter: DelimiterOption = None,
    device: Device = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores in JSON.")] = False,
) -> None:
    """Score a trained network on data: accuracy, precision, recall, F1, ROC-AUC and confusion matrix, or r2, MAE, RMSE."""
    import json

    import numpy as np

    from gpubackprop.cli.saved import batches, open_saved
    from gpubackprop.labels import indices_of
    from gpubackprop.training.scores import outputs_of, scores_of

    saved = open_saved(run, device)
    model, kind = saved.on_inputs(), saved.model.loss.kind
    truths: list[Any] = []
    predicted, probabilities = [], []
    for X, y in batches(data, saved, with_target=True, target=target, header=header, delimiter=delimiter):
        truths.append(y if model.classes is None else indices_of(y, model.classes, f"{data!r}: "))
        predicted.append(outputs_of(model, X))
        if kind.mean.probabilities is not None:
            probabilities.append(model.predict_proba(X))
    if not predicted:
        raise ValueError(f"{data!r} has no samples")
    p = np.concatenate(probabilities) if probabilities else None
    found = scores_of(kind, np.concatenate(truths), np.concatenate(predicted), p, model.classes)
    print(json.dumps(found.to_json(), indent=1) if as_json else found)
