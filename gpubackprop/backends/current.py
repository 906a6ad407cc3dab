"""The current device: code that touches a network's arrays runs with their device current, and on CuPy's stream for it.

CuPy allocates and launches on the device that is current, wherever the arrays are. So each public method of a network enters
the context of its backend once, here; the code below need not care. On the host there is nothing to enter.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

_HOST: AbstractContextManager[Any] = nullcontext()
_SPECIAL = ("__init__", "__copy__", "__deepcopy__", "__getstate__", "__setstate__", "__reduce__", "__reduce_ex__")


def active(backend: Any) -> AbstractContextManager[Any]:
    """Return a context in which the device of a backend is the current one; without a backend, any device is."""
    return _HOST if backend is None else backend.active()


class OnDevice:
    """Its public methods, and those of its subclasses, run with the device of ``self.backend`` current."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name, method in list(vars(cls).items()):
            if inspect.isfunction(method) and (not name.startswith("_") or name in _SPECIAL):
                setattr(cls, name, _generating(method) if inspect.isgeneratorfunction(method) else _on_device(method))


def _on_device(method: F) -> F:
    @wraps(method)
    def within(self: Any, *arguments: Any, **options: Any) -> Any:
        with active(getattr(self, "backend", None)):
            return method(self, *arguments, **options)

    return within  # type: ignore[return-value]


def _generating(method: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """Like :func:`_on_device`, for a generator: the caller's device is current between two items."""

    @wraps(method)
    def within(self: Any, *arguments: Any, **options: Any) -> Iterator[Any]:
        items = method(self, *arguments, **options)
        while True:
            with active(self.backend):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    return within
