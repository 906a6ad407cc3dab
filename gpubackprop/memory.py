"""How much memory a pass or a step takes on a device, and what is said where there is not enough of it.

The count is made by the code that allocates: given a :class:`Tally` for a backend, it allocates nothing and leaves the number of
bytes. The largest batch that fits is searched with such counts, so nothing is tried out on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gpubackprop.definitions import Array
from gpubackprop.intake import check_count
from gpubackprop.interop import bytes_to_copy

if TYPE_CHECKING:
    from gpubackprop.backends.base import Backend
    from gpubackprop.network import Network
    from gpubackprop.optimizers import Optimizer
    from gpubackprop.workspace import Inputs

BLOCK = 512  # bytes; CuPy's pool hands out multiples of it
RESERVE = 64 << 20  # bytes, or an eighth of the free memory where that is less
"""What a batch size chosen here leaves free, for what is not counted: kernels, graphs, partial sums, cuBLAS's own memory."""

Parts = Mapping[str, int]
"""Bytes by what they are for."""


class DeviceMemoryError(MemoryError):
    """There is not enough memory on a device; the message says what needs how much, and what would fit.

    Attributes
    ----------
    needed, free : int
        Bytes that were to be allocated, and that could be.
    largest_batch : int or None
        The largest batch (with micro-batches: the largest of these) that fits; None where it was no matter of a batch.
    """

    def __init__(self, message: str, needed: int = 0, free: int = 0, largest_batch: int | None = None) -> None:
        super().__init__(message)
        self.needed, self.free, self.largest_batch = needed, free, largest_batch


class Tally:
    """Stands in for a backend where allocations are to be counted: its arrays have shapes, and one element of memory."""

    def __init__(self) -> None:
        self.nbytes = 0

    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Count an array as CuPy's pool does."""
        self.nbytes += -(-math.prod(shape) * np.dtype(dtype).itemsize // BLOCK) * BLOCK
        return np.broadcast_to(np.zeros((), dtype), shape)


def bytes_of(allocate: Callable[[Any], Any]) -> int:
    """Return the bytes that ``allocate(backend)`` takes from a backend."""
    tally = Tally()
    allocate(tally)
    return tally.nbytes


def free_bytes(backend: Backend, wanted: int = 0) -> int | None:
    """Return the bytes that may still be allocated, or None where no limit is known; ``wanted`` is to be allocated next."""
    memory = backend.memory(wanted) if hasattr(backend, "memory") else None
    return None if memory is None else memory[0]


def fits(backend: Backend, wanted: int) -> bool:
    """Return whether so many bytes may be allocated now, as far as a limit is known."""
    free = free_bytes(backend, wanted)
    return free is None or wanted <= free


def largest_that_fits(parts: Callable[[int], Parts], free: int, at_most: int) -> int:
    """Return the largest n <= ``at_most`` whose parts, which grow with n, fit; 0 if none does."""
    low, high = 0, at_most
    while low < high:
        middle = (low + high + 1) // 2
        if _leaves_reserve(parts(middle), free):
            low = middle
        else:
            high = middle - 1
    return low


def check_fixed(backend: Backend, what: str, parts: Parts) -> None:
    """Raise DeviceMemoryError if ``what``, which is of one size, does not fit into the free memory."""
    wanted = sum(parts.values())
    if not fits(backend, wanted):
        raise _error(what, backend, parts, free_bytes(backend, wanted) or 0, None)


def check_memory(backend: Backend, what: str, n: int, parts: Callable[[int], Parts], advice: str = "") -> None:
    """Raise DeviceMemoryError if ``what``, which takes ``parts(n)`` for a batch of n, does not fit into the free memory."""
    needed = parts(n)
    if fits(backend, sum(needed.values())):
        return
    free = free_bytes(backend, sum(needed.values())) or 0
    largest = largest_that_fits(parts, free, n - 1)
    found = f"; the largest batch that fits is {largest}{advice}" if largest else "; no batch fits, not even one sample"
    raise _error(what, backend, needed, free, largest, found)


def choose_micro_batch(backend: Backend, what: str, n: int, parts: Callable[[int], Parts], multiple: int) -> int:
    """Return the size of the fewest micro-batches, of about equal size, that n samples must be split into to fit.

    Parameters
    ----------
    parts : callable
        Bytes for micro-batches of m samples, m <= n.
    multiple : int
        Of which the size must be a multiple, unless it is n.
    """
    free = free_bytes(backend, sum(parts(n).values()))
    if free is None or _leaves_reserve(parts(n), free):
        return n
    largest = largest_that_fits(parts, free, n - 1) // multiple * multiple
    if not largest:
        smallest = min(multiple, n)
        what = f"{what} in micro-batches of {smallest}"
        raise _error(what, backend, parts(smallest), free, 0, "; no micro-batch fits")
    count = -(-n // largest)
    return -(-n // (count * multiple)) * multiple


def step_parts(
    network: Network,
    n: int,
    m: int,
    *,
    indices: bool,
    weighted: bool,
    optimizer: Optimizer | None = None,
    keep: bool = False,
    buffers: int = 1,
) -> dict[str, int]:
    """Return the bytes that a step over n samples, m at a time, has yet to allocate; ``buffers`` hold a mini-batch each."""

    def inputs(backend: Any) -> Inputs:
        return network.inputs(n, indices, weighted, backend)

    part = inputs(Tally()).rows(0, m)
    return {
        "optimizer state": bytes_of(lambda backend: optimizer and network.new_state(optimizer, backend)),
        "mini-batch": buffers * bytes_of(inputs),
        "workspace": bytes_of(lambda backend: network.workspace(part, keep=keep, backend=backend)),
        "sums over micro-batches": bytes_of(network.new_sums) if m < n else 0,
    }


def data_bytes(network: Network, X: Any, y: Any = None, weight: Any = None) -> int:
    """Return the bytes of a data set on the device, without what lies there already as the passes read it."""
    total = bytes_to_copy(network.backend, X, network.dtype)
    if y is not None:
        total += bytes_to_copy(network.backend, y, np.int64 if network.takes_indices(y) else network.real)
    return total + (0 if weight is None else bytes_to_copy(network.backend, weight, network.real))


def fit_into_memory(
    network: Network, what: str, n: int, micro_batch_size: int | str | None, parts: Callable[[int, int], Parts]
) -> int:
    """Return the size of the micro-batches of n samples, ``parts(n, m)`` being the bytes for n samples, m at a time.

    Raises
    ------
    ValueError
        ``micro_batch_size`` is neither "auto" nor a whole number >= 1.
    DeviceMemoryError
        They do not fit.
    """
    m = n if micro_batch_size in (None, "auto") else min(n, check_count("micro_batch_size", micro_batch_size))
    network.make_room(sum(parts(n, m).values()))
    if micro_batch_size == "auto":
        return choose_micro_batch(network.backend, what, n, lambda m: parts(n, m), network.micro_batch_multiple)
    advice = ", and micro_batch_size='auto' takes the whole in parts" if micro_batch_size is None else ""
    check_memory(network.backend, what, n, lambda k: parts(k, min(k, m)), advice)
    return m


def _leaves_reserve(parts: Parts, free: int) -> bool:
    return sum(parts.values()) <= free - min(RESERVE, free // 8)


def _error(
    what: str, backend: Backend, needed: Parts, free: int, largest: int | None, found: str = ""
) -> DeviceMemoryError:
    total, listed = sum(needed.values()), ", ".join(f"{name} {nbytes:,}" for name, nbytes in needed.items() if nbytes)
    text = f"{what} needs {total:,} bytes more on {backend.device} ({listed}), and {free:,} are free{found}"
    return DeviceMemoryError(text, total, free, largest)
