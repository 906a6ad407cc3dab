"""Whether a device computes what it should: gradients by finite differences, each array against the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gpubackprop.inspect.explain import random_batch
from gpubackprop.inspect.gradcheck import GradientReport, check_gradients
from gpubackprop.inspect.parity import ParityReport, parity

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gpubackprop.mlp import MLP

SAMPLES = 37


def bound_of(layer_sizes: Sequence[int], n: int) -> float:
    """Return how many ulps an array of a training step may be off: sums of at most fan-in + 1 or n products, two passes long."""
    return 8.0 * (max(*layer_sizes, n) + 1) * len(layer_sizes)


@dataclass(frozen=True)
class DeviceCheck:
    """The checks of a network on its device."""

    device: str
    gradients: GradientReport
    arrays: ParityReport
    bound: float

    @property
    def ok(self) -> bool:
        """True if all gradients and arrays are within their tolerances."""
        return self.gradients.ok and self.arrays.worst <= self.bound

    @property
    def verdict(self) -> str:
        """The result on one line."""
        return (
            f"{self.device}: {'ok' if self.ok else 'WRONG'}: worst {self.arrays.worst:.1f} ulps, bound {self.bound:.0f}"
        )

    def __str__(self) -> str:
        return f"{self.gradients}\n{self.arrays}\n{self.verdict}"


def check_device(model: MLP, seed: int = 0) -> DeviceCheck:
    """Return the checks of a network on its device, on random samples."""
    X, y = random_batch(model, SAMPLES, np.random.default_rng(seed))
    gradients, arrays = check_gradients(model, X, y), parity(model, X, y, [model.device])
    return DeviceCheck(model.device, gradients, arrays, bound_of(model.layer_sizes, SAMPLES))
