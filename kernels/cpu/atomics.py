"""Atomic instructions on a word in memory, and sleeping until another thread changes it: for compiled code, at addresses."""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Callable
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gpubackprop.kernels.cpu.compile import helper

WORD = ir.IntType(64)
FUTEX = {"x86_64": 202, "aarch64": 98}  # the number of Linux's system call
FUTEX_WAIT, FUTEX_WAKE, ALL = 128, 129, 2**31 - 1  # of the threads of this process
ULOCK_COMPARE_AND_WAIT, ULOCK_WAKE_ALL = 1, 0x101  # macOS
FOREVER = 0xFFFFFFFF  # Windows
NAP_US = 20  # microseconds between looks, where the system cannot wait for a word


def _word_at(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, WORD.as_pointer())


@intrinsic  # type: ignore[untyped-decorator]
def load(typingctx: Any, at: Any) -> Any:
    """Return the number at an address as it is now."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_word_at(builder, args[0]), "seq_cst", 8)

    return types.int64(types.intp), codegen


@intrinsic  # type: ignore[untyped-decorator]
def store(typingctx: Any, at: Any, value: Any) -> Any:
    """Write a number to an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[1], _word_at(builder, args[0]), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), codegen


@intrinsic  # type: ignore[untyped-decorator]
def add(typingctx: Any, at: Any, value: Any) -> Any:
    """Add to the number at an address and return the old; earlier writes are visible to every thread that sees the sum."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _word_at(builder, args[0]), args[1], "seq_cst")

    return types.int64(types.intp, types.intp), codegen


@intrinsic  # type: ignore[untyped-decorator]
def swap(typingctx: Any, at: Any, old: Any, new: Any) -> Any:
    """Replace the number at an address if it is ``old``; return whether it was."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pair = builder.cmpxchg(_word_at(builder, args[0]), args[1], args[2], "seq_cst", "seq_cst")
        return builder.extract_value(pair, 1)

    return types.boolean(types.intp, types.intp, types.intp), codegen


@intrinsic  # type: ignore[untyped-decorator]
def pause(typingctx: Any) -> Any:
    """Tell the processor that this thread is waiting in a loop."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        known = {
            "x86_64": ("llvm.x86.sse2.pause", []),
            "aarch64": ("llvm.aarch64.hint", [ir.Constant(ir.IntType(32), 1)]),
        }
        name, arguments = known.get(_processor(), ("", []))
        if name:
            kind = ir.FunctionType(ir.VoidType(), [a.type for a in arguments])
            builder.call(builder.module.globals.get(name) or ir.Function(builder.module, kind, name), arguments)
        return context.get_dummy_value()

    return types.void(), codegen


def _processor() -> str:
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def _imported(name: str, library: str | None, result: Any, *arguments: Any) -> Any:
    """Return a function of the system for compiled code."""
    at = ctypes.cast(getattr(ctypes.CDLL(library), name), ctypes.c_void_p).value
    llvmlite.binding.add_symbol(f"gpubackprop_{name}", at)
    return types.ExternalFunction(f"gpubackprop_{name}", result(*arguments))


def sleeping_on(system: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return sleep(at, value), which waits while the word is ``value`` and nobody calls wake(at), or shorter, and wake(at).

    Some systems compare the lower 32 bits of the word alone.
    """
    whole, small = types.intp, types.uint32
    if system == "linux" and _processor() in FUTEX:
        number, syscall = FUTEX[_processor()], _imported("syscall", None, whole, *[whole] * 7)

        def sleep(at, value):  # type: ignore[no-untyped-def]
            syscall(number, at, FUTEX_WAIT, value & 0xFFFFFFFF, 0, 0, 0)

        def wake(at):  # type: ignore[no-untyped-def]
            syscall(number, at, FUTEX_WAKE, ALL, 0, 0, 0)

    elif system == "darwin":
        ulock_wait = _imported("__ulock_wait", None, types.int32, small, whole, types.uint64, small)
        ulock_wake = _imported("__ulock_wake", None, types.int32, small, whole, types.uint64)

        def sleep(at, value):  # type: ignore[no-untyped-def]
            ulock_wait(ULOCK_COMPARE_AND_WAIT, at, value & 0xFFFFFFFF, 0)

        def wake(at):  # type: ignore[no-untyped-def]
            ulock_wake(ULOCK_WAKE_ALL, at, 0)

    elif system == "win32":
        library = "api-ms-win-core-synch-l1-2-0"
        wait_on_address = _imported("WaitOnAddress", library, types.int32, whole, whole, whole, small)
        wake_by_address = _imported("WakeByAddressAll", library, types.void, whole)

        def sleep(at, value):  # type: ignore[no-untyped-def]
            expected = np.empty(1, np.int64)
            expected[0] = value
            wait_on_address(at, expected.ctypes.data, 8, FOREVER)

        def wake(at):  # type: ignore[no-untyped-def]
            wake_by_address(at)

    else:
        usleep = _imported("usleep", None, types.int32, small)

        def sleep(at, value):  # type: ignore[no-untyped-def]
            usleep(NAP_US)

        def wake(at):  # type: ignore[no-untyped-def]
            pass

    return helper(sleep), helper(wake)


sleep, wake = sleeping_on(sys.platform)
