"""Training: the loop over epochs and mini-batches around a compiled step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from gpubackprop.backends import get_backend
from gpubackprop.backends.base import Run
from gpubackprop.backends.current import active
from gpubackprop.backends.memory import free_bytes
from gpubackprop.definitions import Array, check_count, check_flag, check_number
from gpubackprop.intake import check_features, check_targets, check_weight
from gpubackprop.interop import as_array, on_gpu
from gpubackprop.network import Data, optimizer_of
from gpubackprop.optimizers import LBFGS, Adam, Optimizer
from gpubackprop.step.buffers import Memory
from gpubackprop.step.state import CURSOR, RATE, STEPS
from gpubackprop.training.callbacks import as_callbacks, call
from gpubackprop.training.evaluation import evaluate
from gpubackprop.training.progress import Progress, show_progress

if TYPE_CHECKING:
    from gpubackprop.mlp import MLP

AUTO_BATCH = 128
LARGEST_SHARE = 0.5  # of the free memory that a data set may take before it stays on the host


class History(dict[str, list[float]]):
    """One list per column, one entry per epoch: loss, val_loss, val_accuracy or val_r2, learning_rate, seconds."""

    interrupted: bool = False
    """True if Ctrl-C ended the training."""
    compile_seconds: float = 0.0
    """Seconds spent on compiling kernels, or on loading them from disk, before the first epoch."""

    def add(self, **row: float) -> None:
        """Append one epoch."""
        for name, value in row.items():
            self.setdefault(name, []).append(float(value))


@dataclass
class Training:
    """A training as callbacks see it."""

    model: MLP
    history: History
    epochs: int
    epoch: int = 0
    stop: bool = False

    @property
    def learning_rate(self) -> float:
        """The base learning rate; a schedule multiplies it."""
        state = self.model.optimizer_state
        with active(self.model.backend):
            return float(state.rate[0]) if state is not None else 1.0

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        value = check_number("learning_rate", value, lambda x: 0 <= x < math.inf, "a number >= 0")
        if self.model.optimizer_state is not None:
            with active(self.model.backend):
                self.model.optimizer_state.rate[0] = value


def fit(
    model: MLP,
    X: Any,
    y: Any,
    *,
    epochs: int = 10,
    batch_size: int | str = 128,
    optimizer: str | Optimizer | None = None,
    validation_data: tuple[Any, ...] | None = None,
    sample_weight: Any = None,
    callbacks: Any = (),
    progress: bool = True,
    shuffle: bool = True,
    micro_batch_size: int | str | None = None,
    stream_data: bool | None = None,
) -> History:
    """Train a network by mini-batches.

    Calling it again with an equal optimizer goes on where it ended: moments, step count and learning rate are kept.

    Parameters
    ----------
    model : MLP
    X : array, shape (N, d_0)
    y : array
        As the loss takes it; see :mod:`gpubackprop.losses`. One number a sample may come as (N,) or (N, 1), and ``predict``
        then gives that shape. One sample, or samples of one class, are enough: a stream is learned by a call for each chunk.
    epochs : int
    batch_size : int or "auto"
        The last batch of an epoch may be shorter. Its gradient is the mean over its own samples. "auto" means 128 samples,
        in micro-batches if memory asks for them: what is learned depends on the batch, so never on a device's memory.
    optimizer : str or Optimizer
        Adam() by default. LBFGS uses the whole data set at once; an epoch is then an iteration.
    validation_data : (X, y) or (X, y, sample_weight), optional
        Evaluated after each epoch.
    sample_weight : array, shape (N,), optional
    callbacks : Callback or iterable of them
        :class:`EarlyStopping`, :class:`ReduceOnPlateau` or one's own.
    progress : bool
        Show loss, metric, samples per second and time left in the terminal.
    shuffle : bool
        A new order of the samples in each epoch; it depends on the seed and the number of the epoch alone.
    micro_batch_size : int or "auto", optional
        Go through the passes with so many samples at a time and add up their gradients: the update is that of the whole
        mini-batch up to rounding, in less memory. With dropout it must be a multiple of 4. "auto": the fewest micro-batches
        that fit into the free memory of the device; on the CPU, whose limit is not known, the whole mini-batch.
    stream_data : bool, optional
        Keep the data set on the host and copy mini-batches to the GPU while it computes, in two buffers: the same bits as
        with the data on the GPU. By default the data stays on the host if it takes more than half of the GPU's
        free memory. On the CPU the data is used where it is.

    Returns
    -------
    History
        After Ctrl-C it holds the finished epochs, the network keeps what it has learned, and ``interrupted`` is True.

    Raises
    ------
    ValueError
        For data of a wrong shape, with NaN or infinity, with labels out of range; for an option out of range.
    TypeError
        For an option that there is not.
    DeviceMemoryError
        The device has too little memory; the message says for what, and the largest batch that fits. Nothing has changed.
    """
    epochs = check_count("epochs", epochs)
    progress, shuffle = check_flag("progress", progress), check_flag("shuffle", shuffle)
    stream_data = None if stream_data is None else check_flag("stream_data", stream_data)
    callbacks, validation_data = as_callbacks(callbacks), _validation_arrays(validation_data)
    optimizer = optimizer_of(Adam() if optimizer is None else optimizer)
    if batch_size == "auto":
        batch_size = AUTO_BATCH
        micro_batch_size = micro_batch_size or (None if isinstance(optimizer, LBFGS) else "auto")
    if isinstance(batch_size, str):
        raise ValueError(f"batch_size is {batch_size!r}; it must be a whole number >= 1, or 'auto'")
    batch_size = check_count("batch_size", batch_size)
    X, y = as_array(X, "X"), as_array(y, "y")
    sample_weight = None if sample_weight is None else as_array(sample_weight, "sample_weight")
    on_host = _stays_on_host(model, X, stream_data)
    if isinstance(optimizer, LBFGS):
        if micro_batch_size is not None or on_host:
            raise ValueError("LBFGS takes the whole data set at once; leave out micro_batch_size and stream_data")
        run = _minimize
    else:
        m = _micro_batch(model, X, y, sample_weight, validation_data, batch_size, optimizer, micro_batch_size, on_host)
        run = partial(_descend_from_host if on_host else _descend, micro_batch_size=m)
    data = _prepare(model, X, y, sample_weight, on_host=on_host)
    validation = None if validation_data is None else _prepare(model, *validation_data, "validation_data: ")
    model.target_shape = tuple(int(size) for size in y.shape[1:])
    training = Training(model, History(), epochs)
    state = model.state_of(optimizer)

    def end_epoch(loss: float) -> bool:
        """Write the epoch's row, call the callbacks, and return whether to go on."""
        metrics = {} if validation is None else evaluate(model, validation.X, validation.y, validation.weight)
        training.history.add(
            loss=loss,
            **{f"val_{name}": value for name, value in metrics.items()},
            learning_rate=float(state.scalars[RATE]),
            seconds=report.seconds(),
        )
        call(callbacks, "on_epoch_end", training)
        report.epoch_done(training.history)
        return not training.stop

    with show_progress(progress, epochs, len(data.X)) as report:
        call(callbacks, "on_train_begin", training)
        try:
            run(training, data, batch_size, shuffle, report, end_epoch)
        except KeyboardInterrupt:
            training.history.interrupted = True
        call(callbacks, "on_train_end", training)
    return training.history


def _validation_arrays(given: Any) -> tuple[Array, Array, Array | None] | None:
    """Return (X, y, sample_weight or None) as arrays."""
    if given is None:
        return None
    if not isinstance(given, tuple | list) or len(given) not in (2, 3):
        many = f" of {len(given)}" if isinstance(given, tuple | list) else ""
        raise ValueError(f"validation_data is a {type(given).__name__}{many}; give (X, y) or (X, y, sample_weight)")
    X, y, weight = (*given, None)[:3]
    weight = None if weight is None else as_array(weight, "validation_data: sample_weight")
    return as_array(X, "validation_data: X"), as_array(y, "validation_data: y"), weight


def _stays_on_host(model: MLP, X: Any, stream_data: bool | None) -> bool:
    """Return whether mini-batches are copied from the host."""
    if stream_data is False or model.backend.xp is np:
        return False
    free = free_bytes(model.backend)
    return bool(stream_data) or (
        free is not None and not on_gpu(X) and math.prod(X.shape) * model.dtype.itemsize > free * LARGEST_SHARE
    )


def _micro_batch(
    model: MLP,
    X: Array,
    y: Array,
    weight: Array | None,
    validation: tuple[Array, Array, Array | None] | None,
    batch_size: int,
    optimizer: Optimizer,
    micro_batch_size: int | str | None,
    on_host: bool,
) -> int:
    """Return how many samples go through the passes at a time, or raise DeviceMemoryError, before anything is copied."""
    N = X.shape[0] if X.ndim else 0
    network = model.network
    resident = 0 if on_host else network.data_bytes(X, y, weight) + N * np.dtype(np.int64).itemsize  # and their order
    data = {"data": resident, "validation data": 0 if validation is None else network.data_bytes(*validation)}
    indices, buffers = network.takes_indices(y), 2 if on_host else 1

    def parts(n: int, m: int) -> dict[str, int]:
        return data | network.step_parts(
            n, m, indices=indices, weighted=weight is not None, optimizer=optimizer, buffers=buffers
        )  # fmt: skip

    n = min(batch_size, max(N, 1))
    return network.fit_into_memory(f"fit with batch_size={n}", n, micro_batch_size, parts)


def _prepare(model: MLP, X: Any, y: Any, weight: Any, name: str = "", *, on_host: bool = False) -> Data:
    backend, loss = get_backend("reference") if on_host else model.backend, model.loss
    try:
        X = check_features(backend, X, model.layer_sizes[0], model.dtype)
        y = check_targets(backend, y, len(X), model.layer_sizes[-1], loss, model.real)
        weight = check_weight(backend, weight, len(X), model.real, loss)
    except ValueError as error:
        raise ValueError(f"{name}{error}") from None
    return Data(X, y, weight, backend.asarray(np.arange(len(X), dtype=np.int64)))


def _descend(
    training: Training,
    data: Data,
    batch_size: int,
    shuffle: bool,
    report: Progress,
    end_epoch: Callable[[float], bool],
    micro_batch_size: int | None = None,
) -> None:
    """Train by mini-batches; the loss of an epoch is the (weighted) mean over its samples, as they were met."""
    model, backend = training.model, training.model.backend
    state = model.optimizer_state
    assert state is not None
    N, terms = len(data.X), _terms(model, data)
    n_full, rest = divmod(N, batch_size)
    started = time.perf_counter()
    memory = Memory()  # of the largest step first, which the others share
    parts: list[tuple[int, int, Run]] = []
    for n, times in ((batch_size, n_full), (rest, 1)):
        if n and times:
            step = model.step(n, state.optimizer, data=data, micro_batch_size=micro_batch_size, memory=memory)
            parts.append((n, times, step.compile()))
    value = memory.arrays["loss"]
    training.history.compile_seconds = time.perf_counter() - started
    for epoch in range(training.epochs):
        training.epoch = epoch
        report.epoch_begins()
        if shuffle:
            data.order[...] = backend.asarray(_order(model.seed, int(state.counters[STEPS]), N))
        state.counters[CURSOR] = 0
        value[...] = 0
        for n, times, run in parts:
            left = times
            while left:
                chunk = min(left, report.steps_at_once)
                run(chunk)
                left -= chunk
                report.batches_done(chunk, n, value)
        total = float(value[1])
        if not end_epoch(total / terms):
            return


def _descend_from_host(
    training: Training,
    data: Data,
    batch_size: int,
    shuffle: bool,
    report: Progress,
    end_epoch: Callable[[float], bool],
    micro_batch_size: int | None = None,
) -> None:
    """Train by mini-batches that are copied while the device computes: the same steps as :func:`_descend` takes."""
    from gpubackprop.training.streaming import Prefetcher

    model, N = training.model, len(data.X)
    terms = _terms(model, data)
    state = model.optimizer_state
    assert state is not None
    started = time.perf_counter()
    batches = Prefetcher(model, data, batch_size, state.optimizer, micro_batch_size)
    training.history.compile_seconds = time.perf_counter() - started
    order = data.order
    try:
        for epoch in range(training.epochs):
            training.epoch = epoch
            report.epoch_begins()
            if shuffle:
                order = _order(model.seed, int(state.counters[STEPS]), N)
            state.counters[CURSOR] = 0
            batches.value[...] = 0
            for first in range(0, N, batch_size):
                rows = order[first : first + batch_size]
                batches.step(rows)
                report.batches_done(1, len(rows), batches.value)
            total = float(batches.value[1])
            if not end_epoch(total / terms):
                return
    finally:
        batches.close()


def _terms(model: MLP, data: Data) -> float:
    """Return what the sum of an epoch's losses is divided by: the samples, or their weights, or 1 where the loss is a sum."""
    if model.loss.reduction == "sum":
        return 1.0
    return float(len(data.X) if data.weight is None else data.weight.sum(dtype=np.float64))


def _order(seed: int, steps: int, n: int) -> np.ndarray:
    """Return the order of the samples in the epoch that begins after ``steps`` steps: the same on every device."""
    key = np.array([seed, 0x6F72646572], np.uint64)  # a stream of its own, apart from the initial weights
    # the low word of the counter runs within an epoch: with steps there, the numbers of two epochs would overlap
    counter = np.array([0, steps, 0, 0], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter)).permutation(n)


def _minimize(
    training: Training, data: Data, batch_size: int, shuffle: bool, report: Progress, end_epoch: Callable[[float], bool]
) -> None:
    """Minimize the loss of the whole data set; an epoch is an iteration of SciPy's L-BFGS-B."""
    from scipy.optimize import minimize

    model, backend = training.model, training.model.backend
    optimizer = model.optimizer_state.optimizer if model.optimizer_state else None
    assert isinstance(optimizer, LBFGS)
    if model.dropout:
        raise ValueError(f"LBFGS minimizes one fixed function; dropout is {model.dropout}: set it to 0")
    step = model.step(len(data.X), class_indices=data.y.ndim == 1, weighted=data.weight is not None)
    step.names.array("X")[...] = data.X
    step.names.array("y")[...] = data.y
    if data.weight is not None:
        step.names.array("w")[...] = data.weight
    run, value, theta = step.compile(), step.names.array("loss"), model.parameters.flat

    def loss_and_gradient(x: np.ndarray) -> tuple[float, np.ndarray]:
        theta[...] = backend.asarray(x.astype(model.real))
        run()
        report.batches_done(1, 0, value)
        return float(value[0]), backend.to_numpy(model.gradients.flat).astype(np.float64)

    last = start = backend.to_numpy(theta).astype(np.float64)

    def end_iteration(intermediate_result: Any) -> None:
        nonlocal last
        last = intermediate_result.x.copy()
        theta[...] = backend.asarray(last.astype(model.real))
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
        theta[...] = backend.asarray(last.astype(model.real))
