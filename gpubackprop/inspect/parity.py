"""Each intermediate of a pass, on each device, against the float64 reference, in units in the last place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gpubackprop.definitions import eps_of, shown

if TYPE_CHECKING:
    from gpubackprop.mlp import MLP

FIELDS = ("z", "h", "dh", "delta", "dW", "db")


@dataclass(frozen=True)
class ParityRow:
    """One array on one device: the largest error over the largest value, and that in ulps of the dtype."""

    device: str
    name: str
    error: float
    ulps: float


@dataclass(frozen=True)
class ParityReport:
    """Every intermediate on every device, in the order of the passes."""

    rows: list[ParityRow]
    dtype: str

    @property
    def worst(self) -> float:
        """The largest number of ulps."""
        return max(row.ulps for row in self.rows)

    def __str__(self) -> str:
        lines = [f"{'device':10s} {'array':8s} {'relative error':>14s} {'ulps of ' + self.dtype:>16s}"]
        lines += [f"{row.device:10s} {row.name:8s} {row.error:14.2e} {row.ulps:16.1f}" for row in self.rows]
        return "\n".join(lines)


def parity(model: MLP, X: Any, y: Any, devices: Sequence[str] | None = None) -> ParityReport:
    """Compare each intermediate of forward and backward on each device with the reference backend in float64.

    Parameters
    ----------
    model : MLP
    X, y : array
    devices : sequence of str, optional
        ``available_devices()`` by default.

    Returns
    -------
    ParityReport
        error = max |a - reference| / max |reference|; ulps = error / eps of the network's dtype.
    """
    from gpubackprop.backends import available_devices

    if devices is not None and (isinstance(devices, str) or not isinstance(devices, Sequence)):
        raise ValueError(f"devices is {shown(devices)}; give a list of names, as in ['cpu', 'cuda:0']")
    reference = model.twin("reference", dtype="float64")
    expected = reference.trace(X, y)
    eps = eps_of(model.dtype)
    rows = []
    for device in available_devices() if devices is None else devices:
        trace = model.to(device).trace(X, y)
        for i, (layer, truth) in enumerate(zip(trace.layers, expected.layers, strict=True)):
            suffix = "o" if i == len(expected.layers) - 1 else str(i + 1)
            for name in FIELDS:
                a, b = np.asarray(getattr(layer, name), np.float64), getattr(truth, name)
                error = float(np.abs(a - b).max() / max(np.abs(b).max(), np.finfo(np.float64).tiny))
                rows.append(ParityRow(device, f"{name}_{suffix}", error, error / eps))
    return ParityReport(rows, model.dtype.name)
