"""The memory of a device: how much is free, how much buffers take, and the error where it does not suffice.

Buffers have shapes before they have memory, so what a step takes is arithmetic, and the largest batch that fits is found
without an allocation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from gpubackprop.step.buffers import Buffer

if TYPE_CHECKING:
    from gpubackprop.backends.base import Backend

BLOCK = 512  # bytes; CuPy's pool hands out multiples of it
RESERVE = 64 << 20  # bytes, or an eighth of the free memory where that is less
"""What a batch size chosen here leaves free for memory that is not counted: kernels, graphs, partial sums, cuBLAS."""

MemoryPlan = Mapping[str, int]
"""Bytes by purpose."""


class DeviceMemoryError(MemoryError):
    """There is not enough memory on a device; the message says what needs how much, and what would fit.

    Attributes
    ----------
    needed, free : int
        Bytes that were requested, and that could be allocated.
    largest_batch : int or None
        The largest batch (with micro-batches: the largest of these) that fits; None where the batch does not matter.
    """

    def __init__(self, message: str, needed: int = 0, free: int = 0, largest_batch: int | None = None) -> None:
        super().__init__(message)
        self.needed, self.free, self.largest_batch = needed, free, largest_batch


def not_allocated(what: str, needed: int, where: str, advice: str = "") -> DeviceMemoryError:
    """Return the error for an array that NumPy could not allocate."""
    return DeviceMemoryError(f"{needed:,} bytes for {what} cannot be allocated on {where}{advice}", needed)


def nbytes_of(buffers: Iterable[Buffer]) -> int:
    """Return the bytes that buffers with their own memory take, as CuPy's pool counts them."""
    return sum(-(-buffer.nbytes // BLOCK) * BLOCK for buffer in buffers)


def free_bytes(backend: Backend, wanted: int = 0) -> int | None:
    """Return the bytes that can still be allocated, or None where no limit is known; ``wanted`` is the next allocation."""
    memory = backend.memory(wanted)
    return None if memory is None else memory[0]


def fits(backend: Backend, wanted: int) -> bool:
    """Return whether this many bytes can be allocated now, as far as a limit is known."""
    free = free_bytes(backend, wanted)
    return free is None or wanted <= free


def largest_that_fits(memory_plan: Callable[[int], MemoryPlan], free: int, at_most: int) -> int:
    """Return the largest n <= ``at_most`` whose memory plan, which grows with n, fits; 0 if none does."""
    low, high = 0, at_most
    while low < high:
        middle = (low + high + 1) // 2
        if _leaves_reserve(memory_plan(middle), free):
            low = middle
        else:
            high = middle - 1
    return low


def check_fixed(backend: Backend, what: str, memory_plan: MemoryPlan) -> None:
    """Raise DeviceMemoryError if ``what``, of a fixed size, does not fit into the free memory."""
    wanted = sum(memory_plan.values())
    if not fits(backend, wanted):
        raise _error(what, backend, memory_plan, free_bytes(backend, wanted) or 0, None)


def check_memory(
    backend: Backend, what: str, n: int, memory_plan: Callable[[int], MemoryPlan], advice: str = ""
) -> None:
    """Raise DeviceMemoryError if ``what``, which takes ``memory_plan(n)`` for a batch of n, does not fit into the free memory."""
    needed = memory_plan(n)
    if fits(backend, sum(needed.values())):
        return
    free = free_bytes(backend, sum(needed.values())) or 0
    largest = largest_that_fits(memory_plan, free, n - 1)
    found = f"; the largest batch that fits is {largest}{advice}" if largest else "; no batch fits, not even one sample"
    raise _error(what, backend, needed, free, largest, found)


def choose_micro_batch(
    backend: Backend, what: str, n: int, memory_plan: Callable[[int], MemoryPlan], multiple: int
) -> int:
    """Return the size of the fewest micro-batches, of about equal size, that n samples must be split into to fit.

    Parameters
    ----------
    memory_plan : callable
        Bytes for micro-batches of m samples, m <= n.
    multiple : int
        The size must be a multiple of it, unless it is n.
    """
    free = free_bytes(backend, sum(memory_plan(n).values()))
    if free is None or _leaves_reserve(memory_plan(n), free):
        return n
    largest = largest_that_fits(memory_plan, free, n - 1) // multiple * multiple
    if not largest:
        smallest = min(multiple, n)
        what = f"{what} in micro-batches of {smallest}"
        raise _error(what, backend, memory_plan(smallest), free, 0, "; no micro-batch fits")
    count = -(-n // largest)
    return -(-n // (count * multiple)) * multiple


def _leaves_reserve(memory_plan: MemoryPlan, free: int) -> bool:
    return sum(memory_plan.values()) <= free - min(RESERVE, free // 8)


def _error(
    what: str, backend: Backend, needed: MemoryPlan, free: int, largest: int | None, found: str = ""
) -> DeviceMemoryError:
    total, listed = sum(needed.values()), ", ".join(f"{name} {nbytes:,}" for name, nbytes in needed.items() if nbytes)
    text = f"{what} needs {total:,} bytes more on {backend.device} ({listed}), and {free:,} are free{found}"
    return DeviceMemoryError(text, total, free, largest)
