"""The Numba kernels of the CPU: passes, loss and training; products in :mod:`gemm`; whole steps in :mod:`program`."""
