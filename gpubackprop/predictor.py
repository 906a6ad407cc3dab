"""Prediction: the forward pass, prepared once for a fixed batch size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from gpubackprop.backends.base import Run
from gpubackprop.backends.current import OnDevice, active
from gpubackprop.backends.memory import check_memory, nbytes_of
from gpubackprop.definitions import Array
from gpubackprop.frames import is_table
from gpubackprop.intake import check_features
from gpubackprop.interop import as_array, like
from gpubackprop.network import Network
from gpubackprop.step import Step, layout
from gpubackprop.step.buffers import Buffer, Memory
from gpubackprop.step.step import record_forward

QUEUES = 16  # streams (or threads with their own) whose passes are kept; they come and go


class _Prepared(NamedTuple):
    """A forward pass that only one caller may run at a time."""

    X: Array
    o: Array
    run: Callable[[], None]
    step: Run


class Predictor(OnDevice):
    """The outputs o of a network for a fixed number of samples, with everything chosen and allocated in advance.

    It reads the parameters where they are, so it follows training and :meth:`gpubackprop.MLP.load_state_dict`. Several
    threads may call it at once: each call has its own memory, and as much is kept as was ever in use at a time.

    Parameters
    ----------
    network : Network
    batch_size : int
        Samples per call.

    Examples
    --------
    >>> import numpy as np
    >>> import gpubackprop as gb
    >>> predictor = gb.MLP([4, 8, 3], device="reference").predictor()
    >>> predictor(np.zeros(4, np.float32)).shape
    (1, 3)
    """

    def __init__(self, network: Network, batch_size: int = 1) -> None:
        self._network, self._n, d = network, batch_size, network.layer_sizes[0]
        self.backend = network.backend
        self._dtype, self._shape, self._size = network.dtype, (batch_size, d), batch_size * d
        # fast path: arrays of this type, dtype and size, when all calls use one queue
        self._simple = np.ndarray if self.backend.xp is np and network.weights is network.parameters else None
        self.follow_features()
        self._of_queues: dict[Any, list[_Prepared]] = {}  # nothing orders the work of two queues of a device
        self._free = self._here()
        self._free.append(self._prepare())

    def __reduce__(self) -> Any:
        return Predictor, (self._network, self._n)

    def __call__(self, X: Any) -> Array:
        """Return the outputs for X, shape (batch_size, d_0), or (d_0,) for one sample, as the same kind of array as X.

        Fastest if X has the network's dtype and is on its device. Its values are not checked.
        """
        # list.pop and list.append are atomic: no lock, which a forked process could find taken
        if type(X) is not self._simple or X.dtype is not self._dtype or X.size != self._size:
            return self._convert(X)
        try:
            prepared = self._free.pop()
        except IndexError:
            prepared = self._prepare()
        place, o, run, _ = prepared
        try:
            place[...] = X
        except ValueError:  # of another shape of this size
            self._free.append(prepared)
            return self._convert(X)
        run()
        result = o.copy()
        self._free.append(prepared)
        return result

    def in_batches(self, X: Array) -> Iterator[tuple[slice, Array]]:
        """Yield (rows, o) for consecutive batches of X; o is overwritten by the next, and the last may be shorter."""
        if X.ndim != 2 or X.shape[1] != self._shape[1]:
            raise ValueError(f"X has shape {tuple(X.shape)}; the network takes (samples, {self._shape[1]})")
        self._network.refresh()
        n, prepared, free = self._n, self._take(), self._here()
        for first in range(0, len(X), n):
            rows = slice(first, min(first + n, len(X)))
            count = rows.stop - rows.start
            prepared.X[:count] = self.backend.asarray(X[rows])  # which may be on the host
            prepared.run()
            yield rows, prepared.o[:count]
        free.append(prepared)

    def follow_features(self) -> None:
        """Leave the fast path where the network's features are not its inputs."""
        if self._network.features is not None:
            self._simple = None

    def _convert(self, given: Any) -> Any:
        features = self._network.features
        X = given if is_table(given) else as_array(given, "X")
        if features is not None:
            X = features.matrix(X[None] if X.ndim == 1 else X)
        if tuple(X.shape) != self._shape and (self._n > 1 or tuple(X.shape) != self._shape[1:]):
            one = f" or {self._shape[1:]}" if self._n == 1 else ""
            raise ValueError(f"X has shape {tuple(X.shape)}; this predictor takes {self._shape}{one}")
        with active(self.backend):
            X = check_features(self.backend, X.reshape(self._shape), self._shape[1], self._dtype, finite=False)
            for _, o in self.in_batches(X):
                result = o.copy()
            return like(self.backend, result, given)

    def _here(self) -> list[_Prepared]:
        """Return the free passes of the device's current queue."""
        queue = self.backend.queue()
        free = self._of_queues.get(queue)
        if free is None:
            for old in list(self._of_queues)[: 1 - QUEUES]:
                self._of_queues.pop(old, None)
            free = self._of_queues.setdefault(queue, [])
        return free

    def _take(self) -> _Prepared:
        """Lend a pass to one caller; after an exception it is not reused, since threads may still run."""
        try:
            return self._here().pop()
        except IndexError:
            return self._prepare()

    def _prepare(self) -> _Prepared:
        network, n = self._network, self._n
        network.eager.free_for(nbytes_of(self._own(self._record(n))))
        check_memory(
            self.backend,
            f"prediction over {n} samples",
            n,
            lambda n: {"workspace": nbytes_of(self._own(self._record(n)))},
        )
        step = self._record(n)
        memory = Memory(network.fixed_arrays).allocate(self._own(step), self.backend.zeros)
        step = step.on(self.backend, memory)
        run = step.compile()
        return _Prepared(step.names.array("X"), step.names.array("o"), getattr(run, "once", run), run)

    def _record(self, n: int) -> Step:
        a = self._network.architecture
        return record_forward(layout.layout(a, layout.inputs(a, n, class_indices=True)))

    def _own(self, step: Step) -> list[Buffer]:
        return [buffer for buffer in step.roots if buffer.name not in self._network.fixed_arrays]
