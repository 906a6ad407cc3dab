"""Hold Ctrl-C and SIGTERM until a training is between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """A context that records the first signal; a second one has its usual effect.

    After the context the signal has its effect, except a SIGINT that was ``taken``. Outside the main thread, and for a
    signal that is ignored or handled by code that is not Python's, nothing changes.
    """

    def __init__(self) -> None:
        self.noted: int | None = None
        self.taken = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if callable(handler := signal.getsignal(number)) or handler is signal.SIG_DFL:
                    self._handlers[number] = handler
                    signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()
        if self.noted is not None and not (self.taken and self.noted == signal.SIGINT):
            signal.raise_signal(self.noted)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.noted is not None:
            self._restore()
            self.taken = True
            signal.raise_signal(number)
            return
        self.noted = number

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()
