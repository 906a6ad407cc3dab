"""``gpubackprop info``."""

from __future__ import annotations


def info() -> None:
    """Print version and devices, and why there is no CUDA device; 'gpubackprop doctor' checks everything."""
    from gpubackprop.inspect.info import info as facts

    for name, value in facts().items():
        print(f"{name + ':':15s} {value}")
