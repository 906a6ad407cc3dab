"""Which way a matrix product is computed: by the project's own tiles or by a BLAS library, whichever is measured to be faster.

The BLAS libraries that are in this process anyway (NumPy's and SciPy's OpenBLAS, MKL or BLIS) are called by symbol, from
compiled code. They run on one thread each: the threads of a step share a product themselves.
"""

from __future__ import annotations

import ctypes
import json
import threading
import time
from functools import cache, cached_property
from typing import Any, NamedTuple

import llvmlite.binding
import numpy as np
from numba import types
from threadpoolctl import ThreadpoolController, threadpool_info

from gpubackprop import cache as disk
from gpubackprop.cache import source_digest
from gpubackprop.definitions import Array, fingerprint
from gpubackprop.kernels.cpu_compile import Kernel, compiled, share
from gpubackprop.kernels.cpu_product import compile_product
from gpubackprop.kernels.cpu_step import Call, Program

ROW_MAJOR, NO_TRANS, TRANS = 101, 111, 112
ROUNDS, ROUND_SECONDS = 7, 3e-4  # of a measurement: a few milliseconds per shape
MARGIN = 0.03  # by which the tiles must be faster: where arrays are not in a cache, as in a step, a library waits less
ROWS = 48  # a share of a product by a library is a multiple of so many rows: whole tiles of every library's
FEW = 8 * ROWS  # rows that such shares would divide too unevenly
TILES = "tiles"
PRODUCTS = ("gpubackprop.kernels.cpu_product", "gpubackprop.kernels.cpu_vector", "gpubackprop.kernels.cpu_blas")

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
def compile_blas(library: Library, dtype: np.dtype[Any]) -> Kernel:
    """Return kernel(a, b, out, a_transposed, b_transposed, scratch) by a library, as :func:`compile_product` does it."""
    gemm = _external(library, "s" if dtype == np.float32 else "d")
    one, zero, size = dtype.type(1), dtype.type(0), dtype.itemsize

    def matmul(a, b, out, a_transposed, b_transposed, scratch, thread, threads):  # type: ignore[no-untyped-def]
        first, last = share(out.shape[0], ROWS, thread, threads)
        if first >= last:
            return
        depth, n = (a.shape[0] if a_transposed else a.shape[1]), out.shape[1]
        gemm(
            ROW_MAJOR, TRANS if a_transposed else NO_TRANS, TRANS if b_transposed else NO_TRANS, last - first, n, depth,
            one, a.ctypes.data + first * (1 if a_transposed else depth) * size, a.shape[1], b.ctypes.data, b.shape[1],
            zero, out.ctypes.data + first * n * size, n,
        )  # fmt: skip

    kernel: Kernel = compiled(matmul, library.name, dtype.name)
    kernel.around = one_thread_each
    return kernel


class _OneThreadEach:
    """Keeps the libraries from starting threads of their own while any of ours is inside: ours share their products."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._changed: list[tuple[Any, int]] = []

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._changed = [(one, number) for one in _controllers() if (number := one.get_num_threads()) != 1]
                for one, _ in self._changed:
                    one.set_num_threads(1)

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                for one, number in self._changed:
                    one.set_num_threads(number)


one_thread_each = _OneThreadEach()


@cache
def _controllers() -> tuple[Any, ...]:
    libraries()
    return tuple(ThreadpoolController().select(user_api="blas").lib_controllers)


class Chooser:
    """Measures, once per shape, dtype and order, which way a product is fastest; keeps the answer on disk.

    The candidates are the tiles of :mod:`gpubackprop.kernels.cpu_product` and those libraries whose result for some rows does not
    depend on how many rows they are given, so that threads may share a product without changing it. A product of few rows is
    always one of tiles: a library's shares would be uneven, and the smallest would pay more for the call than for the work.
    """

    @cached_property
    def _names(self) -> list[str]:
        return [TILES, *(library.name for library in libraries())]

    @cached_property
    def _file(self) -> str:
        host = llvmlite.binding.get_host_cpu_name()
        return f"cpu-products-{fingerprint(self._names, host, source_digest(*PRODUCTS))}.json"

    @cached_property
    def chosen(self) -> dict[str, str]:
        """The name of the candidate for each product met so far, here or in another process."""
        stored = disk.read(self._file)
        try:
            found = {} if stored is None else dict(json.loads(stored))
        except (ValueError, TypeError):
            return {}
        return {key: name for key, name in found.items() if name in self._names}

    def call(self, a: Array, b: Array, out: Array, scratch: Array) -> Call:
        """Return a call of the kernel that computes out = a b fastest, for matrices or transposes of such.

        ``scratch`` comes from :func:`gpubackprop.kernels.cpu_product.scratch_for`.
        """
        a_transposed, b_transposed = not a.flags.c_contiguous, not b.flags.c_contiguous
        arguments = (
            a.T if a_transposed else a, b.T if b_transposed else b, out, int(a_transposed), int(b_transposed), scratch
        )  # fmt: skip
        (m, k), n = a.shape, b.shape[1]
        if m < FEW:
            return self._kernel(TILES, a.dtype), arguments
        key = f"{m}x{n}x{k} {a.dtype} {a_transposed:d}{b_transposed:d}"
        if key not in self.chosen:
            self.chosen[key] = _fastest(self._kernels(a.dtype), arguments)
            disk.write(self._file, json.dumps(self.chosen, indent=0).encode())
        return self._kernel(self.chosen[key], a.dtype), arguments

    def _kernels(self, dtype: np.dtype[Any]) -> dict[str, Kernel]:
        return {name: self._kernel(name, dtype) for name in self._names}

    def _kernel(self, name: str, dtype: np.dtype[Any]) -> Kernel:
        if name == TILES:
            kernel: Kernel = compile_product(dtype)
        else:
            kernel = compile_blas(next(library for library in libraries() if library.name == name), dtype)
        return kernel


def _fastest(kernels: dict[str, Kernel], arguments: tuple[Any, ...]) -> str:
    """Return the candidate with the shortest time in compiled code, on one thread; the tiles if they are clearly faster."""
    rng = np.random.default_rng(0)
    a, b, out = (rng.standard_normal(x.shape).astype(x.dtype) for x in arguments[:3])
    rest = arguments[3:]
    with one_thread_each:
        kernels = {
            name: kernel for name, kernel in kernels.items() if name == TILES or _can_be_shared(kernel, a, b, out, rest)
        }  # fmt: skip
        programs = {name: Program([(kernel, (a, b, out, *rest))]) for name, kernel in kernels.items()}
        best = {name: _seconds(program, 1) for name, program in programs.items()}
        for _ in range(ROUNDS):
            for name, program in programs.items():
                repeats = max(1, min(1000, int(ROUND_SECONDS / best[name])))
                best[name] = min(best[name], _seconds(program, repeats))
    best[TILES] *= 1 + MARGIN
    return min(best, key=lambda name: best[name])


def _can_be_shared(kernel: Kernel, a: Array, b: Array, out: Array, rest: tuple[Any, ...]) -> bool:
    """Return whether a kernel gives the same bits for the smallest shares as for the whole."""
    whole = np.empty_like(out)
    Program([(kernel, (a, b, whole, *rest))])()
    program, shares = Program([(kernel, (a, b, out, *rest))]), -(-len(out) // ROWS)
    for number in range(shares):
        program.run_share(number, shares)
    return bool((out == whole).all())


def _seconds(program: Program, repeats: int) -> float:
    started = time.perf_counter()
    program(repeats)
    return (time.perf_counter() - started) / repeats


@cache
def chooser() -> Chooser:
    """Return the chooser of this process."""
    return Chooser()
