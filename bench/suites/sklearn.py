"""Estimators: scikit-learn's own MLPClassifier and ours, which does the same with the same ``random_state``."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import numpy as np

from gpubackprop.bench.case import Cases, Prepared, Settings, admit
from gpubackprop.bench.devices import Device
from gpubackprop.bench.ours import TOLERANCE
from gpubackprop.bench.peers import Problem
from gpubackprop.bench.suites import NothingToMeasureError, step_cases
from gpubackprop.bench.timing import Candidate
from gpubackprop.machine.crossover import step_flops

EPOCHS, LONG = 50, 1e9  # of a fit, or as many as take this many FLOP: those that take long are as exact with fewer
CALLS = ("fit", "early stopping", "partial_fit", "predict", "predict all")


def cases(device: Device, dtype: str, settings: Settings) -> Cases:
    """Yield a fit, one with early stopping, and calls with a mini-batch or, last, all rows, of each size."""
    if device.on_gpu or dtype not in ("float32", "float64"):
        raise NothingToMeasureError("scikit-learn's own computes on the CPU, in float32 or float64")
    for call in CALLS:
        yield from step_cases("sklearn", device, dtype, settings, partial(_prepare, call), f"{call} ")


def _prepare(call: str, device: Device, problem: Problem, settings: Settings) -> Prepared:
    """Expect of both what scikit-learn's computes in float64."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    import gpubackprop.sklearn

    warnings.simplefilter("ignore", ConvergenceWarning)  # the epochs are fixed
    n = len(problem.X)
    options: dict[str, Any] = {
        "hidden_layer_sizes": problem.sizes[1:-1], "solver": problem.optimizer, "batch_size": problem.batch,
        "max_iter": max(2, min(EPOCHS, int(LONG / step_flops(problem.sizes, n)))), "random_state": 0,
        "n_iter_no_change": np.inf, "early_stopping": call == "early stopping",
    }  # fmt: skip
    given = {"gpubackprop": gpubackprop.sklearn.MLPClassifier(device=device.name, **options)}
    if "sklearn" in settings.libraries:
        given["sklearn"] = MLPClassifier(**options)
    _, probabilities = _work(MLPClassifier(**options), call, problem, "float64")
    expected, prepared = probabilities(), Prepared([])
    for name, estimator in given.items():
        run, probabilities = _work(estimator, call, problem, problem.dtype)
        admit(prepared, Candidate(name, run, device.timer()), probabilities, expected, TOLERANCE[problem.dtype])
    return prepared


def _work(estimator: Any, call: str, problem: Problem, dtype: str) -> Any:
    """Return what is timed, and a function that does it once and returns the probabilities of all rows."""
    X, y, some = problem.X.astype(dtype), problem.y, slice(problem.batch)
    classes = np.arange(problem.sizes[-1])
    if call in ("fit", "early stopping"):
        run: Any = partial(estimator.fit, X, y)
    elif call == "partial_fit":
        estimator.partial_fit(X[some], y[some], classes=classes)
        run = partial(estimator.partial_fit, X[some], y[some])
    else:
        estimator.set_params(max_iter=2).fit(X, y)
        run = partial(estimator.predict, X[some] if call == "predict" else X)

    def probabilities() -> np.ndarray:
        run()
        return np.asarray(estimator.predict_proba(X), np.float64)

    return run, probabilities
