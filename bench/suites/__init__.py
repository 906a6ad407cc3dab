"""The suites: each a function that yields the cases of a device and a dtype."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from gpubackprop.bench.sizes import SUITES

if TYPE_CHECKING:
    from gpubackprop.bench.case import Cases, Settings
    from gpubackprop.bench.devices import Device


class NothingToMeasureError(Exception):
    """A suite has nothing to do with a device or dtype; the message says why."""


def cases_of(suite: str, device: Device, dtype: str, settings: Settings) -> Cases:
    """Yield the cases of a suite.

    Raises
    ------
    NothingToMeasureError
        There are none.
    """
    assert suite in SUITES
    cases = cast(
        "Callable[[Device, str, Settings], Cases]", pkgutil.resolve_name(f"gpubackprop.bench.suites.{suite}:cases")
    )
    return cases(device, dtype, settings)
