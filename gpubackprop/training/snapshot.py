"""The state of a training: a copy of all that a step changes, and the place in the data set."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from gpubackprop.definitions import Array
from gpubackprop.network import Network


class Position(NamedTuple):
    """A place between two steps."""

    epoch: int = 0
    """Finished epochs."""
    steps: int = 0
    """Steps of the optimizer before this epoch, which with the seed give its order."""
    row: int = 0
    """Finished rows of this epoch."""
    skipped: float = 0.0
    """The weight of those whose step was skipped, so that their loss does not count."""


class Snapshot:
    """A copy of the parameters, the optimizer's state and the losses of an epoch, on their device.

    Parameters
    ----------
    network : Network
        With an optimizer's state.
    value : array, shape (2,)
        The loss of the last mini-batch, and the sum over the epoch.
    """

    def __init__(self, network: Network, value: Array) -> None:
        self._arrays = self.arrays_of(network, value)
        self._copies = [a.copy() for a in self._arrays]
        self._value = self._copies[-1]

    @staticmethod
    def arrays_of(network: Network, value: Array) -> list[Array]:
        """Return what a step changes."""
        state = network.optimizer_state
        assert state is not None
        return [network.parameters.flat, *(a for a in state.arrays if a.size), value]

    def take(self) -> None:
        """Update the copy."""
        for copy, array in zip(self._copies, self._arrays, strict=True):
            copy[...] = array

    def put_back(self, network: Network) -> None:
        """Restore the copied values in the network that they were copied from.

        It is not kept here: the network keeps its copies, and a cycle would hold all of its memory until the collector runs.
        """
        for copy, array in zip(self._copies, self._arrays, strict=True):
            array[...] = copy
        network.refresh()

    @property
    def nbytes(self) -> int:
        """The bytes of the copy."""
        return sum(a.nbytes for a in self._copies)

    @property
    def loss_sum(self) -> float:
        """The sum of the epoch's losses when the copy was made."""
        return float(self._value[1])


def all_finite(a: Array, xp: Any = np) -> bool:
    """Return whether an array has neither NaN nor infinity."""
    return bool(xp.isfinite(a).all())
