"""What a check of the machine found: a state, a sentence, and the command that fixes this machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "skipped", "missing", "wrong"]


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Parameters
    ----------
    name : str
        What was checked.
    state : {"ok", "warning", "skipped", "missing", "wrong"}
        ``"warning"``: it works, but with less or more slowly. ``"skipped"``: there is nothing here to check.
    text : str
        What there is, or what is wrong.
    advice : str
        What to do, in words.
    command : str
        What to do, for a shell on this machine.
    """

    name: str
    state: State
    text: str
    advice: str = ""
    command: str = ""

    @property
    def fails(self) -> bool:
        """True if something does not work."""
        return self.state in ("missing", "wrong")

    @property
    def message(self) -> str:
        """Text, advice and command on one line."""
        run = f"run: {self.command}" if self.command else ""
        return "; ".join(part for part in (self.text, self.advice, run) if part)
