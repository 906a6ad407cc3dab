"""Backpropagation through multilayer perceptrons, on the CPU and on CUDA GPUs."""

__version__ = "0.1.0"
