"""Training: what ``fit`` is given is checked, memory is planned, and the loop runs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from gpubackprop.definitions import check_count, check_flag
from gpubackprop.intake import Samples
from gpubackprop.network import Data, Network, optimizer_of
from gpubackprop.optimizers import LBFGS, Adam, Optimizer
from gpubackprop.training.callbacks import as_callbacks
from gpubackprop.training.history import History, Training
from gpubackprop.training.lbfgs import minimize_loss
from gpubackprop.training.loop import Method, descend, train
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
    callbacks, network, backend, a = as_callbacks(callbacks), model.network, model.backend, model.architecture
    optimizer = optimizer_of(Adam() if optimizer is None else optimizer)
    batch_size, micro_batch_size = _batch_sizes(batch_size, micro_batch_size, optimizer)
    given = Samples.given(X, y, sample_weight)
    sets = [given, *_validation(validation_data)]
    homes = [s.home(backend, a, stream_data if s is given else None) for s in sets]
    streamed = homes[0] is not backend
    if isinstance(optimizer, LBFGS):
        _check_whole(network, in_parts=micro_batch_size is not None or streamed)
    else:
        on_device = [s for s, home in zip(sets, homes, strict=True) if home is backend]
        micro_batch_size = _micro_batch(
            network, given, batch_size, optimizer, micro_batch_size, on_device, streamed=streamed
        )
    samples, *validation = (s.on(home, a) for s, home in zip(sets, homes, strict=True))
    model.target_shape = tuple(int(size) for size in given.y.shape[1:])
    optimizer = model.state_of(optimizer).optimizer
    order = homes[0].asarray(np.arange(len(samples), dtype=np.int64))
    data = Data(samples.X, samples.y, samples.weight, order)
    method: Method
    if isinstance(optimizer, LBFGS):
        method = partial(minimize_loss, samples=samples, optimizer=optimizer)
    else:
        open_source = partial(
            Streamed if streamed else Resident, network, data, batch_size, optimizer, micro_batch_size
        )
        method = partial(descend, data=data, open_source=open_source, shuffle=shuffle)
    return train(
        Training(model, History(), epochs),
        method,
        len(samples),
        next(iter(validation), None),
        callbacks,
        progress=progress,
    )


def _batch_sizes(
    batch_size: int | str, micro_batch_size: int | str | None, optimizer: Optimizer
) -> tuple[int, int | str | None]:
    """Return both, the first as a number."""
    if batch_size == "auto":
        batch_size = AUTO_BATCH
        micro_batch_size = micro_batch_size or (None if isinstance(optimizer, LBFGS) else "auto")
    if isinstance(batch_size, str):
        raise ValueError(f"batch_size is {batch_size!r}; it must be a whole number >= 1, or 'auto'")
    return check_count("batch_size", batch_size), micro_batch_size


def _validation(given: Any) -> list[Samples]:
    """Return validation data as arrays, or nothing."""
    if given is None:
        return []
    if not isinstance(given, tuple | list) or len(given) not in (2, 3):
        many = f" of {len(given)}" if isinstance(given, tuple | list) else ""
        raise ValueError(f"validation_data is a {type(given).__name__}{many}; give (X, y) or (X, y, sample_weight)")
    X, y, weight = (*given, None)[:3]
    return [Samples.given(X, y, weight, name="validation_data: ")]


def _check_whole(network: Network, *, in_parts: bool) -> None:
    """Raise ValueError unless the loss of the whole data set is one fixed function, which L-BFGS needs."""
    if in_parts:
        raise ValueError("LBFGS takes the whole data set at once; leave out micro_batch_size and stream_data")
    if network.dropout:
        raise ValueError(f"LBFGS minimizes one fixed function; dropout is {network.dropout}: set it to 0")


def _micro_batch(
    network: Network,
    given: Samples,
    batch_size: int,
    optimizer: Optimizer,
    micro_batch_size: int | str | None,
    on_device: Sequence[Samples],
    *,
    streamed: bool,
) -> int:
    """Return how many samples go through the passes at a time, or raise DeviceMemoryError, before anything is copied."""
    backend, a = network.backend, network.architecture
    data = {s.name.removesuffix(": ") or "data": s.nbytes(backend, a) for s in on_device}
    if not streamed:
        data["data"] += len(given) * np.dtype(np.int64).itemsize  # their order
    indices, weighted, buffers = given.indices(network.loss), given.weight is not None, 2 if streamed else 1

    def parts(n: int, m: int) -> dict[str, int]:
        return data | network.step_parts(
            n, m, indices=indices, weighted=weighted, optimizer=optimizer, buffers=buffers
        )  # fmt: skip

    n = min(batch_size, max(len(given), 1))
    return network.fit_into_memory(f"fit with batch_size={n}", n, micro_batch_size, parts)
