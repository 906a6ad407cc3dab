"""The machine: which devices there are and what they lack, the folder for compiled kernels, what was measured here."""
