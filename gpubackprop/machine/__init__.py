"""The machine: its devices and what they lack, the folder of compiled kernels, measurements."""
