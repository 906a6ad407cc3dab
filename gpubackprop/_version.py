"""The version, read by the build and by the cache of compiled kernels."""

__version__ = "0.1.0"
