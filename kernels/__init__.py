"""The loops: phi and phi' fused with the bias add and the bias gradient, loss rows, updates.

This folder installs as ``gpubackprop.kernels``. ``cpu`` holds the Numba kernels and ``cuda`` the Numba-CUDA kernels.
Their contract is the same: a ``compile_*`` function takes definitions (:mod:`gpubackprop.definitions`) and a dtype, knows no
activation, loss or optimizer by name, and returns a compiled kernel that writes into its array arguments.
"""
