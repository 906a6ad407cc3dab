"""How a CPU kernel is compiled: with Numba, from definitions, once per machine.

Numba's own disk cache does not know a kernel that is made from a definition (its key would hold the identity of the
compiled scalar functions), so the kernels are filed under a digest of everything that shapes them.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import llvmlite
import numba
import numpy as np
from llvmlite import ir
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


@intrinsic  # type: ignore[untyped-decorator]
def add(typingctx: Any, total: Any, term: Any) -> Any:
    """``total + term`` in a sum over a loop whose order the compiler may choose, once for all, so that the loop is vectorized."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fadd(*args, flags=("reassoc", "nsz", "contract"))

    return total(total, total), codegen


@intrinsic  # type: ignore[untyped-decorator]
def maximum(typingctx: Any, a: Any, b: Any) -> Any:
    """The larger number, NaN if one is NaN, in a form that a vectorized loop may keep in any order."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        real = args[0].type
        kind = ir.FunctionType(real, [real, real])
        return builder.call(builder.module.declare_intrinsic("llvm.maximum", [real], kind), args)

    return a(a, a), codegen


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

_KERNELS = ("cpu", "cpu_blas", "cpu_compile", "cpu_math", "cpu_product", "cpu_step", "cpu_threads", "cpu_vector")
_SOURCES = (*(f"gpubackprop.kernels.{name}" for name in _KERNELS), "gpubackprop.philox")

# FMA and no signed zeros; NaN and infinity keep their meaning, and no sum is reordered but by ``add``
_OPTIONS: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract", "nsz"}, "nogil": True}


def inlined(function: Callable[..., Any]) -> Any:
    """Compile a scalar function so that it disappears into the loop that calls it."""
    return numba.njit(inline="always", **_OPTIONS)(function)


def helper(function: Callable[..., Any]) -> Any:
    """Compile a function that kernels call."""
    return numba.njit(**_OPTIONS)(function)


def _share(size, unit, thread, threads):  # type: ignore[no-untyped-def]
    """Return the first and last element of a thread's share: whole units, but for the end."""
    units = (size + unit - 1) // unit
    return min(size, thread * units // threads * unit), min(size, (thread + 1) * units // threads * unit)


share = inlined(_share)


@intrinsic  # type: ignore[untyped-decorator]
def pointer(typingctx: Any, at: Any, kind: Any) -> Any:
    """Return an address as a pointer to numbers of a dtype."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(kind.dtype).as_pointer())

    return types.CPointer(kind.dtype)(at, kind), codegen  # type: ignore[attr-defined]


Kind = tuple[str, int]
"""The type of an argument: the letter of its dtype, which NumPy has at hand where a name is made, and its dimensions."""


class Kernel:
    """A function of arrays, numbers and a share of the work, compiled for the types of its arguments when it is first used.

    ``function(*arguments, thread, threads)`` does the part of thread ``thread``. The machine code finds its arguments in a block
    of words in memory, so that a step calls any kernel in one way, and no step has to be compiled.
    """

    def __init__(self, function: Callable[..., Any], digest: str) -> None:
        self.function, self.digest = function, digest
        self.around: AbstractContextManager[None] | None = None  # what it must be run in
        self._body = inlined(function)
        self.entries: dict[
            tuple[Kind, ...], tuple[Any, int]
        ] = {}  # with their addresses, by the types of the arguments
        self.from_disk = 0  # how many of them were not compiled here

    def __call__(self, *arguments: Any) -> None:
        """Run it once, in one thread."""
        entry, _, block = self.bind(arguments)
        with self.around or nullcontext():
            entry(block.ctypes.data, 0, 1)

    def bind(self, arguments: tuple[Any, ...]) -> tuple[Any, int, Any]:
        """Return the compiled function for such arguments, its address, and the block of words that holds the arguments."""
        kinds = tuple(map(_kind_of, arguments))
        if kinds not in self.entries:
            self.entries[kinds] = self._compile(kinds)
        return *self.entries[kinds], np.array([word for a in arguments for word in _words(a)], np.int64)

    def _compile(self, kinds: tuple[Kind, ...]) -> tuple[Any, int]:
        namespace: dict[str, Any] = {
            "__name__": __name__, "body": self._body, "carray": numba.carray, "pointer": pointer, "np": np
        }  # fmt: skip
        texts, place = [], 0
        for char, ndim in kinds:
            dtype = np.dtype(char).name
            shape = "".join(f"w[{place + 1 + axis}], " for axis in range(ndim))
            texts.append(
                f"carray(pointer(w[{place}], np.{dtype}), ({shape}))"
                if ndim
                else f"np.{dtype}({_WORD[dtype]}[{place}])"
            )
            place += 1 + ndim
        source = (
            "def entry(block, thread, threads):\n"
            f"    w, x = carray(pointer(block, np.int64), {place}), carray(pointer(block, np.float64), {place})\n"
            f"    body({', '.join(texts)}, thread, threads)\n"
        )
        exec(compile(source, __file__, "exec"), namespace)
        namespace["entry"].__name__ = self.function.__name__
        entry = on_disk(namespace["entry"], fingerprint(self.digest, source))
        signature = (types.intp,) * 3
        entry.compile(signature)
        result = entry.overloads[signature]
        self.from_disk += sum(entry.stats.cache_hits.values())
        return result.entry_point, int(result.library.get_pointer_to_function(result.fndesc.llvm_cfunc_wrapper_name))


_REAL, _WHOLE = (np.dtype(np.float64).char, 0), (np.dtype(np.int64).char, 0)
_WORD = {"int64": "w", "uint32": "w", "float32": "x", "float64": "x"}  # a number is read as a whole or as a real word


def _kind_of(argument: Any) -> Kind:
    if isinstance(argument, np.ndarray):
        return argument.dtype.char, argument.ndim
    if isinstance(argument, np.floating | np.uint32):
        return argument.dtype.char, 0
    return _REAL if isinstance(argument, float) else _WHOLE


def _words(argument: Any) -> tuple[int, ...]:
    if isinstance(argument, np.ndarray):
        return argument.ctypes.data, *argument.shape
    if isinstance(argument, float | np.floating):
        return (int(np.float64(argument).view(np.int64)),)
    return (int(argument),)


def compiled(function: Callable[..., Any], *key: Any) -> Kernel:
    """Return a kernel; ``key`` is what shapes it beside its own code and constants: fingerprints of definitions, dtype."""
    return Kernel(function, fingerprint(function, *key))


def on_disk(function: Callable[..., Any], *key: Any) -> Any:
    """Compile a function whose machine code is kept on disk, filed under ``key``, the sources and the versions."""
    result = numba.njit(**_OPTIONS)(function)
    result._cache = _KeyedCache(
        function, fingerprint(source_digest(*_SOURCES), numba.__version__, llvmlite.__version__, *key)
    )
    return result


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
