"""The CUDA backend; everything here needs CuPy."""

from gpubackprop.backends.cuda.backend import CudaBackend as CudaBackend
