"""A registry: a dictionary from names to definitions, whose errors list the names."""

from __future__ import annotations

import difflib
from typing import Any, TypeVar

T = TypeVar("T")


class Registry(dict[str, T]):
    """Names to definitions of one kind; the one place where a name is looked up.

    Parameters
    ----------
    kind : str
        What the entries are ("activation"), for the error message.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def resolve(self, name: Any) -> T:
        """Return the entry called ``name``; anything that is not a string is returned as it is.

        Raises
        ------
        ValueError
            The name is unknown; the message lists the known names.
        """
        if not isinstance(name, str):
            result: T = name
            return result
        if name in self:
            return self[name]
        near = difflib.get_close_matches(name, self, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"unknown {self.kind} {name[:80]!r}{hint}; choose from {', '.join(self)}")
