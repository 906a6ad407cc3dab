"""Training: what ``fit`` is given is checked, memory is planned, and the loop runs."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gpubackprop.backends import get_backend
from gpubackprop.backends.memory import free_bytes
from gpubackprop.definitions import Array, check_count, check_flag
from gpubackprop.intake import check_features, check_targets, check_weight
from gpubackprop.interop import as_array, on_gpu
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
LARGEST_SHARE = 0.5  # of the free memory that a data set may take before it stays on the host


class Given(NamedTuple):
    """A data set as it was given, as arrays of any device."""

    X: Array
    y: Array
    weight: Array | None


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
    batch_size, micro_batch_size = _batch_sizes(batch_size, micro_batch_size, optimizer)
    network, given = model.network, _arrays(X, y, sample_weight)
    on_host = _stays_on_host(network, given.X, stream_data)
    if isinstance(optimizer, LBFGS):
        _check_whole(network, in_parts=micro_batch_size is not None or on_host)
    else:
        micro_batch_size = _micro_batch(
            network, given, validation_data, batch_size, optimizer, micro_batch_size, on_host
        )
    data = _prepare(network, given, on_host=on_host)
    validation = None if validation_data is None else _prepare(network, validation_data, "validation_data: ")
    model.target_shape = tuple(int(size) for size in given.y.shape[1:])
    optimizer = model.state_of(optimizer).optimizer
    method: Method
    if isinstance(optimizer, LBFGS):
        method = partial(minimize_loss, data=data, optimizer=optimizer)
    else:
        open_source = partial(Streamed if on_host else Resident, network, data, batch_size, optimizer, micro_batch_size)
        method = partial(descend, data=data, open_source=open_source, shuffle=shuffle)
    return train(Training(model, History(), epochs), method, len(data.X), validation, callbacks, progress=progress)


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


def _arrays(X: Any, y: Any, weight: Any, name: str = "") -> Given:
    X, y = as_array(X, f"{name}X"), as_array(y, f"{name}y")
    return Given(X, y, None if weight is None else as_array(weight, f"{name}sample_weight"))


def _validation_arrays(given: Any) -> Given | None:
    """Return validation data as arrays."""
    if given is None:
        return None
    if not isinstance(given, tuple | list) or len(given) not in (2, 3):
        many = f" of {len(given)}" if isinstance(given, tuple | list) else ""
        raise ValueError(f"validation_data is a {type(given).__name__}{many}; give (X, y) or (X, y, sample_weight)")
    X, y, weight = (*given, None)[:3]
    return _arrays(X, y, weight, "validation_data: ")


def _check_whole(network: Network, *, in_parts: bool) -> None:
    """Raise ValueError unless the loss of the whole data set is one fixed function, which L-BFGS needs."""
    if in_parts:
        raise ValueError("LBFGS takes the whole data set at once; leave out micro_batch_size and stream_data")
    if network.dropout:
        raise ValueError(f"LBFGS minimizes one fixed function; dropout is {network.dropout}: set it to 0")


def _stays_on_host(network: Network, X: Any, stream_data: bool | None) -> bool:
    """Return whether mini-batches are copied from the host."""
    if stream_data is False or network.backend.xp is np:
        return False
    free = free_bytes(network.backend)
    return bool(stream_data) or (
        free is not None and not on_gpu(X) and math.prod(X.shape) * network.dtype.itemsize > free * LARGEST_SHARE
    )


def _micro_batch(
    network: Network,
    given: Given,
    validation: Given | None,
    batch_size: int,
    optimizer: Optimizer,
    micro_batch_size: int | str | None,
    on_host: bool,
) -> int:
    """Return how many samples go through the passes at a time, or raise DeviceMemoryError, before anything is copied."""
    N = given.X.shape[0] if given.X.ndim else 0
    resident = 0 if on_host else network.data_bytes(*given) + N * np.dtype(np.int64).itemsize  # and their order
    data = {"data": resident, "validation data": 0 if validation is None else network.data_bytes(*validation)}
    indices, buffers = network.loss.kind.are_indices(given.y.shape), 2 if on_host else 1

    def parts(n: int, m: int) -> dict[str, int]:
        return data | network.step_parts(
            n, m, indices=indices, weighted=given.weight is not None, optimizer=optimizer, buffers=buffers
        )  # fmt: skip

    n = min(batch_size, max(N, 1))
    return network.fit_into_memory(f"fit with batch_size={n}", n, micro_batch_size, parts)


def _prepare(network: Network, given: Given, name: str = "", *, on_host: bool = False) -> Data:
    """Return a data set as the passes read it, checked."""
    backend, loss = get_backend("reference") if on_host else network.backend, network.loss
    try:
        X = check_features(backend, given.X, network.layer_sizes[0], network.dtype)
        y = check_targets(backend, given.y, len(X), network.layer_sizes[-1], loss, network.real)
        weight = check_weight(backend, given.weight, len(X), network.real, loss)
    except ValueError as error:
        raise ValueError(f"{name}{error}") from None
    return Data(X, y, weight, backend.asarray(np.arange(len(X), dtype=np.int64)))
