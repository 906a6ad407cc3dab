"""A digest of functions, by everything that a compiler reads of them, and of plain values: the cache key of compiled code.

A function is digested by its code and that of nested functions, its defaults, its closure, and every global that its code names,
by value: numbers, arrays by their bytes, other functions likewise, in any module. A module is digested by the attributes that the
code names, and a definition of an installed library by its name and the library's version. Any other object cannot be told from a
changed one, so its digest is marked as not lasting: it equals no other.
"""

from __future__ import annotations

import ctypes
import dis
import enum
import functools
import hashlib
import itertools
import math
import sys
import types
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

_LIBRARIES = frozenset({"builtins", "numpy", "scipy", "numba", "llvmlite", "numba_cuda", "cuda", "cupy", "ml_dtypes"})
"""Packages whose functions are known by name and version, besides the standard library."""
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis))
_LOADS_GLOBAL = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")
_PURE = frozenset({
    "abs", "all", "any", "bool", "dict", "divmod", "enumerate", "float", "int", "isinstance", "len", "list", "map", "max", "min",
    "pow", "range", "reversed", "round", "set", "sorted", "str", "sum", "tuple", "type", "zip",
    "ArithmeticError", "TypeError", "ValueError",
})  # fmt: skip
"""Built-in functions whose result depends only on their arguments."""
_PURE_NUMPY: tuple[Any, ...] = (np.where, np.ndim, np.finfo, np.iinfo, np.dtype, np.ndarray, np.errstate)
_MISSING = object()
_C_FUNCTION: Any = ctypes.CFUNCTYPE(None).__mro__[1]
_number = itertools.count()


class Digest(str):
    """A digest; ``lasting`` says whether it is the same in another process and at another time."""

    __slots__ = ("lasting",)
    lasting: bool

    def __new__(cls, text: str, lasting: bool = True) -> Digest:
        self = super().__new__(cls, text)
        self.lasting = lasting
        return self


def fingerprint(*items: Any, known: Mapping[int, str] | None = None) -> Digest:
    """Return a digest of functions and values.

    It is the cache key of compiled code, so it does not depend on addresses, on the order of sets, or on the process.

    Parameters
    ----------
    *items : functions, numbers, text, arrays, dtypes, containers of such, other digests
    known : mapping, optional
        Names of objects, by ``id``, that are not looked into.
    """
    walk = _Walk(known or {})
    for item in items:
        walk.value(item)
    walk.attributes()
    return walk.digest()


def thaw(function: Any) -> None:
    """Make Numba recompile the helpers of a function that have changed since they were compiled.

    Numba compiles a helper once per signature with the globals of that time, in memory and, with ``cache=True``, on disk.
    """
    walk = _Walk({})
    walk.value(function)
    walk.attributes()
    changed = []
    for helper in walk.wrapped:
        digest = fingerprint(helper)
        if _frozen.get(helper) != digest:
            changed.append(helper)
            _frozen[helper] = digest
    given = [
        (helper, list(helper.overloads)) for helper in changed if not helper._can_compile
    ]  # with their own signatures
    for helper in changed:
        helper._make_finalizer()()
        helper._reset_overloads()
        helper._cache.flush()
    for helper, signatures in given:
        helper._can_compile = True
        for signature in signatures:
            helper.compile(signature)
        helper._can_compile = False


_frozen: weakref.WeakKeyDictionary[Any, Digest] = (
    weakref.WeakKeyDictionary()
)  # digests of helpers when they were compiled


class Watch:
    """The digest of an item, and a check whether it would still be the same, without recreating the item.

    Parameters
    ----------
    item, known
        As in :func:`fingerprint`.
    results : bool
        Also cover what the functions in ``item`` return for the same arguments: they, and what they call, must depend only on
        their arguments and what is read here.

    Attributes
    ----------
    digest : Digest
    possible : bool
        False where that cannot be decided: the watch never holds.
    """

    def __init__(self, item: Any, known: Mapping[int, str], results: bool = False) -> None:
        walk = _Walk(known)
        walk.value(item)
        walk.attributes()
        self.digest = walk.digest()
        self.possible = walk.fixed and walk.lasting and (walk.pure or not results)
        self._item, self._names, self._cells, self._functions = item, walk.read, walk.cells, walk.functions

    def holds_for(self, item: Any) -> bool:
        """Return whether ``item`` is built from the same objects, and no global or attribute that it reads has been set since."""
        if not (self.possible and _same(item, self._item)):
            return False
        for names, name, value in self._names:
            if names.get(name, _MISSING) is not value:
                return False
        for cell, value in self._cells:
            if _content(cell) is not value:
                return False
        for function, code, defaults in self._functions:
            if (
                function.__code__ is not code
                or function.__defaults__ is not defaults
                or function.__kwdefaults__ is not None
            ):
                return False
        return True


def _same(a: Any, b: Any) -> bool:
    """Return whether two items are identical, or functions with the same code and equal numbers."""
    kind = type(a)
    if a is b:
        return True
    if kind is not type(b):
        return False
    if kind is types.FunctionType:
        return (
            a.__code__ is b.__code__
            and a.__globals__ is b.__globals__
            and _same(a.__defaults__, b.__defaults__)
            and a.__kwdefaults__ is b.__kwdefaults__ is None
            and _same_cells(a.__closure__ or (), b.__closure__ or ())
        )
    if kind is tuple:
        return len(a) == len(b) and all(map(_same, a, b))
    if kind in _NUMBERS:  # 0.0 and -0.0 are not the same
        return bool(a == b) and (a != 0 or math.copysign(1.0, a) == math.copysign(1.0, b))
    return kind is str and bool(a == b)


def _same_cells(a: tuple[types.CellType, ...], b: tuple[types.CellType, ...]) -> bool:
    for x, y in zip(a, b, strict=True):
        p, q = _content(x), _content(y)
        if p is not q and not _same(p, q):
            return False
    return True


_NUMBERS = frozenset({float, int, bool, np.float32, np.float64, np.int64, np.int32, np.uint32, np.bool_})


class _Code:
    """What the compiler reads of a code object, which is immutable: a digest, and the names it looks up."""

    def __init__(self, code: types.CodeType) -> None:
        walk = _Walk({})
        walk.feed(
            "code", code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags, code.co_code
        )
        walk.feed(code.co_exceptiontable, code.co_varnames, code.co_freevars, code.co_cellvars, code.co_names)
        instructions = list(dis.get_instructions(code))
        self.globals = {i.argval for i in instructions if i.opname in _LOADS_GLOBAL}
        named = [i for i in instructions if i.opcode in dis.hasname]  # SET_FUNCTION_ATTRIBUTE has a number
        self.names = {i.argval for i in named if "ATTR" in i.opname or i.opname == "LOAD_METHOD"}
        self.pure = not any(i.opname.startswith(("IMPORT", "STORE_GLOBAL", "DELETE")) for i in instructions)
        if "getattr" in self.globals:
            self.names |= {text for text in code.co_consts if isinstance(text, str)}
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                inner = _code(constant)
                walk.feed(inner.digest)
                self.globals |= inner.globals
                self.names |= inner.names
                self.pure &= inner.pure
            else:
                walk.value(constant)
        self.digest: Digest = walk.digest()


@functools.cache
def _code(code: types.CodeType) -> _Code:
    return _Code(code)


class _Walk:
    def __init__(self, known: Mapping[int, str]) -> None:
        self.known = known
        self.lasting = True
        self.fixed = True  # nothing mutable was found, such as an array
        self.pure = True  # callees depend only on their arguments and on what is read here
        self.functions: list[tuple[types.FunctionType, types.CodeType, Any]] = []
        self.read: list[tuple[dict[str, Any], str, Any]] = []
        self.wrapped: list[Any] = []  # by Numba
        self.cells: list[tuple[types.CellType, Any]] = []
        self._hash = hashlib.sha256()
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []  # keeps ids unique during a walk
        self._modules: list[types.ModuleType] = []
        self._names: set[str] = set()

    def digest(self) -> Digest:
        """Return the digest of everything fed."""
        text = self._hash.hexdigest()[:24]
        return Digest(text if self.lasting else f"{text}-{next(_number)}", self.lasting)

    def feed(self, *plain: Any) -> None:
        """Add plain values, each delimited."""
        for part in plain:
            text = f"{type(part).__name__}:{part!r}".encode()
            self._hash.update(b"%d:%b" % (len(text), text))

    def value(self, item: Any) -> None:
        """Add a value, and what it consists of."""
        if isinstance(item, Digest):
            self.lasting &= item.lasting
            self.feed("digest", str(item))
        elif type(item) in _PLAIN:
            self.feed(item)
        elif id(item) in self.known:
            self.feed("known", self.known[id(item)])
        elif isinstance(item, tuple | np.generic | np.dtype | np.ndarray):  # equal counts as identical
            self._data(item)
        elif id(item) in self._seen:
            self.feed("seen", self._seen[id(item)])
        else:
            self._seen[id(item)] = len(self._seen)
            self._alive.append(item)
            self._object(item)

    def attributes(self) -> None:
        """Add the attributes of all modules found that any of the code names."""
        done: set[tuple[int, str]] = set()
        while True:
            pairs = [
                (k, name) for k in range(len(self._modules)) for name in sorted(self._names) if (k, name) not in done
            ]
            if not pairs:
                return
            done.update(pairs)
            for k, name in pairs:
                module = self._modules[k]
                library = _library(module.__name__)
                # attributes that a library creates on access are covered by its version
                item = vars(module).get(name, _MISSING) if library else getattr(module, name, _MISSING)
                self.read.append((vars(module), name, vars(module).get(name, _MISSING)))
                self.fixed &= library or "__getattr__" not in vars(module)
                if item is not _MISSING:
                    self.feed("attribute", k, name)
                    if library and not _has_value(item):
                        self.pure &= _pure(item)
                        self._version(module.__name__)  # the library's object or function
                    else:
                        self.value(item)

    def _object(self, item: Any) -> None:
        if isinstance(item, types.ModuleType):
            self.feed("module", item.__name__)
            self._modules.append(item)
            if _library(item.__name__):
                self._version(item.__name__)
        elif hasattr(item, "py_func") and hasattr(item, "targetoptions"):  # a function wrapped by Numba
            self.feed("compiled", type(item).__name__)
            self.pure = False  # its Python code
            if hasattr(item, "_reset_overloads"):
                self.wrapped.append(item)
            fixed = self.fixed
            self.value(item.targetoptions)
            self.fixed = fixed
            self.value(item.py_func)
        elif hasattr(item, "_defn") and hasattr(item, "_prefer_literal"):  # an intrinsic: code that emits code
            self.feed("intrinsic")
            self.pure = False
            self.value(item._defn)
        elif self._of_library(item):
            pass
        elif isinstance(item, types.FunctionType):
            self._function(item)
        elif isinstance(item, types.CodeType):
            self._take(_code(item))
        elif isinstance(item, types.MethodType):
            self._all("method", item.__func__, item.__self__)
        elif isinstance(item, functools.partial):
            self._all("partial", item.func, item.args, item.keywords)
        elif isinstance(item, staticmethod | classmethod):
            self._all(type(item).__name__, item.__func__)
        elif isinstance(item, property):
            self._all("property", item.fget, item.fset, item.fdel)
        elif isinstance(item, enum.Enum):
            self._all("enum", type(item).__qualname__, item.name, item.value)
        elif isinstance(item, type):
            self._class(item)
        else:
            self._data(item)

    def _data(self, item: Any) -> None:
        if isinstance(item, np.dtype):
            self.feed("dtype", item.name, item.descr if item.fields else item.str)
        elif isinstance(item, np.ndarray | np.generic) and not item.dtype.hasobject:
            self.fixed &= isinstance(item, np.generic)
            self.value(item.dtype)
            self.feed(type(item).__name__, item.shape, item.flags.f_contiguous, item.tobytes())
        elif isinstance(item, tuple | list):
            self.feed(type(item).__qualname__, len(item))
            self.fixed &= isinstance(item, tuple)
            for part in item:
                self.value(part)
        elif isinstance(item, set | frozenset) and all(isinstance(part, _PLAIN) for part in item):
            self.feed(type(item).__name__, sorted(map(repr, item)))
            self.fixed &= isinstance(item, frozenset)
        elif isinstance(item, Mapping) and all(isinstance(key, _PLAIN) for key in item):
            self.feed(type(item).__name__, len(item))
            self.fixed = False
            for key in sorted(item, key=repr):
                self.feed(key)
                self.value(item[key])
        elif isinstance(item, _PLAIN):  # of a class made from a plain one
            self.feed(type(item).__qualname__, item)
        elif isinstance(item, range | slice):
            self.feed(item)
        elif is_dataclass(item):
            self.feed("dataclass", type(item).__qualname__)
            self.fixed = False
            for field in fields(item):
                self.feed(field.name)
                self.value(getattr(item, field.name))
        elif _says_what_it_is(item):
            self.feed(type(item).__qualname__, str(item))
            self._version(type(item).__module__)
        else:
            self._opaque(item)

    def _function(self, function: types.FunctionType) -> None:
        code = _code(function.__code__)
        self._take(code)
        self._all("defaults", function.__defaults__, function.__kwdefaults__)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self.feed("closure", name)
            content = _content(cell)
            if content is _MISSING:
                self.feed("empty")
                self.fixed = False
            else:
                self.cells.append((cell, content))
                self.value(content)
        self.functions.append((function, function.__code__, function.__defaults__))
        self.fixed &= not function.__kwdefaults__
        for name in sorted(code.globals):
            self.feed("global", name)
            item = function.__globals__.get(name, _MISSING)
            self.read.append((function.__globals__, name, item))
            if item is not _MISSING:
                self.value(item)
            else:
                self.pure &= name in _PURE

    def _take(self, code: _Code) -> None:
        self.feed(str(code.digest))
        self.pure &= code.pure
        self._names |= code.names

    def _class(self, kind: type) -> None:
        self.fixed = False
        self._all("class", kind.__qualname__, kind.__bases__)
        skipped = {"__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__firstlineno__"}
        for name in sorted(set(vars(kind)) - skipped):
            if not isinstance(vars(kind)[name], types.MemberDescriptorType | types.GetSetDescriptorType):
                self.feed(name)
                self.value(vars(kind)[name])

    def _of_library(self, item: Any) -> bool:
        """Add the name of a library's definition; return False if it is not one, or the version is unknown."""
        module, name = getattr(item, "__module__", None), getattr(item, "__qualname__", getattr(item, "__name__", None))
        if not (callable(item) and isinstance(module, str) and isinstance(name, str)):
            return False
        if not (_library(module) or isinstance(item, types.BuiltinFunctionType)):
            return False
        found: Any = sys.modules.get(module)
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is not item:  # made by a function: its name does not identify it
            return False
        self.feed("library", module, name)
        self.pure &= _pure(item)
        self._version(module)
        return True

    def _version(self, module: str) -> None:
        top = module.partition(".")[0]
        version = sys.version if top in sys.stdlib_module_names else getattr(sys.modules.get(top), "__version__", None)
        self.feed("version", top, version)
        self.lasting &= version is not None

    def _all(self, *items: Any) -> None:
        for item in items:
            self.value(item)

    def _opaque(self, item: Any) -> None:
        """Add an opaque object: it equals nothing but, if it is a C function, itself."""
        self.lasting = False
        if isinstance(item, _C_FUNCTION):
            self.feed("address", ctypes.cast(item, ctypes.c_void_p).value)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _MISSING


def _library(module: str) -> bool:
    top = module.partition(".")[0]
    return top in _LIBRARIES or top in sys.stdlib_module_names


def _pure(item: Any) -> bool:
    """Return whether a library's function always returns the same for the same arguments."""
    if isinstance(item, type):
        return (
            issubclass(item, np.generic)
            or item in _PURE_NUMPY
            or (item.__module__ == "builtins" and item.__name__ in _PURE)
        )
    if isinstance(item, types.BuiltinFunctionType):
        return item.__module__ == "math" or (item.__module__ == "builtins" and item.__name__ in _PURE)
    return isinstance(item, np.ufunc | np.generic) or item in _PURE_NUMPY


def _has_value(item: Any) -> bool:
    """Return whether an attribute of a library is digested by value: a number or code that somebody may have set."""
    return isinstance(item, (*_PLAIN, np.ndarray, np.generic, tuple, list, types.FunctionType, types.ModuleType, type))


def _says_what_it_is(item: Any) -> bool:
    """Return whether the text of an object describes it fully: Numba's types, LLVM's types and constants."""
    known: Iterable[str] = ("numba.core.types", "numba.core.typing", "llvmlite.ir", "numba.cuda.types")
    return any(type(item).__module__.startswith(name) for name in known) and " at 0x" not in str(item)
