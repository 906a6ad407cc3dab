"""Training: check the arguments of ``fit``, plan memory, run the loop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gpubackprop._version import __version__
from gpubackprop.architecture import Architecture
from gpubackprop.definitions import check_count, check_flag, check_number, shown
from gpubackprop.features import Features, check_asked
from gpubackprop.frames import column_of, frame_of, is_table
from gpubackprop.intake import Samples
from gpubackprop.labels import check_classes, classes_in, is_text
from gpubackprop.network import Data, Network, optimizer_of
from gpubackprop.optimizers import LBFGS, Adam, Optimizer
from gpubackprop.training.callbacks import as_callbacks
from gpubackprop.training.convergence import Convergence
from gpubackprop.training.divergence import POLICIES
from gpubackprop.training.history import History, Training
from gpubackprop.training.lbfgs import minimize_loss
from gpubackprop.training.loop import Method, descend, train
from gpubackprop.training.run import Run
from gpubackprop.training.scores import check_metrics
from gpubackprop.training.sources import Resident, Streamed

if TYPE_CHECKING:
    from gpubackprop.mlp import MLP

AUTO_BATCH = 128


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
    tol: float | None = None,
    n_iter_no_change: int = 10,
    on_divergence: str = "stop",
    standardize: bool = False,
    missing: str | None = None,
    scale: float = 1.0,
    classes: Sequence[Any] | None = None,
    class_weight: Any = None,
    validation_split: float | None = None,
    metrics: Sequence[str] = (),
    checkpoint: str | Path | Run | None = None,
    checkpoint_every: str | int = "30s",
    overwrite: bool = False,
) -> History:
    """Train a network by mini-batches.

    Another call with an equal optimizer continues where this one ended: moments, step count and learning rate are kept.

    Parameters
    ----------
    model : MLP
    X : array, shape (N, d_0), or DataFrame
        Of a DataFrame (pandas, polars, pyarrow, ...) the network keeps the columns' names and the categories of text, each of
        which is an input: ``predict`` takes the same columns in any order. See :class:`gpubackprop.features.Features`.
    y : array
        As the loss takes it; see :mod:`gpubackprop.losses`. One number per sample may be (N,) or (N, 1), and ``predict``
        then returns that shape. One sample, or samples of one class, are enough: learn a stream by a call for each chunk.
        Text is labels: the network keeps them, and ``predict`` returns them.
    epochs : int
    batch_size : int or "auto"
        The last batch of an epoch may be shorter. Its gradient is the mean over its own samples. "auto" means 128 samples,
        in micro-batches if memory is short: the result depends on the batch, so never on a device's memory.
    optimizer : str or Optimizer
        Adam() by default. LBFGS uses the whole data set at once; an epoch is then an iteration.
    validation_data : (X, y) or (X, y, sample_weight), optional
        Evaluated after each epoch.
    sample_weight : array, shape (N,), optional
    callbacks : Callback or iterable of them
        :class:`gpubackprop.EarlyStopping`, :class:`gpubackprop.ReduceOnPlateau` or custom ones.
    progress : bool
        Show loss, metric, samples per second and time left in the terminal.
    shuffle : bool
        A new order of the samples in each epoch; it depends only on the seed and the number of the epoch.
    micro_batch_size : int or "auto", optional
        Run the passes on this many samples at a time and add up their gradients: the update is that of the whole
        mini-batch up to rounding, in less memory. With dropout it must be a multiple of 4. "auto": the fewest micro-batches
        that fit into the free memory of the device; on the CPU, whose limit is unknown, the whole mini-batch.
    stream_data : bool, optional
        Keep the data set on the host and copy mini-batches to the GPU while it computes, in two buffers: the same bits as
        with the data on the GPU. By default the data stays on the host if it takes more than half of the GPU's
        free memory. On the CPU the data is used in place.
    tol : float, optional
        Iterate to convergence: end when the loss has not fallen by ``tol`` for ``n_iter_no_change`` epochs, or after ``epochs``.
    n_iter_no_change : int
    on_divergence : {"stop", "raise", "skip"}
        What to do when the loss becomes NaN, or a parameter NaN or infinite. The step is undone and named, with epoch, layer and
        learning rate. "stop": a :class:`gpubackprop.DivergenceWarning`, and the training ends with the last parameters whose loss
        was finite; "raise": a :class:`gpubackprop.DivergenceError`; "skip": continue without that mini-batch, at most 100 times
        in a row.
    standardize : bool
        Give each column of numbers mean 0 and standard deviation 1, by these data. The network keeps both, so that ``predict`` and
        all else take X as it is here; a second ``fit`` keeps those of the first.
    missing : {"median"}, optional
        Replace a missing number (NaN) by the median of its column, missing text by the most frequent. By default it is an error.
    scale : float
        Divide all numbers by this: 255 for images of bytes. Kept like the standardization.
    classes : sequence, optional
        The labels of the classes in the order of the outputs; by default the sorted texts in y. Where y is whole numbers and
        ``classes`` text, y counts them from 0.
    class_weight : "balanced" or dict, optional
        A weight for each class, by label or index; "balanced": each class counts alike.
    validation_split : float, optional
        Split this fraction of the samples off as validation data, of each class in proportion; always the same samples.
    metrics : sequence of str
        More columns of the history, on the validation data by scikit-learn: accuracy, balanced_accuracy, precision, recall, f1,
        log_loss, roc_auc; or r2, mae, rmse. :func:`gpubackprop.score` has all of them.
    checkpoint : str or Path, optional
        A folder for this training: it can then be interrupted anywhere, by Ctrl-C, SIGTERM, kill -9 or a power cut, and resumed by
        :func:`gpubackprop.resume` with the bits of an uninterrupted one; see :mod:`gpubackprop.training.run`.
    checkpoint_every : str or int
        ``"30s"``, ``"5min"``, ``"2h"``, ``"2 epochs"``, ``"500 steps"`` or 500 (steps). One is always written at the beginning, at
        the end and when Ctrl-C or SIGTERM ends the training.
    overwrite : bool
        Replace the run that ``checkpoint`` holds.

    Returns
    -------
    History
        It holds the finished epochs; ``stopped`` says why the training ended. After Ctrl-C the network keeps what it has learned.

    Raises
    ------
    ValueError
        For data with a wrong shape, NaN, infinity or labels out of range; for an option out of range.
    TypeError
        For an unknown option.
    DeviceMemoryError
        The device has too little memory; the message says what needs it, and the largest batch that fits. Nothing has changed.
    RunError
        The folder holds another run, or another process writes to it.
    DivergenceError
        With ``on_divergence="raise"``.
    """
    optimizer = optimizer_of(Adam() if optimizer is None else optimizer)
    batch_size, micro_batch_size = _batch_sizes(batch_size, micro_batch_size, optimizer)
    if not isinstance(on_divergence, str) or on_divergence not in POLICIES:
        raise ValueError(f"on_divergence is {shown(on_divergence)}; choose from {', '.join(POLICIES)}")
    plan = Plan(
        check_count("epochs", epochs), batch_size, micro_batch_size, optimizer, shuffle=check_flag("shuffle", shuffle),
        stream_data=None if stream_data is None else check_flag("stream_data", stream_data), on_divergence=on_divergence,
        progress=check_flag("progress", progress),
        tol=None if tol is None else check_number("tol", tol, lambda x: 0 <= x < math.inf, "a number >= 0"),
        n_iter_no_change=check_count("n_iter_no_change", n_iter_no_change, " of epochs"),
        metrics=check_metrics(metrics, model.loss.kind),
    )  # fmt: skip
    overwrite = check_flag("overwrite", overwrite)
    run = checkpoint if isinstance(checkpoint, Run | None) else Run(
        checkpoint, every=checkpoint_every, overwrite=overwrite
    )  # fmt: skip
    called = run.callbacks_of(callbacks) if run is not None and run.is_resumed else as_callbacks(callbacks)
    X, y = frame_of(X) if is_table(X) else X, column_of(y)  # read once
    a = _described(model.architecture, X, y, classes, check_asked(standardize, missing, scale))
    samples = Samples.given(X, y, sample_weight, by=a)
    validation = _validation(validation_data, a)
    if validation_split is not None:
        if validation:
            raise ValueError("validation_data and validation_split are both given; give one of them")
        samples, held = samples.split(validation_split, a)
        validation = [held]
    if plan.metrics and not validation:
        raise ValueError("metrics are of validation data; give validation_data or validation_split")
    if class_weight is not None:
        samples = samples.weighted(class_weight, a)
    with nullcontext() if run is None else run.locked():
        return _fit(model, a, [samples, *validation], plan, called, run)


def _described(a: Architecture, X: Any, y: Any, classes: Any, asked: tuple[bool, str | None, float]) -> Architecture:
    """Return the architecture with what its inputs are made of and its classes are called, by these data at the first fit."""
    features, named = a.features, a.classes
    wanted = asked != (False, None, 1.0)
    if features is None and (wanted or is_table(X)):
        features = Features.of(X, standardize=asked[0], missing=asked[1], scale=asked[2])
    elif features is not None and wanted:
        features.check_same(*asked)
    if named is None and (classes is not None or is_text(y)):
        named = check_classes(classes) if classes is not None else classes_in(y)
    elif named is not None and classes is not None and check_classes(classes) != named:
        raise ValueError(f"classes is {shown(classes)}; the network has {shown(list(named))} from its first fit")
    return a if features is a.features and named is a.classes else replace(a, features=features, classes=named)


class Plan(NamedTuple):
    """The checked arguments of a fit."""

    epochs: int
    batch_size: int
    micro_batch_size: int | str | None
    optimizer: Optimizer
    shuffle: bool
    stream_data: bool | None
    on_divergence: str
    progress: bool
    tol: float | None
    n_iter_no_change: int
    metrics: tuple[str, ...]


def _fit(
    model: MLP, a: Architecture, sets: list[Samples], plan: Plan, callbacks: list[Any], run: Run | None
) -> History:
    """Train on the first of the sets; the second, if there is one, is evaluated after each epoch."""
    network, backend = model.network, model.backend
    homes = [s.home(backend, a, plan.stream_data if s is sets[0] else None) for s in sets]
    streamed, micro_batch_size = homes[0] is not backend, plan.micro_batch_size
    if isinstance(plan.optimizer, LBFGS):
        _check_whole(network, plan, streamed=streamed)
    else:
        on_device = [s for s, home in zip(sets, homes, strict=True) if home is backend]
        micro_batch_size = _micro_batch(network, sets[0], plan, on_device, streamed=streamed)
    samples, *validation = (s.on(home, a) for s, home in zip(sets, homes, strict=True))
    model.describe_data(a.features, a.classes)
    training = Training(model, History(), plan.epochs)
    training.history.determined_by = _determined_by(network)
    if run is not None:
        digests = [s.digest(home) for s, home in zip((samples, *validation), homes, strict=True)]
        run.begin_fit(training, _settings(plan, micro_batch_size, digests, model.device))
    shape = tuple(int(size) for size in sets[0].y.shape[1:])
    if shape != model.target_shape:
        model.target_shape = shape
    optimizer = model.state_of(plan.optimizer).optimizer
    method: Method
    if isinstance(optimizer, LBFGS):
        method = partial(minimize_loss, samples=samples, optimizer=optimizer, policy=plan.on_divergence, run=run)
    else:
        data = Data(samples.X, samples.y, samples.weight, homes[0].asarray(np.arange(len(samples), dtype=np.int64)))
        kind: type[Streamed] | type[Resident] = Streamed if streamed else Resident
        source = partial(kind, network, data, plan.batch_size, optimizer, micro_batch_size)
        method = partial(
            descend, data=data, open_source=source, shuffle=plan.shuffle, policy=plan.on_divergence, run=run
        )
    seen = validation[0] if validation else None
    criterion = None if plan.tol is None else Convergence(plan.tol, plan.n_iter_no_change)
    return train(
        training, method, len(samples), seen, callbacks, plan.metrics, progress=plan.progress, criterion=criterion, run=run
    )  # fmt: skip


def _determined_by(network: Network) -> dict[str, str]:
    """Return what determines the bits, besides data and options."""
    backend, a = network.backend, network.architecture
    own = {"gpubackprop": __version__, "seed": str(a.seed), "device": network.device, "dtype": a.dtype.name}
    return own | {"matmul_precision": backend.matmul_precision} | backend.decides_bits


def _settings(plan: Plan, micro_batch_size: int | str | None, digests: Sequence[str], device: str) -> dict[str, Any]:
    """Return the settings that a resumed run must repeat."""
    asked = {
        name: value for name, value in plan._asdict().items() if name not in ("optimizer", "stream_data", "progress")
    }
    validation = digests[1] if digests[1:] else None
    return asked | {
        "metrics": list(plan.metrics),
        "micro_batch_size": micro_batch_size, "data": digests[0], "validation": validation, "device": device,
    }  # fmt: skip


def _batch_sizes(
    batch_size: int | str, micro_batch_size: int | str | None, optimizer: Optimizer
) -> tuple[int, int | str | None]:
    """Return both, the first as a number."""
    if isinstance(batch_size, str) and batch_size == "auto":
        batch_size = AUTO_BATCH
        micro_batch_size = micro_batch_size or (None if isinstance(optimizer, LBFGS) else "auto")
    if isinstance(batch_size, str):
        raise ValueError(f"batch_size is {shown(batch_size)}; it must be a whole number >= 1, or 'auto'")
    return check_count("batch_size", batch_size), micro_batch_size


def _validation(given: Any, a: Architecture) -> list[Samples]:
    """Return validation data as arrays, or nothing."""
    if given is None:
        return []
    if not isinstance(given, tuple | list) or len(given) not in (2, 3):
        many = f" of {len(given)}" if isinstance(given, tuple | list) else ""
        raise ValueError(f"validation_data is a {type(given).__name__}{many}; give (X, y) or (X, y, sample_weight)")
    X, y, weight = (*given, None)[:3]
    return [Samples.given(X, y, weight, by=a, name="validation_data: ")]


def _check_whole(network: Network, plan: Plan, *, streamed: bool) -> None:
    """Raise ValueError unless the loss of the whole data set is one fixed function, which L-BFGS needs."""
    if plan.micro_batch_size is not None or streamed:
        raise ValueError("LBFGS takes the whole data set at once; omit micro_batch_size and stream_data")
    if network.dropout:
        raise ValueError(f"LBFGS minimizes one fixed function; dropout is {network.dropout}: set it to 0")
    if plan.on_divergence == "skip":
        raise ValueError("on_divergence is 'skip'; LBFGS has no mini-batch to skip: choose stop or raise")


def _micro_batch(network: Network, given: Samples, plan: Plan, on_device: Sequence[Samples], *, streamed: bool) -> int:
    """Return how many samples the passes take at a time, or raise DeviceMemoryError, before anything is copied."""
    backend, a = network.backend, network.architecture
    data = {s.name.removesuffix(": ") or "data": s.nbytes(backend, a) for s in on_device}
    if not streamed:
        data["data"] += len(given) * np.dtype(np.int64).itemsize  # their order
    indices, weighted, buffers = given.indices(network.loss), given.weight is not None, 2 if streamed else 1

    def memory_plan(n: int, m: int) -> dict[str, int]:
        return data | network.step_parts(
            n, m, indices=indices, weighted=weighted, optimizer=plan.optimizer, buffers=buffers
        )  # fmt: skip

    n = min(plan.batch_size, max(len(given), 1))
    return network.fit_into_memory(f"fit with batch_size={n}", n, plan.micro_batch_size, memory_plan)
