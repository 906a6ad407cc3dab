"""L-BFGS: SciPy's minimization of the loss of the whole data set."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpubackprop.intake import Samples
from gpubackprop.optimizers import LBFGS
from gpubackprop.training.history import Training
from gpubackprop.training.loop import EndEpoch
from gpubackprop.training.progress import Progress


def minimize_loss(
    training: Training, report: Progress, end_epoch: EndEpoch, *, samples: Samples, optimizer: LBFGS
) -> None:
    """Minimize the loss of the whole data set; an epoch is an iteration of SciPy's L-BFGS-B."""
    from scipy.optimize import minimize

    network, backend = training.model.network, training.model.backend
    step = network.step(len(samples), class_indices=samples.y.ndim == 1, weighted=samples.weight is not None)
    samples.feed(step.names.array)
    run, value, theta = step.compile(), step.names.array("loss"), network.parameters.flat

    def loss_and_gradient(x: np.ndarray) -> tuple[float, np.ndarray]:
        theta[...] = backend.asarray(x.astype(network.real))
        run()
        report.batches_done(1, 0, value)
        return float(value[0]), backend.to_numpy(network.gradients.flat).astype(np.float64)

    last = start = backend.to_numpy(theta).astype(np.float64)

    def end_iteration(intermediate_result: Any) -> None:
        nonlocal last
        last = intermediate_result.x.copy()
        theta[...] = backend.asarray(last.astype(network.real))
        go_on = end_epoch(float(intermediate_result.fun))
        training.epoch += 1
        report.epoch_begins()
        if not go_on:
            raise StopIteration

    options = {"maxiter": training.epochs, "maxcor": optimizer.history_size, "ftol": 1e-12, "gtol": optimizer.tolerance}
    report.epoch_begins()
    try:
        minimize(loss_and_gradient, start, jac=True, method="L-BFGS-B", callback=end_iteration, options=options)
    finally:  # the line search may have been interrupted anywhere
        theta[...] = backend.asarray(last.astype(network.real))
