"""Small mini-batches: a training step as in ``step``, and a prediction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from gpubackprop.bench.case import Cases, Prepared, Settings, admit
from gpubackprop.bench.devices import Device
from gpubackprop.bench.ours import TOLERANCE, model_of, whole_peers
from gpubackprop.bench.peers import Problem, softmax
from gpubackprop.bench.suites import step, step_cases
from gpubackprop.bench.timing import Candidate


def cases(device: Device, dtype: str, settings: Settings) -> Cases:
    """Yield a step and a prediction of each size; in a quick run only the prediction."""
    if not settings.quick:
        yield from step.cases(device, dtype, settings, "latency")
    yield from step_cases("latency", device, dtype, settings, _prepare, "predict ")


def _prepare(device: Device, problem: Problem, settings: Settings) -> Prepared:
    """All candidates get an array on the device and return one there; Keras and tinygrad return NumPy's.

    Ours is the prepared predictor, as JAX's is a compiled function; ``forward`` also checks X and keeps the intermediates.
    """
    prepared, allowed = Prepared([]), TOLERANCE[problem.dtype]
    exact = model_of(replace(problem, dtype="float64"), "reference")
    expected = exact.predict_proba(problem.X.astype(np.float64))
    with device.scope():
        model = model_of(problem, device.backend)
        X: Any = device.backend.asarray(problem.X.astype(model.real))
        ways: dict[str, Callable[[], Any]] = {
            "gpubackprop": partial(model.predictor(problem.batch), X),
            "gpubackprop, forward": partial(model.forward, X),
        }

        def found(outputs: Callable[[], Any]) -> np.ndarray:
            return softmax(np.asarray(device.backend.to_numpy(outputs()), np.float64))

        for name, outputs in ways.items():
            admit(prepared, Candidate(name, outputs, device.timer()), partial(found, outputs), expected, allowed)
        for name, peer in whole_peers(problem, settings, prepared):
            admit(prepared, Candidate(name, peer.predict, peer.timer), peer.probabilities, expected, allowed)
    return prepared
