"""numba-cuda compiles a kernel also with a NumPy that has left it behind, and NumPy is left as it was."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed; make test-all installs it")

pytestmark = pytest.mark.compilers


def test_a_kernel_compiles_without_row_stack_and_without_a_warning() -> None:
    code = """
import numpy as np
if hasattr(np, "row_stack"):  # gone from NumPy 2.5 on
    del vars(np)["row_stack"]
    np.__all__.remove("row_stack")
from gpubackprop.kernels.cuda.compile import Source, compile_ptx
from gpubackprop.kernels.cuda.numba import cuda
from gpubackprop.kernels.cuda.parameters import P, S, declared

def add(x: P[S], y: P[S]):
    i = cuda.threadIdx.x
    y[i] = x[i] + y[i]

source = Source("add", add, declared(add, np.dtype("f4")))
print(".entry add(" in compile_ptx(source, (8, 0)), hasattr(np, "row_stack"))
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "True False\n", done.stderr
