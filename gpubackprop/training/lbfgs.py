"""L-BFGS: SciPy's minimization of the loss of the whole data set."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpubackprop.intake import Samples
from gpubackprop.optimizers import LBFGS
from gpubackprop.training.divergence import Divergence, ending
from gpubackprop.training.history import Training
from gpubackprop.training.loop import EndEpoch
from gpubackprop.training.progress import Progress
from gpubackprop.training.run import Run


def minimize_loss(
    training: Training,
    report: Progress,
    end_epoch: EndEpoch,
    *,
    samples: Samples,
    optimizer: LBFGS,
    policy: str,
    run: Run | None,
) -> None:
    """Minimize the loss of the whole data set; an epoch is an iteration of SciPy's L-BFGS-B.

    SciPy's state cannot be saved, so a resumed run repeats the finished iterations from the same start, and checks that it
    arrives at the same parameters.
    """
    from scipy.optimize import minimize

    network, backend = training.model.network, training.model.backend
    step = network.step(len(samples), class_indices=samples.y.ndim == 1, weighted=samples.weight is not None)
    samples.feed(step.names.array)
    compiled, value, theta = step.compile(), step.names.array("loss"), network.parameters.flat
    done, reached, start = training.position.epoch, theta.copy(), theta.copy()
    if run is not None:
        run.begin(training, {"start": start})
    theta[...] = start
    iterations = 0

    def loss_and_gradient(x: np.ndarray) -> tuple[float, np.ndarray]:
        theta[...] = backend.asarray(x.astype(network.real))
        compiled()
        report.batches_done(1, 0, value)
        loss = float(value[0])
        if not np.isfinite(loss) and not iterations and np.array_equal(x, first):
            what = f"the loss is {loss:g} at the start"
            raise ending(Divergence(step=1, epoch=1, batch=1, learning_rate=1.0, what=what, kept=1), policy)
        return loss, backend.to_numpy(network.gradients.flat).astype(np.float64)

    last = first = backend.to_numpy(theta).astype(np.float64)

    def end_iteration(intermediate_result: Any) -> None:
        nonlocal last, iterations
        last = intermediate_result.x.copy()
        theta[...] = backend.asarray(last.astype(network.real))
        iterations += 1
        if iterations == done and not bool((theta == reached).all()):
            raise RuntimeError(
                f"the first {done} iterations of this run give other parameters here than in its checkpoint; resume it with the "
                "machine, versions and device it began on"
            )
        if iterations <= done:
            return
        training.epoch = iterations - 1
        if not end_epoch(float(intermediate_result.fun)):
            raise StopIteration
        report.epoch_begins()

    options = {"maxiter": training.epochs, "maxcor": optimizer.history_size, "ftol": 1e-12, "gtol": optimizer.tolerance}
    report.epoch_begins()
    try:
        minimize(loss_and_gradient, first, jac=True, method="L-BFGS-B", callback=end_iteration, options=options)
    finally:  # the line search may have been interrupted anywhere
        theta[...] = backend.asarray(last.astype(network.real))
