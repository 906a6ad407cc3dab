"""The Numba-CUDA kernels: passes, loss, softmax and training, with access to memory, unrolling and compilation."""
