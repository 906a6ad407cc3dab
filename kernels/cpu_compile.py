"""How a CPU kernel is compiled: with Numba, from definitions, once per machine.

Numba's own disk cache does not know a kernel that is made from a definition (its key would hold the identity of the
compiled scalar functions), so the kernels are filed under a digest of everything that shapes them.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core import caching, types
from numba.extending import intrinsic

from gpubackprop.cache import cache_folder, source_digest
from gpubackprop.definitions import Math, fingerprint


@intrinsic  # type: ignore[untyped-decorator]
def _where(typingctx: Any, condition: Any, a: Any, b: Any) -> Any:
    """``a if condition else b`` without a branch, so that the loop around it is vectorized."""
    result = typingctx.unify_types(a, b)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(*args)

    return result(types.boolean, result, result), codegen


SCALAR = Math(
    math.exp,
    math.expm1,
    math.log,
    math.log1p,
    math.tanh,
    math.sin,
    math.cos,
    math.sqrt,
    math.fabs,
    math.erf,
    _where,
)

# FMA and no signed zeros; NaN and infinity keep their meaning, and no sum is reordered
_OPTIONS: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract", "nsz"}, "nogil": True}


def inlined(function: Callable[..., Any]) -> Any:
    """Compile a scalar function so that it disappears into the loop that calls it."""
    return numba.njit(inline="always", **_OPTIONS)(function)


def compiled(function: Callable[..., Any], *key: Any) -> Any:
    """Compile a kernel; ``key`` is what shapes it beside its own code and constants: fingerprints of definitions, dtype."""
    kernel = numba.njit(**_OPTIONS)(function)
    digest = fingerprint(
        function,
        source_digest("gpubackprop.kernels.cpu", "gpubackprop.kernels.cpu_compile", "gpubackprop.philox"),
        numba.__version__,
        llvmlite.__version__,
        *key,
    )
    kernel._cache = _KeyedCache(function, digest)
    return kernel


def digest_of(kernel: Any) -> str:
    """Return the digest that a kernel is filed under."""
    return str(kernel._cache._digest)


def is_on_disk(kernel: Any) -> bool:
    """Return whether a kernel was compiled on this machine before."""
    cache_file = kernel._cache._cache_file
    return Path(cache_file._index_path).is_file()


def compile_for(function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Compile a kernel for these arguments, or load it from disk, without running it; do nothing for a plain function."""
    if hasattr(function, "py_func"):
        function.compile(tuple(numba.typeof(a) for a in arguments))  # type: ignore[attr-defined]


class _Locator(caching._CacheLocator):  # type: ignore[misc]
    """Says to Numba's cache: in our folder, under our digest."""

    def __init__(self, function: Callable[..., Any], digest: str) -> None:
        self._py_file = function.__code__.co_filename
        self.digest = digest

    def get_cache_path(self) -> str:
        return str(cache_folder() / "cpu")

    def get_source_stamp(self) -> str:
        return self.digest

    def get_disambiguator(self) -> str:
        return self.digest


class _KeyedImpl(caching.CompileResultCacheImpl):  # type: ignore[misc]
    def __init__(self, function: Callable[..., Any], digest: str) -> None:
        self._lineno = function.__code__.co_firstlineno
        self._locator = _Locator(function, digest)
        self._filename_base = self.get_filename_base(function.__name__, "")


class _KeyedCache(caching.FunctionCache):  # type: ignore[misc]
    """Numba's cache of compiled functions, filed under a digest; a folder that cannot be used only costs the compile time."""

    def __init__(self, function: Callable[..., Any], digest: str) -> None:
        self._impl_class = lambda py_func: _KeyedImpl(py_func, digest)
        self._digest = digest
        super().__init__(function)

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        return sig, codegen.magic_tuple(), self._digest

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # unreadable, truncated, of another version: compile again
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            try:
                super().save_overload(sig, data)
            except (EOFError, ValueError, LookupError, pickle.UnpicklingError):  # the index is damaged: begin it anew
                self.flush()
                super().save_overload(sig, data)
        except OSError:
            self.disable()
