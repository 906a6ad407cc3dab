"""Compilation of CPU kernels: with Numba, from definitions, once per machine.

Numba's own disk cache cannot hold a kernel built from a definition (its key would hold the identity of the compiled
scalar functions), so kernels are stored as object files under a digest of everything that shapes them.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import llvmlite
import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba import _dynfunc
from numba.core import config, types
from numba.core.codegen import CPUCodeLibrary
from numba.core.compiler import Flags, compile_extra
from numba.core.compiler_lock import global_compiler_lock
from numba.core.lowering import Environment
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from gpubackprop.code_digest import Digest, fingerprint, thaw
from gpubackprop.definitions import Array
from gpubackprop.kernels.source import source_digest
from gpubackprop.machine import cache


@intrinsic  # type: ignore[untyped-decorator]
def where(typingctx: Any, condition: Any, a: Any, b: Any) -> Any:
    """``a if condition else b`` without a branch, so that the loop around it is vectorized."""
    result = typingctx.unify_types(a, b)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(*args)

    return result(types.boolean, result, result), codegen


@intrinsic  # type: ignore[untyped-decorator]
def maximum(typingctx: Any, a: Any, b: Any) -> Any:
    """The larger number, NaN if one is NaN, in a form that a vectorized loop may evaluate in any order."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        real = args[0].type
        kind = ir.FunctionType(real, [real, real])
        return builder.call(builder.module.declare_intrinsic("llvm.maximum", [real], kind), args)

    return a(a, a), codegen


# the compiler neither reorders nor contracts arithmetic: roundings are explicit, so bits are the same on every machine
_OPTIONS: dict[str, Any] = {"error_model": "numpy", "nogil": True}


def inlined(function: Callable[..., Any]) -> Any:
    """Compile a scalar function that is inlined into the loop that calls it."""
    return numba.njit(inline="always", **_OPTIONS)(function)


def helper(function: Callable[..., Any]) -> Any:
    """Compile a function that kernels call."""
    return numba.njit(**_OPTIONS)(function)


LINE = 16  # pieces are multiples of so many numbers, so that two rarely write to the same cache line


def _share(size, unit, piece, pieces):  # type: ignore[no-untyped-def]
    """Return the first and last element of a piece: whole units, but for the end."""
    units = (size + unit - 1) // unit
    return min(size, piece * units // pieces * unit), min(size, (piece + 1) * units // pieces * unit)


share = inlined(_share)


@intrinsic  # type: ignore[untyped-decorator]
def pointer(typingctx: Any, at: Any, kind: Any) -> Any:
    """Return an address as a pointer to numbers of a dtype."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(kind.dtype).as_pointer())

    return types.CPointer(kind.dtype)(at, kind), codegen  # type: ignore[attr-defined]


Kind = tuple[str, int]
"""The type of an argument: the letter of its dtype, which NumPy stores, unlike its name, and its dimensions."""


class PerThread(NamedTuple):
    """An argument of which each thread has its own: ``arrays[thread]``."""

    arrays: Array


class Kernel:
    """A function of arrays, numbers and a piece of the work, compiled for the types of its arguments at first use.

    ``function(*arguments, piece, pieces)`` runs one piece of the work. The machine code reads its arguments from a block of words
    in memory, so a step calls all kernels in the same way and need not be compiled.
    """

    def __init__(self, function: Callable[..., Any], digest: Digest) -> None:
        self.function, self.digest = function, digest
        self._body = inlined(function)
        self.entries: dict[tuple[Kind, ...], tuple[Any, int]] = {}  # with their addresses, by argument types
        self.from_disk = 0  # how many came from disk

    def __call__(self, *arguments: Any) -> None:
        """Run it once, in one thread."""
        entry, _, block = self.bind(arguments)
        entry(block.ctypes.data, 0, 1)

    def prepare(self, arguments: tuple[Any, ...]) -> Callable[[], None]:
        """Return a function that runs it on these arguments, in one thread."""
        entry, _, block = self.bind(arguments)
        address = block.ctypes.data

        def run(keep: Any = (arguments, block)) -> None:  # compiled code has only their addresses
            entry(address, 0, 1)

        return run

    def bind(self, arguments: tuple[Any, ...], thread: int = 0) -> tuple[Any, int, Any]:
        """Return the compiled function for such arguments, its address, and the block of words that holds a thread's arguments."""
        arguments = tuple(a.arrays[thread] if isinstance(a, PerThread) else a for a in arguments)
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
            "def entry(block, piece, pieces):\n"
            f"    w, x = carray(pointer(block, np.int64), {place}), carray(pointer(block, np.float64), {place})\n"
            f"    body({', '.join(texts)}, piece, pieces)\n"
        )
        exec(compile(source, __file__, "exec"), namespace)
        namespace["entry"].__name__ = self.function.__name__
        result = on_disk(namespace["entry"], 3, self.digest, source)
        self.from_disk += result.from_disk
        return result.call, result.address


_REAL, _WHOLE = (np.dtype(np.float64).char, 0), (np.dtype(np.int64).char, 0)
_WORD = {"int64": "w", "uint32": "w", "float32": "x", "float64": "x"}  # a number is read as an integer or a real word


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


def compiled(function: Callable[..., Any]) -> Kernel:
    """Return a kernel; its cache key is the function and all that it refers to."""
    return Kernel(function, fingerprint(function))


class Machine(NamedTuple):
    """A compiled function of integers.

    Attributes
    ----------
    call : callable
        The function, for Python.
    address : int
        The address of its code, a C function, for compiled code.
    from_disk : bool
        It was loaded, not compiled.
    """

    call: Any
    address: int
    from_disk: bool


def on_disk(function: Callable[..., Any], count: int, *key: Any) -> Machine:
    """Compile a function of ``count`` integers; its code is cached on disk under ``key`` and the compiler."""
    digest = fingerprint(_compiler(), *key)
    name = f"cpu/{function.__name__}-{digest}.nbc" if digest.lasting else None
    with global_compiler_lock:
        code = None if name is None else cache.read(name)
        found = code is not None
        if code is None:
            code, lasting = _object_code(function, (types.intp,) * count)
            if name is not None and lasting:
                cache.write(name, code)
        return Machine(*_load(function.__name__, code), found)


@lru_cache(maxsize=1)
def _compiler() -> Digest:
    """Return a digest of the compiler with its settings, and of the target machine."""
    settings = {name: repr(value) for name, value in vars(config).items() if name.isupper() and not _elsewhere(name)}
    machine = cpu_target.target_context.codegen().magic_tuple()
    versions = sys.version, numba.__version__, llvmlite.__version__, llvm.llvm_version_info, np.__version__
    return fingerprint(source_digest(), versions, machine, settings, _OPTIONS)


def _elsewhere(setting: str) -> bool:
    """Whether a setting of Numba affects threads, folders or messages, not code."""
    return any(word in setting for word in ("THREAD", "CACHE", "DIR", "DUMP", "WARN", "COLOR", "CUDA", "HOME"))


# Numba's function names hold a counter of the process: in another process other code has the same name. So code is never stored or
# loaded under Numba's names. A kernel and all that it calls are in one object file, and each object file is loaded by its own
# engine, which knows no name of another kernel.
_ENTRY, _PYTHON, _ENVIRONMENT = "entry", "python", "environment"


class _ObjectLibrary(CPUCodeLibrary):  # type: ignore[misc]
    """The code of a function and of all that it calls, not yet in any engine."""

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._verify_declare_only_symbols()
        self._finalized = True


def _object_code(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[bytes, bool]:
    """Return the object file of a function, and whether another process can use it: it holds no address of this process."""
    dispatcher, flags = numba.njit(**_OPTIONS)(function), Flags()
    dispatcher.targetdescr.options.parse_as_flags(flags, dispatcher.targetoptions)
    flags.no_compile = True  # no machine code in Numba's own engine
    typing, target = dispatcher.targetdescr.typing_context, dispatcher.targetdescr.target_context
    thaw(function)
    typing.refresh()
    target.refresh()
    library = _ObjectLibrary(target.codegen(), function.__name__)
    result = compile_extra(typing, target, function, arguments, types.none, flags, {}, library=library)
    library.finalize()
    description, module = result.fndesc, library._final_module
    names = {
        description.llvm_cfunc_wrapper_name: _ENTRY,
        description.llvm_cpython_wrapper_name: _PYTHON,
        target.get_env_name(description): _ENVIRONMENT,
    }
    for value in (*module.functions, *module.global_variables):
        if value.name in names:
            value.name = names[value.name]
        elif not value.is_declaration:
            value.linkage = "internal"
    return bytes(target.codegen()._tm.emit_object(module)), not library.has_dynamic_globals


def _load(name: str, code: bytes) -> tuple[Any, int]:
    """Return a function in an object file, callable from Python and from compiled code."""
    target = cpu_target.target_context
    target.refresh()  # gives LLVM the addresses of what Numba's code calls
    codegen, options = target.codegen(), {"opt": config.OPT}
    codegen._customize_tm_options(options)
    triple = llvm.get_process_triple()
    machine = llvm.Target.from_triple(triple).create_target_machine(**options)
    empty = llvm.parse_assembly(f'target triple = "{triple}"')
    engine = llvm.create_mcjit_compiler(empty, machine, use_lmm=config.USE_LLVMLITE_MEMORY_MANAGER)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    environment = Environment({})  # the code has no Python object, but Numba's wrapper looks it up
    ctypes.c_void_p.from_address(engine.get_global_value_address(_ENVIRONMENT)).value = id(environment)
    call = _dynfunc.make_function(
        sys.modules[__name__], name, "", engine.get_function_address(_PYTHON), environment, (engine,)
    )  # fmt: skip
    _engines.append((engine, environment))
    return call, int(engine.get_function_address(_ENTRY))


_engines: list[Any] = []  # for the life of the process: callers keep only a kernel's address
