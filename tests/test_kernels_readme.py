"""The five steps of ``kernels/README.md``, followed with the code shown there."""

from __future__ import annotations

import linecache
import os
import re
import subprocess
import sys
import textwrap
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import gpubackprop as gb

ROOT = Path(__file__).parents[1]
README = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^`([\w/]+\.py)`:\n\n```python\n(.*?)```$", README, re.DOTALL | re.MULTILINE))
F4, F8 = np.dtype(np.float32), np.dtype(np.float64)
NEEDS_NUMBA_CUDA = pytest.mark.skipif(find_spec("numba_cuda") is None, reason="numba-cuda is not installed")


def follow(path: str, module: Any) -> SimpleNamespace:
    """Run the README's code for a file among the names of that file's module; return what it defines."""
    block, name = BLOCKS[path], f"<README: {path}>"
    linecache.cache[name] = len(block), None, block.splitlines(keepends=True), name  # for inspect.getsource
    namespace = dict(vars(module))
    exec(compile(block, name, "exec"), namespace)  # with this file's import from __future__
    return SimpleNamespace(**namespace)


def test_every_block_of_code_names_its_file() -> None:
    assert len(BLOCKS) == README.count("```python") == 9


@pytest.mark.parametrize("path", BLOCKS)
def test_the_code_is_that_of_the_package(path: str) -> None:
    source = (ROOT / path).read_text(encoding="utf-8")
    found = any(textwrap.indent(BLOCKS[path], " " * spaces) in source for spaces in (0, 4, 8))
    assert found, f"{path} has changed: copy the new code to kernels/README.md"


def test_every_file_and_name_that_it_mentions_exists() -> None:
    for name in re.findall(r"`([\w/]+\.(?:py|csv))`", README):
        assert (ROOT / name).exists() or (ROOT / "kernels" / name).exists(), name
    kernels = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "kernels").rglob("*.py"))
    for name in ("compile_bias_activation_forward", "per_definition", "static_range", "fold_rows", "block_reductions"):
        assert name in README
        assert name in kernels


@pytest.mark.parametrize("dtype", [F4, F8])
@pytest.mark.parametrize("n", [1, 15, 1000])
def test_the_operation_is_bound_and_computes_what_the_formula_says(
    n: int, dtype: np.dtype[Any], rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpubackprop.backends import cpu, reference
    from gpubackprop.kernels.cpu import training
    from gpubackprop.step import operations

    monkeypatch.setattr(operations, "OPERATIONS", dict(operations.OPERATIONS))  # which the README's class enters
    Accumulate = follow("gpubackprop/step/operations.py", operations).Accumulate
    assert operations.OPERATIONS["accumulate"] is Accumulate
    formula = follow("gpubackprop/backends/reference.py", reference).do_accumulate
    compile_accumulate = follow("kernels/cpu/training.py", training).compile_accumulate
    monkeypatch.setattr(training, "compile_accumulate", compile_accumulate)
    bind = follow("gpubackprop/backends/cpu.py", cpu).bind_accumulate

    total, term = rng.standard_normal((2, n)).astype(dtype)
    for first in (True, False):
        one = Accumulate(None if first else total, term, np.zeros_like(term))
        assert one.flops == (0 if first else n)
        kernel, arguments = bind(gb.get_backend("cpu"), one)
        assert kernel.function.__code__.co_filename == "<README: kernels/cpu/training.py>"
        kernel(*arguments)
        expected = Accumulate(one.total, term, np.zeros_like(term))
        formula(gb.get_backend("reference"), expected)
        np.testing.assert_array_equal(one.out, term if first else total + term)
        np.testing.assert_array_equal(one.out, expected.out)


@pytest.mark.compilers
@NEEDS_NUMBA_CUDA
def test_the_cuda_kernel_compiles_and_moves_16_bytes_at_a_time() -> None:
    pytest.importorskip("cuda.core", reason="cuda-core is not installed; make test-all installs it")
    import cuda_compile

    from gpubackprop.kernels.cuda import training

    namespace = {"cuda_training": follow("kernels/cuda/training.py", training), "dtype": F4, "vector": 4}
    line = textwrap.indent(BLOCKS["tests/cuda_compile.py"], "    ")
    exec(f"def sources():\n{line}", namespace)
    [(source, wanted)] = namespace["sources"]()  # type: ignore[operator]
    assert wanted == 16
    facts = cuda_compile.facts(source, wanted, (9, 0), cuda_compile.ptxas())
    cuda_compile.check(facts)


@pytest.mark.compilers
@NEEDS_NUMBA_CUDA
def test_the_cuda_kernel_runs_in_the_simulator() -> None:
    done = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
def test_the_cuda_kernel_is_launched_by_the_names_of_its_parameters(rng: np.random.Generator) -> None:
    launches = import_module("gpubackprop.backends.cuda.launches")
    backend: Any = gb.get_backend("cuda")
    total, term = rng.standard_normal((2, 1000)).astype(F4)
    o = launches.table.Accumulate(*map(backend.asarray, (total, term, np.zeros_like(term))))
    backend._run(follow("gpubackprop/backends/cuda/launches.py", launches).accumulate(backend._launches, o))
    np.testing.assert_array_equal(backend.to_numpy(o.out), total + term)


def simulate() -> None:
    """Run the cases of the README's operation with its kernel, in a process in which Numba simulates."""
    sys.path.insert(0, str(Path(__file__).parent))
    import cuda_simulator

    from gpubackprop.kernels.cuda import training

    training.accumulate = follow("kernels/cuda/training.py", training).accumulate
    cuda_simulator.check_operation("accumulate")


if __name__ == "__main__":
    simulate()
