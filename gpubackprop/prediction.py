"""Prediction: the forward pass, prepared once for a number of samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gpubackprop.definitions import Array
from gpubackprop.memory import bytes_of, check_memory
from gpubackprop.network import Network
from gpubackprop.workspace import Workspace


class Predictor:
    """The outputs o of a network for a fixed number of samples, with everything decided and allocated beforehand.

    It reads the parameters where they are, so it follows training and :meth:`MLP.load_state_dict`.

    Parameters
    ----------
    network : Network
    batch_size : int
        Samples of a call.

    Attributes
    ----------
    X, o : array, shape (batch_size, d_0) and (batch_size, d_o)
        Inputs and outputs, on the device.

    Examples
    --------
    >>> import numpy as np
    >>> import gpubackprop as gb
    >>> predictor = gb.MLP([4, 8, 3], device="reference").predictor()
    >>> predictor(np.zeros(4, np.float32)).shape
    (1, 3)
    """

    def __init__(self, network: Network, batch_size: int = 1) -> None:
        def allocate(n: int, backend: Any) -> Workspace:
            return Workspace(backend, network.layers, network.inputs(n, True, False, backend))

        def parts(n: int) -> dict[str, int]:
            return {"workspace": bytes_of(lambda backend: allocate(n, backend))}

        network.make_room(sum(parts(batch_size).values()))
        check_memory(network.backend, f"prediction over {batch_size} samples", batch_size, parts)
        ws = allocate(batch_size, network.backend)
        self.X, self.o = ws.X, ws.o
        self._step = network.forward_step(ws)
        self._run = self._step.compile()

    def __call__(self, X: Any) -> Array:
        """Return the outputs for X, shape (batch_size, d_0), or (d_0,) for one sample; the next call overwrites them.

        X is an array on the device, or on the host for the CPU; nothing but its shape is checked.
        """
        self.X[...] = X
        self._run()
        return self.o

    def in_batches(self, X: Array) -> Iterator[tuple[slice, Array]]:
        """Yield (rows, o) for consecutive batches of X; o is overwritten by the next, and the last may be shorter."""
        n = len(self.X)
        for first in range(0, len(X), n):
            rows = slice(first, min(first + n, len(X)))
            count = rows.stop - rows.start
            self.X[:count] = X[rows]
            self._run()
            yield rows, self.o[:count]
