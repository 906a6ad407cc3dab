"""Runs what the cases of operations launch on a CUDA device in Numba's simulator, against the reference: no device, no compiler.

Run by ``test_kernels_cuda_simulator.py`` in a process of its own, since Numba decides on import whether it simulates:
``NUMBA_ENABLE_CUDASIM=1 python cuda_simulator.py bias_loss``. Blocks are small, since each thread is a thread of Python.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from operation_checks import compare, filled, wide
from tolerances import assert_within, eps

from gpubackprop import backends
from gpubackprop.backends.cases import CASES, REFERENCE, Arrays, OpCase, copied
from gpubackprop.definitions import DTYPES, address, aligned_zeros, eps_of
from gpubackprop.kernels.cuda import compile as cuda_compile

cuda_compile.THREADS = 32  # before the modules of kernels take it
PACKAGE = ModuleType("gpubackprop.backends.cuda")
PACKAGE.__path__ = [str(Path(backends.__file__).parent / "cuda")]  # without its __init__, which needs all of CuPy
sys.modules |= {"cupy": ModuleType("cupy"), PACKAGE.__name__: PACKAGE}

from gpubackprop.backends.cuda import launcher  # noqa: E402
from gpubackprop.backends.cuda.fusion import fuse_dropout, fuse_gathers, fuse_products  # noqa: E402
from gpubackprop.backends.cuda.launches import Launches  # noqa: E402
from gpubackprop.kernels.cuda import softmax_rows as cuda_softmax_rows  # noqa: E402
from gpubackprop.kernels.cuda.access import access  # noqa: E402
from gpubackprop.kernels.cuda.numba import cuda  # noqa: E402
from gpubackprop.kernels.cuda.storage import STORAGE, compute_type  # noqa: E402
from gpubackprop.step.operations import (  # noqa: E402
    OPERATIONS,
    BiasActivationForward,
    Clip,
    Dropout,
    Gather,
    Matmul,
    Operation,
)
from gpubackprop.step.state import FACTOR, NORM, SKIP  # noqa: E402

cuda_softmax_rows.ROW_THREADS = 64  # a block holds shorter rows
launcher.SMALL_ROWS = 10  # some shapes have more

RNG = np.random.default_rng(1)
ACTIVATIONS, LOSSES = (
    ("relu", "gelu", "tanh", "mish"),
    ("mean_squared_error", "huber", "softmax_cross_entropy", "kl_divergence"),
)
FORMULAS = ACTIVATIONS + LOSSES
PASSES = [CASES[f"bias_activation_{way} {name}"] for name in ACTIVATIONS for way in ("forward", "backward")]
SHAPES = [(13, 24), (9, 5), (37, 1), (11, 10), (3, 1), (9, 6), (1, 37)]
"""Of matrices: whole rows of vectors, and lines of several rows."""
SMALL = [(43,), (1,), (40,)]


class Placed(np.ndarray):
    """An array on the host that has its address where CuPy has it."""

    @property
    def data(self) -> Any:  # type: ignore[override]
        return SimpleNamespace(ptr=self.ctypes.data)


def placed(a: np.ndarray, offset: int) -> Placed:
    """Return a copy of an array that begins at a cache line, or so many elements after it."""
    memory = aligned_zeros((a.size + offset,), a.dtype)[offset:].reshape(a.shape)
    memory[...] = a
    return memory.view(Placed)


Pointer = type(cuda.device_array(1))


class Simulator(Launches):
    """The launches of a device of one multiprocessor, run by the simulator."""

    def __init__(self, finish: bool = False) -> None:
        super().__init__(SimpleNamespace(compute_capability="90", attributes={"MultiProcessorCount": 1}), finish)
        self.names: set[str] = set()
        self.memory: list[np.ndarray] = []

    def _kernel(self, source: Any) -> Any:
        return source

    def scratch(self, size: int, dtype: np.dtype[Any], *, apart: bool = False) -> Any:
        scratch = placed(np.zeros(size, dtype) if dtype.kind == "i" else np.full(size, np.nan, dtype), 0)
        self.memory.append(scratch)
        return scratch

    def run(self, operation: Callable[[Arrays], Any], given: Arrays, offset: int = 0) -> Arrays:
        """Run an operation on copies of arrays, which begin so many elements after a cache line, and return them."""
        arrays = copied(given, lambda a: placed(a, offset))
        self.memory = [*arrays.values()]
        for config, source, arguments, _ in self.of(operation(arrays)):
            types = source.parameters.values()
            given = [self._given(a, kind) for a, kind in zip(arguments, types, strict=True)]
            cuda.jit(source.function)[tuple(config.grid[:2]), tuple(config.block[:2])](*given)
            self.names.add(source.name)
        return {name: np.asarray(a) for name, a in arrays.items()}

    def _given(self, argument: Any, kind: str) -> Any:
        """Return an argument as the simulator's kernels take it: a pointer as the memory from there on."""
        if not kind.endswith("*"):
            return argument
        dtype = STORAGE[kind[:-1]]
        for a in self.memory:
            offset = argument - address(a)
            if 0 <= offset < a.nbytes:
                return Pointer(np.asarray(a).reshape(-1).view(np.uint8)[offset:].view(dtype))
        assert argument == 0, f"{argument} is an address of no array"
        return Pointer(np.zeros(1, dtype))


SIMULATOR, FINISHING = Simulator(), Simulator(finish=True)


def shape_of(case: OpCase, dtype: str, turn: int) -> tuple[int, ...]:
    """Return a shape that does not take long, another one in each turn."""
    if case.name == "bias_loss softmax_cross_entropy, weighted" and dtype == "float64":
        return 3, 131  # longer than a block holds in its registers
    if turn % 9 == 0 and "softmax_cross_entropy" in case.name:
        return 2, 304  # a block to a row
    if len(case.shapes[-1]) == 2:
        return SHAPES[turn % len(SHAPES)]
    return SMALL[turn % len(SMALL)] if case.shapes[-1] else ()


def check_operation(name: str) -> None:
    """Run the cases of an operation, some of the activations and losses; arrays begin at a vector or between two."""
    turn = 0
    for case in CASES.values():
        formula = case.numbers.get("activation") or case.numbers.get("loss")
        if case.kind.name != name or (formula and formula.name not in FORMULAS):
            continue
        for dtype in case.dtypes:
            turn += 1
            offset = 0 if case.kind is Clip else turn // 2 % 2
            given = filled(case, RNG, shape_of(case, dtype, turn), dtype)
            compare(case, dtype, given, SIMULATOR.run(case.operation, given, offset))


def check_dropout_on_the_way() -> None:
    """The passes with dropout in the same launch, and the bias gradient's sums by the last block."""
    for case, dtype in zip(PASSES, (*DTYPES, *DTYPES), strict=True):
        given = filled(case, RNG, (64, 24), dtype) | {"counters": np.array([7, 2])}
        forward = case.kind is BiasActivationForward
        given["between"] = np.zeros_like(given["z" if forward else "dh"])

        def operations(a: Arrays, case: OpCase = case, forward: bool = forward) -> list[Operation]:
            dropout = Dropout(a["out" if forward else "dh"], 0.3, 2**40 + 3, 1, a["counters"], a["between"], 5)
            if forward:
                return [case.operation(a), dropout]
            return [dropout, case.operation({**a, "dh": a["between"]})]

        expected = copied(given, np.copy)
        for operation in operations(expected):
            REFERENCE.run(operation)
        found = FINISHING.run(lambda a, of=operations: fuse_dropout(of(a))[0], given)
        bounds = case.bounds(dtype, wide(given), wide(expected))
        bounds["between"] = 2 * bounds["out"]
        for name in ("z", "between") if forward else ("out", "db"):
            assert_within(found[name], expected[name], bounds.get(name, 0))
    for part in ("keep_dropout", "dropout_only", "dropout_finish"):
        assert any(part in name for name in FINISHING.names), part


def check_products_on_the_way() -> None:
    """Narrow products, and the same in the launch of the backward pass, with and without dropout: the same bits."""
    for case, dtype in zip(PASSES[1::2], DTYPES, strict=True):
        for n, d, inner in ((13, 24, 3), (9, 8, 16), (64, 16, 1), (3, 5, 2)):
            given = filled(case, RNG, (n, d), dtype) | {"counters": np.array([7, 2])}
            real = given["db"].dtype
            given |= {"a": RNG.normal(size=(n, inner)).astype(dtype), "w": RNG.normal(size=(d, inner)).astype(dtype)}

            def product(a: Arrays) -> Operation:
                return Matmul(a["a"], a["w"].T, a["dh"])

            def whole(a: Arrays, case: OpCase = case, n: int = n) -> list[Operation]:
                dropout = Dropout(a["dh"], 0.3, 2**40 + 3, 1, a["counters"], a["dh"], 5)
                return fuse_dropout([product(a), *([dropout] * (n != 9)), case.operation({**a, "out": a["dh"]})])

            alone = SIMULATOR.run(product, given)
            a, w = wide(given)["a"], wide(given)["w"]
            bound = (inner + 1) * eps(real) * (np.abs(a) @ np.abs(w).T)
            bound = bound + eps_of(given["dh"].dtype) * np.abs(a @ w.T)
            assert_within(alone["dh"], a @ w.T, bound)
            expected = given
            for item in range(2):
                expected = FINISHING.run(lambda a, item=item, of=whole: of(a)[item], expected)
            if d == 5:  # rows are no whole vectors
                placed_given = copied(given, lambda a: placed(a, 0))
                assert len(fuse_products(whole(placed_given))) == 2
                continue
            found = FINISHING.run(lambda a, of=whole: fuse_products(of(a))[0], given)
            for name in ("dh", "db"):
                np.testing.assert_array_equal(found[name].astype("f8"), expected[name].astype("f8"))
    for part in ("narrow_product", "dropout_finish_product", "backward_relu_f4_v4_product"):
        names = SIMULATOR.names | FINISHING.names
        assert any(part in name for name in names), (part, names)


def check_gathers_on_the_way() -> None:
    """X, y and weights in one launch."""
    for dtype, d, indices in (("float32", 24, True), ("float64", 5, False), ("bfloat16", 3, False)):
        rows, n = 40, 21
        given = {
            "X": RNG.normal(size=(rows, d)).astype(dtype), "y": RNG.integers(0, 9, rows), "w": RNG.normal(size=rows),
            "order": RNG.permutation(rows), "counters": np.array([0, 8]),
        }  # fmt: skip
        if not indices:
            given["y"] = RNG.normal(size=(rows, 7)).astype(dtype)
        names = ("X", "y", "w")
        given |= {f"{name}_out": np.zeros_like(given[name][:n]) for name in names}

        def gathers(a: Arrays, names: tuple[str, ...] = names) -> list[Operation]:
            return [Gather(a[name], a["order"], a["counters"], a[f"{name}_out"]) for name in names]

        for count in (2, 3):
            (item,) = fuse_gathers(gathers(given)[:count])
            found = SIMULATOR.run(lambda a, count=count: fuse_gathers(gathers(a)[:count])[0], given)
            for name in names[:count]:
                np.testing.assert_array_equal(found[f"{name}_out"], given[name][given["order"][8 : 8 + n]])
            assert len(item.parts) == count


def check_extremes() -> None:
    """Weights and gradients whose sums, or squares, overflow or underflow."""
    for dtype in ("float32", "float64"):
        top, tiny = np.finfo(dtype).max, np.finfo(dtype).smallest_subnormal
        case = CASES["normalize_weights, in place"]
        for unit in (0, top, tiny * 64):
            given = case.arrays(RNG, (43,), dtype)
            given["weight"] *= unit
            compare(case, dtype, given, SIMULATOR.run(case.operation, given))
        for name, unit in (("clip", top / 64), ("clip, scaled", top / 64), ("clip, scaled", np.inf)):
            given = CASES[name].arrays(RNG, (43,), dtype)
            given["gradients"] *= given["gradients"].dtype.type(unit)
            found, expected = SIMULATOR.run(CASES[name].operation, given)["scalars"], given["scalars"]
            REFERENCE.run(CASES[name].operation(given))
            assert found[SKIP] == expected[SKIP] == (unit == np.inf)
            if unit != np.inf:  # the factor of a huge gradient is subnormal, and has only that many digits
                both = [NORM, FACTOR]
                np.testing.assert_allclose(found[both], expected[both], rtol=40 * eps(dtype), atol=tiny)


def check_storage() -> None:
    import ml_dtypes

    for storage, width in (("f4", 4), ("f8", 2), ("f2", 8), ("bf16", 8), ("i8", 1), ("bf16", 1)):
        load, store, load1, store1, rounded = access(storage, width)
        x = np.array([0.0, -1.5, 3.14159, np.inf, 65280.0, 1e-6, -np.inf, 7.0]).astype(compute_type(storage))
        if storage == "i8":
            x = np.arange(8)
        stored = np.zeros(8, STORAGE[storage])
        for i in range(0, 8, width):
            store(stored, i, x, i)
        expected = x.astype(ml_dtypes.bfloat16).view(np.uint16) if storage == "bf16" else x.astype(STORAGE[storage])
        np.testing.assert_array_equal(stored, expected)
        buffer = np.zeros(width, x.dtype)
        load(buffer, 0, stored, 8 - width)
        assert buffer[-1] == load1(stored, 7) == x[7]
        store1(stored, 0, x.dtype.type(1))
        assert load1(stored, 0) == 1
        if storage != "i8":
            store1(stored, 0, x.dtype.type(np.nan))
            assert np.isnan(load1(stored, 0))
            assert rounded(x[2]) == load1(stored, 2 if width > 2 else 0) or width <= 2


CHECKS = {
    check.__name__.removeprefix("check_"): check
    for check in (
        check_dropout_on_the_way,
        check_products_on_the_way,
        check_gathers_on_the_way,
        check_extremes,
        check_storage,
    )
}
CHECKS |= {name: partial(check_operation, name) for name in OPERATIONS if name != "matmul"}

if __name__ == "__main__":
    warnings.simplefilter("ignore")  # the simulator's threads do not inherit np.errstate
    CHECKS[sys.argv[1]]()
