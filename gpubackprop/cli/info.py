"""``gpubackprop info``."""

from __future__ import annotations


def info() -> None:
    """Print devices and versions, and which pieces are missing."""
    from gpubackprop.inspect.info import info as facts

    for name, value in facts().items():
        print(f"{name + ':':15s} {value}")
