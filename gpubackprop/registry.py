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

    Attributes
    ----------
    aliases : dict of str to str
        Other names that people type, and the name that each stands for: they resolve to the same entry, are not listed, and
        never get into files.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.aliases: dict[str, str] = {}

    def add(self, name: str, entry: T, *aliases: str) -> None:
        """Register an entry; a name of an entry is never an alias of another."""
        self[name] = entry
        self.aliases |= dict.fromkeys(aliases, name)

    def name_of(self, name: Any) -> Any:
        """Return the name that an alias stands for; anything else is returned as it is."""
        if not isinstance(name, str) or name in self:
            return name
        plain = name.strip().lower().replace("-", "_").replace(" ", "_")
        known = self.aliases.get(plain, plain)
        return known if known in self else name

    def resolve(self, name: Any) -> T:
        """Return the entry called ``name``, or by an alias; anything that is not a string is returned as it is.

        Raises
        ------
        ValueError
            The name is unknown; the message lists the known names.
        """
        if not isinstance(name, str):
            result: T = name
            return result
        known = self.name_of(name)
        if known in self:
            return self[known]
        near = difflib.get_close_matches(name.lower(), [*self, *self.aliases], n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"unknown {self.kind} {name[:80]!r}{hint}; choose from {', '.join(self)}")
