"""Matrix products inside compiled code: BLAS without Python in between.

Numba's own ``np.dot`` always calls SciPy's BLAS and checks its arguments at each call. Here the BLAS libraries that are loaded
anyway (NumPy's, SciPy's, or MKL's) are called by symbol; which of them is measured once per shape and kept on disk.
Loops instead of BLAS for the smallest products are not here: they never won when both were called from Python, which
hides what they would gain inside a compiled step.
"""

from __future__ import annotations

import ctypes
import json
import time
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import llvmlite.binding
import numpy as np
from numba import types
from threadpoolctl import threadpool_info

from gpubackprop import cache as disk
from gpubackprop.definitions import Array, fingerprint
from gpubackprop.kernels.cpu_compile import compiled

ROW_MAJOR, NO_TRANS, TRANS = 101, 111, 112
ROUNDS, ROUND_SECONDS = 7, 3e-4  # of a measurement: a few milliseconds per shape

# names of the function in the libraries met so far, with the C type of its sizes
_SYMBOLS = (
    ("scipy_cblas_{}gemm64_", types.int64),
    ("cblas_{}gemm64_", types.int64),
    ("scipy_cblas_{}gemm", types.int32),
    ("cblas_{}gemm", types.int32),
)


class Library(NamedTuple):
    """A BLAS library that is loaded in this process."""

    name: str
    path: str
    symbol: str
    integer: Any


@cache
def libraries() -> tuple[Library, ...]:
    """Return the BLAS libraries of this process, NumPy's first."""
    import scipy.linalg.blas  # noqa: F401  (loads SciPy's)

    found = []
    for entry in threadpool_info():
        if entry["user_api"] != "blas":
            continue
        handle = ctypes.CDLL(entry["filepath"])
        for pattern, integer in _SYMBOLS:
            if hasattr(handle, pattern.format("s")):
                owner = next((p for p in ("numpy", "scipy") if f"{p}.libs" in entry["filepath"]), entry["internal_api"])
                name = f"{owner}_{entry['internal_api']}_{str(entry['version']).replace('.', '_')}"
                found.append(Library(name, entry["filepath"], pattern, integer))
                break
    return tuple(sorted(found, key=lambda library: (not library.name.startswith("numpy"), library.name)))


@cache
def _external(library: Library, letter: str) -> Any:
    """Return cblas_sgemm or cblas_dgemm of a library as a function that compiled code can call, also from the disk cache."""
    name = f"gpubackprop_{library.name}_{letter}gemm"
    address = ctypes.cast(getattr(ctypes.CDLL(library.path), library.symbol.format(letter)), ctypes.c_void_p).value
    llvmlite.binding.add_symbol(name, address)
    real = types.float32 if letter == "s" else types.float64
    i, p = library.integer, types.intp
    return types.ExternalFunction(
        name, types.void(types.int32, types.int32, types.int32, i, i, i, real, p, i, p, i, real, p, i)
    )


@cache
def compile_blas(library: Library, dtype: np.dtype[Any], a_transposed: bool, b_transposed: bool) -> Any:
    """Return kernel(a, b, out): out = a b by a library; an operand is C-contiguous or the transpose of such an array."""
    gemm = _external(library, "s" if dtype == np.float32 else "d")
    one, zero = dtype.type(1), dtype.type(0)
    ta, tb = (TRANS if a_transposed else NO_TRANS), (TRANS if b_transposed else NO_TRANS)

    def matmul(a, b, out):  # type: ignore[no-untyped-def]
        m, k = a.shape
        n = b.shape[1]
        lda = m if ta == TRANS else k
        ldb = k if tb == TRANS else n
        gemm(
            ROW_MAJOR, ta, tb, m, n, k, one, a.ctypes.data, lda, b.ctypes.data, ldb, zero, out.ctypes.data, n
        )  # fmt: skip

    return compiled(matmul, library.name, dtype.name)


class Chooser:
    """Measures, once per shape, dtype and order, which way a product is fastest; keeps the answer on disk."""

    def __init__(self) -> None:
        names = [library.name for library in libraries()]
        threads = [entry["num_threads"] for entry in threadpool_info()]
        self._file = f"cpu-products-{fingerprint(names, threads, llvmlite.binding.get_host_cpu_name())}.json"
        stored = disk.read(self._file)
        self.chosen: dict[str, str] = {}
        if stored is not None:
            try:
                self.chosen = {key: name for key, name in json.loads(stored).items() if name in names}
            except (ValueError, AttributeError):
                self.chosen = {}

    def kernel(self, a: Array, b: Array, out: Array) -> Any:
        """Return kernel(a, b, out), out = a b, by the library that is fastest for this shape."""
        (m, k), n = a.shape, b.shape[1]
        orders = (not a.flags.c_contiguous, not b.flags.c_contiguous)
        key = f"{m}x{n}x{k} {a.dtype} {orders[0]:d}{orders[1]:d}"
        kernels = {library.name: compile_blas(library, a.dtype, *orders) for library in libraries()}
        if key not in self.chosen:
            self.chosen[key] = _fastest(kernels, a, b, out)
            disk.write(self._file, json.dumps(self.chosen, indent=0).encode())
        return kernels[self.chosen[key]]


def _fastest(kernels: dict[str, Any], a: Array, b: Array, out: Array) -> str:
    a, b, out = (_copy(x) for x in (a, b, out))
    best = {name: _seconds(kernel, a, b, out, 1) for name, kernel in kernels.items()}  # compiles it
    for round_ in range(ROUNDS):
        for name, kernel in kernels.items():
            seconds = best[name] if round_ else _seconds(kernel, a, b, out, 1)
            repeats = max(1, min(200, int(ROUND_SECONDS / seconds)))
            best[name] = min(best[name], _seconds(kernel, a, b, out, repeats))
    return min(best, key=lambda name: best[name])


def _copy(a: Array) -> Array:
    """Return a copy in the same order of memory."""
    return a.copy() if a.flags.c_contiguous else a.T.copy().T


def _seconds(kernel: Callable[..., Any], a: Array, b: Array, out: Array, repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        kernel(a, b, out)
    return (time.perf_counter() - started) / repeats


@cache
def chooser() -> Chooser:
    """Return the chooser of this process."""
    return Chooser()
